"""User document 002 (RET-CLIP from two CSVs and a data set to retrieval numbers): what it promises, one by one.

Its default way is gone once: run_retclip.sh with the two CSVs, a folder of parquet as the data set, tiny encoders and
four epochs. Not tried: the hub itself, the hours it expects, and the recalls of the paper.
"""

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED
from test_run_retclip import QUICK, TINY, call_copy, clean, make_copy, photographs, stages_of, write_vocab

import common
import prepare_retclip
import retrieval
import train_retclip as retclip

if not SHARED.is_dir():
    pytest.skip(f"needs {SHARED} (the user documents)", allow_module_level=True)
pa = pytest.importorskip("pyarrow", reason="parquet is made with pyarrow (requirements-dev.txt)")
pq = pytest.importorskip("pyarrow.parquet")


def repaired(match) -> str:
    """The document was read as cp1254 and written as UTF-8: box characters and arrows come out of undoing that."""
    try:
        return match[0].encode("cp1254").decode()
    except UnicodeError:
        return match[0]


TEXT = next((SHARED / "seeds").glob("002*.txt")).read_text(encoding="utf-8")
TEXT = re.sub(r"[^\x00-\x7f]+", repaired, TEXT)
CSVS = re.findall(r"(retclip_prompts_\w+\.csv) \([\d,]+ samples\) +→ (TRAIN|TEST)", TEXT)
CELL = dict(re.findall(r"^([A-Z_]+) = (.+?)\s+#", TEXT, re.MULTILINE))  # of Cell 3
N = {"train": 20, "test": 8}


def said(*sentences: str) -> None:
    """These are promises of the document, and not only of this test."""
    for sentence in sentences:
        assert sentence in TEXT, sentence


def tree() -> list[str]:
    """Files and folders under /content/, from the drawing."""
    stack, found = [], []
    for line in re.search(r"^/content/\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1].splitlines():
        mark, name = re.match(r"([│├└─ ]+)(\S+)", line).groups()
        stack[len(mark) // 4 - 1 :] = [name.rstrip("/")]
        found.append("/".join(stack))
    return [name for name in found if "..." not in name]


def write_data(folder) -> None:
    """The two CSVs, in no order and with null prompts, and parquet files of pictures that their indices count."""
    (folder / "fundus" / "data").mkdir(parents=True)
    for (name, split), eyes in zip(CSVS, (photographs(26), photographs(36)[26:]), strict=True):
        split, rows, images = split.lower(), [], []
        for i, (picture, kind) in enumerate(eyes):
            picture.save(folder / "eye.png")
            images.append({"bytes": (folder / "eye.png").read_bytes(), "path": f"{i}.png"})
            rows.append([i, kind, f"case {i}. left eye: {kind}. right eye: {kind}."])
        pq.write_table(pa.table({"image": images, "label": [0] * len(eyes)}),
                       folder / f"fundus/data/{split}-00000-of-00001.parquet", row_group_size=8)  # fmt: skip
        rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))][: N[split] + 2]
        rows[3][2] = rows[5][2] = None
        pd.DataFrame(rows, columns=["dataset_index", "label", "prompt"]).to_csv(folder / name, index=False)
    write_vocab(folder / "vocab.txt")


