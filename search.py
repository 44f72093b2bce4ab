"""Search for hyper-parameters with a training script of this folder: Optuna on a journal file, or a W&B sweep.

The script calls main(args, argv, its own module) for the modes hyperopt, train-optimized, sweep and sweep-agent, and
for a training that a W&B agent has started. Used of it: parse_args, check_environment, read_scores, split_path,
build_datasets, train, LAST, WANDB_PROJECT, and PRUNE, which train() calls after an evaluation with (step, metrics).

A trial is a training in a folder of its own beside the journal (trials/0007) and locked by the process that trains it,
as long as that lives. Whoever looks for work first continues, bit for bit, a trial that nobody has locked.
"""

import base64
import contextlib
import ctypes
import difflib
import fcntl
import gc
import html
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

import common
from common import StopSignal, UserError

SPACE = {  # what can be searched: ("log" or "linear", lowest, highest), or a list of choices
    "lr": ("log", 1e-5, 1e-2),
    "weight_decay": ("log", 1e-6, 1e-2),
    "dropout_rate": ("linear", 0.1, 0.7),
    "optimizer": ["adam", "adamw", "sgd"],
    "batch_size": [8, 16, 32, 64],  # those that the training set fills
    "scheduler": ["plateau", "step", "cosine", "constant"],
    "unknown_weight": ("linear", 0.1, 1.0),
    "loss": ["ce", "corn", "cdw", "emd"],
}
BLIND = {"loss": ["val_loss"], "unknown_weight": ["val_loss", "qwk", "csi_correlation"]}  # monitors that do not see it
# A study is of one setting: only these may be others when it goes on, and what is searched.
FREE = {"mode", "config", "output_dir", "journal", "study_name", "n_trials", "search_workers", "hyperparams", "resume"}
FREE |= {"overwrite", "device", "num_workers", "pin_memory", "timeout_minutes", "tensorboard", "log_interval", "export"}
FREE |= {"save_every", "top_k", "wandb_project", "wandb_entity", "wandb_mode", "sweep_name", "sweep_id", "sweep_count"}
WORKER = "PLAINSCAN_SEARCH_WORKER"  # in the environment of a process that --search-workers has started: its number
RESTARTS, TRIES = 3, 3  # of a worker that died; of a trial whose workers die before its next evaluation
script = None  # the training script's module


# ==== The study ================================================================================================


def hyperopt(args, ctx, argv=None) -> int:
    """--mode hyperopt: train until the study in the journal has --n-trials trials, whatever was killed when.

    Any number of processes may do so at once, also of machines that share a folder whose file locks work.
    Returns 0, or 143 if a signal came. Raises UserError for a mistake, a damaged journal, another setting than the
    study's, and if trial 0 fails, which has the values of the command line.
    """
    if ctx.world > 1:
        raise UserError("--mode hyperopt runs without torchrun (--search-workers N trains N trials at a time)")
    if args.overwrite or args.resume not in (None, "auto"):
        raise UserError("--mode hyperopt goes on with the study of --journal (another --journal begins anew)")
    try:
        study = open_study(args)
        if args.search_workers > 1 and WORKER not in os.environ:
            return run_workers(args, ctx, study, argv)
        return search(args, ctx, study)
    except OSError as e:
        raise UserError(f"{e.filename or journal_of(args)}: {e.strerror or e} (--journal)") from e


def journal_of(args) -> Path:
    return args.journal or args.output_dir / "hyperopt/study.journal"


def trial_folder(args, number: int) -> Path:
    return journal_of(args).parent / "trials" / f"{number:04d}"


def better(args):
    return min if args.monitor == "val_loss" else max


