"""What evaluate.py --compare A B says of two models on the same cases: differences, tests, sentences, a page.

A difference is B - A. Its interval is the percentile bootstrap over patients, with the same resamples for both models:
cases that are hard for both do not widen it, as they widen the intervals of A and of B. results.json:
    evaluated, evaluated_on, n, n_patients, interval, failed, notes, provenance     as of one model; failed: in either
    models                  {"A", "B": {file, and all numbers of `score`, or `score_zones`}}
    comparison
      sentences             [{about, verdict: "supported", "not shown", "the same", "undefined", "too few cases",
                            "no interval", "no test", or "thresholds": a difference that may be theirs; text}]
      few                   labels with positive, or negative, cases of fewer than 10 patients; or zones hardly graded
      macro, micro          {<metric>: {a, b, difference, low, high}}
      per_label             {label: {<metric>: the same; auroc also has delong_z, delong_p (paired test: clinical.py;
                            z > 0: B is higher; null: no variance) and holm_p, adjusted for all labels; mcnemar: {b, c,
                            p, holm_p}: cases that only A, and only B, decides right at its thresholds, and the exact
                            test, which takes cases as independent}}
                            of train_csi.py instead (a film that one model calls not gradable is in no mean CSI):
      zone_means, csi       {qwk, mae, exact, off_2} over the zones where both are defined, {mae, icc} of the mean CSI:
                            each {a, b, difference, low, high}
      zones                 {zone: {qwk, mae, exact, off_2, mcnemar: of the zone's score being that of the reader}}
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
from scipy.special import ndtr
from sklearn.metrics import roc_curve

import common
import page
from cases import Cases, cases_of_checkpoint, cases_of_files, write_tables
from clinical import delong, holm, mcnemar, patients_with
from common import UserError, need_columns, with_interval
from page import (
    FEW_PATIENTS,
    FEW_POSITIVES,
    esc,
    forest,
    mark,
    number,
    panel,
    people,
    unit_axes,
    warnings_of,
    write_page,
)
from report import read_plain
from retrieval import LEVEL
from zones import UNKNOWN, score_columns, section, table, tally, write_films

ALPHA = 0.05  # of the tests, after Holm's correction
METRICS = {  # title, whether higher is better
    "auroc": ("AUROC", True), "auprc": ("AUPRC", True), "f1": ("F1", True), "precision": ("Precision", True),
    "recall": ("Recall", True), "specificity": ("Specificity", True), "accuracy": ("Accuracy", True),
    "brier": ("Brier score", False), "log_loss": ("Log-loss", False), "ece": ("ECE", False),
    "qwk": ("QWK", True), "mae": ("MAE", False), "exact": ("Exact", True), "off_2": ("≥ 2 apart", False),
    "icc": ("ICC(2,1)", True),
}  # fmt: skip
LABELED = tuple(METRICS)[:10]
GRADED = ("qwk", "mae", "exact", "off_2")
QUESTIONS = (  # part of the comparison, metric, what it is about, its name in a sentence, what the better model does
    ("macro", "auroc", "macro AUROC", "Macro AUROC", "ranks better on average over the labels"),
    ("macro", "f1", "macro F1", "Macro F1", "decides better at its thresholds, on average over the labels"),
    ("macro", "brier", "Brier score", "The mean Brier score", "gives probabilities closer to the truth, on average"),
    ("zone_means", "qwk", "QWK of zones", "The zones' mean quadratic weighted kappa", "agrees better with the reader"),
    ("zone_means", "mae", "MAE of zones", "The mean absolute error (mean of the zones)", "is closer to the reader"),
    ("csi", "mae", "MAE of the mean CSI", "The mean absolute error of the mean CSI", "is closer to the reader's"),
    ("csi", "icc", "ICC of the mean CSI", "ICC(2,1) of the mean CSI", "agrees better with the reader's mean CSI"),
)  # fmt: skip


# ==== Cases ====================================================================================================


def is_table(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def cases_of_both(args, ctx) -> tuple[Cases, Cases]:
    """The matched cases of the checkpoints or tables of --compare; every rank returns the same."""
    found, tables = [], [path for path in args.compare if is_table(path)]
    args = argparse.Namespace(**vars(args) | {"pictures": False})  # which would keep both models in memory
    for path in args.compare:
        if is_table(path):
            names, notes = in_table(path, args.labels[0])
            own = {"predictions": path, "label_columns": names}
            some = cases_of_files(argparse.Namespace(**vars(args) | own))
            found.append(dataclasses.replace(some, notes=notes))
        else:  # labels of tables are not its own
            own = {"test_only": path, "labels": None if tables else args.labels}
            some = cases_of_checkpoint(argparse.Namespace(**vars(args) | own), ctx)
            found.append(dataclasses.replace(some, zones=some.zones and some.zones | {"model": None, "dataset": None}))
    a, b = found
    if a.evaluated == b.evaluated and args.compare[0] != args.compare[1]:
        a, b = (
            dataclasses.replace(some, evaluated=f"{path.parent.name}/{some.evaluated}")
            for some, path in zip(found, args.compare, strict=True)
        )
    if bool(a.zones) != bool(b.zones):
        raise UserError("--compare: one model scores lung zones, the other labels (give two of one kind)")
    if a.zones and args.label_columns:
        raise UserError("--label-columns: the scores of lung zones have none (leave it out)")
    return matched_films(a, b) if a.zones else matched(a, b, args.label_columns)


def in_table(predictions: Path, labels: Path) -> tuple[list[str], list[str]]:
    """The labels of one table for which the other has probabilities, and notes."""
    table, known = read_plain(predictions), list(read_plain(labels).columns)
    scored = [column.removesuffix("_prob") for column in table.columns if column.endswith("_prob")]
    names = [name for name in known if name in scored]
    if not names:
        raise UserError(f"{predictions}: has no '..._prob' column of a label of {labels} (label 'x': column 'x_prob')")
    need_columns(table, ["id"], predictions)
    gone = ", ".join(name for name in scored if name not in known)
    return names, [f"{labels.name} has no labels of {gone}: left out"] if gone else []


def listed(what: str, names: list[str]) -> None:
    """Raise UserError if there are names: how many, and the first."""
    if names:
        first = ", ".join(f"'{name}'" for name in names[:3]) + (" ..." if len(names) > 3 else "")
        what = f"{what} {len(names)} case{'s' * (len(names) > 1)}"
        raise UserError(f"--compare: {what}: {first} (give both the same data)")


def order_of(a: Cases, b: Cases) -> list[int]:
    """Row of B of each case of A; UserError if one has a case that the other lacks."""
    row = {name: i for i, name in enumerate(b.ids)}
    listed("B lacks", [name for name in a.ids if name not in row])
    listed("A lacks", sorted(set(b.ids) - set(a.ids)))
    return [row[name] for name in a.ids]


def matched(a: Cases, b: Cases, wanted=None) -> tuple[Cases, Cases]:
    """The cases of both in A's order, with the labels of both, or the wanted ones; what failed in one has no
    probability in either. Raises UserError if cases or labels differ."""
    order = order_of(a, b)
    names = wanted or [name for name in a.class_names if name in b.class_names]
    missing = [name for name in names if name not in a.class_names or name not in b.class_names]
    if missing or not names:
        what = f"no label '{missing[0]}' in both" if missing else "no label in common"
        raise UserError(f"--compare: A and B have {what} (A has {', '.join(a.class_names)[:200] or 'none'})")
    columns = [[some.class_names.index(name) for name in names] for some in (a, b)]
    truth, other = a.targets[:, columns[0]], b.targets[order][:, columns[1]]
    differ = ~((truth == other) | (np.isnan(truth) & np.isnan(other))).all(1)
    listed("A and B have other labels of", [name for name, bad in zip(a.ids, differ, strict=True) if bad])
    probs = a.probs[:, columns[0]], b.probs[order][:, columns[1]]
    unread = np.isnan(probs[0]).any(1) | np.isnan(probs[1]).any(1)
    left = [f"{name} (only in A)" for name in a.class_names if name not in b.class_names]
    left += [f"{name} (only in B)" for name in b.class_names if name not in a.class_names]
    shared = both_have(a, b)
    if left:
        shared["notes"].append(f"Labels that only one of the two scores are left out: {', '.join(left)}")
    if unread.all():
        raise UserError(f"--compare: none of {len(a.ids)} cases could be read by both models")
    if "labels" in b.files and "labels" not in a.files:  # the table that says whose the cases are
        shared["groups"] = [b.groups[i] for i in order]
    probs = [np.where(unread[:, None], np.nan, p) for p in probs]
    shared |= {"class_names": names, "targets": truth, "image_features": None, "pairs": None}
    return tuple(
        dataclasses.replace(some, **shared, probs=p, **fitted(some, k))
        for some, p, k in zip((a, b), probs, columns, strict=True)
    )


def fitted(cases: Cases, columns: list[int]) -> dict:
    """Thresholds and temperatures of some labels."""
    of = {"thresholds": cases.thresholds, "temperatures": cases.temperatures}
    return {name: None if values is None else values[columns] for name, values in of.items()}


def matched_films(a: Cases, b: Cases) -> tuple[Cases, Cases]:
    """The same of zone scores."""
    order, shared = order_of(a, b), both_have(a, b)
    one, other = a.zones["films"], b.zones["films"].rows(order)
    differ = (one.truth != other.truth).any(1)
    listed("A and B have other scores of the reader for", list(one.ids[differ]))
    read = np.isfinite(one.probs).all((1, 2)) & np.isfinite(other.probs).all((1, 2))
    if not read.any():
        raise UserError(f"--compare: none of {len(a.ids)} films could be read by both models")
    return tuple(
        dataclasses.replace(some, **shared, zones=some.zones | {"films": films.rows(read)})
        for some, films in ((a, one), (b, other))
    )


def both_have(a: Cases, b: Cases) -> dict:
    """What the matched cases of the two have in common, by the names of Cases."""
    files = {f"{which}_{name}": fact for which, some in (("A", a), ("B", b)) for name, fact in some.files.items()}
    if not a.zones:
        files |= {"A_thresholds": a.thresholds_source, "B_thresholds": b.thresholds_source}
    shared = {"ids": a.ids, "groups": a.groups, "failed": shared_failures(a, b), "notes": shared_notes(a, b)}
    return shared | {"files": files, "incomplete": a.incomplete or b.incomplete}


def shared_failures(a: Cases, b: Cases) -> dict[str, str]:
    """Id -> why, of cases that failed in either."""
    found = {}
    for which, some in (("A", a), ("B", b)):
        for name, reason in some.failed.items():
            found[name] = f"{found[name]}; {which}: {reason}" if name in found else f"{which}: {reason}"
    return found


def merged(a: list[str], b: list[str]) -> list[str]:
    """Notes on both models, and which one each is about if it is one."""
    own = [f"A: {note}" for note in a if note not in b] + [f"B: {note}" for note in b if note not in a]
    return [note for note in a if note in b] + own


def shared_notes(a: Cases, b: Cases) -> list[str]:
    """What a reader must know of the cases of both."""
    notes = merged(a.notes, b.notes)
    known = [which for which, some in (("A", a), ("B", b)) if some.seen or (some.zones and some.zones["seen"])]
    if len(known) == 1:
        text = "Only {} knows these cases from its training: the comparison favours it"
        if not all("checkpoint" in some.files for some in (a, b)):  # but anyone's table
            text = "{} knows these cases from its training, which favours it; of the other that is not known"
        notes.insert(0, text.format(known[0]))
    if a.pairs or b.pairs:
        notes.append("Only labels are compared, not retrieval")
    return notes


# ==== Numbers ==================================================================================================


def compared(a, b) -> dict:
    """{a, b, difference, low, high} of a metric (1 + B,) of the two models: on all cases, and in B resamples."""
    found = with_interval({"difference": b - a}, LEVEL)
    found = {name.removeprefix("difference_"): value for name, value in found.items()}
    return {"a": float(a[0]), "b": float(b[0])} | found


def with_holm(rows, p: str = "p") -> None:
    """Adds holm_p to dicts with a p value."""
    for row, adjusted in zip(rows, holm([row[p] for row in rows]), strict=True):
        row["holm_p"] = float(adjusted)


def paired_delong(y, scores, groups) -> dict:
    """z and two-sided p of the difference of two AUROC; scores: (n, 2). p is 1 where both order the cases alike; both
    are NaN where the AUROC differ without a variance, as 1 and 0 do."""
    (a, b), cov = delong(y, scores, groups)
    variance = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    if variance < 1e-15:
        return {"delong_z": 0.0, "delong_p": 1.0} if a == b else {"delong_z": math.nan, "delong_p": math.nan}
    z = (b - a) / math.sqrt(variance)  # NaN stays
    return {"delong_z": z, "delong_p": float(2 * ndtr(-abs(z)))}


def right_or_wrong(a, b) -> dict:
    """McNemar's counts and p; a, b: bool, whether each decision of the two models is right."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return {"b": only_a, "c": only_b, "p": mcnemar(only_a, only_b)}


