"""One self-contained HTML page from the results of evaluate.py: numbers, curves, calibration, provenance.

evaluate.py writes the page; this script makes it again from the files, without the model, and so without the pictures
of a retrieval gallery:
    python report.py --results eval/results.json --predictions eval/predictions.csv --labels eval/labels.csv

The page loads nothing: figures are SVG data URIs, photographs JPEG ones, there is no script, a CSP meta tag forbids
both, and every text that came from a file is escaped. It prints on A4, with figures as vectors.
"""

import argparse
import base64
import difflib
import html
import io
import json
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from common import UserError, calibration_bins, group_of, label_array, need_columns, read_table, run_main, write_atomic

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # Okabe and Ito: told apart with every common colour blindness
FEW_POSITIVES = 10  # below this many positive (or negative) cases an AUROC says little, whatever its interval
FEW_TEXTS = 20  # with fewer distinct texts a recall at K is near 1 by chance, and the choice of texts decides
FEW_QUERIES = 3  # classes with fewer are not in the table of classes
FEW_IN_BIN = 10  # bins of a reliability diagram with fewer cases are drawn hollow and not joined
LONG_TEXT = 280  # characters of a text that the gallery shows
FIGURE_STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, and readable to a screen reader
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
}


# ==== Files ====================================================================================================


def read_scores(predictions: Path, labels: Path, class_names=None, failed=()):
    """Two CSV files -> ids, groups, targets, probs, class_names, in the order of the labels file.

    predictions: column `id` and a `{label}_prob` for each label (`{label}_pred` is ignored); labels: `id`, the label
    columns (0, 1, or empty or -1 for unknown) and, if there is one, `patient_id` (the groups of the bootstrap).
    `class_names` chooses labels and their order; by default every column must have its partner. Ids in `failed` may
    have no probability. targets (n, K) float64 with NaN for unknown, probs (n, K) float64. Raises UserError.
    """
    left, right = _read_plain(predictions), _read_plain(labels)
    if class_names is None:
        class_names = [c for c in right.columns if c not in ("id", "patient_id")]
        need_columns(right, [c.removesuffix("_prob") for c in left.columns if c.endswith("_prob")], labels)
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
    bad = ~((probs >= 0) & (probs <= 1)) & ~left["id"].isin(failed).to_numpy()[:, None]
    if bad.any():
        row, k = np.argwhere(bad)[0]
        cell = left[columns[k]].iat[row]
        raise UserError(f"{predictions}: row {row + 2}, column '{columns[k]}': '{cell}' is no probability (0 to 1)")
    probs = probs[pd.Index(left["id"]).get_indexer(right["id"])]
    targets = label_array(right, class_names, labels).astype(np.float64)
    ids = list(right["id"])
    patients = right["patient_id"] if "patient_id" in right else [""] * len(ids)
    groups = [patient or group_of(case) for patient, case in zip(patients, ids, strict=True)]
    return ids, groups, targets, probs, list(class_names)


def _read_plain(path: Path) -> pd.DataFrame:
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


# ==== Text =====================================================================================================


def number(value, digits: int = 3) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:z.{digits}f}"


def interval(row: dict, metric: str, digits: int = 3) -> str:
    """'0.812–0.861', or '' where the metric has no interval."""
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return "" if low is None or high is None else f"{number(low, digits)}–{number(high, digits)}"


def why_undefined(row: dict) -> str:
    if not row["n"]:
        return "no case with a known label"
    return "no positive case" if not row["positives"] else "no negative case"


def people(results: dict) -> str:
    n = results["n_patients"]
    return f"{n} patients" + (" (each case is taken as another patient)" if n == results["n"] else "")


