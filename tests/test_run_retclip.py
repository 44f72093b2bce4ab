"""run_retclip.sh: flags of each stage, splits, exit codes, mistakes; killed after and within a stage, and run again.

What the stages get is tried in a copy of the project in which stand-ins print it; what they do, with the real scripts.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch.distributed.run
from conftest import ROOT, assert_same_run
from PIL import Image

import evaluate
import prepare_retclip
import train_retclip as retclip

SETTINGS = "TRAIN_CSV VAL_CSV TEST_CSV DATASET IMAGE_DIR VISION_MODEL TEXT_MODEL VOCAB PRETRAINED BATCH_SIZE MAX_EPOCHS"
SETTINGS += " USE_FLASH_ATTN NUM_GPUS SEED OUT RUN_NAME PREPARE_FLAGS EVALUATE_FLAGS DEMO_N DEMO_EPOCHS"
STAND_IN = """import os, pathlib, shutil, sys, time
HERE, NAME = pathlib.Path(__file__).parent, pathlib.Path(__file__).stem

def parse_args(words):
    if "--wrong" in words:
        sys.exit(f"usage: {NAME}\\n{NAME}: error: unrecognized arguments: --wrong")

if __name__ == "__main__":
    sys.stdout.write("|".join(["ARGS", NAME, *sys.argv[1:]]) + "\\n")
    sys.stdout.flush()
    time.sleep(float(os.environ.get(f"SLEEP_{NAME}", 0)))
    if NAME == "evaluate":
        out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "results.json", out / "evaluation_results.json")
    sys.exit(int(os.environ.get(f"CODE_{NAME}", 0)))
"""
TORCHRUN = """import runpy, sys
print("|".join(["TORCHRUN", *sys.argv[1:]]), flush=True)
del sys.argv[: sys.argv.index("--") + 1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RESULTS = {
    "evaluated": "x.pt, zero-shot", "evaluated_on": "lmdb/test", "n_patients": 9, "macro": {"auroc": None},
    "retrieval": {"image_to_text": {"patient": {"recall@1": 0.25, "recall@1_low": 0.125, "recall@1_high": 0.5,
                                                "recall@1_chance": 0.0625, "recall@1_fixed": 0.1, "class_map": None}},
                  "text_to_image": {"patient": None}},
}  # fmt: skip
TINY = {"VISION_MODEL": "tiny", "TEXT_MODEL": "tiny", "BATCH_SIZE": "4", "EVALUATE_FLAGS": "--n-bootstrap 50"}
QUICK = ["--image-size", "32", "--lr", "1e-3", "--warmup", "2", "--num-workers", "0", "--log-interval", "1"]


def clean(env: dict) -> dict:
    """The environment without the script's own settings."""
    return {name: value for name, value in env.items() if name not in SETTINGS.split()}


def photographs(n: int) -> list[tuple[Image.Image, str]]:
    """Pictures of 32 pixels and their class: the upper or the lower half is bright."""
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        pixels, kind = rng.normal(90, 20, (32, 32, 3)), ("first", "second")[int(rng.integers(2))]
        pixels[slice(0, 16) if kind == "first" else slice(16, 32)] += 90
        found.append((Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), kind))
    return found


def write_vocab(path: Path) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . : left right eye first second case".split()
    path.write_text("\n".join(words + [str(i) for i in range(40)]) + "\n")


def write_pairs(folder: Path, n: int = 20) -> None:
    """pairs.csv with a split column, pictures, vocab.txt."""
    (folder / "images").mkdir()
    eyes, rows = photographs(2 * n), []
    for i in range(n):
        (left, first), (right, second) = eyes[2 * i : 2 * i + 2]
        paths = [f"images/{i}_{side}.png" for side in ("left", "right")]
        left.save(folder / paths[0]), right.save(folder / paths[1])
        text = f"case {i}. left eye: {first}. right eye: {second}."
        rows.append([f"P{i}", {3: "val", 4: "test"}.get(i % 5, "train"), *paths, first, second, text])
    columns = "patient_id split left_image right_image left_label right_label text".split()
    pd.DataFrame(rows, columns=columns).to_csv(folder / "pairs.csv", index=False)
    write_vocab(folder / "vocab.txt")


# ---- what each stage gets: stand-ins