@contextlib.contextmanager
def study_locked(args):
    """One process at a time decides what comes next. The kernel frees the lock of a process that dies."""
    with open(f"{journal_of(args)}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """For Optuna's writes, in place of its own lock, which a killed process holds for half a minute.

    A line that a killed process has half written would damage the journal: the next one to write cuts it off.
    """

    def __init__(self, path: Path):
        self.path = path

    def acquire(self):
        self.file = self.path.open("rb+")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.file.seek(max(0, self.file.seek(0, os.SEEK_END) - 1))
        if self.file.read() not in (b"", b"\n"):
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def release(self):
        self.file.close()


def open_study(args):
    """The study of the journal, made where it is missing; UserError if it is of another setting."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("optuna is not installed (pip install optuna)")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal, patience = journal_of(args), max(2, args.epochs // 5)
    pruner = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=patience),
        "successive_halving": lambda: optuna.pruners.SuccessiveHalvingPruner(patience, reduction_factor=3),
        "none": optuna.pruners.NopPruner,
    }[args.pruner]()
    common.make_folder(journal.parent)
    with study_locked(args):
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(journal), JournalLock(journal))
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend), study_name=args.study_name, pruner=pruner,
                direction=f"{better(args).__name__}imize", load_if_exists=True,
            )  # fmt: skip
        except OSError:
            raise
        except Exception as e:  # a damaged line may raise anything
            raise UserError(f"{journal}: damaged, or no journal of a search ({type(e).__name__}; move it away)") from e
        setting = {k: v for k, v in common.plain_args(args).items() if k not in FREE and k not in args.search_params}
        space = {name: SPACE[name] for name in args.search_params}
        setting = common.json_safe({"search_params": args.search_params, "space": space} | setting)
        if "setting" not in study.user_attrs:
            quick, source = deepcopy(args), script.split_path(script.read_scores(args.csv, args), args)
            if source:  # not the CSV says it: from now on a file beside the journal, made by build_datasets if missing
                quick.split_file = kept = journal.parent / "split.csv"
                if source.exists() and kept.exists() and source.read_bytes() != kept.read_bytes():
                    raise UserError(f"{kept}: is not the split of {source} (move one away, or take another --journal)")
                if source.exists():
                    common.write_atomic(kept, source.read_bytes())
            study.set_user_attr("batch_sizes", usable_batches(quick))  # reads the data: a mistake in it is found now
            study.set_user_attr("split", source and str(kept.absolute()))
            study.set_user_attr("setting", setting)
    then = study.user_attrs["setting"]
    for name in [*setting, *then]:
        if setting.get(name) != then.get(name):
            raise UserError(f"{journal}: --{name.replace('_', '-')} is {setting.get(name)} but the study was begun "
                            f"with {then.get(name)} (another --journal begins another study)")  # fmt: skip
    return study


def usable_batches(args) -> list[int]:
    """The batch sizes that the training set fills, or the largest one possible."""
    quick = deepcopy(args)
    quick.load_to_memory = False
    n = len(script.build_datasets(quick)[0]) // args.accum_steps
    return [size for size in SPACE["batch_size"] if size <= n] or [max(1, n)]


def space_of(args, batch_sizes: list[int]) -> dict:
    return {name: batch_sizes if name == "batch_size" else SPACE[name] for name in args.search_params}


def first_values(args, space: dict) -> dict:
    """Trial 0: the values of the command line, moved into the space if they are outside."""
    values = {}
    for name, options in space.items():
        value = given = getattr(args, name)
        if isinstance(options, tuple):
            value = min(max(given, options[1]), options[2])
        elif given not in options:
            value = max((x for x in options if isinstance(x, int) and x < given), default=options[0])
        if value != given:
            print(f"note: {name} {given} is outside of what is searched: trial 0 has {value}", file=sys.stderr)
        values[name] = value
    return values


def claim(study, args, stop):
    """The next trial to train, and the file that keeps it locked; (None, None) if there is none left, or on a signal.

    First the trials whose process is gone; then new ones; then it waits for the others, since a trial whose process
    dies has to be continued.
    """
    from optuna import Trial

    waited = False
    while not stop:
        with study_locked(args):
            trials = study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state.name == "RUNNING"]
            for old in running:
                if lock := locked_trial(args, old.number):
                    n = len(old.intermediate_values)
                    print(f"trial {old.number}: continued after {n} evaluations")
                    trial = Trial(study, old._trial_id)
                    trial.set_user_attr("tries", [*old.user_attrs.get("tries", []), n])
                    return draw(study, trial, args), lock
            number = sum(t.state.name != "WAITING" for t in trials)
            if number < args.n_trials:
                if trial_folder(args, number).exists():
                    raise UserError(f"{trial_folder(args, number)}: is of an earlier search (move it away, or take a "
                                    "--journal in another folder)")  # fmt: skip
                if not trials:
                    study.enqueue_trial(first_values(args, space_of(args, study.user_attrs["batch_sizes"])))
                return draw(study, study.ask(), args), locked_trial(args, number)
        if not running:
            break
        if not waited:
            print(f"waiting for trials {', '.join(str(t.number) for t in running)} of other processes")
        waited = True
        time.sleep(0.5)
    return None, None


