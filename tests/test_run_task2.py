"""run_task2.py as a program: modes, files, ranks, resume after kill -9, faults. Tiny slices, real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, ROOT, Evil, assert_same_run, run, slice_args, start_and_kill

import common
import evaluate
import run_task2 as task2

LOGS = "logs/multi_abnormality_classification"
LABEL_FILE, SLICE = "multi_abnormality_labels.csv", "slices/train/case{}.nii.gz_slice_000.npy"


def call(*words):
    """Run in this process: exit code, as run_main gives it."""
    return common.run_main(lambda: task2.main([str(w) for w in words[1:]]))


def score(*words):
    """evaluate.py in this process."""
    return common.run_main(lambda: evaluate.main([str(w) for w in words]))


def approx_row(row):
    """The probabilities of a row of a predictions CSV; batches of other slices change the last digits of float32."""
    return pytest.approx([row[f"{n}_prob"] for n in LABELS], abs=1e-6)


def error_of(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tiny_slices, tmp_path_factory):
    """Folder of a finished run of `--mode both`."""
    folder = tmp_path_factory.mktemp("trained")
    assert call(*slice_args(tiny_slices, folder, "--mode", "both", "--tensorboard", "--epochs", 4)) == 0
    return folder


# ---- runs


def test_a_run_writes_what_the_document_lists(trained):
    version = trained / LOGS / "version_0"
    assert len(list(version.glob("events.out.tfevents.*"))) == 1
    hparams = (version / "hparams.yaml").read_text()
    assert "weight_decay: 1.0e-05" in hparams and "lr: 0.001" in hparams
    records = [json.loads(line) for line in (version / "results.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    for key in ("train_loss", "val_loss", "macro_auroc", "slice_macro_auroc", "first_f1"):
        assert key in records[0]
    text = (version / "training.log").read_text()
    assert re.search(r"Step 5/20 \(Epoch 1\.0\) \| Loss: \d\.\d{4} \| LR: 1\.0e-3 \| Time/Step: \d+\.\d\ds", text)
    names = sorted(p.name for p in (trained / "checkpoints").iterdir())
    top = [n for n in names if re.fullmatch(r"multi_abnormality-epoch=\d\d-val_loss=\d+\.\d{3}\.ckpt", n)]
    assert len(top) == 3 and names == sorted([*top, "best.ckpt", "last.ckpt", "last_previous.ckpt"])
    losses = {r["epoch"]: r["val_loss"] for r in records}
    kept = [int(re.search(r"epoch=(\d+)", n)[1]) for n in top]
    assert sorted(kept) == sorted(sorted(losses, key=losses.get)[:3])  # the lowest three, not the newest
    best = common.load_checkpoint(trained / "checkpoints" / "best.ckpt")
    assert best["class_names"] == LABELS and len(best["thresholds"]) == len(best["crg_thresholds"]) == 3
    assert best["metrics"]["val_loss"] == min(losses.values())
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in best["model"])


def test_evaluation_results(trained, tiny_slices):
    """Numbers again from the two CSV files, volumes from slices, under the original's names and our own."""
    results = json.loads((trained / "results" / "evaluation_results.json").read_text())
    volumes = pd.read_csv(trained / "results" / "volume_predictions.csv").set_index("id")
    slices = pd.read_csv(trained / "results" / "slice_predictions.csv").set_index("id")
    truth = pd.read_csv(tiny_slices / "multi_abnormality_labels.csv").assign(id=lambda t: t["VolumeName"].str[:-7])
    truth = truth.set_index("id").loc[volumes.index]
    assert results["n_volumes"] == 7 == len(volumes) and results["n_slices"] == len(slices) == 21
    probs = np.stack([volumes[f"{n}_prob"] for n in LABELS], 1)
    for i, name in enumerate(volumes.index):
        of_volume = slices[slices.index.str.startswith(f"{name}.nii.gz_slice")]
        expected = [of_volume[f"{n}_prob"].mean() for n in LABELS]
        np.testing.assert_allclose(probs[i], expected, rtol=1e-12)
        highest = [of_volume[f"{n}_prob"].max() for n in LABELS]
        assert (probs[i] <= highest).all()
    targets = truth[LABELS].to_numpy(float)
    m = common.multilabel_metrics(np.nan_to_num(targets, nan=-1), probs, LABELS)
    for ours, theirs in (
        ("macro_auroc", "auroc_macro"), ("micro_auroc", "auroc_micro"), ("macro_f1", "f1_macro_05"),
        ("micro_f1", "f1_micro_05"), ("macro_precision", "precision_macro_05"), ("macro_recall", "recall_macro_05"),
        ("exact_match", "exact_match_accuracy_05"), ("crg", "crg_05"),
    ):  # fmt: skip
        assert results[theirs] == pytest.approx(m[ours], nan_ok=True), ours
    known = ~np.isnan(targets)
    right = ((probs >= 0.5) == (targets == 1)) & known
    assert results["hamming_accuracy_05"] == pytest.approx(right.sum() / known.sum())
    assert results["sample_accuracy_05"] == pytest.approx((right.sum(1) / known.sum(1)).mean())
    assert results["accuracy"] == results["exact_match_accuracy_opt"]
    thresholds = common.load_checkpoint(trained / "checkpoints" / "best.ckpt")["thresholds"]
    assert list(results["thresholds"].values()) == thresholds and "too good" in results["notes"][0]
    low, high = results["metrics"]["macro_auroc"]["interval"]
    assert low <= results["metrics"]["macro_auroc"]["value"] <= high
    assert set(results["volumes_by_aggregate"]) == {"mean", "max", "topk", "noisy-or"}
    assert results["slices"]["auroc_macro"] != results["auroc_macro"]


