"""What evaluate.py adds for lung zones (train_csi.py): scores of the six zones of a film, their mean (the CSI), AHF.

A score is 0 to 3. A zone that the reader did not grade is unknown, one that the model would not grade "not gradable":
a missing score, no fifth degree. So some numbers are of the score that the model gives, or would give, to the zones
that the reader graded; in others "not gradable" is an error; and some are of gradability. A mean CSI is over graded
zones; a film without one is "not gradable", never of low risk.

results.json; a number also has _low and _high, by percentile bootstrap over patients (none with --no-bootstrap):
    evaluated, evaluated_on, n, n_patients, interval, failed, notes, provenance     as of other tasks; n: films
    zones, pooled   {zone: {n, n_unknown, n_declined, <metric>, per_class, confusion}}, and one for all zones together
                    n: graded by the reader; n_declined: of those not gradable to the model
                    scores: qwk (quadratic weighted kappa), mae of the expected score, mae_class of the chosen one,
                    exact, off_2 (shares that are equal, 2 or 3 apart); "not gradable" an error: accuracy, precision,
                    recall, f1_macro (means over the classes there or predicted, so that 1 is perfect), f1_weighted (by
                    their number), per_class {class: {n, precision, recall, f1}}; gradable_auroc: of 1 - P(unknown);
                    confusion: 5 x 5, rows are the reader's, the last unknown / not gradable
    zone_means      {<metric>}: plain means over the zones where it is defined
    baseline        {medians, n, qwk, mae, exact, off_2} of giving each zone its median in the training data; or null
    csi             {mean, right, left, upper, mid, lower: {n, n_not_gradable, mean_predicted, mean_true, mae, rmse,
                    pearson, icc, bias (prediction - truth), sd, loa_low, loa_high (limits)}}: see common.agreement
    ahf             {classes, table 4 x 4 (rows are the reader's), n, accuracy, precision, recall, f1_macro,
                    f1_weighted, per_class} of the class of the mean CSI; n: films with a true one
    diagnosis       {n, positives, n_not_gradable, auroc, reader_n, reader_auroc, cutoffs: {cut: {sensitivity,
                    specificity}}} of the mean CSI against the diagnosis; reader_: of the true CSI; or null
    views           {view: {n_films, n, qwk, mae}}; null where no view is known
    second_reader   {n_films, n, reader, model: {qwk, mae, exact, off_2, csi_mae, csi_icc}} on zones of both; or null
    calibration     {">= k": {n, positives, ece, brier}} of P(score >= k | gradable), on the graded zones
predictions.csv: FileID, patient, view, {zone}_prob_0 to _3, {zone}_prob_unknown, {zone}_pred (4: not gradable),
{zone}_expected, csi, ahf_class. labels.csv: FileID, patient, view, the zones (empty: unknown), csi, diagnosis.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap

import common
import page
from common import UserError, class_metrics, confusion_counts, mean_defined, weighted_auroc, with_interval, write_csv
from page import BLUE, FEW_POSITIVES, GREY, ORANGE, esc, interval, number, panel
from pictures import picture_uri
from report import READING, cell, draw_reliability, draw_roc
from retrieval import LEVEL
from subgroups import subgroup_section

UNKNOWN = 4  # class of a zone without a score
AHF = ("low", "medium", "high", "not gradable")
CUTS = (1.3, 2.2)  # of the mean CSI, between the first three
PARTS = {"mean": "", "right": "right", "left": "left", "upper": "sup", "mid": "mid", "lower": "inf"}  # in a zone's name
SHOWN, MANY = 6, 1500  # films in the report; dots of a figure that are vectors


@dataclasses.dataclass
class Films:
    """n films with Z zones, what the readers and the model say of them. NaN and -1: the film failed to load."""

    ids: np.ndarray  # of str, as groups (patients) and views ('': unknown)
    groups: np.ndarray
    views: np.ndarray
    truth: np.ndarray  # (n, Z) int, UNKNOWN where not graded
    reader2: np.ndarray | None  # the same of a second reader
    diagnosis: np.ndarray | None  # (n,) of 0, 1, NaN
    true_csi: np.ndarray  # (n,), NaN: no zone is graded
    probs: np.ndarray  # (n, Z, 5)
    severity: np.ndarray  # (n, Z) int, the score if the zone is gradable
    classes: np.ndarray  # (n, Z) int, the score, or UNKNOWN where not gradable
    expected: np.ndarray  # (n, Z), mean of the probabilities of the scores
    csi: np.ndarray  # (n,), NaN: no zone is gradable

    def rows(self, which) -> "Films":
        return Films(**{name: None if value is None else value[which] for name, value in vars(self).items()})


def zones_of(saved: dict, script, args, dataset, model, device, out: dict) -> dict:
    """What evaluate.py keeps of a checkpoint of train_csi.py: all films of the data set, in its order, with what
    `predict` says of them, and the means of drawing maps."""
    decided, truth = script.decide(out["probs"], args), np.asarray(out["targets"])
    fields = {name: np.array(getattr(dataset, name), object) for name in ("ids", "groups", "views")}
    fields |= {name: decided[name] for name in ("severity", "classes", "expected", "csi")}
    fields |= {"truth": truth, "true_csi": script.true_csi(truth), "probs": out["probs"]}
    films = Films(**fields, reader2=dataset.reader2, diagnosis=dataset.diagnosis)
    more = {"dataset": dataset, "model": model, "device": device, "medians": saved.get("zone_medians")}
    seen = {*saved.get("trained_on", [])}
    more["seen"] = sum(script.name_hash(name) in seen for name in dataset.ids) if seen else 0
    return {"films": films, "script": script} | more


# ==== Numbers ==================================================================================================


def score_zones(cases, n_resamples: int, seed: int) -> dict:
    """The numbers and notes of results.json, to the last digit the same in any order of the films."""
    script, everything = cases.zones["script"], cases.zones["films"]
    read = np.flatnonzero(np.isfinite(everything.probs).all((1, 2)))
    films = everything.rows(np.array(sorted(read, key=lambda i: everything.ids[i]), int))
    if not len(read):
        first = ": ".join(next(iter(cases.failed.items())))
        raise UserError(f"{cases.evaluated_on}: none of {len(cases.ids)} films could be read (first {first})")
    weights = common.bootstrap_weights(films.groups.astype(str), n_resamples, seed)
    graded, gradable = films.truth < UNKNOWN, 1 - films.probs[..., UNKNOWN]
    rows = np.repeat(np.arange(len(graded)), graded.shape[1])
    counts, gaps = tally(films, graded, films.severity, films.expected, weights)
    tables = [confusion_counts(t, c, UNKNOWN + 1, weights) for t, c in zip(films.truth.T, films.classes.T, strict=True)]
    tables = np.stack(tables)  # (Z, 1 + B, 5, 5)
    columns = {}
    for k, zone in enumerate(script.ZONES):
        columns[zone] = score_columns(counts[k], gaps[k]) | class_metrics(tables[k][:, :UNKNOWN])[0]
        columns[zone]["gradable_auroc"] = weighted_auroc(graded[:, k], gradable[:, k], weights)
    pooled = score_columns(counts.sum(0), gaps.sum(0)) | class_metrics(tables.sum(0)[:, :UNKNOWN])[0]
    pooled["gradable_auroc"] = weighted_auroc(graded.ravel(), gradable.ravel(), weights, rows)
    means = {metric: mean_defined([of_zone[metric] for of_zone in columns.values()], 0) for metric in pooled}
    results = {
        "zones": {z: zone_block(tables[k], columns[z], script.CLASSES) for k, z in enumerate(script.ZONES)},
        "pooled": zone_block(tables.sum(0), pooled, script.CLASSES),
        "zone_means": with_interval(means, LEVEL),
        "baseline": baseline(films, cases.zones["medians"], weights),
        "csi": mean_scores(films, script, weights),
        "ahf": ahf_block(films, script, weights),
        "diagnosis": diagnosis_block(films, script, weights),
        "views": views_block(films, weights),
        "second_reader": second_reader(films, script, weights),
        "calibration": calibration(films),
    }
    notes, seen = notes_on(results, films), cases.zones["seen"]
    if seen:
        notes.append(f"{seen} of {len(films.ids)} films have the FileID of one that the model was trained on")
    return results | {"notes": cases.notes + notes}


def tally(films: Films, which, severity, expected, weights) -> tuple[np.ndarray, np.ndarray]:
    """Of the zones `which` (n, Z) bool: weighted confusion counts (Z, B, 4, 4), and sums (Z, B) of |expected - truth|.

    severity, expected: (n, Z), scores to compare with the truth; weights: (n, B).
    """
    truth = np.where(which, films.truth, UNKNOWN)
    counts = [confusion_counts(t, s, UNKNOWN, weights) for t, s in zip(truth.T, severity.T, strict=True)]
    return np.stack(counts), np.where(which, abs(expected - truth), 0).T @ weights


def score_columns(counts, gaps) -> dict[str, np.ndarray]:
    """Agreement of scores, {metric: (B,)}, of confusion counts (B, 4, 4) and the sums that go with them (B,)."""
    return common.ordinal_metrics(counts) | {"mae": ratio(gaps, counts.sum((1, 2)))}


def ratio(a, b) -> np.ndarray:
    """a / b of (B,) each, NaN where b is 0."""
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b != 0)


def zone_block(table, columns: dict, class_names) -> dict:
    """What results.json has of a zone. table: (1 + B, 5, 5), the first of all films; columns: {metric: (1 + B,)}."""
    counts = table[0].astype(int)
    sizes = {"n": counts[:UNKNOWN].sum(), "n_unknown": counts[UNKNOWN].sum(), "n_declined": counts[:UNKNOWN, -1].sum()}
    by_class = per_class(table[:, :UNKNOWN], class_names[:UNKNOWN])
    return sizes | with_interval(columns, LEVEL) | {"per_class": by_class, "confusion": counts}


def per_class(table, names) -> dict:
    columns, there = class_metrics(table)[1], table[0].sum(1).astype(int)
    by_class = [{metric: values[:, k] for metric, values in columns.items()} for k in range(len(names))]
    return {name: {"n": there[k]} | with_interval(by_class[k], LEVEL) for k, name in enumerate(names)}


def pooled_scores(films: Films, which, severity, expected, weights, metrics=("qwk", "mae", "exact", "off_2")) -> dict:
    columns = score_columns(*(x.sum(0) for x in tally(films, which, severity, expected, weights)))
    return with_interval({name: columns[name] for name in metrics}, LEVEL)


def baseline(films: Films, medians, weights) -> dict | None:
    if medians is None:
        return None
    graded, always = films.truth < UNKNOWN, np.tile(medians, (len(films.ids), 1))
    scores = pooled_scores(films, graded, always, always, weights)
    return {"medians": list(medians), "n": graded.sum()} | scores


def mean_scores(films: Films, script, weights) -> dict:
    """Agreement of the mean CSI, and of the means of a side or a height."""
    found = {}
    for part, word in PARTS.items():
        its = np.array([not word or word in zone.split("_") for zone in script.ZONES])
        scored = np.where((films.classes < UNKNOWN) & its, films.expected, np.nan)
        predicted = mean_defined(scored, 1) if word else films.csi
        truth = script.true_csi(np.where(its, films.truth, UNKNOWN))
        row = common.agreement(predicted, truth, weights)
        missing = (np.isnan(predicted) & ~np.isnan(truth)).sum()
        found[part] = {"n": int(row.pop("n")[0]), "n_not_gradable": missing}
        found[part] |= {"mean_predicted": row.pop("mean_a")[0], "mean_true": row.pop("mean_b")[0]}
        limits = {name: row.pop(name)[0] for name in ("sd", "loa_low", "loa_high")}
        found[part] |= with_interval(row, LEVEL) | limits
    return found


def ahf_block(films: Films, script, weights) -> dict:
    truth, predicted = (script.ahf_class(csi) % len(AHF) for csi in (films.true_csi, films.csi))  # -1 is the last
    counts = confusion_counts(truth, predicted, len(AHF), weights)
    table, columns = counts[0].astype(int), class_metrics(counts[:, :-1])[0]
    found = {"classes": AHF, "table": table, "n": table[:-1].sum()} | with_interval(columns, LEVEL)
    return found | {"per_class": per_class(counts[:, :-1], AHF[:-1])}


def diagnosis_block(films: Films, script, weights) -> dict | None:
    if films.diagnosis is None:
        return None
    told = ~np.isnan(films.diagnosis)
    use, by_reader = told & ~np.isnan(films.csi), told & ~np.isnan(films.true_csi)
    reader = weighted_auroc(films.diagnosis[by_reader] == 1, films.true_csi[by_reader], weights[by_reader])
    ill, level, weights = films.diagnosis[use] == 1, script.ahf_class(films.csi[use]), weights[use]
    areas = {"auroc": weighted_auroc(ill, films.csi[use], weights), "reader_auroc": reader}
    found = {"n": use.sum(), "positives": ill.sum(), "n_not_gradable": (told & ~use).sum(), "reader_n": by_reader.sum()}
    found |= with_interval(areas, LEVEL) | {"cutoffs": {}}
    for k, cut in enumerate(CUTS):
        sensitivity = ratio((ill & (level > k)) @ weights, ill @ weights)
        specificity = ratio((~ill & (level <= k)) @ weights, ~ill @ weights)
        found["cutoffs"][str(cut)] = with_interval({"sensitivity": sensitivity, "specificity": specificity}, LEVEL)
    return found


def views_block(films: Films, weights) -> dict | None:
    found = {}
    for view in sorted(set(films.views), key=lambda view: (not view, view)) if any(films.views) else []:
        its, w = films.rows(films.views == view), weights[films.views == view]
        graded = its.truth < UNKNOWN
        numbers = pooled_scores(its, graded, its.severity, its.expected, w, ("qwk", "mae"))
        found[view or "not known"] = {"n_films": len(its.ids), "n": graded.sum()} | numbers
    return found or None


def film_cell(films: Films, n_resamples: int, seed: int) -> dict:
    """Numbers of the films of a subgroup."""
    weights, graded = common.bootstrap_weights(films.groups.astype(str), n_resamples, seed), films.truth < UNKNOWN
    found = pooled_scores(films, graded, films.severity, films.expected, weights, ("qwk", "mae", "exact"))
    return {"n_zones": graded.sum()} | found


def second_reader(films: Films, script, weights) -> dict | None:
    """The second reader and the model, on the zones that both readers graded."""
    if films.reader2 is None:
        return None
    both = (films.truth < UNKNOWN) & (films.reader2 < UNKNOWN)
    truth, second = (script.true_csi(np.where(both, scores, UNKNOWN)) for scores in (films.truth, films.reader2))
    found = {"n_films": both.any(1).sum(), "n": both.sum()}
    mean = mean_defined(np.where(both & (films.classes < UNKNOWN), films.expected, np.nan), 1)
    raters = {"reader": (films.reader2, films.reader2, second), "model": (films.severity, films.expected, mean)}
    for name, (severity, expected, csi) in raters.items():
        of_mean = common.agreement(csi, truth, weights)
        of_mean = with_interval({"csi_mae": of_mean["mae"], "csi_icc": of_mean["icc"]}, LEVEL)
        found[name] = pooled_scores(films, both, severity, expected, weights) | of_mean
    return found


def at_least(films: Films, k: int) -> tuple[np.ndarray, np.ndarray]:
    """P(score >= k | gradable) of the graded zones, and whether it is."""
    graded = films.truth < UNKNOWN
    probs = films.probs[graded][:, :UNKNOWN]
    return probs[:, k:].sum(1) / np.maximum(probs.sum(1), 1e-12), films.truth[graded] >= k


def calibration(films: Films) -> dict:
    found = {}
    for k in range(1, UNKNOWN):
        p, y = at_least(films, k)
        errors = {"ece": common.expected_calibration_error(y, p), "brier": common.brier_score(y, p)}
        found[f">= {k}"] = {"n": len(y), "positives": y.sum()} | errors
    return found


def notes_on(results: dict, films: Films) -> list[str]:
    """What a reader must know of the numbers."""
    pooled, ill, found = results["pooled"], results["diagnosis"], []
    graded, refused = ~np.isnan(films.true_csi), (np.isnan(films.csi) & ~np.isnan(films.true_csi)).sum()
    if not graded.any():
        found.append("No film has a graded zone: nothing but the probability of an unknown zone can be judged")
    elif not graded.all():
        found.append(f"{(~graded).sum()} of {len(graded)} films have no graded zone, and no mean CSI to compare with")
    if pooled["n_declined"]:
        text = "accuracy, precision, recall and F1 count them as errors, other numbers the score that it would give"
        found.append(f"The model calls {pooled['n_declined']} of {pooled['n']} graded zones not gradable: {text}")
    if refused:
        text = "they have a column of their own in the AHF table, and are in no other number of mean scores"
        found.append(f"The model calls {refused} of {graded.sum()} films with a true mean CSI not gradable: {text}")
    few = ", ".join(f"{name} ({row['n']})" for name, row in pooled["per_class"].items() if row["n"] < FEW_POSITIVES)
    if few and graded.any():
        found.append(f"Fewer than {FEW_POSITIVES} graded zones of a class, so hardly evidence: {few}")
    if ill and min(ill["positives"], ill["n"] - ill["positives"]) < FEW_POSITIVES:
        text = f"{FEW_POSITIVES} films with, or without, the diagnosis, so hardly evidence"
        found.append(f"Fewer than {text}: {ill['positives']} of {ill['n']} have it")
    return found


def beside(results: dict) -> dict[str, dict]:
    """What stands beside the pooled numbers, by title."""
    second, always = results["second_reader"], results["baseline"]
    rows = {"Second reader": second["reader"], "Model, zones of both readers": second["model"]} if second else {}
    rows = {title: {"n": second["n"]} | row for title, row in rows.items()}
    return rows | ({"Zone medians of training": always} if always else {})


def zone_lines(results: dict) -> list[str]:
    """The main numbers as text."""

    def said(row: dict, metric: str) -> str:
        between = interval(row, metric)
        return number(row[metric]) + f" [{between}]" * bool(between)

    pooled, ill = results["pooled"], results["diagnosis"]
    level = f" [{100 * LEVEL:.0f} %]" if results["interval"] else ""
    lines = [f"{'zone':<28}  {'graded':>6}  {'QWK' + level:<21}  {'MAE' + level:<21}  F1 macro"]
    for name, row in (results["zones"] | {"pooled": pooled} | beside(results)).items():
        f1, n = number(row["f1_macro"]) if "f1_macro" in row else "", row.get("n", "")
        lines.append(f"{name:<28}  {n:>6}  {said(row, 'qwk'):<21}  {said(row, 'mae'):<21}  {f1}".rstrip())
    lines.append(f"gradable or not: AUROC {said(pooled, 'gradable_auroc')}, {pooled['n_unknown']} zones unknown")
    lines.append(f"mean CSI: ICC {said(results['csi']['mean'], 'icc')}, MAE {said(results['csi']['mean'], 'mae')}")
    lines.append(f"AHF class: accuracy {said(results['ahf'], 'accuracy')}, {results['ahf']['n']} films")
    return lines + ([f"diagnosis: AUROC {said(ill, 'auroc')}, {ill['positives']} of {ill['n']} films"] if ill else [])


# ==== Files ====================================================================================================


def write_zones(folder: Path, results: dict, cases) -> None:
    """predictions.csv, labels.csv and report.html."""
    script, films = cases.zones["script"], cases.zones["films"]
    write_films(folder, cases.zones)
    about = f"{results['n']} films of {page.people(results)}, {results['pooled']['n']} graded zones"
    body = page_body(results, films, script, largest_errors(cases.zones))
    page.write_page(folder / "report.html", results, about, body, STYLE)


def write_films(folder: Path, zones: dict, file: str = "predictions.csv") -> None:
    """The predictions, and labels.csv; the head of this file has the columns."""
    script, films = zones["script"], zones["films"]
    predictions = {"FileID": films.ids, "patient": films.groups, "view": films.views}
    labels, failed = dict(predictions), (films.classes < 0).any(1)
    for k, zone in enumerate(script.ZONES):
        for c, name in enumerate((0, 1, 2, 3, "unknown")):
            predictions[f"{zone}_prob_{name}"] = films.probs[:, k, c]
        predictions[f"{zone}_pred"] = pd.Series(films.classes[:, k], dtype="Int64").mask(failed)
        predictions[f"{zone}_expected"] = films.expected[:, k]
        labels[zone] = pd.Series(films.truth[:, k], dtype="Int64").mask(films.truth[:, k] == UNKNOWN)
    likely = np.array(AHF, object)[script.ahf_class(films.csi)]  # -1 is the last
    predictions |= {"csi": films.csi, "ahf_class": np.where(failed, "", likely)}
    labels["csi"] = films.true_csi
    if films.diagnosis is not None:
        labels["diagnosis"] = pd.Series(films.diagnosis).astype("Int64")
    write_csv(folder / file, pd.DataFrame(predictions))
    write_csv(folder / "labels.csv", pd.DataFrame(labels))


def largest_errors(zones: dict) -> list[dict]:
    """The films with the largest mean error of the expected scores -> {row, zone: the worst, film, map: JPEG data URIs,
    None where there is none}."""
    films, found = zones["films"], []
    gaps = np.where(films.truth < UNKNOWN, abs(films.expected - films.truth), np.nan)  # (n, Z)
    means = mean_defined(gaps, 1)
    for i in sorted(np.flatnonzero(~np.isnan(means)).tolist(), key=lambda i: (-means[i], films.ids[i]))[:SHOWN]:
        one = {"row": i, "zone": int(np.nanargmax(gaps[i])), "film": None, "map": None}
        found.append(one)
        if not zones["pictures"]:
            continue
        try:
            film = zones["dataset"].picture(i)
            maps = zones["script"].zone_maps(zones["model"], zones["dataset"], i, zones["device"])
        except UserError:  # it could be read a moment ago
            continue
        one |= {"film": picture_uri(film), "map": None if maps is None else picture_uri(film, maps[one["zone"]])}
    return found


# ==== Figures ==================================================================================================


def draw_confusion(axes, table) -> None:
    """table: (K, K) counts, rows are the reader's; the shade is the share of the row."""
    table, n = np.asarray(table), len(table)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.grid(False)
    axes.pcolormesh(share, cmap=LinearSegmentedColormap.from_list("share", ["white", BLUE]), vmin=0, vmax=1)
    for i, j in np.ndindex(n, n):
        color = "white" if share[i, j] > 0.55 else "#222222"
        axes.text(j + 0.5, i + 0.5, f"{table[i, j]}", ha="center", va="center", fontsize=8, color=color)
    ticks, names = np.arange(n) + 0.5, [*map(str, range(n - 1)), "n. g."]
    axes.set(xlabel="Model", ylabel="Reader", xlim=(0, n), ylim=(n, 0), xticks=ticks, yticks=ticks)
    axes.set(xticklabels=names, yticklabels=names)
    axes.tick_params(length=0, colors="#444444")