def locked_trial(args, number: int):
    """The file whose lock keeps a trial, or None if another process has it."""
    trial_folder(args, number).mkdir(parents=True, exist_ok=True)
    file = (trial_folder(args, number) / "trial.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file.close()
    os.register_at_fork(after_in_child=file.close)  # data workers outlive a killed process by some seconds
    return file


def draw(study, trial, args):
    """Give a trial its values, or what it lacks of them if its process was killed in between.

    Each is a function of the seed, the trial's number and the trials before: one process alone always draws the same.
    """
    from optuna import samplers

    for k, (name, options) in enumerate(space_of(args, study.user_attrs["batch_sizes"]).items()):
        seed = int(np.random.SeedSequence([args.seed, trial.number, k]).generate_state(1)[0] >> 1)
        study.sampler = samplers.RandomSampler(seed=seed)
        if args.sampler == "tpe":  # constant_liar: keeps off what others try now
            study.sampler = samplers.TPESampler(seed=seed, constant_liar=True)
        if isinstance(options, tuple):
            trial.suggest_float(name, options[1], options[2], log=options[0] == "log")
        else:
            trial.suggest_categorical(name, options)
    return trial


# ==== Trials ===================================================================================================


def search(args, ctx, study) -> int:
    """Train one trial after the other until none is left to claim."""
    if WORKER in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # what Linux sends if the process that started this one dies
    while True:
        before, stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None), StopSignal()
        if isinstance(before, StopSignal) and before:  # it came after the last step of a training
            return 143
        trial, lock = claim(study, args, stop)
        if trial is None:
            write_results(study, args, final=True)
            return 143 if stop else 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # until train() listens: dying loses nothing
            signal.signal(number, signal.SIG_DFL)
        with lock:
            if run_trial(study, trial, args, ctx):
                return 143
        write_results(study, args)


def run_trial(study, trial, args, ctx) -> int:
    """Train a trial and tell the study how it went; 143 if a signal ended the training before."""
    from optuna.trial import TrialState

    folder, sign = trial_folder(args, trial.number), 1 if args.monitor == "val_loss" else -1
    now = deepcopy(args)
    vars(now).update(trial.params, mode="train", output_dir=folder, resume="auto", export=None, top_k=1)
    if study.user_attrs.get("split"):
        now.split_file = folder / "split.csv"
        same_split(journal_of(args).parent / "split.csv", folder)
    values = dict(study.get_trials()[trial.number].intermediate_values)  # evaluation (1, 2, ...): what is monitored
    tries, error, code = trial.user_attrs.get("tries", []), None, 0

    def prune(step: int, metrics: dict) -> bool:
        if "interval" not in trial.user_attrs:
            trial.set_user_attr("interval", step)  # steps between evaluations depend on the batch size
        n = math.ceil(step / trial.user_attrs["interval"])
        if n not in values:  # else it was there before a kill
            values[n] = metrics[args.monitor] if math.isfinite(metrics[args.monitor]) else sign * math.inf
            trial.report(values[n], n)
        if n < args.epochs and trial.should_prune():  # the last epoch costs no more
            trial.set_user_attr("pruned", n)
        return "pruned" in trial.user_attrs

    try:
        script.PRUNE = prune
        if tries[-TRIES:] == [len(values)] * TRIES:
            raise UserError(f"its process died {TRIES} times before the next evaluation")
        if "pruned" not in trial.user_attrs:
            code = script.train(now, ctx)
    except (UserError, torch.OutOfMemoryError) as e:
        error = f"out of GPU memory with batch size {now.batch_size}"
        error = str(e).strip().splitlines()[-1] if isinstance(e, UserError) else error
        if trial.number == 0 or e.__cause__ is not None:  # a full disk or an unreadable file is not the trial's fault
            trial.set_user_attr("tries", [])
            whose = ", with the values of the command line," if trial.number == 0 else ""
            raise UserError(f"trial {trial.number}{whose} failed: {error}") from e
    finally:
        script.PRUNE = None
    if code:
        trial.set_user_attr("tries", [])
        return code
    if error:  # the frames of the failed training are gone: give its memory back, and end its wandb run
        gc.collect()
        torch.cuda.empty_cache()
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish(exit_code=1)
    best = better(args)(filter(math.isfinite, values.values()), default=None)
    if best is None and not error:
        error = f"{args.monitor} is undefined in every evaluation"
    state = "fail" if error else "pruned" if "pruned" in trial.user_attrs else "complete"
    trial.set_user_attr("reason", error or "")
    study.tell(trial, best if state == "complete" else None, TrialState[state.upper()])
    for path in common.last_files(folder / script.LAST):  # only good for going on, and three times a model's size
        path.unlink(missing_ok=True)
    shown = f"{args.monitor} {best:.4f}" if best is not None else "no result"
    print(f"trial {trial.number} of {args.n_trials}: {state}, {error or shown}")
    return 0


