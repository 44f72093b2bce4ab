"""finetune_siglip.py: each flag acts. Those seen at work in other tests are not repeated here."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, tiny_args
from test_finetune_siglip import call
from test_siglip_model import classifier, make_args, volume_of

import common
import finetune_siglip as siglip

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, float("nan")], [0, 0, -1]])


def criterion(*words):
    return siglip.build_criterion(
        make_args("--arch", "siglip-tiny", *words), type("D", (), {"targets": TARGETS.numpy()})
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loss", "bce"], lambda: common.bce_loss(LOGITS, TARGETS)),
        (["--loss", "focal"], lambda: common.focal_loss(LOGITS, TARGETS, 1.0, 2.0)),
        (["--loss", "focal", "--focal-gamma", 0.5], lambda: common.focal_loss(LOGITS, TARGETS, 1.0, 0.5)),
        (["--loss", "focal", "--focal-alpha", 0.3], lambda: common.focal_loss(LOGITS, TARGETS, 0.3, 2.0)),
        (
            ["--loss", "focal", "--focal-alpha", 0.3, "--focal-form", "balanced"],
            lambda: common.focal_loss(LOGITS, TARGETS, 0.3, 2.0, form="balanced"),
        ),
        (["--loss", "asl"], lambda: common.asymmetric_loss(LOGITS, TARGETS, 4, 1, 0.05)),
        (["--loss", "asl", "--asl-gamma-neg", 2], lambda: common.asymmetric_loss(LOGITS, TARGETS, 2, 1, 0.05)),
        (["--loss", "asl", "--asl-gamma-pos", 0], lambda: common.asymmetric_loss(LOGITS, TARGETS, 4, 0, 0.05)),
        (["--loss", "asl", "--asl-clip", 0.2], lambda: common.asymmetric_loss(LOGITS, TARGETS, 4, 1, 0.2)),
        (["--loss", "balanced"], lambda: common.bce_loss(LOGITS, TARGETS, pos_weight=torch.tensor([1, 2, 3.0]))),
        (
            ["--loss", "balanced", "--max-pos-weight", 1.5],
            lambda: common.bce_loss(LOGITS, TARGETS, pos_weight=torch.tensor([1, 1.5, 1.5])),
        ),
    ],
)
def test_loss_flags(words, expected):
    torch.testing.assert_close(criterion(*words)(LOGITS, TARGETS), expected())


def test_loss_flags_differ_from_each_other():
    words = [["bce"], ["focal"], ["balanced"], ["asl"], ["focal", "--focal-gamma", 1], ["focal", "--focal-alpha", 0.5]]
    values = [round(float(criterion("--loss", *w)(LOGITS, TARGETS)), 6) for w in words]
    assert len(set(values)) == len(values)


def test_reading_flags(tmp_path):
    """--layout, --value-range, --augment and --metadata change what the model is given."""
    unit = np.linspace(0, 1, 4 * 6 * 8, dtype=np.float32).reshape(1, 4, 6, 8)
    np.savez(tmp_path / "a.npz", image=unit)
    columns = {"series_id": ["a", "b"], "split": ["train", "val"], "img_path": "a.npz", "x": [1, 0]}
    pd.DataFrame(columns).to_csv(tmp_path / "t.csv", index=False)

    def first(*words):
        args = make_args(
            "--arch", "siglip-tiny", "--csv", tmp_path / "t.csv", "--label-columns", "x", "--num-slices", 4, *words
        )
        return siglip.build_datasets(args)[0]

    assert first().read(0).array.shape == (4, 6, 8) and first().read(0).array.max() == 1500
    assert first("--layout", "CHWD").read(0).array.shape == (8, 6, 4)
    assert first("--value-range", "hu").read(0).array.max() == 1
    assert "theta" in first()[0, 0] and "theta" not in first("--no-augment")[0, 0]
    pd.DataFrame({"VolumeName": ["a", "b"], "RescaleSlope": 1, "RescaleIntercept": -100}).to_csv(
        tmp_path / "m.csv", index=False
    )
    moved = first("--value-range", "stored", "--metadata", tmp_path / "m.csv").read(0).array
    assert moved.min() == -100


def test_model_flags():
    plain = classifier("--arch", "siglip-tiny", "--num-slices", 5).train()
    normed = classifier(
        "--arch", "siglip-tiny", "--num-slices", 5, "--feature-norm", "batch", "--dropout-rate", 0
    ).train()
    assert plain.feature_norm is None
    seen = []
    normed.classifier[1].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    normed(volume_of(B=8))
    torch.testing.assert_close(seen[0].mean(0), torch.zeros_like(seen[0][0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.ones_like(seen[0][0]), atol=0.2, rtol=0)
    assert classifier("--arch", "siglip-tiny", "--dropout-rate", 0.7).classifier[0].p == 0.7


def test_min_lr_ratio_is_the_end_of_the_cosine():
    args = make_args("--arch", "siglip-tiny", "--scheduler", "cosine", "--min-lr-ratio", 0.2, "--lr", 0.5)
    assert siglip.lr_at(100, 100, args) == pytest.approx(0.1)


def state_of(out):
    return common.load_checkpoint(out / "last.pth")["state"]


def test_optimization_flags(tiny_ct, tmp_path):
    """--max-steps, the plateau's two, --ema-decay, --monitor, --early-stopping-patience and --top-k."""
    out = tmp_path / "run"
    more = [
        "--max-steps",
        10,
        "--plateau-patience",
        0,
        "--plateau-factor",
        0.1,
        "--lr",
        0,
        "--use-ema",
        "--ema-decay",
        0,
    ]
    assert call(*tiny_args(tiny_ct, out, *more, "--monitor", "val_loss", "--top-k", 2)) == 0
    state, saved = state_of(out), common.load_checkpoint(out / "last.pth")
    assert state["step"] == 10 and state["lr_factor"] == pytest.approx(
        0.01
    )  # evaluated 3 times, no gain after the first
    assert all(torch.equal(v, saved["ema"][k]) for k, v in saved["model"].items())
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [e["score"] for e in state["best"]] == [-r["val_loss"] for r in records[:2]]
    assert len(list(out.glob("checkpoint_epoch_*.pth"))) == 2
    assert call(*tiny_args(tiny_ct, out, "--overwrite", "--lr", 0, "--epochs", 9, "--early-stopping-patience", 2)) == 0
    assert state_of(out)["step"] == 4 * 3  # the first evaluation is the best, two more bring nothing