@pytest.fixture(scope="session")
def content(tmp_path_factory):
    """(folder, output) of the document's way."""
    folder = tmp_path_factory.mktemp("document_002")
    write_data(folder)
    settings = {"TRAIN_CSV": CSVS[0][0], "TEST_CSV": CSVS[1][0], "DATASET": "fundus", "OUT": "content"}
    settings |= TINY | {"MAX_EPOCHS": "4", "USE_FLASH_ATTN": CELL["USE_FLASH_ATTN"], "OMP_NUM_THREADS": "1"}
    settings["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in clean(os.environ).items() if not k.startswith("WANDB")} | settings
    words = [ROOT / "run_retclip.sh", *QUICK]
    result = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "content", result.stdout + result.stderr


def records(folder) -> list[dict]:
    """What was measured after each epoch."""
    return [json.loads(line) for line in (folder / "logs/retclip_training/results.jsonl").read_text().splitlines()]


# ---- its files


def test_the_tree(content):
    folder, _ = content
    names = tree()
    assert len(names) == 24 and "logs/retclip_training/checkpoints/epoch4.pt" in names
    for name in names:
        assert list(folder.glob(name)), name
    kept = {p.name for p in (folder / "logs/retclip_training/checkpoints").glob("epoch[0-9]*.pt")}
    assert kept == {"epoch2.pt", "epoch4.pt"}
    said("(auto-saves every 2 epochs)", "(epoch2.pt, epoch4.pt, ..., epoch10.pt)")
    assert parsed().save_epoch_frequency == 2


def test_its_scripts_have_ours():
    said("`scripts/prepare_retclip_data_streaming.py`", "`colab_retclip_training.py`")
    table = (SHARED / "README.md").read_text()
    for theirs, ours in (
        ("prepare_retclip_data_streaming", "prepare_retclip.py"),
        ("colab_retclip_training", "run_retclip.sh"),
    ):
        assert re.search(rf"{theirs}.py` -> `{ours}`", table) and (ROOT / ours).is_file()


# ---- Cell 3 and the defaults


def parsed(*words):
    return retclip.parse_args(["--train-data", "x", "--val-data", "x", "--vocab", "x", *words])


def test_cell_3(tmp_path, shell_env, monkeypatch):
    """Its values are the defaults of script and trainer; its names are settings of the script."""
    assert CELL == {"VISION_MODEL": '"ViT-B-16"', "BATCH_SIZE": "64", "MAX_EPOCHS": "10", "USE_FLASH_ATTN": "True"}
    monkeypatch.chdir(make_copy(tmp_path))
    cell = {name: value.strip('"') for name, value in CELL.items()}
    for settings in ({}, cell):
        train = stages_of(call_copy(tmp_path, shell_env, "pairs.csv", **settings))["train_retclip"]
        for args in (train, parsed()):
            assert (args.vision_model, args.batch_size, args.epochs) == ("ViT-B-16", 64, 10)
        assert train.use_flash_attention == bool(settings)  # without it the fast kernels are taken where there are any
    said('or "ViT-L-14" for better performance', "Reduce to 32 if OOM", "Reduce `BATCH_SIZE` to 32 or 16")
    other = {"VISION_MODEL": "ViT-L-14", "BATCH_SIZE": "16", "MAX_EPOCHS": "100", "USE_FLASH_ATTN": "False"}
    train = stages_of(call_copy(tmp_path, shell_env, "pairs.csv", **cell | other))["train_retclip"]
    found = (train.vision_model, train.batch_size, train.epochs, train.use_flash_attention)
    assert found == ("ViT-L-14", 16, 100, False)


def test_the_architecture():
    said(
        "**Vision Encoder**: ViT-B-16",
        "**Text Encoder**: Chinese RoBERTa",
        "Dual fundus images + clinical text prompts",
    )
    args = parsed()
    assert args.text_model == "RoBERTa-wwm-ext-base-chinese" and args.text_model in retclip.TEXT
    embed, size, layers, width, patch, *_ = retclip.VISION[args.vision_model]
    assert (size, layers, width, patch) == (224, 12, 768, 16) and retclip.LEVELS == ("patient", "left", "right")


def test_out_of_memory_says_what_to_do(capsys):
    def run_out():
        args = argparse.Namespace(batch_size=8, accum_steps=1, grad_checkpointing=False)  # noqa: F841
        raise torch.OutOfMemoryError("CUDA out of memory")

    said("### Problem: Out of memory during training")
    assert common.run_main(run_out) == 1 and "--batch-size 4 --accum-steps 2" in capsys.readouterr().err


# ---- data


def test_both_tables_are_converted(content):
    """In any order of the rows, without those that have no prompt; in TSV, JSONL and LMDB alike."""
    folder, output = content
    assert [kind for _, kind in CSVS] == ["TRAIN", "TEST"]
    said("Convert BOTH train + test from CSV → TSV/JSONL", "Build LMDB for BOTH train + test")
    for (name, _), (split, n) in zip(CSVS, N.items(), strict=True):
        table = pd.read_csv(folder.parent / name)
        assert not table["dataset_index"].is_monotonic_increasing and table["prompt"].isna().sum() == 2
        prompts = dict(table.dropna(subset="prompt")[["dataset_index", "prompt"]].values.tolist())
        pairs = retclip.lmdb_pairs(folder / "lmdb" / split)
        assert {image: text for image, _, text in pairs} == prompts and len(prompts) == n
        assert pairs == retclip.jsonl_pairs(folder / f"data/{split}_texts.jsonl")
        left_out = pd.read_csv(folder / f"data/{split}_left_out.csv")
        assert left_out["reason"].tolist() == ["no text"] * 2
        assert f"{split}: {n} images, {n} texts, {n} pairs -> content/lmdb/{split}" in output
        labels = pd.read_csv(folder / "lmdb" / split / "labels.csv")
        assert dict(labels[["image_id", "label"]].values) == dict(table.dropna()[["dataset_index", "label"]].values)


def test_a_picture_stands_for_both_eyes(content):
    """The picture of an index is that row of the data set's split of the same name."""
    folder, output = content
    said("Currently uses same image for both eyes")
    assert "train: 20 rows have one picture, it is shown to both eyes" in output
    for split, n in N.items():
        rows = pq.read_table(folder.parent / f"fundus/data/{split}-00000-of-00001.parquet").column("image").to_pylist()
        images = retclip.LMDBImages(folder / "lmdb" / split)
        for name in images.names():
            assert images.get(name) == [rows[int(name)]["bytes"]] * 2
        assert len(images.names()) == n


def prepare(folder, out, *more) -> int:
    words = ["--train-csv", folder / CSVS[0][0], "--test-csv", folder / CSVS[1][0], "--dataset", folder / "fundus"]
    words += ["--out", out / "data", "--lmdb", out / "lmdb", *more]
    return common.run_main(lambda: prepare_retclip.main(list(map(str, words))))


def test_an_interrupted_preparation_goes_on(content, tmp_path, capsys):
    """Stopped in the pictures of the second table: the same bytes; what is finished is left alone."""
    folder, output = content
    said("Rerun Cell 6 with `--resume` flag (automatically handled)", "LMDB building (won't rebuild if exists)")
    assert re.search(r"^\+ .*prepare_retclip.py .* --resume", output, re.MULTILINE)
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copytree(folder / "lmdb", tmp_path / "lmdb")
    shutil.rmtree(tmp_path / "lmdb/test")
    for name in ("test_texts.jsonl", "test_labels.csv", "test_left_out.csv"):
        (tmp_path / "data" / name).unlink()
    state = json.loads((tmp_path / "data/test_source.json").read_text())
    (tmp_path / "data/test_source.json").write_text(json.dumps({"source": state["source"]}))  # as it is before the end
    tsv = tmp_path / "data/test_imgs.tsv"
    tsv.write_bytes(tsv.read_bytes()[:-3000])
    before = (tmp_path / "lmdb/train/imgs/data.mdb").stat().st_mtime_ns
    assert prepare(folder.parent, tmp_path, "--resume") == 0
    assert f"train: {tmp_path}/lmdb/train is there already" in capsys.readouterr().out
    assert (tmp_path / "lmdb/train/imgs/data.mdb").stat().st_mtime_ns == before
    for path in (folder / "data").glob("*s.*"):
        assert path.read_bytes() == (tmp_path / "data" / path.name).read_bytes(), path.name
    assert retclip.lmdb_pairs(tmp_path / "lmdb/test") == retclip.lmdb_pairs(folder / "lmdb/test")
    assert prepare(folder.parent, tmp_path) == 2 and "--resume continues" in capsys.readouterr().err


def test_unequal_numbers_of_images_and_texts(content, tmp_path, capsys):
    said("### Problem: Different number of images and texts", "`dataset_index` column matches HuggingFace indices")
    for path in (content[0].parent / "retclip_prompts_test.csv", content[0].parent / "fundus"):
        (tmp_path / path.name).symlink_to(path)
    table = pd.read_csv(content[0].parent / CSVS[0][0])
    table.loc[0, "dataset_index"] = 100
    table.to_csv(tmp_path / CSVS[0][0], index=False)
    assert prepare(tmp_path, tmp_path / "out") == 2
    message = "unequal numbers of images and texts: row 2 (id 100): there is no such row in the data set"
    assert message in capsys.readouterr().err and not list((tmp_path / "out").rglob("*.tsv"))


def test_the_hub_is_streamed_with_the_token(content, tmp_path, monkeypatch, capsys):
    """A stand-in for `datasets` that refuses: what it is asked for, and the delay that can be set."""
    said("Streaming mode + HF_TOKEN", "**Automatic delays**: Configurable sleep between requests")
    asked = []

    def load_dataset(name, **how):
        asked.append((name, how))
        raise FileNotFoundError("no hub here")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "fsspec", types.SimpleNamespace())
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    words = ["--dataset", "Peacein/color-fundus-eye", "--delay", "0.5"]
    assert prepare(content[0].parent, tmp_path, *words) == 2 and "no hub here" in capsys.readouterr().err
    assert asked == [("Peacein/color-fundus-eye", {"split": "train", "streaming": True, "token": "hf_x"})]
    assert "time.sleep(args.delay)" in inspect.getsource(prepare_retclip.hub_pictures)