def warnings_of(results: dict) -> list[str]:
    """What a reader must know before the numbers, most serious first."""
    rows, failed, found = results.get("per_label", {}), results["failed"], []  # scores of zones are no labels
    if failed:
        cases = ", ".join(f"{f['id']} ({f['reason']})" for f in failed[:10])
        more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
        found.append(f"{len(failed)} of {results['n']} cases failed to load and are in no number: {cases}{more}")
    found += results["notes"]
    consequence = {
        "no positive case": "macro AUROC and AUPRC leave them out; macro F1 and recall count them as 0",
        "no negative case": "macro AUROC leaves them out",
        "no case with a known label": "all averages leave them out",
    }
    for reason, what in consequence.items():
        names = [name for name, row in rows.items() if row["auroc"] is None and why_undefined(row) == reason]
        if names:
            found.append(
                f"AUROC is undefined for {len(names)} of {len(rows)} labels, with {reason} ({what}): {', '.join(names)}"
            )
    few = [
        f"{name} ({min(row['positives'], row['n'] - row['positives'])})"
        for name, row in rows.items()
        if 0 < min(row["positives"], row["n"] - row["positives"]) < FEW_POSITIVES
    ]
    if few:
        found.append(
            f"Fewer than {FEW_POSITIVES} positive or negative cases, so hardly evidence, with intervals that are too "
            f"narrow: {', '.join(few)}"
        )
    texts = {row["distinct_texts"] for row in results.get("retrieval", {}).get("image_to_text", {}).values() if row}
    if texts and max(texts) < FEW_TEXTS:
        found.append(
            f"There are only {max(texts)} distinct texts: R@K finds much by chance, and the intervals, which are over "
            "patients, do not cover the choice of the texts"
        )
    if results["interval"] is None:
        found.append("No confidence intervals were computed (--no-bootstrap)")
    return found


# ==== Figures ==================================================================================================


def figure_uri(draw, salt: str) -> str:
    """The panel that `draw(axes)` fills, as an SVG data URI; the same input gives the same bytes."""
    with matplotlib.rc_context({**FIGURE_STYLE, "svg.hashsalt": salt}):
        figure, file = Figure(figsize=(2.75, 2.45)), io.StringIO()
        draw(figure.add_axes((0.2, 0.19, 0.77, 0.77)))
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    return "data:image/svg+xml;base64," + base64.b64encode(svg[svg.index("<svg") :].encode()).decode()


def panel(alt: str, title: str, said: str, draw, *given) -> str:
    """HTML of the figure that `draw(axes, *given)` fills, with its caption; the texts are escaped here."""
    uri, said = figure_uri(lambda axes: draw(axes, *given), alt), esc(said).replace("\n", "<br>")
    return f'<figure><img src="{uri}" alt="{esc(alt)}"><figcaption><b>{esc(title)}</b><br>{said}</figcaption></figure>'


def unit_axes(axes, xlabel: str, ylabel: str) -> None:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=xlabel, ylabel=ylabel, xticks=ticks, yticks=ticks)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticklabels(["0", "", "0.5", "", "1"])
        axis.set_tick_params(length=0, colors="#444444")


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
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    axes.vlines(mean, centre - half, centre + half, color=BLUE, linewidth=1.2, alpha=0.5)
    many = n >= FEW_IN_BIN
    axes.plot(mean[many], share[many], "o-", color=BLUE, linewidth=1.2, markersize=4.5)
    axes.plot(mean[~many], share[~many], "o", color=BLUE, markerfacecolor="white", markersize=4.5)


def draw_histogram(axes, y, p, at, row) -> None:
    """Share of the positive and of the negative cases in each of 20 bins: comparable however rare the label is."""
    edges = np.linspace(0, 1, 21)
    for side, color, style in ((0, BLUE, "-"), (1, ORANGE, "-")):
        chosen = p[y == side]
        if len(chosen):
            share = np.histogram(chosen, edges)[0] / len(chosen)
            axes.stairs(share, edges, fill=True, color=color, alpha=0.22)
            axes.stairs(share, edges, color=color, linewidth=1.5, linestyle=style)
    if row["threshold"] is not None:
        axes.axvline(row["threshold"], color="#333333", linestyle=":", linewidth=1.2)
    axes.set(xlim=(-0.02, 1.02), xlabel="Predicted probability", ylabel="Share of cases", xticks=[0, 0.5, 1])
    axes.set_ylim(0, max(0.01, axes.get_ylim()[1]))
    axes.tick_params(length=0, colors="#444444")
    axes.locator_params(axis="y", nbins=4)