def comparison(a: Cases, b: Cases, facts: dict, scored: list[dict]) -> dict:
    """What results.json has beside `facts`, its head of one model; scored: the numbers of A and of B."""
    how = facts["interval"] or {"n_resamples": 0, "seed": 0}
    numbers = compare_zones if a.zones else compare_labels
    found, sizes = numbers(a, b, how["n_resamples"], how["seed"])
    notes = merged(*(some.get("notes", a.notes) for some in scored))
    if not a.zones:  # what is undefined, or rare, is so in both
        labels = common.json_safe(scored[0]["per_label"])
        notes += warnings_of({"per_label": labels, "failed": [], "notes": [], "interval": {}})
    places = a.evaluated_on if a.evaluated_on == b.evaluated_on else f"{a.evaluated_on} and {b.evaluated_on}"
    return {
        "evaluated": f"{a.evaluated} against {b.evaluated}",
        "evaluated_on": places,
        "notes": notes,
        "models": {
            which: {"file": some.evaluated} | {name: value for name, value in row.items() if name != "notes"}
            for which, some, row in zip("AB", (a, b), scored, strict=True)
        },
        "comparison": {"sentences": sentences(found, facts | sizes | {"but": but_thresholds(a, b)})} | found,
    }


def compare_labels(a: Cases, b: Cases, n_resamples: int, seed: int) -> tuple[dict, dict]:
    """Differences, the same in any order of the cases; n, n_patients, and all_few: whether no label has enough."""
    order = sorted(np.flatnonzero(np.isfinite(a.probs).all(1)), key=lambda i: a.ids[i])  # as evaluate.score
    y, groups = a.targets[order], np.array(a.groups)[order]
    weights, names = common.bootstrap_weights(groups, n_resamples, seed), [f"label{k}" for k in range(y.shape[1])]
    probs = [some.probs[order] for some in (a, b)]
    cuts = [some.cut(p) for some, p in zip((a, b), probs, strict=True)]
    one, other = (common._metric_arrays(y, p, names, cut, weights) for p, cut in zip(probs, cuts, strict=True))

    def block(prefix: str) -> dict:
        keys = {metric: prefix + metric if prefix + metric in one else metric for metric in LABELED}
        keys = {m: key for m, key in keys.items() if key in one and (key != m or prefix == "macro_")}
        return {metric: compared(one[key], other[key]) for metric, key in keys.items()}

    right = [(p >= cut) == (y == 1) for p, cut in zip(probs, cuts, strict=True)]
    per_label = {}
    for k, name in enumerate(a.class_names):
        known, row = ~np.isnan(y[:, k]), block(f"label{k}_")
        scores = np.stack([p[known, k] for p in probs], 1)
        row["auroc"] |= paired_delong(y[known, k], scores, groups[known])
        per_label[name] = row | {"mcnemar": right_or_wrong(*(ok[known, k] for ok in right))}
    with_holm([row["auroc"] for row in per_label.values()], "delong_p")
    with_holm([row["mcnemar"] for row in per_label.values()])
    found = {"macro": block("macro_"), "micro": block("micro_"), "per_label": per_label}
    few = [name for name, n in zip(a.class_names, patients_with(y, groups).min(1), strict=True) if n < FEW_POSITIVES]
    tested = {name for name, row in per_label.items() if math.isfinite(row["auroc"]["difference"])}
    return found | {"few": few}, {"n": len(order), "n_patients": len(set(groups)), "all_few": tested <= set(few)}


