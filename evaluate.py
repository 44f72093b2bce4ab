"""Score a checkpoint, or anyone's predictions, against labels: numbers with confidence intervals, CSV, HTML report.

    python evaluate.py --test-only outputs/demo/best_model.pth --output outputs/demo/eval
    python evaluate.py --test-only outputs/demo/best_model.pth --csv other.csv --split test --output other/eval
    python evaluate.py --predictions preds.csv --labels labels.csv --output eval/
    python evaluate.py --predictions preds.csv --labels labels.csv --subgroup sex age scanner --output eval/
    python evaluate.py --compare old/best_model.pth new/best_model.pth --csv other.csv --split test --output compared/
    python evaluate.py --compare a.csv b.csv --labels labels.csv --output compared/
    python evaluate.py --checkpoint saves/best_model.pt --valid-data cache/valid --zero-shot --retrieval \\
        --output results/
    python evaluate.py --checkpoint saves/best_model.pt --config configs/ctclip.yaml --output results/results.json
    python evaluate.py --test-only logs/x/checkpoints/epoch_latest.pt --val-data lmdb/test --output evaluation/
    python evaluate.py --test-only models/best_model.pth --csv other.csv --image-dir images --output eval/
    torchrun --nproc_per_node 4 evaluate.py --test-only best_model.pth --output eval/      # the same numbers, sooner

A checkpoint brings its model, data, and per-label thresholds and temperatures that training fitted to validation data;
options given here override its data, and --validation or --threshold-part fits the latter to other patients. Two CSV
files do the same for any other program: `id` and `{label}_prob` columns; `id` and label columns (0, 1; empty or -1 =
unknown), with an optional `patient_id`. Every case counts: one that could not be read is listed, and makes the exit
code 3.
Of a model of images and reports (train_ctclip.py, train_retclip.py), also zero-shot labels from prompts, retrieval,
features, and a linear probe: a logistic regression for each label on the frozen image features of the training data
(CT-CLIP's LiPro). Of train_retclip.py a case is a pair of eyes, and retrieval is always computed; its labels are the
classes of the data (without two there is no table of labels), with a softmax over them by --templates, of which the
most probable counts as present (unless --threshold or --threshold-part bring thresholds). Its linear probe: see
retrieval.eyes_of. Of train_csi.py a case is a film with scores of six lung zones, and zones.py says what is written.

Writes into --output (or, where that ends in .json, to that file and its folder):
  predictions.csv  id, {label}_prob, {label}_pred (_pred_oracle with --oracle-thresholds), in the order of the data; no
                   probability where a case failed to load
  labels.csv       id, patient_id, labels: with predictions.csv all that is needed to score again
  report.html      by report.py, with pictures of the most confident errors by pictures.py
  test_imgs_features.pt, test_texts_features.pt: of train_retclip.py, keyed by id (retrieval.write_features)
  --compare: predictions_a.csv and predictions_b.csv in place of predictions.csv; results.json as compare.py says
  --export-features FILE (where it says): features as an npz (retrieval.export_features)
  results.json     (train_retclip.py: evaluation_results.json) all numbers, null = undefined (never 0):
    evaluated, evaluated_on   what was scored, on which cases: two phrases
    n, n_patients             cases (with the failed ones) and patients
    per_label                 {label: {n, positives, positive_patients, negative_patients, prevalence, threshold,
                              flagged, <metric>, <metric>_low, <metric>_high}}; n: cases with a known label; flagged:
                              those at or above the threshold
                              (null: the most probable class is flagged); {} without classes, and so are all averages;
                              tp, fp, fn, tn: cases at the threshold;
                              auroc_delong_low, auroc_delong_high: DeLong's interval, clustered by patient
                              operating_points: [{at: "sensitivity" or "specificity", target, threshold (null: only
                              flagging nobody reaches the target), sensitivity, specificity, ppv, npv}], read off the
                              scored cases; calibration: {slope, intercept, in_the_large, mce, ece_adaptive};
                              net_benefit: {threshold: {model, treat_all}}; all four: see clinical.py
                              temperature: fitted to validation cases, and calibrated: {brier, log_loss, ece} of the
                              probabilities whose logits are divided by it; null: there is none
    macro, micro              {<metric>, <metric>_low, <metric>_high}; macro: the mean over the labels where the metric
                              is defined (for auroc: n_defined of them)
                              metrics: auroc, auprc, f1, precision (PPV), recall (sensitivity), specificity, npv,
                              accuracy, balanced_accuracy, mcc (Matthews), kappa (Cohen), brier, log_loss, ece (15
                              bins (i/15, (i+1)/15])
    weighted                  the same for auroc, auprc, f1, precision, recall: mean weighted by the labels' positives
    overall                   crg (clinically relevant gain), exact_match (share of cases with every label right),
                              hamming (share of wrong labels), samples_f1 (mean over cases of the F1 of their labels),
                              with intervals; of train_retclip.py also top-1 accuracy and
                              balanced_accuracy (mean recall of the classes there are) of the accuracy_n cases with
                              exactly one positive label, and accuracy_majority: of always naming the commonest class
                              0/0 in precision, recall and f1 is 0, as in scikit-learn (see positives and flagged)
    interval                  {method, level, n_resamples, seed}, or null with --no-bootstrap
    thresholds_source         where the thresholds come from; a note says so if training fitted them on these cases
    oracle_thresholds         true where --oracle-thresholds fitted them to the scored cases
    threshold_part            {share, seed, n, patients} of --threshold-part: cases left out of everything above and
                              below, and of predictions.csv and labels.csv
    retrieval                 see retrieval.py
    subgroups, subgroup_gaps  of --subgroup: see subgroups.py
    wrong                     [{id, label, kind: "false positive" or "false negative", prob, threshold: what it had to
                              reach}], the most confident errors: see pictures.wrong_cases
    failed                    [{id, reason}]
    notes                     sentences a reader must know
    provenance                command, date, files and their sha256, versions, git commit
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import clinical
import common
from cases import (
    OVERRIDES,
    THRESHOLD_FLAGS,
    Cases,
    cases_of_checkpoint,
    cases_of_files,
    script_of,
    with_fitted_thresholds,
    with_oracle,
    with_probe,
    with_validation,
    write_tables,
)
from common import UserError, load_checkpoint, with_interval
from compare import cases_of_both, comparison, is_table, write_comparison
from page import number, people, warnings_of
from pictures import draw, found_cases, wrong_cases
from report import read_plain, write_report
from retrieval import (
    LEVEL,
    export_features,
    gallery,
    pair_retrieval,
    retrieval_lines,
    volume_retrieval,
    write_features,
)
from subgroups import read_columns, score_subgroups
from zones import film_cell, score_zones, write_zones, zone_lines

METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "npv", "accuracy", "balanced_accuracy", "mcc")
METRICS += ("kappa", "brier", "log_loss", "ece")
TABLES = ("labels", "csv", "data")  # what `files` calls the table with the cases' ids
WEIGHTED = ("auroc", "auprc", "f1", "precision", "recall")  # that have a mean weighted by positives


# ==== Arguments ================================================================================================


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("data")
    group.add_argument("--predictions", type=Path, help="CSV with id and {label}_prob columns, instead of a checkpoint")
    text = "CSV with id and label columns, for --predictions; other labels for a checkpoint of train_ctclip.py"
    group.add_argument("--labels", type=Path, nargs="+", metavar="CSV", help=text)
    group.add_argument("--label-columns", nargs="+", metavar="NAME", help="labels of --labels to evaluate (all)")
    group.add_argument("--subgroup", nargs="+", metavar="COLUMN", help="columns to score the cases of each value by")
    text = "CSV of ids and these columns (--labels, or the table of the checkpoint's data)"
    group.add_argument("--subgroup-table", type=Path, metavar="CSV", help=text)
    group.add_argument("--csv", type=Path, help="other data for the checkpoint, in the form its script reads")
    group.add_argument("--slice-dir", type=Path, help="other slices for a checkpoint of run_task2.py")
    group.add_argument("--data-dir", type=Path, help="folder of their labels")
    group.add_argument("--image-dir", type=Path, help="folder of the films, for a checkpoint of train_csi.py")
    text = "column of the film's path (FileID + suffix, in --image-dir)"
    group.add_argument("--image-column", metavar="NAME", help=text)
    group.add_argument("--mask-dir", type=Path, help="folder of their lung masks")
    group.add_argument("--split-file", type=Path, help="CSV of FileID and split (as in training)")
    group.add_argument("--patient-column", metavar="NAME", help="column of the patient (patient or patient_id)")
    group.add_argument("--split", help="rows of the CSV to evaluate (what the script evaluates)")
    group.add_argument("--data-root", type=Path, help="folder img_path may not leave (as in training)")
    text = "CSV of rescale slopes and intercepts (as in training)"
    group.add_argument("--metadata", type=Path, nargs="+", metavar="CSV", help=text)
    text = "other volumes: a cache of prepare_ct.py, or a CT-RATE folder; other pairs: what train_retclip.py reads"
    group.add_argument("--valid-data", "--val-data", type=Path, help=text)
    group.add_argument("--train-data", type=Path, help="other training data, of --linear-probe and --split train")
    group.add_argument("--reports", type=Path, nargs="+", metavar="CSV", help="reports of a CT-RATE folder")
    text = "what turns stored values into HU: auto, csv, header or none (as in training)"
    group.add_argument("--hu-source", choices=("auto", "csv", "header", "none"), help=text)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--threshold", type=float, help="probability that counts as present (the checkpoint's, or 0.5)")
    text = "share of the patients (0 to 0.9) to fit each label's threshold to, by F1; in no other number"
    group.add_argument("--threshold-part", type=float, default=0.0, metavar="F", help=text)
    text = "predictions.csv and labels.csv of validation cases to fit thresholds (by F1) and temperatures to"
    group.add_argument("--validation", type=Path, nargs=2, metavar=("PREDICTIONS", "LABELS"), help=text)
    text = "fit the thresholds to the scored cases themselves: an upper bound, marked as such in every output"
    group.add_argument("--oracle-thresholds", action="store_true", help=text)
    text = "labels from prompts, also where the checkpoint has a classifier (as in training)"
    group.add_argument("--zero-shot", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "pairs of a present and an absent prompt with {} for the label, averaged (the checkpoint's); other prompts "
    text += "than the checkpoint's imply --zero-shot"
    group.add_argument("--prompts", nargs="+", metavar="TEXT", help=text)
    text = "file of prompts with {} for a class, one a line, averaged, of train_retclip.py (the checkpoint's)"
    group.add_argument("--templates", type=Path, metavar="FILE", help=text)
    text = "find volumes by reports, reports by volumes, and volumes by volumes (of train_retclip.py: always)"
    group.add_argument("--retrieval", action="store_true", help=text)
    text = "score a logistic regression on the frozen image features of the training data in place of the model"
    group.add_argument("--linear-probe", action="store_true", help=text)
    group.add_argument("--export-features", type=Path, metavar="NPZ", help="file for the features of the cases")
    text = "images in the report of a checkpoint: the most confident errors with heat maps, a retrieval gallery (yes)"
    group.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "confidence intervals over patients"
    group.add_argument("--bootstrap", action=argparse.BooleanOptionalAction, default=True, help=text)
    group.add_argument("--n-bootstrap", "--n_bootstrap", type=int, default=1000, help="resamples of the intervals")
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--test-only", "--checkpoint", type=Path, metavar="CKPT", help="checkpoint to evaluate")
    text = "compare two checkpoints, or tables of predictions (.csv, with --labels), on the same cases"
    group.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help=text)
    group.add_argument("--output", type=Path, default=Path("eval"), help="folder, or .json file, of the results")
    group = parser.add_argument_group("system")
    group.add_argument("--batch-size", type=int, help="cases per process and forward pass (as in training)")
    group.add_argument("--num-workers", type=int, help="data processes per rank (as in training)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    group.add_argument("--seed", type=int, default=0, help="seed of the resamples, and of what patients are held out")
    text = "YAML or INI files of defaults, also those of the training script"
    group.add_argument("--config", type=Path, nargs="+", help=text)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    args = add_options(argparse.ArgumentParser(description=__doc__.splitlines()[0], **style)).parse_args(argv)
    if args.config:
        args = read_config(args, argv)
    if sum(given is not None for given in (args.test_only, args.predictions, args.compare)) != 1:
        text = "give either --test-only CKPT, or --predictions CSV and --labels CSV, or --compare A B"
        raise UserError(f"command line: {text}")
    tables = bool(args.predictions) or any(map(is_table, args.compare or ()))
    if tables and (args.labels is None or len(args.labels) > 1):
        raise UserError("command line: --predictions and --labels go together (one file each; also in --compare)")
    given = [name for name in (*OVERRIDES, "retrieval", "linear_probe", "export_features") if name != "labels"]
    for name in given if args.predictions or (args.compare and all(map(is_table, args.compare))) else ():
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: needs a checkpoint (--test-only)")
    if args.pictures and (args.predictions or args.compare or args.linear_probe):
        raise UserError("--pictures: are of a checkpoint's own scores, with --test-only (leave it out)")
    args.pictures = args.pictures is not False
    if len(set(args.label_columns or ())) < len(args.label_columns or ()):
        raise UserError("--label-columns: names a label twice (name each once)")
    alone = ("validation", "threshold_part", "oracle_thresholds", "retrieval", "linear_probe", "export_features")
    for name in (*alone, "subgroup", "subgroup_table"):
        if args.compare and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: of one model, not of --compare (leave one of the two out)")
    if args.subgroup_table and not args.subgroup:
        raise UserError("--subgroup-table: needs --subgroup COLUMN")
    if args.test_only and args.label_columns:
        raise UserError("--label-columns: the labels of a checkpoint are fixed (the option is for --predictions)")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: not a probability (0 to 1)")
    if not 0 <= args.threshold_part <= 0.9:
        raise UserError(f"--threshold-part {args.threshold_part}: not a share of the patients (0 to 0.9)")
    ways = [name for name in THRESHOLD_FLAGS if getattr(args, name) not in (None, False, 0.0)]
    ways = ["linear_probe"] * (args.linear_probe and ways != ["threshold"]) + ways
    if len(ways) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in ways[:2])
        raise UserError(f"{second}: {first} brings its own thresholds (leave out one of the two)")
    if args.linear_probe and args.zero_shot:
        raise UserError("--linear-probe: takes the place of --zero-shot (leave out one of the two)")
    if args.bootstrap and args.n_bootstrap < 2:
        raise UserError(f"--n-bootstrap {args.n_bootstrap}: at least 2 resamples (--no-bootstrap for none)")
    if args.seed < 0:
        raise UserError("--seed must not be negative")
    return args


def read_config(args, argv) -> argparse.Namespace:
    """Parse again with the defaults of --config. The file may be that of the training: its data keys are used, and its
    other keys, which the checkpoint already holds, are not."""
    checkpoints = [path for path in args.compare or [args.test_only] if path and not is_table(path)]
    parser = argparse.ArgumentParser(conflict_handler="resolve", add_help=False, allow_abbrev=False)
    for path in checkpoints:
        for action in script_of(load_checkpoint(path), path).build_parser()._actions:
            action.default, action.required = argparse.SUPPRESS, False
            parser._add_action(action)
    merged = common.parse_with_config(add_options(parser), argv)
    unused = [name for name in vars(merged) if name not in vars(args)]
    if unused:
        files = ", ".join(map(str, args.config))
        print(f"{files}: not used, the checkpoint has its own: {', '.join(unused)}")
    return merged


# ==== Numbers ==================================================================================================


def case_facts(cases: Cases, n_resamples: int, seed: int) -> dict:
    """The head of results.json, of any task."""
    how = {"method": "percentile bootstrap over patients", "level": LEVEL, "n_resamples": n_resamples, "seed": seed}
    return {
        "evaluated": cases.evaluated,
        "evaluated_on": cases.evaluated_on,
        "n": len(cases.ids),
        "n_patients": len(set(cases.groups)),
        "interval": how if n_resamples else None,
        "failed": [{"id": i, "reason": reason} for i, reason in cases.failed.items()],
        "notes": cases.notes,
    }


def score(cases: Cases, n_resamples: int, seed: int) -> dict:
    """The numbers of results.json, to the last digit the same in any order of the cases; 0 resamples: no intervals."""
    names = cases.class_names
    loaded = np.isfinite(cases.probs if names else cases.image_features).all(axis=1)
    order = np.array(sorted(np.flatnonzero(loaded), key=lambda i: cases.ids[i]), int)
    if not len(order):
        first = next(iter(cases.failed.items()), ("each", "an eye is missing"))
        raise UserError(
            f"{cases.evaluated_on}: none of {len(cases.ids)} cases could be read (first {': '.join(first)})"
        )
    targets, probs, groups = cases.targets[order], cases.probs[order], np.array(cases.groups)[order]
    numbered = [f"label{k}" for k in range(len(names))]  # a label called "macro" would give the key of the macro mean
    values, spread, cut = {}, {}, cases.cut(probs) if names else None
    if names:
        values = common.multilabel_metrics(targets, probs, numbered, cut)
    if names and n_resamples:
        spread = common.bootstrap_intervals(targets, probs, numbered, cut, groups, n_resamples, seed, LEVEL)

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

    per_label, patients = {}, clinical.patients_with(targets, groups).tolist()
    for k, name in enumerate(names):
        n, positives = int(values[f"label{k}_n"]), int(values[f"label{k}_positives"])
        share = positives / n if n else None
        threshold = None if cases.most_probable else cases.thresholds[k]
        without, with_it = patients[k]
        counts = {"n": n, "positives": positives, "positive_patients": with_it, "negative_patients": without}
        counts |= {"prevalence": share, "threshold": threshold}
        known = ~np.isnan(targets[:, k])
        y, said = targets[known, k] == 1, (probs >= cut)[known, k]
        cells = {"tp": y & said, "fp": ~y & said, "fn": y & ~said, "tn": ~y & ~said}
        counts |= {"flagged": int(said.sum())} | {cell: int(cases_in.sum()) for cell, cases_in in cells.items()}
        per_label[name] = counts | block(f"label{k}_") | tempered_scores(cases, targets, probs, k)
        per_label[name] |= clinical.numbers_of_label(y, probs[known, k], groups[known], LEVEL)
    top_1 = accuracies(targets, probs, groups, n_resamples, seed) if names and cases.pairs else {}
    return {
        "per_label": per_label,
        "macro": block("macro_") | ({"n_defined": int(values["n_defined_auroc"])} if names else {}),
        "micro": block("micro_"),
        "weighted": block("weighted_", WEIGHTED),
        "overall": block("", ("crg", "exact_match", "hamming", "samples_f1")) | top_1,
        "thresholds_source": cases.thresholds_source,
        "oracle_thresholds": cases.oracle,
        "wrong": wrong_cases(cases),
    }


def tempered_scores(cases: Cases, targets, probs, k: int) -> dict:
    """The temperature of label k, and how well its probabilities are calibrated with it; null where there is none."""
    if cases.temperatures is None or np.isnan(cases.temperatures[k]):
        return {"temperature": None, "calibrated": None}
    y, p = targets[:, k], common.tempered(probs[:, k], cases.temperatures[k])
    found = {"brier": common.brier_score(y, p), "log_loss": common.log_loss(y, p)}
    return {
        "temperature": cases.temperatures[k],
        "calibrated": found | {"ece": common.expected_calibration_error(y, p)},
    }


def accuracies(targets, probs, groups, n_resamples: int, seed: int) -> dict:
    """Top-1 accuracies of the cases with exactly one positive label, and their intervals; see the head of the file."""
    one = ((targets == 1).sum(1) == 1) & ~np.isnan(targets).any(1)
    if not one.any():
        return {"accuracy_n": 0, "accuracy": None, "balanced_accuracy": None, "accuracy_majority": None}
    found = {"accuracy_n": int(one.sum()), "accuracy_majority": (targets[one] == 1).mean(0).max()}
    weights = common.bootstrap_weights(groups[one], n_resamples, seed)
    return found | with_interval(common.top_1_metrics(targets[one], probs[one], weights), LEVEL)


def git_commit() -> str | None:
    """Commit of this code, with '+' where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10)  # noqa: E731
        head = run("rev-parse", "HEAD")
        changed = "+" if run("status", "--porcelain", "-uno").stdout else ""
        return None if head.returncode else head.stdout.strip() + changed
    except (OSError, subprocess.TimeoutExpired):
        return None


