"""Score a checkpoint, or anyone's predictions, against labels: numbers with confidence intervals, CSV, HTML report.

    python evaluate.py --test-only outputs/demo/best_model.pth --output outputs/demo/eval
    python evaluate.py --test-only outputs/demo/best_model.pth --csv other.csv --split test --output other/eval
    python evaluate.py --predictions preds.csv --labels labels.csv --output eval/
    python evaluate.py --checkpoint saves/best_model.pt --valid-data cache/valid --zero-shot --retrieval \\
        --output results/
    python evaluate.py --checkpoint saves/best_model.pt --config configs/ctclip.yaml --output results/results.json
    python evaluate.py --test-only logs/x/checkpoints/epoch_latest.pt --val-data lmdb/test --output evaluation/
    python evaluate.py --test-only models/best_model.pth --csv other.csv --image-dir images --output eval/
    torchrun --nproc_per_node 4 evaluate.py --test-only best_model.pth --output eval/      # the same numbers, sooner

A checkpoint brings its model, data, and per-label thresholds; options given here override its data. Two CSV files do
the same for any other program: `id` and `{label}_prob` columns; `id` and label columns (0, 1; empty or -1 = unknown),
with an optional `patient_id`. Every case counts: one that could not be read is listed, and makes the exit code 3.
Of a model of images and reports (train_ctclip.py, train_retclip.py), also zero-shot labels from prompts, retrieval,
features, and a linear probe: a logistic regression for each label on the frozen image features of the training data
(CT-CLIP's LiPro). Of train_retclip.py a case is a pair of eyes, and retrieval is always computed; its labels are the
classes of the data (without two there is no table of labels), with a softmax over them by --templates, of which the
most probable counts as present (unless --threshold or --threshold-part bring thresholds). Its linear probe: see
retrieval.eyes_of. Of train_csi.py a case is a film with scores of six lung zones, and zones.py says what is written.

Writes into --output (or, where that ends in .json, to that file and its folder):
  predictions.csv  id, {label}_prob, {label}_pred; in the order of the data; no probability where a case failed to load
  labels.csv       id, patient_id, labels: with predictions.csv all that is needed to score again
  report.html      by report.py
  test_imgs_features.pt, test_texts_features.pt: of train_retclip.py, keyed by id (retrieval.write_features)
  --export-features FILE (where it says): features as an npz (retrieval.export_features)
  results.json     (train_retclip.py: evaluation_results.json) all numbers, null = undefined (never 0):
    evaluated, evaluated_on   what was scored, on which cases: two phrases
    n, n_patients             cases (with the failed ones) and patients
    per_label                 {label: {n, positives, prevalence, threshold, flagged, <metric>, <metric>_low,
                              <metric>_high}}; n: cases with a known label; flagged: those at or above the threshold
                              (null: the most probable class is flagged); {} without classes, macro and micro too
    macro, micro              {<metric>, <metric>_low, <metric>_high}; macro: the mean over the labels where the metric
                              is defined (for auroc: n_defined of them)
                              metrics: auroc, auprc, f1, precision, recall, specificity, accuracy, brier, log_loss, ece
    overall                   crg (clinically relevant gain), exact_match; of train_retclip.py also top-1 accuracy and
                              balanced_accuracy (mean recall of the classes there are) of the accuracy_n cases with
                              exactly one positive label, and accuracy_majority: of always naming the commonest class
                              0/0 in precision, recall and f1 is 0, as in scikit-learn (see positives and flagged)
    interval                  {method, level, n_resamples, seed}, or null with --no-bootstrap
    thresholds_source         where the thresholds come from; a note says so if training fitted them on these cases
    threshold_part            {share, seed, n, patients} of --threshold-part: cases left out of everything above and
                              below, and of predictions.csv and labels.csv
    retrieval                 see retrieval.py
    failed                    [{id, reason}]
    notes                     sentences a reader must know
    provenance                command, date, files and their sha256, versions, git commit
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib
import json
import shlex
import subprocess
import sys
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import common
from common import UserError, choose_thresholds, f1_thresholds, load_checkpoint, with_interval, write_csv
from report import number, people, read_scores, warnings_of, write_report
from retrieval import (
    LEVEL,
    export_features,
    eyes_of,
    gallery,
    pair_retrieval,
    retrieval_lines,
    volume_retrieval,
    write_features,
)
from zones import score_zones, write_zones, zone_lines, zones_of

# task in the checkpoint -> the script that trained it
TASKS = {"siglip": "finetune_siglip", "task2": "run_task2", "ctclip": "train_ctclip", "retclip": "train_retclip"}
TASKS["csi"] = "train_csi"
WITH_FEATURES = ("ctclip", "retclip")  # tasks whose `predict` gives features of images and texts
METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "accuracy", "brier", "log_loss", "ece")
# of a checkpoint's arguments
OVERRIDES = ("csv", "slice_dir", "data_dir", "split", "data_root", "metadata", "batch_size", "num_workers")
OVERRIDES += ("train_data", "valid_data", "reports", "labels", "hu_source", "zero_shot", "prompts", "templates")
OVERRIDES += ("image_dir", "image_column", "mask_dir", "split_file", "patient_column")
PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse strengths of the probe's regularisation to choose from
PROBE_HELD_OUT = 0.25  # of the training patients: for that choice, and for the thresholds


# ==== Arguments ================================================================================================


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("data")
    group.add_argument("--predictions", type=Path, help="CSV with id and {label}_prob columns, instead of a checkpoint")
    text = "CSV with id and label columns, for --predictions; other labels for a checkpoint of train_ctclip.py"
    group.add_argument("--labels", type=Path, nargs="+", metavar="CSV", help=text)
    group.add_argument("--label-columns", nargs="+", metavar="NAME", help="labels of --labels to evaluate (all)")
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
    text = "confidence intervals over patients"
    group.add_argument("--bootstrap", action=argparse.BooleanOptionalAction, default=True, help=text)
    group.add_argument("--n-bootstrap", "--n_bootstrap", type=int, default=1000, help="resamples of the intervals")
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--test-only", "--checkpoint", type=Path, metavar="CKPT", help="checkpoint to evaluate")
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
    if (args.test_only is None) == (args.predictions is None):
        raise UserError("command line: give either --test-only CKPT, or --predictions CSV and --labels CSV")
    if args.predictions and (args.labels is None or len(args.labels) > 1):
        raise UserError("command line: --predictions and --labels go together (one file each)")
    for name in ("zero_shot", "prompts", "templates", "retrieval", "linear_probe", "export_features"):
        if args.predictions and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: needs a checkpoint (--test-only)")
    if args.test_only and args.label_columns:
        raise UserError("--label-columns: the labels of a checkpoint are fixed (the option is for --predictions)")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: not a probability (0 to 1)")
    if not 0 <= args.threshold_part <= 0.9:
        raise UserError(f"--threshold-part {args.threshold_part}: not a share of the patients (0 to 0.9)")
    if args.threshold_part and (args.threshold is not None or args.linear_probe):
        other = "--linear-probe" if args.linear_probe else "--threshold"
        raise UserError(f"--threshold-part: {other} brings its own thresholds (leave out one of the two)")
    if args.linear_probe and args.zero_shot:
        raise UserError("--linear-probe: takes the place of --zero-shot (leave out one of the two)")
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
    merged = common.parse_with_config(add_options(parser), argv)
    unused = [name for name in vars(merged) if name not in vars(args)]
    if unused:
        files = ", ".join(map(str, args.config))
        print(f"{files}: not used, the checkpoint has its own: {', '.join(unused)}")
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
    incomplete: bool = False  # something that is not a case, or not all of one, failed to load
    image_features: np.ndarray | None = None  # (n, E) float32, L2-normalised; NaN rows: failed
    text_features: np.ndarray | None = None  # (n, E); NaN rows: failed, or no report
    texts: list[str] | None = None  # reports, '' = none
    training: dict | None = None  # what `predict` gives of the training data, for --linear-probe
    most_probable: bool = False  # the most probable label counts as present, whatever the thresholds
    pairs: dict | None = None  # what `predict` of train_retclip.py gives, and `pictures` of the data set
    zones: dict | None = None  # of train_csi.py: Films, script, dataset, model, device, medians; then not the above

    def cut(self, probs) -> np.ndarray:
        """What a probability (n, K) must reach to count as present: (K,) thresholds, or each case's highest (n, 1)."""
        return probs.max(axis=1, keepdims=True) if self.most_probable else self.thresholds

    def part(self, rows: np.ndarray) -> dict:
        """The arrays of some rows, bool (n,), as keywords for `dataclasses.replace`."""
        names = ("ids", "groups", "targets", "probs", "image_features", "text_features", "texts")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {k: v[rows] if isinstance(v, np.ndarray) else list(compress(v, rows)) for k, v in found.items()}


