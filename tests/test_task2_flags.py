"""run_task2.py: each flag acts, in the documented direction. Those seen at work in other tests are not repeated."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import LABELS, slice_args
from test_run_task2 import LOGS, call
from test_task2_model import args_of

import common
import run_task2 as task2

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, float("nan")], [0, 0, -1]])
RATIO = torch.tensor([1, 2, 3.0])  # negatives / positives of TARGETS


def criterion(*words):
    return task2.build_criterion(args_of(*map(str, words)), type("D", (), {"targets": TARGETS.numpy()}))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], lambda: common.focal_loss(LOGITS, TARGETS, 0.85, 4.0)),
        (["--loss", "focal", "--focal-gamma", 1], lambda: common.focal_loss(LOGITS, TARGETS, 0.85, 1.0)),
        (["--focal-alpha", 0.25, "--focal-form", "balanced"],
         lambda: common.focal_loss(LOGITS, TARGETS, 0.25, 4.0, form="balanced")),
        (["--class-weights", "both"], lambda: common.focal_loss(LOGITS, TARGETS, 0.85, 4.0, weight=RATIO)),
        (["--class-weights", "positives"], lambda: common.focal_loss(LOGITS, TARGETS, 0.85, 4.0, pos_weight=RATIO)),
        (["--loss", "bce"], lambda: common.bce_loss(LOGITS, TARGETS, pos_weight=RATIO)),
        (["--loss", "bce", "--max-pos-weight", 1.5],
         lambda: common.bce_loss(LOGITS, TARGETS, pos_weight=RATIO.clamp(max=1.5))),
        (["--loss", "bce", "--class-weights", "both"], lambda: common.bce_loss(LOGITS, TARGETS, RATIO)),
        (["--loss", "bce", "--class-weights", "none"], lambda: common.bce_loss(LOGITS, TARGETS)),
        (["--loss", "asl"], lambda: common.asymmetric_loss(LOGITS, TARGETS, 6, 1, 0.05)),
        (["--loss", "asl", "--asl-gamma-neg", 2, "--asl-gamma-pos", 0, "--asl-clip", 0.2],
         lambda: common.asymmetric_loss(LOGITS, TARGETS, 2, 0, 0.2)),
        (["--loss", "asl", "--class-weights", "positives"],
         lambda: common.asymmetric_loss(LOGITS, TARGETS, 6, 1, 0.05, pos_weight=RATIO)),
    ],
)  # fmt: skip
def test_loss_flags(words, expected):
    torch.testing.assert_close(criterion(*words)(LOGITS, TARGETS), expected())


def test_weights_of_the_losses_against_a_loop():
    """weight multiplies both signs of a label, pos_weight its positives; gradients too, by finite differences."""
    x, t = LOGITS.double(), (TARGETS == 1).double()
    single = {
        "bce": lambda a, b: common.bce_loss(a, b),
        "focal": lambda a, b: common.focal_loss(a, b, 0.85, 4.0),
        "asl": lambda a, b: common.asymmetric_loss(a, b, 6, 1, 0.05, detach_weight=False),
    }
    whole = {
        "bce": lambda a, **w: common.bce_loss(a, t, **w),
        "focal": lambda a, **w: common.focal_loss(a, t, 0.85, 4.0, **w),
        "asl": lambda a, **w: common.asymmetric_loss(a, t, 6, 1, 0.05, detach_weight=False, **w),
    }
    for name in single:
        pairs = zip(x.view(-1, 1, 1), t.view(-1, 1, 1), strict=True)
        each = torch.stack([single[name](a, b) for a, b in pairs]).view_as(x)
        both = whole[name](x, weight=RATIO.double())
        torch.testing.assert_close(both, (each * RATIO).mean())
        if name != "focal":  # the focal factor sees the weighted cross-entropy only through p
            torch.testing.assert_close(
                whole[name](x, pos_weight=RATIO.double()), (each * torch.where(t == 1, RATIO.double(), 1)).mean()
            )
        leaf = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda a, n=name: whole[n](a, pos_weight=RATIO.double()), leaf)


# ---- data


def first_item(folder, *words, key=(3, 1)):
    args = task2.parse_args(
        [str(w) for w in ("--slice-dir", folder, "--pretrained", "none", "--label-columns", *LABELS, *words)]
    )
    args.augment_on = "workers" if args.augment_on == "auto" else args.augment_on
    train_set = task2.build_datasets(args)[0]
    return train_set[key], train_set, args


def test_augmentation_flags(tiny_slices):
    """Each magnitude alone changes the slice; at zero it does not; items are a function of (seed, epoch, index)."""
    still = {"--rotation": 0, "--flip-prob": 0, "--shift": 0, "--zoom": 0, "--jitter": 0}
    plain = first_item(tiny_slices, "--no-augment")[0]["image"]
    none = first_item(tiny_slices, *[w for pair in still.items() for w in pair])[0]["image"]
    assert (plain == none).all() and plain.dtype == torch.uint8 and plain.shape == (1, 1, 32, 32)
    for flag, value in (("--rotation", 20), ("--flip-prob", 1), ("--shift", 0.3), ("--zoom", 0.3), ("--jitter", 0.5)):
        words = [w for pair in (still | {flag: value}).items() for w in pair]
        image = first_item(tiny_slices, *words)[0]["image"]
        assert (image != plain).any(), flag
        if flag == "--flip-prob":
            assert (image == plain.flip(-1)).all()
    a, dataset, _ = first_item(tiny_slices)
    assert torch.equal(a["image"], dataset[3, 1]["image"]) and not torch.equal(a["image"], dataset[4, 1]["image"])
    assert not torch.equal(a["image"], first_item(tiny_slices, "--seed", 1)[0]["image"])
    nearest = first_item(tiny_slices, "--interpolation", "nearest", "--jitter", 0)[0]["image"]
    assert set(nearest.flatten().tolist()) <= {*plain.flatten().tolist(), 0}
    bilinear = first_item(tiny_slices, "--jitter", 0)[0]["image"]
    assert not set(bilinear.flatten().tolist()) <= {*plain.flatten().tolist(), 0}


def test_turning_moves_a_dot_where_the_formula_says():
    """10 degrees, zoom and shift: a bright dot lands where the inverse of theta maps it, to a pixel."""
    image = torch.zeros(1, 1, 101, 101, dtype=torch.uint8)
    image[0, 0, 20, 60] = 255
    rng = np.random.default_rng(0)
    for _ in range(5):
        theta, _ = task2.draw_augmentation(rng, args_of("--rotation", "10", "--flip-prob", "0.5"), 1)
        warped = task2.warp(image.float(), theta, torch.ones(1, 2), "bilinear")
        y, x = divmod(int(warped.flatten().argmax()), 101)
        matrix = np.vstack([theta[0].numpy(), [0, 0, 1]])
        expected = np.linalg.inv(matrix) @ [(60 - 50) / 50.5, (20 - 50) / 50.5, 1]
        assert abs(x - 50 - expected[0] * 50.5) < 1 and abs(y - 50 - expected[1] * 50.5) < 1


def test_jitter_against_its_definition():
    """Contrast about the mean, then brightness, as ColorJitter; the grid equals F.affine_grid."""
    x = torch.rand(2, 1, 9, 12) * 255
    theta, gain = torch.randn(2, 2, 3) * 0.3, torch.tensor([[1.2, 0.9], [0.8, 1.3]])
    grid = F.affine_grid(theta, [2, 1, 9, 12], align_corners=False)
    torch.testing.assert_close(task2.sampling_grid(theta, 9, 12), grid, atol=1e-6, rtol=1e-5)
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    for i, image in enumerate(task2.warp(x, still, gain, "bilinear")):
        expected = ((x[i] - x[i].mean()) * gain[i, 0] + x[i].mean()) * gain[i, 1]
        torch.testing.assert_close(image, expected.clamp(0, 255), atol=1e-2, rtol=1e-4)


def test_nearest_by_pillow_is_nearest_by_torch():
    """The same pixels but for those on an edge between two neighbours; contrast and brightness to a grey level."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, 3, 40, 50)).astype(np.uint8))
    theta, gain = task2.draw_augmentation(np.random.default_rng(1), args_of(), 6)
    ours = task2.warp_nearest(x, theta, gain)
    theirs = task2.warp(x.float(), theta, gain, "nearest")
    near = (ours.float() - theirs).abs() <= 1
    assert near.float().mean() > 0.98 and ours.dtype == torch.uint8