# ---- training


def test_the_test_set_validates_every_epoch(content):
    """With a warning, and therefore the last epoch is scored, which it has not chosen."""
    folder, output = content
    said("Training uses test set for validation every epoch", "Validation loss computed every epoch")
    said("Basic retrieval accuracy in logs")
    params = next((folder / "logs/retclip_training").glob("params_*.txt")).read_text().splitlines()
    assert "train_data: content/lmdb/train" in params and "valid_data: content/lmdb/test" in params
    assert [r["epoch"] for r in records(folder)] == [1, 2, 3, 4]
    assert all(
        r["val_loss"] > 0 and 0 <= r["patient_i2t_batch_recall_at_1"] <= 1 and r["n"] == 8 for r in records(folder)
    )
    log = next((folder / "logs/retclip_training").glob("out_*.log")).read_text()
    assert len(re.findall(r"Epoch \d - train_loss: .* - val_loss: \d.* - mean_recall: \d", log)) == 4
    assert "warning: the validation data (content/lmdb/test) look like a test set" in output
    results = json.loads((folder / "evaluation/evaluation_results.json").read_text())
    assert results["evaluated"].startswith("epoch_latest.pt") and results["evaluated_on"] == "lmdb/test"


def test_training_goes_on_from_any_of_its_files(content):
    said("**Checkpoint support** at every stage")
    for name, step in (("epoch2", 10), ("epoch_latest", 20)):
        saved = common.load_checkpoint(content[0] / f"logs/retclip_training/checkpoints/{name}.pt")
        assert saved["state"]["step"] == step and saved["optimizer"]["state"]


