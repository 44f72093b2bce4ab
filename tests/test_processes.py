"""One training on 1, 2, 3 and 4 processes, with and without accumulation: the same steps, the same evaluation.

All runs of this file are made by one other process, which imports the scripts once and forks the ranks (imports take
longer than these runs); the tests compare. "Where it can hold": no dropout, no augmentation, batch norm with fixed
statistics, plain SGD, since Adam makes steps of full size out of gradients that are zero but for rounding, and a CNN in
double precision, since rounding decides about some ReLUs and maxima, which then learn or do not.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, free_port, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import finetune_siglip
import run_task2
import train_csi
import train_ctclip
import train_retclip

BATCH, STEPS, LATER = 12, 4, 7  # pairs or cases a step, steps of a run, steps of one that was continued
STILL = ["--check-ranks", "--scheduler", "constant", "--warmup", 0, "--eval-every", 100, "--eval-batch-size", 2]
SGD = ["--optimizer", "sgd", "--no-augment", "--dropout-rate", 0, "--lr", 0.05]
SCRIPTS = {  # name: module, fixture of its data, its arguments, what makes it repeatable, tolerance
    "siglip": (finetune_siglip, "tiny_ct", conftest.tiny_args, [*SGD, "--loss", "focal"], 1e-6),
    "task2": (run_task2, "tiny_slices", conftest.slice_args, [*SGD, "--stochastic-depth", 0, "--eval-batch-size", 5],
              1e-6),
    "csi": (train_csi, "tiny_films", conftest.film_args, SGD, 1e-6),
    "ctclip": (train_ctclip, "tiny_reports", conftest.report_args,
               ["--dropout-rate", 0, "--lr", 0.01, "--label-loss-weight", 0.5, "--dedup-positives"], 1e-5),
    "retclip": (train_retclip, "tiny_fundus", conftest.fundus_args,
                ["--text-dropout", 0, "--no-augment", "--lr", 0.01], 1e-5),
}  # fmt: skip
SPLITS = {1: [(6, 2), (3, 4), (1, 12)], 2: [(6, 1), (3, 2), (1, 6)], 3: [(4, 1), (2, 2)], 4: [(3, 1), (1, 3)]}
PLANTS = {  # what is wrong with the gradients of a run of two ranks
    "ignored": "a parameter that DDP does not know of",
    "unused": "a parameter without gradient: DDP silently skips the sum of all that share its bucket",
    "sign": "a gradient of the same norm on both ranks",
}


# ==== The other process ========================================================================================


def hold_still(modules) -> None:
    """Batch norm keeps its statistics, a CNN is in double precision, and what knows Adam alone takes plain SGD."""

    class Sgd(torch.optim.SGD):
        def __init__(self, groups, lr, betas=None, eps=None, fused=None):
            super().__init__(groups, lr, momentum=0.9)

    nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)
    torch.optim.AdamW = Sgd
    for module in {train_csi, run_task2} & modules:

        def build(args, *more, build_model=module.build_model):
            model = build_model(args, *more).double()
            model.backbone.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
            return model

        module.build_model = build


def plant(kind: str, module, rank: int) -> None:
    build_model, forward_backward = module.build_model, module.forward_backward

    def build(args, *more):
        model = build_model(args, *more)
        names = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        names = [n for n in names if module is not train_ctclip or not train_ctclip.is_unused(n)]
        if kind == "ignored":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names[-1:])
        elif kind == "unused":
            model.register_parameter("left_out", nn.Parameter(torch.zeros(3)))
        return model

    def step(net, *more):
        logs = forward_backward(net, *more)
        if kind == "sign" and rank == 1:
            next(p.grad for p in net.parameters() if p.grad is not None and p.grad.norm() > 0).neg_()
        return logs

    module.build_model, module.forward_backward = build, step


def run_job(job: dict, rank: int) -> None:
    """One run of a script; its exit code, the loss of each step and what it printed go to a file beside its folder."""
    module, out, losses = sys.modules[job["script"]], Path(job["out"]), []
    if job["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    if job["copy"] and rank == 0:
        shutil.copytree(job["copy"], out)
    if job["plant"]:
        plant(job["plant"], module, rank)
    planted = module.forward_backward

    def recorded(*more):
        logs = planted(*more)
        losses.append(float(logs["loss"]))
        return logs

    module.forward_backward = recorded
    module.finish = lambda *more: more[-1].close() or 0  # the best model and its thresholds are no matter here
    text, leave = Path(f"{out}.{rank}.txt"), os._exit

    def leave_with(code):  # a rank that fails ends here
        sys.stdout.flush()
        result = {"code": code, "losses": losses, "text": text.read_text()}
        Path(f"{out}.{rank}.json").write_text(json.dumps(result))
        leave(0)

    os._exit = leave_with
    with text.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            code = common.run_main(lambda: module.main(job["words"]))
        except Exception:
            traceback.print_exc()
            code = 1
        leave_with(code)


def run_stages(stages: list[list[dict]]) -> None:
    """One run after the other, its ranks forked."""
    for job in [job for jobs in stages for job in jobs]:
        children = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                hold_still({sys.modules[job["script"]]})
                run_job(job, rank)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


# ==== The runs =================================================================================================


class Runs:
    """Runs of scripts in stages; then their results by name, such as 'siglip 2x3x2'."""

    def __init__(self, request, folder: Path, names):
        self.folder, self.names, self.stages = folder, names, []
        self.data = {name: request.getfixturevalue(SCRIPTS[name][1]) for name in names}

    def stage(self, world: int) -> None:
        self.stages.append([])
        self.world = world

    def add(self, name, case, size, accum=1, more=(), steps=STEPS, copy=None, planted=None) -> None:
        module, _, args, still, _ = SCRIPTS[name]
        out = self.folder / f"{name} {case}"
        words = args(self.data[name], out, *STILL, *still, "--max-steps", steps, *more)[1:]
        words += ["--batch-size", size, "--accum-steps", accum, *(["--resume", "auto"] if copy else [])]
        words = [str(w) for w in words if w != "--check-ranks" or "--fsdp" not in words]
        job = {"script": module.__name__, "out": str(out), "words": words, "world": self.world, "port": free_port()}
        job |= {"copy": copy and str(self.folder / f"{name} {copy}"), "plant": planted}
        self.stages[-1].append(job)

    def make(self) -> "Runs":
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(self.stages))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, __file__, plan], cwd=ROOT, env=env, start_new_session=True)
        try:
            assert process.wait(3000) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that hang
        return self

    def __getitem__(self, case: str) -> list[dict]:
        paths = sorted(self.folder.glob(f"{case}.[0-9].json"))
        return [json.loads(path.read_text()) for path in paths]

    def state(self, case: str) -> dict:
        last = self.folder / case / SCRIPTS[case.split()[0]][0].LAST
        return common.load_checkpoint(common.last_files(last)[0])

    def evaluation(self, case: str) -> dict:
        results = next((self.folder / case).rglob("results.jsonl")).read_text().splitlines()
        return {k: v for k, v in json.loads(results[-1]).items() if k != "train_loss"}

    def check_equal(self, case: str, other: str, first: int = 0) -> None:
        """The losses from step `first` on, on each rank, and the weights and averaged weights at the end."""
        tolerance = SCRIPTS[case.split()[0]][4]
        for result in self[case]:
            assert result["code"] == 0, f"{case}\n{result['text'][-3000:]}"
            assert result["losses"] == pytest.approx(self[other][0]["losses"][first:], rel=0, abs=tolerance), case
        a, b = self.state(case), self.state(other)
        for part in ("model", "ema"):
            for key, value in b[part].items():
                torch.testing.assert_close(a[part][key], value, rtol=0, atol=tolerance, msg=f"{case}: {part} {key}")
        assert a["state"]["updates"] == b["state"]["updates"]


def add_reference(runs: Runs, splits) -> None:
    """In one process: all of a step at once, with a step of no size to evaluate the start; and in micro-batches."""
    runs.stage(1)
    for name in runs.names:
        runs.add(name, "1x12x1", BATCH, more=["--use-ema"])
        runs.add(name, "1 still", BATCH, more=still_words(name), steps=1)
        runs.add(name, "1 whole", BATCH, more=["--use-ema"], steps=LATER)
        for size, accum in splits:
            runs.add(name, f"1x{size}x{accum}", size, accum, ["--use-ema"])


def still_words(name) -> list:
    return ["--lr", 0, *(["--freeze-vq"] if name == "ctclip" else [])]


def add_ranks(runs: Runs, world: int, splits) -> None:
    runs.stage(world)
    for name in runs.names:
        for size, accum in splits:
            runs.add(name, f"{world}x{size}x{accum}", size, accum, ["--use-ema"])
        runs.add(name, f"{world} still", BATCH // world, more=still_words(name), steps=1)


def add_planted(runs: Runs, kinds) -> None:
    for name in runs.names:
        for kind in kinds:
            runs.add(name, f"2 {kind}", 6, planted=kind, steps=1)


def add_continued(runs: Runs, world: int) -> None:
    """What two ranks began, on another number of ranks; alone without accumulation it must be refused."""
    runs.stage(world)
    for name in runs.names:
        if world == 1:
            runs.add(name, "refused", 6, more=["--use-ema"], steps=LATER, copy="2x6x1")
        runs.add(name, f"{world} later", *{1: (6, 2), 3: (2, 2), 4: (3, 1)}[world], ["--use-ema"], LATER, "2x6x1")


# ==== Tests ====================================================================================================


@pytest.fixture(scope="module", params=SCRIPTS)
def runs(request, tmp_path_factory):
    """The whole matrix of a script."""
    name = request.param
    runs = Runs(request, tmp_path_factory.mktemp(name), [name])
    add_reference(runs, SPLITS[1])
    for world in (2, 3, 4):
        add_ranks(runs, world, SPLITS[world])
        if name == "ctclip":
            runs.add(name, f"{world} ddp", BATCH // world)
            runs.add(name, f"{world} fsdp", BATCH // world, more=["--fsdp"])
        if world == 2:
            add_planted(runs, PLANTS)
            if name in ("ctclip", "retclip"):
                runs.add(name, "2 cached", 6, more=["--use-ema", "--grad-cache-chunk", 4])
    for world in (1, 3, 4):
        add_continued(runs, world)
    return runs.make()


def test_two_ranks_one_goes_on_and_what_ranks_disagree_on(request, tmp_path):
    """What CI runs of the matrix: a contrastive loss, begun by two ranks, ended by one; and what must be refused."""
    name = "retclip"
    runs = Runs(request, tmp_path, [name])
    runs.stage(1)
    runs.add(name, "1 whole", BATCH, more=["--use-ema"], steps=LATER)
    runs.stage(2)
    runs.add(name, "2x6x1", 6, more=["--use-ema"])
    add_planted(runs, ["ignored", "sign"])
    add_continued(runs, 1)
    runs.make()
    assert all(
        r["losses"] == pytest.approx(runs[f"{name} 1 whole"][0]["losses"][:STEPS]) for r in runs[f"{name} 2x6x1"]
    )
    check_continued(runs, name, 1)
    for kind in ("ignored", "sign"):
        check_planted(runs, name, kind)


@pytest.mark.slow
def test_splits_of_a_batch_give_one_training(runs):
    name = runs.names[0]
    check_moved(runs, name)
    for world, splits in SPLITS.items():
        for size, accum in splits:
            runs.check_equal(f"{name} {world}x{size}x{accum}", f"{name} 1x12x1")
    if name in ("ctclip", "retclip"):
        runs.check_equal(f"{name} 2 cached", f"{name} 1x12x1")


@pytest.mark.slow
def test_evaluation_has_the_same_digits(runs):
    """Of the loop's own evaluation, after a step that left all as it was."""
    name = runs.names[0]
    for world in (2, 3, 4):
        assert runs.evaluation(f"{name} {world} still") == runs.evaluation(f"{name} 1 still")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_same_order(runs):
    for world in (1, 3, 4):
        check_continued(runs, runs.names[0], world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTS)
