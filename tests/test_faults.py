"""Faults, injected for real into the five training scripts, evaluate.py and the preparations: killed and stopped
processes, cut and full files, poisoned steps, memory that ends. The last line of a run says how many.

Most of it is one table, SCRIPTS. A process is forked from one that has imported all scripts (`zygote`): with the
imports, which take longer than these runs, the matrix would take an hour.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_same_run, free_port, tensors_equal
from torch.utils.data import get_worker_info

import common
import finetune_siglip
import prepare_ct
import run_task2
import train_csi
import train_ctclip
import train_retclip

SCRIPTS = {  # name: module, fixture of its data, its arguments, steps of a long run
    "siglip": (finetune_siglip, "tiny_ct", conftest.tiny_args, 16),
    "task2": (run_task2, "tiny_slices", conftest.slice_args, 14),
    "ctclip": (train_ctclip, "tiny_reports", conftest.report_args, 20),
    "retclip": (train_retclip, "tiny_fundus", conftest.fundus_args, 20),
    "csi": (train_csi, "tiny_films", conftest.film_args, 20),
}
KEEP = ["--top-k", 3, "--early-stopping-patience", 99, "--save-every", 1, "--resume", "auto"]
WAIT = 120  # seconds after which a process is said to hang; not what anything is expected to take


@dataclasses.dataclass
class Script:
    module: object
    data: Path
    args: object
    steps: int

    def words(self, out, *more) -> list[str]:
        return [str(w) for w in self.args(self.data, out, *more)]

    def call(self, out, *more) -> int:
        """Run in this process: the exit code."""
        return common.run_main(lambda: self.module.main(self.words(out, *more)[1:]))

    def last(self, out) -> Path:
        return common.last_files(Path(out) / self.module.LAST)[0]

    def state(self, out) -> dict:
        return common.load_checkpoint(self.last(out))


@pytest.fixture(params=SCRIPTS)
def script(request) -> Script:
    return script_of(request, request.param)


# The loop is one text: the scripts with large checkpoints have the rest of the matrix in the slow part.
CORE = [pytest.param(n, marks=[pytest.mark.slow] if n in ("task2", "csi") else []) for n in SCRIPTS]
of_core = pytest.mark.parametrize("script", CORE, indirect=True)


def script_of(request, name: str) -> Script:
    module, data, args, steps = SCRIPTS[name]
    return Script(module, request.getfixturevalue(data), args, steps)


COUNT = [0]


def injected(n: int = 1) -> None:
    COUNT[0] += n


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Beside other tests two threads of an evaluation would wait for each other most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "EVAL_THREADS", 1)
        yield


@pytest.fixture(autouse=True)
def counted(record_property):
    """conftest.py adds these up, over the processes of pytest-xdist too."""
    yield
    record_property("faults", COUNT[0])
    COUNT[0] = 0


def said(capsys) -> str:
    """The one line that ended a run; no traceback, no second error."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def files_of(folder) -> dict[str, bytes]:
    """What a run must not lose: everything but its logs, which say what was tried."""
    names = [p for p in Path(folder).rglob("*") if p.is_file() and not re.search(r"\.log$|params_|\.lock", p.name)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in names}


def temporaries(folder) -> list[Path]:
    return [p for p in Path(folder).rglob(".*.tmp*")]


# ==== Processes ================================================================================================

ZYGOTE = """
import json, os, sys, time
sys.path[:0] = [%r]
import common, evaluate, finetune_siglip, prepare_ct, prepare_retclip, run_task2, train_csi, train_ctclip, train_retclip
common.EVAL_THREADS = 1
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        pid, status = os.waitpid(job["pid"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "none", flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
for number, path in enumerate([os.devnull, job["out"], job["text"]]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
os.environ.update(job["env"])
script = sys.modules[job["words"][0].removesuffix(".py")]
sys.argv = job["words"]
exec(job["code"])
sys.exit(common.run_main(lambda: script.main(job["words"][1:])))
"""


class Zygote:
    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", ZYGOTE % str(ROOT)], cwd=ROOT, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **job) -> str:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def start(self, words, text: Path, world: int = 1, code: str = "", out: Path | None = None) -> list["Child"]:
        """The ranks of a script, as torchrun starts them; out: where standard output goes, if not to `text` too."""
        port, children = str(free_port()), []
        for rank in range(world):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            env = {k: str(v) for k, v in ranks.items()} | {"MASTER_PORT": port} if world > 1 else {}
            files = {"text": f"{text}.{rank}", "out": str(out or f"{text}.{rank}")}
            pid = self.ask(words=[str(w) for w in words], env=env, code=code, **files)
            children.append(Child(self, int(pid), Path(f"{text}.{rank}")))
        return children


class Child:
    def __init__(self, zygote, pid: int, text: Path):
        self.zygote, self.pid, self.path, self.code = zygote, pid, text, None

    def poll(self) -> int | None:
        if self.code is None:
            answer = self.zygote.ask(pid=self.pid)
            self.code = None if answer == "none" else int(answer)
        return self.code

    def wait(self) -> int:
        until(lambda: self.poll() is not None, [], self)
        return self.code

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def text(self) -> str:
        return self.path.read_text() if self.path.exists() else ""


