"""train_retclip.py as a program: files, ranks, resume after kill -9, gradient cache, faults. Tiny photographs."""

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_run, fundus_args, run, start_and_kill, tensors_equal

import common
import train_retclip as retclip


def call(*words):
    """Run in this process: exit code, as run_main gives it."""
    return common.run_main(lambda: retclip.main([str(w) for w in words[1:]]))


def error_of(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def log_of(folder) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("out_*.log")))


MORE = ["--epochs", 4, "--use-ema", "--text-dropout", 0.1, "--mask-ratio", 0.3]


@pytest.fixture(scope="module")
def trained(tiny_fundus, tmp_path_factory):
    """Folder of a finished run of four epochs of four steps."""
    folder = tmp_path_factory.mktemp("trained_retclip")
    assert call(*fundus_args(tiny_fundus, folder, *MORE, "--tensorboard", "--export", folder / "bare.pt")) == 0
    return folder


# ---- runs


def test_a_run_writes_what_the_document_lists(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*")}
    wanted = {"epoch2.pt", "epoch4.pt", "epoch_latest.pt", "best_model.pt"}
    assert {f"checkpoints/{n}" for n in wanted} <= names and "checkpoints/epoch3.pt" not in names
    assert len([n for n in names if n.startswith("checkpoints/best_epoch")]) == 1
    assert [n for n in names if re.fullmatch(r"out_\d{4}(-\d\d){5}\.log", n)]
    params = next(trained.glob("params_*.txt")).read_text().splitlines()
    assert "batch_size: 4" in params and params == sorted(params)
    text = log_of(trained)
    line = r"Step 7/16 \(Epoch 1\.8\) \| Loss: \d+\.\d{4} \| LR: \d\.\de-\d+ \| Time/Step: \d+\.\d\ds \| ETA: \d+s"
    assert re.search(line + r" \| Elapsed: \d+s", text)
    records = [json.loads(x) for x in (trained / "results.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and records[0]["n"] == 9 and records[0]["n_reports"] == 10
    keys = {f"{v}_{w}_recall_at_{k}" for v in retclip.LEVELS for w in ("i2t", "t2i") for k in (1, 5, 10)}
    keys |= {"val_loss", "mean_recall", "class_map", "class_recall_at_1", "left_t2i_batch_recall_at_1", "train_loss"}
    assert keys <= records[0].keys()
    best = common.load_checkpoint(trained / "checkpoints/best_model.pt")
    assert best["class_names"] == ["first", "second"] and "[CLS]" in best["tokenizer"]
    assert best["metrics"]["mean_recall"] == max(r["mean_recall"] for r in records)
    assert len(list((trained / "tensorboard").glob("events*"))) == 1
    saved = common.load_checkpoint(trained / "checkpoints/epoch2.pt")
    assert saved["state"]["step"] == 8 and saved["ema"] and saved["optimizer"]


def test_the_export_is_what_the_original_reads(trained, golden):
    state = torch.load(trained / "bare.pt", weights_only=True)
    best = common.load_checkpoint(trained / "checkpoints/best_model.pt")["model"]
    assert tensors_equal(state, {f"module.{k}": v for k, v in best.items()})
    full = golden.load("keys_retclip_full")["state"]
    one = lambda k: re.sub(r"(layer|resblocks)\.\d+", r"\1.0", k)  # noqa: E731
    assert {one(k.removeprefix("module.")) for k in state} == {one(k) for k in full}


def test_it_learns_the_training_pairs(tiny_fundus, tmp_path):
    """The loss of 16 pairs at a time starts at 3 ln 16 = 8.3 and falls well below."""
    words = ["--batch-size", 16, "--epochs", 40, "--lr", "2e-3", "--warmup", 5, "--eval-every", 40, "--no-augment"]
    assert call(*fundus_args(tiny_fundus, tmp_path, *words)) == 0
    losses = [float(x) for x in re.findall(r"Loss: ([\d.]+)", log_of(tmp_path))]
    assert abs(losses[0] - 3 * math.log(16)) < 0.5 and np.mean(losses[-4:]) < 6, (losses[0], losses[-4:])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_continues_bit_for_bit(tiny_fundus, trained, tmp_path, workers):
    words = fundus_args(tiny_fundus, tmp_path, *MORE, "--num-workers", workers)
    start_and_kill(words, 1, 6, tmp_path)
    assert call(*words, "--resume", "auto") == 0
    assert_same_run(trained, tmp_path, retclip)


def test_an_epoch_file_continues_bit_for_bit(tiny_fundus, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "again")
    more = ["--resume", tmp_path / "again/checkpoints/epoch2.pt"]
    assert call(*fundus_args(tiny_fundus, tmp_path / "again", *MORE, *more)) == 0
    assert_same_run(trained, tmp_path / "again", retclip)


def test_a_fresh_start_forgets_the_epochs_of_another_run(tiny_fundus, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "again")
    assert call(*fundus_args(tiny_fundus, tmp_path / "again", "--epochs", 1, "--overwrite")) == 0
    assert not list((tmp_path / "again/checkpoints").glob("epoch[0-9]*"))


def test_what_a_resumed_run_keeps(tiny_fundus, trained, tmp_path, capsys):
    for word in (["--max-text-length", 50], ["--layer-decay", 0.9], ["--official-decay"]):
        shutil.copytree(trained, tmp_path / "again", dirs_exist_ok=True)
        assert call(*fundus_args(tiny_fundus, tmp_path / "again", *MORE, "--resume", *word)) == 2
        assert word[0] in error_of(capsys)


def test_epochs_are_kept_where_evaluations_are_rarer(tiny_fundus, tmp_path):
    words = ["--eval-every", 5, "--save-every", 1000, "--save-epoch-frequency", 1, "--logs", tmp_path, "--name", "run"]
    words = [w for w in fundus_args(tiny_fundus, tmp_path, *words)]
    del words[words.index("--output-dir") : words.index("--output-dir") + 2]
    assert call(*words) == 0
    assert len(list((tmp_path / "run/checkpoints").glob("epoch[123].pt"))) == 3


@pytest.mark.slow
def test_two_ranks_equal_one_and_continue_after_a_kill(tiny_fundus, tmp_path):
    """The same global batch on one rank and on two: the same weights within rounding; killed, the same bits."""
    more = ["--epochs", 2, "--check-ranks", "--eval-batch-size", 4]
    assert call(*fundus_args(tiny_fundus, tmp_path / "one", *more)) == 0
    run(*fundus_args(tiny_fundus, tmp_path / "two", *more, "--batch-size", 2), world=2)
    a, b = (common.load_checkpoint(tmp_path / n / retclip.LAST)["model"] for n in ("one", "two"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 5e-5
    one, two = (json.loads((tmp_path / n / "results.jsonl").read_text().splitlines()[-1]) for n in ("one", "two"))
    assert abs(one["val_loss"] - two["val_loss"]) < 1e-3
    words = fundus_args(tiny_fundus, tmp_path / "part", *more, "--batch-size", 2)
    start_and_kill(words, 2, 5, tmp_path / "part")
    run(*words, "--resume", "auto", world=2)
    assert_same_run(tmp_path / "two", tmp_path / "part", retclip)


# ---- gradient cache


@pytest.mark.parametrize("sizes, chunk", [([8], 3), ([4, 4], 4), ([2, 2, 2, 2], 1)])
def test_gradient_cache_equals_the_plain_loss(tiny_fundus, tmp_path, sizes, chunk):
    args = retclip.parse_args(list(map(str, fundus_args(tiny_fundus, tmp_path, "--batch-size", 8)[1:])))
    with common.process_group("cpu") as ctx:
        data, _ = retclip.build_datasets(args)
        model = retclip.build_model(args, lambda text: None)
        items = [data[0, i] for i in range(8)]
        whole = data.collate([dict(item) for item in items])
        whole["present"][3, 1] = False  # a missing eye, in another chunk than most

        def gradient(batches, size):
            args.grad_cache_chunk = size
            criterion = retclip.build_criterion(args, data)
            model.zero_grad()
            scaler, autocast = retclip.autocast_of(args, ctx.device)[1], retclip.autocast_of(args, ctx.device)[0]
            logs = retclip.forward_backward(model, batches, criterion, scaler, autocast, ctx)
            return logs["loss"], {n: p.grad.clone() for n, p in model.named_parameters()}

        loss, expected = gradient([whole], 8)
        parts, first = [], 0
        for size in sizes:
            parts.append({k: v[first : first + size] for k, v in whole.items()})
            first += size
        other, found = gradient(parts, chunk)
    assert abs(loss - other) < 1e-5
    for name, value in expected.items():
        assert torch.allclose(value, found[name], rtol=1e-3, atol=1e-6), name


# ---- users' mistakes


@pytest.mark.parametrize("words, message", [
    (["--train-data", "nowhere"], "neither an LMDB folder"),
    (["--vocab", "nowhere.txt"], "no vocabulary"),
    (["--batch-size", 64], "do not fill one step"),
    (["--mask-ratio", 1], "--mask-ratio"),
    (["--same-text", 2], "--same-text"),
    (["--layer-decay", 0], "--layer-decay"),
    (["--level-weights", 0, 1, 1], "--level-weights"),
    (["--save-epoch-frequency", 0], "--save-epoch-frequency"),
    (["--lr", "nan"], "--lr must not be negative"),
    (["--mask-ratio", 0.9], "leaves no patch"),
    (["--image-size", 0], "at least 1 pixel"),
    (["--output-dir", "/proc/x"], "could not be made"),
    (["--freeze-layers", 3], "--freeze-layers 3"),
    (["--monocular"], "two photographs a patient, but the model is for one"),
    (["--image-size", 30], "multiple of the patch"),
    (["--max-text-length", 600], "reads 512 tokens"),
    (["--templates", "nowhere.txt"], "not a readable file of prompts"),
    (["--pretrained", "nowhere.pt"], "no such weight file"),
])  # fmt: skip
def test_mistakes_get_one_line(tiny_fundus, tmp_path, capsys, words, message):
    assert call(*fundus_args(tiny_fundus, tmp_path / "out", *words)) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize("flag", ["--train-data", "--val-data", "--vocab"])
def test_what_must_be_given(tiny_fundus, tmp_path, capsys, flag):
    words = fundus_args(tiny_fundus, tmp_path)
    del words[words.index(flag) : words.index(flag) + 2]
    assert call(*words) == 2 and f"{flag} is missing" in error_of(capsys)


def test_patients_in_both_splits_are_an_error(tiny_fundus, tmp_path, capsys):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    labels = pd.read_csv(tmp_path / "data/val/labels.csv")
    labels.loc[2, "patient_id"] = "p5"
    labels.to_csv(tmp_path / "data/val/labels.csv", index=False)
    assert call(*fundus_args(tmp_path / "data", tmp_path / "out")) == 2
    assert "patient p5 is in the training data too (1 are)" in error_of(capsys)


def test_the_same_photographs_in_both_splits_are_an_error(tiny_fundus, tmp_path, capsys):
    """Without patients: by the bytes of the photographs under the same id."""
    shutil.copytree(tiny_fundus, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "labels.csv").unlink()
    shutil.copytree(tmp_path / "data/train", tmp_path / "data/val", dirs_exist_ok=True)
    assert call(*fundus_args(tmp_path / "data", tmp_path / "out")) == 2
    assert "patient P0 is in the training data too (16 are)" in error_of(capsys)


def test_a_validation_set_named_test_is_warned_of(tiny_fundus, tmp_path, capsys):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    (tmp_path / "data/val").rename(tmp_path / "data/test")
    words = fundus_args(tmp_path / "data", tmp_path / "out", "--val-data", tmp_path / "data/test", "--epochs", 1)
    assert call(*words) == 0
    assert "warning: the validation data" in log_of(tmp_path / "out")


def test_features_that_collapse_raise_an_alarm(tiny_fundus, tmp_path):
    words = ["--lr", 0, "--vision-model", "tiny", "--max-steps", 8]
    assert call(*fundus_args(tiny_fundus, tmp_path, *words)) == 0
    assert "that of guessing (4.159 for 4 pairs)" in log_of(tmp_path)  # 3 ln 4


def test_unreadable_photographs(tiny_fundus, tmp_path, capsys):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    path = tmp_path / "data/train_imgs.tsv"
    lines = path.read_text().splitlines(keepends=True)
    name, left, right = lines[5].split("\t")
    lines[5] = f"{name}\t{left[:400]}\t{right}"
    path.write_text("".join(lines))
    words = ["--train-data", tmp_path / "data/train_imgs.tsv"]
    assert call(*fundus_args(tmp_path / "data", tmp_path / "out", *words)) == 2
    assert "image P5: not a readable image" in error_of(capsys)
    words += ["--on-bad-sample", "skip"]
    assert call(*fundus_args(tmp_path / "data", tmp_path / "skip", *words, "--max-bad-fraction", 0.5)) == 0
    assert pd.read_csv(tmp_path / "skip/bad_samples.csv")["id"].tolist() == ["P5"]
    assert call(*fundus_args(tmp_path / "data", tmp_path / "few", *words)) == 2
    assert "--max-bad-fraction" in error_of(capsys)


# ---- nothing is lost


def test_a_mistake_costs_no_checkpoint(tiny_fundus, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "again")
    before = sorted(p.name for p in (tmp_path / "again/checkpoints").iterdir())
    words = fundus_args(tiny_fundus, tmp_path / "again", "--overwrite", "--train-data", "nowhere")
    assert call(*words) == 2 and "neither an LMDB" in error_of(capsys)
    assert sorted(p.name for p in (tmp_path / "again/checkpoints").iterdir()) == before
    for name in ("epoch_latest.pt", "epoch_latest_previous.pt"):
        (tmp_path / "again/checkpoints" / name).unlink()
    for more in ([], ["--resume"]):  # the epochs are a run as well
        assert call(*fundus_args(tiny_fundus, tmp_path / "again", *more)) == 2
        assert "of another run" in error_of(capsys)


@pytest.mark.slow
def test_auto_goes_on_from_where_an_explicit_resume_went_back_to(tiny_fundus, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "again", ignore=shutil.ignore_patterns("out_*.log"))
    words = fundus_args(tiny_fundus, tmp_path / "again", *MORE, "--save-every", 1000, "--eval-every", 1000)
    start_and_kill([*words, "--resume", tmp_path / "again/checkpoints/epoch2.pt"], 1, 10, tmp_path / "again")
    assert common.load_checkpoint(tmp_path / "again" / retclip.LAST)["state"]["step"] == 8
    assert call(*fundus_args(tiny_fundus, tmp_path / "again", *MORE, "--resume", "auto")) == 0
    a, b = (common.load_checkpoint(f / retclip.LAST) for f in (trained, tmp_path / "again"))
    assert tensors_equal(a["model"], b["model"]) and "resumed at step 8" in log_of(tmp_path / "again")


def test_a_warm_up_as_long_as_the_run_is_warned_of(tiny_fundus, tmp_path):
    assert call(*fundus_args(tiny_fundus, tmp_path, "--warmup", 12)) == 0
    assert "warning: --warmup 12 is as long as the whole run of 12 steps" in log_of(tmp_path)