def make_copy(folder: Path) -> Path:
    for name in ("run_retclip.sh", "setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("prepare_retclip", "train_retclip", "evaluate", "demo_data"):
        (folder / f"{name}.py").write_text(STAND_IN)
    (folder / "torch" / "distributed").mkdir(parents=True)
    for name, text in (("", ""), ("distributed", ""), ("distributed", TORCHRUN)):
        (folder / "torch" / name / ("run.py" if text else "__init__.py")).write_text(text)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "pictures").mkdir()
    rows = [f"P{i % 5},train,{i}\n" for i in range(8)] + ["Q,val,8\n", "R,test,9\n"]
    (folder / "pairs.csv").write_text("patient_id,split,text\n" + "".join(rows))
    (folder / "prompts.csv").write_text("dataset_index,label,prompt\n3,a,b\n")
    (folder / "my vocab.txt").write_text("[UNK]\n")
    return folder


@pytest.fixture
def copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_copy(tmp_path)


def call_copy(folder, env, *words, **settings):
    env = clean(env) | {"VOCAB": "my vocab.txt"} | settings
    return subprocess.run([folder / "run_retclip.sh", *words], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def call(copy, shell_env):
    return lambda *words, **settings: call_copy(copy, shell_env, *words, **settings)


def stages_of(result, code=0) -> dict:
    """Stage -> its arguments, parsed by its own parser."""
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line.split("|")[1:] for line in result.stdout.splitlines() if line.startswith("ARGS|")]
    parsers = {"prepare_retclip": prepare_retclip, "train_retclip": retclip, "evaluate": evaluate}
    return {name: parsers[name].parse_args(words) if name in parsers else words for name, *words in lines}


def test_one_csv(call):
    """Spaces in names survive, flags win over settings; what is not set is as the document has it."""
    made = stages_of(call("pairs.csv", "pictures", "--lr", "1e-4", OUT="my out", RUN_NAME="run 1.b", PRETRAINED="none"))
    assert list(made) == ["prepare_retclip", "train_retclip", "evaluate"]
    prepare, train, score = made.values()
    assert (prepare.csv, prepare.split_column, prepare.image_dir) == (Path("pairs.csv"), "split", Path("pictures"))
    assert (prepare.out, prepare.lmdb, prepare.resume) == (Path("my out/data"), Path("my out/lmdb"), True)
    assert (train.train_data, train.valid_data) == (Path("my out/lmdb/train"), Path("my out/lmdb/val"))
    assert (train.output_dir, train.resume) == (Path("my out/logs/run 1.b"), "auto")
    assert (train.lr, train.seed, train.vocab, train.pretrained) == (1e-4, 42, Path("my vocab.txt"), "none")
    default = retclip.parse_args(["--train-data", "x", "--val-data", "x", "--vocab", "x"])
    own = {"train_data", "valid_data", "logs", "name", "output_dir", "resume", "vocab", "lr", "seed"}
    assert {k for k, v in vars(train).items() if v != getattr(default, k)} == own
    assert score.test_only == Path("my out/logs/run 1.b/checkpoints/best_model.pt")
    assert (score.valid_data, score.output) == (Path("my out/lmdb/test"), Path("my out/evaluation"))


def test_settings_reach_their_stages(call):
    more = {"PREPARE_FLAGS": "--max-side 512 --missing-eye mask", "EVALUATE_FLAGS": "--linear-probe --seed 3"}
    more |= {"VISION_MODEL": "ViT-L-14", "TEXT_MODEL": "RBT3-chinese", "BATCH_SIZE": "32", "MAX_EPOCHS": "3"}
    more |= {"USE_FLASH_ATTN": "True", "PRETRAINED": "owner/name", "SEED": "7", "OUT": "out"}
    prepare, train, score = stages_of(call("pairs.csv", "--epochs", "5", **more)).values()
    assert (prepare.max_side, prepare.missing_eye, prepare.image_dir) == (512, "mask", Path("."))
    found = (train.vision_model, train.text_model, train.batch_size, train.epochs, train.use_flash_attention)
    assert found == ("ViT-L-14", "RBT3-chinese", 32, 5, True)
    assert (train.pretrained, train.seed, score.linear_probe, score.seed) == ("owner/name", 7, True, 3)


def test_a_csv_for_each_split(call):
    """The form of the document; VAL_CSV is optional, and a CSV given as an argument wins over all three."""
    csvs = {"TRAIN_CSV": "prompts.csv", "TEST_CSV": "pairs.csv"}
    prepare, train, score = stages_of(call("--epochs", "3", DATASET="owner/fundus", **csvs)).values()
    assert prepare.csvs == {"train": Path("prompts.csv"), "test": Path("pairs.csv")}
    assert (prepare.dataset, prepare.image_dir, prepare.csv) == ("owner/fundus", None, None)
    assert (train.valid_data.name, score.valid_data.name, train.epochs) == ("test", "test", 3)
    assert score.test_only.name == "epoch_latest.pt" and train.output_dir == Path(
        "outputs/retclip/logs/retclip_training"
    )
    prepare, train, score = stages_of(call(VAL_CSV="pairs.csv", IMAGE_DIR="pictures", **csvs)).values()
    assert list(prepare.csvs) == ["train", "val", "test"] and prepare.image_dir == Path("pictures")
    assert (train.valid_data.name, score.valid_data.name, score.test_only.name) == ("val", "test", "best_model.pt")
    assert stages_of(call("pairs.csv", VAL_CSV="absent.csv", **csvs))["prepare_retclip"].csv == Path("pairs.csv")