def draw_dots(axes, x, y, xlabel: str, ylabel: str) -> None:
    axes.plot(x, y, "o", color=BLUE, markersize=3.2, alpha=0.45, markeredgewidth=0, rasterized=len(x) > MANY)
    axes.set(xlim=(-0.1, 3.1), xticks=[0, 1, 2, 3], xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0, colors="#444444")


def draw_scatter(axes, truth, csi) -> None:
    axes.plot([0, 3], [0, 3], color=GREY, linestyle="--", linewidth=1)
    axes.vlines(CUTS, -0.1, 3.1, color=GREY, linestyle=":", linewidth=1)
    axes.hlines(CUTS, -0.1, 3.1, color=GREY, linestyle=":", linewidth=1)
    draw_dots(axes, truth, csi, "Reader", "Model")
    axes.set(ylim=(-0.1, 3.1), yticks=[0, 1, 2, 3])


def draw_bland_altman(axes, truth, csi, row: dict) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name, style in (("bias", "-"), ("loa_low", "--"), ("loa_high", "--")):
        if row[name] is not None:
            axes.axhline(row[name], color=ORANGE, linestyle=style, linewidth=1.3)
    draw_dots(axes, (truth + csi) / 2, csi - truth, "Mean of reader and model", "Model − reader")
    axes.yaxis.get_major_locator().set_params(integer=True)  # or the numbers push the label out of the picture