def test_check_ranks_finds_gradients_that_differ(runs, kind):
    check_planted(runs, runs.names[0], kind)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("runs", ["ctclip"], indirect=True)  # no other script has --fsdp
def test_fsdp_equals_ddp(runs, world):
    fsdp, ddp = (runs[f"ctclip {world} {kind}"] for kind in ("fsdp", "ddp"))
    assert [r["code"] for r in fsdp] == [0] * world, fsdp[0]["text"][-3000:]
    for one, other in zip(fsdp, ddp, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=0, abs=1e-6)
    a, b = (runs.state(f"ctclip {world} {kind}")["model"] for kind in ("fsdp", "ddp"))
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.slow
def test_a_long_run_stays_flat(tmp_path):
    """In short; the benchmark itself takes 20,000 steps. Time is not judged here: another process may be at work."""
    words = ["--steps", 400, "--worker-steps", 200, "--max-slowdown", 4, "--max-growth", 3, "--output-dir", tmp_path]
    text = run("benchmarks/bench_soak.py", *words, timeout=1200).stdout
    assert text.splitlines()[-1] == "flat" and "200 steps, 2 data workers" in text


def check_moved(runs, name):
    """Or the other comparisons would say nothing."""
    start, end = (runs.state(f"{name} 1 {case}")["model"] for case in ("still", "whole"))
    assert max((end[k] - start[k]).abs().max() for k in end if end[k].numel()) > 1e-3


def check_continued(runs, name, world):
    runs.check_equal(f"{name} {world} later", f"{name} 1 whole", STEPS)
    if world == 1:
        refused = runs[f"{name} refused"][0]
        message = "error: the global batch is 6 but the run has 12 (change --accum-steps to match)"
        assert refused["code"] == 2 and refused["text"].splitlines()[-1] == message


def check_planted(runs, name, kind):
    results = runs[f"{name} 2 {kind}"]
    for result in results:
        assert result["code"] == 2 and "Traceback" not in result["text"], result["text"][-3000:]
        assert result["text"].splitlines()[-1].startswith("error: --check-ranks: the gradient of "), result["text"]
    assert len(results) == 2


if __name__ == "__main__":
    run_stages(json.loads(Path(sys.argv[1]).read_text()))