def test_device_and_workers_augment_alike(tiny_slices):
    """--augment-on: the same draws, equal pixels up to the rounding of grey levels; under autocast too."""
    a, _, args = first_item(tiny_slices, "--augment-on", "workers")
    b, _, _ = first_item(tiny_slices, "--augment-on", "device")
    assert "theta" in b and "theta" not in a
    model = task2.SliceClassifier(args)
    by_worker = model.to_input(a["image"])
    with torch.autocast("cpu", torch.bfloat16):
        on_device = model.to_input(b["image"], b["theta"], b["gain"])
    assert (by_worker - on_device).abs().max() < 2.5 / 255 / 0.22
    assert (by_worker - on_device).abs().mean() < 0.5 / 255 / 0.22


def test_windows_of_hu_slices(tiny_slices, tmp_path):
    """--windows: three channels from HU; the same grey levels from the loader (workers) and the model (device)."""
    folder = tmp_path / "hu"
    (folder / "slices").mkdir(parents=True)
    (folder / "splits").mkdir()
    hu = np.random.default_rng(0).integers(-1200, 1500, (6, 16, 16)).astype(np.int16)
    for split in ("train", "valid"):
        rows = []
        for i in range(3):
            np.save(folder / "slices" / f"{split}{i}.npy", hu[i + 3 * (split == "valid")])
            rows.append([f"{split}{i}", f"{split}{i}", f"slices/{split}{i}.npy", 1, 0, 1])
        table = pd.DataFrame(rows, columns=["slice_id", "volume_name", "file_path", *LABELS])
        table.to_csv(folder / "splits" / f"{split}_slices.csv", index=False)
    words = ["--data-dir", tmp_path, "--windows", "lung", "mediastinum", "0,100"]
    item, dataset, args = first_item(folder, *words, "--no-augment")
    assert args.window_values == [[-600, 1000], [40, 400], [0, 100]] and item["image"].dtype == torch.int16
    x = task2.SliceClassifier(args).to_input(item["image"])  # (1, 3, 16, 16)
    for c, (centre, width) in enumerate(args.window_values):
        expected = ((dataset.read(1) - (centre - width / 2)) / width).clip(0, 1)
        mean, std = task2.IMAGENET_MEAN[c], task2.IMAGENET_STD[c]
        assert np.abs(x[0, c].numpy() * std + mean - expected).max() <= 0.5 / 255 + 1e-6
    levels = task2.to_levels(item["image"], args)
    torch.testing.assert_close(task2.SliceClassifier(args).to_input(levels), x)
    warped = first_item(folder, *words)[0]["image"]
    assert warped.shape == (1, 3, 16, 16) and warped.dtype == torch.uint8
    assert first_item(folder, "--data-dir", tmp_path)[2].window_values == [[-300, 1400]]


