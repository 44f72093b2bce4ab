"""prepare_retclip.py: what the original code reads back, kill -9 at every moment, bad rows and pictures, data sets."""

import base64
import io
import json
import os
import pickle
import pickletools
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run
from PIL import Image

import common
import demo_data
import prepare_retclip

OPCODES = {"PROTO", "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "BINUNICODE", "BININT1", "BININT2", "BININT"}
OPCODES |= {"TUPLE2", "TUPLE3", "STOP"}


def prepare(*words) -> int:
    return prepare_retclip.main([str(w) for w in words])


def mistake(capsys, *words) -> str:
    """The error line of a command that must fail with exit code 2, and say nothing else on stderr."""
    capsys.readouterr()
    code = common.run_main(lambda: prepare(*words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and [line.startswith("error: ") for line in lines] == [True], lines
    return lines[0]


def jpeg(seed: int, size: int = 24) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize((size, size)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def pair_rows(folder: Path, n: int = 10) -> list[dict]:
    """Rows of a pairs.csv and their pictures."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        for k, eye in enumerate(("left", "right")):
            (folder / "images" / f"{i}_{eye}.jpg").write_bytes(jpeg(2 * i + k))
        row = {"patient_id": f"P{i}", "split": "val" if i % 5 == 4 else "train"}
        row |= {"left_image": f"images/{i}_left.jpg", "left_diagnosis": "glaucoma" if i % 2 else "normal fundus"}
        row |= {"right_image": f"images/{i}_right.jpg", "right_diagnosis": "normal fundus"}
        rows.append(row | {"text": f"Report {i}: “normal”,\u2028 视网膜, {'long ' * 80 * (i == 3)}"})
    return rows


@pytest.fixture
def pairs(tmp_path):
    """A folder with pairs.csv: 8 patients of train, 2 of val."""
    write_rows(tmp_path / "pairs.csv", pair_rows(tmp_path))
    return tmp_path


def command(folder, *more, out="data", to="lmdb"):
    words = ["--csv", folder / "pairs.csv", "--split-column", "split", "--out", folder / out]
    return [*words, *(["--lmdb", folder / to] if to else []), *more]


@pytest.fixture
def prompts(tmp_path):
    """prompts.csv as users have it: in no order, an index twice, null prompts, a duplicate; and pictures by index."""
    (tmp_path / "by_index").mkdir()
    for i in range(12):
        (tmp_path / "by_index" / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [
        [7, "a", "seven"],
        [2, "b", "two"],
        [11, "a", ""],
        [2, "b", "two again"],
        [0, "b", "zero"],
        [7, "a", "seven"],
    ]
    rows += [[9, "a", "nan"], [4, "b", "two"], [11, "a", "eleven"]]
    pd.DataFrame(rows, columns=["dataset_index", "label", "prompt"]).to_csv(tmp_path / "prompts.csv", index=False)
    return tmp_path


def read_lmdb(folder: Path) -> dict[str, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False, create=False) as env, env.begin() as txn:
        return {bytes(k).decode(): bytes(v) for k, v in txn.cursor()}


def read_original(folder: Path) -> list[tuple]:
    """(id, text_id, text, left, right) of each pair, by the reading rules of RET-CLIP's dataset class."""
    envs = [lmdb.open(str(folder / p), readonly=True, create=False, lock=False, readahead=False, meminit=False)
            for p in ("pairs", "imgs")]  # fmt: skip
    pairs, imgs = (env.begin(buffers=True) for env in envs)
    n = int(pairs.get(key=b"num_samples").tobytes().decode("utf-8"))
    assert int(imgs.get(key=b"num_images").tobytes().decode("utf-8")) == envs[1].stat()["entries"] - 1
    rows = []
    for index in range(n):
        patient_id, text_id, text = pickle.loads(pairs.get(f"{index}".encode()).tobytes())
        left, right = pickle.loads(imgs.get(f"{patient_id}".encode()).tobytes())
        assert type(left) is str and type(right) is str
        images = [base64.urlsafe_b64decode(side) for side in (left, right)]
        [Image.open(io.BytesIO(i)).convert("RGB") for i in images if i]
        rows.append((patient_id, text_id, text, *images))
    return rows


def read_jsonl(path: Path) -> list[dict]:
    def refuse(word):
        raise ValueError(word)  # NaN is no JSON

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def content(folder: Path, out="data", to="lmdb") -> dict:
    """All that a preparation wrote: bytes of the files, items of the LMDB."""
    files = {p.name: p.read_bytes() for p in (folder / out).iterdir() if p.suffix != ".json" and p.name != ".lock"}
    for split in (folder / to).glob("[a-z]*"):
        files |= {f"{split.name}/{part}": read_lmdb(split / part) for part in ("imgs", "pairs")}
        files[f"{split.name}/labels"] = (split / "labels.csv").read_bytes()
    return files


# ---- formats


def test_the_original_reads_it_back(pairs):
    assert prepare(*command(pairs)) == 0
    table = pd.read_csv(pairs / "pairs.csv", keep_default_na=False)
    for split in ("train", "val"):
        part = table[table["split"] == split]
        rows = read_original(pairs / "lmdb" / split)
        assert [r[:3] for r in rows] == [(r.patient_id, r.Index, r.text.strip()) for r in part.itertuples()]
        for row, want in zip(rows, part.itertuples(), strict=True):  # the bytes of the files
            assert row[3:] == ((pairs / want.left_image).read_bytes(), (pairs / want.right_image).read_bytes())
        lines = read_jsonl(pairs / "data" / f"{split}_texts.jsonl")
        assert [list(x) for x in lines] == [["text_id", "text", "image_ids"]] * len(part)
        assert [(x["image_ids"], x["text_id"], x["text"]) for x in lines] == [([r[0]], r[1], r[2]) for r in rows]
        tsv = [line.split("\t") for line in (pairs / "data" / f"{split}_imgs.tsv").read_text().splitlines()]
        assert [x[0] for x in tsv] == part["patient_id"].tolist() and {len(x) for x in tsv} == {3}
        assert base64.urlsafe_b64decode(tsv[0][2]) == (pairs / part.iloc[0]["right_image"]).read_bytes()
        labels = pd.read_csv(pairs / "lmdb" / split / "labels.csv")
        assert list(labels) == ["image_id", "patient_id", "label", "left_label", "right_label"]
        assert labels["image_id"].tolist() == part["patient_id"].tolist()
        assert (pairs / "data" / f"{split}_labels.csv").read_bytes() == (
            pairs / "lmdb" / split / "labels.csv"
        ).read_bytes()
    assert labels["label"].tolist() == ["normal fundus", "glaucoma / normal fundus"]
    assert (pairs / "data" / "train_texts.jsonl").read_text().count("视网膜") == 8  # not \\u....
    keys = list(read_lmdb(pairs / "lmdb" / "train" / "pairs"))
    assert keys == [*map(str, range(8)), "num_samples"]


def test_pickles_hold_plain_values_only(pairs):
    assert prepare(*command(pairs, "--missing-eye", "same")) == 0
    write_rows(pairs / "pairs.csv", [{"id": 70000, "image": "images/0_left.jpg", "text": "x" * 300}])
    assert prepare("--csv", pairs / "pairs.csv", "--out", pairs / "d", "--lmdb", pairs / "l") == 0
    for split in (pairs / "lmdb" / "train", pairs / "l" / "train"):
        values = [*read_lmdb(split / "pairs").items(), *read_lmdb(split / "imgs").items()]
        names = {op.name for k, v in values if not k.startswith("num_") for op, _, _ in pickletools.genops(v)}
        assert names <= OPCODES and "BINGET" not in names  # also where both eyes are the same picture


def test_golden_tsv_gives_the_golden_lmdb(shared, tmp_path):
    """Our builder on the TSV and JSONL of the golden folder: the values of the original builder, byte for byte."""
    golden = shared / "golden" / "retclip_lmdb"
    for name, split in (("retclip", "train"), ("chinese_clip", "train"), ("many", "test")):
        tsv, jsonl = (golden / name / f"{split}_{end}" for end in ("imgs.tsv", "texts.jsonl"))
        args = types.SimpleNamespace(stop=False)
        for part, items in (("imgs", prepare_retclip.image_items(tsv)), ("pairs", prepare_retclip.pair_items(jsonl))):
            count = {"imgs": b"num_images", "pairs": b"num_samples"}[part]
            prepare_retclip.write_lmdb(tmp_path / name / part, items, count, 2**26, args)
            assert read_lmdb(tmp_path / name / part) == read_lmdb(golden / name / "lmdb" / split / part), (name, part)


def test_real_pairs_by_the_readme_command(shared, tmp_path):
    data = shared / "data" / "fundus"
    words = ["--csv", data / "pairs.csv", "--image-dir", data, "--split-column", "split"]
    result = run("prepare_retclip.py", *words, "--out", tmp_path / "data", "--lmdb", tmp_path / "lmdb")
    assert f"next: python train_retclip.py --train-data {tmp_path / 'lmdb' / 'train'} --val-data" in result.stdout
    table = pd.read_csv(data / "pairs.csv")
    rows = read_original(tmp_path / "lmdb" / "train") + read_original(tmp_path / "lmdb" / "val")
    assert len(rows) == len(table) == 113
    assert {r[0]: r[3] for r in rows} == {r.patient_id: (data / r.left_image).read_bytes() for r in table.itertuples()}


def test_demo_prepares_both_ways(tmp_path):
    demo = ["fundus", "--out", str(tmp_path), "--n", "20", "--size", "32", "--num-workers", "1"]
    assert demo_data.main(demo) == 0
    assert prepare(*command(tmp_path)) == 0
    assert len(read_original(tmp_path / "lmdb" / "train")) == 14 and len(read_original(tmp_path / "lmdb" / "val")) == 3
    words = ["--train-csv", tmp_path / "prompts_train.csv", "--test-csv", tmp_path / "prompts_test.csv"]
    words += ["--image-dir", tmp_path / "by_index", "--out", tmp_path / "d", "--lmdb", tmp_path / "l"]
    assert prepare(*words) == 0
    ids = [r[0] for r in read_original(tmp_path / "l" / "test")]
    assert ids == pd.read_csv(tmp_path / "prompts_test.csv")["dataset_index"].tolist() and ids != sorted(ids)


# ---- interrupted runs


KILLABLE = [(prepare_retclip, "encode"), (common, "write_atomic"), (os, "replace"), (pickle, "dumps")]
KILLABLE += [(os, "fsync"), (prepare_retclip.shutil, "copyfile")]


def in_a_child(words, after: int | None = None, where=KILLABLE) -> int:
    """Run in a forked child that kills itself (-9) at the call number `after` of `where`; its wait status."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        calls = [0]

        def counted(function):
            def call(*a, **k):
                calls[0] += 1
                if calls[0] == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*a, **k)

            return call

        for module, name in where:
            setattr(module, name, counted(getattr(module, name)))
        prepare_retclip.SYNC_EVERY = 3000  # commits and fsyncs within a few pictures
        code = 1
        try:
            code = common.run_main(lambda: prepare(*words))
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed(pairs, step):
    """kill -9 at every call that writes, seals or moves: --resume ends with the same bytes, items and nothing else."""
    write_rows(pairs / "pairs.csv", pair_rows(pairs, 5))
    assert prepare(*command(pairs)) == 0
    want, killed = content(pairs), 0
    for after in range(1, 1000, step):
        folder = pairs / "again"
        folder.mkdir()
        words = command(pairs, "--resume")
        words[words.index("--out") + 1], words[words.index("--lmdb") + 1] = folder / "data", folder / "lmdb"
        status = in_a_child(words, after)
        if status == 0:
            break
        assert status == signal.SIGKILL
        killed += 1
        for split in (folder / "lmdb").glob("[a-z]*"):  # what has its name is whole
            assert len(read_original(split)) == {"train": 4, "val": 1}[split.name]
        if after % 4 == 0:  # killed again while resuming
            in_a_child(words, 1 + after // 3)
        assert prepare(*words) == 0
        assert content(folder) == want
        assert not [p for p in folder.rglob("*") if ".tmp" in p.name]
        prepare_retclip.shutil.rmtree(folder)
    assert killed * step > 50, killed


@pytest.mark.parametrize("phase", ["tsv", "lmdb"])
def test_a_real_process_killed(tmp_path, phase):
    rows = pair_rows(tmp_path, 4)
    many = [row | {"patient_id": f"Q{i}", "split": "train", "text": f"{i}"} for i, row in enumerate(rows * 400)]
    write_rows(tmp_path / "pairs.csv", many)
    process = subprocess.Popen(
        [sys.executable, "prepare_retclip.py", *map(str, command(tmp_path))], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    tsv, building = tmp_path / "data" / "train_imgs.tsv", tmp_path / "lmdb" / ".train.tmp"
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if building.exists() if phase == "lmdb" else tsv.exists() and tsv.stat().st_size > 200_000:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "lmdb" / "train").exists()
    assert prepare(*command(tmp_path, "--resume")) == 0
    assert prepare(*command(tmp_path, out="data2", to="lmdb2")) == 0
    assert content(tmp_path) == content(tmp_path, "data2", "lmdb2")


def test_a_signal_ends_it_with_143(pairs, monkeypatch, capsys):
    encode, calls = prepare_retclip.encode, []

    def stop(picture, side):
        calls.append(picture)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(picture, side)

    monkeypatch.setattr(prepare_retclip, "encode", stop)
    assert prepare(*command(pairs)) == 143
    assert "--resume" in capsys.readouterr().err and len(calls) < 8
    assert prepare(*command(pairs, "--resume")) == 0
    assert len(calls) == 20  # what was in the TSV is not read again
    assert len(read_original(pairs / "lmdb" / "train")) == 8


def test_damaged_lines_of_a_tsv_are_made_again(pairs):
    assert prepare(*command(pairs, to=None)) == 0
    want = content(pairs)
    path = pairs / "data" / "train_imgs.tsv"
    for damage in (path.read_bytes()[:-3], path.read_bytes() + b"\0" * 4096, b""):
        path.write_bytes(damage)
        assert prepare(*command(pairs, "--resume", to=None)) == 0
        assert content(pairs) == want


def test_finished_is_left_alone_and_force_starts_over(pairs, capsys):
    assert prepare(*command(pairs)) == 0
    before = {p: p.stat().st_mtime_ns for p in pairs.rglob("*") if p.is_file() and p.name != ".lock"}
    assert "exists" not in mistake(capsys, *command(pairs)) and "--force" in mistake(capsys, *command(pairs))
    assert prepare(*command(pairs, "--resume")) == 0
    assert f"{pairs / 'lmdb' / 'train'} is there already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}

    rows = pair_rows(pairs, 5)
    write_rows(pairs / "pairs.csv", rows[:3] + rows[4:])
    assert "the rows of the CSV" in mistake(capsys, *command(pairs, "--resume"))
    assert prepare(*command(pairs, "--force")) == 0
    assert [r[0] for r in read_original(pairs / "lmdb" / "train")] == ["P0", "P1", "P2"]
    assert list(read_lmdb(pairs / "lmdb" / "train" / "imgs")) == ["P0", "P1", "P2", "num_images"]  # no stale keys
    assert not list((pairs / "lmdb").glob(".*.old"))
    (pairs / "images" / "0_left.jpg").write_bytes(jpeg(99, 32))
    assert "the pictures" in mistake(capsys, *command(pairs, "--resume"))
    assert "--max-side" in mistake(capsys, *command(pairs, "--resume", "--max-side", 16))


def test_lmdb_without_its_tsv_and_lmdb_of_others(pairs, capsys):
    assert prepare(*command(pairs)) == 0
    prepare_retclip.shutil.rmtree(pairs / "data")
    assert "already" in mistake(capsys, *command(pairs))
    assert "--force" in mistake(capsys, *command(pairs, "--resume"))  # an LMDB, but no run to continue
    (pairs / "lmdb" / "val" / "notes.txt").write_text("mine")
    assert "notes.txt" in mistake(capsys, *command(pairs, "--force"))
    assert (pairs / "lmdb" / "val" / "notes.txt").exists()
    (pairs / "lmdb" / "val" / "notes.txt").unlink()
    (pairs / "lmdb" / "train" / "source.json").unlink()
    assert prepare(*command(pairs, to=None)) == 0
    assert "--force" in mistake(capsys, *command(pairs, "--resume"))  # not ours any more
    assert prepare(*command(pairs, "--force")) == 0


def test_a_tsv_of_others_is_not_touched(pairs, capsys):
    (pairs / "data").mkdir()
    (pairs / "data" / "train_imgs.tsv").write_text("mine")
    for flag in ([], ["--resume"]):
        assert "train_imgs.tsv" in mistake(capsys, *command(pairs, *flag))
    assert (pairs / "data" / "train_imgs.tsv").read_text() == "mine"


def test_two_at_once_are_refused(pairs, capsys):
    (pairs / "data").mkdir()
    (pairs / "lmdb").mkdir()
    for folder in ("data", "lmdb"):
        with common.lock_folder(pairs / folder):
            assert "another run" in mistake(capsys, *command(pairs))
    assert prepare(*command(pairs)) == 0
    assert prepare(*command(pairs, out="both", to="both")) == 0  # one folder for both


def test_a_full_disk(pairs):
    """Files may not grow beyond 20 kB: one line, and the next run continues."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # TSV
    try:
        status = in_a_child(command(pairs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.waitstatus_to_exitcode(status) == 2
    assert not (pairs / "lmdb" / "train").exists() and (pairs / "data" / "train_imgs.tsv").stat().st_size == 12_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))  # LMDB, which takes whole pages
    try:
        status = in_a_child(command(pairs, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.waitstatus_to_exitcode(status) == 2 and not list((pairs / "lmdb").glob("*train*"))
    assert prepare(*command(pairs, "--resume")) == 0


# ---- rows


def index_words(folder, *more):
    words = ["--train-csv", folder / "prompts.csv", "--image-dir", folder / "by_index", "--out", folder / "data"]
    return [*words, "--lmdb", folder / "lmdb", *more]


def test_prompts_by_index(prompts, capsys):
    assert prepare(*index_words(prompts)) == 0
    rows = read_original(prompts / "lmdb" / "train")
    assert [r[:3] for r in rows] == [(7, 0, "seven"), (2, 1, "two"), (2, 3, "two again"), (0, 4, "zero"),
                                     (4, 7, "two"), (11, 8, "eleven")]  # fmt: skip
    assert all(left == right == jpeg(i) for i, _, _, left, right in rows)
    left_out = pd.read_csv(prompts / "data" / "train_left_out.csv", keep_default_na=False)
    assert left_out["row"].tolist() == [4, 7, 8] and left_out["id"].tolist() == [11, 7, 9]
    assert left_out["reason"].tolist() == ["no text", "same id and text as row 2", "no text"]
    out = capsys.readouterr().out
    assert "row 7 (id 7): same id and text as row 2" in out and "5 images, 6 texts, 6 pairs" in out
    assert "rows have one picture, it is shown to both eyes" in out
    labels = pd.read_csv(prompts / "lmdb" / "train" / "labels.csv")
    assert labels.values.tolist() == [[7, "a"], [2, "b"], [0, "b"], [4, "b"], [11, "a"]]


def test_many_left_out_rows_are_listed_in_full_in_the_file(prompts, capsys):
    rows = [{"dataset_index": 0, "prompt": "x"}] + [{"dataset_index": i % 12, "prompt": " "} for i in range(30)]
    write_rows(prompts / "prompts.csv", rows)
    assert prepare(*index_words(prompts)) == 0
    assert capsys.readouterr().out.count(": no text") == 10
    assert len(pd.read_csv(prompts / "data" / "train_left_out.csv")) == 30


def test_other_labels_of_the_same_id_are_told(prompts, capsys):
    rows = [{"dataset_index": 1, "label": "a", "prompt": "x"}, {"dataset_index": 1, "label": "b", "prompt": "y"}]
    write_rows(prompts / "prompts.csv", rows)
    assert prepare(*index_words(prompts)) == 0
    assert "rows 2 and 3" in capsys.readouterr().err
    assert (prompts / "data" / "train_labels.csv").read_text() == "image_id,label\n1,a\n"


def test_names_in_the_folder(prompts, capsys):
    for old, new in (("7.jpg", "00007.JPG"), ("2.jpg", "2.jpeg"), ("0.jpg", "notes.txt")):
        os.rename(prompts / "by_index" / old, prompts / "by_index" / new)
    error = mistake(capsys, *index_words(prompts))
    assert "row 6 (id 0): " in error and "0.jpg: no such file (1 rows in all" in error
    assert not (prompts / "data").exists()  # before anything is written
    (prompts / "by_index" / "0.png").write_bytes(jpeg(0))  # the content counts
    assert prepare(*index_words(prompts)) == 0
    assert [r[3] for r in read_original(prompts / "lmdb" / "train")][:2] == [jpeg(7), jpeg(2)]
    (prompts / "by_index" / "7.png").write_bytes(jpeg(7))
    assert "00007.JPG and 7.png" in mistake(capsys, *index_words(prompts, "--force"))


BAD = {
    "missing": (None, "no such file"),
    "text": (b"not a picture", "no readable image"),
    "cut": (jpeg(0, 200)[:-400], "cut short"),
    "cut_png": ("PNG", "no readable image"),
    "large": (10_000, "are too many"),
    "huge": (200_000, "no readable image"),
    "empty": (b"", "no readable image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures(pairs, capsys, kind):
    data, words = BAD[kind]
    path = pairs / "images" / "3_right.jpg"
    if data == "PNG":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path, "PNG")
        data = path.read_bytes()[:-30]
    if isinstance(data, int):  # pixels a side, by the header of a file of 200 bytes
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, "BMP")
        header = bytearray(path.read_bytes())
        header[18:26] = np.array([data, data], "<i4").tobytes()
        data = header
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    error = mistake(capsys, *command(pairs))
    assert "row 5 (id P3)" in error and words in error and "--on-bad-sample skip" in error
    assert not (pairs / "data").exists()
    assert prepare(*command(pairs, "--on-bad-sample", "skip")) == 3
    assert [r[0] for r in read_original(pairs / "lmdb" / "train")] == ["P0", "P1", "P2", "P5", "P6", "P7", "P8"]
    left_out = pd.read_csv(pairs / "data" / "train_left_out.csv")
    assert left_out["id"].tolist() == ["P3"] and words in left_out["reason"][0]
    assert prepare(*command(pairs, "--on-bad-sample", "skip", "--resume")) == 3


def test_a_cell_without_a_picture(pairs, capsys):
    rows = pair_rows(pairs)
    rows[1] |= {"left_image": "", "right_image": ""}
    write_rows(pairs / "pairs.csv", rows)
    assert "row 3 (id P1): no picture is given" in mistake(capsys, *command(pairs))


def test_one_picture_for_both_eyes_masked_or_monocular(pairs, capsys):
    rows = pair_rows(pairs)
    rows[0]["right_image"] = rows[1]["left_image"] = ""
    write_rows(pairs / "pairs.csv", rows)
    assert prepare(*command(pairs)) == 0
    assert "train: 2 rows have one picture, it is shown to both eyes" in capsys.readouterr().out
    first, second = read_original(pairs / "lmdb" / "train")[:2]
    assert first[3] == first[4] == jpeg(0) and second[3] == second[4] == jpeg(3)
    assert prepare(*command(pairs, "--missing-eye", "mask", out="d2", to="l2")) == 0
    assert "2 rows have one picture, the other eye is left empty" in capsys.readouterr().out
    first, second = read_original(pairs / "l2" / "train")[:2]
    assert first[3:] == (jpeg(0), b"") and second[3:] == (b"", jpeg(3))
    assert (pairs / "d2" / "train_imgs.tsv").read_text().split("\n")[0].endswith("\t")
    assert "row 4: a left and a right picture, but --monocular" in mistake(capsys, *command(pairs, "--monocular"))

    words = ["--csv", pairs / "mono.csv", "--image-dir", pairs, "--out", pairs / "d3", "--lmdb", pairs / "l3"]
    mono = [{"id": i, "image": f"images/{i}_left.jpg", "text": str(i)} for i in range(3)]
    write_rows(pairs / "mono.csv", mono)
    assert prepare(*words, "--monocular") == 0
    imgs = read_lmdb(pairs / "l3" / "train" / "imgs")  # Chinese-CLIP: base64 as it is
    assert {k: base64.urlsafe_b64decode(v) for k, v in imgs.items() if k.isdigit()} == {
        str(i): jpeg(2 * i) for i in range(3)
    }
    assert [line.count("\t") for line in (pairs / "d3" / "train_imgs.tsv").read_text().splitlines()] == [1, 1, 1]
    assert prepare(*words, "--missing-eye", "mask", "--force") == 0  # of no known side: left
    assert read_original(pairs / "l3" / "train")[1][3:] == (jpeg(2), b"")


def test_max_side_and_other_formats(tmp_path):
    grey16 = Image.fromarray((np.arange(40 * 60, dtype=np.uint16) * 20).reshape(40, 60))
    colour = Image.open(io.BytesIO(jpeg(5, 50)))
    grey16.save(tmp_path / "a.tiff")
    grey16.save(tmp_path / "b.png")
    colour.save(tmp_path / "c.bmp")
    colour.convert("RGBA").save(tmp_path / "d.webp", lossless=True)
    colour.save(tmp_path / "e.jpg")
    rows = [{"id": n, "image": n, "text": n} for n in ("a.tiff", "b.png", "c.bmp", "d.webp", "e.jpg")]
    write_rows(tmp_path / "t.csv", rows)
    words = ["--csv", tmp_path / "t.csv", "--out", tmp_path / "o", "--lmdb", tmp_path / "l", "--force"]
    assert prepare(*words) == 0
    data = {r[0]: r[3] for r in read_original(tmp_path / "l" / "train")}
    assert data["b.png"] == (tmp_path / "b.png").read_bytes() and data["e.jpg"] == (tmp_path / "e.jpg").read_bytes()
    images = {n: Image.open(io.BytesIO(d)) for n, d in data.items()}
    assert {n: i.format for n, i in images.items()} == {
        "a.tiff": "PNG", "b.png": "PNG", "c.bmp": "JPEG", "d.webp": "JPEG", "e.jpg": "JPEG"}  # fmt: skip
    np.testing.assert_array_equal(np.asarray(images["a.tiff"]), np.asarray(grey16))  # 16 bits stay 16 bits
    assert np.abs(np.asarray(images["d.webp"], int) - np.asarray(colour, int)).mean() < 3
    assert prepare(*words, "--max-side", 30) == 0
    sizes = {r[0]: Image.open(io.BytesIO(r[3])).size for r in read_original(tmp_path / "l" / "train")}
    assert sizes == {"a.tiff": (30, 20), "b.png": (30, 20), "c.bmp": (30, 30), "d.webp": (30, 30), "e.jpg": (30, 30)}
    assert prepare(*words, "--max-side", 50) == 0
    assert read_original(tmp_path / "l" / "train")[4][3] == data["e.jpg"]  # small enough: as it is


# ---- columns and splits


def test_columns_named_by_flags(pairs):
    names = {"patient_id": "who", "split": "set", "left_image": "os", "left_diagnosis": "os_dx", "right_image": "od"}
    table = pd.read_csv(pairs / "pairs.csv").rename(columns=names | {"right_diagnosis": "od_dx", "text": "words"})
    table = table.assign(key=range(100, 110), dx="any")
    table.to_csv(pairs / "pairs.csv", index=False)
    words = ["--csv", pairs / "pairs.csv", "--split-column", "set", "--out", pairs / "data", "--lmdb", pairs / "lmdb"]
    words += ["--id-column", "key", "--text-column", "words", "--left-column", "os", "--right-column", "od"]
    words += ["--label-column", "dx", "--left-label-column", "os_dx", "--right-label-column", "od_dx"]
    assert prepare(*words, "--patient-column", "who") == 0
    rows = read_original(pairs / "lmdb" / "val")
    assert [r[0] for r in rows] == [104, 109] and rows[0][3:] == (jpeg(8), jpeg(9))
    labels = pd.read_csv(pairs / "lmdb" / "val" / "labels.csv")
    assert labels.values.tolist() == [[104, "P4", "any", "normal fundus", "normal fundus"],
                                      [109, "P9", "any", "glaucoma", "normal fundus"]]  # fmt: skip
    words = ["--csv", pairs / "pairs.csv", "--id-column", "key", "--text-column", "words", "--image-column", "od"]
    assert prepare(*words, "--out", pairs / "d2", "--lmdb", pairs / "l2") == 0
    assert read_original(pairs / "l2" / "train")[4][3] == jpeg(9)  # all are train


def test_columns_of_odir(pairs, capsys):
    rows = [{"ID": i, "Patient Age": 60, "Left-Fundus": f"{i}_left.jpg", "Right-Fundus": f"{i}_right.jpg",
             "Left-Diagnostic Keywords": "cataract", "Right-Diagnostic Keywords": "cataract" if i else "drusen"}
            for i in range(3)]  # fmt: skip
    csv = write_rows(pairs / "odir.csv", rows)
    assert prepare("--csv", csv, "--image-dir", pairs / "images", "--out", pairs / "d", "--lmdb", pairs / "l") == 0
    assert "no text column" in capsys.readouterr().out
    rows = read_original(pairs / "l" / "train")
    assert [r[:3] for r in rows[:2]] == [
        (0, 0, "Left eye: cataract. Right eye: drusen."),
        (1, 1, "Both eyes: cataract."),
    ]
    assert rows[2][3:] == (jpeg(4), jpeg(5))


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        (["3", "1", "2.0"], [3, 1, 2]),
        (["3", "01", "2"], ["3", "01", "2"]),
        (["3", "x", "2"], ["3", "x", "2"]),
        (["-3", "0", "99999999999"], ["-3", "0", "99999999999"]),
    ],
)
def test_ids(pairs, ids, want):
    rows = [{"id": i, "image": f"images/{k}_left.jpg", "text": "x"} for k, i in enumerate(ids)]
    csv = write_rows(pairs / "t.csv", rows)
    assert prepare("--csv", csv, "--out", pairs / "d", "--lmdb", pairs / "l") == 0
    assert [r[0] for r in read_original(pairs / "l" / "train")] == want
    assert [x["image_ids"][0] for x in read_jsonl(pairs / "d" / "train_texts.jsonl")] == want


def test_splits_given_as_files(pairs, capsys):
    table = pd.read_csv(pairs / "pairs.csv")
    words = []
    for flag, part in (("--train-csv", table[:6]), ("--val-csv", table[6:8]), ("--test-csv", table[8:])):
        part.to_csv(pairs / f"{flag[2:-4]}.csv", index=False)
        words += [flag, pairs / f"{flag[2:-4]}.csv"]
    assert prepare(*words, "--out", pairs / "d", "--lmdb", pairs / "l") == 0
    got = {s: [r[:2] for r in read_original(pairs / "l" / s)] for s in ("train", "val", "test")}
    assert got["val"] == [("P6", 0), ("P7", 1)] and len(got["train"]) == 6 and len(got["test"]) == 2
    table[7:].to_csv(pairs / "test.csv", index=False)
    error = mistake(capsys, *words, "--out", pairs / "d2")
    assert "row 2: patient P7 is in split test" in error and f"row 3 of {pairs / 'val.csv'}, in val" in error


def test_a_split_column_that_is_not_used_is_told(pairs, capsys):
    assert prepare("--csv", pairs / "pairs.csv", "--out", pairs / "d") == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err and "--split-column split" in captured.err
    assert (pairs / "d" / "train_texts.jsonl").read_text().count(
        "\n"
    ) == 10 and "next: the same command" in captured.out


def change(**cells):
    """A change of row 3 (patient P1)."""
    return lambda rows: rows[1].update(cells)


@pytest.mark.parametrize(
    ("edit", "more", "words"),
    [
        (change(patient_id="P0"), [], "row 3: id P0 has other pictures than row 2"),
        (change(patient_id="a\tb"), [], "row 3: 'a b' is no id"),
        (change(patient_id=""), [], "row 3: '' is no id"),
        (change(patient_id="=x"), [], "row 3: '=x' is no id"),
        (change(split="../x"), [], "row 3: split '../x' is no file name"),
        (change(split=""), [], "row 3: split '' is no file name"),
        (change(patient_id="P4"), [], "row 6: patient P4 is in split val and, row 3 of"),
        (change(left_image="../../x.jpg"), [], "leads out of"),
        (change(left_image="/etc/hostname"), [], "leads out of"),
        (lambda rows: [r.pop("text") and r.pop("left_diagnosis") for r in rows], [], "--text-column names it"),
        (lambda rows: [r.pop("patient_id") for r in rows], [], "it has split, left_image, left_diagnosis"),
        (lambda rows: [r.update(text="") for r in rows], [], "no row of split train is left"),
        (change(), ["--text-column", "nothing"], "no column 'nothing' (it has patient_id, split"),
        (change(), ["--split-column", "nothing"], "column 'nothing' is missing"),
        (change(), ["--train-csv", "x.csv"], "either --csv"),
        (change(), ["--csv", "nothing.csv"], "nothing.csv: no such file"),
        (change(), ["--image-dir", "nothing"], "nothing: no such folder"),
        (change(), ["--resume", "--force"], "--resume and --force"),
        (change(), ["--monocular", "--missing-eye", "mask"], "--missing-eye mask"),
        (change(), ["--max-side", "-1"], "must not be negative"),
        (change(), ["--image-dir", ".", "--dataset", "x/y"], "--dataset and --image-dir"),
        (change(), ["--dataset", "no/such/folder"], "no such folder, and no hub id"),
        (change(), ["--dataset", "x/y"], "row 2: 'P0' is no row number"),
        (change(), ["--config", "nothing.yaml"], "nothing.yaml: "),
    ],
)
def test_mistakes(pairs, capsys, edit, more, words):
    rows = pair_rows(pairs)
    edit(rows)
    write_rows(pairs / "pairs.csv", rows)
    assert words in mistake(capsys, *command(pairs, *more))
    assert not (pairs / "lmdb").exists() and not (pairs / "data").exists()


def test_no_csv_and_split_column_of_no_csv(capsys, tmp_path):
    assert "either --csv" in mistake(capsys, "--out", tmp_path / "o")
    words = ["--train-csv", "x", "--split-column", "split"]
    assert "belongs to --csv" in mistake(capsys, *words, "--out", tmp_path / "o")


def test_absolute_paths_and_links_inside_are_fine(pairs, capsys):
    rows = pair_rows(pairs)
    rows[0]["left_image"] = str(pairs / "images" / "0_left.jpg")
    (pairs / "link").symlink_to(pairs / "images")
    rows[1]["left_image"] = "link/1_left.jpg"
    write_rows(pairs / "pairs.csv", rows)
    assert prepare(*command(pairs)) == 0
    (pairs / "sub").mkdir()
    (pairs / "sub" / "out").symlink_to(pairs / "images")
    rows[1]["left_image"] = "out/1_left.jpg"
    write_rows(pairs / "pairs.csv", rows[1:2])
    assert "leads out of" in mistake(capsys, *command(pairs, "--image-dir", pairs / "sub", "--force"))


def test_config_file(pairs):
    (pairs / "c.yaml").write_text(f"csv: {pairs / 'pairs.csv'}\nsplit-column: split\nout: {pairs / 'd'}\nmax-side: 8\n")
    assert prepare("--config", pairs / "c.yaml", "--lmdb", pairs / "l", "--max-side", 12) == 0
    assert Image.open(io.BytesIO(read_original(pairs / "l" / "val")[0][3])).size == (12, 12)


# ---- data sets


def parquet(path: Path, seeds, column="image", group=4) -> None:
    """Rows whose pictures are jpeg(seed); None for a null picture, "null" for a null struct, bytes as they are."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [None if s == "null" else {"bytes": jpeg(s) if isinstance(s, int) else s, "path": "x"} for s in seeds]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(cells, kind), "label": list(range(len(cells)))})
    pq.write_table(table, path, row_group_size=group)


def set_words(folder, *more, train=True, out="data", to="lmdb"):
    words = ["--train-csv", folder / "prompts.csv"] if train else []
    return [*words, "--dataset", folder / "set", "--out", folder / out, "--lmdb", folder / to, *more]


@pytest.fixture
def parts(prompts):
    """prompts.csv, test.csv, and a folder `set` with parquet files of train (12 rows in 2 files) and test (3 rows)."""
    parquet(prompts / "set" / "data" / "train-00000-of-00002.parquet", range(7))
    parquet(prompts / "set" / "data" / "train-00001-of-00002.parquet", range(7, 12))
    parquet(prompts / "set" / "data" / "test-00000-of-00001.parquet", [100, 101, 102])
    rows = [{"dataset_index": i, "label": "c", "prompt": f"test {i}"} for i in (2, 0)]
    write_rows(prompts / "test.csv", rows)
    return prompts


def test_parquet_folder(parts):
    assert prepare(*set_words(parts, "--test-csv", parts / "test.csv")) == 0
    rows = read_original(parts / "lmdb" / "train")
    assert [r[0] for r in rows] == [7, 2, 2, 0, 4, 11] and all(r[3] == r[4] == jpeg(r[0]) for r in rows)
    rows = read_original(parts / "lmdb" / "test")  # an index counts the rows of its own split
    assert [(r[0], r[3]) for r in rows] == [(2, jpeg(102)), (0, jpeg(100))]
    tsv = (parts / "data" / "train_imgs.tsv").read_text().splitlines()
    assert [int(x.split("\t")[0]) for x in tsv] == [0, 2, 4, 7, 11]  # the order of the data set, in one pass
    assert prepare(*set_words(parts, "--test-csv", parts / "test.csv", "--resume")) == 0


def test_one_part_for_all_splits(parts, capsys):
    words = ["--test-csv", parts / "test.csv", "--dataset-split", "train"]
    assert "patient 2 is in split test" in mistake(capsys, *set_words(parts, *words))  # the same picture in both
    write_rows(parts / "test.csv", [{"dataset_index": i, "prompt": f"test {i}"} for i in (10, 3)])
    assert prepare(*set_words(parts, *words, "--missing-eye", "mask")) == 0
    assert [(r[0], r[3], r[4]) for r in read_original(parts / "lmdb" / "test")] == [
        (10, jpeg(10), b""),
        (3, jpeg(3), b""),
    ]
    assert prepare(*set_words(parts, "--monocular", "--force")) == 0
    assert base64.urlsafe_b64decode(read_lmdb(parts / "lmdb" / "train" / "imgs")["4"]) == jpeg(4)
    assert "no parquet files of split val (data/test-" in mistake(capsys, *set_words(parts, "--dataset-split", "val"))
    assert "--dataset-split" in mistake(capsys, *set_words(parts, "--dataset-split", "nothing"))


def test_val_is_validation_and_folders_name_splits(parts):
    parquet(parts / "set" / "data" / "validation-00000-of-00001.parquet", [200, 201, 202])
    words = ["--val-csv", parts / "test.csv", "--dataset", parts / "set", "--out", parts / "d", "--lmdb", parts / "l"]
    assert prepare(*words) == 0
    assert read_original(parts / "l" / "val")[0][3] == jpeg(202)
    for old in (parts / "set" / "data").iterdir():
        old.unlink()
    parquet(parts / "set" / "default" / "test" / "0000.parquet", [300, 301, 302])
    parquet(parts / "set" / "default" / "validation" / "0000.parquet", [400, 401, 402])
    assert prepare(*words, "--force") == 0
    assert read_original(parts / "l" / "val")[0][3] == jpeg(402)


def test_rows_that_a_data_set_has_not(parts, capsys):
    parquet(parts / "set" / "data" / "train-00001-of-00002.parquet", [None, 8, 9, b"text"])
    error = mistake(capsys, *set_words(parts))
    assert "row 2 (id 7): no picture is given; row 10 (id 11): there is no such row" in error and "2 rows" in error
    assert not (parts / "data").exists()
    assert prepare(*set_words(parts, "--on-bad-sample", "skip")) == 3
    assert [r[0] for r in read_original(parts / "lmdb" / "train")] == [2, 2, 0, 4]
    assert len(pd.read_csv(parts / "data" / "train_left_out.csv")) == 5
    parquet(parts / "set" / "data" / "train-00001-of-00002.parquet", ["null", 8, 9, 10, b"text"])
    assert "the pictures" in mistake(capsys, *set_words(parts, "--resume"))
    error = mistake(capsys, *set_words(parts, "--force"))
    assert "id 7): no picture is given" in error and "id 11): no readable image" in error
    (parts / "set" / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    assert "not a readable parquet file" in mistake(capsys, *set_words(parts, "--force"))


def test_the_column_of_pictures(parts, capsys):
    parquet(parts / "one.parquet", range(12), column="fundus")
    words = ["--train-csv", parts / "prompts.csv", "--dataset", parts / "one.parquet", "--lmdb", parts / "l"]
    assert prepare(*words, "--out", parts / "d") == 0  # the only one, in one file of no split's name
    assert read_original(parts / "l" / "train")[0][3] == jpeg(7)
    assert prepare(*words, "--out", parts / "d", "--dataset-image-column", "fundus", "--force") == 0
    words[-1] = parts / "l2"
    error = mistake(capsys, *words, "--out", parts / "d2", "--dataset-image-column", "label2")
    assert "no column of pictures (fundus, label; --dataset-image-column" in error


def test_without_pyarrow_or_datasets(parts, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in mistake(capsys, *set_words(parts))
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ["--train-csv", parts / "prompts.csv", "--dataset", "owner/name", "--out", parts / "d"]
    assert "pip install datasets" in mistake(capsys, *words)


def test_parquet_killed_and_resumed(parts):
    words = set_words(parts, "--test-csv", parts / "test.csv")
    assert prepare(*words) == 0
    want = content(parts)
    for after in (2, 4, 6, 9):
        prepare_retclip.shutil.rmtree(parts / "data")
        prepare_retclip.shutil.rmtree(parts / "lmdb")
        assert in_a_child(words, after, [(prepare_retclip, "encode"), (pickle, "dumps")]) == signal.SIGKILL
        assert prepare(*words, "--resume") == 0
        assert content(parts) == want


class Hub(types.ModuleType):
    """A stand-in for `datasets`: streams of parts, with failures, and notes of what was asked for."""

    def __init__(self, parts: dict, failures=()):
        super().__init__("datasets")
        self.parts, self.failures, self.calls, self.read = parts, list(failures), [], []
        self.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})

    def load_dataset(self, name, split=None, streaming=False, token=None):
        self.calls.append((name, split, streaming, token))
        if split not in self.parts:
            raise ValueError(f'Bad split: {split}. Available splits: ["train"]')
        return Stream(self, split)


class Stream:
    def __init__(self, hub, split, start=0, decode=True):
        self.hub, self.split, self.start, self.decode = hub, split, start, decode
        self.features = {"image": hub.Image(), "label": "int"}

    def select_columns(self, columns):
        assert columns == ["image"]
        return self

    def cast_column(self, column, kind):
        return Stream(self.hub, self.split, self.start, kind.decode)

    def skip(self, n):
        return Stream(self.hub, self.split, n, self.decode)

    def __iter__(self):
        assert not self.decode  # the bytes as they are
        for i, cell in list(enumerate(self.hub.parts[self.split]))[self.start :]:
            if i in self.hub.failures:
                self.hub.failures.remove(i)
                raise ConnectionError(f"429 Too Many Requests at {i}\nmore")
            self.hub.read.append(i)
            yield {"image": {"bytes": jpeg(cell), "path": None} if isinstance(cell, int) else cell}


@pytest.fixture
def hub(parts, monkeypatch):
    """A factory of hubs; waits are noted in hub.waits, not waited for."""

    def make(*failures, train=range(12), test=(100, 101, 102)):
        module = Hub({"train": list(train), "test": list(test)}, failures)
        module.waits = []
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr(prepare_retclip.time, "sleep", module.waits.append)
        return module

    return make


def hub_words(folder, *more):
    words = set_words(folder, *more)
    words[words.index("--dataset") + 1] = "owner/name"
    return words


def test_hub_with_failures(parts, hub, monkeypatch, capsys):
    assert prepare(*set_words(parts, "--test-csv", parts / "test.csv", out="d2", to="l2")) == 0
    monkeypatch.setenv("HF_TOKEN", "secret")
    module = hub(0, 3, 3, 3, 7, 11)
    assert prepare(*hub_words(parts, "--test-csv", parts / "test.csv", "--delay", "0.25")) == 0
    assert module.waits == [1.0, 0.25, 0.25, 1, 2, 4, 0.25, 1, 0.25, 1, 0.25] + [0.25, 0.25]
    assert module.calls[0] == ("owner/name", "train", True, "secret") and module.calls[-1][1] == "test"
    assert module.read == [*range(12), 0, 1, 2]  # opened again at its position: nothing is read twice
    captured = capsys.readouterr()
    assert "owner/name: row 3: 429 Too Many Requests at 3; again in 4 s" in captured.err
    assert "secret" not in captured.out + captured.err
    a, b = content(parts), content(parts, "d2", "l2")
    assert a == b  # the same from parquet files


def test_hub_that_stays_down_is_resumed(parts, hub, capsys):
    hub(*[7] * 3)
    error = mistake_after_warnings(capsys, *hub_words(parts, "--retries", 2))
    assert "row 7: 429 Too Many Requests" in error and "after 2 more attempts; --resume" in error
    assert [x.split("\t")[0] for x in (parts / "data" / "train_imgs.tsv").read_text().splitlines()] == ["0", "2", "4"]
    module = hub()
    assert prepare(*hub_words(parts, "--retries", 0, "--resume")) == 0
    assert module.read == [7, 8, 9, 10, 11]
    assert all(r[3] == jpeg(r[0]) for r in read_original(parts / "lmdb" / "train"))
    assert prepare(*hub_words(parts, "--resume")) == 0 and module.read == [7, 8, 9, 10, 11]


def mistake_after_warnings(capsys, *words) -> str:
    capsys.readouterr()
    assert common.run_main(lambda: prepare(*words)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_hub_with_fewer_rows_than_the_csv(parts, hub, capsys):
    hub(train=[0, 1, 2, 3, {"bytes": b"text", "path": None}, 5, 6, None])
    error = mistake(capsys, *hub_words(parts))
    assert (
        "unequal numbers of images and texts: row 2 (id 7): no picture is given; row 9 (id 4): no readable image"
        in error
    )
    assert "row 10 (id 11): there is no such row" in error and "(3 rows in all" in error
    assert not (parts / "lmdb" / "train").exists() and not (parts / "data" / "train_texts.jsonl").exists()
    assert prepare(*hub_words(parts, "--resume", "--on-bad-sample", "skip")) == 3
    assert [r[0] for r in read_original(parts / "lmdb" / "train")] == [2, 2, 0]
    assert len(pd.read_csv(parts / "data" / "train_left_out.csv")) == 6


def test_hub_mistakes_are_not_tried_again(parts, hub, capsys):
    module = hub()
    words = ["--csv", parts / "prompts.csv", "--dataset", "owner/name", "--out", parts / "d"]
    error = mistake(capsys, *words, "--dataset-split", "nothing")
    assert "Bad split: nothing" in error and not module.waits
    assert "no column of pictures" in mistake(capsys, *words, "--dataset-image-column", "x", "--force")


def test_hub_folder_of_images(parts, hub, monkeypatch):
    """Hub data sets without parquet give addresses instead of bytes; only those of the hub are opened."""
    fsspec = pytest.importorskip("fsspec")
    opened = []

    def fake(path, mode):
        opened.append(path)
        return io.BytesIO(jpeg(0))

    monkeypatch.setattr(fsspec, "open", fake)
    local = {"bytes": None, "path": str(parts / "by_index" / "2.jpg")}
    hub(train=[{"bytes": None, "path": "zip://0.jpg::hf://datasets/owner/name/x.zip"}, 1, local, *range(3, 12)])
    assert prepare(*hub_words(parts, "--on-bad-sample", "skip")) == 3
    assert opened == ["zip://0.jpg::hf://datasets/owner/name/x.zip"]
    assert [r[0] for r in read_original(parts / "lmdb" / "train")] == [7, 0, 4, 11]


def test_the_library_datasets_itself(parts, monkeypatch):
    """The real `datasets`, offline: a local parquet builder in the place of the hub's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split, streaming, token: load(
            "parquet", data_files=str(parts / "set" / "data" / f"{split}*.parquet"), split="train", streaming=streaming
        ),
    )
    parquet(parts / "set" / "data" / "test-00000-of-00001.parquet", [100, None, 102])
    assert prepare(*hub_words(parts, "--test-csv", parts / "test.csv")) == 0
    assert all(r[3] == jpeg(r[0]) for r in read_original(parts / "lmdb" / "train"))
    assert [r[3] for r in read_original(parts / "lmdb" / "test")] == [jpeg(102), jpeg(100)]


def test_every_flag_is_tested_here():
    text = Path(__file__).read_text()
    flags = {a.option_strings[0] for a in prepare_retclip.build_parser()._actions if a.help}
    untested = {flag for flag in flags if f'"{flag}"' not in text}
    assert untested <= {"-h"} and len(flags) == len(prepare_retclip.build_parser()._actions)