# ==== Page =====================================================================================================

STYLE = """
.few { max-width: 760px; }
.films { display: grid; grid-template-columns: repeat(2, 1fr); gap: 20px 28px; margin-top: 14px; }
.film { border-top: 1px solid #d9d9d9; padding-top: 10px; break-inside: avoid; overflow-wrap: anywhere; }
.film > div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; margin-top: 6px; align-items: start; }
.film img { width: 100%; display: block; }
.six { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; text-align: center; }
.six span { border: 1px solid #ccc; border-radius: 3px; padding: 4px 2px; font-variant-numeric: tabular-nums; }
.six .worst { outline: 2px solid #D55E00; } .six .off { background: #fdf3ec; } .six .far { background: #f8d3bb; }
@media screen and (max-width: 900px) { .films { grid-template-columns: 1fr; } }
"""

READING = {
    "Score": "0 normal, 1 mild, 2 moderate, 3 severe. n. g., not gradable or unknown: missing, and no fifth degree.",
    "QWK": "quadratic weighted kappa: agreement beyond chance; to be off by 2 costs four times what 1 does. 1 is "
    "perfect, 0 is chance, which is what one score for every film gets.",
    "MAE, exact, ≥ 2 apart": "mean distance of the expected score from the reader's (class: of the chosen score); "
    "shares of the zones with the same score, and with one that is 2 or 3 apart.",
    "Accuracy, F1": "a graded zone that the model calls not gradable is an error. F1: harmonic mean of precision and "
    "recall of a score; macro: plain mean over the scores that occur; weighted: by how often they do.",
    "Gradable AUROC": "the chance that a graded zone has a lower probability of being unknown than an unknown one.",
    "ICC(2,1), limits": "the share of the variance that is between films, rather than between reader and model, or "
    "noise. 95 % of the differences are expected within the limits of agreement.",
} | {term: READING[term] for term in ("Interval", "Undefined")}


