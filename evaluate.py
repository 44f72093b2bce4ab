"""Score a checkpoint, or anyone's predictions, against labels: numbers with confidence intervals, CSV, HTML report.

    python evaluate.py --test-only outputs/demo/best_model.pth --output outputs/demo/eval
    python evaluate.py --test-only outputs/demo/best_model.pth --csv other.csv --split test --output other/eval
    python evaluate.py --predictions preds.csv --labels labels.csv --output eval/
    torchrun --nproc_per_node 4 evaluate.py --test-only best_model.pth --output eval/      # the same numbers, sooner

A checkpoint brings its model, data, and per-label thresholds; options given here override its data. Two CSV files do
the same for any other program: `id` and `{label}_prob` columns; `id` and label columns (0, 1; empty or -1 = unknown),
with an optional `patient_id`. Every case counts: one that could not be read is listed, and makes the exit code 3.

Writes into --output (or, where that ends in .json, to that file and its folder):
  predictions.csv  id, {label}_prob, {label}_pred; in the order of the data; no probability where a case failed to load
  labels.csv       id, patient_id, labels: with predictions.csv all that is needed to score again
  report.html      by report.py
  results.json     all numbers, null = undefined (never 0):
    evaluated, evaluated_on   what was scored, on which cases: two phrases
    n, n_patients             cases (with the failed ones) and patients
    per_label                 {label: {n, positives, prevalence, threshold, flagged, <metric>, <metric>_low,
                              <metric>_high}}; n: cases with a known label; flagged: those at or above the threshold
    macro, micro              {<metric>, <metric>_low, <metric>_high}; macro: the mean over the labels where the metric
                              is defined (for auroc: n_defined of them)
                              metrics: auroc, auprc, f1, precision, recall, specificity, accuracy, brier, log_loss, ece
    overall                   crg (clinically relevant gain), exact_match
                              0/0 in precision, recall and f1 is 0, as in scikit-learn (see positives and flagged)
    interval                  {method, level, n_resamples, seed}, or null with --no-bootstrap
    thresholds_source         where the thresholds come from; never from the scored cases
    failed                    [{id, reason}]
    notes                     sentences a reader must know
    provenance                command, date, files and their sha256, versions, git commit
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from common import (
    UserError,
    bootstrap_intervals,
    choose_thresholds,
    file_sha256,
    json_safe,
    load_checkpoint,
    multilabel_metrics,
    parse_with_config,
    prediction_table,
    process_group,
    run_main,
    versions,
    write_atomic,
    write_csv,
)
from report import number, people, read_scores, warnings_of, write_report

TASKS = {"siglip": "finetune_siglip", "task2": "run_task2"}  # task in the checkpoint -> the script that trained it
METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "accuracy", "brier", "log_loss", "ece")
# of a checkpoint's arguments
OVERRIDES = ("csv", "slice_dir", "data_dir", "split", "data_root", "metadata", "batch_size", "num_workers")
LEVEL = 0.95  # of the intervals


# ==== Arguments ================================================================================================


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("data")
    group.add_argument("--predictions", type=Path, help="CSV with id and {label}_prob columns, instead of a checkpoint")
    group.add_argument("--labels", type=Path, help="CSV with id and label columns, for --predictions")
    group.add_argument("--label-columns", nargs="+", metavar="NAME", help="labels of --labels to evaluate (all)")
    group.add_argument("--csv", type=Path, help="other data for the checkpoint, in the form its script reads")
    group.add_argument("--slice-dir", type=Path, help="other slices for a checkpoint of run_task2.py")
    group.add_argument("--data-dir", type=Path, help="folder of their labels")
    group.add_argument("--split", help="rows of the CSV to evaluate (what the script evaluates)")
    group.add_argument("--data-root", type=Path, help="folder img_path may not leave (as in training)")
    group.add_argument("--metadata", type=Path, help="CSV of rescale slopes and intercepts (as in training)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--threshold", type=float, help="probability that counts as present (the checkpoint's, or 0.5)")
    group.add_argument(
        "--bootstrap", action=argparse.BooleanOptionalAction, default=True, help="confidence intervals over patients"
    )
    group.add_argument("--n-bootstrap", "--n_bootstrap", type=int, default=1000, help="resamples of the intervals")
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--test-only", "--checkpoint", type=Path, metavar="CKPT", help="checkpoint to evaluate")
    group.add_argument("--output", type=Path, default=Path("eval"), help="folder, or .json file, of the results")
    group = parser.add_argument_group("system")
    group.add_argument("--batch-size", type=int, help="cases per process and forward pass (as in training)")
    group.add_argument("--num-workers", type=int, help="data processes per rank (as in training)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    group.add_argument("--seed", type=int, default=0, help="seed of the resamples")
    group.add_argument("--config", type=Path, help="YAML or INI file of defaults, also that of the training script")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    args = add_options(argparse.ArgumentParser(description=__doc__.splitlines()[0], **style)).parse_args(argv)
    if args.config:
        args = read_config(args, argv)
    if (args.test_only is None) == (args.predictions is None):
        raise UserError("command line: give either --test-only CKPT, or --predictions CSV and --labels CSV")
    if (args.predictions is None) != (args.labels is None):
        raise UserError("command line: --predictions and --labels go together")
    if args.test_only and args.label_columns:
        raise UserError("--label-columns: the labels of a checkpoint are fixed (the option is for --predictions)")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: not a probability (0 to 1)")
    if args.bootstrap and args.n_bootstrap < 2:
        raise UserError(f"--n-bootstrap {args.n_bootstrap}: at least 2 resamples (--no-bootstrap for none)")
    return args


def read_config(args, argv) -> argparse.Namespace:
    """Parse again with the defaults of --config. The file may be that of the training: its data keys are used, and its
    other keys, which the checkpoint already holds, are not."""
    parents = []
    if args.test_only:
        parents = [script_of(load_checkpoint(args.test_only), args.test_only).build_parser()]
        for action in parents[0]._actions:
            action.default, action.required = argparse.SUPPRESS, False
    parser = argparse.ArgumentParser(parents=parents, conflict_handler="resolve", add_help=False, allow_abbrev=False)
    merged = parse_with_config(add_options(parser), argv)
    unused = [name for name in vars(merged) if name not in vars(args)]
    if unused:
        print(f"{args.config}: not used, the checkpoint has its own: {', '.join(unused)}")
    return merged


# ==== Cases: what is scored ====================================================================================


@dataclasses.dataclass
class Cases:
    """All cases of one evaluation, in the order of the data."""

    ids: list[str]
    groups: list[str]  # patient of each case: cases of one patient are resampled together
    class_names: list[str]
    targets: np.ndarray  # (n, K) float64 of 0, 1, NaN = unknown
    probs: np.ndarray  # (n, K) float64, a row of NaN = the case failed to load
    failed: dict[str, str]  # id -> reason
    thresholds: np.ndarray  # (K,)
    thresholds_source: str
    evaluated: str
    evaluated_on: str
    notes: list[str]
    files: dict  # for the provenance
    incomplete: bool = False  # something of a case failed to load, but not all of it


def cases_of_files(args) -> Cases:
    """Cases of --predictions and --labels."""
    ids, groups, targets, probs, class_names = read_scores(args.predictions, args.labels, args.label_columns)
    thresholds, source = choose_thresholds(args.threshold, {})
    return Cases(
        ids=ids,
        groups=groups,
        class_names=class_names,
        targets=targets,
        probs=probs,
        failed={},
        thresholds=np.full(len(class_names), thresholds),
        thresholds_source=source,
        evaluated=args.predictions.name,
        evaluated_on=args.labels.name,
        notes=[],
        files={"predictions": file_facts(args.predictions), "labels": file_facts(args.labels)},
    )


def script_of(saved: dict, path: Path):
    """The module of the script that wrote a checkpoint."""
    if saved.get("task") not in TASKS:
        raise UserError(f"{path}: of the unknown task '{saved.get('task')}' (known: {', '.join(TASKS)})")
    return importlib.import_module(TASKS[saved["task"]])


def cases_of_checkpoint(args, ctx) -> Cases:
    """Run the checkpoint's model over its data; every rank returns the same cases."""
    saved = load_checkpoint(args.test_only)
    script = script_of(saved, args.test_only)
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    foreign = [name for name in given if name not in saved["args"]]
    if foreign:
        raise UserError(f"--{foreign[0].replace('_', '-')}: not an option of {script.__name__}.py's checkpoints")
    task_args = script.args_from_checkpoint(saved, **given, on_bad_sample="skip")
    dataset = script.build_eval_dataset(task_args)
    out = script.predict(script.build_eval_model(saved, task_args, ctx.device), dataset, ctx, "prediction")
    thresholds, source = choose_thresholds(args.threshold, saved)
    unread = [dataset.ids[i] for i in out.get("unread", [])]
    table, notes = script.data_file(task_args), []
    trained_on = script.data_file(script.args_from_checkpoint(saved), task_args.split)
    same_data = trained_on is not None and table.resolve() == trained_on.resolve()
    if same_data and task_args.split == saved["args"]["split"]:
        chosen = "the model" if args.threshold is not None else "the model and its thresholds"
        notes.append(
            f"These are the validation cases by which training chose {chosen}: the numbers are too good to be expected "
            "of new patients (--split, --csv or --slice-dir for cases that training has not seen)"
        )
    elif same_data and task_args.split == "train":
        notes.append("The model was trained on these cases: the numbers say nothing about new patients")
    if unread:
        first = ", ".join(unread[:10])
        notes.append(f"{len(unread)} slices could not be read and are missing in their volumes: {first}")
    return Cases(
        ids=list(out["ids"]),
        groups=list(out["groups"]),
        class_names=list(dataset.class_names),
        targets=np.asarray(out["targets"], np.float64),
        probs=out["probs"],
        failed={out["ids"][i]: why_failed(dataset, i) for i in out["failed"]},
        thresholds=np.full(len(dataset.class_names), thresholds),
        thresholds_source=source,
        evaluated=args.test_only.name,
        evaluated_on=f"split '{task_args.split}' of {table.name}",
        notes=notes,
        files={"checkpoint": file_facts(args.test_only), "csv": file_facts(table), "trained_with": saved["versions"]},
        incomplete=bool(unread),
    )