def cases_of_files(args) -> Cases:
    """Cases of --predictions and --labels."""
    ids, groups, targets, probs, class_names = read_scores(args.predictions, args.labels[0], args.label_columns)
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
        evaluated_on=args.labels[0].name,
        notes=[],
        files={"predictions": file_facts(args.predictions), "labels": file_facts(args.labels[0])},
    )


def script_of(saved: dict, path: Path):
    """The module of the script that wrote a checkpoint."""
    if saved.get("task") not in TASKS:
        raise UserError(f"{path}: of the unknown task '{saved.get('task')}' (known: {', '.join(TASKS)})")
    return importlib.import_module(TASKS[saved["task"]])


def overrides_of(args, saved: dict, script) -> dict:
    """What the command line changes of the checkpoint's arguments."""
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    foreign = [name for name in given if name not in saved["args"]]
    if foreign:
        raise UserError(f"--{foreign[0].replace('_', '-')}: not an option of {script.__name__}.py's checkpoints")
    single = {action.dest for action in script.build_parser()._actions if action.nargs is None}
    for name in single & {name for name, value in given.items() if isinstance(value, list)}:
        if len(given[name]) > 1:
            raise UserError(f"--{name.replace('_', '-')}: {script.__name__}.py takes one file")
        given[name] = given[name][0]
    if given.get("prompts", saved["args"].get("prompts")) != saved["args"].get("prompts"):
        given["zero_shot"] = True
    return given