def test_image_size_and_data_dir(tiny_slices, tmp_path):
    assert first_item(tiny_slices, "--image-size", 20, "--no-augment")[0]["image"].shape == (1, 1, 20, 20)
    import shutil

    folder = shutil.copytree(tiny_slices, tmp_path / "slices")
    labels = pd.read_csv(folder / "multi_abnormality_labels.csv")
    (folder / "multi_abnormality_labels.csv").unlink()
    (tmp_path / "data").mkdir()
    labels.assign(first=1).to_csv(tmp_path / "data" / "multi_abnormality_labels.csv", index=False)
    dataset = first_item(folder, "--data-dir", tmp_path / "data")[1]
    assert (dataset.targets[:, 0] == 1).all()


def test_cutmix_and_mixup_targets_are_mixed_by_pixels(tiny_slices):
    """Share of the partner's pixels = share of its label, over many draws; box and blend are those of the items."""
    model = task2.SliceClassifier(args_of("--model", "efficientnet_b0"))
    words = ["--use-advanced-aug", "--no-augment", "--cutmix-prob"]
    for prob, alpha in ((1, 0.2), (0, 0.2), (0, 5)):
        shares = []
        dataset = first_item(tiny_slices, *words, prob, "--mixup-alpha", alpha)[1]
        for i in range(30):
            item = dataset[1, i]
            a, b = item["image"].float()
            assert (a == torch.from_numpy(dataset.image(i))).all()
            x = item["image"].float().expand(2, 3, 32, 32)
            mixed = model.mix_pairs(x, item["mix"][None])[0, 0]
            share, y0, y1, x0, x1 = item["mix"].tolist()
            expected = (1 - share) * a[0] + share * b[0]
            expected[int(y0) : int(y1), int(x0) : int(x1)] = b[0, int(y0) : int(y1), int(x0) : int(x1)]
            torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=1e-5)
            pixels = share + (1 - share) * (y1 - y0) * (x1 - x0) / 32**2
            partner = next(j for j in range(len(dataset)) if (dataset.image(j) == b.numpy()).all())
            wanted = (1 - pixels) * dataset.targets[i] + pixels * dataset.targets[partner]
            np.testing.assert_allclose(item["target"], wanted, atol=1e-6)
            shares.append(pixels)
            assert (share == 0) == (prob == 1) and 0 <= pixels <= 1
        assert np.std(shares) > (0.02 if alpha == 5 else 0.15)
        middle = np.mean([0.2 < s < 0.8 for s in shares])
        assert middle > 0.7 if alpha == 5 else True