def why_failed(dataset, index: int) -> str:
    try:
        dataset.load(index)
        return "it can be read, but the model's output is not a number"
    except UserError as e:
        return str(e)


def file_facts(path: Path) -> dict:
    return {"file": str(path), "sha256": file_sha256(path)}


# ==== Numbers ==================================================================================================


def score(cases: Cases, n_resamples: int, seed: int) -> dict:
    """The numbers of results.json, to the last digit the same in any order of the cases; 0 resamples: no intervals."""
    names, loaded = cases.class_names, ~np.isnan(cases.probs).any(axis=1)
    order = np.array(sorted(np.flatnonzero(loaded), key=lambda i: cases.ids[i]), int)
    if not len(order):
        first = next(iter(cases.failed.items()))
        raise UserError(
            f"{cases.evaluated_on}: none of {len(cases.ids)} cases could be read (first {': '.join(first)})"
        )
    targets, probs, groups = cases.targets[order], cases.probs[order], np.array(cases.groups)[order]
    numbered = [f"label{k}" for k in range(len(names))]  # a label called "macro" would give the key of the macro mean
    values = multilabel_metrics(targets, probs, numbered, cases.thresholds)
    spread = {}
    if n_resamples:
        spread = bootstrap_intervals(targets, probs, numbered, cases.thresholds, groups, n_resamples, seed, LEVEL)

    def block(prefix: str, metrics=METRICS) -> dict:
        found = {}
        for metric in metrics:
            key = next((key for key in (prefix + metric, metric) if key in values), None)
            if key is None or (key == metric and prefix == "micro_"):
                continue
            found[metric] = values[key]
            if key in spread:
                found[f"{metric}_low"], found[f"{metric}_high"] = spread[key]
        return found

    per_label = {}
    for k, name in enumerate(names):
        n, positives = int(values[f"label{k}_n"]), int(values[f"label{k}_positives"])
        share = positives / n if n else None
        counts = {"n": n, "positives": positives, "prevalence": share, "threshold": cases.thresholds[k]}
        counts["flagged"] = int((probs[:, k] >= cases.thresholds[k])[~np.isnan(targets[:, k])].sum())
        per_label[name] = counts | block(f"label{k}_")
    how = {"method": "percentile bootstrap over patients", "level": LEVEL, "n_resamples": n_resamples, "seed": seed}
    return {
        "evaluated": cases.evaluated,
        "evaluated_on": cases.evaluated_on,
        "n": len(cases.ids),
        "n_patients": len(set(cases.groups)),
        "per_label": per_label,
        "macro": block("macro_") | {"n_defined": int(values["n_defined_auroc"])},
        "micro": block("micro_"),
        "overall": block("", ("crg", "exact_match")),
        "interval": how if n_resamples else None,
        "thresholds_source": cases.thresholds_source,
        "failed": [{"id": i, "reason": reason} for i, reason in cases.failed.items()],
        "notes": cases.notes,
    }