def means_of_zones(a, b) -> np.ndarray:
    """(Z, 1 + B) of a metric of both models -> (2, 1 + B), over the zones where both are defined: kappa is undefined
    for a model that says only the class that is there, and would be 0 for one that errs once."""
    both = np.array([a, b])
    return common.mean_defined(np.where(np.isnan(both).any(0), np.nan, both), 1)


def compare_zones(a: Cases, b: Cases, n_resamples: int, seed: int) -> tuple[dict, dict]:
    """The same of zone scores."""
    order = np.argsort(a.zones["films"].ids.astype(str), kind="stable")
    films = [some.zones["films"].rows(order) for some in (a, b)]
    script, truth, groups = a.zones["script"], films[0].truth, films[0].groups.astype(str)
    weights = common.bootstrap_weights(groups, n_resamples, seed)
    graded, zones = truth < UNKNOWN, {}
    sums = [tally(its, graded, its.severity, its.expected, weights) for its in films]
    one, other = ([score_columns(*pair) for pair in zip(*some, strict=True)] for some in sums)  # of each zone
    for k, zone in enumerate(script.ZONES):
        zones[zone] = {m: compared(one[k][m], other[k][m]) for m in GRADED}
        right = [(its.severity == truth)[graded[:, k], k] for its in films]
        zones[zone]["mcnemar"] = right_or_wrong(*right)
    with_holm([row["mcnemar"] for row in zones.values()])
    means = {m: means_of_zones(*([zone[m] for zone in some] for some in (one, other))) for m in GRADED}
    both = ~np.isnan(films[0].csi) & ~np.isnan(films[1].csi)
    agreed = [common.agreement(its.csi[both], its.true_csi[both], weights[both]) for its in films]
    found = {"zone_means": {m: compared(*pair) for m, pair in means.items()}}
    found["csi"] = {m: compared(agreed[0][m], agreed[1][m]) for m in ("mae", "icc")}
    few = [zone for zone, n in zip(script.ZONES, graded.sum(0), strict=True) if n < FEW_POSITIVES]
    return found | {"zones": zones, "few": few}, {"n": len(order), "n_patients": len(set(groups)), "all_few": False}