def test_mixing_trains_on_soft_targets(tiny_slices, tmp_path):
    """The loss of a batch of pairs is that of the mixed image and the mixed target."""
    item, _, args = first_item(tiny_slices, "--use-advanced-aug", "--loss", "bce", "--class-weights", "none")
    batch = {k: v[None] for k, v in item.items()}
    model = task2.SliceClassifier(args).eval()
    loss, _ = task2.compute_loss(model, batch, task2.MultiLabelLoss(args, np.ones((1, 3))))
    x = model.mix_pairs(model.to_input(item["image"]), item["mix"][None])
    t = item["target"][None]
    expected = F.binary_cross_entropy_with_logits(model.head(model.features(x)), t.nan_to_num(0), reduction="none")
    torch.testing.assert_close(loss, expected[~t.isnan()].mean())


def test_bag_size(tiny_slices):
    """Bags of --bag-size slices, masked where a volume has fewer; spread over it; at other places in each epoch."""
    item, dataset, args = first_item(tiny_slices, "--aggregate", "mil", "--bag-size", 3, "--no-augment")
    assert len(dataset) == 16 and item["image"].shape == (3, 1, 32, 32)
    counts = [len(s) for s in dataset.slices_of]
    for v in range(16):
        assert dataset[0, v]["mask"].tolist() == [i < counts[v] for i in range(3)]
    four = counts.index(4)
    pictures = {tuple(dataset[e, four]["image"].flatten().tolist()) for e in range(12)}
    assert len(pictures) > 1
    warped = first_item(tiny_slices, "--aggregate", "mil", "--bag-size", 3, key=(3, four))[0]["image"]
    assert warped.shape == (3, 1, 32, 32)


# ---- model and optimization


def test_model_flags():
    assert task2.SliceClassifier(args_of("--dropout-rate", "0.6")).classifier[0].p == 0.6
    assert task2.SliceClassifier(args_of("--dropout-rate", "0.6")).classifier[3].p == 0.3
    for depth, expected in ((0.2, 0.2 * 15 / 16), (0.0, 0.0)):
        model = task2.EfficientNet(depth)
        assert model.features[7][0].drop == pytest.approx(expected)
        model.train()
        x = torch.randn(64, 3, 32, 32)
        torch.manual_seed(0)
        a = model.features[:4](x)
        torch.manual_seed(1)
        assert torch.equal(a, model.features[:4](x)) == (depth == 0)


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    block = task2.MBConv(1, 3, 1, 8, 8, 0.4).train()
    x = torch.randn(4000, 8, 1, 1)
    y = block(x) - x
    dropped = (y == 0).flatten(1).all(1).float().mean()
    assert dropped == pytest.approx(0.4, abs=0.03)
    block.drop = 0.0
    whole = block(x) - x
    kept = (y != 0).flatten(1).any(1)
    torch.testing.assert_close(y[kept], whole[kept] / 0.6, atol=1e-4, rtol=1e-4)