def git_commit() -> str | None:
    """Commit of this code, with '+' where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10)  # noqa: E731
        head = run("rev-parse", "HEAD")
        return (
            None
            if head.returncode
            else head.stdout.strip() + ("+" if run("status", "--porcelain", "-uno").stdout else "")
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


# ==== Output ===================================================================================================


def write_outputs(results: dict, cases: Cases, results_path: Path) -> None:
    """predictions.csv, labels.csv, report.html, and last results.json: where it stands, the rest is complete."""
    folder = results_path.parent
    labels = {"id": cases.ids, "patient_id": cases.groups}
    for k, name in enumerate(cases.class_names):
        labels[name] = pd.Series(cases.targets[:, k]).astype("Int64")
    predictions = prediction_table(cases.ids, cases.probs, cases.class_names, cases.thresholds)
    write_csv(folder / "predictions.csv", predictions)
    write_csv(folder / "labels.csv", pd.DataFrame(labels))
    write_report(folder / "report.html", results, cases.targets, cases.probs)
    write_atomic(results_path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(results: dict) -> None:
    def line(name, n, positives, row):
        area = number(row.get("auroc"))
        if row.get("auroc_low") is not None:
            area += f" [{number(row['auroc_low'])}, {number(row['auroc_high'])}]"
        auprc, f1 = number(row.get("auprc")), number(row.get("f1"))
        return f"{name[:width]:<{width}}  {n:>6}  {positives:>8}  {area:<20}  {auprc:<9}  {f1}"

    width = max(len("micro"), *(len(name) for name in results["per_label"]))
    width = min(width, 40)
    level = f" [{100 * LEVEL:.0f} %]" if results["interval"] else ""
    print(f"\n{'label':<{width}}  {'n':>6}  {'positive':>8}  {'AUROC' + level:<20}  {'AUPRC':<9}  F1")
    for name, row in results["per_label"].items():
        print(line(name, row["n"], row["positives"], row))
    print(line("macro", "", "", results["macro"]))
    print(line("micro", "", "", results["micro"]))
    print(f"macro: over {results['macro']['n_defined']} of {len(results['per_label'])} labels\n")


# ==== Main =====================================================================================================


def main(argv=None) -> int:
    args = parse_args(argv)
    with process_group(args.device) as ctx:
        if args.predictions is None:
            cases = cases_of_checkpoint(args, ctx)
        elif ctx.master:
            cases = cases_of_files(args)
        else:
            return 0
        if not ctx.master:
            return 3 if cases.failed or cases.incomplete else 0
    results_path = args.output if args.output.suffix == ".json" else args.output / "results.json"
    try:
        results_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{results_path.parent}: could not be made: {e.strerror} (choose another --output)") from e
    results = score(cases, args.n_bootstrap if args.bootstrap else 0, args.seed)
    results["provenance"] = cases.files | {
        "command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "thresholds": cases.thresholds_source,
        "seed": args.seed,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    results = json_safe(results)
    write_outputs(results, cases, results_path)
    print(f"{results['evaluated']} on {results['evaluated_on']}: {results['n']} cases of {people(results)}")
    print(f"Thresholds: {cases.thresholds_source}")
    print_table(results)
    for warning in warnings_of(results):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Results: {results_path}\nReport: {results_path.parent / 'report.html'}")
    return 3 if cases.failed or cases.incomplete else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