def args_for(saved: dict, script, given: dict, **more) -> argparse.Namespace:
    """The script's arguments; tables named in training belong to its folder, not to another one given now."""
    args = script.args_from_checkpoint(saved, **given | more, on_bad_sample="skip")
    folder = "train_data" if args.split == "train" else "valid_data"
    if folder in given and Path(given[folder]) != Path(saved["args"][folder] or ""):
        vars(args).update({name: None for name in ("reports", "metadata", "labels") if name not in given})
    return args


def cases_of_checkpoint(args, ctx) -> Cases:
    """Run the checkpoint's model over its data; every rank returns the same cases."""
    saved = load_checkpoint(args.test_only)
    script = script_of(saved, args.test_only)
    for name in ("retrieval", "linear_probe", "export_features"):
        if getattr(args, name) and saved["task"] not in WITH_FEATURES:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: {script.__name__}.py's checkpoints give no features of images and texts")
    if saved["task"] == "csi" and (args.threshold is not None or args.threshold_part):
        flag = "--threshold-part" if args.threshold_part else "--threshold"
        raise UserError(f"{flag}: the scores of {script.__name__}.py's checkpoints have no threshold (leave it out)")
    paired = saved["task"] == "retclip"
    for name in ("zero_shot", "prompts"):
        if paired and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: of train_ctclip.py; {script.__name__}.py has no other classifier (--templates)")
    given = overrides_of(args, saved, script)
    task_args = args_for(saved, script, given)
    dataset = script.build_eval_dataset(task_args)
    names = list(dataset.class_names)
    model, training = script.build_eval_model(saved, task_args, ctx.device), None
    if args.linear_probe:
        train_args = args_for(saved, script, given, split="train")
        train_set = script.build_eval_dataset(train_args)
        if paired:
            names = dataset.class_names = train_set.class_names = sorted({*names, *train_set.class_names})
        training = script.predict(model, train_set, ctx, "training data")
        if paired and not (dataset.has_patients and train_set.has_patients) and dataset.source != train_set.source:
            training["groups"] = [f"training data, {name}" for name in training["groups"]]  # each may count from 0
    out = script.predict(model, dataset, ctx, "prediction")
    pairs, zones = out | {"pictures": dataset.pictures} if paired else None, None
    if saved["task"] == "csi":
        zones = zones_of(saved, script, task_args, dataset, model, ctx.device, out)
    if paired and args.linear_probe:
        names, out, training = eyes_of(names, out, training)
    elif paired:  # the zero-shot scores of pairs; one class is none: there is nothing to tell it from
        names = names if len(names) > 1 else []
        out = out | {k: out[k][:, : len(names)] for k in ("targets", "probs")} | {"text_features": None, "texts": None}
        out["image_features"] = out["image_features"]["patient"]

    def prompts_of(some: dict) -> list | None:  # None: the probabilities are a classifier's
        if paired:
            return some["templates"]
        by_head = "zero_shot" not in some or (not some["zero_shot"] and getattr(model, "classifier", None) is not None)
        return None if by_head else some["prompts"]

    prompts = prompts_of(vars(task_args)) if names else None
    changed = prompts != prompts_of(saved["args"])
    thresholds, source = choose_thresholds(args.threshold, {} if changed else saved)
    most_probable = paired and args.threshold is None and not (args.threshold_part or args.linear_probe)
    if most_probable:
        source = "none: the most probable class of a case counts as present" if names else "none: no classes"
    elif paired and args.threshold_part and not names:
        raise UserError("--threshold-part: the data have no two classes (leave it out)")
    unread, all_rows = [dataset.ids[i] for i in out.get("unread", [])], range(len(out["ids"]))
    table, notes = script.data_file(task_args), []
    where = f"split '{task_args.split}' of {table.name}"
    if paired:  # the folder of an LMDB, or the beginning of two files
        where = "/".join((task_args.train_data if task_args.split == "train" else task_args.valid_data).parts[-2:])

    def is_that_of(split) -> bool:
        try:
            return table.resolve() == script.data_file(script.args_from_checkpoint(saved), split).resolve()
        except (UserError, TypeError, AttributeError):  # the training data are not on this machine, or there were none
            return False

    same_data, trained = is_that_of(task_args.split), is_that_of("train") if paired else False
    if not trained and same_data and task_args.split == saved["args"]["split"]:
        own = args.threshold is None and not (args.threshold_part or args.linear_probe or changed or zones)
        if own and saved["task"] in WITH_FEATURES and saved["thresholds"]:
            own, thresholds, source = False, 0.5, "0.5 (the checkpoint's were fitted on these cases; --threshold-part)"
        chosen = "its best epoch" if paired else "the model and its thresholds" if own else "the model"
        if paired and "state" in saved:  # one that a run goes on from, whatever its score
            notes.append("These are the validation cases of the training; they did not choose this checkpoint")
        else:
            notes.append(
                f"These are the validation cases by which training chose {chosen}: the numbers are too good to be "
                "expected of new patients (--split, --csv, --slice-dir or --valid-data for cases that training has not "
                "seen)"
            )
    elif trained or (same_data and task_args.split in ("train", "all")):
        some = "some of " if task_args.split == "all" else ""
        notes.append(f"The model was trained on {some}these cases: the numbers say nothing about new patients")
    alone = np.flatnonzero(np.isnan(out["image_features"]).any(1)) if paired else []
    alone = [out["ids"][i] for i in alone if i not in out["failed"]]
    if alone:
        first = ", ".join(alone[:10])
        notes.append(f"{len(alone)} pairs lack an eye, and are in no number that needs both: {first}")
    if unread:
        first = ", ".join(unread[:10])
        notes.append(f"{len(unread)} slices could not be read and are missing in their volumes: {first}")
    if changed and saved.get("thresholds") is not None:
        source += "; the checkpoint's belong to other probabilities"
    files = {"checkpoint": file_facts(args.test_only), "data" if paired else "csv": file_facts(table)}
    files["trained_with"] = saved["versions"]
    if args.linear_probe:
        files["probe_trained_on"] = file_facts(script.data_file(train_args, "train"))
    elif prompts:
        files["prompts"] = "; ".join(prompts)
    return Cases(
        ids=list(out["ids"]),
        groups=list(out["groups"]),
        class_names=names,
        targets=np.asarray(out["targets"], np.float64),
        probs=out["probs"],
        failed={out["ids"][i]: why_failed(dataset, out.get("pair_rows", all_rows)[i]) for i in out["failed"]},
        thresholds=np.full(len(names), thresholds),
        thresholds_source=source,
        evaluated=args.test_only.name + (", zero-shot" if prompts and not args.linear_probe else ""),
        evaluated_on=where,
        notes=notes,
        files=files,
        incomplete=bool(unread or (training and training["failed"])),
        training=training,
        most_probable=most_probable,
        pairs=pairs,
        zones=zones,
        **{k: out.get(k) for k in ("image_features", "text_features", "texts")},
    )