# ==== Sentences ================================================================================================


def signed(value) -> str:
    if value is None or not math.isfinite(value):
        return "undefined"
    digits = 3 if value == 0 or abs(value) >= 0.0005 else 5  # or an end that is not 0 would look like it
    return f"{value:+z.{digits}f}".replace("-", "−")


def between(row: dict) -> str:
    return f"{signed(row['low'])} to {signed(row['high'])}" if row.get("low") is not None else "undefined"


def p_value(p, equals: str = "") -> str:
    if p is None or not math.isfinite(p):
        return "undefined"
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def but_thresholds(a: Cases, b: Cases) -> str:
    """What limits a comparison of decisions if the thresholds of A and B are not of one kind, else ''."""
    kinds = [some.thresholds_source.split()[0] for some in (a, b)]  # "per" label, "none:", or the number
    if a.zones or kinds[0] == kinds[1]:
        return ""
    sources = f"The thresholds come from different sources (A: {a.thresholds_source}. B: {b.thresholds_source})"
    return f"{sources}: a difference may be one of thresholds, not of models."


def sentence(name: str, better: str, row: dict, higher_is_better: bool, facts: dict) -> dict:
    """Verdict and text on one difference. row: of `compared`; better: what the better model does."""
    gap, low, high = (row.get(key, math.nan) for key in ("difference", "low", "high"))
    by = f"{abs(gap):.3f}" if abs(gap) >= 0.0005 else "less than 0.001"
    head = f"{name} of B is {'higher' if gap > 0 else 'lower'} by {by}" if gap else f"{name} of B is that of A"
    if not math.isfinite(gap) or (facts["interval"] and not (math.isfinite(low) and math.isfinite(high))):
        return {"verdict": "undefined", "text": f"{name} is undefined on these cases, and cannot be compared."}
    if gap == low == high == 0:
        text = f"{name} is the same in A and B ({number(row['a'])}), also in every resample of the patients."
        return {"verdict": "the same", "text": text}
    how = facts["interval"]
    if how is None:
        return {"verdict": "no interval", "text": f"{head}: without an interval (--no-bootstrap) that shows nothing."}
    of = f"{how['n_resamples']} resamples of {facts['n_patients']} patients"
    head += f" (B − A: {100 * how['level']:.0f} % interval {between(row)}, {of})"
    if facts["n_patients"] < FEW_PATIENTS or facts.get("all_few"):
        who = "patients" if facts["n_patients"] < FEW_PATIENTS else "patients with a positive, or a negative, case"
        return {"verdict": "too few cases", "text": f"{head}: too few {who} for that to show anything."}
    but = facts.get("but", "")
    if low <= 0 <= high:
        text = f"{head}: no difference is shown, which is not evidence that there is none. {but}"
        return {"verdict": "not shown", "text": text.strip()}
    if but:  # not said of the models
        return {"verdict": "thresholds", "text": f"{head}. {but}"}
    winner = "B" if (gap > 0) == higher_is_better else "A"
    return {"verdict": "supported", "text": f"{head}: the data support that {winner} {better}."}