def table(head: str, rows: str, total: str = "") -> str:
    """head: titles of the columns, between bars; rows, total: HTML of `line`s."""
    titles = "".join(f"<th>{esc(title)}</th>" for title in head.split("|"))
    total = f'<tbody class="total">{total}</tbody>' if total else ""
    few = " few" if len(head.split("|")) < 7 else ""
    return f'<div class="scroll{few}"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody>{total}</table></div>'


def line(name: str, plain, row: dict, metrics) -> str:
    """A row of a table; plain: cells without an interval, metrics: of `row`."""
    cells = "".join(f"<td>{esc(value)}</td>" for value in plain) + "".join(cell(row, metric) for metric in metrics)
    return f"<tr><td>{esc(name)}</td>{cells}</tr>\n"


def section(title: str, text: str, *parts: str, grid: str = "") -> str:
    grid = f'<div class="grid">{grid}</div>' if grid else ""
    return f"\n<section><h2>{esc(title)}</h2><p>{esc(text)}</p>{''.join(parts)}{grid}</section>"


def page_body(results: dict, films: Films, script, errors: list[dict]) -> str:
    """Everything between the warnings and the provenance."""
    parts = [tiles(results), zones_section(results), confusion_section(results), csi_section(results, films)]
    parts += [calibration_section(results, films), ahf_section(results["ahf"])]
    if results["diagnosis"]:
        parts.append(diagnosis_section(results["diagnosis"], films))
    if results["views"]:
        of = results["views"].items()
        rows = "".join(line(view, (row["n_films"], row["n"]), row, ("qwk", "mae")) for view, row in of)
        text = "AP films are, as a rule, of patients who cannot stand: sicker, and harder to read."
        parts.append(section("Views", text, table("View|Films|Graded zones|QWK|MAE", rows)))
    reading = "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in READING.items())
    reading = f"<section><h2>How to read this</h2><dl>{reading}</dl></section>"
    return "".join([*parts, subgroup_section(results), films_section(films, script, errors), reading])