def why_failed(dataset, index: int) -> str:
    try:
        dataset.load(index)
        return "it can be read, but the model's output is not a number"
    except UserError as e:
        return str(e)


def file_facts(path: Path) -> dict:
    return {"file": str(path), "sha256": common.file_sha256(path)}


def in_part(patients, share: float, seed: int) -> np.ndarray:
    """(n,) bool: a share of the patients, by a hash of the name and the seed, whatever else is in the data."""

    def draw(name) -> float:
        return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) / 2**64

    return np.array([draw(name) < share for name in patients])


def with_fitted_thresholds(cases: Cases, share: float, seed: int) -> tuple[Cases, dict]:
    """The cases of the other patients, with thresholds fitted to this share of them; and facts about that part."""
    fitted = in_part(cases.groups, share, seed) & ~np.isnan(cases.probs).any(1)  # a failed case stays listed
    patients = sorted(set(np.array(cases.groups, object)[fitted]))
    if not fitted.any() or fitted.all():
        which = "no patient" if not fitted.any() else "every patient"
        raise UserError(f"--threshold-part {share}: {which} of {len(set(cases.groups))} falls into it (or --seed)")
    targets = cases.targets[fitted]
    source = f"per label, best F1 on {fitted.sum()} cases of {len(patients)} patients that are not scored"
    empty = [name for name, y in zip(cases.class_names, targets.T, strict=True) if not (y == 1).any()]
    source += f"; 0.5 without a positive case there: {', '.join(empty)}" if empty else ""
    facts = {"share": share, "seed": seed, "n": int(fitted.sum()), "patients": patients}
    thresholds = f1_thresholds(targets, cases.probs[fitted])
    kept = dataclasses.replace(cases, **cases.part(~fitted), thresholds=thresholds, thresholds_source=source)
    return kept, facts


