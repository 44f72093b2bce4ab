"""The hyper-parameter search: real processes on one journal, killed and continued; the training itself is a toy."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import matplotlib.image
import optuna
import pandas as pd
import pytest
import yaml
from conftest import ROOT

import common
import search

# A training of milliseconds with the outer behaviour of the real one: it continues bit for bit, keeps its folder
# locked, stops on signals, asks PRUNE. Its score is best for a learning rate of 1e-3 and AdamW.
TOY = """
import argparse, json, math, os, sys, time
from pathlib import Path
sys.path.append({root!r})
import torch
import common, search as search
from common import StopSignal, UserError

LAST, WANDB_PROJECT, PRUNE = "models/last_model.pth", "csi-predictor", None


def build_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--config", nargs="+")
    add("--mode", default="train")
    add("--csv", type=Path, default=Path("labels.csv"))
    add("--n-films", type=int, default=40)
    for name, default in (("--lr", 1e-3), ("--weight-decay", 1e-4), ("--dropout-rate", 0.5), ("--unknown-weight", 0.3)):
        add(name, type=float, default=default)
    for name, default in (("--epochs", 4), ("--batch-size", 32), ("--accum-steps", 1), ("--seed", 42)):
        add(name, type=int, default=default)
    add("--optimizer", choices=["adam", "adamw", "sgd"], default="adam")
    add("--scheduler", default="plateau")
    add("--loss", choices=["ce", "corn", "cdw", "emd"], default="ce")
    add("--model", default="ResNet50")
    add("--monitor", choices=["val_loss", "qwk", "f1_macro", "csi_correlation"])
    add("--split-file", type=Path)
    add("--split-column", action="store_true")
    add("--n-trials", type=int, default=50)
    add("--search-params", nargs="+", choices=list(search.SPACE), default=list(search.SPACE)[:5])
    add("--sampler", choices=["tpe", "random"], default="tpe")
    add("--pruner", choices=["median", "successive_halving", "none"], default="median")
    add("--search-workers", type=int, default=1)
    for name in ("--output-dir", "--hyperparams", "--journal", "--export"):
        add(name, type=Path, default=Path(".") if name == "--output-dir" else None)
    add("--study-name", default="csi_optimization")
    add("--resume", nargs="?", const="auto")
    add("--overwrite", action="store_true")
    add("--device", default="cpu")
    add("--timeout-minutes", type=float, default=30)
    add("--sweep-name", default="csi_sweep")
    add("--sweep-count", type=int, default=0)
    for name in ("--wandb-project", "--wandb-entity", "--wandb-mode", "--sweep-id"):
        add(name)
    return parser


def parse_args(argv=None):
    args = common.parse_with_config(build_parser(), argv)
    searching = args.mode in ("hyperopt", "sweep", "sweep-agent")
    args.monitor = args.monitor or ("qwk" if searching else "val_loss")
    return args


def read_scores(path, args):
    if not args.csv.exists():
        raise UserError(f"{{args.csv}}: no such file")


def split_path(table, args):
    return None if args.split_column and args.split_file is None else args.split_file or args.output_dir / "split.csv"


def build_datasets(args):
    path = split_path(read_scores(args.csv, args), args)
    if path and not path.exists():
        common.make_folder(path.parent)
        path.write_text("FileID,split\\n1,made\\n")
    return list(range(args.n_films)), [0]


def check_environment(args, ctx):
    print("environment:", ctx)