# ==== Output ===================================================================================================


def write_outputs(folder: Path, results: dict, cases: Cases) -> None:
    """predictions.csv, labels.csv, report.html."""
    shown = None
    if "image_to_text" in results.get("retrieval", {}):
        write_features(folder, cases.pairs)
        shown = gallery(cases.pairs, cases.ids, cases.pairs["pictures"]) if cases.pairs["pictures"] else None
    if cases.class_names:
        write_tables(folder, cases)
    drawn = draw(cases, results["wrong"] + found_cases(cases)) if cases.images and cases.class_names else None
    write_report(folder / "report.html", results, cases.targets, cases.probs, shown, drawn)


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


def refuse_overwriting(args) -> None:
    """Raise UserError if a file that is written is one that is read."""
    folder = args.output.parent if args.output.suffix == ".json" else args.output
    tables = ("predictions_a.csv", "predictions_b.csv") if args.compare else ("predictions.csv",)
    written = {(folder / name).resolve() for name in (*tables, "labels.csv")} | {args.output.resolve()}
    read = [args.predictions, args.csv, args.subgroup_table, *(args.labels or ()), *(args.compare or ())]
    for path in [*read, *(args.validation or ())]:
        if path and path.resolve() in written:
            raise UserError(f"--output {args.output}: {path} is read, and would be overwritten (choose another)")
    own = [folder / "predictions.csv", folder / "predictions_a.csv"]  # each is written before labels.csv
    if (folder / "labels.csv").exists() and not any(path.exists() for path in own):
        raise UserError(f"--output {args.output}: {folder / 'labels.csv'} is of no evaluation (choose another folder)")