def until(true, alive, what="") -> None:
    """Wait until `true()`; the children `alive` must not end before."""
    end = time.monotonic() + WAIT
    while not true():
        ended = [child for child in alive if child.poll() is not None]
        assert not ended or true(), f"{what}: ended with {ended[0].code}\n{ended[0].text[-3000:]}"
        assert time.monotonic() < end, f"{what}: nothing for {WAIT} s\n{getattr(what, 'text', '')[-3000:]}"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait(WAIT)


def log_of(out) -> str:
    return "".join(p.read_text() for p in [*out.rglob("training.log"), *out.rglob("out_*.log")])


def reached(text: str, step: int) -> bool:
    return any(int(n) >= step for n in re.findall(r"Step (\d+)/", text))


def kill_at(moment: str, step: int, script, out, children, rng) -> None:
    """SIGKILL once the run is at `step`, or at the next thing of this kind after it."""
    if moment == "evaluation":
        step = 4 * -(-step // 4)  # it is logged, then evaluated
    until(lambda: reached(children[0].text, step), children, out)
    if moment == "saving":
        until(lambda: temporaries(out), children, out)
    elif moment == "results":  # after the record of an evaluation, before its checkpoint
        file = out / script.module.RESULTS.format(version=0)
        size = file.stat().st_size if file.exists() else 0
        until(lambda: file.exists() and file.stat().st_size > size, children, out)
    elif moment != "evaluation" or rng.random() < 0.5:
        time.sleep(rng.uniform(0, 0.2))
    victims = [rng.choice(children)] if moment == "lone rank" else rng.sample(children, len(children))
    for child in victims:
        child.send(signal.SIGKILL, group=rng.random() < 0.5)  # with its data workers, or these are left alone
    injected()
    for child in children:
        code = child.wait()
        assert code == -9 if child in victims else code == 1 and "another rank ended" in child.text, child.text
        assert child in victims or "Traceback" not in child.text, child.text


MOMENTS = ["step", "saving", "results", "evaluation", "lone rank"]


def kill_and_continue(zygote, script, out, moments, world, workers, seed) -> None:
    """Start, kill, start again, as often as there are moments; then to the end."""
    rng = random.Random(seed)
    words = script.words(out, *KEEP, *MORE, "--num-workers", workers, "--max-steps", script.steps)
    for n, moment in enumerate(rng.sample(moments, len(moments))):
        step = 1 + n * (script.steps - 6) // len(moments) + rng.randrange(2)
        children = zygote.start(words, out.with_name(f"{out.name}_{n}"), world)
        kill_at(moment, step, script, out, children, rng)
    (script.last(out).parent / ".x.pth.tmp123").write_bytes(b"half")  # if no kill hit a save
    end = zygote.start(words, out.with_name(f"{out.name}_end"), world)
    assert [child.wait() for child in end] == [0] * world, end[0].text
    assert not temporaries(out)


MORE = ["--use-ema", "--eval-every", 4]  # of the long runs


@pytest.fixture(scope="module")
def whole(request, zygote, tmp_path_factory):
    """Folders of uninterrupted long runs, made once: whole(script, world)."""
    made = {}

    def get(script: Script, world: int = 1) -> Path:
        key = script.module.TASK, script.steps, world
        if key not in made:
            made[key] = out = tmp_path_factory.mktemp("whole") / "run"
            words = script.words(out, *KEEP, *MORE, "--max-steps", script.steps)
            ended = zygote.start(words, out.parent / "text", world)
            assert [child.wait() for child in ended] == [0] * world, ended[0].text
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_ends_equal(script, zygote, whole, tmp_path, world):
    """20 kills a script over the matrix: world 1 and 2, data workers 0 and 2."""
    for workers in (0, 2):
        out = tmp_path / f"workers{workers}"
        kill_and_continue(zygote, script, out, MOMENTS, world, workers, f"{script.module.TASK} {world} {workers}")
        assert_same_run(whole(script, world), out, script.module)


def refused_beside(script, out, capsys, children) -> None:
    """A second job in the folder of a run that goes on, whether it wants to continue it or to begin anew."""
    until(lambda: reached(children[0].text, 1), children, out)
    children[0].send(signal.SIGSTOP)  # or it might end before the second has begun
    for more in (["--resume", "auto"], ["--overwrite"]):
        assert script.call(out, "--max-steps", 99, *more) == 2
        assert "another run is writing here" in said(capsys)
        injected()
    children[0].send(signal.SIGCONT)


def test_one_script_killed_and_continued(request, zygote, whole, tmp_path, capsys):
    """The core of the matrix: a second job refused, then kills in a step, in a save and after an evaluation."""
    script, out = dataclasses.replace(script_of(request, "siglip"), steps=10), tmp_path / "run"
    words = script.words(out, *KEEP, *MORE, "--max-steps", script.steps)
    children = zygote.start(words, tmp_path / "text")
    refused_beside(script, out, capsys, children)
    kill_at("step", 3, script, out, children, random.Random(0))
    kill_and_continue(zygote, script, out, ["saving", "results"], 1, 0, "core")
    assert_same_run(whole(script), out, script.module)


@pytest.mark.slow
def test_a_second_job_is_refused(script, zygote, whole, tmp_path, capsys):
    words = script.words(tmp_path / "run", *KEEP, *MORE, "--max-steps", script.steps)
    children = zygote.start(words, tmp_path / "text")
    refused_beside(script, tmp_path / "run", capsys, children)
    assert children[0].wait() == 0
    assert_same_run(whole(script), tmp_path / "run", script.module)


@pytest.mark.slow
def test_signals_save_and_exit_143(script, zygote, whole, tmp_path):
    """SIGTERM to all, SIGUSR1 to one rank, SIGINT to all and their data workers, one after the other in one run."""
    out = tmp_path / "run"
    words = script.words(out, *KEEP, *MORE, "--max-steps", script.steps, "--num-workers", 1, "--save-every", 1000)
    for n, number in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        children = zygote.start(words, tmp_path / f"text{n}", 2)
        until(lambda n=n, rank=children[0]: reached(rank.text, 1 + 3 * n), children, out)
        for child in children[1:] if number == signal.SIGUSR1 else children:
            child.send(number, group=number == signal.SIGINT)
            injected()
        assert [child.wait() for child in children] == [143, 143], children[0].text
        name = "a signal on another rank" if number == signal.SIGUSR1 else number.name
        step = re.findall(rf"{name}: saved at step (\d+)", log_of(out))[-1]
        assert script.state(out)["state"]["step"] == int(step) and not temporaries(out)
    children = zygote.start(words, tmp_path / "end", 2)
    assert [child.wait() for child in children] == [0, 0], children[0].text
    assert_same_run(whole(script, 2), out, script.module)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others(script, zygote, tmp_path):
    out = tmp_path / "run"
    more = ["--max-steps", 10**6, "--eval-every", 10**6, "--timeout-minutes", 0.15]
    children = zygote.start(script.words(out, *more), tmp_path / "text", 2)
    until(lambda: reached(children[0].text, 2), children, out)
    children[1].send(signal.SIGSTOP)
    injected()
    assert children[0].wait() == 1
    lines = [line for line in children[0].text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "silent for --timeout-minutes" in lines[0], children[0].text
    assert "Traceback" not in children[0].text
    children[1].send(signal.SIGKILL)
    assert children[1].wait() == -9


def ranks_of(launcher: int) -> dict[str, int]:
    """RANK -> process, of those that torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                words = (folder / "environ").read_bytes().decode().split("\0")
                found[next(w for w in words if w.startswith("RANK=")).removeprefix("RANK=")] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip", "retclip"])  # one of each form of `forward_backward`
def test_torchrun_goes_on_after_a_rank_has_died(request, name, whole, tmp_path):
    script, out = script_of(request, name), tmp_path / "run"
    words = script.words(out, *KEEP, *MORE, "--max-steps", script.steps)
    program = tmp_path / words[0]
    lines = ["import sys", f"sys.path[0] = {str(ROOT)!r}", "import common", "common.EVAL_THREADS = 1"]  # as `whole`
    lines += [f"import {script.module.__name__} as script", "sys.exit(common.run_main(script.main))"]
    program.write_text("\n".join(lines))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
    launcher += ["--master_port", str(free_port()), str(program)]
    with (tmp_path / "text").open("w") as file:
        process = subprocess.Popen([*launcher, *words[1:]], cwd=ROOT, stdout=file, stderr=file,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        end = time.monotonic() + WAIT
        while not reached(log_of(out), 5) and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(ranks_of(process.pid)["1"], signal.SIGKILL)
        injected()
        assert process.wait(WAIT) == 0, (tmp_path / "text").read_text()[-3000:]
    finally:
        for pid in [*ranks_of(process.pid).values(), *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
    assert "resumed at step" in log_of(out)
    assert_same_run(whole(script, 2), out, script.module)


def reading(script, monkeypatch, action, part: int = 0) -> None:
    """Call `action()` in a data worker before a sample is read: of the training (0) or the validation data (1)."""
    build = script.module.build_datasets

    def build_datasets(args):
        both = build(args)
        kind = type(both[part])

        def read(self, key):
            if get_worker_info() is not None:
                action()
            return kind.__getitem__(self, key)

        both[part].__class__ = type(kind.__name__, (kind,), {"__getitem__": read})
        return both

    monkeypatch.setattr(script.module, "build_datasets", build_datasets)


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_data_worker_is_named(script, tmp_path, monkeypatch, capsys):
    reading(script, monkeypatch, kill_myself)
    assert script.call(tmp_path / "run", "--num-workers", 1) == 1
    line = said(capsys)
    assert re.search(r"DataLoader worker \(pid.*\d+\).*(killed|exited)", line) and "--num-workers" in line
    assert not list(tmp_path.rglob("*.pt*")) and not list(tmp_path.rglob("*.ckpt"))
    injected()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hangs", "needs too much memory", "is killed in an evaluation"])
def test_a_data_worker_that(script, tmp_path, monkeypatch, capsys, kind):
    action, wanted = {
        "hangs": (lambda: time.sleep(WAIT), r"timed out after .*--num-workers 0"),
        "needs too much memory": (lambda: np.empty(10**15), r"MemoryError in DataLoader worker.*lower --num-workers"),
        "is killed in an evaluation": (kill_myself, r"DataLoader worker \(pid.*--num-workers"),
    }[kind]
    reading(script, monkeypatch, action, part="evaluation" in kind)
    timeout = 0.03 if kind == "hangs" else 2
    assert script.call(tmp_path / "run", "--num-workers", 1, "--timeout-minutes", timeout, "--max-steps", 1) == 1
    assert re.search(wanted, said(capsys))
    injected()


# ==== Steps that are not finite ================================================================================


def nan_input(net):
    """The next forward pass multiplies what enters batch-norm, the codebook or the first layer norm by NaN."""
    modules = list(getattr(net, "module", net).modules())
    kinds = [torch.nn.BatchNorm2d, getattr(train_ctclip, "Codebook", None), torch.nn.LayerNorm]
    layer = next(m for kind in kinds if kind for m in modules if isinstance(m, kind))
    return layer.register_forward_pre_hook(lambda m, x: (x[0] * torch.nan, *x[1:]))


def poison(compute_loss, faults: dict):
    """compute_loss whose n-th call (from 1) goes wrong as `faults[n]` says."""
    calls = [0]

    def poisoned(net, batch, criterion):
        calls[0] += 1
        fault, hook = faults.get(calls[0]), None
        if fault == "activation":
            hook = nan_input(net)
        loss, logs = compute_loss(net, batch, criterion)
        if hook:
            hook.remove()
        if fault == "gradient":  # of a loss that is finite
            loss = loss * 1
            loss.register_hook(lambda slope: slope * torch.nan)
        if callable(fault):
            fault()
        number = {"nan": torch.nan, "infinite": torch.inf}.get(fault, 1.0)
        if fault == "loss alone":  # its gradient is finite
            loss = loss + torch.nan
        if fault:
            injected()
        return loss * number, logs

    return poisoned


FAULTS = {2: "nan", 3: "activation", 4: "gradient", 6: "infinite", 7: "loss alone", 8: "nan", 9: "gradient"}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """What a run of which most steps fail leaves, made once a script: 1 and 5 are good, 6 to 9 end it."""
    made = {}

    def get(script: Script):
        if script.module.TASK in made:
            return made[script.module.TASK]
        module, out, before, averaged = script.module, tmp_path_factory.mktemp(script.module.TASK) / "run", {}, []
        loss = poison(module.compute_loss, FAULTS)

        def compute_loss(net, batch, criterion):
            state = getattr(net, "module", net).state_dict()
            before[len(before) + 1] = {k: v.clone() for k, v in state.items() if v.is_floating_point()}
            return loss(net, batch, criterion)

        class EMA(module.EMA):
            def update(self, model, updates):
                averaged.append(updates)
                super().update(model, updates)

        more = ["--use-ema", "--max-steps", 20, "--eval-every", 20, "--save-every", 1, "--max-bad-steps", 4]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "compute_loss", compute_loss)
            patch.setattr(module, "EMA", EMA)
            code = script.call(out, *more, "--top-k", 3)
        made[script.module.TASK] = out, code, before, averaged
        return made[script.module.TASK]

    return get


@pytest.mark.parametrize("script", [*CORE[:1], "task2", *CORE[2:]], indirect=True)  # batch-norm's statistics too
def test_bad_steps_are_skipped_and_counted_and_end_the_run(script, poisoned, capsys):
    out, code, before, averaged = poisoned(script)
    assert code == 2 and "4 steps in a row were not finite" in said(capsys)
    assert [n for n in range(1, 9) if not tensors_equal(before[n], before[n + 1])] == [1, 5]  # batch-norm's too
    assert averaged == [1, 2] and log_of(out).count("step skipped") == len(FAULTS)
    files = common.last_files(out / script.module.LAST)
    saved = [common.load_checkpoint(file) for file in files]
    assert [s["state"]["step"] for s in saved] == [5, 1], "saved while steps failed"
    assert [s["state"]["updates"] for s in saved] == [2, 1]
    for part in (x for s in saved for x in (s["model"], s["ema"])):
        assert all(v.isfinite().all() for v in part.values())


@pytest.fixture(scope="module")
def trained(poisoned):
    """That run continued to a good end at step 6: trained(script). Not to be changed; `copy_of` makes copies."""
    done = set()

    def get(script: Script) -> Path:
        out = poisoned(script)[0]
        if out not in done:
            assert script.call(out, "--use-ema", "--resume", "auto", "--top-k", 3, "--max-steps", 6) == 0
            done.add(out)
        return out

    return get


def copy_of(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target)  # with the times of the files, by which `auto` chooses


def damage(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
    injected()


CONTINUED = ["--use-ema", "--resume", "auto", "--top-k", 3]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_burst_are_not_saved(script, tmp_path, capsys, zygote, world):
    """A rate at which the first steps leave weights that are not finite: the run ends, what was saved loads."""
    words = script.words(tmp_path / "run", "--lr", "1e38", "--warmup", 0, "--max-grad-norm", "inf", "--optimizer",
                         "sgd", "--save-every", 1, "--eval-every", 1000, "--max-bad-steps", 3)  # fmt: skip
    words = [w for i, w in enumerate(words) if "--optimizer" not in words[max(0, i - 1) : i + 1]]
    children = zygote.start(words, tmp_path / "text", world)
    assert children[0].wait() == 2 and [child.wait() for child in children]
    assert re.search(r"^error: .*(not|no longer) finite.*--lr", children[0].text, re.M), children[0].text
    for path in common.last_files(tmp_path / "run" / script.module.LAST):
        assert all(v.isfinite().all() for v in common.load_checkpoint(path)["model"].values())
    injected()


ONE_RANK = """
import torch
whole, calls = script.compute_loss, [0]
def compute_loss(net, batch, criterion):
    loss, logs = whole(net, batch, criterion)
    calls[0] += 1
    bad = calls[0] in (3, 4) and os.environ["RANK"] == "1"
    return loss * (float("nan") if bad else 1.0), logs
finish = script.finish
def finish_and_tell(args, ctx, model, *rest):
    torch.save(model.state_dict(), f"{args.output_dir}.{ctx.rank}.pt")
    return finish(args, ctx, model, *rest)
script.compute_loss, script.finish = compute_loss, finish_and_tell
"""


@pytest.mark.slow
def test_nan_on_one_rank_is_skipped_on_both(script, zygote, tmp_path):
    out = tmp_path / "run"
    words = script.words(out, *KEEP, *MORE, "--max-steps", 6, "--check-ranks")
    children = zygote.start(words, tmp_path / "text", 2, ONE_RANK)
    injected(2)
    assert [child.wait() for child in children] == [0, 0], children[0].text + children[1].text
    assert script.state(out)["state"]["updates"] == 4 and log_of(out).count("step skipped") == 2
    one, other = (torch.load(f"{out}.{rank}.pt", weights_only=True) for rank in (0, 1))
    parameters = [k for k in one if "running_" not in k and "num_batches" not in k]  # statistics are of each rank
    assert all(torch.equal(one[k], other[k]) and one[k].isfinite().all() for k in parameters)


FAILS = """
def compute_loss(net, batch, criterion, whole=script.compute_loss):
    if os.environ["RANK"] == "1":
        raise %s
    return whole(net, batch, criterion)
script.compute_loss = compute_loss
"""


@pytest.mark.parametrize("error, code, line", [
    ("common.UserError('what went wrong')", 2, "error: what went wrong"),
    ("ZeroDivisionError('unknown')", 1, "ZeroDivisionError: unknown"),
])  # fmt: skip
def test_a_rank_that_fails_says_so_and_leaves(request, zygote, tmp_path, error, code, line):
    """It does not wait for the others, which are in a reduction of gradients; they end when it has gone."""
    words = script_of(request, "siglip").words(tmp_path / "run", "--max-steps", 2)
    children = zygote.start(words, tmp_path / "text", 2, FAILS % error)
    assert [child.wait() for child in children] == [1, code]
    assert line in children[1].text.splitlines() and "another rank ended" in children[0].text
    injected()


FP16 = ["--amp", "fp16", "--eval-every", 1000, "--save-every", 1, "--max-bad-steps", 2]


@pytest.mark.parametrize("name", ["siglip", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SCRIPTS)[1:])])
def test_fp16_overflow_lowers_the_scale_and_is_no_bad_step(request, name, tmp_path, monkeypatch, capsys):
    """Gradients really beyond 65504: more skipped steps than --max-bad-steps, until the scale fits; then NaN."""
    script, module = script_of(request, name), SCRIPTS[name][0]
    loss, calls = module.compute_loss, [0]

    def compute_loss(net, batch, criterion):
        calls[0] += 1
        value, logs = loss(net, batch, criterion)
        return value * (300 if calls[0] < 14 else torch.nan), logs

    monkeypatch.setattr(module, "compute_loss", compute_loss)
    assert script.call(tmp_path / "run", *FP16, "--max-steps", 40) == 2
    assert "2 steps in a row" in said(capsys) and calls[0] == 15
    saved, skipped = script.state(tmp_path / "run"), log_of(tmp_path / "run").count("step skipped") - 2
    assert skipped >= 3 and saved["state"]["updates"] == saved["state"]["step"] - skipped == 13 - skipped
    assert saved["scaler"]["scale"] == 65536 / 2**skipped
    assert all(v.isfinite().all() for v in saved["model"].values())
    injected(skipped + 2)


# ==== Files ====================================================================================================


@of_core
def test_damaged_checkpoints(script, trained, tmp_path, capsys):
    """An explicit path fails, naming the file; --resume auto takes the one before, and ends with the same bits."""
    out = copy_of(trained(script), tmp_path / "run")
    last = script.last(out)
    content = last.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    capsys.readouterr()
    for bad in (content[: len(content) // 2], content[:-1000], b"", bytes(flipped)):
        damage(last, bad)
        assert script.call(out, *CONTINUED[:1], "--resume", last, "--max-steps", 6) == 2
        assert str(last) in said(capsys)
    assert script.call(out, *CONTINUED, "--max-steps", 6) == 0
    assert re.search(r"^warning: .*continuing from", capsys.readouterr().err, re.M)
    assert_same_run(trained(script), out, script.module)
    for path in common.last_files(out / script.module.LAST):
        damage(path, b"PK")
    assert script.call(out, *CONTINUED, "--max-steps", 6) == 2
    said(capsys)


def test_a_run_goes_on_from_an_older_checkpoint(request, trained, tmp_path, capsys):
    """--resume FILE gives the later one up: `auto` does not go back to it, and the next save keeps what was chosen.
    The same where the later one is damaged: the whole one is not replaced by it."""
    script = script_of(request, "siglip")
    for kind in ("given up", "damaged"):
        out = copy_of(trained(script), tmp_path / kind)
        last = script.last(out)
        previous = common.previous_of(last)
        content, step = previous.read_bytes(), common.load_checkpoint(previous)["state"]["step"]
        if kind == "damaged":
            damage(last, b"PK")
        for resume in ("auto" if kind == "damaged" else previous, "auto"):  # twice, as if killed before a save
            args = script.module.parse_args(script.words(out, "--resume", resume)[1:])
            assert common.find_resume(args, script.module.LAST)["state"]["step"] == step == 5
        assert last.read_bytes() == (b"PK" if kind == "damaged" else (trained(script) / last.name).read_bytes())
        assert script.call(out, *CONTINUED, "--max-steps", 6) == 0
        assert previous.read_bytes() == content and script.state(out)["state"]["step"] == 6
        assert_same_run(trained(script), out, script.module)


@contextlib.contextmanager
def files_up_to(size: int):
    """Writing more than this into a file fails as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@of_core
def test_full_disk_while_saving(script, trained, tmp_path, capsys):
    out = copy_of(trained(script), tmp_path / "run")
    before = files_of(out)
    capsys.readouterr()
    with files_up_to(300_000):
        assert script.call(out, *CONTINUED, "--max-steps", 9, "--save-every", 1, "--eval-every", 99) == 2
    injected()
    assert re.search(r"could not be written: File too large \(\d+ MiB free; the old file is untouched", said(capsys))
    assert files_of(out) == before and script.state(out)["state"]["step"] == 6


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes): a file system of this size; only root may mount one."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a file system (the same by a limit of the process: test_full_disk_while_saving)")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [100, 0.5, 2.2])
def test_a_disk_that_is_really_full(script, trained, tmp_path, capsys, small_disk, room):
    """Bytes that are left beside an earlier run (below 10: times its checkpoint): one line, and the run is intact."""
    size = sum(p.stat().st_size for p in trained(script).rglob("*") if p.is_file() and p.stat().st_nlink == 1) * 2
    disk = small_disk(size + 2**20)
    shutil.copytree(trained(script), disk / "run")
    before, state = files_of(disk / "run"), script.state(disk / "run")
    wanted = int(room * script.last(disk / "run").stat().st_size) if room < 10 else room
    filler = shutil.disk_usage(disk).free - wanted
    (disk / "filler").write_bytes(bytes(max(0, filler)))
    capsys.readouterr()
    words = ["--max-steps", 12, "--save-every", 1, "--eval-every", 2]
    code = script.call(disk / "run", *CONTINUED, *words)
    injected()
    after = {k: v for k, v in files_of(disk / "run").items() if k in before}
    if code:
        assert code == 2 and "No space left" in said(capsys)
    assert not temporaries(disk) and script.state(disk / "run")["state"]["step"] >= state["state"]["step"]
    changed = [k for k in before if after.get(k) != before[k]]
    assert not changed or room in (0.5, 2.2), changed
    (disk / "filler").unlink()
    assert script.call(disk / "run", *CONTINUED, *words) == 0