def tiles(results: dict) -> str:
    """The few numbers one quotes, and beside them the second reader's and the baseline's."""
    pooled, mean, ill, found = results["pooled"], results["csi"]["mean"], results["diagnosis"], ""
    kinds = [(pooled, "qwk", "qwk", "Zones: QWK"), (pooled, "mae", "mae", "Zones: MAE")]
    kinds += [(mean, "icc", "csi_icc", "Mean CSI: ICC(2,1)"), (mean, "mae", "csi_mae", "Mean CSI: MAE")]
    kinds += [(pooled, "gradable_auroc", "", "Gradable or not: AUROC")] if pooled["n_unknown"] else []
    kinds += [(ill, "auroc", "", "Diagnosis: AUROC")] if ill else []
    others = {name: row for name, row in beside(results).items() if not name.startswith("Model")}
    for row, metric, key, title in kinds:
        small = [f"{name.lower()} {number(other[key])}" for name, other in others.items() if key in other]
        found += page.tile(title, row, metric, results, small)
    return f'<div class="tiles">{found}</div>'


def zones_section(results: dict) -> str:
    metrics = ("qwk", "mae", "mae_class", "exact", "off_2", "f1_macro", "f1_weighted", "gradable_auroc")
    sizes, how, rows, total = ("n", "n_unknown", "n_declined"), results["interval"], "", ""
    for zone, row in results["zones"].items():
        rows += line(zone, [row[name] for name in sizes], row, metrics)
    others = {"Pooled": results["pooled"], "Mean of the zones": results["zone_means"]} | beside(results)
    for name, row in others.items():
        total += line(name, [row.get(size, "") for size in sizes], row, metrics)
    by_class = results["pooled"]["per_class"].items()
    by_class = "".join(line(name, [row["n"]], row, ("precision", "recall", "f1")) for name, row in by_class)
    head = "Zone|Graded|Unknown|Declined|QWK|MAE|MAE, class|Exact|≥ 2 apart|F1 macro|F1 weighted|Gradable AUROC"
    text = "Graded, unknown: by the reader; declined: graded, but not gradable to the model. Sides are the patient's."
    if how:
        text += f" Small print: {100 * LEVEL:.0f} % intervals, percentile bootstrap over {page.people(results)}, "
        text += f"{how['n_resamples']} resamples."
    by_class = "<h3>By score, all zones</h3>" + table("Score|Graded|Precision|Recall|F1", by_class)
    return section("Numbers by zone", text, table(head, rows, total), by_class)