def tests_sentence(head: str, tests: dict, kind: str = "label", few=()) -> dict:
    """The same on tests of labels. tests: {label: (effect as text, whether there is one, adjusted p)}; few: those of
    them that chance makes differ too often, of which nothing is said."""
    judged = [name for name in tests if name not in few]
    differ = [name for name in judged if tests[name][2] < ALPHA]
    rest, many = len(judged) - len(differ), f"{len(tests)} {kind}{'s' * (len(tests) > 1)}"
    if not any(tests[name][1] for name in judged):
        return {"verdict": "the same", "text": f"{head}: the same in A and B on each {kind}."}
    text = f"{head}, after Holm's correction over {many}, "
    if differ:
        said = [f"{name} ({tests[name][0]}, p {p_value(tests[name][2], '= ')})" for name in differ]
        text += f"{len(differ)} differ{'s' * (len(differ) == 1)}: {', '.join(said)}"
    if rest:
        text += f"; for the other {'one' if rest == 1 else rest} " * bool(differ)
        text += "no difference is shown, which is not evidence that there is none"
    return {"verdict": "supported" if differ else "not shown", "text": text + "."}


def areas_sentence(rows: dict, few: list[str]) -> dict:
    """The same on the AUROC of all labels. rows: {label: of `compared`, with holm_p}; few: labels of few patients."""
    head = "AUROC of single labels, B − A (DeLong's paired test)"
    tests = {name: (signed(row["difference"]), row["difference"], row["holm_p"])
             for name, row in rows.items() if math.isfinite(row["holm_p"])}  # fmt: skip
    gone = [name for name, row in rows.items() if not math.isfinite(row["difference"])]
    few = [name for name in few if name not in gone]
    fixed, left = {name: row for name, row in rows.items() if name not in (*tests, *gone, *few)}, []
    if fixed:
        said = [f"{name} ({signed(row['difference'])}, bootstrap {between(row)})" for name, row in fixed.items()]
        left.append(("no test", f"The test does not apply to a difference without variance: {', '.join(said)}."))
    if few:
        text = f"Nothing is said of {', '.join(few)}: where fewer than {FEW_POSITIVES} patients have positive, or "
        text += "negative, cases, p values come out too small and intervals too narrow: chance looks like a difference."
        left.append(("too few cases", text))
    if gone:
        left.append(("undefined", f"Undefined for {', '.join(gone)}."))
    one = tests_sentence(head, tests, few=few) if {*tests} - {*few} else {"verdict": left[0][0], "text": f"{head}:"}
    return one | {"text": " ".join([one["text"], *(text for _, text in left)])}