def test_optimizer_groups():
    """--weight-decay on matrices alone; --optimizer; --lr."""
    args = args_of("--model", "efficientnet_b0", "--weight-decay", "0.3", "--lr", "0.7")
    model = task2.SliceClassifier(args)
    decayed, plain = task2.build_optimizer(model, args).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"]) == (0.3, 0, 0.7)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    sgd = task2.build_optimizer(model, args_of("--model", "efficientnet_b0", "--optimizer", "sgd"))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9


def state_of(out):
    return common.load_checkpoint(out / task2.LAST)["state"]


def results_of(out, version=0):
    return [json.loads(x) for x in (out / LOGS / f"version_{version}" / "results.jsonl").read_text().splitlines()]


def test_optimization_flags(tiny_slices, tmp_path):
    """--max-steps, the plateau's two, --ema-decay, --monitor, --early-stopping-patience, --top-k, --max-grad-norm."""
    more = ["--max-steps", 12, "--plateau-patience", 0, "--plateau-factor", 0.1, "--lr", 0, "--use-ema"]
    more += ["--ema-decay", 0, "--monitor", "macro_auroc", "--top-k", 2]
    assert call(*slice_args(tiny_slices, tmp_path, *more)) == 0
    saved = common.load_checkpoint(tmp_path / task2.LAST)
    state = saved["state"]
    assert state["step"] == 12
    scores = [r["macro_auroc"] for r in results_of(tmp_path)]
    assert len(scores) == 3 and state["best"][0]["score"] == max(scores) and len(state["best"]) == 2
    stale = sum(s <= max(scores[:i]) for i, s in enumerate(scores) if i)
    assert state["lr_factor"] == pytest.approx(0.1**stale)
    assert all(torch.equal(v, saved["ema"][k]) for k, v in saved["model"].items())
    more = ["--overwrite", "--lr", 0, "--epochs", 9, "--early-stopping-patience", 1, "--monitor", "macro_f1"]
    more += ["--eval-every", 1]
    assert call(*slice_args(tiny_slices, tmp_path, *more)) == 0
    assert state_of(tmp_path)["step"] < 45
    norms = {}
    for norm in ("inf", 1e-9):
        more = ["--overwrite", "--optimizer", "sgd", "--lr", 1, "--max-steps", 1, "--max-grad-norm", norm]
        assert call(*slice_args(tiny_slices, tmp_path, *more, "--accum-steps", 2, "--batch-size", 4)) == 0
        norms[norm] = common.load_checkpoint(tmp_path / task2.LAST)["model"]["classifier.4.bias"]
    assert not torch.equal(norms["inf"], norms[1e-9])


def test_schedule_flags():
    args = args_of("--scheduler", "cosine", "--min-lr-ratio", "0.2", "--lr", "0.5", "--warmup", "4")
    assert task2.lr_at(100, 100, args) == pytest.approx(0.1) and task2.lr_at(0, 100, args) == pytest.approx(0.125)
    assert task2.lr_at(50, 100, args_of("--scheduler", "constant", "--lr", "0.5")) == 0.5