KINDS = (  # title, how to read it, panel, metric of its caption
    (
        "ROC curves",
        "Sensitivity against false alarms over all thresholds. Dashed: a coin toss. Dot: the threshold in use.",
        draw_roc,
        "auroc",
    ),
    (
        "Precision–recall curves",
        "How many of the flagged cases are right (precision), at every share of the positives found (recall). "
        "Dashed: chance, which is the prevalence of the label. Dot: the threshold in use.",
        draw_pr,
        "auprc",
    ),
    (
        "Calibration",
        "Reliability diagrams with 15 bins of equal width. Of the cases given 30 %, about 30 % should be "
        "positive: the dashed line; below it the model claims too much. Bars: 95 % Wilson interval of the bin (over "
        f"cases, not patients). Hollow: fewer than {FEW_IN_BIN} cases. ECE: mean distance from the dashed line.",
        draw_reliability,
        "ece",
    ),
    (
        "Score distributions",
        "Probabilities of the positive cases (orange) and the negative cases (blue), as shares of their own group. "
        "Dotted: the threshold in use.",
        draw_histogram,
        None,
    ),
)


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
    terms = "".join(f"<dt>{title}</dt><dd>{text}</dd>" for title, text in terms.items())
    head = "".join(f"<th>K = {k}</th>" for k in ks)
    return f"""
<section><h2>Retrieval</h2><p>{esc(text)}</p><div class="scroll"><table>
<thead><tr><th>Search</th><th>Queries</th><th>Gallery</th>{head}<th>Median rank</th></tr></thead>
<tbody>{rows}</tbody></table></div><dl>{terms}</dl><div class="grid">{panels}</div></section>"""


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
            "Not in this page, which was made again from the results files: evaluate.py draws it from the photographs."
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


def figures_section(title, text, draw, metric, results, targets, probs) -> str:
    """One kind of panel for every label, in the order of the table; labels that cannot be drawn are named with why."""
    panels, left_out = [], []
    cut = [row["threshold"] for row in results["per_label"].values()]
    flagged = probs >= (probs.max(1, keepdims=True) if None in cut else np.array(cut))
    for k, (name, row) in enumerate(results["per_label"].items()):
        known = ~np.isnan(targets[:, k]) & ~np.isnan(probs[:, k])
        y, p, at = targets[known, k], probs[known, k], flagged[known, k]
        if not len(y) or (row["auroc"] is None and metric in ("auroc", "auprc")):
            left_out.append(f"{name} ({why_undefined(row)})")
            continue
        if metric:
            between = interval(row, metric)
            said = f"{metric.upper()} {number(row[metric])}" + (f" [{between}]" if between else "")
        else:
            said = f"{row['positives']} positive, {row['n'] - row['positives']} negative"
        alt = f"{title} of {name}: {said}"
        said += f"\nchance {number(row['prevalence'])}" if metric == "auprc" else ""
        panels.append(panel(alt, name, said, draw, y, p, at, row))
    note = f'<p class="sub">Not drawn: {esc(", ".join(left_out))}.</p>' if left_out else ""
    return f'<section><h2>{esc(title)}</h2><p>{esc(text)}</p><div class="grid">{"".join(panels)}</div>{note}</section>'