def confusion_section(results: dict) -> str:
    grid = ""
    for name, row in ({"Pooled": results["pooled"]} | results["zones"]).items():
        said = f"{row['n']} graded zones, {row['n_unknown']} unknown"
        grid += panel(f"Confusion matrix: {name}", name, said, draw_confusion, row["confusion"])
    text = "Counts; shade: share of the reader's row. n. g.: unknown to the reader, not gradable to the model."
    return section("Confusion matrices", text, grid=grid)


def csi_section(results: dict, films: Films) -> str:
    rows, grid, mean = "", "", results["csi"]["mean"]
    for part, row in results["csi"].items():
        plain = [row["n"], row["n_not_gradable"], *(number(row[name], 2) for name in ("mean_true", "mean_predicted"))]
        plain.append(f"{number(row['loa_low'], 2)} to {number(row['loa_high'], 2)}")
        rows += line(part.capitalize(), plain, row, ("bias", "mae", "rmse", "pearson", "icc"))
    if mean["n"]:
        both = ~np.isnan(films.csi) & ~np.isnan(films.true_csi)
        truth, csi = films.true_csi[both], films.csi[both]
        said = f"bias {number(mean['bias'], 2)}, limits {number(mean['loa_low'], 2)} to {number(mean['loa_high'], 2)}"
        grid = panel("Bland–Altman plot", "Bland–Altman", said, draw_bland_altman, truth, csi, mean)
        said = f"{mean['n']} films, Pearson {number(mean['pearson'])}"
        grid += panel("Mean CSI, model against reader", "Mean CSI", said, draw_scatter, truth, csi)
    head = "Mean of|Films|Not gradable|Reader|Model|Limits|Bias|MAE|RMSE|Pearson|ICC(2,1)"
    text = (
        "The model's mean of the expected scores of the zones that it calls gradable, against the mean of those that "
        "the reader graded. Orange: bias and limits of agreement. Dotted: cut-offs of the AHF classes."
    )
    return section("Mean CSI", text, table(head, rows), grid=grid)