def with_probe(cases: Cases, threshold: float | None, seed: int) -> Cases:
    """The cases with probabilities of a linear probe of the training data's image features.

    For each label a logistic regression on standardised features. How strongly it is regularised is chosen by the
    log-loss, and the threshold by F1, on training patients held out; then it is fitted again to all of them.
    """
    train, names = cases.training, cases.class_names
    shared = sorted(set(train["groups"]) & set(cases.groups))
    if shared:
        raise UserError(f"--linear-probe: patient {shared[0]} is in the training data and scored ({len(shared)} are)")
    x, y = np.asarray(train["image_features"], np.float64), np.asarray(train["targets"], np.float64)
    held = in_part(train["groups"], PROBE_HELD_OUT, seed)
    read = np.isfinite(x).all(1)
    fit, held = read & ~held, read & held
    if not fit.any() or not held.any():
        raise UserError("--linear-probe: too few training patients that could be read (or another --seed)")
    mean, std = x[read].mean(0), x[read].std(0)
    std[std == 0] = 1
    x, scored = (x - mean) / std, (cases.image_features.astype(np.float64) - mean) / std
    loaded = np.isfinite(scored).all(1)
    probs, held_probs = np.full((len(scored), len(names)), np.nan), np.full((held.sum(), len(names)), 0.5)
    constant = []
    for k, name in enumerate(names):
        a, b = fit & ~np.isnan(y[:, k]), ~np.isnan(y[held, k])
        if len(set(y[a, k])) < 2:  # nothing to tell apart
            probs[loaded, k] = held_probs[:, k] = y[a, k].mean() if a.any() else 0.5
            constant.append(name)
            continue
        best, strength = np.inf, PROBE_C[0]
        for c in PROBE_C:
            p = LogisticRegression(C=c, max_iter=2000).fit(x[a], y[a, k]).predict_proba(x[held])[:, 1]
            loss = common.log_loss(y[held, k], p) if b.any() else 0.0
            if loss < best:
                best, strength, held_probs[:, k] = loss, c, p
        known = read & ~np.isnan(y[:, k])
        model = LogisticRegression(C=strength, max_iter=2000).fit(x[known], y[known, k])
        probs[loaded, k] = model.predict_proba(scored[loaded])[:, 1]
    thresholds, source = threshold, f"{threshold} (--threshold)"
    if threshold is None:
        thresholds = f1_thresholds(y[held], held_probs)
        source = f"per label, best F1 on {held.sum()} training cases held out from the probe"
    notes = list(cases.notes)
    if constant:
        notes.append(f"The probe had only one class to learn from, and gives a constant, for {', '.join(constant)}")
    if not read.all():
        notes.append(f"{(~read).sum()} of {len(read)} training cases failed to load and are not in the probe")
    return dataclasses.replace(
        cases,
        probs=probs,
        thresholds=np.full(len(names), thresholds),
        thresholds_source=source,
        evaluated=f"linear probe of {cases.evaluated}",
        notes=notes,
    )


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

    per_label = {}
    for k, name in enumerate(names):
        n, positives = int(values[f"label{k}_n"]), int(values[f"label{k}_positives"])
        share = positives / n if n else None
        threshold = None if cases.most_probable else cases.thresholds[k]
        counts = {"n": n, "positives": positives, "prevalence": share, "threshold": threshold}
        counts["flagged"] = int((probs >= cut)[~np.isnan(targets[:, k]), k].sum())
        per_label[name] = counts | block(f"label{k}_")
    top_1 = accuracies(targets, probs, groups, n_resamples, seed) if names and cases.pairs else {}
    return {
        "per_label": per_label,
        "macro": block("macro_") | ({"n_defined": int(values["n_defined_auroc"])} if names else {}),
        "micro": block("micro_"),
        "overall": block("", ("crg", "exact_match")) | top_1,
        "thresholds_source": cases.thresholds_source,
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
        shown = gallery(cases.pairs, cases.ids, cases.pairs["pictures"])
    labels = {"id": cases.ids, "patient_id": cases.groups}
    for k, name in enumerate(cases.class_names):
        labels[name] = pd.Series(cases.targets[:, k]).astype("Int64")
    if cases.class_names:
        predictions = common.prediction_table(cases.ids, cases.probs, cases.class_names, cases.cut(cases.probs))
        write_csv(folder / "predictions.csv", predictions)
        write_csv(folder / "labels.csv", pd.DataFrame(labels))
    write_report(folder / "report.html", results, cases.targets, cases.probs, shown)


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
    with common.process_group(args.device) as ctx:
        if args.predictions is None:
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
    if args.export_features:
        export_features(args.export_features, cases)
    n_resamples, part = args.n_bootstrap if args.bootstrap else 0, None
    with threadpool_limits(1):  # the last digits of a matrix product depend on the thread count; torchrun changes it
        if args.linear_probe:
            cases = with_probe(cases, args.threshold, args.seed)
        if args.threshold_part:
            cases, part = with_fitted_thresholds(cases, args.threshold_part, args.seed)
        numbers = score_zones if cases.zones else score
        results = case_facts(cases, n_resamples, args.seed) | numbers(cases, n_resamples, args.seed)
        if cases.pairs and not args.linear_probe:
            results["retrieval"] = pair_retrieval(cases.pairs, cases.ids, n_resamples, args.seed)
        elif args.retrieval and not cases.pairs:
            results["retrieval"] = volume_retrieval(cases, n_resamples, args.seed)
    if part:
        results["threshold_part"] = part
    results["provenance"] = cases.files | {
        "command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        **({} if cases.zones else {"thresholds": cases.thresholds_source}),
        "seed": args.seed,
        "git_commit": git_commit(),
        "versions": common.versions(),
    }
    results = common.json_safe(results)
    (write_zones if cases.zones else write_outputs)(results_path.parent, results, cases)
    # last: where the results stand, the rest is complete
    common.write_atomic(results_path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{results['evaluated']} on {results['evaluated_on']}: {results['n']} cases of {people(results)}")
    if cases.zones:
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
