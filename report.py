"""One self-contained HTML page from the results of evaluate.py: numbers, curves, calibration, provenance.

evaluate.py writes the page; this script makes it again from the files, without the model, and so without the pictures
of a retrieval gallery:
    python report.py --results eval/results.json --predictions eval/predictions.csv --labels eval/labels.csv

page.py says what every page keeps to.
"""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

import page
import pictures
from clinical import TARGETS, net_benefit, wilson_interval
from common import UserError, calibration_bins, label_array, need_columns, need_file, patients_of, read_table, run_main
from page import BLUE, GREY, ORANGE, esc, interval, number, panel, people, tile, unit_axes, why_undefined, write_page
from subgroups import subgroup_section

FEW_QUERIES = 3  # classes with fewer are not in the table of classes
FEW_IN_BIN = 10  # bins of a reliability diagram with fewer cases are drawn hollow and not joined
LONG_TEXT = 280  # characters of a text that the gallery shows


# ==== Files ====================================================================================================


def read_scores(predictions: Path, labels: Path, class_names=None, others=()):
    """Two CSV files -> ids, groups, targets, probs, class_names, in the order of the labels file.

    predictions: column `id` and a `{label}_prob` for each label (`{label}_pred` is ignored); labels: `id`, the label
    columns (0, 1, or empty or -1 for unknown) and, if there is one, `patient_id` (the groups of the bootstrap).
    `class_names` chooses labels and their order; by default every column must have its partner, but for `others`, which
    are no labels. targets (n, K) float64 with NaN for unknown, probs (n, K) float64; a row without any probability, all
    cells empty, is a case that failed to load: NaN. Raises UserError.
    """
    left, right = read_plain(predictions), read_plain(labels)
    if class_names is None:
        class_names = [c for c in right.columns if c not in ("id", "patient_id", *others)]
        need_columns(right, [c.removesuffix("_prob") for c in left.columns if c.endswith("_prob")], labels)
        if not class_names:
            raise UserError(f"{labels}: has no label column (id, patient_id and one column a label are expected)")
    for name in class_names:
        if f"{name}_prob" not in left.columns:
            near = difflib.get_close_matches(f"{name}_prob", list(left.columns), 1, 0.7)
            hint = f"did you mean '{near[0]}'?" if near else "--label-columns chooses the labels to evaluate"
            raise UserError(f"{labels}: column '{name}' has no '{name}_prob' in {predictions} ({hint})")
    for table, path in ((left, predictions), (right, labels)):
        need_columns(table, ["id"], path)
        twice = table["id"][table["id"].duplicated()]
        if len(twice):
            raise UserError(
                f"{path}: row {twice.index[0] + 2}: id '{twice.iloc[0]}' comes twice (keep one row per case)"
            )
    _need_ids(right["id"], left["id"], f"{predictions}: has no row for", f"of {labels}")
    _need_ids(left["id"], right["id"], f"{labels}: has no row for", f"of {predictions}")

    columns = [f"{name}_prob" for name in class_names]
    probs = left[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    blank = (left[columns] == "").all(axis=1).to_numpy()[:, None]
    bad = ~((probs >= 0) & (probs <= 1)) & ~blank
    if bad.any():
        row, k = np.argwhere(bad)[0]
        cell = left[columns[k]].iat[row]
        raise UserError(f"{predictions}: row {row + 2}, column '{columns[k]}': '{cell}' is no probability (0 to 1)")
    probs = probs[pd.Index(left["id"]).get_indexer(right["id"])]
    targets = label_array(right, class_names, labels).astype(np.float64)
    return list(right["id"]), patients_of(right, "id"), targets, probs, list(class_names)


def read_plain(path: Path) -> pd.DataFrame:
    """A table without the quotes that write_csv puts before text which a spreadsheet would run as a formula."""
    table, quote = read_table(path), r"^'(?=[=+\-@\t\r])"
    table.columns = table.columns.str.replace(quote, "", regex=True)
    for column in {"id", "patient_id"} & set(table.columns):
        table[column] = table[column].str.replace(quote, "", regex=True)
    return table


def _need_ids(wanted: pd.Series, there: pd.Series, message: str, of: str) -> None:
    missing = list(wanted[~wanted.isin(there)])
    if missing:
        first = ", ".join(f"'{i}'" for i in missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(
            f"{message} {len(missing)} id{'s' * (len(missing) > 1)} {of}: {first} (the ids must be the same)"
        )


# ==== Figures ================================================================================================


def draw_roc(axes, y, p, at, row) -> None:
    """y (n,) of 0 and 1, p (n,) probabilities, at (n,) bool: flagged, which is the dot."""
    unit_axes(axes, "1 − specificity", "Sensitivity")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    fpr, tpr, _ = roc_curve(y, p)
    axes.plot(fpr, tpr, color=BLUE, linewidth=1.8)
    axes.plot(at[y == 0].mean(), at[y == 1].mean(), "o", color=ORANGE, markersize=5.5, clip_on=False)


def draw_pr(axes, y, p, at, row) -> None:
    unit_axes(axes, "Recall (sensitivity)", "Precision (PPV)")
    axes.axhline(y.mean(), color=GREY, linestyle="--", linewidth=1)
    precision, recall, _ = precision_recall_curve(y, p)
    axes.plot(recall, precision, color=BLUE, linewidth=1.8, drawstyle="steps-post")
    if at.any():
        axes.plot(at[y == 1].mean(), y[at].mean(), "o", color=ORANGE, markersize=5.5, clip_on=False)


def draw_reliability(axes, y, p, at, row) -> None:
    """Dots: mean probability and share of positives of each bin; bars: 95 % Wilson interval of that share."""
    unit_axes(axes, "Mean predicted probability", "Share of positives")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    bins = calibration_bins(y, p)
    full = bins["count"] > 0
    mean, share, n = (bins[name][full] for name in ("mean_prob", "frequency", "count"))
    axes.vlines(mean, *wilson_interval(share * n, n), color=BLUE, linewidth=1.2, alpha=0.5)
    many = n >= FEW_IN_BIN
    axes.plot(mean[many], share[many], "o-", color=BLUE, linewidth=1.2, markersize=4.5)
    axes.plot(mean[~many], share[~many], "o", color=BLUE, markerfacecolor="white", markersize=4.5)


def draw_histogram(axes, y, p, at, row) -> None:
    """Share of the positive and of the negative cases in each of 20 bins: comparable however rare the label is."""
    edges = np.linspace(0, 1, 21)
    for side, color in enumerate((BLUE, ORANGE)):
        chosen = p[y == side]
        if len(chosen):
            share = np.histogram(chosen, edges)[0] / len(chosen)
            axes.stairs(share, edges, fill=True, color=color, alpha=0.22)
            axes.stairs(share, edges, color=color, linewidth=1.5)
    if row["threshold"] is not None:
        axes.axvline(row["threshold"], color="#333333", linestyle=":", linewidth=1.2)
    axes.set(xlim=(-0.02, 1.02), xlabel="Predicted probability", ylabel="Share of cases", xticks=[0, 0.5, 1])
    axes.set_ylim(0, max(0.01, axes.get_ylim()[1]))
    axes.tick_params(length=0, colors="#444444")
    axes.locator_params(axis="y", nbins=4)


def draw_benefit(axes, y, p, at, row) -> None:
    """Net benefit of the model and, dashed, of treating everybody; 0 is treating nobody."""
    risks, top = np.arange(100) / 100, max(y.mean(), 1e-3)
    model, everybody = net_benefit(y, p, risks)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.plot(risks, everybody, color=GREY, linestyle="--", linewidth=1)
    axes.plot(risks, model, color=BLUE, linewidth=1.8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.3 * top, 1.1 * top), xticks=[0, 0.5, 1])
    axes.set(xlabel="Threshold probability", ylabel="Net benefit")
    axes.tick_params(length=0, colors="#444444")
    axes.locator_params(axis="y", nbins=4)


KINDS = (  # title, panel, metric of its caption, how to read it
    ("ROC curves", draw_roc, "auroc", "Sensitivity against false alarms over all thresholds. Dashed: a coin toss. Dot: "
     "the threshold in use."),
    ("Precision–recall curves", draw_pr, "auprc", "How many of the flagged cases are right (precision), at every share "
     "of the positives found (recall). Dashed: chance, which is the prevalence of the label. Dot: the threshold in "
     "use."),
    ("Calibration", draw_reliability, "ece", "Reliability diagrams with 15 bins of equal width. Of the cases given "
     "30 %, about 30 % should be positive: the dashed line; below it the model claims too much. Bars: 95 % Wilson "
     f"interval of the bin (over cases, not patients). Hollow: fewer than {FEW_IN_BIN} cases. ECE: mean distance from "
     "the dashed line."),
    ("Score distributions", draw_histogram, None, "Probabilities of the positive cases (orange) and the negative cases "
     "(blue), as shares of their own group. Dotted: the threshold in use."),
    ("Decision curves", draw_benefit, "net_benefit", "Who treats at a risk of 10 % accepts nine needless treatments "
     "for one that is needed. Net benefit: needed treatments for each case, less the needless ones at that rate of "
     "exchange. The model is of use at the threshold probabilities where the blue line is above both treating "
     "everybody (dashed) and nobody (zero). It takes the probabilities at their word: see the calibration first."),
)  # fmt: skip


RETRIEVAL = {  # of results.json: title, metric, short name, who is found
    "report_to_volume": ("Report to volume", "recall", "R", "R@K: share of the reports whose own volume, or one with "
                         "word for word the same report, is among the first K of all volumes."),
    "volume_to_report": ("Volume to report", "recall", "R", "R@K: share of the volumes whose report is among the first "
                         "K of all distinct reports."),
    "volume_to_volume": ("Volume to volume", "map", "MAP", "MAP@K, as CT-CLIP calls it: of the K nearest volumes of "
                         "other patients, the mean label overlap with the query (labels of both / labels of either). "
                         "Volumes without a positive label take no part."),
}  # fmt: skip

RESAMPLED = (
    "intervals; the patients of the queries are resampled, the gallery stays. Where nothing, or everything, was found "
    "an interval has no width, and says nothing."
)


def ks_of(row: dict, metric: str) -> list[int]:
    return [
        int(name.split("@")[1].removesuffix("_chance")) for name in row if re.fullmatch(metric + r"@\d+_chance", name)
    ]


def draw_retrieval(axes, row: dict, kinds, ylabel: str) -> None:
    """Share found at each K, with its interval, and dashed what chance finds.

    kinds: (metric, its colour, that of chance, marker, shift along K) of each curve.
    """
    ks = sorted({k for metric, *_ in kinds for k in ks_of(row, metric)})
    for metric, color, of_chance, marker, shift in kinds:
        own, ends = ks_of(row, metric), ("", "_chance", "_low", "_high")
        value, chance, low, high = ([row.get(f"{metric}@{k}{end}") for k in own] for end in ends)
        x = np.array([ks.index(k) for k in own]) + shift
        hollow = {"markerfacecolor": "white"} if of_chance == color else {}
        axes.plot(x, chance, marker + "--", color=of_chance, linewidth=1, markersize=3.5, **hollow)
        if None not in low:
            axes.vlines(x, low, high, color=color, linewidth=5, alpha=0.35)
        axes.plot(x, value, marker + "-", color=color, linewidth=1.8, markersize=5)
    axes.set(xlim=(-0.4, len(ks) - 0.6), ylim=(-0.02, 1.02), xlabel="K", ylabel=ylabel, xticks=range(len(ks)))
    axes.set_xticklabels(map(str, ks))
    axes.tick_params(length=0, colors="#444444")


def retrieval_section(results: dict) -> str:
    """Table and curves of the retrieval; '' where there was none."""
    if "retrieval" not in results:
        return ""
    if "image_to_text" in results["retrieval"]:
        return pair_section(results)
    ks = sorted({k for key, kind in RETRIEVAL.items() for k in ks_of(results["retrieval"][key] or {}, kind[1])})
    rows, panels, how = "", "", results["interval"]
    for key, (title, metric, short, _) in RETRIEVAL.items():
        row = results["retrieval"][key]
        if row is None:
            rows += f'<tr><td>{title}</td><td class="undefined" colspan="{len(ks) + 3}">undefined: no query</td></tr>\n'
            continue
        cells = ""
        for name, digits in [*((f"{metric}@{k}", 3) for k in ks), ("median_rank", 1)]:
            chance = f"<small>chance {number(row[name + '_chance'], digits)}</small>" if name in row else ""
            small = interval(row, name, digits)
            cells += f"<td>{number(row[name], digits)}<small>{small}</small>{chance}</td>" if chance else "<td></td>"
        rows += (
            f"<tr><td>{title}<small>{short}@K</small></td><td>{row['n']}</td><td>{row['n_gallery']}</td>{cells}</tr>\n"
        )
        if ks_of(row, metric):
            kind, alt = ([(metric, BLUE, GREY, "o", 0)], f"{short}@K"), f"{title}: {short}@K against chance"
            panels += panel(alt, title, f"{row['n']} queries", draw_retrieval, row, *kind)
    text = "Blue: this model. Dashed: chance, a random order. Equal scores count as if in random order."
    if how:
        text += f" Small print and bars: {100 * how['level']:.0f} % {RESAMPLED}"
    as_published = ", ".join(
        f"{name.replace('recall', 'R').replace('map', 'MAP')} {number(value)}"
        for name, value in results["retrieval"]["as_published"].items()
    )
    terms = {title: text for title, _, _, text in RETRIEVAL.values()}
    if as_published:
        terms["As published"] = (
            f"{as_published}. Counted as CT-CLIP's scripts do, to be compared with its paper: only the report's own "
            "volume is right; a volume finds itself first, and MAP@K is the mean of the values up to K."
        )
    head = "".join(f"<th>K = {k}</th>" for k in ks)
    return f"""
<section><h2>Retrieval</h2><p>{esc(text)}</p><div class="scroll"><table>
<thead><tr><th>Search</th><th>Queries</th><th>Gallery</th>{head}<th>Median rank</th></tr></thead>
<tbody>{rows}</tbody></table></div>{definitions(terms)}<div class="grid">{panels}</div></section>"""


PAIR_METRICS = {  # of results.json: column, digits
    "recall@1": ("R@1", 3), "recall@5": ("R@5", 3), "recall@10": ("R@10", 3), "mean_recall": ("Mean recall", 3),
    "median_rank": ("Median rank", 1), "class_recall@1": ("Class R@1", 3), "class_recall@5": ("Class R@5", 3),
    "class_recall@10": ("Class R@10", 3), "class_map": ("Class MAP", 3),
}  # fmt: skip
CURVES = [("recall", BLUE, BLUE, "o", -0.06), ("class_recall", ORANGE, ORANGE, "s", 0.06)]
DIRECTIONS = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
MARKS = {  # of an answer in the gallery: sign, word, class of its frame
    "report": ("✓", "same report", "right"),
    "class": ("○", "same class", "near"),
    "other": ("✗", "other class", "wrong"),
    "wrong": ("✗", "another report", "wrong"),
}


def pair_rows(rows: dict[str, dict | None], metrics, ends=("chance", "fixed")) -> str:
    """Table of some rows; `rows`: title -> numbers; ends: what stands below a number and its interval."""
    head = "".join(f"<th>{PAIR_METRICS[name][0]}</th>" for name in metrics)
    body = ""
    for title, row in rows.items():
        if row is None:
            empty = f'<td class="undefined" colspan="{len(metrics) + 2}">undefined: no query</td>'
            body += f"<tr><td>{esc(title)}</td>{empty}</tr>\n"
            continue
        counts = [str(row["n"]), str(row["n_gallery"])]
        if any(name.startswith("class_") for name in metrics) and (row["class_n"], row["class_n_gallery"]) != (
            row["n"], row["n_gallery"]):  # fmt: skip
            counts = [
                f"{a}<small>class {row[f'class_{k}']}</small>" for a, k in zip(counts, ("n", "n_gallery"), strict=True)
            ]
        body += f"<tr><td>{esc(title)}</td><td>{counts[0]}</td><td>{counts[1]}</td>"
        for name in metrics:
            digits = PAIR_METRICS[name][1]
            if row.get(f"{name}_chance") is None:
                body += "<td></td>"
                continue
            small = f"<small>{interval(row, name, digits)}</small>"
            small += "".join(f"<small>{end} {number(row[f'{name}_{end}'], digits)}</small>" for end in ends)
            body += f"<td>{number(row[name], digits)}{small}</td>"
        body += "</tr>\n"
    return f"""<div class="scroll"><table><thead><tr><th>Search</th><th>Queries</th><th>Gallery</th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


def pair_section(results: dict) -> str:
    """Tables and curves of the retrieval of fundus pairs and texts, over heads, directions and classes."""
    found, how, rows, panels, classes = results["retrieval"], results["interval"], {}, "", {}
    for key, direction in DIRECTIONS.items():
        for level, row in found[key].items():
            title = f"{direction}, {level}"
            rows[title] = row
            if row and (ks_of(row, "recall") or ks_of(row, "class_recall")):
                alt, said = f"{title}: recall at K against chance", f"{row['n']} queries"
                panels += panel(alt, title, said, draw_retrieval, row, CURVES, "Share found")
        for name, row in ((found[key].get("patient") or {}).get("per_class") or {}).items():
            classes[f"{name}, {direction.lower()}"] = row if row["class_n"] >= FEW_QUERIES else None
    shown = [
        name for name in PAIR_METRICS if any(row and row.get(f"{name}_chance") is not None for row in rows.values())
    ]
    text = (
        "Each head of the model apart: patient (both eyes), left and right eye. R@K: share of the queries with a right "
        "answer among the first K; blue in the curves. Right is the same report: one of the image's own, or word for "
        "word the same. Class R@K (orange) and class MAP, the mean average precision over all right answers: right is "
        "what has the class of the query. The gallery of texts holds each distinct text once. Chance "
        "(dashed, hollow): a random order. Fixed: one order for every query, what is right most often first, which a "
        "model that does not look at the query can get by luck: a number is evidence if its interval is above both."
    )
    if how:
        text += f" Small print and bars: {100 * how['level']:.0f} % {RESAMPLED}"
    by_class = [name for name in shown if name in ("recall@1", "class_recall@1", "class_recall@5", "class_map")]
    many = {title: row for title, row in sorted(classes.items()) if row}
    text_2 = "By class of the query, patient head. The other heads, every K, and the classes of fewer than "
    text_2 += f"{FEW_QUERIES} queries ({len(classes) - len(many)} rows) are in the results file."
    table = pair_rows(many, by_class, ["chance"]) if many else ""
    by_class = f"<h3>By class</h3><p>{text_2}</p>{table}" if classes else "<p>The data have no two classes to find.</p>"
    return f"""
<section><h2>Retrieval</h2><p>{esc(text)}</p>{pair_rows(rows, shown)}<div class="grid three">{panels}</div>
{by_class}</section>"""


def gallery_section(results: dict, gallery: list[dict] | None) -> str:
    """Queries with their best answers, as `retrieval.gallery` gives them, right and wrong marked by colour and word."""
    if "image_to_text" not in results.get("retrieval", {}):
        return ""
    if gallery is None:
        text = (
            "Not in this page, which was made again from the results files, or with --no-pictures: evaluate.py draws "
            "it from the photographs."
        )
        return f"\n<section><h2>Retrieval gallery</h2><p>{text}</p></section>"

    def eyes(one: dict) -> str:
        if not one["pictures"]:
            return '<span class="gone">unreadable</span>'
        sides = ("left eye", "right eye") if len(one["pictures"]) == 2 else ("photograph",)
        drawn = ""
        for side, uri in zip(sides, one["pictures"], strict=True):
            alt = esc(f"{side} of {one['id']}")
            drawn += f'<img src="{uri}" alt="{alt}">' if uri else f'<span class="gone">no {side}</span>'
        return f'<span class="eyes">{drawn}</span>'

    def words(one: dict) -> str:
        text = " ".join(one["text"].split())
        return f"<q>{esc(text if len(text) <= LONG_TEXT else text[:LONG_TEXT] + ' …')}</q>"

    def answer(one: dict) -> str:
        sign, word, kind = MARKS[one["mark"]]
        said = " · ".join(esc(x) for x in (one["id"], one["class"], f"{one['score']:.3f}") if x)
        content = eyes(one) if one["pictures"] or not one["text"] else words(one)
        return f'<li class="{kind}"><b>{sign} {word}</b>{content}<small>{said}</small></li>'

    parts = {"text": "", "image": ""}
    for one in gallery:
        query, kind = one["query"], one["kind"]
        about = f"{kind} {query['id']}{', class ' + query['class'] if query['class'] else ''}; the same report is at "
        about = esc(f"{about}rank {one['rank']:g} of {one['gallery']}")
        content = words(query) if kind == "text" else eyes(query)
        answers = "".join(map(answer, one["answers"]))
        parts[kind] += f'<div class="ask {kind}"><div>{content}<small>{about}</small></div><ol>{answers}</ol></div>'
    text = (
        "The patient head at work, best answer first, with the cosine of the features. The queries are spread evenly "
        "over the ids, whatever the model makes of them: they are not the best ones. ✓ blue: the same report. ○ green: "
        "another report, the same class. ✗ orange: neither. Left eye on the left."
    )
    return f"""
<section><h2>Retrieval gallery</h2><p>{esc(text)}</p><h3>A text asks, pairs of eyes answer</h3>{parts["text"]}
<h3>A pair of eyes asks, texts answer</h3>{parts["image"]}</section>"""


def figures_section(title, draw, metric, text, results, targets, probs) -> str:
    """One kind of panel for every label, in the order of the table; labels that cannot be drawn are named with why."""
    panels, left_out = [], []
    cut = [row["threshold"] for row in results["per_label"].values()]
    flagged = probs >= (probs.max(1, keepdims=True) if None in cut else np.array(cut))
    for k, (name, row) in enumerate(results["per_label"].items()):
        known = ~np.isnan(targets[:, k]) & ~np.isnan(probs[:, k])
        y, p, at = targets[known, k], probs[known, k], flagged[known, k]
        if not len(y) or (row["auroc"] is None and metric in ("auroc", "auprc", "net_benefit")):
            left_out.append(f"{name} ({why_undefined(row)})")
            continue
        if metric == "net_benefit":
            risk = "0.1" if row["prevalence"] < 0.2 else "0.3"
            model, everybody = (number(row[metric][risk][who]) for who in ("model", "treat_all"))
            said = f"at {risk}: model {model}, treat all {everybody}"
        elif metric:
            between = interval(row, metric)
            said = f"{metric.upper()} {number(row[metric])}" + (f" [{between}]" if between else "")
        else:
            said = f"{row['positives']} positive, {row['n'] - row['positives']} negative"
        alt = f"{title} of {name}: {said}"
        said += f"\nchance {number(row['prevalence'])}" if metric == "auprc" else ""
        panels.append(panel(alt, name, said, draw, y, p, at, row))
    note = f'<p class="sub">Not drawn: {esc(", ".join(left_out))}.</p>' if left_out else ""
    return f'<section><h2>{esc(title)}</h2><p>{esc(text)}</p><div class="grid">{"".join(panels)}</div>{note}</section>'


# ==== Sections ===============================================================================================


READING = {
    "AUROC": "the chance that a positive case gets a higher score than a negative one: 0.5 is a coin toss, 1 perfect. "
    "It depends neither on the threshold nor on how rare the label is.",
    "AUPRC": "average precision: the precision over all recalls. Chance is the prevalence, so 0.30 is poor for a label "
    "that half of the cases have, and good for one that 2 % have.",
    "Sensitivity, specificity": "at the threshold: the share of the positive cases that is flagged (also called "
    "recall), and the share of the negative cases that is not.",
    "PPV, NPV": "at the threshold: the share of the flagged cases that is positive (also called precision), and the "
    "share of the others that is negative. Both hold for the prevalence in these cases, and change with it.",
    "F1": "the harmonic mean of sensitivity and PPV. In averages 0/0 counts as 0 in these three.",
    "Macro, weighted, micro": "macro is the plain mean over the labels that are defined (how many is stated); weighted "
    "gives each label the weight of its positive cases; micro pools all decisions, so frequent labels weigh more.",
    "Interval": "the range of values that other samples of patients would plausibly give. It covers neither errors in "
    "the labels nor another hospital. Two models need a paired comparison, not a look at overlapping intervals.",
    "DeLong": "interval of the AUROC without resampling, on the logit scale, with the cases of one patient taken as "
    "dependent (Obuchowski). Where it differs much from the other, there are too few positive or negative cases; "
    "around 0 or 1, and where all scores are equal, it has no width, and says nothing.",
    "Undefined": "the data cannot answer: an AUROC without a positive case, for example. It is not a zero.",
}
CALIBRATION = {
    "ECE": "mean distance of probability and frequency over 15 bins (i/15, (i+1)/15] of equal width, weighted by their "
    "cases. Adaptive: bins of equal counts. MCE: the largest. 0 is perfect, but few cases alone make all three larger.",
    "Brier, log-loss": "mean squared distance to the label, and mean negative log-likelihood in nats. Lower is better, "
    "and ranking counts too. Always saying the prevalence v gives a Brier score of v (1 − v).",
    "Slope, intercept": "of a logistic regression of the label on the logit of the probability: 1 and 0 are perfect, a "
    "slope below 1 is too extreme. Undefined where a score separates the classes, or all scores are equal. In the "
    "large: the intercept at slope 1; below 0 the probabilities are too high.",
    "Temperature": "fitted to validation cases; logits are divided by it, which changes no ranking.",
}


def definitions(terms: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{esc(term)}</dt><dd>{esc(text)}</dd>' for term, text in terms.items())}</dl>"


def table(columns, rows: str, kind: str = "") -> str:
    """`columns`: texts, escaped here; `rows`: HTML."""
    head = "".join(f"<th>{esc(column)}</th>" for column in columns)
    return f"""<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def missing(why: str, word: str = "undefined", columns: int = 1) -> str:
    """A table cell of a number that the data do not give, with why in small print."""
    return f'<td colspan="{columns}"><span class="undefined">{word}</span><small>{why}</small></td>'


def cell(row: dict, metric: str) -> str:
    """A table cell: the value, and in small print its interval, or why it is undefined; empty where the row has no such
    metric."""
    if metric not in row:
        return "<td></td>"
    positives, flagged = row.get("positives", 1), row.get("flagged", 1)
    zero = {"precision": flagged, "recall": positives, "f1": positives + flagged}.get(metric) == 0
    if row[metric] is None or zero:
        why = " ".join(why_undefined(row).split()[:2]) if "positives" in row else ""
        by_threshold = {"precision": "none flagged", "npv": "all flagged"} if row.get("n") else {}
        return missing(by_threshold.get(metric, why), "undefined" if row[metric] is None else "0/0")
    return f"<td>{number(row[metric])}<small>{interval(row, metric)}</small></td>"


def mark(row: dict) -> str:
    """A table cell with the AUROC as a dot, its interval as a bar from 0 to 1, chance as a tick; below DeLong's."""
    svg = page.mark(*map(row.get, ("auroc", "auroc_low", "auroc_high")))
    return f"<td>{svg}<small>{interval(row, 'auroc_delong')}</small></td>" if svg else "<td></td>"


def table_row(name: str, under: str, n, positives: str, row: dict) -> str:
    """One label, or an average. `name` and `under` are escaped here."""
    chance = number(row["prevalence"]) if row.get("prevalence") is not None else ""
    return (
        f"<tr><td>{esc(name)}<small>{esc(under)}</small></td><td>{n}</td><td>{positives}</td>"
        + (cell(row, "auroc") + mark(row) + cell(row, "auprc") + f'<td class="chance">{chance}</td>')
        + "".join(cell(row, metric) for metric in ("recall", "specificity", "precision", "npv", "f1"))
        + f"<td>{number(row['threshold']) if row.get('threshold') is not None else ''}</td></tr>\n"
    )


def table_section(results: dict) -> str:
    rows, how = "", results["interval"]
    for name, row in results["per_label"].items():
        share = f"<small>{100 * row['prevalence']:.1f} %</small>" if row["n"] else ""
        rows += table_row(name, "", row["n"], f"{row['positives']}{share}", row)
    defined = f"{results['macro']['n_defined']} of {len(results['per_label'])} labels"
    totals = table_row("Macro", defined, "", "", results["macro"])
    totals += table_row("Weighted", "by positive cases", "", "", results["weighted"])
    totals += table_row("Micro", "all decisions", "", "", results["micro"])
    text = f"Thresholds: {results['thresholds_source']}."
    if any(row["threshold"] is not None for row in results["per_label"].values()):
        text += " A case is flagged when its probability reaches the threshold."
    if how:
        text += (
            f" Small print: {100 * how['level']:.0f} % intervals, percentile bootstrap over {people(results)}, "
            f"{how['n_resamples']} resamples."
        )
    return f"""
<section><h2>Numbers by label</h2><p>{esc(text)}</p><div class="scroll"><table>
<thead><tr><th>Label</th><th>Cases</th><th>Positive</th><th>AUROC</th><th class="scale">0 to 1<small>DeLong</small></th>
<th>AUPRC</th><th class="chance">chance</th><th>Sensitivity</th><th>Specificity</th><th>PPV</th><th>NPV</th><th>F1</th>
<th>Threshold</th></tr></thead><tbody>{rows}</tbody><tbody class="total">{totals}</tbody></table></div></section>"""


def operating_section(results: dict) -> str:
    """Specificity at given sensitivities and the reverse, for each label."""
    rows, sides = "", ("sensitivity", "specificity")
    for name, row in results["per_label"].items():
        cells = "" if row["operating_points"] else missing(why_undefined(row), columns=6)
        for point in row["operating_points"]:
            other, reached = sides[point["at"] == sides[0]], point[point["at"]]
            small = "flags nobody" if point["threshold"] is None else f"at {point['threshold']:.3g}"
            small += f"<br>{point['at']} {reached:.3f}" if reached > point["target"] + 0.02 else ""
            cells += f"<td>{number(point[other])}<small>{small}</small></td>"
        rows += f"<tr><td>{esc(name)}</td>{cells}</tr>\n"
    columns = [f"{other.capitalize()} at {at} {target:.2f}" for at, other in (sides, sides[::-1]) for target in TARGETS]
    return f"""
<section><h2>Operating points</h2><p>What the label's scores allow: the specificity where the sensitivity reaches at
least 0.80, 0.90 or 0.95, and the reverse. Small print: the threshold, and what is reached where that is more.</p>
<p class="caution">These thresholds are read off the scored cases. They describe the curve; on other patients they will
not reach the same numbers. A threshold for use comes from other cases (<code>--validation</code>,
<code>--threshold-part</code>).</p>{table(["Label", *columns], rows)}</section>"""


def count_cell(count: float, total: float, color: str, mark: str = "") -> str:
    """A cell of a confusion matrix: the count, its share of the row, which also gives the depth of the colour."""
    share = count / total if total else 0
    small = f"{mark} {100 * share:.0f} %" if total else mark
    return f'<td style="background:{color}{round(110 * share):02x}">{count:g}<small>{small}</small></td>'


def class_confusion(names, targets, probs) -> str:
    """The K x K table of the cases with one positive label; targets, probs: (n, K) of these cases."""
    best, rows = probs == probs.max(1, keepdims=True), ""
    counts = (targets == 1).T.astype(float) @ (best / best.sum(1, keepdims=True))  # equal ones share the vote
    for k, name in enumerate(names):
        total = counts[k].sum()
        cells = "".join(count_cell(count, total, (ORANGE, BLUE)[j == k]) for j, count in enumerate(counts[k]))
        rows += f"<tr><td>{esc(name)}</td>{cells}<td>{total:g}</td></tr>\n"
    return f"""
<section><h2>Confusion matrix</h2><p>The {len(probs)} cases with exactly one positive label, by that label (rows) and
the most probable one (columns). Percentages are of the row: the blue diagonal holds the sensitivity of each class.</p>
{table(["Positive", *names, "All"], rows, "confusion")}</section>"""


def confusion_section(results: dict, targets, probs) -> str:
    """A 2 x 2 table for each label; one K x K table where the most probable class is the answer."""
    tables, one = "", ((targets == 1).sum(1) == 1) & ~np.isnan(targets + probs).any(1)
    if one.any() and None in [row["threshold"] for row in results["per_label"].values()]:
        return class_confusion(results["per_label"], targets[one], probs[one])
    for name, row in results["per_label"].items():
        if not row["n"]:
            continue
        ill, well = row["positives"], row["n"] - row["positives"]
        found = [count_cell(row[name], n, color, name.upper()) for name, n, color in (
            ("tp", ill, BLUE), ("fn", ill, ORANGE), ("fp", well, ORANGE), ("tn", well, BLUE))]  # fmt: skip
        rows = "<tr><td>positive</td>{}{}</tr><tr><td>negative</td>{}{}</tr>".format(*found)
        said = f"{why_undefined(row)}: balanced accuracy, MCC and kappa undefined"
        if row["auroc"] is not None:
            balanced, mcc, kappa = (number(row[metric]) for metric in ("balanced_accuracy", "mcc", "kappa"))
            said = f"balanced accuracy {balanced}<br>MCC {mcc}, kappa {kappa}"
        tables += f"<figure><b>{esc(name)}</b>{table(['', 'flagged', 'not flagged'], rows, 'confusion')}"
        tables += f"<figcaption>{said}</figcaption></figure>\n"
    return f"""
<section><h2>Confusion matrices</h2><p>Cases at the threshold in use. Percentages are of the row: sensitivity and its
misses above, false alarms and specificity below. Blue is right, orange wrong. MCC (Matthews) and kappa (Cohen) say how
far flags and labels agree: 1 is perfect, 0 chance.</p><div class="grid cells">{tables}</div></section>"""


def calibration_section(results: dict) -> str:
    """The numbers that go with the reliability diagrams, and those after temperature scaling where there is one."""
    columns = ["Label", "Brier", "Log-loss", "ECE", "Adaptive ECE", "MCE", "In the large", "Slope", "Intercept"]
    tempered = any(row["temperature"] is not None for row in results["per_label"].values())
    columns += ["Temperature", "ECE with it", "Brier with it", "Log-loss with it"] * tempered
    rows = ""
    for name, row in results["per_label"].items():
        if not row["n"]:
            continue
        why = " ".join(why_undefined(row).split()[:2]) if row["auroc"] is None else "see Slope"
        values = [row["calibration"][key] for key in ("ece_adaptive", "mce", "in_the_large", "slope", "intercept")]
        cells = "".join(missing(why) if value is None else f"<td>{number(value)}</td>" for value in values)
        after = [row["temperature"], *((row["calibrated"] or {}).get(key) for key in ("ece", "brier", "log_loss"))]
        cells += "".join(f"<td>{'none' if value is None else number(value)}</td>" for value in after * tempered)
        cells = "".join(cell(row, metric) for metric in ("brier", "log_loss", "ece")) + cells
        rows += f"<tr><td>{esc(name)}</td>{cells}</tr>\n"
    terms = {term: text for term, text in CALIBRATION.items() if tempered or term != "Temperature"}
    return f"""
<section><h2>Calibration in numbers</h2>{table(columns, rows)}{definitions(terms)}</section>"""


HEADLINE = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1"}


def headline(results: dict) -> str:
    """The few numbers one quotes, with their intervals."""
    tiles, kinds = "", []
    if "accuracy" in results["overall"]:
        overall = results["overall"] | {"accuracy_chance": results["overall"]["accuracy_majority"]}
        kinds += [(results["macro"], "auroc", "Macro AUROC"), (overall, "accuracy", "Top-1 accuracy")]
        kinds += [(overall, "balanced_accuracy", "Balanced accuracy")]
    elif results["per_label"]:
        kinds += [(results["macro"], metric, f"Macro {name}") for metric, name in HEADLINE.items()]
        kinds += [(results["micro"], "f1", "Micro F1")]
    for key, direction in DIRECTIONS.items():
        row = results.get("retrieval", {}).get(key, {}).get("patient") or {}
        for metric in ("recall@1", "class_map"):
            if row.get(metric) is not None:
                kinds.append((row, metric, f"{direction}, {PAIR_METRICS[metric][0]}"))
    for row, metric, title in kinds:
        chance, word = row.get(f"{metric}_chance"), "always the commonest" if metric == "accuracy" else "chance"
        tiles += tile(title, row, metric, results, [] if chance is None else [f"{word} {number(chance)}"])
    return f'<div class="tiles">{tiles}</div>'


def write_report(path: Path, results: dict, targets: np.ndarray, probs: np.ndarray, gallery=None, drawn=None) -> None:
    """Write the page. `results`: as evaluate.py documents it; targets, probs: (n, K), NaN = unknown, failed to load;
    gallery: of `retrieval.gallery`, drawn: of `pictures.draw`; None where the images are not at hand."""
    n_labels = len(results["per_label"])
    about = f"{results['n']} cases of {people(results)}, {n_labels} label{'s' * (n_labels != 1)}"
    tables = table_section(results) if results["per_label"] else ""
    reading = f"<section><h2>How to read this</h2>{definitions(READING)}</section>" if tables else ""
    figures = ""
    if tables:
        figures = operating_section(results) + confusion_section(results, targets, probs)
        for title, *kind in KINDS:
            figures += figures_section(title, *kind, results, targets, probs)
            figures += calibration_section(results) if title == "Calibration" else ""
    body = headline(results) + tables + retrieval_section(results) + gallery_section(results, gallery)
    body += pictures.errors_section(results, drawn) + subgroup_section(results)
    write_page(path, results, about, body + reading + figures, pictures.STYLE)


# ==== Main =====================================================================================================


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="results.json of evaluate.py")
    parser.add_argument("--predictions", type=Path, help="predictions.csv of the same evaluation, if it had labels")
    parser.add_argument("--labels", type=Path, help="labels.csv of the same evaluation")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    args = parser.parse_args(argv)
    need_file(args.results)
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        if "comparison" in results:
            raise UserError(
                f"{args.results}: of --compare (run its command of evaluate.py again, which makes the page)"
            )
        names = list(results["per_label"])
    except OSError as e:
        raise UserError(f"{args.results}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{args.results}: not a results file of evaluate.py with labels ({e})") from e
    targets = probs = np.empty((0, 0))
    if names and not (args.predictions and args.labels):
        raise UserError(f"{args.results}: has labels (give --predictions and --labels)")
    if names:
        _, _, targets, probs, _ = read_scores(args.predictions, args.labels, names)
    try:
        write_report(args.out, results, targets, probs)
    except (KeyError, TypeError, AttributeError, IndexError) as e:  # all that varies here is what the file holds
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{args.results}: not a whole results file of this version ({reason}; evaluate again)") from e
    print(f"Report: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