def train(args, ctx):
    common.make_folder((args.output_dir / LAST).parent)
    saved = common.find_resume(args, LAST, ["optimizer"], ctx.world)
    state = {{"step": 0, "x": 0.3, "stale": 0, "global_batch": args.batch_size, "updates": 0, "best": []}}
    state = saved["state"] if saved else {{**state, "bad_samples": []}}
    log = common.RunLog(args.output_dir, ctx, "logs/training.log", "logs/results.jsonl", state["step"])
    log.begin(args.output_dir / LAST)
    with (args.output_dir / "starts.txt").open("a") as file:
        print(os.getpid(), state["step"], file=file, flush=True)
    build_datasets(args)
    if "TOY_DATA_WORKER" in os.environ and not os.fork():
        Path(os.environ["TOY_DATA_WORKER"]).write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    stop = StopSignal()
    trouble, number = os.environ.get("TOY_TROUBLE", ""), args.output_dir.name
    per_epoch = args.n_films // args.batch_size
    if trouble == f"fail {{number}}":
        raise UserError("20 steps in a row were not <finite> & so on")
    if trouble == f"full {{number}}":
        common.write_atomic(Path("nowhere/x"), "")
    if trouble == f"memory {{number}}":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if trouble == f"crash {{number}}":
        os.kill(os.getpid(), 9)
    while state["step"] < args.epochs * per_epoch and not state["stale"]:
        time.sleep(float(os.environ.get("TOY_PACE", 0)))
        state["step"] += per_epoch
        state["x"] = 3.9 * state["x"] * (1 - state["x"])  # the next depends on every one before
        good = 1 - abs(math.log10(args.lr) + 3) / 3 + 0.1 * (args.optimizer == "adamw")
        qwk = good * (1 - 0.9 ** (state["step"] / per_epoch)) + 1e-3 * state["x"]
        metrics = {{"qwk": math.nan if trouble == f"nan {{number}}" else qwk, "val_loss": 1 - qwk, "f1_macro": qwk}}
        state["stale"] = int(PRUNE is not None and PRUNE(state["step"], metrics))
        log.results({{"epoch": state["step"] // per_epoch, "step": state["step"], **metrics}})
        saved = {{"task": "toy", "model": {{}}, "args": common.plain_args(args), "state": state}}
        saved |= {{"optimizer": {{}}, "scaler": {{}}}}
        common.save_last(args.output_dir / LAST, saved)
        if stop:
            log.close()
            return 143
    (args.output_dir / "models/best_model.pth").touch()
    log.close()
    return 0


def main(argv=None):
    args = parse_args(argv)
    if args.mode == "train" and "WANDB_SWEEP_PARAM_PATH" not in os.environ:
        with common.process_group(args.device, args.timeout_minutes) as ctx:
            return train(args, ctx)
    return search.main(args, argv, sys.modules[__name__])


if __name__ == "__main__":
    sys.exit(common.run_main(main))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy script as a file, and imported."""
    path = tmp_path_factory.mktemp("toy") / "train_toy.py"
    path.write_text(TOY.format(root=str(ROOT)))
    (path.parent / "labels.csv").write_text("FileID\n1\n")
    module = types.ModuleType("train_toy")
    module.__file__ = str(path)
    sys.modules["train_toy"] = module
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


@pytest.fixture
def home(toy, tmp_path, monkeypatch):
    """An empty working directory with the labels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "labels.csv").write_text("FileID\n1\n")
    return tmp_path


@pytest.fixture
def hyperopt(toy, home):
    return lambda *words: call(toy, "--mode", "hyperopt", *words)


def call(toy, *words) -> int:
    return common.run_main(lambda: toy.main([str(w) for w in words]))


def start(toy, *words):
    return subprocess.Popen(
        [sys.executable, toy.__file__, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def study_of(folder=Path("hyperopt"), name="csi_optimization"):
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not (found := condition()):
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def records(number: int) -> list[dict]:
    text = (Path("hyperopt/trials") / f"{number:04d}" / "logs/results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def starts(number: int) -> list[list[int]]:
    """Of a trial: process and step of every start of its training."""
    text = (Path("hyperopt/trials") / f"{number:04d}" / "starts.txt").read_text()
    return [list(map(int, line.split())) for line in text.splitlines()]


def error_of(capsys) -> str:
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


# ---- many processes, kills


@pytest.mark.slow
def test_three_workers_one_killed(toy, home, monkeypatch, capfd):
    """30 trials in three processes, of which one is killed -9 in the middle: none lost, none twice, the killed one
    continued; the same command again does nothing; 3 trials more are exactly 3 more."""
    words = ["--mode", "hyperopt", "--epochs", 6, "--n-trials"]
    monkeypatch.setenv("TOY_PACE", "0.08")
    parent = start(toy, *words, 30, "--search-workers", 3)

    def busy():
        """A trial that has begun but is not over, and is too early to be pruned."""
        there = study_of().get_trials(deepcopy=False)[2:5] if Path("hyperopt/trials/0002").exists() else []
        return next((t for t in there if t.state.name == "RUNNING" and 2 <= len(t.intermediate_values) <= 3), None)

    victim = wait_for(busy)
    os.kill(starts(victim.number)[-1][0], signal.SIGKILL)
    out = parent.communicate(timeout=120)[0]
    assert parent.returncode == 0, out
    trials = study_of().trials
    assert len(trials) == 30 and all(t.state.is_finished() for t in trials)
    states = [t.state.name for t in trials]
    assert states.count("PRUNED") >= 3 and set(states) == {"PRUNED", "COMPLETE"}
    again = trials[victim.number]
    assert again.params == victim.params and len(again.user_attrs["tries"]) == 1
    assert again.user_attrs["tries"][0] >= len(victim.intermediate_values)
    assert len(starts(victim.number)) == 2 and starts(victim.number)[1][1] > 0
    assert [len(starts(t.number)) for t in trials if t.number != victim.number] == [1] * 29
    for t in trials:  # every evaluation once, and in the study what is in the log
        found = records(t.number)
        assert [r["epoch"] for r in found] == list(range(1, len(found) + 1))
        assert [r["qwk"] for r in found] == list(t.intermediate_values.values())
        assert (len(found) == 6) == (t.state.name == "COMPLETE")
        if t.state.name == "COMPLETE":
            assert t.value == max(r["qwk"] for r in found)
        assert not list(Path(f"hyperopt/trials/{t.number:04d}/models").glob("last*"))
    assert trials[0].params == {
        "lr": 1e-3, "weight_decay": 1e-4, "dropout_rate": 0.5, "optimizer": "adam", "batch_size": 32,
    }  # fmt: skip
    assert {t.params["batch_size"] for t in trials} == {8, 16, 32}  # 64 is more than there is

    assert call(toy, *words, 30) == 0
    assert study_of().trials == trials
    assert call(toy, *words, 33) == 0
    assert len(study_of().trials) == 33 and study_of().trials[:30] == trials
    assert "trial 32 of 33: " in capfd.readouterr().out
    table = pd.read_csv("models/hyperopt/trials.csv")
    assert table["number"].tolist() == list(range(33)) and set(table["state"]) == {"complete", "pruned"}
    best = json.loads(Path("models/hyperopt/best_params.json").read_text())
    assert best["n_complete"] + best["n_pruned"] == 33 and best["value"] == study_of().best_value
    assert best["params"] == study_of().best_params and best["trial"] == study_of().best_trial.number
    kept = [str(path) for path in Path("hyperopt/trials").glob("*/models/*.pth")]  # of the best trial alone
    assert kept == [f"hyperopt/trials/{best['trial']:04d}/models/best_model.pth"]


@pytest.mark.slow
def test_interrupted_search_is_the_same_search(toy, home, monkeypatch):
    """One worker, killed or stopped in several places, draws and finds what an uninterrupted one does."""
    words = ["--mode", "hyperopt", "--n-trials", 14, "--epochs", 5, "--pruner", "successive_halving"]
    assert call(toy, *words) == 0
    wanted = study_of().trials
    Path("hyperopt").rename("whole")
    monkeypatch.setenv("TOY_PACE", "0.05")
    for number, sign in ((4, signal.SIGKILL), (9, signal.SIGTERM), (12, signal.SIGKILL)):
        if number == 12:
            monkeypatch.setenv("TOY_DATA_WORKER", "data_worker.pid")
        process = start(toy, *words)
        wait_for(lambda number=number: Path(f"hyperopt/trials/{number:04d}/logs/results.jsonl").exists())
        time.sleep(0.02)
        process.send_signal(sign)
        process.wait(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[sign]
    monkeypatch.delenv("TOY_DATA_WORKER")
    common.lock_folder(Path("hyperopt/trials/0012")).close()  # though its data worker lives on for a while
    search.locked_trial(toy.parse_args([]), 12).close()
    threading.Timer(1, os.kill, (int(Path("data_worker.pid").read_text()), signal.SIGKILL)).start()
    assert call(toy, *words) == 0
    got = study_of().trials
    assert [t.params for t in got] == [t.params for t in wanted]
    assert [t.state for t in got] == [t.state for t in wanted]
    assert [t.intermediate_values for t in got] == [t.intermediate_values for t in wanted]


# ---- one process


def test_trial_0_is_the_command_line(hyperopt, home, capsys):
    words = ["--n-trials", 1, "--search-params", "lr", "optimizer", "batch_size", "loss", "--n-films", 70]
    assert hyperopt(*words, "--lr", 0.2, "--optimizer", "sgd", "--batch-size", 24, "--loss", "emd") == 0
    assert study_of().trials[0].params == {"lr": 0.01, "optimizer": "sgd", "batch_size": 16, "loss": "emd"}
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert notes == ["note: lr 0.2 is outside of what is searched: trial 0 has 0.01",
                     "note: batch_size 24 is outside of what is searched: trial 0 has 16"]  # fmt: skip
    assert study_of().user_attrs["batch_sizes"] == [8, 16, 32, 64]


def test_batch_sizes_fit_the_training_set(hyperopt, home):
    assert hyperopt("--n-trials", 3, "--n-films", 13, "--accum-steps", 2, "--batch-size", 4) == 0
    assert [t.params["batch_size"] for t in study_of().trials] == [6, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_samplers_and_seeds(hyperopt, home, sampler):
    words, drawn = ["--n-trials", 12, "--sampler", sampler, "--pruner", "none"], []
    for n, seed in enumerate((1, 1, 2)):
        assert hyperopt(*words, "--seed", seed, "--journal", f"{n}/study.journal") == 0
        drawn.append([t.params for t in study_of(Path(str(n))).trials])
        assert {t.state.name for t in study_of(Path(str(n))).trials} == {"COMPLETE"}
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] == drawn[2][0]
    for params in drawn[0]:
        assert list(params) == list(search.SPACE)[:5] and 1e-5 <= params["lr"] <= 1e-2


@pytest.mark.parametrize("mode", ["hyperopt", "sweep"])
def test_a_monitor_that_does_not_see_it(toy, server, mode, capsys):
    for monitor, name in (("qwk", "unknown_weight"), ("csi_correlation", "unknown_weight"), ("val_loss", "loss")):
        assert call(toy, "--mode", mode, "--monitor", monitor, "--search-params", "lr", name) == 2
        assert error_of(capsys).startswith(f"error: --monitor {monitor} cannot judge {name} (--monitor f1_macro, or ")
    assert not server.calls and not Path("hyperopt").exists()
    words = ["--monitor", "f1_macro", "--search-params", "lr", "unknown_weight", "loss", "--n-trials", 1]
    assert call(toy, "--mode", mode, *words) == 0


def test_one_split_for_a_study(hyperopt, home, capsys):
    """Beside the journal: that of --split-file or --output-dir, or a new one, whatever --output-dir is later."""

    def splits(folder):
        found = sorted(Path(folder).glob("trials/*/split.csv"))
        return [path.read_text() for path in found]

    (home / "split.csv").write_text("FileID,split\n1,mine\n")
    assert hyperopt("--n-trials", 1, "--journal", "a/study.journal") == 0
    (home / "split.csv").write_text("FileID,split\n1,changed\n")
    assert hyperopt("--n-trials", 2, "--journal", "a/study.journal", "--output-dir", "other") == 0
    assert splits("a") == ["FileID,split\n1,mine\n"] * 2 and not Path("other/split.csv").exists()
    Path("a/split.csv").unlink()
    assert hyperopt("--n-trials", 3, "--journal", "a/study.journal") == 2
    assert error_of(capsys) == "error: a/split.csv: No such file or directory (--journal)"
    assert hyperopt("--n-trials", 1, "--output-dir", "new") == 0
    assert splits("new/hyperopt") == ["FileID,split\n1,made\n"] and not Path("new/split.csv").exists()
    (home / "given.csv").write_text("FileID,split\n1,given\n")
    words = ["--n-trials", 1, "--split-file", "given.csv", "--split-column", "--journal"]
    assert hyperopt(*words, "b/study.journal") == 0
    assert splits("b") == ["FileID,split\n1,given\n"]
    Path("c").mkdir()
    Path("c/split.csv").write_text("of another run")
    assert hyperopt(*words, "c/study.journal") == 2
    assert error_of(capsys).startswith("error: c/split.csv: is not the split of given.csv (move one away, or take")
    assert hyperopt("--n-trials", 1, "--split-column", "--journal", "c/study.journal") == 0  # the CSV says it
    assert splits("c") == [] and Path("c/split.csv").read_text() == "of another run"


def test_val_loss_is_minimised(hyperopt, home):
    assert hyperopt("--monitor", "val_loss", "--search-params", "lr", "--n-trials", 8) == 0
    study = study_of()
    assert study.direction.name == "MINIMIZE" and study.best_value == min(t.value for t in study.trials if t.value)
    best = json.loads(Path("models/hyperopt/best_params.json").read_text())
    assert best["monitor"] == "val_loss" and best["value"] == study.best_value and list(best["params"]) == ["lr"]


def test_failed_trials(hyperopt, home, monkeypatch, capsys):
    """A trial that fails has its reason, counts, and the search goes on; the page tells it, escaped."""
    for number, trouble in ((2, "fail"), (3, "memory"), (4, "nan")):
        monkeypatch.setenv("TOY_TROUBLE", f"{trouble} {number:04d}")
        assert hyperopt("--n-trials", number + 1, "--pruner", "none", "--study-name", "<b>&x") == 0
    states = [t.state.name for t in study_of(name="<b>&x").trials]
    assert states == ["COMPLETE"] * 2 + ["FAIL"] * 3
    table = pd.read_csv("models/hyperopt/trials.csv")
    reasons = ["20 steps in a row were not <finite> & so on", "out of GPU memory with batch size ",
               "qwk is undefined in every evaluation"]  # fmt: skip
    assert all(got.startswith(want) for got, want in zip(table["reason"][2:], reasons, strict=True))
    assert table["state"].tolist() == ["complete"] * 2 + ["fail"] * 3 and table["value"].isna().sum() == 3
    assert json.loads(Path("models/hyperopt/best_params.json").read_text())["n_failed"] == 3
    page = Path("models/hyperopt/search.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;&amp;x" in page and "not &lt;finite&gt; &amp; so on" in page


def test_trial_0_fails(hyperopt, home, monkeypatch, capsys):
    """The defaults do not train: the search ends, and goes on with them when the reason is gone."""
    monkeypatch.setenv("TOY_TROUBLE", "fail 0000")
    for _ in range(4):  # however often
        assert hyperopt("--n-trials", 3) == 2
        assert error_of(capsys).startswith("error: trial 0, with the values of the command line, failed: 20 steps in")
    monkeypatch.delenv("TOY_TROUBLE")
    assert hyperopt("--n-trials", 3) == 0
    assert [t.state.name for t in study_of().trials] == ["COMPLETE"] * 3


def test_a_full_disk_is_not_the_trials_fault(hyperopt, home, monkeypatch, capsys):
    monkeypatch.setenv("TOY_TROUBLE", "full 0002")
    assert hyperopt("--n-trials", 4) == 2
    assert error_of(capsys).startswith("error: trial 2 failed: nowhere/x: could not be written: No such file")
    monkeypatch.delenv("TOY_TROUBLE")
    assert hyperopt("--n-trials", 4) == 0
    assert [t.state.name for t in study_of().trials] == ["COMPLETE"] * 4


def test_another_setting_is_refused(hyperopt, home, capsys):
    assert hyperopt("--n-trials", 2) == 0
    capsys.readouterr()
    other = {
        ("--epochs", 5): "--epochs is 5 but the study was begun with 4",
        ("--seed", 1): "--seed is 1 but",
        ("--model", "CheXNet"): "--model is CheXNet but the study was begun with ResNet50",
        ("--monitor", "val_loss", "--search-params", "lr"): "--search-params is ['lr'] but the study was begun",
        ("--search-params", "lr", "loss"): "--search-params is ['lr', 'loss'] but",
        ("--sampler", "random"): "--sampler is random",
        ("--loss", "emd"): "--loss is emd",
    }
    for words, message in other.items():
        assert hyperopt("--n-trials", 2, *words) == 2
        assert error_of(capsys).startswith(f"error: hyperopt/study.journal: {message}")
    (home / "other.csv").write_text("FileID\n1\n")
    assert hyperopt("--n-trials", 2, "--csv", "other.csv") == 2
    assert "--csv is other.csv but the study was begun with labels.csv" in error_of(capsys)
    assert hyperopt("--n-trials", 2, "--lr", 0.01, "--device", "auto", "--journal", "hyperopt/study.journal") == 0
    assert len(study_of().trials) == 2
    assert hyperopt("--n-trials", 2, "--study-name", "another") == 2  # would mix up the folders
    assert "0000: is of an earlier search (move it away, or take a --journal in another folder)" in error_of(capsys)


def test_refusals(toy, hyperopt, home, monkeypatch, capsys):
    def refused(*words) -> str:
        assert hyperopt(*words) == 2
        return error_of(capsys)

    assert refused("--csv", "no.csv") == "error: no.csv: no such file"
    assert "goes on with the study of --journal" in refused("--overwrite")
    assert "goes on with the study of --journal" in refused("--resume", "last.pth")
    (home / "file").write_text("x")
    assert "file/x: could not be made: Not a directory" in refused("--journal", "file/x/study.journal")
    for text in ("{}\n{}\n", "garbage\n", "[1]\n[2]\n", '{"op_code": 99}\n', "\0\0\0\0\n\0\n"):
        (home / "bad.journal").write_text(text)
        assert refused("--journal", "bad.journal").startswith("error: bad.journal: damaged, or no journal of a search")
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    assert refused() == "error: optuna is not installed (pip install optuna)"
    two = common.Context(0, 2, common.pick_device("cpu"))
    with pytest.raises(common.UserError, match="without torchrun"):
        search.hyperopt(toy.parse_args([]), two)


def test_a_full_disk_in_the_journal(hyperopt, home, monkeypatch, capsys):
    backend, writes = optuna.storages.journal.JournalFileBackend, []

    def full(self, logs):
        writes.append(logs)
        if len(writes) == 20:
            raise OSError(28, "No space left on device")
        whole(self, logs)

    whole = backend.append_logs
    monkeypatch.setattr(backend, "append_logs", full)
    assert hyperopt("--n-trials", 3) == 2
    assert error_of(capsys) == "error: hyperopt/study.journal: No space left on device (--journal)"
    monkeypatch.setattr(backend, "append_logs", whole)
    assert hyperopt("--n-trials", 3) == 0
    assert [t.state.name for t in study_of().trials] == ["COMPLETE"] * 3


def test_half_a_line_is_cut(hyperopt, home):
    """A kill in the middle of a write leaves half a line, behind which nothing could be read."""
    assert hyperopt("--n-trials", 1) == 0
    with Path("hyperopt/study.journal").open("a") as file:
        file.write('{"op_code": 4, "study_id"')
    assert hyperopt("--n-trials", 2) == 0
    assert [t.state.name for t in study_of().trials] == ["COMPLETE"] * 2


def test_killed_between_two_values(hyperopt, home):
    """A trial that has got only some of its values, and no folder, gets the others as it would have."""
    assert hyperopt("--n-trials", 4, "--pruner", "none") == 0
    wanted = [t.params for t in study_of().trials]
    for lines_of_params in range(6):
        lines = Path("hyperopt/study.journal").read_text().splitlines(keepends=True)
        begun = [n for n, line in enumerate(lines) if '"op_code":4' in line][3]
        half = Path(f"half{lines_of_params}")
        half.mkdir()
        (half / "study.journal").write_text("".join(lines[: begun + 1 + lines_of_params]))
        (half / "split.csv").write_bytes(Path("hyperopt/split.csv").read_bytes())
        assert hyperopt("--n-trials", 4, "--pruner", "none", "--journal", half / "study.journal") == 0
        assert [t.params for t in study_of(half).trials] == wanted


def test_page_and_figures(hyperopt, home):
    assert hyperopt("--n-trials", 26) == 0
    folder = Path("models/hyperopt")
    assert sorted(p.name for p in folder.iterdir()) == [
        "best_params.json", "history.png", "importances.png", "search.html", "trials.csv",
    ]  # fmt: skip
    page = (folder / "search.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Content-Security-Policy" in page
    assert not re.search(r"<script|<link|https?://|url\(|src=\"(?!data:)", page)
    assert page.count("<tr>") == 11 and "hardly more than noise" not in page
    for name in ("history.png", "importances.png"):
        image = matplotlib.image.imread(folder / name)
        assert image.shape[1] == 840 and image.shape[0] > 100 and image[..., :3].std() > 0.02


def test_every_worker_has_its_gpu(toy, hyperopt, home, monkeypatch):
    """Those of CUDA_VISIBLE_DEVICES in turn; cores are shared; --device cannot name one of them."""
    assert hyperopt("--n-trials", 1) == 0
    args, started = toy.parse_args(["--n-trials", "1", "--search-workers", "3"]), []
    args.monitor = "qwk"

    class Popen:
        def __init__(self, command, env, **options):
            started.append((command, env))

        def poll(self):
            return 0

    monkeypatch.setattr(search.subprocess, "Popen", Popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5ab")
    monkeypatch.delenv("OMP_NUM_THREADS")
    ctx = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), world=1)
    args.device = "cuda:1"
    with pytest.raises(common.UserError, match="CUDA_VISIBLE_DEVICES chooses them, not --device"):
        search.run_workers(args, ctx, study_of(), ["--mode", "hyperopt"])
    args.device = "auto"
    assert search.run_workers(args, ctx, study_of(), ["--mode", "hyperopt"]) == 0
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["4", "GPU-5ab", "4"]
    assert [env[search.WORKER] for _, env in started] == ["0", "1", "2"]
    assert {env["OMP_NUM_THREADS"] for _, env in started} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}
    assert started[0][0] == [sys.executable, toy.__file__, "--mode", "hyperopt"]


# ---- what follows a search


def test_train_with_what_was_found(toy, hyperopt, home, capsys):
    assert hyperopt("--n-trials", 5) == 0
    best = json.loads(Path("models/hyperopt/best_params.json").read_text())
    words = ["--mode", "train-optimized", "--hyperparams", "models/hyperopt/best_params.json"]
    args = toy.parse_args([*words, "--optimizer", "sgd", "--unknown-weight", "0.7"])
    args = search.optimized(args, [*words, "--optimizer", "sgd", "--unknown-weight", "0.7"])
    assert (args.optimizer, args.unknown_weight, args.monitor, args.epochs) == ("sgd", 0.7, "qwk", 4)
    for name in ("lr", "weight_decay", "dropout_rate", "batch_size"):
        assert getattr(args, name) == best["params"][name]
    (home / "c.yaml").write_text("lr: 0.5\nepochs: 2\n")
    args = search.optimized(args, [*words, "--config", "c.yaml", "--monitor", "val_loss"])
    assert (args.lr, args.epochs, args.monitor) == (best["params"]["lr"], 2, "val_loss")
    assert call(toy, *words, "--output-dir", "final", "--model", "CheXNet") == 0
    out = capsys.readouterr()
    assert "models/hyperopt/best_params.json: lr " in out.out
    line = "warning: models/hyperopt/best_params.json was found for model ResNet50, not CheXNet"
    assert out.err.splitlines().count(line) == 1
    assert Path("final/models/best_model.pth").exists()
    used = common.load_checkpoint(Path("final/models/last_model.pth"))["args"]
    assert best["params"].items() <= used.items() and used["monitor"] == "qwk"
    assert best["setting"].items() >= {"seed": 42, "csv": "labels.csv", "loss": "ce", "epochs": 4}.items()
    assert best["split_file"] == str(Path("hyperopt/split.csv").absolute())


def test_the_split_of_what_was_found(toy, hyperopt, home, capsys):
    """Is that of the training too, unless another is there; differences are told in one line."""
    (home / "given.csv").write_text("FileID,split\n1,given\n")
    assert hyperopt("--n-trials", 1, "--split-file", "given.csv") == 0
    words = ["--mode", "train-optimized", "--hyperparams", "models/hyperopt/best_params.json", "--output-dir"]

    def warned(*more):
        capsys.readouterr()
        args = search.optimized(toy.parse_args([*words, *more]), [*words, *more])
        found = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
        return args.split_file, [x.partition(" was found for ")[2] for x in found]

    used = f"the split {home}/hyperopt/split.csv, which is not used"
    for _ in range(2):  # the training goes on with it, also if the CSV has a column
        assert warned("out") == (Path("out/split.csv"), [])
    assert Path("out/split.csv").read_text() == "FileID,split\n1,given\n"
    assert warned("x", "--split-file", "given.csv") == (Path("given.csv"), []) and not Path("x").exists()
    (home / "other.csv").write_text("FileID\n1\n")
    found = [f"loss ce, not emd; csv labels.csv, not other.csv; seed 42, not 7; {used}"]
    assert warned("x", "--csv", "other.csv", "--seed", "7", "--loss", "emd") == (None, found)
    (home / "own.csv").write_text("FileID,split\n1,own\n")
    assert warned("x", "--split-file", "own.csv") == (Path("own.csv"), [used])
    Path("hyperopt/split.csv").unlink()
    assert warned("x") == (None, [used]) and not Path("x").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("# best\nlearning_rate = 0.001\n", "no JSON of --mode hyperopt (lines of 'key = value' go into an .ini"),
        ("[" * 100_000, "no JSON of --mode hyperopt"),
        ("[1]", "no 'params'"),
        ('{"value": 1}', "no 'params'"),
        ('{"params": {"learn_rate": 0.1}}', "unknown parameter 'learn_rate' (did you mean 'dropout_rate'?)"),
        ('{"params": {"output_dir": "/x"}}', "unknown parameter 'output_dir'"),
        ('{"params": {}, "setting": 1}', "no JSON of --mode hyperopt"),
        ('{"params": {"lr": "0.1"}}', "lr is '0.1' (a number was expected)"),
        ('{"params": {"lr": true}}', "lr is True (a number"),
        ('{"params": {"lr": NaN}}', "lr is nan (a number"),
        ('{"params": {"batch_size": 8.5}}', "batch_size is 8.5 (a whole number"),
        ('{"params": {"optimizer": ["adam"]}}', "optimizer is ['adam'] (one of adam, adamw, sgd"),
        ('{"params": {"optimizer": "lion"}}', "optimizer is 'lion'"),
        (None, "No such file or directory (--mode hyperopt writes it)"),
    ],
)
def test_bad_hyperparams(toy, home, capsys, text, message):
    if text is not None:
        Path("best.json").write_text(text)
    assert call(toy, "--mode", "train-optimized", "--hyperparams", "best.json") == 2
    assert error_of(capsys).startswith(f"error: best.json: {message}")


def test_hyperparams_are_needed(toy, home, capsys):
    assert call(toy, "--mode", "train-optimized") == 2
    assert "needs --hyperparams FILE" in error_of(capsys)


# ---- W&B sweeps


class Server:
    """What of wandb a sweep uses, without a server."""

    run = None

    def __init__(self, key=True, runs=()):
        self.key, self.runs, self.calls, self.failed = key, runs, [], []

    def login(self, prompt=True, verify=True):
        assert not prompt and not verify
        return self.key

    def sweep(self, config, entity=None, project=None):
        self.calls.append((config, entity, project))
        return "abc123"

    def agent(self, sweep_id, function=None, entity=None, project=None, count=None):
        self.calls.append((sweep_id, entity, project, count))
        for name, values in self.runs:
            path = Path(f"config-{name}.yaml").resolve()
            path.write_text(yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in values.items()}}))
            os.environ.update(WANDB_RUN_ID=name, WANDB_SWEEP_PARAM_PATH=str(path))
            try:
                function()
            except RuntimeError as e:
                self.failed.append(str(e))
            del os.environ["WANDB_RUN_ID"], os.environ["WANDB_SWEEP_PARAM_PATH"]


@pytest.fixture
def server(home, monkeypatch):
    fake = Server()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    return fake


def test_sweep_online(toy, server, capsys):
    words = ["--mode", "sweep", "--wandb-project", "p", "--wandb-entity", "me", "--epochs", 9, "--output-dir", "out"]
    assert call(toy, *words, "--search-params", "lr", "dropout_rate", "batch_size", "loss") == 0
    config = yaml.safe_load(Path("out/wandb_sweep.yaml").read_text())
    sent = {name: value for name, value in config.items() if name != "command"} | {"program": "train_toy.py"}
    assert server.calls == [(sent, "me", "p")]  # and no path of the command line
    assert config["method"] == "bayes" and config["metric"] == {"name": "val/qwk", "goal": "maximize"}
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 2, "eta": 3}
    assert config["parameters"] == {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "dropout_rate": {"distribution": "uniform", "min": 0.1, "max": 0.7},
        "batch_size": {"values": [8, 16, 32]},
        "loss": {"values": ["ce", "corn", "cdw", "emd"]},
    }
    assert config["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert toy.parse_args(config["command"][3:]).mode == "train"
    out = capsys.readouterr().out
    assert "sweep abc123" in out and "--mode sweep-agent --sweep-id abc123 --wandb-project p --wandb-entity me" in out


def test_sweep_offline(toy, server, monkeypatch, capsys):
    server.key = False
    assert call(toy, "--mode", "sweep") == 2
    error = error_of(capsys)
    assert error.startswith("error: wandb_sweep.yaml is written, for 'wandb sweep' where W&B can be reached: a sweep ")
    assert error.endswith("no API key (wandb login, or WANDB_API_KEY); --mode hyperopt searches without a server")
    assert Path("wandb_sweep.yaml").exists() and not server.calls
    server.key = True
    for words, env in ((["--wandb-mode", "offline"], {}), ([], {"WANDB_MODE": "disabled"})):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert call(toy, "--mode", "sweep", *words) == 2
        assert "but wandb is set to be offline" in error_of(capsys)
        assert call(toy, "--mode", "sweep-agent", "--sweep-id", "x", *words) == 2
        assert "a sweep agent needs the W&B server, but wandb is set to be offline" in error_of(capsys)
    assert call(toy, "--mode", "sweep-agent") == 2
    assert "needs --sweep-id ID" in error_of(capsys)
    assert not server.calls


@pytest.mark.slow
def test_sweep_agent(toy, server, capfd):
    """Every run in its own folder with the values of the server, but the command line's epochs."""
    server.runs = [("run1", {"lr": 1e-4, "optimizer": "sgd"}), ("run2", {"lr": "x"})]
    words = ["--mode", "sweep-agent", "--sweep-id", "abc123", "--sweep-count", 2, "--epochs", 3, "--lr", 0.01]
    assert call(toy, *words, "--output-dir", "out", "--wandb-entity", "me") == 0  # one of two has succeeded
    assert server.calls == [("abc123", "me", "csi-predictor", 2)]
    assert server.failed == ["the training ended with exit code 2"]
    out, err = capfd.readouterr()
    assert "sweep run run1: lr 0.0001, optimizer sgd -> out/sweeps/run1" in out
    assert "config-run2.yaml: lr is 'x' (a number was expected)" in err
    args = common.load_checkpoint(Path("out/sweeps/run1/models/last_model.pth"))["args"]
    assert (args["lr"], args["optimizer"], args["epochs"], args["monitor"]) == (1e-4, "sgd", 3, "qwk")
    assert args["wandb_project"] == "csi-predictor" and not Path("out/sweeps/run2").exists()


# ---- longer


@pytest.mark.slow
def test_a_trial_that_kills_its_workers(toy, home, monkeypatch):
    """Each process that takes it up dies: after three it is told as failed, and the others are done."""
    monkeypatch.setenv("TOY_TROUBLE", "crash 0002")
    process = start(toy, "--mode", "hyperopt", "--n-trials", 6, "--search-workers", 2, "--pruner", "none")
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and out.count("exit code -9") == 3, out
    assert [t.state.name for t in study_of().trials] == ["COMPLETE"] * 2 + ["FAIL"] + ["COMPLETE"] * 3
    assert study_of().trials[2].user_attrs["reason"] == "its process died 3 times before the next evaluation"


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_parent_is_stopped(toy, home, monkeypatch, sign):
    """Its workers end with it, by saving; the same command goes on."""
    monkeypatch.setenv("TOY_PACE", "0.2")
    words = ["--mode", "hyperopt", "--n-trials", 6, "--search-workers", 2, "--epochs", 8, "--pruner", "none"]
    process = start(toy, *words)
    wait_for(lambda: all(Path(f"hyperopt/trials/{n:04d}/logs/results.jsonl").exists() for n in (0, 1)))
    process.send_signal(sign)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 143)
    pids = [starts(n)[0][0] for n in (0, 1)]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    monkeypatch.setenv("TOY_PACE", "0")
    again = start(toy, *words)
    out = again.communicate(timeout=100)[0]
    assert again.returncode == 0, out
    trials = study_of().trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 6 and len(starts(0)) == len(starts(1)) == 2
    assert all([r["epoch"] for r in records(n)] == list(range(1, 9)) for n in range(6))


@pytest.mark.slow
def test_workers_report_a_mistake(toy, home, monkeypatch):
    monkeypatch.setenv("TOY_TROUBLE", "fail 0000")
    process = start(toy, "--mode", "hyperopt", "--n-trials", 6, "--search-workers", 2)
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    errors = [x for x in out.splitlines() if "error: " in x]
    assert len(errors) == 1 and "trial 0, with the values of the command line, failed: 20 steps" in errors[0]
