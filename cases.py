"""What evaluate.py scores: the cases of a checkpoint of any task, or of two CSV files, and their thresholds."""

import argparse
import dataclasses
import hashlib
import importlib
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

import common
from common import UserError, choose_thresholds, f1_thresholds, load_checkpoint, write_csv
from report import read_scores
from retrieval import eyes_of
from subgroups import read_columns
from zones import zones_of

# task in the checkpoint -> the script that trained it
TASKS = {"siglip": "finetune_siglip", "task2": "run_task2", "ctclip": "train_ctclip", "retclip": "train_retclip"}
TASKS["csi"] = "train_csi"
THRESHOLD_FLAGS = ("threshold", "threshold_part", "validation", "oracle_thresholds")  # one of these at most
WITH_FEATURES = ("ctclip", "retclip")  # tasks whose `predict` gives features of images and texts
# of a checkpoint's arguments
OVERRIDES = ("csv", "slice_dir", "data_dir", "split", "data_root", "metadata", "batch_size", "num_workers")
OVERRIDES += ("train_data", "valid_data", "reports", "labels", "hu_source", "zero_shot", "prompts", "templates")
OVERRIDES += ("image_dir", "image_column", "mask_dir", "split_file", "patient_column")
PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse strengths of the probe's regularisation to choose from
PROBE_HELD_OUT = 0.25  # of the training patients: for that choice, and for the thresholds


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
    temperatures: np.ndarray | None = None  # (K,), NaN: none; of validation cases
    seen: bool = False  # cases that the training of the model, or its choice, has seen
    oracle: bool = False  # the thresholds were fitted to these cases
    most_probable: bool = False  # the most probable label counts as present, whatever the thresholds
    pairs: dict | None = None  # what `predict` of train_retclip.py gives, and `pictures` of the data set
    zones: dict | None = None  # of train_csi.py: Films, script, dataset, model, device, medians; then not the above
    images: dict | None = None  # task, script, dataset, model, device, out (of `predict`): what pictures.draw needs

    def cut(self, probs) -> np.ndarray:
        """What a probability (n, K) must reach to count as present: (K,) thresholds, or each case's highest (n, 1)."""
        return probs.max(axis=1, keepdims=True) if self.most_probable else self.thresholds

    def part(self, rows: np.ndarray) -> dict:
        """The arrays of some rows, bool (n,), as keywords for `dataclasses.replace`."""
        names = ("ids", "groups", "targets", "probs", "image_features", "text_features", "texts")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {k: v[rows] if isinstance(v, np.ndarray) else list(compress(v, rows)) for k, v in found.items()}


def cases_of_files(args) -> Cases:
    """Cases of --predictions and --labels; one without any probability failed to load."""
    others = args.subgroup if args.subgroup and not args.subgroup_table else ()  # columns that are no labels
    found = read_scores(args.predictions, args.labels[0], args.label_columns, others)
    ids, groups, targets, probs, class_names = found
    unread = compress(ids, np.isnan(probs).all(1)) if class_names else ()
    thresholds, source = choose_thresholds(args.threshold, {})
    return Cases(
        ids=ids,
        groups=groups,
        class_names=class_names,
        targets=targets,
        probs=probs,
        failed={name: f"no probability in {args.predictions.name}" for name in unread},
        thresholds=np.full(len(class_names), thresholds),
        thresholds_source=source,
        evaluated=args.predictions.name,
        evaluated_on=args.labels[0].name,
        notes=[],
        files={"predictions": file_facts(args.predictions), "labels": file_facts(args.labels[0])},
    )