def same_split(source: Path, folder: Path) -> None:
    """A split that was made in one folder serves the trainings in others."""
    if not (folder / "split.csv").exists():
        common.make_folder(folder)
        common.link_file(source, folder / "split.csv")


def run_workers(args, ctx, study, argv) -> int:
    """--search-workers: start the processes, show how far they are, and start one again that was killed."""
    if ctx.device.type == "cuda" and args.device not in ("auto", "cuda"):
        raise UserError("--search-workers gives every process a GPU (CUDA_VISIBLE_DEVICES chooses them, not --device)")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus, folder = gpus.split(","), journal_of(args).parent
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.search_workers))
    logs = [folder / f"worker_{i}.log" for i in range(args.search_workers)]
    command = [sys.executable, script.__file__, *(sys.argv[1:] if argv is None else argv)]
    stop, told, error, starts, codes = StopSignal(), False, None, [0] * len(logs), [None] * len(logs)

    def start(i: int):
        env = {"OMP_NUM_THREADS": threads, **os.environ, WORKER: str(i), "PYTHONUNBUFFERED": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if ctx.device.type == "cuda" else {}
        starts[i] += 1
        with logs[i].open("a") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    workers = {i: start(i) for i in range(len(logs))}
    with tqdm(total=args.n_trials, desc="trials", disable=None) as bar:
        while workers:
            time.sleep(0.2)
            if (stop or error) and not told:
                told = True
                for worker in workers.values():
                    worker.terminate()
            for i, worker in list(workers.items()):
                codes[i] = worker.poll()
                if codes[i] is not None:
                    del workers[i]
                if codes[i] == 2:
                    found = [x for x in logs[i].read_text(errors="replace").splitlines() if x.startswith("error: ")]
                    error = error or (found[-1].removeprefix("error: ") if found else f"see {logs[i]}")
                elif codes[i] not in (None, 0, 143) and not told and starts[i] <= RESTARTS:
                    tqdm.write(f"{logs[i]}: ended with exit code {codes[i]}: started again", file=sys.stderr)
                    workers[i] = start(i)
            done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
            values = [t.value for t in done if t.state.name == "COMPLETE"]
            bar.n = len(done)
            bar.set_postfix({args.monitor: f"{better(args)(values):.4f}"} if values else {})
    if error:
        raise UserError(error)
    print(f"{len(done)} of {args.n_trials} trials done -> {args.output_dir / 'models/hyperopt'}; logs: {logs[0]} ...")
    return 0 if len(done) >= args.n_trials else 143 if stop or 143 in codes else 1


# ==== Results ==================================================================================================


def write_results(study, args, final: bool = False) -> None:
    """best_params.json and trials.csv; at the end, and twice a minute, search.html with its two figures."""
    import optuna

    folder, rows = args.output_dir / "models/hyperopt", []
    common.make_folder(folder)
    with study_locked(args):  # the last one to write knows all
        for t in study.get_trials(deepcopy=False):
            value = better(args)(filter(math.isfinite, t.intermediate_values.values()), default=None)
            row = {"number": t.number, "state": t.state.name.lower(), "value": value, **t.params}
            row |= {"evaluations": len(t.intermediate_values), "folder": str(trial_folder(args, t.number))}
            row |= {"seconds": round(t.duration.total_seconds(), 1) if t.duration else None}
            rows.append(row | {"reason": t.user_attrs.get("reason", "")})
        common.write_csv(folder / "trials.csv", pd.DataFrame(rows))
        order = [row for row in rows if row["state"] == "complete"]
        order.sort(key=lambda row: row["value"], reverse=better(args) is max)
        if not order:
            return
        first, states = order[0], [row["state"] for row in rows]
        best = {
            "params": {name: first[name] for name in args.search_params}, "value": first["value"],
            "monitor": args.monitor, "trial": first["number"], "folder": first["folder"], "model": args.model,
            "n_complete": len(order), "n_pruned": states.count("pruned"), "n_failed": states.count("fail"),
            "study_name": args.study_name, "versions": common.versions() | {"optuna": optuna.__version__},
            "setting": study.user_attrs["setting"], "split_file": study.user_attrs.get("split"),
        }  # fmt: skip
        common.write_atomic(folder / "best_params.json", json.dumps(best, indent=1) + "\n")
        others = [row["folder"] for row in rows if row is not first and row["state"] not in ("running", "waiting")]
        for path in (path for x in others for path in Path(x, script.LAST).parent.glob("*.pth")):
            path.unlink(missing_ok=True)  # only now: 100 models would fill a disk
        page = folder / "search.html"
        if final or not page.exists() or time.time() - page.stat().st_mtime > 30:
            write_page(page, study, args, rows, order, best)


def write_page(page: Path, study, args, rows: list[dict], order: list[dict], best: dict) -> None:
    """search.html, which holds all it shows, history.png, importances.png. order: complete trials, the best first."""
    import optuna
    from matplotlib.figure import Figure

    images = []

    def save(name: str, figure) -> None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
        common.write_atomic(page.with_name(name), file.getvalue())
        images.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel=args.monitor)
    done = sorted(order, key=lambda row: row["number"])
    pruned = [row for row in rows if row["state"] == "pruned" and row["value"] is not None]
    for name, shown, color, marker in (("complete", done, "#0072B2", "o"), ("pruned", pruned, "#767676", "x")):
        x, y = [row["number"] for row in shown], [row["value"] for row in shown]
        axes.scatter(x, y, 22, color, marker, label=f"{name} ({len(x)})")
    failed = [row for row in rows if row["state"] == "fail"]
    axes.plot([row["number"] for row in failed], [0.02] * len(failed), "v", color="#D55E00",
              transform=axes.get_xaxis_transform(), label=f"failed ({len(failed)})")  # fmt: skip
    running = (np.maximum if better(args) is max else np.minimum).accumulate([row["value"] for row in done])
    axes.step([row["number"] for row in done], running, where="post", color="#0072B2", lw=1, label="best so far")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save("history.png", figure)

    with warnings.catch_warnings(action="ignore"):  # of too few trials: the note tells it
        importances = optuna.importance.get_param_importances(study)
    note = f"Only {len(order)} complete trials: below ten this is hardly more than noise." if len(order) < 10 else ""
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(importances)), layout="constrained")
    axes = figure.add_subplot(xlabel="share in what tells the best tenth of the trials apart (PED-ANOVA)", xlim=(0, 1))
    axes.barh(list(importances)[::-1], list(importances.values())[::-1], color="#0072B2", height=0.6)
    axes.set_title(note, fontsize=9, color="#D55E00", loc="left")
    save("importances.png", figure)

    columns = ["number", "value", *args.search_params, "evaluations", "seconds"]
    cells = [[f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in order[:10]]
    table = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>\n" for row in cells)
    failures = "".join(f"<li>trial {row['number']}: {html.escape(row['reason'])}</li>\n" for row in failed)
    title = html.escape(f"Search {args.study_name}, {args.model}")
    common.write_atomic(page, f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body {{font: 15px sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em}} img {{max-width: 100%}}
table {{border-collapse: collapse}} td, th {{padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right}}
</style></head><body><h1>{title}</h1>
<p>{len(rows)} of {args.n_trials} trials: {len(order)} complete, {best["n_pruned"]} pruned, {len(failed)} failed.
Best {html.escape(args.monitor)}: {best["value"]:.4f}, trial {best["trial"]}. The validation cases chose it: it is too
good to be expected of new patients.</p>
<h2>Trials</h2><img alt="value of every trial" src="{images[0]}">
<h2>Importance of the parameters</h2><p>{note}</p><img alt="importances" src="{images[1]}">
<h2>The best trials</h2><table><tr>{"".join(f"<th>{html.escape(c)}</th>" for c in columns)}</tr>
{table}</table>{"<h2>Failed</h2><ul>" + failures + "</ul>" if failures else ""}</body></html>
""")  # fmt: skip


# ==== Training with what was found =============================================================================


def optimized(args, argv=None):
    """--mode train-optimized: the arguments with the values of --hyperparams, over which the command line wins."""
    path = args.hyperparams
    if path is None:
        raise UserError("--mode train-optimized needs --hyperparams FILE (best_params.json of --mode hyperopt)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        params = checked_params(found.get("params") if isinstance(found, dict) else None, path)
        then, kept = {"model": found.get("model"), **found.get("setting", {})}, Path(found.get("split_file") or "")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror} (--mode hyperopt writes it)") from e
    except (ValueError, TypeError, RecursionError, OverflowError) as e:
        raise UserError(f"{path}: no JSON of --mode hyperopt (lines of 'key = value' go into an .ini file, below a "
                        "[section], for --config)") from e  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]
    words += [f"--monitor={found['monitor']}"] if "monitor" in found else []  # which the values are best by
    args = script.parse_args([*words, *(sys.argv[1:] if argv is None else argv)])
    now, names = common.plain_args(args), "model loss image_size csv num_classes zone_focus seed split".split()
    other = [f"{name} {then[name]}, not {now[name]}" for name in names if then.get(name) not in (None, now.get(name))]
    mine = args.split_file or args.output_dir / "split.csv"
    if kept.is_file() and args.split_file is None and then.get("csv") == now["csv"]:
        same_split(kept, args.output_dir)
        args.split_file = mine if then.get("split_file") else None  # else a column of the CSV would win
    if kept.name and not (kept.is_file() and mine.is_file() and kept.read_bytes() == mine.read_bytes()):
        other.append(f"the split {kept}, which is not used")
    if other:
        print(f"warning: {path} was found for {'; '.join(other)}", file=sys.stderr)
    print(f"{path}: " + ", ".join(f"{name} {getattr(args, name)}" for name in params))
    return args


def checked_params(params, source) -> dict:
    """Values of a search as a file has them; UserError for an unknown name, or a value that is none of its kind."""
    if not isinstance(params, dict):
        raise UserError(f"{source}: no 'params', a map of names and values (best_params.json of --mode hyperopt)")
    for name, value in params.items():
        if name not in SPACE:
            near = difflib.get_close_matches(str(name), SPACE, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SPACE)}"
            raise UserError(f"{source}: unknown parameter '{name}' ({hint})")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        good, wanted = number, "a number"
        if name == "batch_size":
            good, wanted = number and isinstance(value, int), "a whole number"
        elif isinstance(SPACE[name], list):
            good, wanted = value in SPACE[name], f"one of {', '.join(SPACE[name])}"
        if not good:
            raise UserError(f"{source}: {name} is {value!r} ({wanted} was expected)")
    return params


# ==== W&B sweeps ===============================================================================================


def project_of(args) -> str:
    return args.wandb_project or os.environ.get("WANDB_PROJECT") or script.WANDB_PROJECT


def need_server(args, what: str) -> None:
    """Raise UserError unless W&B's server can be asked, where sweeps live."""
    import wandb

    offline = (args.wandb_mode or os.environ.get("WANDB_MODE")) in ("offline", "disabled")
    if offline or not wandb.login(prompt=False, verify=False):
        why = "wandb is set to be offline" if offline else "there is no API key (wandb login, or WANDB_API_KEY)"
        raise UserError(f"{what} needs the W&B server, but {why}; --mode hyperopt searches without a server")


def sweep(args, argv=None) -> int:
    """--mode sweep: write wandb_sweep.yaml and start the sweep on the W&B server."""
    import wandb

    parameters, kinds = {}, {"log": "log_uniform_values", "linear": "uniform"}
    for name, options in space_of(args, usable_batches(args)).items():
        parameters[name] = {"values": options}
        if isinstance(options, tuple):
            parameters[name] = {"distribution": kinds[options[0]], "min": options[1], "max": options[2]}
    config = {
        "name": args.sweep_name, "method": "bayes", "program": os.path.relpath(script.__file__),
        "metric": {"name": f"val/{args.monitor}", "goal": f"{better(args).__name__}imize"},
        "early_terminate": {"type": "hyperband", "min_iter": max(2, args.epochs // 5), "eta": 3},
        "parameters": parameters,  # the values of a run come by a file of W&B's, see sweep_run
        "command": ["${env}", "${interpreter}", "${program}", *training_words(args, argv)],
    }  # fmt: skip
    path = args.output_dir / "wandb_sweep.yaml"
    common.make_folder(args.output_dir)
    common.write_atomic(path, yaml.safe_dump(config, sort_keys=False))
    need_server(args, f"{path} is written, for 'wandb sweep' where W&B can be reached: a sweep")
    try:
        sent = {name: value for name, value in config.items() if name != "command"}  # which has paths
        sent["program"] = Path(config["program"]).name
        sweep_id = wandb.sweep(sent, entity=args.wandb_entity, project=project_of(args))
    except Exception as e:  # whatever wandb raises
        raise UserError(f"the sweep could not be started: {e} ({path} is written)") from e
    entity = f" --wandb-entity {args.wandb_entity}" if args.wandb_entity else ""
    print(f"sweep {sweep_id}, as in {path}; to train for it, on every GPU, with the same flags of data and model:\n"
          f"  python {config['program']} --mode sweep-agent --sweep-id {sweep_id} --wandb-project {project_of(args)}"
          f"{entity} ...")  # fmt: skip
    return 0


def training_words(args, argv) -> list[str]:
    """The command line of one training of a sweep."""
    given = sys.argv[1:] if argv is None else argv
    return [*given, "--mode", "train", "--monitor", args.monitor, "--wandb-project", project_of(args)]


def sweep_agent(args, ctx, argv=None) -> int:
    """--mode sweep-agent: train what the sweep asks for, each run in a process and in a folder of its own."""
    if not args.sweep_id or ctx.world > 1:
        raise UserError("--mode sweep-agent needs --sweep-id ID (of --mode sweep), and runs without torchrun")
    import wandb

    need_server(args, "a sweep agent")
    runs = []

    def train_one():  # in a thread of wandb's, where train() cannot listen to signals
        runs.append(subprocess.Popen([sys.executable, script.__file__, *training_words(args, argv)]))
        if runs[-1].wait():
            raise RuntimeError(f"the training ended with exit code {runs[-1].returncode}")

    def end(number, frame):
        for run in runs:
            run.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        wandb.agent(args.sweep_id, train_one, args.wandb_entity, project_of(args), args.sweep_count or None)
    except KeyboardInterrupt:
        return 143
    except Exception as e:  # whatever wandb raises
        raise UserError(f"sweep {args.sweep_id}: {e}") from e
    codes = [run.returncode for run in runs]
    return 143 if 143 in codes else 1 if codes and all(codes) else 0


def sweep_run(args) -> None:
    """Give a training that a W&B agent has started, as its environment tells, the run's values and a folder."""
    path, run = os.environ.get("WANDB_SWEEP_PARAM_PATH"), os.environ.get("WANDB_RUN_ID")
    if not path or not run:
        return
    entries = yaml.safe_load(Path(path).read_text()).items()
    params = checked_params({k: v["value"] for k, v in entries if isinstance(v, dict) and "value" in v}, path)
    folder = args.output_dir / "sweeps" / run
    if (args.output_dir / "split.csv").exists():
        same_split(args.output_dir / "split.csv", folder)
    vars(args).update(params, output_dir=folder)
    print(f"sweep run {run}: " + ", ".join(f"{k} {v}" for k, v in params.items()) + f" -> {folder}")


def main(args, argv, module) -> int:
    global script
    script = module
    blind = " and ".join(name for name in args.search_params if args.monitor in BLIND.get(name, []))
    if blind and args.mode in ("hyperopt", "sweep"):
        raise UserError(f"--monitor {args.monitor} cannot judge {blind} (--monitor f1_macro, or search without it)")
    if args.wandb_entity:
        os.environ["WANDB_ENTITY"] = args.wandb_entity
    if args.mode == "sweep":
        return sweep(args, argv)
    if args.mode == "train":
        sweep_run(args)
    if args.mode == "train-optimized":
        args = optimized(args, argv)
    with common.process_group(args.device, args.timeout_minutes) as ctx:
        if args.mode == "sweep-agent":
            return sweep_agent(args, ctx, argv)
        script.check_environment(args, ctx)
        return hyperopt(args, ctx, argv) if args.mode == "hyperopt" else script.train(args, ctx)