def main(argv=None) -> int:
    args = parse_args(argv)
    refuse_overwriting(args)
    if args.subgroup_table:  # mistakes in these files are found before the inference
        read_columns(args.subgroup_table, args.subgroup)
    for path in args.validation or ():
        common.need_columns(read_plain(path), ["id"], path)
    both = None
    with common.process_group(args.device) as ctx:
        if args.compare:
            both = cases_of_both(args, ctx)
            cases = both[0]
        elif args.predictions is None:
            cases = cases_of_checkpoint(args, ctx)
        elif ctx.master:
            cases = cases_of_files(args)
        else:
            return 0
        if not ctx.master:
            return 3 if cases.failed or cases.incomplete else 0
    name = "evaluation_results.json" if cases.pairs else "results.json"
    results_path = args.output if args.output.suffix == ".json" else args.output / name
    for folder in [results_path.parent] + ([args.export_features.parent] if args.export_features else []):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{folder}: could not be made: {e.strerror} (choose another --output)") from e
    common.remove_stale([results_path.parent])
    if args.export_features:
        export_features(args.export_features, cases)
    n_resamples, part = args.n_bootstrap if args.bootstrap else 0, None
    with threadpool_limits(1):  # the last digits of a matrix product depend on the thread count; torchrun changes it
        if args.linear_probe:
            cases = with_probe(cases, args.threshold, args.seed)
        if args.threshold_part:
            cases, part = with_fitted_thresholds(cases, args.threshold_part, args.seed)
        if args.validation:
            cases = with_validation(cases, *args.validation)
        if args.oracle_thresholds:
            cases = with_oracle(cases)
        numbers = score_zones if cases.zones else score
        results = case_facts(cases, n_resamples, args.seed)
        if both:
            results |= comparison(*both, results, [numbers(some, n_resamples, args.seed) for some in both])
        else:
            results |= numbers(cases, n_resamples, args.seed)
        if cases.pairs and not args.linear_probe:
            results["retrieval"] = pair_retrieval(cases.pairs, cases.ids, n_resamples, args.seed)
        elif args.retrieval and not cases.pairs:
            results["retrieval"] = volume_retrieval(cases, n_resamples, args.seed)
        if args.subgroup:
            table = args.subgroup_table or Path(cases.files[next(k for k in TABLES if k in cases.files)]["file"])
            of_films = film_cell if cases.zones else None
            found, notes = score_subgroups(cases, table, args.subgroup, n_resamples, args.seed, of_films)
            results |= found | {"notes": results["notes"] + notes}
    if part:
        results["threshold_part"] = part
    results["provenance"] = cases.files | {
        "command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        **({} if cases.zones or both else {"thresholds": cases.thresholds_source}),
        "seed": args.seed,
        "git_commit": git_commit(),
        "versions": common.versions(),
    }
    results = common.json_safe(results)
    if both:
        write_comparison(results_path.parent, results, *both)
    else:
        (write_zones if cases.zones else write_outputs)(results_path.parent, results, cases)
    # last: where the results stand, the rest is complete
    common.write_atomic(results_path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{results['evaluated']} on {results['evaluated_on']}: {results['n']} cases of {people(results)}")
    if both:
        print("\n".join(["", *(f"- {one['text']}" for one in results["comparison"]["sentences"]), ""]))
    elif cases.zones:
        print("\n".join(["", *zone_lines(results), ""]))
    else:
        print(f"Thresholds: {cases.thresholds_source}")
    if results.get("per_label"):
        print_table(results)
    if "retrieval" in results:
        print("\n".join(retrieval_lines(results["retrieval"], n_resamples > 0)) + "\n")
    for warning in warnings_of(results):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Results: {results_path}\nReport: {results_path.parent / 'report.html'}")
    if args.export_features:
        print(f"Features: {args.export_features}")
    return 3 if cases.failed or cases.incomplete else 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