def test_best_checkpoint_is_the_best_not_the_newest(trained, tmp_path, capsys):
    """best.ckpt if it is there; else the lowest loss in a name; an explicit one wins; none at all is an error."""
    folder = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    args = task2.parse_args(["--output-dir", str(tmp_path)])
    assert task2.best_checkpoint(args) == folder / "best.ckpt"
    (folder / "best.ckpt").unlink()
    losses = {p: float(re.search(r"val_loss=([\d.]+)\.ckpt", p.name)[1]) for p in folder.glob("multi*")}
    lowest = min(losses, key=losses.get)
    for path in folder.iterdir():
        os.utime(path, (1, 1) if path == lowest else None)
    assert losses[task2.best_checkpoint(args)] == min(losses.values())
    args.checkpoint = folder / "last.ckpt"
    assert task2.best_checkpoint(args) == folder / "last.ckpt"
    assert call("run_task2.py", "--mode", "evaluate", "--output-dir", tmp_path / "empty") == 2
    assert "holds no checkpoint to take" in error_of(capsys)


def test_an_earlier_run_is_moved_not_lost(tiny_slices, tmp_path, capsys):
    """The document runs one command after another in one folder."""
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 1)) == 0
    first = (tmp_path / "checkpoints" / "best.ckpt").read_bytes()
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 1, "--seed", 1)) == 0
    assert "of an earlier run are now in" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "version_0" / "best.ckpt").read_bytes() == first
    assert (tmp_path / "checkpoints" / "best.ckpt").read_bytes() != first
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 1, "--force-restart")) == 0
    assert not (tmp_path / "checkpoints" / "version_1").exists()
    assert [(tmp_path / LOGS / f"version_{i}" / "results.jsonl").exists() for i in range(4)] == [True] * 3 + [False]
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 2, "--resume")) == 0  # goes on in version_2
    assert len((tmp_path / LOGS / "version_2" / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_overfits_eight_slices(tiny_slices, tmp_path):
    folder = shutil.copytree(tiny_slices, tmp_path / "data")
    table = pd.read_csv(folder / "splits" / "train_slices.csv").drop_duplicates("volume_name").iloc[:8]
    for split in ("train", "valid"):
        part = table.assign(volume_name=[f"{split}_{i}_a_1.nii.gz" for i in range(8)])
        labels = pd.read_csv(folder / "multi_abnormality_labels.csv").iloc[:8].drop(columns="VolumeName")
        pd.concat([part.reset_index(drop=True), labels], axis=1).to_csv(
            folder / "splits" / f"{split}_slices.csv", index=False
        )
    (folder / "multi_abnormality_labels.csv").unlink()
    still = ["--no-augment", "--dropout-rate", 0, "--stochastic-depth", 0, "--scheduler", "cosine", "--epochs", 40]
    still += ["--image-size", 64]
    more = ["--loss", "bce", "--early-stopping-patience", 99, "--data-dir", tmp_path]
    assert call(*slice_args(folder, tmp_path / "run", *still, *more)) == 0
    last = json.loads((tmp_path / "run" / LOGS / "version_0" / "results.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] < 0.05 and last["macro_auroc"] == 1.0


def test_the_environment_is_checked_first(tiny_slices, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task2.importlib.util, "find_spec", lambda name: None)
    assert call(*slice_args(tiny_slices, tmp_path / "a", "--tensorboard")) == 2
    assert "tensorboard is not installed" in error_of(capsys) and not (tmp_path / "a").exists()
    monkeypatch.setattr(task2.os, "access", lambda path, mode: False)
    assert call(*slice_args(tiny_slices, tmp_path / "a" / "b")) == 2
    assert f"{tmp_path}: is not a folder that can be written to" in error_of(capsys)


def test_mistakes_cost_no_earlier_run(tiny_slices, trained, tmp_path, capsys):
    """A wrong folder, a resume of another run: what is there stays. Pretraining from it follows it where it moves."""
    folder = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    before = {p.name: p.read_bytes() for p in folder.glob("*.ckpt")}
    for more, message in (
        (["--slice-dir", tmp_path / "typo"], "no such file"),
        (["--slice-dir", tmp_path / "typo", "--overwrite"], "no such file"),
        (["--pretrained", "typo.pth"], "no such weight file"),
        (["--resume", trained / task2.LAST], "holds another run than"),
    ):
        assert call(*slice_args(tiny_slices, tmp_path, *more)) == 2
        assert message in error_of(capsys)
        assert {p.name: p.read_bytes() for p in folder.glob("*.ckpt")} == before
    (folder / "last.ckpt").unlink()  # only named checkpoints, such as the original tool's
    words = slice_args(
        tiny_slices, tmp_path, "--max-steps", 1, "--pretrained", folder / "best.ckpt", "--freeze-backbone"
    )
    assert call(*words) == 0
    assert {p.name for p in (folder / "version_0").iterdir()} == before.keys() - {"last.ckpt"}
    old, new = (common.load_checkpoint(p)["model"] for p in (trained / task2.BEST, tmp_path / task2.BEST))
    assert torch.equal(old["backbone.features.0.0.weight"], new["backbone.features.0.0.weight"])


def test_what_a_checkpoint_fixes_is_not_ignored(trained, tiny_slices, tmp_path, capsys):
    """In evaluation another aggregate takes effect; what the model was trained with cannot be another."""
    copy = shutil.copytree(trained, tmp_path / "run")
    words = ["run_task2.py", "--mode", "evaluate", "--slice-dir", tiny_slices, "--output-dir", copy, "--num-workers", 0]
    assert call(*words, "--aggregate", "max") == 0
    results = json.loads((copy / "results" / "evaluation_results.json").read_text())
    assert (
        results["aggregate"] == "max"
        and results["auroc_macro"] == results["volumes_by_aggregate"]["max"]["auroc_macro"]
    )
    assert results["thresholds_source"] == "0.5 (default)"  # the checkpoint's belong to the mean
    assert call(*words, "--aggregate", "topk", "--top-slices", 2) == 0
    for more, message in (
        (["--aggregate", "mil"], "--aggregate mil: the checkpoint was trained with mean"),
        (["--model", "resnet101"], "--model is resnet101, but efficientnet_b0 in"),
        (["--image-size", 64], "--image-size is 64, but 32 in"),
        (["--predict-input", "x.npy"], "--mode predict, and it alone"),
    ):
        assert call(*words, *more) == 2
        assert message in error_of(capsys)


# ---- many processes


@pytest.mark.slow  # test_evaluate.py has the same for evaluate.py
def test_evaluation_has_the_same_digits_on_1_2_and_3_ranks(tiny_slices, tmp_path):
    """21 slices in batches of 4; attention, fusion and MIL in the model."""
    more = ["--use-attention", "se", "--use-multiscale", "--aggregate", "mil", "--bag-size", 3, "--epochs", 1]
    assert call(*slice_args(tiny_slices, tmp_path, *more)) == 0
    texts = []
    for world in (1, 2, 3):
        words = ["run_task2.py", "--mode", "evaluate", "--slice-dir", tiny_slices, "--output-dir", tmp_path]
        run(*words, "--num-workers", 0, "--batch-size", 4, world=world)
        names = ("volume_predictions.csv", "slice_predictions.csv", "evaluation_results.json")
        texts.append([(tmp_path / "results" / n).read_bytes() for n in names])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow  # test_finetune_siglip.py has the same of the same loop
@pytest.mark.parametrize("aggregate", ["mean", "mil"])
def test_ranks_and_accumulation_do_not_change_the_training(tiny_slices, tmp_path, aggregate):
    """A global batch of 8, with unknown labels, as 1 x 8, 1 x 2 x 4 and 2 ranks x 2 x 2; batch norm frozen."""
    still = ["--no-augment", "--dropout-rate", 0, "--freeze-backbone", "--check-ranks", "--optimizer", "sgd"]
    still += ["--lr", 0.5, "--aggregate", aggregate, "--bag-size", 2, "--epochs", 2]
    for name, world, batch, accum in (("a", 1, 8, 1), ("b", 1, 2, 4), ("c", 2, 2, 2)):
        words = slice_args(tiny_slices, tmp_path / name, *still, "--batch-size", batch, "--accum-steps", accum)
        run(*words, world=world)
    models = {n: common.load_checkpoint(tmp_path / n / task2.LAST) for n in "abc"}
    for n in "bc":
        for key, value in models["a"]["model"].items():
            torch.testing.assert_close(models[n]["model"][key], value, rtol=0, atol=1e-6)
        assert models[n]["state"]["updates"] == models["a"]["state"]["updates"]
    fresh = task2.SliceClassifier(task2.args_from_checkpoint(models["a"])).state_dict()
    torch.testing.assert_close(models["a"]["model"]["backbone.features.0.1.running_mean"],
                               fresh["backbone.features.0.1.running_mean"])  # fmt: skip
    assert (models["a"]["model"]["classifier.4.bias"] != 0).any()


# ---- resume


HARD = ["--use-ema", "--epochs", 6, "--scheduler", "cosine", "--warmup", 5, "--save-every", 1, "--top-k", 3]
HARD += ["--early-stopping-patience", 99, "--resume", "auto", "--progressive-unfreeze", "--unfreeze-epoch", 2]


@pytest.mark.slow  # the loop is one text: test_train_ctclip.py does the same in less time
@pytest.mark.parametrize(
    ("world", "workers", "after", "more"),
    [
        (1, (0, 2), (7, 23), ["--use-advanced-aug"]),
        (2, (2, 0), (5, 14), ["--aggregate", "mil", "--bag-size", 2]),
    ],
)
def test_killed_run_ends_equal_to_the_uninterrupted_one(tiny_slices, tmp_path, world, workers, after, more):
    """kill -9 twice, mid-epoch, before and after stages are freed, with mixing, with MIL: bit for bit."""
    more = [*HARD, *more, "--batch-size", 4 // world if more[0] == "--use-advanced-aug" else 2 // world]
    run(*slice_args(tiny_slices, tmp_path / "whole", *more), world=world)
    words = slice_args(tiny_slices, tmp_path / "killed", *more)
    for step, n_workers in zip(after, workers, strict=True):
        start_and_kill([*words, "--num-workers", n_workers], world, step, tmp_path / "killed")
    run(*words, world=world)
    assert "resumed at step" in (tmp_path / "killed" / LOGS / "version_0" / "training.log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", task2)


@pytest.mark.parametrize("left_out", [None, "model", "ema", "optimizer", "step", "updates", "best", "loss_sum"])
def test_resume_needs_every_item_of_the_state(tiny_slices, tmp_path, left_out, request):
    """The ablation: with one item left out, the resumed run must end differently, or this test proves nothing."""
    whole = request.config.cache.mkdir("ablation_task2") / "run"  # made once for all cases
    more = ["--use-ema", "--epochs", 3, "--scheduler", "cosine", "--warmup", 2, "--save-every", 7, "--seed", 1]
    if left_out is None:
        shutil.rmtree(whole, ignore_errors=True)
        assert call(*slice_args(tiny_slices, whole, *more)) == 0
        shutil.copy(whole / "checkpoints" / "last_previous.ckpt", whole.parent / "middle.ckpt")
    if not (whole.parent / "middle.ckpt").exists():
        pytest.skip("runs after the case that leaves nothing out")
    fresh = common.load_checkpoint(whole.parent / "middle.ckpt")
    assert fresh["state"]["step"] == 14 and common.load_checkpoint(whole / task2.LAST)["state"]["step"] == 15
    again = shutil.copytree(whole, tmp_path / "again", ignore=shutil.ignore_patterns("last*"))
    if left_out in ("model", "ema"):
        fresh[left_out] = {k: torch.zeros_like(v) for k, v in fresh[left_out].items()}
    elif left_out == "optimizer":
        fresh["optimizer"]["state"] = {}
    elif left_out is not None:
        fresh["state"][left_out] = [] if left_out == "best" else 0
    common.save_checkpoint(again / task2.LAST, fresh)
    assert call(*slice_args(tiny_slices, again, *more, "--resume", "auto")) == 0
    if left_out is None:
        assert_same_run(whole, again, task2)
    else:
        with pytest.raises(AssertionError):
            assert_same_run(whole, again, task2)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143(tiny_slices, tmp_path):
    more = ["--epochs", 200, "--early-stopping-patience", 999, "--save-every", 10**6, "--freeze-backbone"]
    words = slice_args(tiny_slices, tmp_path, *more, "--num-workers", 1, "--mode", "both")
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    log = tmp_path / LOGS / "version_0" / "training.log"
    while "Step 6/" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert "SIGTERM: saved at step" in log.read_text() and not (tmp_path / "results").exists()
    step = common.load_checkpoint(tmp_path / task2.LAST)["state"]["step"]
    words = slice_args(tiny_slices, tmp_path, *more, "--epochs", step // 5 + 1, "--resume")
    assert call(*words) == 0 and f"resumed at step {step}" in log.read_text()


def test_resume_refuses_what_cannot_be_continued(tiny_slices, tmp_path, capsys):
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 1)) == 0
    for more, message in (
        (("--resume", tmp_path / "none.ckpt"), "no such checkpoint"),
        (("--resume", "auto", "--batch-size", 2), "the global batch is 2 but the run has 8"),
        (("--resume", "auto", "--use-attention", "se"), "--use-attention is se but the run has none"),
        (("--resume", tmp_path / "checkpoints" / "best.ckpt"), "holds a model but no run"),
    ):
        capsys.readouterr()
        assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 2, *more)) == 2
        assert message in error_of(capsys)


def test_two_runs_in_one_folder_are_refused(tiny_slices, trained, tmp_path, capsys):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        assert call(*slice_args(tiny_slices, tmp_path)) == 2
        assert "another run is writing here" in error_of(capsys)
        assert not (tmp_path / "checkpoints" / "version_0").exists()
    finally:
        holder.kill()


# ---- faults


def test_damaged_checkpoints(tiny_slices, trained, tmp_path, capsys):
    """A flipped byte or a cut: refused by name; under --resume auto the checkpoint before it serves."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / task2.LAST
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (bytes(flipped), whole[: len(whole) // 2], b""):
        (tmp_path / "bad.ckpt").write_bytes(damage)
        capsys.readouterr()
        words = ["run_task2.py", "--mode", "evaluate", "--slice-dir", tiny_slices]
        words += ["--checkpoint", tmp_path / "bad.ckpt"]
        assert call(*words) == 2
        error = error_of(capsys)
        assert "damaged at entry" in error or "not a whole checkpoint" in error
    last.write_bytes(bytes(flipped))
    assert call(*slice_args(tiny_slices, tmp_path, "--epochs", 4, "--resume", "auto")) == 0
    assert "continuing from" in capsys.readouterr().err


def test_foreign_pickles_never_run(tiny_slices, tmp_path, capsys):
    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.ckpt")
    torch.save({"state_dict": Evil()}, tmp_path / "lightning.ckpt")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    predict = ["--mode", "predict", "--predict-input", tmp_path / "evil.npy"]
    for more in (
        ["--resume", tmp_path / "evil.ckpt"],
        ["--pretrained", tmp_path / "evil.ckpt"],
        [*predict, "--checkpoint", tmp_path / "evil.ckpt"],
        [*predict, "--checkpoint", tmp_path / "lightning.ckpt"],
    ):
        assert call(*slice_args(tiny_slices, tmp_path / "run", *more)) == 2
        assert "refused, it holds more than" in error_of(capsys)
    assert not os.path.exists("/tmp/plainscan_was_owned")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "splits" / "train_slices.csv").unlink(), "prepare_ct.py slices --data-dir"),
        (lambda f: (f / LABEL_FILE).unlink(), "no such file, nor is"),
        (lambda f: edit(f / LABEL_FILE, lambda t: t.iloc[1:]), "no row for 1 of 16 volumes, first case0"),
        (lambda f: edit(f / LABEL_FILE, lambda t: t.drop(columns="second")), "column 'second' is missing"),
        (lambda f: edit(f / LABEL_FILE, lambda t: t.assign(first="2")), "'2' is no label"),
        (lambda f: edit(f / LABEL_FILE, lambda t: pd.concat([t, t])), "case0 has two rows"),
        (lambda f: edit(f / "splits" / "train_slices.csv", lambda t: pd.concat([t, t])), "twice"),
        (lambda f: edit(f / "splits" / "valid_slices.csv", lambda t: t.assign(volume_name="case3.nii.gz")),
         "patient case3.nii.gz is in train and in valid"),
        (lambda f: (f / "slices" / "train" / "case4.nii.gz_slice_001.npy").unlink(), "no such slice (1 of 47"),
        (lambda f: edit(f / "splits" / "train_slices.csv", lambda t: t.assign(file_path="../../x/" + t["file_path"])),
         "leads out of"),
        (lambda f: np.save(f / SLICE.format(0), np.zeros((3, 4, 5))), "one slice was expected"),
        (lambda f: np.save(f / SLICE.format(0), np.full((32, 32), 40.0)), "outside 0 to 1"),
        (lambda f: np.save(f / SLICE.format(2), np.zeros((32, 32), np.int16)),
         "int16, but other slices hold uint8"),
        (lambda f: (f / SLICE.format(2)).write_bytes(b"\x93NUMPY"), "damaged or not a .npy"),
        (lambda f: (f / "slice_extraction_stats.json").write_text("{"), "not the notes of prepare_ct.py"),
        (lambda f: packed(f, np.zeros((47, 32, 32), np.float32)), "not the slices of"),
        (lambda f: packed(f, np.zeros((46, 32, 32), np.uint8)), "not the slices of"),
    ],
)  # fmt: skip
def test_bad_slice_folders_end_in_one_line(tiny_slices, tmp_path, capsys, change, message):
    folder = shutil.copytree(tiny_slices, tmp_path / "data")
    change(folder)
    words = slice_args(folder, tmp_path / "run", "--data-dir", tmp_path / "none")
    assert call(*words) == 2
    assert message in error_of(capsys)


def packed(folder, array):
    (folder / "packed").mkdir()
    np.save(folder / "packed" / "train.npy", array)
    edit(folder / "splits" / "train_slices.csv", lambda t: t.assign(packed_row=range(len(t))))


def edit(path, change):
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def test_bad_arguments_end_in_one_line(tiny_slices, tmp_path, capsys):
    for more, message in (
        (["--mode", "predict"], "either --predict-input FILE ... or --challenge-input DIR"),
        (["--mode", "predict", "--predict-input", "a.npy", "--challenge-input", "b"], "either --predict-input FILE"),
        (["--use-advanced-aug", "--aggregate", "mil"], "leave one of them away"),
        (["--export", "x.pth", "--use-attention", "se"], "the original tool has no such model"),
        (["--batch-size", 99], "47 training samples do not fill one step of 99"),
        (["--windows", "lung", "bone"], "the slices hold the window"),
        (["--windows", "liver"], "'liver' is neither of"),
        (["--pretrained", "nowhere.pth"], "nowhere.pth: no such weight file"),
        (["--device", "gpu"], "device 'gpu' is not known"),
        (["--bag-size", 0], "--bag-size must be at least 1"),
        (["--mixup-alpha", 0], "--mixup-alpha must be at least 0.001"),
        (["--cutmix-prob", 3], "--cutmix-prob must be 0 to 1"),
        (["--zoom", 1], "--zoom must be 0 to 0.9"),
        (["--num-workers", -1], "--num-workers must not be negative"),
        (["--dropout-rate", 1.5], "--dropout-rate must be at least 0 and below 1"),
        (["--predict-output", "x.csv"], "--predict-output names the JSON"),
        (["--split", "test"], "test_slices.csv: no such file"),
    ):
        assert call(*slice_args(tiny_slices, tmp_path, *more)) == 2
        assert message in error_of(capsys)


def test_unreadable_slices(tiny_slices, tmp_path, capsys):
    """fail: one line with the file. skip: counted and listed; volumes go on with their other slices; none: code 3."""
    folder = shutil.copytree(tiny_slices, tmp_path / "data")
    for name in ("train/case2.nii.gz_slice_001", "valid/case17.nii.gz_slice_000", *[
        f"valid/case18.nii.gz_slice_00{j}" for j in range(2)]):  # fmt: skip
        (folder / "slices" / f"{name}.npy").write_bytes(b"not numpy")
    assert call(*slice_args(folder, tmp_path / "fail", "--epochs", 1)) == 2
    assert re.search(r"case(2|17|18)\.nii\.gz_slice", error_of(capsys))
    words = slice_args(folder, tmp_path / "skip", "--epochs", 3, "--on-bad-sample", "skip", "--mode", "both")
    assert call(*words, "--max-bad-fraction", 0.01) == 2
    assert "training samples are unreadable" in error_of(capsys)
    assert call(*words, "--overwrite") == 3
    error = capsys.readouterr().err
    assert "failed: case18" in error and "failed: slice case17.nii.gz_slice_000" in error
    assert list(pd.read_csv(tmp_path / "skip" / "bad_samples.csv")["id"]) == ["case2.nii.gz_slice_001"]
    table = pd.read_csv(tmp_path / "skip" / "results" / "volume_predictions.csv").set_index("id")
    assert table.loc["case18"].isna().all() and table.drop("case18").notna().all(axis=None)
    results = json.loads((tmp_path / "skip" / "results" / "evaluation_results.json").read_text())
    assert results["failed"] == ["case18"] and len(results["unread_slices"]) == 3
    evaluate = ["run_task2.py", "--mode", "evaluate", "--slice-dir", folder, "--output-dir", tmp_path / "skip"]
    assert call(*evaluate, "--num-workers", 0) == 2  # nothing is left out unasked
    assert "case17.nii.gz_slice_000" in error_of(capsys)
    (folder / "slices" / "valid" / "case17.nii.gz_slice_000.npy").unlink()
    assert call(*evaluate, "--num-workers", 0) == 2 and "no such slice (1 of 21" in error_of(capsys)
    words = ["--test-only", tmp_path / "skip" / task2.BEST, "--output", tmp_path / "e", "--no-bootstrap"]
    assert score(*words, "--num-workers", 0) == 3
    notes = json.loads((tmp_path / "e" / "results.json").read_text())["notes"]
    assert "3 slices could not be read" in notes[-1]


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint(tiny_slices, trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    before = (tmp_path / task2.LAST).read_bytes()
    words = [str(w) for w in slice_args(tiny_slices, tmp_path, "--epochs", 5, "--resume", "auto")]
    code = (
        "import resource, signal, sys, common, run_task2;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));"
        "sys.exit(common.run_main(lambda: run_task2.main(sys.argv[1:])))"
    )
    result = run("-c", code, *words[1:], check=2)
    assert re.search(r"error: .*\.ckpt: could not be written", result.stderr.splitlines()[-1])
    assert (tmp_path / task2.LAST).read_bytes() == before
    assert not list((tmp_path / "checkpoints").glob(".*tmp*"))


def test_non_finite_steps_are_skipped_and_end_the_run(tiny_slices, tmp_path, capsys):
    words = slice_args(tiny_slices, tmp_path, "--lr", "1e30", "--max-bad-steps", 3, "--save-every", 1, "--epochs", 9)
    assert call(*words) == 2
    assert "3 steps in a row were not finite" in error_of(capsys)
    saved = common.load_checkpoint(tmp_path / task2.LAST)
    assert saved["state"]["updates"] == saved["state"]["step"]  # of before steps failed


# ---- prediction


def test_predict_slices(trained, tiny_slices, tmp_path, capsys):
    """The document's JSON, the probabilities of evaluation; floats or bytes are one; a bad file: exit code 3."""
    files = sorted((tiny_slices / "slices" / "valid").iterdir())
    np.save(tmp_path / "float.npy", np.load(files[0]).astype(np.float32) / 255)
    words = ["run_task2.py", "--mode", "predict", "--output-dir", trained, "--batch-size", 8, "--predict-input"]
    assert call(*words, *files, tmp_path / "float.npy", "--predict-output", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert set(out) == {"predictions", "summary", "metadata"} and len(out["predictions"]) == len(files) + 1
    evaluated = pd.read_csv(trained / "results" / "slice_predictions.csv").set_index("id")
    for path, one in zip(files, out["predictions"][:-1], strict=True):
        assert one["file_path"] == str(path) and one["slice_id"] == path.name[:-4]
        row = evaluated.loc[one["slice_id"]]
        assert list(one["probabilities"].values()) == approx_row(row)
        assert list(one["predictions"].values()) == [row[f"{n}_pred"] for n in LABELS]
        top = [t["probability"] for t in one["top_abnormalities"]]
        assert top == sorted(top, reverse=True) and all(p > 0.1 for p in top)
    first, last = (out["predictions"][i]["probabilities"].values() for i in (0, -1))
    assert list(first) == pytest.approx(list(last), abs=1e-6)
    assert out["summary"]["num_files"] == len(files) + 1 and out["metadata"]["model"] == "efficientnet_b0"
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table["id"]) == [*(p.name[:-4] for p in files), "float"]
    (tmp_path / "bad.npy").write_bytes(b"no")
    words += [files[0], tmp_path / "bad.npy"]
    assert call(*words, tmp_path / "gone.npy", "--predict-output", tmp_path / "o.json") == 3
    error = capsys.readouterr().err
    assert "failed: " in error and "bad.npy" in error and "gone.npy" in error
    out = json.loads((tmp_path / "o.json").read_text())
    assert out["summary"]["num_failed"] == 2 and len(out["predictions"]) == 1
    assert pd.read_csv(tmp_path / "o.csv").set_index("id").loc["bad"].isna().all()
    assert call(*words[:-2], tmp_path / "bad.npy") == 2
    assert "none of 1 files could be read" in error_of(capsys)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Three volumes as .nii.gz, .nii and .mha (the same scan in other orientations) and labels, a data folder."""
    import SimpleITK

    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    array = rng.normal(-600, 80, (40, 48, 48))  # z, y, x: from low to high, to the back, to the left
    array[10:28, 10:38, 12:36] = rng.normal(20, 60, (18, 28, 24))
    array = array.astype(np.int16)
    image = nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.5, -1.5, 3, 1]))
    nib.save(image, folder / "scan_1.nii.gz")
    nib.save(nib.as_closest_canonical(image), folder / "scan_2.nii")
    itk = SimpleITK.GetImageFromArray(array)
    itk.SetSpacing((1.5, 1.5, 3))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk, "LPI"), str(folder / "scan_3.mha"), True)
    return folder


@pytest.fixture(scope="module", params=[("uint8", "chest"), ("hu", "lung", "mediastinum", "bone")], ids=["uint8", "hu"])
def on_volumes(request, volumes, tmp_path_factory):
    """A run trained and evaluated on the slices that prepare_ct.py made of the volumes: one window, or three of HU."""
    import prepare_ct

    folder, (store, *windows) = tmp_path_factory.mktemp("on_volumes"), request.param
    names = ["scan_1.nii.gz", "scan_2.nii", "scan_3.mha"]
    table = {"VolumeName": names, "split": ["train", "valid", "valid"], "first": [1, 0, 1], "second": 0}
    pd.DataFrame(table).assign(third=[1, 1, 0]).to_csv(folder / "labels.csv", index=False)
    words = ["slices", "--data-dir", volumes, "--output-dir", folder / "ct_rate_2d", "--labels", folder / "labels.csv"]
    words += ["--image-size", 40, "--store", store, "--num-workers", 0]
    assert common.run_main(lambda: prepare_ct.main([str(x) for x in words])) == 0
    more = ["--image-size", 32, "--windows", *windows, "--mode", "both", "--epochs", 1, "--batch-size", 4]
    assert call(*slice_args(folder / "ct_rate_2d", folder, *more)) == 0
    return folder


def test_predict_volumes(on_volumes, volumes, tmp_path):
    """From .nii.gz, .nii and .mha in three orientations: one result, that of evaluation on the stored slices."""
    files = sorted(p for p in volumes.iterdir())
    words = ["run_task2.py", "--mode", "predict", "--predict-type", "volumes", "--batch-size", 4]
    words += ["--output-dir", on_volumes]
    assert call(*words, "--predict-input", *files, "--predict-output", tmp_path / "v.json") == 0
    out = json.loads((tmp_path / "v.json").read_text())["predictions"]
    assert [one["volume_id"] for one in out] == ["scan_1", "scan_2", "scan_3"]
    assert out[0]["probabilities"] == out[1]["probabilities"] == out[2]["probabilities"]
    evaluated = pd.read_csv(on_volumes / "results" / "volume_predictions.csv").set_index("id")
    for one in out[1:]:
        row = evaluated.loc[one["volume_id"]]
        assert list(one["probabilities"].values()) == approx_row(row)
        assert list(one["predictions"].values()) == [row[f"{n}_pred"] for n in LABELS]
    slices = pd.read_csv(on_volumes / "results" / "slice_predictions.csv").set_index("id")
    one = out[1]
    assert one["num_slices_processed"] == len(one["slice_predictions"]) == 12
    for part in one["slice_predictions"]:
        row = slices.loc[f"scan_2.nii_slice_{part['slice_index']:03d}"]
        assert list(part["probabilities"].values()) == approx_row(row)
    of_slices = np.array([list(p["probabilities"].values()) for p in one["slice_predictions"]])
    np.testing.assert_allclose(list(one["max_probabilities"].values()), of_slices.max(0), rtol=1e-12)
    np.testing.assert_allclose(list(one["mean_probabilities"].values()), of_slices.mean(0), rtol=1e-12)
    assert {"max_predictions", "mean_predictions", "top_abnormalities_max", "top_abnormalities_mean"} <= set(one)
    assert call(*words, "--predict-input", files[0], "--predict-output", tmp_path / "six.json", "--slice-strategy",
                "anatomical") == 0  # fmt: skip
    assert json.loads((tmp_path / "six.json").read_text())["predictions"][0]["num_slices_processed"] == 6
    assert (
        call(*words, "--predict-input", files[0], "--predict-output", tmp_path / "5.json", "--slices-per-volume", 5)
        == 0
    )
    assert json.loads((tmp_path / "5.json").read_text())["predictions"][0]["num_slices_processed"] == 5


def test_predict_applies_the_metadata(on_volumes, volumes, tmp_path):
    image = nib.load(volumes / "scan_1.nii.gz")
    raw = nib.Nifti1Image((np.asarray(image.dataobj) + 1024).astype(np.int16), image.affine)
    nib.save(raw, tmp_path / "raw.nii.gz")
    (tmp_path / "m.csv").write_text("VolumeName,RescaleSlope,RescaleIntercept\nraw.nii.gz,1,-1024\n")
    words = ["run_task2.py", "--mode", "predict", "--predict-type", "volumes", "--batch-size", 4]
    words += ["--output-dir", on_volumes]
    words += ["--predict-input", tmp_path / "raw.nii.gz", "--predict-output", tmp_path / "o.json"]
    assert call(*words, "--metadata", tmp_path / "m.csv") == 0
    right = json.loads((tmp_path / "o.json").read_text())["predictions"][0]["probabilities"]
    evaluated = pd.read_csv(on_volumes / "results" / "volume_predictions.csv").set_index("id").loc["scan_2"]
    assert list(right.values()) == approx_row(evaluated)
    assert call(*words) == 0
    assert json.loads((tmp_path / "o.json").read_text())["predictions"][0]["probabilities"] != right


def test_predict_real_volumes_in_every_orientation(on_volumes, shared, tmp_path):
    """The twelve real volumes; then one of them stored with its axes in six other orders: the same probabilities."""
    real = shared / "data" / "ct"
    words = ["run_task2.py", "--mode", "predict", "--output-dir", on_volumes, "--batch-size", 4, "--num-workers", 2]
    words += ["--predict-type", "volumes", "--metadata", real / "metadata.csv", "--predict-output", tmp_path / "o.json"]
    files = sorted(real.glob("*.nii.gz"))
    assert call(*words, "--predict-input", *files) == 0
    out = json.loads((tmp_path / "o.json").read_text())["predictions"]
    assert [one["volume_id"] for one in out] == [p.name[:-7] for p in files] and len(out) == 12
    assert all(0 < p < 1 for one in out for p in one["probabilities"].values())
    image = nib.load(real / "train_8_a_1.nii.gz")
    for code in ("RAS", "LPI", "SAR", "ILP", "PSL", "AIR"):
        here = nib.orientations.io_orientation(image.affine)
        turn = nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt(code))
        nib.save(image.as_reoriented(turn), tmp_path / f"{code}.nii.gz")
    names = [f"{code}.nii.gz" for code in ("RAS", "LPI", "SAR", "ILP", "PSL", "AIR")]
    words = [w for w in words if w not in ("--metadata", real / "metadata.csv")]
    assert call(*words, "--predict-input", real / "train_8_a_1.nii.gz", *(tmp_path / n for n in names)) == 0
    found = [one["probabilities"] for one in json.loads((tmp_path / "o.json").read_text())["predictions"]]
    assert len(found) == 7 and all(p == found[0] for p in found[1:])


@pytest.mark.parametrize("fold", ["none", "f1", "crg"])
def test_challenge_file(on_volumes, volumes, tmp_path, capsys, fold):
    """The official form and order; decisions at the scorer's 0.5 are those at the thresholds; none is dropped."""
    folder = shutil.copytree(volumes, tmp_path / "input")
    words = ["run_task2.py", "--mode", "predict", "--challenge-input", folder, "--output-dir", on_volumes]
    words += ["--challenge-output", tmp_path / "out" / "results.json", "--fold-thresholds", fold, "--batch-size", 4]
    assert call(*words) == 0
    out = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(out) == ["name", "type", "version", "predictions"]
    assert (out["name"], out["type"]) == ("Generated probabilities", "Abnormality Classification")
    assert out["version"] == {"major": 1, "minor": 0}
    assert [p["input_image_name"] for p in out["predictions"]] == ["scan_1", "scan_2", "scan_3"]
    evaluated = pd.read_csv(on_volumes / "results" / "volume_predictions.csv").set_index("id").loc["scan_2"]
    raw = np.array([evaluated[f"{n}_prob"] for n in LABELS])
    found = np.array([out["predictions"][1]["probabilities"][n] for n in LABELS])
    best = common.load_checkpoint(on_volumes / "checkpoints" / "best.ckpt")
    if fold == "none":
        np.testing.assert_allclose(found, raw, atol=1e-6)
    else:
        thresholds = np.array(best[{"f1": "thresholds", "crg": "crg_thresholds"}[fold]])
        assert ((found >= 0.5) == (raw >= thresholds)).all()
        np.testing.assert_allclose(found, common.fold_thresholds(raw, thresholds), atol=1e-5)
    (folder / "broken.mha").write_bytes(b"ObjectType = Image\n")
    assert call(*words) == 3
    assert "broken.mha" in capsys.readouterr().err
    out = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(out["predictions"]) == 3 and "broken.mha" in out["failed"][0]["file_path"]


def test_challenge_orders_labels_as_the_organisers(tmp_path):
    probs = {name: 0.1 for name in task2.LABELS}
    task2.write_challenge(tmp_path / "r.json", [{"volume_id": "a", "probabilities": probs}], None, [])
    written = json.loads((tmp_path / "r.json").read_text())["predictions"][0]["probabilities"]
    assert list(written) == common.CT_RATE_LABELS != task2.LABELS


def test_fold_thresholds_needs_thresholds(trained, volumes, tmp_path, capsys):
    top = next((trained / "checkpoints").glob("*epoch=01*"), None) or trained / task2.LAST
    words = ["run_task2.py", "--mode", "predict", "--challenge-input", volumes, "--fold-thresholds", "f1"]
    assert call(*words, "--checkpoint", top, "--challenge-output", tmp_path / "r.json") == 2
    assert "--fold-thresholds f1" in error_of(capsys)
    assert call(*words, "--challenge-input", tmp_path, "--checkpoint", top) == 2
    assert "no .nii.gz, .nii, .mha in it" in error_of(capsys)


def test_prediction_uses_no_shared_memory(on_volumes, volumes, monkeypatch):
    """Threads, not worker processes: a challenge container has 128 MB of /dev/shm."""
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", None)
    before = set(os.listdir("/dev/shm"))
    words = ["--mode", "predict", "--challenge-input", volumes, "--output-dir", on_volumes, "--num-workers", 3]
    assert call("run_task2.py", *words, "--challenge-output", on_volumes / "r.json") == 0
    assert set(os.listdir("/dev/shm")) <= before


def test_evaluate_py_takes_the_checkpoint(trained, tiny_slices, tmp_path, capsys):
    """evaluate.py: volumes as cases, patients as groups, the same numbers as --mode evaluate."""
    checkpoint = ["--test-only", trained / "checkpoints" / "best.ckpt"]
    assert score(*checkpoint, "--output", tmp_path, "--n-bootstrap", 50) == 0
    files = (tmp_path / "predictions.csv", trained / "results/volume_predictions.csv")
    table, its = (pd.read_csv(path) for path in files)
    results = json.loads((tmp_path / "results.json").read_text())
    own = json.loads((trained / "results" / "evaluation_results.json").read_text())
    assert results["n"] == 7 and results["macro"]["auroc"] == own["auroc_macro"]
    assert "validation cases by which training chose" in results["notes"][0]
    assert table.filter(regex="id|_prob").equals(its.filter(regex="id|_prob"))
    assert "<html" in (tmp_path / "report.html").read_text()
    words = ["--slice-dir", tiny_slices, "--split", "train", "--output", tmp_path / "train", "--no-bootstrap"]
    words += ["--subgroup", "volume_name"]  # of the table of slices, which has no ids of volumes but these
    assert score(*checkpoint, *words) == 0
    results = json.loads((tmp_path / "train" / "results.json").read_text())
    assert results["n"] == 16 and "trained on these cases" in results["notes"][0]
    assert [group["n"] for group in results["subgroups"]["volume_name"].values()] == [1] * 16
    assert score(*checkpoint, "--csv", "x.csv") == 2 and "--csv" in error_of(capsys)