# ==== Page =====================================================================================================

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 28px 28px 60px; color: #1c1c1c; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 29px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 4px; }
p { margin: 6px 0 12px; max-width: 78ch; }
small { display: block; font-size: 13px; } small, .sub, figcaption { color: #555; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 22px 0 8px; }
.tile { border: 1px solid #d9d9d9; border-top: 4px solid #0072B2; border-radius: 4px; padding: 10px 16px 12px; }
.tile b { display: block; font-size: 31px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.warnings { border-left: 5px solid #D55E00; background: #fdf3ec; padding: 10px 18px; margin: 20px 0; }
.warnings ul { margin: 4px 0; padding-left: 20px; } .warnings li { margin: 3px 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
td { white-space: nowrap; } thead th { vertical-align: bottom; border-bottom: 2px solid #333; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; white-space: normal; min-width: 150px; }
tbody.total td { background: #f5f7f9; } tbody.total tr:first-child td { border-top: 2px solid #333; }
.undefined { color: #8a4b00; font-style: italic; }
.mark { width: 100px; height: 22px; display: block; } th.scale { text-align: center; }
.chance { color: #555; padding-left: 0; } th.chance { font-weight: normal; }
.grid { display: grid; grid-template-columns: repeat(4, 1fr); gap: 20px 16px; margin-top: 14px; }
figure { margin: 0; } figure img { width: 100%; display: block; }
figcaption { font-size: 14px; line-height: 1.35; padding-left: 6px; } figcaption b { color: #1c1c1c; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { width: 210px; color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 10px 0; }
dt { font-weight: 600; } dd { margin: 0; max-width: 78ch; }
h3 { font-size: 17px; margin: 24px 0 4px; } .grid.three { grid-template-columns: repeat(3, 1fr); max-width: 960px; }
.ask { display: grid; grid-template-columns: 232px 1fr; gap: 16px; padding: 12px 0; border-top: 1px solid #e6e6e6; }
.ask ol { display: grid; gap: 8px; margin: 0; padding: 0; list-style: none; } q { overflow-wrap: anywhere; }
.ask.text ol { grid-template-columns: repeat(5, 1fr); } .ask small, q { line-height: 1.35; overflow-wrap: anywhere; }
.ask li { border: 1px solid #ddd; border-left: 6px solid; border-radius: 3px; padding: 4px 8px; font-size: 14px; }
.ask.image li { display: grid; grid-template-columns: 150px 1fr 190px; gap: 10px; }
.ask .right { border-left-color: #0072B2; background: #eef6fb; } .right b { color: #00568a; }
.ask .near { border-left-color: #009E73; background: #eef8f4; } .near b { color: #00664b; }
.ask .wrong { border-left-color: #D55E00; background: #fdf3ec; } .wrong b { color: #a34700; }
.eyes { display: flex; gap: 3px; } .eyes img { width: 50%; max-width: 112px; display: block; }
.gone { color: #555; font-style: italic; font-size: 13px; }
@media screen and (max-width: 900px) { .grid { grid-template-columns: repeat(2, 1fr); } dl { display: block; } }
@page { size: A4; margin: 13mm 12mm; }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h1 { font-size: 19pt; } h2 { font-size: 14pt; }
  table { font-size: 8.5pt; } th, td { padding: 2.5pt 4pt; } small { font-size: 7.5pt; } .tile b { font-size: 18pt; }
  th:first-child, td:first-child { min-width: 80pt; } .mark { width: 62pt; height: 13.5pt; }
  thead { display: table-header-group; } .scroll { overflow: visible; } figcaption { font-size: 8.5pt; }
  p, tr, .tile, .warnings, figure, .ask { break-inside: avoid; } h2, h2 + p { break-after: avoid; }
  .grid { gap: 10pt 8pt; }
}
"""

READING = {
    "AUROC": "the chance that a positive case gets a higher score than a negative one: 0.5 is a coin toss, 1 perfect. "
    "It depends neither on the threshold nor on how rare the label is.",
    "AUPRC": "average precision: the precision over all recalls. Chance is the prevalence, so 0.30 is poor for a label "
    "that half of the cases have, and good for one that 2 % have.",
    "Precision, recall, F1": "at the threshold. Precision: of the flagged cases the share that is positive. "
    "Recall: of the positive cases the share that is flagged. F1: their harmonic mean. In averages 0/0 counts as 0.",
    "Macro, micro": "macro is the plain mean over the labels that are defined (how many is stated); micro pools all "
    "decisions, so frequent labels weigh more.",
    "Interval": "the range of values that other samples of patients would plausibly give. It covers neither errors in "
    "the labels nor another hospital. Two models need a paired comparison, not a look at overlapping intervals.",
    "Undefined": "the data cannot answer: an AUROC without a positive case, for example. It is not a zero.",
}


def esc(text) -> str:
    return html.escape(str(text), quote=True)


def cell(row: dict, metric: str) -> str:
    """A table cell: the value, and in small print its interval; empty where the row has no such metric."""
    if metric not in row:
        return "<td></td>"
    if row[metric] is None:
        return '<td><span class="undefined">undefined</span></td>'
    positives, flagged = row.get("positives", 1), row.get("flagged", 1)
    if {"precision": flagged, "recall": positives, "f1": positives + flagged}.get(metric) == 0:
        return '<td><span class="undefined">0/0</span></td>'
    return f"<td>{number(row[metric])}<small>{interval(row, metric)}</small></td>"


def mark(row: dict) -> str:
    """A table cell with the AUROC as a dot and its interval as a bar, from 0 to 1; the tick is chance."""
    value, low, high = (row.get(key) for key in ("auroc", "auroc_low", "auroc_high"))
    if value is None:
        return "<td></td>"
    svg = '<path d="M5 12H105" stroke="#c8c8c8"/><path d="M55 4V20" stroke="#767676"/>'
    if low is not None:
        svg += f'<path d="M{5 + 100 * low:.1f} 12H{5 + 100 * high:.1f}" stroke="#8fbfdd" stroke-width="8"/>'
    svg += f'<circle cx="{5 + 100 * value:.1f}" cy="12" r="3.2" fill="{BLUE}"/>'
    return f'<td><svg class="mark" viewBox="0 0 110 24" aria-hidden="true">{svg}</svg></td>'


def table_row(name: str, under: str, n, positives: str, row: dict) -> str:
    """One label, or an average. `name` and `under` are escaped here."""
    chance = number(row["prevalence"]) if row.get("prevalence") is not None else ""
    return (
        f"<tr><td>{esc(name)}<small>{esc(under)}</small></td><td>{n}</td><td>{positives}</td>"
        + (cell(row, "auroc") + mark(row) + cell(row, "auprc") + f'<td class="chance">{chance}</td>')
        + "".join(cell(row, metric) for metric in ("f1", "precision", "recall", "specificity"))
        + f"<td>{number(row['threshold']) if row.get('threshold') is not None else ''}</td></tr>\n"
    )


def table_section(results: dict) -> str:
    rows, how = "", results["interval"]
    for name, row in results["per_label"].items():
        share = f"<small>{100 * row['prevalence']:.1f} %</small>" if row["n"] else ""
        rows += table_row(name, "", row["n"], f"{row['positives']}{share}", row)
    defined = f"{results['macro']['n_defined']} of {len(results['per_label'])} labels"
    totals = table_row("Macro", defined, "", "", results["macro"]) + table_row("Micro", "", "", "", results["micro"])
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
<thead><tr><th>Label</th><th>Cases</th><th>Positive</th><th>AUROC</th><th class="scale">0 to 1</th><th>AUPRC</th>
<th class="chance">chance</th><th>F1</th><th>Precision</th><th>Recall</th><th>Specificity</th>
<th>Threshold</th></tr></thead><tbody>{rows}</tbody><tbody class="total">{totals}</tbody></table></div></section>"""


def fact(name: str, value) -> str:
    """A row of the provenance table."""
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
    text = "not known" if value is None else value
    return f"<tr><td>{esc(name.replace('_', ' '))}</td><td>{esc(text)}</td></tr>"


HEADLINE = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1"}


def tile(title: str, row: dict, metric: str, results: dict, beside=()) -> str:
    """A number in large print; below it its interval, and the texts `beside` it."""
    between = interval(row, metric)
    small = [f"{100 * results['interval']['level']:.0f} % interval {between}"] if between else []
    small = "<br>".join(map(esc, [*small, *beside]))
    return f'<div class="tile"><small>{esc(title)}</small><b>{number(row.get(metric))}</b><small>{small}</small></div>'


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


def write_report(path: Path, results: dict, targets: np.ndarray, probs: np.ndarray, gallery=None) -> None:
    """Write the page. `results`: as evaluate.py documents it; targets, probs: (n, K), NaN = unknown, failed to load;
    gallery: of `retrieval.gallery`, None where its pictures are not at hand."""
    about = f"{results['n']} cases of {people(results)}, {len(results['per_label'])} labels"
    reading = "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in READING.items())
    tables = table_section(results) if results["per_label"] else ""
    reading = f"<section><h2>How to read this</h2><dl>{reading}</dl></section>" if tables else ""
    figures = "".join(figures_section(*kind, results, targets, probs) for kind in KINDS) if tables else ""
    body = headline(results) + tables + retrieval_section(results) + gallery_section(results, gallery)
    write_page(path, results, about, body + reading + figures)


def write_page(path: Path, results: dict, about: str, body: str, style: str = "") -> None:
    """The frame of every page: title, warnings, `body`, which is HTML, and provenance; `style` is added to the CSS."""
    title = esc(f"Evaluation of {results['evaluated']}")
    warnings = "".join(f"<li>{esc(sentence)}</li>" for sentence in warnings_of(results))
    if warnings:
        warnings = f'<div class="warnings"><b>Before you use these numbers</b><ul>{warnings}</ul></div>'
    origin = "".join(fact(name, value) for name, value in results["provenance"].items())
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CSP}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}{style}</style></head><body>
<header><h1>{title}</h1><p class="sub">{esc(about)}. Data: {esc(results["evaluated_on"])}.</p></header>
{warnings}{body}
<section><h2>Where these numbers come from</h2><table class="facts"><tbody>{origin}</tbody></table></section>
</body></html>
"""
    write_atomic(path, page)


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
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        names, failed = list(results["per_label"]), [f["id"] for f in results["failed"]]
    except OSError as e:
        raise UserError(f"{args.results}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{args.results}: not a results file of evaluate.py with labels ({e})") from e
    targets = probs = np.empty((0, 0))
    if names and not (args.predictions and args.labels):
        raise UserError(f"{args.results}: has labels (give --predictions and --labels)")
    if names:
        _, _, targets, probs, _ = read_scores(args.predictions, args.labels, names, failed)
    write_report(args.out, results, targets, probs)
    print(f"Report: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
