"""train_ctclip.py as a program: files, ranks, resume after kill -9, gradient cache, FSDP, faults. Tiny volumes."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, assert_same_run, report_args, run, start_and_kill, tensors_equal

import common
import train_ctclip as ctclip


def call(*words):
    """Run in this process: exit code, as run_main gives it."""
    return common.run_main(lambda: ctclip.main([str(w) for w in words[1:]]))


def error_of(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tiny_reports, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained_ctclip")
    assert call(*report_args(tiny_reports, folder, "--tensorboard", "--export", folder / "bare.pt")) == 0
    return folder


def last_of(folder) -> dict:
    return common.load_checkpoint(common.last_files(folder / ctclip.LAST)[0])


# ---- runs


def test_a_run_writes_what_the_document_lists(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"checkpoint_step_9.pt", "checkpoint_step_8.pt", "checkpoint_step_12.pt", "best_model.pt"} <= names
    assert len([n for n in names if n.startswith("checkpoint_step_")]) == 3  # the last three
    assert len([n for n in names if n.startswith("best_step_")]) == 1
    text = (trained / "training.log").read_text()
    line = r"Step 7/12 \(Epoch 1\.8\) \| Loss: \d\.\d{4} \| LR: \d\.\de-\d+ \| Time/Step: \d+\.\d\ds \| ETA: \d+s"
    assert re.search(line + r" \| Elapsed: \d+s", text)
    records = [json.loads(x) for x in (trained / "results.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [4, 8, 12] and records[0]["n"] == 9
    for key in ("train_loss", "val_loss", "macro_auroc", "macro_auprc", "macro_f1", "recall_at_5", "first_auroc"):
        assert key in records[0]
    best = common.load_checkpoint(trained / "best_model.pt")
    assert best["class_names"] == LABELS and len(best["thresholds"]) == 3 and "[CLS]" in best["tokenizer"]
    assert best["metrics"]["macro_auroc"] == max(r["macro_auroc"] for r in records)
    assert "on all 9 validation cases" in text and len(list((trained / "tensorboard").glob("events*"))) == 1


def test_the_export_is_what_the_original_reads(trained, golden):
    state = torch.load(trained / "bare.pt", weights_only=True)
    best = common.load_checkpoint(trained / "best_model.pt")["model"]
    assert tensors_equal(state, best)
    full = golden.load("keys_ctclip_full")["state"]
    short = {re.sub(r"(layers?)\.\d+", r"\1.0", k) for k in full}
    assert {re.sub(r"(layers?)\.\d+", r"\1.0", k) for k in state} == short


def test_it_learns_the_training_pairs(tiny_reports, tmp_path):
    """100 steps on 16 pairs of four looks: the loss falls far below ln 8 = 2.08."""
    words = ["--batch-size", 8, "--max-steps", 100, "--eval-every", 100, "--max-grad-norm", 1.0, "--lr", "2e-3"]
    words += ["--warmup", 10]
    assert call(*report_args(tiny_reports, tmp_path, *words)) == 0
    losses = [float(x) for x in re.findall(r"Loss: ([\d.]+)", (tmp_path / "training.log").read_text())]
    assert losses[0] > 1.5 and np.mean(losses[-4:]) < 1.7, (losses[0], losses[-4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_bit_for_bit(tiny_reports, trained, tmp_path, workers):
    words = report_args(tiny_reports, tmp_path, "--num-workers", workers)
    start_and_kill(words, 1, 7, tmp_path)
    assert call(*words, "--resume", "auto") == 0
    assert_same_run(trained, tmp_path, ctclip)


def test_a_named_checkpoint_continues_bit_for_bit(tiny_reports, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "saves")
    words = report_args(tiny_reports, folder, "--resume", folder / "checkpoint_step_8.pt")
    assert call(*words) == 0
    assert_same_run(trained, folder, ctclip)


def test_what_a_resumed_run_goes_on_from(tiny_reports, trained, tmp_path, capsys):
    """A named checkpoint comes before later ones; --pretrained is not needed again; another vocabulary is told."""
    folder = shutil.copytree(trained, tmp_path / "saves")
    args = ctclip.parse_args([str(w) for w in report_args(tiny_reports, folder)[1:]])
    args.resume = str(folder / "checkpoint_step_8.pt")
    assert common.find_resume(args, ctclip.LAST)["state"]["step"] == 8
    args.resume = "auto"
    assert common.find_resume(args, ctclip.LAST)["state"]["step"] == 8
    (folder / "checkpoint_step_8.pt").write_bytes(b"damaged")
    assert common.find_resume(args, ctclip.LAST)["state"]["step"] == 12  # with a warning
    assert "continuing from" in capsys.readouterr().err
    for name in ("checkpoint_step_8.pt", "checkpoint_step_12.pt"):
        (folder / name).unlink()
    more = ["--resume", "--pretrained", tmp_path / "gone.pt"]
    assert call(*report_args(tiny_reports, folder, *more)) == 0
    capsys.readouterr()
    (tmp_path / "vocab.txt").write_text((tiny_reports / "vocab.txt").read_text().replace("first", "erst"))
    assert call(*report_args(tiny_reports, folder, "--resume", "--vocab", tmp_path / "vocab.txt")) == 2
    assert "not the vocabulary of the run" in error_of(capsys)
    assert call(*report_args(tiny_reports, folder, "--resume", "--label-loss-weight", 1)) == 2
    assert "has no head for the labels" in error_of(capsys)


def test_the_vocabulary_must_be_that_of_the_weights(tiny_reports, trained, tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("\n".join((tiny_reports / "vocab.txt").read_text().split("\n")[:20]) + "\n")
    more = ["--pretrained", trained / "bare.pt", "--vocab", tmp_path / "vocab.txt", "--preset", "ctclip-v2"]
    assert call(*report_args(tiny_reports, tmp_path / "out", *more)) == 2
    assert "has 20 words, the text encoder 30522" in error_of(capsys)


def test_scores_in_bf16_are_those_of_its_features(tiny_reports, trained):
    """The difference of two cosines is formed in float32."""
    saved = common.load_checkpoint(trained / "best_model.pt")
    args = ctclip.args_from_checkpoint(saved, amp="bf16")
    model, data = ctclip.build_eval_model(saved, args, torch.device("cpu")), ctclip.build_eval_dataset(args)
    ctx = common.Context(0, 1, torch.device("cpu"))
    out = ctclip.predict(model, data, ctx)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prompts = ctclip.prompt_features(model, args, ctx.device).float()
    cosine = torch.einsum("be,kpe->bkp", torch.from_numpy(out["image_features"]), prompts)
    expected = (out["logit_scale"] * (cosine[..., 0] - cosine[..., 1])).sigmoid()
    np.testing.assert_allclose(out["probs"], expected, atol=1e-6)


def assert_same_gradients(a, b):
    """First moments and codebooks of two checkpoints are equal but for rounding."""
    moments = [[s["exp_avg"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    for x, y in zip(*moments, strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-7
    name = "visual_transformer.vq._codebook.embed"
    torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=1e-5)


@pytest.mark.slow  # test_train_retclip.py has the same of the same loop
def test_two_ranks_equal_one_and_resume(tiny_reports, tmp_path):
    """Global batch of 8: one process, two ranks, two ranks killed and continued; with and without gradient cache."""
    more = ["--max-steps", 4, "--eval-every", 4, "--save-every", 2, "--label-loss-weight", 0.5, "--dedup-positives"]
    more += ["--dropout-rate", 0, "--lr", "1e-8"]  # where it stands, the optimizer's first moment is a sum of gradients
    one, two, cut = tmp_path / "one", tmp_path / "two", tmp_path / "cut"
    assert call(*report_args(tiny_reports, one, "--batch-size", 8, *more)) == 0
    words = report_args(tiny_reports, two, "--grad-cache-chunk", 2, "--check-ranks", *more)
    run(*words, world=2)
    words = report_args(tiny_reports, cut, "--grad-cache-chunk", 2, "--check-ranks", *more)
    start_and_kill(words, 2, 2, cut)
    run(*words, "--resume", "auto", world=2)
    assert_same_run(two, cut, ctclip)
    assert_same_gradients(last_of(one), last_of(two))
    logs = [json.loads((folder / "results.jsonl").read_text().splitlines()[0]) for folder in (one, two)]
    assert logs[0]["train_loss"] == pytest.approx(logs[1]["train_loss"], abs=1e-5)


@pytest.mark.slow
def test_fsdp_equals_one_process(tiny_reports, tmp_path):
    """Split over two ranks: the same training, whole tensors in the file, which either continues."""
    more = ["--max-steps", 4, "--eval-every", 4, "--save-every", 2, "--grad-checkpointing", "--lr", "1e-8"]
    one, fsdp, cut = tmp_path / "one", tmp_path / "fsdp", tmp_path / "cut"
    assert call(*report_args(tiny_reports, one, "--batch-size", 8, *more)) == 0
    run(*report_args(tiny_reports, fsdp, "--fsdp", *more), world=2)
    assert_same_gradients(last_of(one), last_of(fsdp))
    shutil.copytree(fsdp, cut)
    (cut / "checkpoint_step_4.pt").unlink()
    run(*report_args(tiny_reports, cut, "--fsdp", *more, "--resume", "auto"), world=2)
    assert_same_run(fsdp, cut, ctclip)
    other = ["--resume", fsdp / "checkpoint_step_4.pt", "--max-steps", 6, "--batch-size", 8]
    assert call(*report_args(tiny_reports, fsdp, *more[2:], *other)) == 0  # one process goes on


# ---- the gradient of the global batch


def step_of(tiny_reports, tmp_path, micro_sizes, *more):
    """Loss, gradients and codebook of one step over the first 8 training pairs in micro-batches of the given sizes."""
    words = report_args(tiny_reports, tmp_path / "none", *more)[1:]
    args = ctclip.parse_args([str(w) for w in words])
    train_set, _ = ctclip.build_datasets(args)
    common.seed_everything(1)
    model = ctclip.build_model(args, lambda *x: None).train()
    ctclip.set_trainable(model, args, 0, lambda *x: None)
    ctx, scaler = common.Context(0, 1, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
    order, micro_batches = iter(range(8)), []
    for size in micro_sizes:
        micro_batches.append(train_set.collate([train_set[(0, next(order))] for _ in range(size)]))
    common.seed_everything(2)
    autocast = torch.autocast("cpu", enabled=False)
    logs = ctclip.forward_backward(model, micro_batches, ctclip.build_criterion(args, train_set), scaler, autocast, ctx)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logs, gradients, {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("sizes, chunk", [([8], 3), ([4, 4], 4), ([2, 2, 2, 2], 1)])
def test_gradient_cache_equals_the_plain_loss(tiny_reports, tmp_path, loss, sizes, chunk):
    more = ["--loss", loss, "--label-loss-weight", 0.5, "--dropout-rate", 0, "--dedup-positives"]
    plain = step_of(tiny_reports, tmp_path, [8], "--batch-size", 8, *more)
    cached = step_of(tiny_reports, tmp_path, sizes, "--grad-cache-chunk", chunk, *more)
    for name in plain[0]:
        assert float(cached[0][name]) == pytest.approx(float(plain[0][name]), rel=1e-6), name
    assert cached[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert (cached[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name
    for name, buffer in plain[2].items():  # the codebook moved once
        torch.testing.assert_close(cached[2][name], buffer, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_cache_replays_the_random_numbers(tiny_reports, tmp_path, monkeypatch):
    seen, encode = [], ctclip.encode

    def watched(net, batch):
        out = encode(net, batch)
        seen.append({k: v.detach().clone() for k, v in out.items()})
        return out

    monkeypatch.setattr(ctclip, "encode", watched)
    step_of(tiny_reports, tmp_path, [4, 4], "--grad-cache-chunk", 4, "--text-dropout", 0.5)
    first, second = seen[:2], seen[2:]
    assert len(second) == 2 and tensors_equal(first, second)  # with dropout 0.5, to the last bit
    assert not torch.equal(first[0]["text"], first[1]["text"])


# ---- mistakes


@pytest.mark.parametrize("words, message", [
    (["--train-data", "absent"], "absent"),
    (["--prompts", "{} is present."], "--prompts: pairs"),
    (["--label-columns", "fourth"], "so --monitor macro_auroc is undefined"),
    (["--label-columns", "fourth", "--monitor", "val_loss", "--label-loss-weight", "1"], "no labels for --label-loss"),
    (["--preset", "small"], "does not divide (24, 96, 96) by whole numbers (another --preset"),
    (["--convert", "x.pt"], "--convert: no --pretrained to convert"),
    (["--max-text-length", "9999"], "the text encoder reads 512 tokens"),
    (["--fsdp"], "start with torchrun"),
    (["--fsdp", "--use-ema"], "--fsdp goes neither with"),
    (["--vocab", "absent.txt"], "absent.txt: no vocabulary"),
    (["--pretrained", "absent.pt"], "absent.pt: no such weight file"),
    (["--max-logit-scale", "0"], "--max-logit-scale must be above 1"),
    (["--freeze-text", "--freeze-vision"], "leave nothing to train"),
    (["--label-columns", "first", "fourth"], "column 'fourth' is missing"),
    (["--text", "impression"], "has a report"),
    (["--grad-cache-chunk", "-1"], "must not be negative"),
])  # fmt: skip
def test_mistakes_get_one_line(tiny_reports, tmp_path, capsys, words, message):
    assert call(*report_args(tiny_reports, tmp_path / "out", *words)) == 2
    assert message in error_of(capsys)


def test_patients_in_both_splits_are_an_error(tiny_reports, tmp_path, capsys):
    folder = shutil.copytree(tiny_reports, tmp_path / "data")
    table = pd.read_csv(folder / "valid" / "volumes.csv")
    table.loc[0, "patient_id"] = "p3"
    table.to_csv(folder / "valid" / "volumes.csv", index=False)
    assert call(*report_args(folder, tmp_path / "out")) == 2
    assert "patient p3 is in the training data too" in error_of(capsys)


def test_unreadable_volumes(tiny_reports, tmp_path, capsys):
    """fail: one line; skip: listed, and a validation case is reported as missing."""
    folder = shutil.copytree(tiny_reports, tmp_path / "data")
    (folder / "train" / "case3.npy").write_bytes(b"no volume")
    (folder / "valid" / "case17.npy").write_bytes(b"no volume")
    assert call(*report_args(folder, tmp_path / "out")) == 2
    assert "case3.npy: damaged" in error_of(capsys)
    words = ["--on-bad-sample", "skip", "--max-bad-fraction", 0.5, "--max-steps", 4]
    assert call(*report_args(folder, tmp_path / "skip", *words)) == 0
    assert pd.read_csv(tmp_path / "skip" / "bad_samples.csv")["id"].tolist() == ["case3"]
    record = json.loads((tmp_path / "skip" / "results.jsonl").read_text().splitlines()[-1])
    assert (record["n"], record["n_missing"]) == (8, 1)
