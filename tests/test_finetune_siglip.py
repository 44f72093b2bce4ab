"""finetune_siglip.py as a program: runs, ranks, resume after kill -9, faults. Tiny volumes, real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, ROOT, Evil, run, start_and_kill, tiny_args

import common
import finetune_siglip as siglip


def call(*words):
    """Run in this process: exit code, as run_main gives it."""
    return common.run_main(lambda: siglip.main([str(w) for w in words[1:]]))


def assert_same_run(one, other):
    conftest.assert_same_run(one, other, siglip)


# ---- runs


def test_a_run_writes_what_the_document_lists(tiny_ct, tmp_path):
    words = tiny_args(
        tiny_ct, tmp_path / "run", "--use-ema", "--tensorboard", "--export", tmp_path / "tower.safetensors"
    )
    run(*words)
    folder = tmp_path / "run"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3] and [r["step"] for r in records] == [4, 8, 12]
    for key in (
        "train_loss",
        "val_loss",
        "macro_f1",
        "micro_f1",
        "macro_auroc",
        "first_precision",
        "first_recall",
        "first_f1",
        "first_auroc",
    ):
        assert key in records[0]
    text = (folder / "training.log").read_text()
    line = (
        r"Step 4/12 \(Epoch 1\.0\) \| Loss: \d\.\d{4} \| LR: 1\.0e-3 \| Time/Step: \d+\.\d\ds \| ETA: .*s \| Elapsed: "
    )
    assert re.search(line, text)
    assert re.search(r"Data wait: \d+% \| Peak memory: \d+\.\d\d GiB", text)
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - INFO - Epoch 1 - train_loss", text, re.M)
    assert len(list(folder.glob("checkpoint_epoch_*.pth"))) == 3 and list((folder / "tensorboard").iterdir())
    best = common.load_checkpoint(folder / "best_model.pth")
    assert best["class_names"] == LABELS and len(best["thresholds"]) == len(best["temperatures"]) == 3
    assert best["metrics"]["macro_f1"] == max(r["macro_f1"] for r in records)
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in best["model"])
    exported = common.load_weights(str(tmp_path / "tower.safetensors"))
    assert all(
        torch.equal(exported["vision_model." + k.removeprefix("backbone.")], v)
        for k, v in best["model"].items()
        if k.startswith("backbone.")
    )


def test_overfits_eight_volumes(tiny_ct, tmp_path):
    table = pd.read_csv(tiny_ct / "t.csv", dtype=str, keep_default_na=False).iloc[:8]
    table["img_path"] = str(tiny_ct) + "/" + table["img_path"]
    copies = [
        table.assign(series_id=table["series_id"] + f"_{i}") for i in range(6)
    ]  # the same volumes, other patients
    copies[0]["split"] = "val"
    pd.concat(copies).to_csv(tmp_path / "t.csv", index=False)
    words = tiny_args(
        tmp_path, tmp_path / "run", "--no-augment", "--dropout-rate", 0, "--batch-size", 8, "--epochs", 60
    )
    words += ["--warmup", 10, "--scheduler", "constant", "--early-stopping-patience", 99]
    assert call(*words) == 0
    last = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] < 0.02 and last["macro_auroc"] == 1.0 and last["macro_f1"] == 1.0


def test_test_only_needs_the_checkpoint_and_the_csv(tiny_ct, tmp_path, capsys):
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 1)) == 0
    best = tmp_path / "run" / "best_model.pth"
    test = ["finetune_siglip.py", "--csv", tiny_ct / "t.csv", "--test-only", best, "--output-dir", tmp_path / "run"]
    assert call(*test, "--slice-weights", tmp_path / "w.npz") == 0
    table = pd.read_csv(tmp_path / "run" / "test_predictions.csv")
    assert list(table.columns) == ["id", *(f"{n}_{k}" for n in LABELS for k in ("prob", "pred"))]
    assert list(table["id"]) == [f"case{i}" for i in range(16, 23)]
    thresholds = common.load_checkpoint(best)["thresholds"]
    for name, t in zip(LABELS, thresholds, strict=True):
        assert ((table[f"{name}_prob"] >= t).astype(int) == table[f"{name}_pred"]).all()
    assert np.load(tmp_path / "w.npz")["weights"].shape == (7, 6, 3)
    assert "per label, from the checkpoint" in capsys.readouterr().out
    assert call(*test, "--split", "test", "--threshold", 0.3, "--test-output", tmp_path / "p.csv") == 0
    table = pd.read_csv(tmp_path / "p.csv")
    assert len(table) == 3 and ((table["first_prob"] >= 0.3) == (table["first_pred"] == 1)).all()
    assert "0.3 (--threshold)" in capsys.readouterr().out


# ---- many processes


@pytest.mark.slow  # test_evaluate.py has the same for evaluate.py
def test_evaluation_has_the_same_digits_on_1_2_and_3_ranks(tiny_ct, tmp_path):
    """7 cases, batches of 4: not divisible by anything."""
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 1)) == 0
    texts = []
    for world in (1, 2, 3):
        out = tmp_path / f"p{world}.csv"
        words = ["--csv", tiny_ct / "t.csv", "--test-only", tmp_path / "run" / "best_model.pth", "--test-output", out]
        run("finetune_siglip.py", *words, "--num-workers", 0, "--batch-size", 4, world=world)
        texts.append(out.read_bytes())
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_ranks_and_accumulation_do_not_change_the_training(tiny_ct, tmp_path):
    """A global batch of 8, with unknown labels, as 1 x 8, 1 x 2 x 4 and 2 ranks x 2 x 2."""
    still = [
        "--no-augment",
        "--dropout-rate",
        0,
        "--loss",
        "focal",
        "--check-ranks",
        "--optimizer",
        "sgd",
        "--lr",
        0.05,
    ]
    for name, world, batch, accum in (("a", 1, 8, 1), ("b", 1, 2, 4), ("c", 2, 2, 2)):
        words = tiny_args(tiny_ct, tmp_path / name, *still, "--batch-size", batch, "--accum-steps", accum)
        run(*words, world=world)
    models = {n: common.load_checkpoint(tmp_path / n / "last.pth") for n in "abc"}
    losses = {
        n: [json.loads(line)["train_loss"] for line in (tmp_path / n / "results.jsonl").read_text().splitlines()]
        for n in "abc"
    }
    for n in "bc":
        np.testing.assert_allclose(losses[n], losses["a"], rtol=1e-5)
        for key, value in models["a"]["model"].items():
            torch.testing.assert_close(
                models[n]["model"][key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
        assert models[n]["state"]["updates"] == models["a"]["state"]["updates"]


# ---- resume


@pytest.mark.slow  # test_train_retclip.py has the same of the same loop, in less time
@pytest.mark.parametrize(("world", "workers", "after"), [(1, (0, 2), (7, 23)), (2, (2, 0), (5, 14))])
def test_killed_run_ends_equal_to_the_uninterrupted_one(tiny_ct, tmp_path, world, workers, after):
    """kill -9 twice, mid-epoch, other numbers of workers: model, EMA, optimizer, best list, results, bit for bit."""
    more = [
        "--use-ema",
        "--epochs",
        9,
        "--batch-size",
        2,
        "--accum-steps",
        2 // world,
        "--scheduler",
        "cosine",
        "--warmup",
        5,
    ]
    more += ["--save-every", 1, "--top-k", 9, "--early-stopping-patience", 99, "--resume", "auto"]
    run(*tiny_args(tiny_ct, tmp_path / "whole", *more), world=world)
    words = tiny_args(tiny_ct, tmp_path / "killed", *more)
    for step, n_workers in zip(after, workers, strict=True):
        start_and_kill([*words, "--num-workers", n_workers], world, step, tmp_path / "killed")
    run(*words, world=world)
    assert "resumed at step" in (tmp_path / "killed" / "training.log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "left_out", [None, "model", "ema", "optimizer", "step", "updates", "stale", "best", "loss_sum"]
)
def test_resume_needs_every_item_of_the_state(tiny_ct, tmp_path_factory, tmp_path, left_out, request):
    """The ablation: with one item left out, the resumed run must end differently, or this test proves nothing."""
    whole = request.config.cache.mkdir("ablation") / "run"  # made once for all cases
    more = [
        "--use-ema",
        "--epochs",
        4,
        "--scheduler",
        "cosine",
        "--warmup",
        2,
        "--save-every",
        5,
        "--early-stopping-patience",
        99,
        "--seed",
        1,
    ]
    if left_out is None:
        shutil.rmtree(whole, ignore_errors=True)
        assert call(*tiny_args(tiny_ct, whole, *more)) == 0
        shutil.copy(whole / "last_previous.pth", whole.parent / "middle.pth")
    if not (whole.parent / "middle.pth").exists():
        pytest.skip("runs after the case that leaves nothing out")
    middle = common.load_checkpoint(whole.parent / "middle.pth")
    assert middle["state"]["step"] == 15 and common.load_checkpoint(whole / "last.pth")["state"]["step"] == 16
    again = tmp_path / "again"
    again.mkdir()
    for path in [*whole.glob("checkpoint_epoch_*.pth"), whole / "results.jsonl"]:
        shutil.copy(path, again)
    fresh = common.load_checkpoint(whole.parent / "middle.pth")
    if left_out in ("model", "ema"):
        fresh[left_out] = {k: torch.zeros_like(v) for k, v in fresh[left_out].items()}
    elif left_out == "optimizer":
        fresh["optimizer"]["state"] = {}
    elif left_out is not None:
        fresh["state"][left_out] = [] if left_out == "best" else 0 if left_out != "stale" else 7
    common.save_checkpoint(again / "last.pth", fresh)
    assert call(*tiny_args(tiny_ct, again, *more, "--resume", "auto")) == 0
    if left_out is None:
        assert_same_run(whole, again)
    else:
        with pytest.raises(AssertionError):
            assert_same_run(whole, again)


def test_sigterm_saves_and_exits_143(tiny_ct, tmp_path):
    more = ["--epochs", 200, "--early-stopping-patience", 999, "--save-every", 10**6]
    words = tiny_args(tiny_ct, tmp_path / "run", *more, "--num-workers", 1)
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    log = tmp_path / "run" / "training.log"
    while "Step 6/" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does: to the whole job, data workers too
    assert process.wait(60) == 143
    assert "SIGTERM: saved at step" in log.read_text()
    step = common.load_checkpoint(tmp_path / "run" / "last.pth")["state"]["step"]
    assert step >= 6 and step % 4 == step % 4
    run(
        *tiny_args(
            tiny_ct, tmp_path / "run", "--epochs", step // 4 + 2, "--early-stopping-patience", 999, "--resume", "auto"
        )
    )
    assert f"resumed at step {step}" in log.read_text()


def test_resume_refuses_what_cannot_be_continued(tiny_ct, tmp_path, capsys):
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 1)) == 0
    cases = {
        ("--resume", tmp_path / "none.pth"): "no such checkpoint",
        (): "holds a run (--resume auto continues it, --overwrite starts anew)",
        ("--resume", "auto", "--batch-size", 2): "the global batch is 2 but the run has 4",
        ("--resume", "auto", "--num-slices", 4): "--num-slices is 4 but the run has 6",
        ("--resume", tmp_path / "run" / "best_model.pth"): "holds a model but no run",
    }
    for more, message in cases.items():
        capsys.readouterr()
        assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 2, *more)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    capsys.readouterr()
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 2, "--resume", "auto", "--lr", "1e-4")) == 0
    assert "warning: --lr was 0.001 and is now 0.0001" in capsys.readouterr().err
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 1, "--overwrite")) == 0
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 1


def test_two_runs_in_one_folder_are_refused(tiny_ct, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        assert call(*tiny_args(tiny_ct, folder)) == 2
        assert "another run is writing here" in capsys.readouterr().err
    finally:
        holder.kill()


# ---- faults


def test_damaged_checkpoints(tiny_ct, tmp_path, capsys):
    """A flipped byte or a cut: refused by name; under --resume auto the checkpoint before it serves."""
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 2)) == 0
    whole = (tmp_path / "run" / "last.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (bytes(flipped), whole[: len(whole) // 2], b""):
        (tmp_path / "bad.pth").write_bytes(damage)
        capsys.readouterr()
        assert call(*tiny_args(tiny_ct, tmp_path / "other", "--resume", tmp_path / "bad.pth")) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and ("damaged at entry" in error[0] or "not a whole checkpoint" in error[0])
    (tmp_path / "run" / "last.pth").write_bytes(bytes(flipped))
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 3, "--resume", "auto")) == 0
    assert "continuing from" in capsys.readouterr().err
    for name in ("last.pth", "last_previous.pth"):
        (tmp_path / "run" / name).write_bytes(bytes(flipped))
    assert call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 4, "--resume", "auto")) == 2


def test_foreign_pickles_never_run(tiny_ct, tmp_path, capsys):
    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.pth")
    for more in (
        ["--resume", tmp_path / "evil.pth"],
        ["--test-only", tmp_path / "evil.pth"],
        ["--pretrained", tmp_path / "evil.pth"],
    ):
        capsys.readouterr()
        assert call(*tiny_args(tiny_ct, tmp_path / "run", *more)) == 2
        assert re.search(
            r"error: .*refused, it holds more than .*system", capsys.readouterr().err.strip().splitlines()[-1]
        )
    assert not os.path.exists("/tmp/plainscan_was_owned")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="second"), "column 'second' is missing"),
        (lambda t: t.rename(columns={"second": "Second"}), "did you mean 'Second'?"),
        (lambda t: t.drop(columns="img_path"), "column 'img_path' is missing"),
        (lambda t: t.assign(first=t["first"].replace("1", "2")), "row 3, column 'first': '2' is no label"),
        (lambda t: t.assign(series_id="x"), "row 3: series_id x comes twice"),
        (lambda t: t.assign(patient_id="p"), "patient p is in test and train and val (results leak)"),
        (
            lambda t: t.assign(patient_id=["p", *t.index[1:-1].astype(str), "p"], split=[*t["split"][:-1], "test"]),
            "patient p is in test and train (results leak)",
        ),
        (lambda t: t.assign(patient_id="", split=[*t["split"][:-1], "gone"], first="7"), "column 'first': '7'"),
        (lambda t: t.assign(split="train"), "no row has split 'val'"),
        (lambda t: t.assign(img_path="gone.npz"), "gone.npz: no such volume"),
        (lambda t: t.assign(img_path=""), "row 2: img_path is empty"),
        (lambda t: t.iloc[:0], "has no rows"),
    ],
)
def test_bad_tables_end_in_one_line(tiny_ct, tmp_path, capsys, change, message):
    table = pd.read_csv(tiny_ct / "t.csv", dtype=str, keep_default_na=False)
    table["img_path"] = str(tiny_ct) + "/" + table["img_path"]
    change(table).to_csv(tmp_path / "t.csv", index=False)
    assert call(*tiny_args(tmp_path, tmp_path / "run")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], lines


def test_bad_arguments_end_in_one_line(tiny_ct, tmp_path, capsys):
    base = tiny_args(tiny_ct, tmp_path / "run")
    for more, message in (
        (["--csv", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--pretrained", "nowhere.bin"], "nowhere.bin: no such weight file"),
        (["--batch-size", 99], "16 training samples do not fill one step of 99"),
        (["--freeze-up-to", 99], "the backbone has 25 layers"),
        (["--device", "gpu"], "device 'gpu' is not known"),
        (["--data-root", tmp_path], "no such volume"),
        (["--num-slices", 0], "--num-slices must be at least 1"),
        (["--image-size", 4], "--image-size 4: smaller than a patch"),
        (["--slice-chunk", -1], "--slice-chunk must be at least 0"),
        (["--drop-path", 1], "--drop-path must be at least 0 and below 1"),
        (["--seed", -1], "--seed must not be negative"),
        (["--max-pos-weight", 0], "--max-pos-weight must be at least 1"),
        (["--export", tiny_ct / "t.csv" / "x.pt"], "is not a folder that can be written to"),
    ):
        assert call(*base, "--overwrite", *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    assert call("finetune_siglip.py", "--csv", tiny_ct / "t.csv") == 2
    assert "--pretrained is missing" in capsys.readouterr().err
    table = pd.read_csv(tiny_ct / "t.csv", dtype=str, keep_default_na=False).assign(img_path="../secret.npz")
    table.to_csv(tmp_path / "t.csv", index=False)
    assert call(*tiny_args(tmp_path, tmp_path / "run", "--data-root", tiny_ct, "--overwrite")) == 2
    assert "leads out of --data-root" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_volumes(tiny_ct, tmp_path, capsys, workers):
    """fail: one line with the file. skip: counted and listed; a validation case stays, as missing; exit code 3."""
    data = shutil.copytree(tiny_ct, tmp_path / "data")
    for i in (2, 17):  # a training and a validation volume
        whole = (data / f"v{i}.npz").read_bytes()
        (data / f"v{i}.npz").write_bytes(whole[: len(whole) // 2])
    more = ["--num-workers", workers, "--epochs", 2]
    assert call(*tiny_args(data, tmp_path / "fail", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(r"v(2|17)\.npz", error), error
    words = tiny_args(data, tmp_path / "skip", *more, "--on-bad-sample", "skip")
    assert call(*words) == 2  # 1 of 16 is more than 5 %
    assert "1 of 16 training samples are unreadable" in capsys.readouterr().err
    assert call(*words, "--max-bad-fraction", 0.1, "--overwrite") == 0
    assert list(pd.read_csv(tmp_path / "skip" / "bad_samples.csv")["id"]) == ["case2"]
    assert json.loads((tmp_path / "skip" / "results.jsonl").read_text().splitlines()[0])["n_missing"] == 1
    best, out = tmp_path / "skip" / "best_model.pth", tmp_path / "p.csv"
    words = ["--csv", data / "t.csv", "--test-only", best, "--test-output", out, "--num-workers", workers]
    code = call("finetune_siglip.py", *words)
    assert code == 3 and "failed: case17" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "p.csv").set_index("id")
    assert len(table) == 7 and table.loc["case17"].isna().all() and table.drop("case17").notna().all(axis=None)


def test_full_disk_leaves_the_old_checkpoint(tiny_ct, tmp_path):
    """A file-size limit of the operating system: the save fails, one line, exit 2, the old checkpoint loads."""
    call(*tiny_args(tiny_ct, tmp_path / "run", "--epochs", 1))
    before = (tmp_path / "run" / "last.pth").read_bytes()
    words = [str(w) for w in tiny_args(tiny_ct, tmp_path / "run", "--epochs", 2, "--resume", "auto")]
    code = (
        "import resource, signal, sys, common, finetune_siglip;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));"
        "sys.exit(common.run_main(lambda: finetune_siglip.main(sys.argv[1:])))"
    )
    result = run("-c", code, *words[1:], check=2)
    assert re.search(
        r"error: .*\.pth: could not be written: .* MiB free; the old file is untouched", result.stderr.splitlines()[-1]
    )
    assert (tmp_path / "run" / "last.pth").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*tmp*"))


def test_non_finite_steps_are_skipped_and_end_the_run(tiny_ct, tmp_path, capsys):
    words = tiny_args(
        tiny_ct,
        tmp_path / "run",
        "--lr",
        "1e30",
        "--max-grad-norm",
        1,
        "--max-bad-steps",
        3,
        "--save-every",
        1,
        "--epochs",
        9,
    )
    assert call(*words) == 2
    assert "3 steps in a row were not finite" in capsys.readouterr().err
    saved = common.load_checkpoint(tmp_path / "run" / "last.pth")
    assert saved["state"]["updates"] == saved["state"]["step"]  # of before steps failed