def test_precision_flags(tiny_ct, tmp_path, monkeypatch):
    losses = {}
    for amp in ("none", "bf16"):
        words = ["--epochs", 1, "--amp", amp] + (["--grad-checkpointing"] if amp == "none" else [])
        assert call(*tiny_args(tiny_ct, tmp_path / amp, *words)) == 0
        losses[amp] = json.loads((tmp_path / amp / "results.jsonl").read_text())["train_loss"]
    assert losses["none"] != losses["bf16"] and losses["none"] == pytest.approx(losses["bf16"], rel=0.05)
    assert (
        siglip.autocast_of(make_args("--arch", "siglip-tiny", "--amp"), torch.device("cpu"))[0].fast_dtype
        == torch.bfloat16
    )
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(type(self).__name__))
    assert call(*tiny_args(tiny_ct, tmp_path / "c", "--epochs", 1, "--no-compile")) == 0 and not compiled
    assert call(*tiny_args(tiny_ct, tmp_path / "c", "--epochs", 1, "--compile", "--overwrite")) == 0
    assert compiled == ["CTClassifier"]
    try:
        assert call(*tiny_args(tiny_ct, tmp_path / "d", "--epochs", 1, "--deterministic")) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_eval_batch_size(tiny_ct, tmp_path, monkeypatch):
    sizes = []
    features = siglip.CTClassifier.features
    monkeypatch.setattr(
        siglip.CTClassifier, "features", lambda self, v, *a: (sizes.append(len(v)), features(self, v, *a))[1]
    )
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--max-steps", 1, "--eval-batch-size", 5)) == 0
    assert sizes == [4, 5, 5, 5, 5]  # one training batch; 7 cases in padded fives, for the metrics and the thresholds


