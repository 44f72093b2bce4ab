"""train_csi.py as a program: files, ranks, resume after kill -9, faults. Tiny films, real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Evil, assert_same_run, film_args, run, start_and_kill, tensors_equal

import common
import train_csi as csi


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Custom_1 with a sixteenth of its channels for the runs in this process: a checkpoint then takes no time."""
    whole = csi.Custom.channels, csi.WIDTHS["Custom_1"]
    csi.Custom.channels, csi.WIDTHS["Custom_1"] = (8, 8, 16, 32, 64), 64
    yield
    csi.Custom.channels, csi.WIDTHS["Custom_1"] = whole


def call(*words):
    """Run in this process: exit code, as run_main gives it."""
    return common.run_main(lambda: csi.main([str(w) for w in words[1:]]))


def error_of(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tiny_films, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    assert call(*film_args(tiny_films, folder, "--tensorboard", "--epochs", 4, "--top-k", 2)) == 0
    return folder


def records_of(folder):
    return [json.loads(line) for line in (folder / csi.RESULTS).read_text().splitlines()]


# ---- runs


def test_a_run_writes_what_the_document_lists(trained):
    assert len(list((trained / "logs").glob("events.out.tfevents.*"))) == 1
    records = records_of(trained)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    for key in ("train_loss", "val_loss", "qwk", "zone_mae", "f1_macro", "f1_zone_1_normal", "csi_correlation"):
        assert key in records[0]
    assert re.search(r"Step 4/16 \(Epoch 1\.0\) \| Loss: \d\.\d{4}", (trained / csi.LOG).read_text())
    history = json.loads((trained / "logs" / "training_history.json").read_text())
    assert history["epochs"] == [1, 2, 3, 4] and history["train_loss"] == [r["train_loss"] for r in records]
    history = json.loads((trained / "logs" / "validation_history.json").read_text())
    assert history["qwk"] == [r["qwk"] for r in records] and "train_loss" not in history
    names = sorted(p.name for p in (trained / "models").iterdir())
    losses = {r["epoch"]: r["val_loss"] for r in records}
    best_two = sorted(losses, key=losses.get)[:2]
    expected = [f"checkpoint_epoch_{e}.pth" for e in best_two]
    assert names == sorted([*expected, "best_model.pth", "last_model.pth", "last_model_previous.pth"])
    best = common.load_checkpoint(trained / csi.BEST)
    assert best["class_names"] == list(csi.ZONES) and best["metrics"]["val_loss"] == min(losses.values())
    assert not (trained / "split.csv").exists()  # the CSV has one


def test_medians_of_the_training_films_are_in_the_checkpoint(trained, tiny_films):
    table = pd.read_csv(tiny_films / "labels.csv", sep=";")
    medians = table[table["split"] == "train"][list(csi.ZONES)].median().astype(int).tolist()
    assert common.load_checkpoint(trained / csi.BEST)["zone_medians"] == medians


def test_evaluation_in_training_is_the_best_models(trained):
    """The stored model gives the metrics it was chosen by; `load_checkpoint(model, path)` loads it."""
    saved = common.load_checkpoint(trained / csi.BEST)
    args = csi.args_from_checkpoint(saved)
    dataset, criterion = csi.build_eval_dataset(args), csi.build_criterion(args, None)
    model = csi.ZoneModel(args)
    assert csi.load_checkpoint(model, trained / csi.BEST)["metrics"].keys() == saved["metrics"].keys()
    with common.process_group("cpu") as ctx:
        found = csi.evaluate(model.eval(), dataset, criterion, ctx)
    assert {k: v for k, v in found.items() if v == v} == {k: v for k, v in saved["metrics"].items() if v == v}
    assert all(np.isnan(found[k]) == np.isnan(v) for k, v in saved["metrics"].items())


def test_overfits_eight_films(tiny_films, tmp_path):
    folder = shutil.copytree(tiny_films, tmp_path / "data")
    table = pd.read_csv(folder / "labels.csv", sep=";", dtype=str, keep_default_na=False).iloc[12:20]
    twins = table.assign(FileID="t" + table["FileID"], patient="t" + table["patient"], split="val")
    for name in table["FileID"]:
        shutil.copy(folder / "images" / f"{name}.png", folder / "images" / f"t{name}.png")
    pd.concat([table.assign(split="train"), twins]).to_csv(folder / "labels.csv", index=False, sep=";")
    still = ["--no-augment", "--dropout-rate", 0, "--epochs", 50, "--early-stopping-patience", 99, "--batch-size", 8]
    assert call(*film_args(folder, tmp_path / "run", *still, "--save-every", 999, "--eval-every", 50)) == 0
    last = records_of(tmp_path / "run")[-1]
    assert last["qwk"] > 0.97 and last["gradable_auroc"] > 0.97 and last["csi_mae"] < 0.2


@pytest.mark.parametrize("loss", ["corn", "cdw", "emd"])
def test_ordinal_losses_train(tiny_films, tmp_path, loss):
    assert call(*film_args(tiny_films, tmp_path, "--loss", loss, "--epochs", 6, "--save-every", 99)) == 0
    records = records_of(tmp_path)
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_early_stopping_ends_with_the_best_weights(tiny_films, tmp_path):
    """A gain below --early-stopping-min-delta does not count; the export has the best epoch's weights, or the last."""
    words = ["--early-stopping-min-delta", 9, "--early-stopping-patience", 2, "--epochs", 9, "--zone-focus", "none"]
    for name, more in (("best", []), ("last", ["--no-restore-best-weights"])):
        out = tmp_path / name
        assert call(*film_args(tiny_films, out, *words, "--export", out / "w.pth", *more)) == 0
        assert len(records_of(out)) == 3  # the first counts, two do not
        saved = common.load_checkpoint(out / (csi.BEST if name == "best" else csi.LAST))["model"]
        exported = common.load_weights(str(out / "w.pth"))
        assert torch.equal(exported["head.zone_classifiers.0.weight"], saved["head.zone_classifiers.0.weight"])
    best, last = (common.load_checkpoint(tmp_path / "last" / n)["model"] for n in (csi.BEST, csi.LAST))
    assert not tensors_equal(best, last)


def test_steps_of_the_learning_rate(tiny_films, tmp_path):
    words = ["--scheduler", "StepLR", "--step-size", 2, "--factor", 0.1, "--epochs", 5, "--save-every", 99]
    assert call(*film_args(tiny_films, tmp_path, *words)) == 0
    rates = re.findall(r"Step \d+/20 .*LR: (\S+)", (tmp_path / csi.LOG).read_text())
    assert rates == ["1.0e-3"] * 8 + ["1.0e-4"] * 8 + ["1.0e-5"] * 4


def test_a_new_split_is_written_and_reused(tiny_films, tmp_path):
    folder = shutil.copytree(tiny_films, tmp_path / "data")
    table = pd.read_csv(folder / "labels.csv", sep=";").drop(columns="split")
    table.to_csv(folder / "labels.csv", index=False, sep=";")
    words = film_args(folder, tmp_path / "run", "--epochs", 1, "--batch-size", 2)
    assert call(*words) == 0
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert set(split["split"]) == {"train", "val", "test"} and (split.groupby("patient")["split"].nunique() == 1).all()
    again = split.assign(split=split["split"].replace({"val": "test", "test": "val"}))
    again.to_csv(tmp_path / "other.csv", index=False)
    assert call(*words[:-1], 2, "--output-dir", tmp_path / "b", "--split-file", tmp_path / "other.csv") == 0
    saved = common.load_checkpoint(tmp_path / "b" / csi.BEST)
    dataset = csi.build_eval_dataset(csi.args_from_checkpoint(saved))
    assert sorted(dataset.ids) == sorted(split[split["split"] == "test"]["FileID"].astype(str))


# ---- many processes


@pytest.mark.slow  # the loop is one text: other scripts have the same
def test_ranks_and_accumulation_do_not_change_the_training(tiny_films, tmp_path):
    """A global batch of 8, with unknown zones, as 1 x 8, 1 x 2 x 4 and 2 ranks x 2 x 2; batch norm frozen."""
    still = ["--no-augment", "--dropout-rate", 0, "--freeze-backbone", "--check-ranks", "--optimizer", "sgd"]
    still += ["--lr", 0.5, "--epochs", 2]
    for name, world, batch, accum in (("a", 1, 8, 1), ("b", 1, 2, 4), ("c", 2, 2, 2)):
        words = film_args(tiny_films, tmp_path / name, *still, "--batch-size", batch, "--accum-steps", accum)
        run(*words, world=world)
    models = {n: common.load_checkpoint(tmp_path / n / csi.LAST) for n in "abc"}
    for n in "bc":
        for key, value in models["a"]["model"].items():
            torch.testing.assert_close(models[n]["model"][key], value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_train_and_agree(tiny_films, tmp_path):
    """Batch norm, dropout and augmentation on: every rank has the same gradients, rank 0 alone writes."""
    words = film_args(tiny_films, tmp_path / "run", "--check-ranks", "--batch-size", 2, "--epochs", 1)
    run(*words, world=2)
    assert len(records_of(tmp_path / "run")) == 1


# ---- resume


HARD = ["--use-ema", "--epochs", 6, "--scheduler", "StepLR", "--step-size", 2, "--warmup", 5, "--save-every", 1]
HARD += ["--early-stopping-patience", 99, "--resume", "auto"]


@pytest.mark.slow  # the loop is one text: test_train_ctclip.py does the same in less time
@pytest.mark.parametrize(("world", "workers", "after"), [(1, (0, 2), (7, 18)), (2, (2, 0), (5, 14))])
def test_killed_run_ends_equal_to_the_uninterrupted_one(tiny_films, tmp_path, world, workers, after):
    more = [*HARD, "--batch-size", 4 // world]
    run(*film_args(tiny_films, tmp_path / "whole", *more), world=world)
    words = film_args(tiny_films, tmp_path / "killed", *more)
    for step, n_workers in zip(after, workers, strict=True):
        start_and_kill([*words, "--num-workers", n_workers], world, step, tmp_path / "killed")
    run(*words, world=world)
    assert "resumed at step" in (tmp_path / "killed" / csi.LOG).read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", csi)
    for name in ("training", "validation"):
        path = f"logs/{name}_history.json"
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "killed" / path).read_bytes()


LEFT_OUT = [None, "model", "ema", "optimizer", "step", "best", "stop_score", "stale"]


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_resume_needs_every_item_of_the_state(tiny_films, tmp_path, left_out, request):
    """The ablation: with one item left out, the resumed run must end differently, or this test proves nothing."""
    whole = request.config.cache.mkdir("ablation_csi") / "run"  # made once for all cases
    more = ["--use-ema", "--epochs", 3, "--scheduler", "cosine", "--save-every", 11, "--top-k", 2]
    more += ["--early-stopping-min-delta", 99, "--early-stopping-patience", 9]
    if left_out is None:
        shutil.rmtree(whole, ignore_errors=True)
        assert call(*film_args(tiny_films, whole, *more)) == 0
        shutil.copy(whole / "models" / "last_model_previous.pth", whole.parent / "middle.pth")
    if not (whole.parent / "middle.pth").exists():
        pytest.skip("runs after the case that leaves nothing out")
    fresh = common.load_checkpoint(whole.parent / "middle.pth")
    assert fresh["state"]["step"] == 11
    again = shutil.copytree(whole, tmp_path / "again", ignore=shutil.ignore_patterns("last*"))
    if left_out in ("model", "ema"):
        fresh[left_out] = {k: torch.zeros_like(v) for k, v in fresh[left_out].items()}
    elif left_out == "optimizer":
        fresh["optimizer"]["state"] = {}
    elif left_out is not None:
        fresh["state"][left_out] = [] if left_out == "best" else 7.5 if left_out == "stop_score" else 5
    common.save_checkpoint(again / csi.LAST, fresh)
    assert call(*film_args(tiny_films, again, *more, "--resume", "auto")) == 0
    if left_out is None:
        assert_same_run(whole, again, csi)
    else:
        with pytest.raises(AssertionError):
            assert_same_run(whole, again, csi)


@pytest.mark.slow  # the loop is one text: other scripts have the same
def test_sigterm_saves_and_exits_143(tiny_films, tmp_path):
    more = ["--epochs", 400, "--early-stopping-patience", 999, "--save-every", 10**6, "--freeze-backbone"]
    words = film_args(tiny_films, tmp_path, *more, "--eval-every", 10**6)
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    log = tmp_path / csi.LOG
    while "Step 6/" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    step = common.load_checkpoint(tmp_path / csi.LAST)["state"]["step"]
    assert f"SIGTERM: saved at step {step}" in log.read_text()


def test_a_run_from_weights_goes_on_without_them(tiny_films, tmp_path):
    """The scale of the pixels and the missing ReLU come from the run: its weight file may be gone."""
    with torch.device("cpu"):
        args = csi.parse_args(["--model", "Custom_1", "--image-size", "64", "--zone-focus", "none"])
    model = csi.build_model(args, print)
    torch.save({"model_state_dict": csi.export_weights(model)}, tmp_path / "original.pth")
    words = ["--zone-focus", "none", "--pretrained", tmp_path / "original.pth", "--save-every", 99]
    assert call(*film_args(tiny_films, tmp_path / "run", *words, "--epochs", 1)) == 0
    (tmp_path / "original.pth").unlink()
    assert call(*film_args(tiny_films, tmp_path / "run", *words, "--epochs", 2, "--resume", "auto")) == 0
    saved = common.load_checkpoint(tmp_path / "run" / csi.LAST)
    assert saved["args"]["rectified"] is False and saved["state"]["step"] == 8


def test_resume_refuses_what_cannot_be_continued(tiny_films, trained, tmp_path, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    for more, message in (
        (("--resume", tmp_path / "none.pth"), "no such checkpoint"),
        (("--resume", "auto", "--batch-size", 2), "the global batch is 2 but the run has 4"),
        (("--resume", "auto", "--loss", "emd"), "--loss is emd but the run has ce"),
        (("--resume", "auto", "--zone-focus", "masking"), "--zone-focus is masking but the run has pool"),
        (("--resume", tmp_path / csi.BEST), "holds a model but no run"),
        ((), "holds a run (--resume auto continues it"),
    ):
        assert call(*film_args(tiny_films, tmp_path, "--epochs", 5, *more)) == 2
        assert message in error_of(capsys)


# ---- faults


def test_damaged_and_foreign_checkpoints(tiny_films, trained, tmp_path, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    last = tmp_path / csi.LAST
    flipped = bytearray(last.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    last.write_bytes(bytes(flipped))
    assert call(*film_args(tiny_films, tmp_path, "--epochs", 4, "--resume", "auto", "--top-k", 2)) == 0
    assert "continuing from" in capsys.readouterr().err
    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.pth")
    for flag in ("--resume", "--pretrained"):
        assert call(*film_args(tiny_films, tmp_path / "other", flag, tmp_path / "evil.pth")) == 2
        assert "refused, it holds more than" in error_of(capsys)
    assert not os.path.exists("/tmp/plainscan_was_owned")


def test_mistakes_cost_no_earlier_run(tiny_films, trained, tmp_path, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    before = {p.name: p.read_bytes() for p in (tmp_path / "models").iterdir()}
    for more, message in (
        (["--csv", tmp_path / "typo.csv", "--overwrite"], "no such file"),
        (["--image-dir", tmp_path / "typo", "--overwrite"], "no such folder"),
        (["--pretrained", "typo.pth", "--overwrite"], "no such weight file"),
        (["--resume", trained / csi.LAST], "holds another run than"),
    ):
        assert call(*film_args(tiny_films, tmp_path, *more)) == 2
        assert message in error_of(capsys)
        assert {p.name: p.read_bytes() for p in (tmp_path / "models").iterdir()} == before


def test_non_finite_steps_are_skipped_and_end_the_run(tiny_films, tmp_path, capsys):
    words = film_args(tiny_films, tmp_path, "--lr", "1e38", "--optimizer", "sgd", "--max-bad-steps", 3)
    assert call(*words) == 2
    assert "not finite" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet18"], "'resnet18' is no model"),
        (["--scheduler", "exponential"], "is no scheduler"),
        (["--image-size", 500, "--model", "RadDINO"], "multiple of 14"),
        (["--label-columns", "a", "b"], "takes six"),
        (["--split-share", 0.5, 0.1, 0.1], "together 1"),
        (["--attention-strength", 2], "must be 0 to 1"),
        (["--step-size", 0], "must be at least 1"),
        (["--export", "x.pth"], "the original tool has no such model"),
        (["--early-stopping-min-delta", -1], "must be at least 0"),
        (["--batch-size", 64], "do not fill one step"),
        (["--split", "nowhere"], "no film in split 'nowhere'"),
    ],
)
def test_bad_arguments_end_in_one_line(tiny_films, tmp_path, capsys, words, message):
    try:
        code = call(*film_args(tiny_films, tmp_path / "run", *words))
    except SystemExit as e:  # argparse's own
        code = e.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run" / "models" / "last_model.pth").exists()


# ---- flags that no other test shows


def test_amp_compile_checkpointing_and_determinism_run(tiny_films, tmp_path):
    for i, more in enumerate((["--amp"], ["--grad-checkpointing", "--deterministic"], ["--load-to-memory"])):
        assert call(*film_args(tiny_films, tmp_path / str(i), "--epochs", 1, *more)) == 0
    torch.use_deterministic_algorithms(False)
    plain = tmp_path / "plain"
    assert call(*film_args(tiny_films, plain, "--epochs", 1)) == 0
    for i in (1, 2):  # what only costs or saves memory changes nothing else
        assert (tmp_path / str(i) / csi.RESULTS).read_text() == (plain / csi.RESULTS).read_text()
    assert (tmp_path / "0" / csi.RESULTS).read_text() != (plain / csi.RESULTS).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--normalization", "imagenet"], ["--clip-percent", 10], ["--no-keep-aspect"], ["--zone-focus", "masking"],
        ["--zone-focus", "none"], ["--dropout-rate", 0.1], ["--unknown-weight", 1], ["--num-classes", 4],
        ["--flip-prob", 0], ["--rotation", 0], ["--zoom", 0], ["--shift", 0], ["--jitter", 0], ["--no-augment"],
        ["--optimizer", "adamw"], ["--weight-decay", 0.1], ["--max-grad-norm", 0.01], ["--warmup", 3], ["--seed", 1],
        ["--accum-steps", 2], ["--use-ema"], ["--use-ema", "--ema-decay", 0.1], ["--eval-every", 1],
    ],
)  # fmt: skip
def test_flags_have_an_effect(tiny_films, trained, tmp_path, more):
    """One epoch differs from that of the defaults."""
    assert call(*film_args(tiny_films, tmp_path, "--epochs", 1, "--save-every", 99, *more)) == 0
    assert records_of(tmp_path)[0] != records_of(trained)[0]


def test_cdw_alpha_and_masking_strategy_have_an_effect(tiny_films, tmp_path):
    found = []
    for i, more in enumerate((["--loss", "cdw"], ["--loss", "cdw", "--cdw-alpha", 5], ["--zone-focus", "masking"],
                              ["--zone-focus", "masking", "--masking-strategy", "attention"],
                              ["--zone-focus", "masking", "--masking-strategy", "attention",
                               "--attention-strength", 0.9])):  # fmt: skip
        words = ["--max-steps", 1, "--save-every", 99]
        assert call(*film_args(tiny_films, tmp_path / str(i), *words, *more)) == 0
        found.append(records_of(tmp_path / str(i))[0]["train_loss"])
    assert len(set(found)) == 5


def test_evaluation_of_a_copied_table_says_what_was_trained_on(tiny_films, trained, tmp_path):
    import evaluate

    shutil.copy(tiny_films / "labels.csv", tmp_path / "copy.csv")
    words = ["--test-only", trained / csi.BEST, "--csv", tmp_path / "copy.csv", "--output", tmp_path, "--no-bootstrap"]
    assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n"] == 26  # of every split, since none was named
    assert "16 of 26 films have the FileID of one that the model was trained on" in results["notes"]


def test_a_given_image_size_stays(monkeypatch):
    """Also one that is another model's default; in a notebook the size follows the model until it is set."""
    for words, size in (
        (["--model", "RadDINO", "--image-size", "224"], 224),
        (["--model", "RadDINO"], 518),
        (["--image-size", "518"], 518),
        ([], 224),
    ):
        args = csi.parse_args(words)
        assert args.image_size == size
        saved = {"args": common.plain_args(args)}
        assert csi.args_from_checkpoint(saved).image_size == size
    args.model = "RadDINO"
    assert args.image_size == 518
    args.image_size = 224
    args.dropout_rate = 0.1
    assert csi.args_from_checkpoint({"args": common.plain_args(args)}).image_size == 224