CAP_DAC_OVERRIDE = 1


@contextlib.contextmanager
def without_root():
    """root may write anywhere; here this thread gives that right up for a while."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    now, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, now) == 0
    less[:] = now
    less[0] &= ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, now) == 0


@of_core
def test_read_only_folder_is_known_before_the_first_step(script, trained, tmp_path, capsys, monkeypatch):
    out = copy_of(trained(script), tmp_path / "run")
    before, folders = files_of(out), [out, *(p for p in out.rglob("*") if p.is_dir())]
    steps = []
    monkeypatch.setattr(script.module, "compute_loss", lambda *a: steps.append(a))
    capsys.readouterr()
    for some in (folders, [script.last(out).parent]):
        for folder in some:
            folder.chmod(0o555)
        try:
            with without_root():
                with pytest.raises(PermissionError):
                    (some[0] / "probe").touch()
                assert script.call(out, *CONTINUED, "--max-steps", 9) == 2
        finally:
            for folder in some:
                folder.chmod(0o755)
        assert re.search("could not be|written", said(capsys))
        injected()
    assert not steps and files_of(out) == before
    (tmp_path / "file").write_bytes(b"")
    assert script.call(tmp_path / "file" / "run") == 2
    said(capsys)


@of_core
def test_a_mistake_with_overwrite_costs_no_earlier_run(script, trained, tmp_path, capsys):
    out = copy_of(trained(script), tmp_path / "run")
    before = files_of(out)
    capsys.readouterr()
    elsewhere = dataclasses.replace(script, data=tmp_path / "nowhere")
    for who, more in ((elsewhere, []), (script, ["--pretrained", tmp_path / "none.pth"])):
        assert who.call(out, *more, "--overwrite", "--max-steps", 1) == 2
        said(capsys)
        assert files_of(out) == before
        injected()


def test_order_of_a_save(tmp_path, monkeypatch):
    """The file is on the disk before its name moves, and the name before the save is over."""
    done, names = [], {}
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(*a, name=name, real=real):
            done.append((name, os.readlink(f"/proc/self/fd/{a[0]}") if name == "fsync" else str(a[1])))
            return real(*a)

        monkeypatch.setattr(os, name, call)
    checkpoint = {"task": "x", "args": {}, "model": {"w": torch.zeros(3)}, "state": {"step": 1}}
    path = tmp_path / "last.pth"
    common.save_last(path, checkpoint)
    temporary = str(path.with_name(f".last.pth.tmp{os.getpid()}"))
    order = [("fsync", temporary), ("replace", str(path)), ("fsync", str(tmp_path))]
    assert done == order
    done.clear()
    common.save_last(path, checkpoint)
    assert done == [order[0], ("replace", str(common.previous_of(path))), *order[1:]] and not names


def test_what_a_kill_leaves_half_written_is_removed(zygote, tmp_path):
    """Not what another program still writes, nor files of others."""
    code = "path = os.path.dirname(job['text'])\nwhile True: common.write_atomic(path + '/x', bytes(10**8))"
    child = zygote.start(["evaluate.py"], tmp_path / "text", code=code)[0]
    until(lambda: temporaries(tmp_path), [child], child)
    common.remove_stale([tmp_path])
    child.send(signal.SIGSTOP)
    until(lambda: temporaries(tmp_path) or child.send(signal.SIGCONT) or child.send(signal.SIGSTOP), [], child)
    common.remove_stale([tmp_path])
    assert temporaries(tmp_path), "removed while it was written"
    child.send(signal.SIGKILL)
    assert child.wait() == -9
    injected()
    (tmp_path / ".mine.tmp").write_text("")
    common.remove_stale([tmp_path])
    assert [p.name for p in temporaries(tmp_path)] == [".mine.tmp"]


# ==== Memory ===================================================================================================


def cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")


OUT_OF_MEMORY = {"torch": lambda: torch.empty(10**15), "numpy": lambda: np.empty(10**15), "cuda": cuda_memory}


@of_core
def test_out_of_memory_says_what_keeps_the_batch(script, trained, tmp_path, monkeypatch, capsys):
    out = copy_of(trained(script), tmp_path / "run")
    before, loss, size = files_of(out), script.module.compute_loss, 8 if script.module is run_task2 else 4
    capsys.readouterr()
    for kind, what in (("torch", "memory"), ("cuda", "GPU memory")) if size == 4 else (("torch", "memory"),):
        monkeypatch.setattr(script.module, "compute_loss", poison(loss, {1: OUT_OF_MEMORY[kind]}))
        assert script.call(out, *CONTINUED, "--max-steps", 8) == 1
        injected()
        line = said(capsys)
        assert line.startswith(f"error: out of {what}: ") and line.endswith("; or --grad-checkpointing)")
        assert f"(--batch-size {size // 2} --accum-steps 2, the same effective batch" in line
        assert files_of(out) == before


@pytest.mark.slow
def test_the_advice_after_out_of_memory_works(script, trained, tmp_path, monkeypatch, capsys):
    """Half the batch and twice the micro-steps continue the run; an evaluation has its own flag."""
    out = copy_of(trained(script), tmp_path / "run")
    half = ["--batch-size", 4 if script.module is run_task2 else 2, "--accum-steps", 2]
    assert script.call(out, *CONTINUED, *half, "--grad-checkpointing", "--max-steps", 7) == 0
    capsys.readouterr()
    n = half[1] * 2

    def evaluate(*a):
        return np.empty(10**15)

    monkeypatch.setattr(script.module, "evaluate", evaluate)
    injected()
    assert script.call(out, *CONTINUED, "--max-steps", 8) == 1
    assert f"--eval-batch-size {n // 2})" in said(capsys)


# ==== evaluate.py and the preparations =========================================================================


def scores(folder: Path) -> list:
    rng = np.random.default_rng(0)
    ids = [f"case{i}" for i in range(400)]
    for name, values in (("preds", rng.random((400, 2)).round(3)), ("labels", rng.integers(0, 2, (400, 2)))):
        columns = ["a_prob", "b_prob"] if name == "preds" else ["a", "b"]
        pd.DataFrame(values, columns=columns).assign(id=ids).to_csv(folder / f"{name}.csv", index=False)
    files = ["--predictions", folder / "preds.csv", "--labels", folder / "labels.csv"]
    return ["evaluate.py", *files, "--n-bootstrap", 50]


def numbers_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if k != "provenance"}


def test_evaluation_on_a_full_disk(tmp_path, capsys):
    import evaluate

    words, out = [str(w) for w in scores(tmp_path)[1:]] + ["--output", str(tmp_path / "eval")], tmp_path / "eval"
    assert common.run_main(lambda: evaluate.main(words)) == 0
    before = files_of(out)
    capsys.readouterr()
    smallest = min(map(len, before.values()))
    for size in (smallest - 1, smallest + 1):
        with files_up_to(size):
            assert common.run_main(lambda: evaluate.main(words)) == 2
        injected()
        assert "could not be written" in said(capsys) and files_of(out).keys() == before.keys()
        assert files_of(out)["results.json"] == before["results.json"]  # the last to be written


@pytest.mark.slow
def test_evaluation_killed_at_random_moments(zygote, tmp_path):
    words, rng, killed = [*scores(tmp_path), "--output"], random.Random(0), 0
    start = time.monotonic()
    assert zygote.start([*words, tmp_path / "whole"], tmp_path / "text")[0].wait() == 0
    spent, out = time.monotonic() - start, tmp_path / "run"
    for n in range(10):
        child = zygote.start([*words, out], tmp_path / f"text{n}")[0]
        if n % 2:
            time.sleep(rng.uniform(0, spent))
        else:
            until(lambda: temporaries(out) or child.poll() is not None, [], child)  # noqa: B023
        child.send(signal.SIGKILL) if child.poll() is None else None
        killed += child.wait() == -9
        for path in out.glob("[a-z]*"):
            same = path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
            assert same or path.suffix in (".json", ".html")  # which have the date
            assert path.suffix != ".json" or numbers_of(out) == numbers_of(tmp_path / "whole")
            assert path.suffix != ".html" or path.read_text().rstrip().endswith("</html>")
    injected(killed)
    assert killed >= 5
    assert zygote.start([*words, out], tmp_path / "end")[0].wait() == 0
    assert numbers_of(out) == numbers_of(tmp_path / "whole") and not temporaries(out)


def cache_words(tiny_ct, out) -> list[str]:
    words = ["cache", "--csv", tiny_ct / "t.csv", "--out", out, "--num-slices", 8, "--image-size", 16]
    return [str(w) for w in [*words, "--num-workers", 0]]


def test_preparation_of_ct_on_a_full_disk(tiny_ct, tmp_path, capsys):
    """The arrays, then the journal, do not fit; the same command continues, with the same files in the end."""
    assert common.run_main(lambda: prepare_ct.main(cache_words(tiny_ct, tmp_path / "whole"))) == 0
    out, sizes = tmp_path / "run", []
    for size in (1000, 6000):
        capsys.readouterr()
        with files_up_to(size):
            assert common.run_main(lambda: prepare_ct.main(cache_words(tiny_ct, out))) == 2
        injected()
        assert re.search("File too large|the disk may be full", said(capsys)) and not temporaries(out)
        sizes.append(len(list(out.glob("*.npy"))))
    assert sizes[0] == 0 < sizes[1] < 26
    assert common.run_main(lambda: prepare_ct.main(cache_words(tiny_ct, out))) == 0
    arrays = [{p.name: p.read_bytes() for p in folder.glob("*.[nc]*")} for folder in (out, tmp_path / "whole")]
    assert len(arrays[0]) >= 27 and arrays[0] == arrays[1]


@pytest.mark.slow
def test_preparation_of_ct_on_a_disk_that_is_really_full(tiny_ct, tmp_path, capsys, small_disk):
    disk = small_disk(80_000)
    assert common.run_main(lambda: prepare_ct.main(cache_words(tiny_ct, disk / "run"))) == 2
    assert re.search("No space left|the disk may be full", said(capsys)) and not temporaries(disk)
    injected()
    subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
    assert common.run_main(lambda: prepare_ct.main(cache_words(tiny_ct, disk / "run"))) == 0