def test_allow_partial(tiny_ct, tmp_path):
    weights = siglip.export_weights(classifier("--arch", "siglip-tiny"))
    common.save_weights(tmp_path / "part.pth", {k: v for k, v in weights.items() if ".1." not in k or "fc1" not in k})
    words = tiny_args(tiny_ct, tmp_path / "run", "--pretrained", tmp_path / "part.pth", "--max-steps", 1)
    words = [w for i, w in enumerate(words) if w != "--arch" and words[i - 1] != "--arch"]
    assert call(*words) == 2
    assert call(*words, "--allow-partial", "--overwrite") == 0
    assert "missing" in (tmp_path / "run" / "training.log").read_text()


def test_a_hanging_data_worker_ends_the_run(tiny_ct, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(siglip.CTVolumes, "load", lambda self, index, jitter=0.0: time.sleep(30))
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--num-workers", 1, "--timeout-minutes", 0.03)) == 1
    assert "timed out after" in capsys.readouterr().err


def test_wandb_is_off_unless_asked_and_tells_no_paths(tiny_ct, tmp_path, monkeypatch, capsys):
    for key in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    assert call(*tiny_args(tiny_ct, tmp_path / "off", "--max-steps", 1)) == 0
    assert not (tmp_path / "off" / "wandb").exists()
    assert (
        call(*tiny_args(tiny_ct, tmp_path / "on", "--max-steps", 1, "--wandb-mode", "offline", "--wandb-project", "p"))
        == 0
    )
    files = [f for f in (tmp_path / "on" / "wandb").rglob("*") if f.is_file()]
    logs = [f for f in files if f.suffix == ".wandb"]
    assert logs and not any(str(tmp_path).encode() in f.read_bytes() or b"case1" in f.read_bytes() for f in logs)


def test_config_file_sets_defaults_and_refuses_unknown_keys(tiny_ct, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("optimization: {lr: 0.5, epochs: 7}\nlabel-columns: [a, b]\nuse_ema: true\n")
    (tmp_path / "c.ini").write_text("[a]\nlearning-rate = 0.25\naugment = no\n")
    base = ["--csv", "x", "--pretrained", "none"]
    args = siglip.parse_args([*base, "--config", str(tmp_path / "c.yaml"), "--epochs", "9"])
    assert (args.lr, args.epochs, args.label_columns, args.use_ema) == (0.5, 9, ["a", "b"], True)
    args = siglip.parse_args([*base, "--config", str(tmp_path / "c.ini")])
    assert (args.lr, args.augment) == (0.25, False)
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    with pytest.raises(common.UserError, match=r"unknown key 'epoch' \(did you mean 'epochs'\?\)"):
        siglip.parse_args([*base, "--config", str(tmp_path / "bad.yaml")])
    assert len(LABELS) == 3


@pytest.mark.parametrize(
    "flag", ["--epochs", "--batch-size", "--accum-steps", "--top-k", "--save-every", "--max-grad-norm"]
)
def test_zero_is_refused_where_it_would_stop_the_run(flag):
    with pytest.raises(common.UserError, match=f"{flag} must be"):
        make_args("--arch", "siglip-tiny", flag, 0)


def test_augmentation_is_exact_under_autocast():
    """In bf16 the sampling grid would be off by up to a pixel."""
    model = classifier("--arch", "siglip-tiny", "--num-slices", 5)
    theta, gain = (x[None].expand(2, *x.shape) for x in siglip.draw_augmentation(np.random.default_rng(0)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.to_channels(volume_of(), theta, gain)
    torch.testing.assert_close(inside, model.to_channels(volume_of(), theta, gain))


def test_outputs_that_are_not_finite_are_no_unreadable_volumes(tiny_ct, tmp_path, monkeypatch, capsys):
    classify = siglip.CTClassifier.classify
    broken = lambda self, f: classify(self, f) * (1 if self.training else float("nan"))  # noqa: E731
    monkeypatch.setattr(siglip.CTClassifier, "classify", broken)
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--max-steps", 1)) == 2
    assert "outputs are not finite" in capsys.readouterr().err


def test_overwrite_forgets_the_run_that_was_there(tiny_ct, tmp_path):
    words = tiny_args(tiny_ct, tmp_path / "run", "--epochs", 2)
    assert call(*words) == 0 and (tmp_path / "run" / "last_previous.pth").exists()
    assert call(*words, "--overwrite", "--max-steps", 1) == 0
    assert not (tmp_path / "run" / "last_previous.pth").exists() and state_of(tmp_path / "run")["step"] == 1