def calibration_section(results: dict, films: Films) -> str:
    grid, films = "", films.rows(films.classes[:, 0] >= 0)  # those that were read
    for k in range(1, UNKNOWN):
        row, (p, y) = results["calibration"][f">= {k}"], at_least(films, k)
        said = f"{row['positives']} of {row['n']} zones, ECE {number(row['ece'])}"
        if row["n"]:
            grid += panel(f"Reliability, ≥ {k}", f"Score ≥ {k}", said, draw_reliability, y, p, None, None)
    text = (
        "Of the graded zones that the model gives 30 % for a score of at least 1, 2, or 3, about 30 % should have it: "
        "the dashed line; below it the model claims too much. 15 bins; bars: 95 % Wilson interval (over zones, not "
        "patients); hollow: fewer than 10 zones. ECE: mean distance from the dashed line."
    )
    return section("Calibration", text, grid=grid)


def ahf_section(ahf: dict) -> str:
    rows, metrics = "", ("precision", "recall", "f1")
    for name, counts in zip(ahf["classes"], ahf["table"], strict=True):
        rows += line(f"Reader: {name}", counts, ahf["per_class"].get(name, {}), metrics)
    total = line(
        f"Means; accuracy {number(ahf['accuracy'])}", [""] * len(AHF), ahf, ("precision", "recall", "f1_macro")
    )
    text = (
        f"Acute heart failure by the mean CSI: low likelihood up to {CUTS[0]}, medium up to {CUTS[1]}, high above. A "
        "film that is not gradable is in no class: an error where the reader gave one, and never low."
    )
    head = "|".join(["", *(f"Model: {name}" for name in ahf["classes"]), "Precision|Recall|F1"])
    return section("AHF classes", text, table(head, rows, total))