def write_tables(folder: Path, cases: Cases, name: str = "predictions.csv") -> None:
    """The predictions, and labels.csv."""
    predictions = common.prediction_table(cases.ids, cases.probs, cases.class_names, cases.cut(cases.probs))
    if cases.oracle:
        predictions.columns = [f"{c}_oracle" if c.endswith("_pred") else c for c in predictions.columns]
    labels = {"id": cases.ids, "patient_id": cases.groups}
    for k, label in enumerate(cases.class_names):
        labels[label] = pd.Series(cases.targets[:, k]).astype("Int64")
    write_csv(folder / name, predictions)
    write_csv(folder / "labels.csv", pd.DataFrame(labels))


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
    given_thresholds = [name for name in THRESHOLD_FLAGS if getattr(args, name) not in (None, False, 0.0)]
    if saved["task"] == "csi" and given_thresholds:
        flag = f"--{given_thresholds[0].replace('_', '-')}"
        raise UserError(f"{flag}: the scores of {script.__name__}.py's checkpoints have no threshold (leave it out)")
    paired = saved["task"] == "retclip"
    for name in ("zero_shot", "prompts"):
        if paired and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: of train_ctclip.py; {script.__name__}.py has no other classifier (--templates)")
    given = overrides_of(args, saved, script)
    with common.of_checkpoint(args.test_only):
        task_args = args_for(saved, script, given)
    dataset = script.build_eval_dataset(task_args)
    if args.subgroup and not args.subgroup_table:  # a mistake is found before the inference
        read_columns(script.data_file(task_args), args.subgroup)
    names = list(dataset.class_names)
    with common.of_checkpoint(args.test_only):
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
    pairs, zones, images = out | {"pictures": args.pictures and dataset.pictures} if paired else None, None, None
    if saved["task"] == "csi":
        zones = zones_of(saved, script, task_args, dataset, model, ctx.device, out) | {"pictures": args.pictures}
    elif args.pictures and not args.linear_probe:  # of whose scores the model knows nothing
        images = {"task": saved["task"], "script": script, "dataset": dataset, "model": model, "out": out}
        images["device"] = ctx.device
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
    most_probable = paired and not (given_thresholds or args.linear_probe)
    if most_probable:
        source = "none: the most probable class of a case counts as present" if names else "none: no classes"
    elif paired and given_thresholds and not names:
        raise UserError(f"--{given_thresholds[0].replace('_', '-')}: the data have no two classes (leave it out)")
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

    temperatures, own_cases = None if changed else saved["temperatures"], {*(saved["validated_on"] or [])}
    n_own = sum(case in own_cases for case in common.case_hashes(out["ids"], out["targets"])) if own_cases else 0
    same_data, trained = is_that_of(task_args.split), is_that_of("train") if paired else False
    validation = not trained and same_data and task_args.split == saved["args"]["split"]
    seen = validation or 2 * n_own > len(out["ids"])  # a copy of the table elsewhere
    if seen:
        temperatures = None
        if args.threshold is None and not changed and saved["thresholds"]:
            thresholds, source = 0.5, "0.5 (the checkpoint's were fitted to these cases; --validation or "
            source += "--threshold-part fits to others)"
        chosen = "its best epoch" if paired else "the model"
        if "state" in saved:  # one that a run goes on from, whatever its score
            notes.append("These are the validation cases of the training; they did not choose this checkpoint")
        else:
            notes.append(
                f"These are the validation cases by which training chose {chosen}: the numbers are too good to be "
                "expected of new patients (--split, --csv, --slice-dir or --valid-data for cases that training has not "
                "seen)"
            )
    elif trained or (same_data and task_args.split in ("train", "all")):
        seen = True
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
        seen=seen,
        most_probable=most_probable,
        temperatures=None if temperatures is None else np.array(temperatures),
        pairs=pairs,
        zones=zones,
        images=images,
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
    found = fitted_to(targets, cases.probs[fitted])
    return dataclasses.replace(cases, **cases.part(~fitted), **found, thresholds_source=source), facts


def fitted_to(targets, probs) -> dict[str, np.ndarray]:
    return {"thresholds": f1_thresholds(targets, probs), "temperatures": common.fit_temperatures(targets, probs)}


def with_validation(cases: Cases, predictions: Path, labels: Path) -> Cases:
    """The cases with thresholds and temperatures fitted to those of two files of other patients."""
    try:
        ids, groups, targets, probs, _ = read_scores(predictions, labels, cases.class_names)
    except UserError as e:
        raise UserError(f"--validation: {e}") from e
    for kind, some, scored in (("patient", groups, cases.groups), ("case", ids, cases.ids)):
        shared = sorted(set(some) & set(scored))
        if shared:
            raise UserError(
                f"--validation {predictions}: {kind} {shared[0]} is scored too ({len(shared)} are), and thresholds "
                "fitted to scored cases flatter them (give other patients, or --oracle-thresholds for that upper bound)"
            )
    read = ~np.isnan(probs).any(1)
    targets, probs = targets[read], probs[read]
    source = f"per label, best F1 on {read.sum()} cases of {len(set(groups))} patients in {predictions.name}"
    files = cases.files | {"validation": file_facts(predictions), "validation_labels": file_facts(labels)}
    return dataclasses.replace(cases, **fitted_to(targets, probs), thresholds_source=source, files=files)


def with_oracle(cases: Cases) -> Cases:
    """The cases with thresholds fitted to themselves, which every output says."""
    read = ~np.isnan(cases.probs).any(1)
    note = "The thresholds were fitted to the scored cases (--oracle-thresholds): what depends on them (F1, sensitivity"
    note += ", specificity, PPV, NPV, accuracy) is an upper bound, not an estimate for new patients"
    return dataclasses.replace(
        cases,
        thresholds=f1_thresholds(cases.targets[read], cases.probs[read]),
        thresholds_source="per label, best F1 on the scored cases themselves (--oracle-thresholds)",
        evaluated=f"{cases.evaluated}, oracle thresholds",
        notes=[note, *cases.notes],
        oracle=True,
    )


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
    found = fitted_to(y[held], held_probs)
    thresholds, source = threshold, f"{threshold} (--threshold)"
    if threshold is None:
        thresholds = found["thresholds"]
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
        temperatures=found["temperatures"],
        evaluated=f"linear probe of {cases.evaluated}",
        notes=notes,
    )