def sentences(found: dict, facts: dict) -> list[dict]:
    """What the data support and what they do not, a sentence or two on each question."""
    said = []
    for part, metric, about, name, better in QUESTIONS:
        if part in found:
            limits = {"auroc": {"but": ""}, "f1": {}}.get(metric, {"but": "", "all_few": False})
            one = sentence(name, better, found[part][metric], METRICS[metric][1], facts | limits)
            said.append({"about": about} | one)
    kind, rows = ("label", found["per_label"]) if "per_label" in found else ("zone", found["zones"])
    if kind == "label":
        areas = {name: row["auroc"] for name, row in rows.items()}
        said.append({"about": "AUROC by label"} | areas_sentence(areas, found["few"]))
    decided = {name: row["mcnemar"] for name, row in rows.items()}
    tests = {name: (f"only A right in {row['b']} cases, only B in {row['c']}", row["b"] + row["c"], row["holm_p"])
             for name, row in decided.items()}  # fmt: skip
    what = "Decisions at the thresholds" if kind == "label" else "Scores equal to the reader's"
    one = tests_sentence(f"{what} (McNemar's exact test)", tests, kind)
    if facts["but"] and one["verdict"] != "the same":
        one["text"] += f" {facts['but']}"
        one["verdict"] = "thresholds" if one["verdict"] == "supported" else one["verdict"]
    if kind == "zone" and found["few"]:
        one["text"] += f" Fewer than {FEW_POSITIVES} cases show only a large difference: {', '.join(found['few'])}."
    if facts["n_patients"] < facts["n"]:
        one["text"] += f" This test takes cases as independent, but {facts['n']} cases are of {facts['n_patients']} "
        one["text"] += "patients: its p values may be too small."
    return said + [{"about": f"decisions by {kind}"} | one]