def test_precision_flags(tiny_slices, tmp_path, monkeypatch):
    losses = {}
    for amp in ("none", "bf16"):
        assert call(*slice_args(tiny_slices, tmp_path / amp, "--max-steps", 1, "--amp", amp)) == 0
        losses[amp] = results_of(tmp_path / amp)[0]["train_loss"]
    assert losses["none"] != losses["bf16"] and losses["none"] == pytest.approx(losses["bf16"], rel=0.1)
    assert task2.parse_args(["--use-mixed-precision"]).amp == task2.parse_args(["--amp"]).amp == "auto"
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(type(self).__name__))
    assert call(*slice_args(tiny_slices, tmp_path / "c", "--max-steps", 1, "--compile", "--deterministic")) == 0
    assert compiled == ["SliceClassifier"] and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_evaluation_flags(tiny_slices, tmp_path, monkeypatch, capsys):
    sizes = []
    rows = task2.SliceClassifier.slice_rows
    monkeypatch.setattr(task2.SliceClassifier, "slice_rows", lambda s, x: (sizes.append(len(x)), rows(s, x))[1])
    words = slice_args(tiny_slices, tmp_path, "--max-steps", 1, "--eval-batch-size", 5, "--mode", "both")
    assert call(*words, "--threshold", 0.9, "--save-every", 1) == 0
    assert set(sizes) == {5} and len(sizes) == 3 * 5  # 21 slices: metrics, thresholds, results
    assert "0.9 (--threshold)" in capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "evaluation_results.json").read_text())
    assert set(results["thresholds"].values()) == {0.9} and results["split"] == "valid"
    assert call("run_task2.py", "--mode", "evaluate", "--slice-dir", tiny_slices, "--split", "train", "--output-dir",
                tmp_path, "--num-workers", 0) == 0  # fmt: skip
    results = json.loads((tmp_path / "results" / "evaluation_results.json").read_text())
    assert results["n_volumes"] == 16 and "trained on these volumes" in results["notes"][0]


def test_export_is_read_by_the_original_code(tiny_slices, tmp_path):
    assert call(*slice_args(tiny_slices, tmp_path, "--max-steps", 1, "--export", tmp_path / "e.pth")) == 0
    exported = torch.load(tmp_path / "e.pth", weights_only=True)
    best = common.load_checkpoint(tmp_path / task2.BEST)["model"]
    assert torch.equal(exported["backbone.0.0.0.weight"], best["backbone.features.0.0.weight"])
    assert torch.equal(exported["classifier.6.bias"], best["classifier.4.bias"])


def test_system_flags(tiny_slices, tmp_path, monkeypatch, capsys):
    """--gpu-device without CUDA, --log-interval, --no-tensorboard, --timeout-minutes, --wandb-*."""
    for key in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    more = ["--gpu-device", 1, "--log-interval", 2, "--max-steps", 4]
    assert call(*slice_args(tiny_slices, tmp_path / "a", *more)) == 0
    assert "CUDA is not available: running on the CPU" in capsys.readouterr().err
    version = tmp_path / "a" / LOGS / "version_0"
    text = (version / "training.log").read_text()
    assert "Step 2/4" in text and "Step 3/4" not in text
    assert not list(version.glob("events*")) and not (tmp_path / "a" / "wandb").exists()
    more = ["--max-steps", 1, "--wandb-mode", "offline", "--wandb-project", "p", "--tensorboard"]
    assert call(*slice_args(tiny_slices, tmp_path / "b", *more)) == 0
    assert list((tmp_path / "b" / "wandb").rglob("*.wandb")) and list((tmp_path / "b").rglob("events*"))
    monkeypatch.setattr(task2.CTSlices, "read", lambda self, i: time.sleep(30) if i else np.zeros((32, 32), np.uint8))
    more = ["--num-workers", 1, "--timeout-minutes", 0.03]
    assert common.run_main(lambda: call(*slice_args(tiny_slices, tmp_path / "c", *more))) == 1


def test_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("optimization: {learning_rate: 0.5, epochs: 7}\nuse_attention: cbam\n")
    args = task2.parse_args(["--config", str(tmp_path / "c.yaml"), "--epochs", "9"])
    assert (args.lr, args.epochs, args.use_attention) == (0.5, 9, "cbam")


def test_outputs_that_are_not_finite(tiny_slices, tmp_path, monkeypatch, capsys):
    head = task2.SliceClassifier.head
    broken = lambda self, f: head(self, f) * (1 if self.training else math.nan)  # noqa: E731
    monkeypatch.setattr(task2.SliceClassifier, "head", broken)
    assert call(*slice_args(tiny_slices, tmp_path, "--max-steps", 1)) == 2
    assert "outputs are not finite" in capsys.readouterr().err