def diagnosis_section(row: dict, films: Films) -> str:
    rows, grid = "", ""
    for cut, at in row["cutoffs"].items():
        rows += line(f"Mean CSI above {cut}", [], at, ("sensitivity", "specificity"))
    if row["auroc"] is not None:
        use, between = ~np.isnan(films.diagnosis) & ~np.isnan(films.csi), interval(row, "auroc")
        ill, csi = films.diagnosis[use] == 1, films.csi[use]
        draw = lambda axes: [draw_roc(axes, ill, csi, csi > cut, None) for cut in CUTS]  # noqa: E731
        said = f"AUROC {number(row['auroc'])}" + f" [{between}]" * bool(between)
        grid = panel(f"ROC curve: {said}", "Diagnosis", said, draw)
    text = (
        f"The model's mean CSI against the diagnosis, which {row['positives']} of {row['n']} films have; "
        f"{row['n_not_gradable']} more are not gradable. AUROC {number(row['auroc'])}; of the reader's mean CSI, on "
        f"{row['reader_n']} films, {number(row['reader_auroc'])}. Dots: the cut-offs."
    )
    return section("Diagnosis", text, table("Cut-off|Sensitivity|Specificity", rows), grid=grid)


def films_section(films: Films, script, errors: list[dict]) -> str:
    """The films with the largest errors, each with the map of its worst zone and its scores as they lie in the film."""
    blocks = ""
    for one in errors:
        i, worst, pictures, cells = one["row"], script.ZONES[one["zone"]], "", ""
        for k, zone in enumerate(script.ZONES):
            truth, said, expected = films.truth[i, k], films.classes[i, k], films.expected[i, k]
            gap = abs(expected - truth) if truth < UNKNOWN else 0
            kind = "worst " * (zone == worst) + ("far" if gap >= 1.5 else "off" if gap >= 0.5 else "")
            reader, under = "–" if truth == UNKNOWN else truth, zone + ", n. g." * int(said == UNKNOWN)
            cells += f'<span class="{kind}"><b>{reader}</b> → {expected:.1f}<small>{esc(under)}</small></span>'
        for kind, what in (("film", "film"), ("map", f"map of {worst}")):
            alt = esc(f"{what} of {films.ids[i]}")
            pictures += f'<img src="{one[kind]}" alt="{alt}">' if one[kind] else f'<span class="gone">no {what}</span>'
        means = [number(mean, 2) if mean >= 0 else "n. g." for mean in (films.true_csi[i], films.csi[i])]
        said = films.views[i], f"mean CSI {' → '.join(means)}", f"map of {worst}" if one["map"] else ""
        blocks += f'<div class="film"><b>{esc(films.ids[i])}</b><small>{esc(" · ".join(filter(None, said)))}</small>'
        blocks += f'<div>{pictures}<span class="six">{cells}</span></div></div>'
    text = (
        "By the mean error over the graded zones. Reader → expected score of the model, as the zones lie in the film, "
        "the patient's right on the left. Framed: the worst zone; its map is over the film: gradient times activation "
        "at the last places of the network (HiResCAM), bright is what raises the expected score most. It shows what "
        "moved the score, not where the disease is, and is as coarse as those places."
    )
    return section("Largest errors", text, f'<div class="films">{blocks}</div>') if errors else ""