# ==== Page =====================================================================================================

STYLE = """
.findings { list-style: none; margin: 22px 0; padding: 0; display: grid; gap: 12px; }
.findings li { border-left: 6px solid #767676; background: #f5f7f9; padding: 10px 18px; font-size: 19px;
  line-height: 1.4; overflow-wrap: anywhere; break-inside: avoid; }
.findings .supported { border-color: #0072B2; background: #eef6fb; } .findings small { font-weight: 600; }
.a { color: #0072B2; } .b { color: #D55E00; }
@media print { .findings li { font-size: 11.5pt; padding: 5pt 10pt; } }
"""
COMPARED = {
    "Difference": "B − A on the same cases, with the interval of the paired bootstrap: both models get each resample "
    "of the patients. An interval that leaves out 0 is what a difference needs to be called shown. Over many "
    "labels some leave it out by chance alone: look at Holm's p.",
    "DeLong p, Holm p": "of the paired test that two AUROC are equal; Holm's: corrected for testing every label. Few "
    f"patients: fewer than {FEW_POSITIVES} have positive, or negative, cases; both come out too small there.",
    "Only A right": "cases whose decision at the threshold is right in A and wrong in B. McNemar's test asks whether "
    "they are as many as those that only B has right. It takes cases as independent, also those of one patient.",
    "Not shown": "the data are compatible with no difference, and with each one inside the interval. That is no proof "
    "of equality.",
    "Undefined": "the data cannot answer: an AUROC without a positive case, for example. It is not a zero.",
}


SHOWN = {"supported": "a difference is supported", "not shown": "no difference is shown"}
SHOWN |= {"thresholds": "a difference, perhaps of thresholds alone"}
SHOWN |= {verdict: verdict for verdict in ("the same", "undefined", "too few cases", "no interval", "no test")}
DECIDED = "|Only A right|Only B right|McNemar p|Holm p"


def cells(row: dict, scale: float | None = None) -> str:
    """A, B, and their difference with its interval; with a scale also as a mark."""
    found = f"<td>{number(row['a'])}</td><td>{number(row['b'])}</td>"
    found += f"<td>{signed(row['difference'])}<small>{between(row) if 'low' in row else ''}</small></td>"
    return found + (f"<td>{mark(*ends_of(row), -scale, scale)}</td>" if scale else "")


def ends_of(row: dict) -> tuple:
    return row["difference"], row.get("low"), row.get("high")


def decided(row: dict) -> str:
    """Cells of McNemar's test."""
    row = row["mcnemar"]
    cells = (row["b"], row["c"], p_value(row["p"]), p_value(row["holm_p"]))
    return "".join(f"<td>{cell}</td>" for cell in cells)


def scale_of(rows: list[dict]) -> float:
    """The smallest of 0.01, 0.02, 0.05, 0.1 ... that no end of an interval exceeds."""
    widest = max(abs(end or 0) for row in rows for end in ends_of(row))
    return next(x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if widest <= x or x == 2)


def draw_both(axes, y, a, b) -> None:
    """Two ROC curves. y: (n,) of 0 and 1; a, b: (n,) probabilities."""
    unit_axes(axes, "1 − specificity", "Sensitivity")
    axes.plot([0, 1], [0, 1], color=page.GREY, linestyle=":", linewidth=1)
    for probs, color, style, width in ((a, page.BLUE, "-", 2.2), (b, page.ORANGE, "--", 1.6)):
        fpr, tpr, _ = roc_curve(y, probs)
        axes.plot(fpr, tpr, color=color, linestyle=style, linewidth=width)


def findings(results: dict) -> str:
    found = ""
    for one in results["comparison"]["sentences"]:
        kind, about = one["verdict"].replace(" ", "-"), f"{one['about']}: {SHOWN[one['verdict']]}"
        found += f'<li class="{kind}"><small>{esc(about)}</small>{esc(one["text"])}</li>'
    a, b = (esc(results["models"][which]["file"]) for which in "AB")
    return f'<p><b class="a">A</b>: {a}<br><b class="b">B</b>: {b}</p><ol class="findings">{found}</ol>'