@pytest.mark.parametrize("splits, valid, scored, checkpoint", [
    ("train,test", "test", "test", "epoch_latest.pt"),
    ("train,val", "val", "val", "epoch_latest.pt"),
    ("train,validation,test,other", "validation", "test", "best_model.pt"),
])  # fmt: skip
def test_what_is_scored_has_chosen_nothing(call, copy, splits, valid, scored, checkpoint):
    rows = [f"{name},P{k}\n" for k, name in enumerate(splits.split(","))]
    (copy / "table.csv").write_text("\ufeffsplit,patient_id\n" + "".join(rows))
    _, train, score = stages_of(call("table.csv")).values()
    assert (train.valid_data.name, score.valid_data.name, score.test_only.name) == (valid, scored, checkpoint)


def test_a_csv_without_splits_is_divided_by_patients(call, copy):
    """A patient is in one split, the same at every run; texts with commas, line breaks and quotes survive."""
    texts = ['a, "b"\nc', "视网膜", "=1"]
    rows = [[f"P{i % 20}", texts[i % 3]] for i in range(30)]
    with (copy / "plain.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Patient ID", "text"], *rows])
    result = call("plain.csv", OUT="out")
    prepare, train, score = stages_of(result).values()
    assert prepare.csv == Path("out/data/split.csv") and prepare.image_dir == Path(".")
    assert "no column 'split'; out/data/split.csv has one" in result.stderr
    assert (train.valid_data.name, score.valid_data.name, score.test_only.name) == ("val", "test", "best_model.pt")
    table = pd.read_csv(copy / "out/data/split.csv")
    assert table[["Patient ID", "text"]].values.tolist() == rows
    assert table.groupby("Patient ID")["split"].nunique().max() == 1
    assert table.drop_duplicates("Patient ID")["split"].value_counts().to_dict() == {"train": 14, "val": 3, "test": 3}
    before = (copy / "out/data/split.csv").read_bytes()
    stages_of(call("plain.csv", OUT="out"))
    assert (copy / "out/data/split.csv").read_bytes() == before


def test_the_demo(call, copy):
    """Phantoms are drawn once; the recipe at the top of the script trains; settings for other data do not matter."""
    result = call("demo", "--epochs", "2", DEMO_N="50", SEED="1", DATASET="owner/fundus", TRAIN_CSV="absent.csv")
    assert result.returncode == 2  # the stand-in draws nothing
    words = next(line for line in result.stdout.splitlines() if line.startswith("ARGS|demo_data")).split("|")[2:]
    data = "./outputs/retclip_demo/fundus_50_1"
    assert words == ["fundus", "--out", data, "--n", "50", "--seed", "1"]
    (copy / data).mkdir(parents=True)
    shutil.copy(copy / "pairs.csv", copy / data)
    prepare, train, score = stages_of(
        call("demo", "--lr", "1", DEMO_N="50", DEMO_EPOCHS="2", SEED="1", DATASET="x/y")
    ).values()
    assert (prepare.csv, prepare.dataset, prepare.image_dir) == (Path(data) / "pairs.csv", None, None)
    assert (train.vision_model, train.text_model, train.epochs, train.seed) == ("tiny", "tiny", 2, 1)
    assert train.vocab == Path(data) / "vocab.txt" and score.output == Path("outputs/retclip_demo/evaluation")


def test_torchrun_for_more_than_one_gpu(call):
    """Of training and evaluation; torchrun's own parser hands all flags on, --logs and --monitor too."""
    result = call("pairs.csv", "--monitor", "val_loss", NUM_GPUS="2")
    made = stages_of(result)
    lines = [line.split("|")[1:] for line in result.stdout.splitlines() if line.startswith("TORCHRUN|")]
    started = [torch.distributed.run.parse_args(words) for words in lines]
    assert [Path(s.training_script).stem for s in started] == ["train_retclip", "evaluate"]
    assert [(s.nproc_per_node, s.standalone) for s in started] == [("2", True)] * 2
    assert vars(retclip.parse_args(started[0].training_script_args)) == vars(made["train_retclip"])
    assert made["train_retclip"].monitor == "val_loss"