def test_it_is_trained_by_contrast(content):
    """Of the training pairs the matching ones are more alike than others, after four epochs."""
    folder, _ = content
    said("Matching image-text pairs have high similarity", "Non-matching pairs have low similarity")
    saved = common.load_checkpoint(folder / "logs/retclip_training/checkpoints/epoch_latest.pt")
    data = folder.parent / "content/lmdb/train"
    args = retclip.args_from_checkpoint(saved, valid_data=data)
    model = retclip.build_eval_model(saved, args, torch.device("cpu"))
    with common.process_group("cpu") as ctx:
        out = retclip.predict(model, retclip.FundusPairs(data, args, False), ctx)
    like = out["image_features"]["patient"] @ out["text_features"]["patient"].T
    right = np.zeros(like.shape, bool)
    right[tuple(out["pairs"].T)] = True
    assert like[right].mean() > like[~right].mean()


# ---- evaluation


def test_the_numbers(content):
    """Recall@1, 5, 10 both ways, of all and of each class, with chance and intervals over patients."""
    folder, output = content
    said("Compute Recall@1, Recall@5, Recall@10", "Per-class performance analysis")
    said("Image→Text R@1", "Text→Image R@1")
    found = json.loads((folder / "evaluation/evaluation_results.json").read_text())["retrieval"]
    for way in ("image_to_text", "text_to_image"):
        row = found[way]["patient"]
        for k in (1, 5):  # 10 is more than the 8 of this test
            assert row[f"recall@{k}_low"] <= row[f"recall@{k}"] <= row[f"recall@{k}_high"]
            assert 0 < row[f"recall@{k}_chance"] < 1
        assert set(row["per_class"]) == {"first", "second"}
        assert all(some["recall@1"] is not None and some["class_map"] > 0 for some in row["per_class"].values())
    assert retrieval.PAIR_KS == (1, 5, 10)
    assert output.count("same report, R@1") == 2 and "Open content/evaluation/report.html" in output


def test_features_are_there_for_other_tasks(content):
    said("Extract image & text features", "**Feature extraction**: Use embeddings for downstream tasks")
    images, texts = (torch.load(content[0] / f"evaluation/test_{kind}_features.pt", weights_only=True)
                     for kind in ("imgs", "texts"))  # fmt: skip
    table = pd.read_csv(content[0].parent / CSVS[1][0]).dropna(subset="prompt")
    assert set(images["ids"]) == set(map(str, table["dataset_index"])) and set(texts["texts"]) == set(table["prompt"])
    for kind, n in ((images, 8), (texts, 8)):
        assert kind["features"]["patient"].shape == (n, 256)
        assert torch.allclose(kind["features"]["patient"].norm(dim=1), torch.ones(n), atol=1e-5)


def test_zero_shot_classes_and_pictures_of_what_was_found(content):
    said("**Zero-shot classification**", "Visualizations of retrievals", "**Image retrieval**: Find images by text")
    results = json.loads((content[0] / "evaluation/evaluation_results.json").read_text())
    assert set(results["per_label"]) == {"first", "second"} and results["overall"]["accuracy_n"] == 8
    page = (content[0] / "evaluation/report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 20 and "case" in page