def averages(parts: dict[str, dict]) -> str:
    """Table of averages; parts: name -> {metric: difference}."""
    rows = ""
    for part, metrics in parts.items():
        for metric, row in metrics.items():
            title, higher = METRICS[metric]
            rows += f"<tr><td>{part} {title}{'' if higher else '<small>lower is better</small>'}</td>{cells(row)}"
            out = "" if row.get("low") is None else "includes 0" if row["low"] <= 0 <= row["high"] else "leaves out 0"
            rows += f"<td>{out}</td></tr>\n"
    return section("Averages", "", table("|A|B|B − A|Its interval", rows))


def labels_body(results: dict, a: Cases, b: Cases) -> str:
    found, rows, grid = results["comparison"], "", ""
    areas, macro = {name: row["auroc"] for name, row in found["per_label"].items()}, found["macro"]["auroc"]
    scale, facts = scale_of([*areas.values(), macro]), results["models"]["A"]["per_label"]
    for k, (name, row) in enumerate(found["per_label"].items()):
        auroc, of = row["auroc"], facts[name]
        under = f"{of['positives']} of {of['n']} positive{', few patients' * (name in found['few'])}"
        rows += f"<tr><td>{esc(name)}<small>{under}</small></td>{cells(auroc, scale)}"
        rows += f"<td>{p_value(auroc['delong_p'])}</td><td>{p_value(auroc['holm_p'])}</td>{decided(row)}</tr>\n"
        if auroc["difference"] is not None:
            use = ~np.isnan(a.targets[:, k]) & ~np.isnan(a.probs[:, k])
            said = f"A {number(auroc['a'])}, B {number(auroc['b'])}"
            given = a.targets[use, k], a.probs[use, k], b.probs[use, k]
            grid += panel(f"ROC curves of {name}: {said}", name, f"AUROC {said}", draw_both, *given)
    total = f"<tr><td>Macro</td>{cells(macro, scale)}{'<td></td>' * 6}</tr>"
    head = f"Label|AUROC of A|AUROC of B|B − A|±{scale:g} around 0|DeLong p|Holm p{DECIDED}"
    text = "Bars: intervals, not corrected for the number of labels. Diamond: macro."
    parts = section("By label", "", table(head, rows, total))
    parts += forest_section("Differences of AUROC", text, areas, ("Macro", macro), scale)
    parts += averages({"Macro": found["macro"], "Micro": found["micro"]})
    return parts + section("ROC curves", "A: blue, drawn through. B: orange, dashed. Dotted: a coin toss.", grid=grid)


def zones_body(results: dict) -> str:
    found, rows = results["comparison"], ""
    kappas, mean = {name: row["qwk"] for name, row in found["zones"].items()}, found["zone_means"]["qwk"]
    scale = scale_of([*kappas.values(), mean])
    for name, row in found["zones"].items():
        rows += f"<tr><td>{esc(name)}</td>{cells(row['qwk'], scale)}{cells(row['mae'])}{decided(row)}</tr>\n"
    head = f"Zone|QWK of A|QWK of B|B − A|±{scale:g} around 0|MAE of A|MAE of B|B − A{DECIDED}"
    text = "Bars: intervals, not corrected for the number of zones. Diamond: their mean."
    parts = section("By zone", "", table(head, rows))
    parts += forest_section("Differences of QWK", text, kappas, ("Mean", mean), scale)
    return parts + averages({"Mean of the zones:": found["zone_means"], "Mean CSI:": found["csi"]})


def forest_section(title: str, text: str, rows: dict[str, dict], mean: tuple[str, dict], scale: float) -> str:
    named = [(name, ends_of(row)) for name, row in (*rows.items(), mean)]
    return section(title, text, forest(named, scale, ("A higher", "B higher")))


def write_comparison(folder: Path, results: dict, a: Cases, b: Cases) -> None:
    """predictions_a.csv, predictions_b.csv, labels.csv, report.html."""
    for some, name in ((a, "predictions_a.csv"), (b, "predictions_b.csv")):
        write_films(folder, some.zones, name) if a.zones else write_tables(folder, some, name)
    about = f"{results['n']} cases of {people(results)}, the same for both models"
    body = findings(results) + (zones_body(results) if a.zones else labels_body(results, a, b))
    reading = "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in COMPARED.items())
    body += f"<section><h2>How to read this</h2><dl>{reading}</dl></section>"
    write_page(folder / "report.html", results, about, body, STYLE)