def test_the_numbers_at_the_end(call):
    result = call("pairs.csv")
    assert "\nx.pt, zero-shot on lmdb/test, 9 patients [95 % interval]:\n" in result.stdout
    line = r"  image to text: same report, R@1 +0\.250 \[0\.125, 0\.500\] +chance 0\.062, fixed order 0\.100\nOpen "
    assert re.search(
        line + r"\./outputs/retclip/evaluation/report\.html in a browser\. This took 0 min \d+ s", result.stdout
    )


@pytest.mark.parametrize("stage, code, end, ran", [
    ("prepare_retclip", 3, 3, 3), ("evaluate", 3, 3, 3), ("prepare_retclip", 2, 2, 1), ("train_retclip", 1, 1, 2),
    ("train_retclip", 143, 143, 2),
])  # fmt: skip
def test_exit_codes(call, stage, code, end, ran):
    """3 (something could not be read) is for the end; any other code ends the script."""
    result = call("pairs.csv", **{f"CODE_{stage}": str(code)})
    assert len(stages_of(result, end)) == ran
    assert ("Open ./outputs" in result.stdout) == (end == 3)
    assert result.stderr == ("stopped; the same command goes on from here\n" if code == 143 else "")


def test_a_signal_reaches_the_stage(copy, shell_env):
    """It goes to this script alone, as a scheduler sends it."""
    env = clean(shell_env) | {"VOCAB": "my vocab.txt", "SLEEP_train_retclip": "60"}
    words = [copy / "run_retclip.sh", "pairs.csv"]
    with subprocess.Popen(
        words, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "ARGS|train_retclip" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143  # the stand-in dies of it
        assert "stopped; the same command goes on" in process.stderr.read()


MISTAKES = {
    "no CSV": ([], {}, "no CSV (./run_retclip.sh CSV IMAGE_DIR, or TRAIN_CSV"),
    "no such CSV": (["absent.csv"], {}, "CSV 'absent.csv' does not exist"),
    "no such test CSV": ([], {"TRAIN_CSV": "pairs.csv", "TEST_CSV": "absent.csv"}, "CSV 'absent.csv' does not exist"),
    "one of two": ([], {"TRAIN_CSV": "pairs.csv"}, "TEST_CSV or VAL_CSV is missing"),
    "no vocabulary": (["pairs.csv"], {"VOCAB": ""}, "VOCAB '' does not exist (vocab.txt of the text encoder)"),
    "no such vocabulary": (["pairs.csv"], {"VOCAB": "vocab.txt"}, "VOCAB 'vocab.txt' does not exist"),
    "no pictures": (["pairs.csv", "absent"], {}, "IMAGE_DIR 'absent' does not exist"),
    "weights": (["pairs.csv"], {"PRETRAINED": "ret-clip.pt"}, "PRETRAINED 'ret-clip.pt' does not exist"),
    "batch": (["pairs.csv"], {"BATCH_SIZE": "0"}, "BATCH_SIZE '0' is not a number above 0"),
    "epochs": (["pairs.csv"], {"MAX_EPOCHS": "ten"}, "MAX_EPOCHS 'ten' is not a number above 0"),
    "seed": (["pairs.csv"], {"SEED": "x"}, "SEED 'x' is not a whole number"),
    "flag of the script": (["pairs.csv", "--name", "x"], {}, "--name: not here (OUT and RUN_NAME say"),
    "unknown flag": (["pairs.csv", "--wrong"], {}, "unrecognized arguments: --wrong"),
    "output": (["pairs.csv"], {"OUT": "pairs.csv/out"}, "OUT 'pairs.csv/out' cannot be written to"),
    "no split to score": (["train.csv"], {}, "train.csv: its splits are not train, and val or test: train"),
    "nothing to divide": (["my vocab.txt"], {}, "my vocab.txt: no column 'split', and no three patients"),
    "no table": (["empty.csv"], {}, "empty.csv: not a readable CSV"),
}


def test_mistakes_are_one_line_and_exit_code_2(call, copy):
    (copy / "train.csv").write_text("patient_id,split\nP1,train\n")
    (copy / "empty.csv").write_text("")
    for mistake, (words, settings, message) in MISTAKES.items():
        result = call(*words, **settings)
        assert result.returncode == 2, mistake
        assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1, result.stderr
        assert "ARGS" not in result.stdout, mistake


def test_help_and_missing_packages(call, copy):
    result = call("help")
    assert result.returncode == 0
    names = set(SETTINGS.split()) - {"DEMO_N", "DEMO_EPOCHS"}
    assert names <= set(re.findall(r"[A-Z_]+", result.stdout)) and "demo" in result.stdout
    with (copy / "requirements.txt").open("a") as file:
        file.write("not-a-package\n")
    result = call("pairs.csv")
    assert result.returncode == 2 and result.stderr.startswith("error: packages of requirements.txt are missing")


# ---- the real scripts

# A `python3` that kills itself and the script that called it: when a stage is over, or as soon as the log of the
# training shows a line.
KILLER = """#!/bin/bash
if [[ $1 == */$STAGE && $LINE ]]; then
    "{python}" "$@" &
    until grep -qs "$LINE" {out}/logs/*/out_*.log; do kill -0 $! || exit 9; sleep 0.01; done
    kill -9 $PPID $! $$
elif [[ $1 == */$STAGE ]]; then
    "{python}" "$@" && kill -9 $PPID $$
fi
exec "{python}" "$@"
"""


def times(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
def test_killed_after_and_within_a_stage_it_ends_the_same(tmp_path, shell_env, monkeypatch):
    """Killed after the preparation and in the second epoch: data, weights and numbers of the stages by hand, in one go.

    What is prepared is not touched again.
    """
    write_pairs(tmp_path)

    def start(stage="none", line=""):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/python3").write_text(KILLER.format(python=sys.executable, out="part"))
        (tmp_path / "bin/python3").chmod(0o755)
        env = clean(shell_env) | TINY | {"MAX_EPOCHS": "2", "OUT": "part", "STAGE": stage, "LINE": line}
        env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
        words = [ROOT / "run_retclip.sh", "pairs.csv", *QUICK]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    assert start("prepare_retclip.py").returncode == -9
    assert not (tmp_path / "part/logs").exists()
    prepared = times(tmp_path / "part/lmdb") | times(tmp_path / "part/data")
    assert start("train_retclip.py", "Step 4/6").returncode == -9
    assert not (tmp_path / "part/evaluation").exists()
    last = start()
    assert last.returncode == 0, last.stderr[-3000:]
    assert "resumed at step 3" in last.stderr and last.stdout.count("is there already") == 3
    assert times(tmp_path / "part/lmdb") | times(tmp_path / "part/data") == prepared
    end = last.stdout[last.stdout.index("\nbest_model.pt, zero-shot on lmdb/test, 4 patients") :]
    assert end.count("chance") == 5

    monkeypatch.chdir(tmp_path)
    by_hand = [shlex.split(x[2:].replace("part", "whole")) for x in last.stdout.splitlines() if x.startswith("+ ")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `shell_env`
    for script, (_, path, *words) in zip((prepare_retclip, retclip, evaluate), by_hand, strict=True):
        assert Path(path).stem == script.__name__ and script.main(words) == 0
    torch.set_num_threads(threads)
    for name in ("data", "lmdb", "evaluation"):
        for path in (tmp_path / "whole" / name).rglob("*"):
            other = tmp_path / "part" / path.relative_to(tmp_path / "whole")
            assert other.exists(), path
            if path.match("data/*s.*") or path.suffix == ".csv":  # sources have the time of their files
                assert path.read_bytes() == other.read_bytes()
    assert_same_run(tmp_path / "whole/logs/retclip_training", tmp_path / "part/logs/retclip_training", retclip)
    files = [tmp_path / out / "evaluation/evaluation_results.json" for out in ("whole", "part")]
    one, other = (json.loads(file.read_text()) for file in files)
    assert one.pop("provenance") and other.pop("provenance") and one == other


@pytest.mark.slow
def test_two_processes(tmp_path, shell_env):
    write_pairs(tmp_path)
    env = clean(shell_env) | TINY | {"MAX_EPOCHS": "1", "OUT": "out", "NUM_GPUS": "2", "BATCH_SIZE": "2"}
    words = [ROOT / "run_retclip.sh", "pairs.csv", *QUICK, "--check-ranks", "--monitor", "class_map"]
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on cpu, rank 0 of 2" in result.stderr


@pytest.mark.slow
def test_the_demo_itself(tmp_path, shell_env):
    """Few phantoms and one epoch: every stage runs on what the one before has made."""
    env = clean(shell_env) | {"DEMO_N": "60", "DEMO_EPOCHS": "1", "OUT": str(tmp_path / "out")}
    words = [ROOT / "run_retclip.sh", "demo"]
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "best_model.pt, zero-shot on lmdb/test, 9 patients" in result.stdout
