"""The frame of every HTML page that evaluate.py writes, and what its sections are made of: texts, figures, tiles.

A page loads nothing: figures are SVG data URIs, photographs JPEG ones, there is no script, a CSP meta tag forbids
both, and every text that came from a file is escaped. It prints on A4, with figures as vectors.
"""

import base64
import html
import io
import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common import write_atomic

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # Okabe and Ito: told apart with every common colour blindness
FEW_POSITIVES = 10  # with fewer patients who are positive (or negative) an AUROC says little, whatever its interval
FEW_PATIENTS = 20  # of fewer the percentiles of a bootstrap are too close together
FEW_TEXTS = 20  # with fewer distinct texts a recall at K is near 1 by chance, and the choice of texts decides
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


def rarer(row: dict) -> int:
    """Patients of the rarer sign of a label; below FEW_POSITIVES its numbers are hardly evidence."""
    return min(row["positive_patients"], row["negative_patients"])


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
    few = [f"{name} ({rarer(row)})" for name, row in rows.items() if 0 < rarer(row) < FEW_POSITIVES]
    if few:
        found.append(
            f"Fewer than {FEW_POSITIVES} patients with a positive, or with a negative, case, so hardly evidence, with "
            f"intervals that are too narrow: {', '.join(few)}"
        )
    texts = {row["distinct_texts"] for row in results.get("retrieval", {}).get("image_to_text", {}).values() if row}
    if texts and max(texts) < FEW_TEXTS:
        found.append(
            f"There are only {max(texts)} distinct texts: R@K finds much by chance, and the intervals, which are over "
            "patients, do not cover the choice of the texts"
        )
    if results["interval"] is None:
        found.append("No bootstrap intervals were computed (--no-bootstrap)")
    elif results.get("n_patients", FEW_PATIENTS) < FEW_PATIENTS:  # a comparison has sentences of its own
        found.append(f"Only {results['n_patients']} patients: intervals of so few are too narrow")
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


def mark(value, low, high, left: float = 0.0, right: float = 1.0) -> str:
    """A number as a dot and its interval as a bar, on a line from left to right; the tick is the middle."""
    if value is None:
        return ""
    x = lambda number: f"{5 + 100 * (number - left) / (right - left):.1f}"  # noqa: E731
    svg = '<path d="M5 12H105" stroke="#c8c8c8"/><path d="M55 4V20" stroke="#767676"/>'
    if low is not None:
        svg += f'<path d="M{x(low)} 12H{x(high)}" stroke="#8fbfdd" stroke-width="8"/>'
    svg += f'<circle cx="{x(value)}" cy="12" r="3.2" fill="{BLUE}"/>'
    return f'<svg class="mark" viewBox="0 0 110 24" aria-hidden="true">{svg}</svg>'


def forest(rows: list[tuple], scale: float, ends: tuple[str, str]) -> str:
    """Figure of differences with their intervals, between -scale and scale; of the last row, a mean, a diamond.

    rows: (name, (value, low, high)), None: undefined; ends: what stands on the two sides of 0.
    """
    height, x = 26 * len(rows) + 62, lambda value: round(600 + 360 * value / scale, 1)
    svg = ""
    for tick in (-1, -0.5, 0, 0.5, 1):
        at, said = x(tick * scale), f"{tick * scale:+g}".replace("-", "−") if tick else 0
        svg += f'<path d="M{at} 6V{height - 50}" stroke="{"#e0e0e0" if tick else GREY}"/>'
        svg += f'<text x="{at}" y="{height - 32}" text-anchor="middle">{said}</text>'
    for side, end, anchor in ((-10, f"← {ends[0]}", "end"), (10, f"{ends[1]} →", "start")):
        svg += f'<text x="{600 + side}" y="{height - 8}" text-anchor="{anchor}">{esc(end)}</text>'
    for i, (name, (value, low, high)) in enumerate(rows):
        y, last = 20 + 26 * i, i == len(rows) - 1
        name = f"<b>{esc(name)}</b>" if last else esc(name)
        svg += f'<foreignObject x="0" y="{y - 11}" width="225" height="22"><div>{name}</div></foreignObject>'  # is cut
        if value is None:
            svg += f'<text x="610" y="{y + 5}" font-style="italic">undefined</text>'
            continue
        if low is not None:
            svg += f'<path d="M{x(low)} {y}H{x(high)}" stroke="{BLUE}" stroke-width="2.5"/>'
        shape = f"M{x(value) - 8:.1f} {y}l8 -7l8 7l-8 7z" if last else f"M{x(value) - 5:.1f} {y - 5}h10v10h-10z"
        svg += f'<path d="{shape}" fill="{BLUE}"/>'
    label = f"{len(rows)} differences with their intervals, as in the table"
    return f'<svg class="forest" viewBox="0 0 980 {height}" role="img" aria-label="{label}">{svg}</svg>'


def unit_axes(axes, xlabel: str, ylabel: str) -> None:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=xlabel, ylabel=ylabel, xticks=ticks, yticks=ticks)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticklabels(["0", "", "0.5", "", "1"])
        axis.set_tick_params(length=0, colors="#444444")


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
th, td { padding: 5px 6px; text-align: right; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
td { white-space: nowrap; } td small, th small { font-size: 12px; }
thead th { vertical-align: bottom; border-bottom: 2px solid #333; line-height: 1.25; font-size: 0.93em; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; white-space: normal; min-width: 120px;
  overflow-wrap: anywhere; }
tbody.total td { background: #f5f7f9; } tbody.total tr:first-child td { border-top: 2px solid #333; }
.undefined { color: #8a4b00; font-style: italic; } td[colspan="6"] { text-align: left; }
.mark { width: 78px; height: 17px; display: block; margin-left: auto; } th.scale { text-align: center; }
.chance { color: #555; padding-left: 0; } th.chance { font-weight: normal; }
.grid { display: grid; grid-template-columns: repeat(4, 1fr); gap: 20px 16px; margin-top: 14px; }
figure { margin: 0; min-width: 0; overflow-wrap: anywhere; } figure img { width: 100%; display: block; }
figcaption { font-size: 14px; line-height: 1.35; padding-left: 6px; } figcaption b { color: #1c1c1c; }
.caution { border-left: 5px solid #D55E00; padding-left: 12px; } code { white-space: nowrap; font-size: 0.9em; }
.confusion td, .confusion th { padding: 4px 8px; overflow-wrap: normal; } .confusion small { color: #333; }
.confusion th:first-child, .confusion td:first-child { min-width: 0; padding-left: 2px; }
.grid.cells { grid-template-columns: repeat(auto-fill, minmax(262px, 1fr)); }
figure .confusion { width: auto; white-space: nowrap; } figure .confusion td { vertical-align: middle; }
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
.forest { width: 100%; max-width: 980px; display: block; margin-top: 14px; break-inside: avoid; }
.forest text { font-size: 14px; fill: #1c1c1c; }
.forest div { font-size: 14px; line-height: 22px; text-align: right; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.gone { color: #555; font-style: italic; font-size: 13px; }
@media screen and (max-width: 900px) {
  .grid { grid-template-columns: repeat(2, 1fr); } dl { display: block; }
  .ask, .ask.image li { grid-template-columns: 1fr; } .ask.text ol { grid-template-columns: repeat(2, 1fr); }
}
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


def esc(text) -> str:
    return html.escape(str(text), quote=True)


def fact(name: str, value) -> str:
    """A row of the provenance table."""
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
    text = "not known" if value is None else value
    return f"<tr><td>{esc(name.replace('_', ' '))}</td><td>{esc(text)}</td></tr>"


def tile(title: str, row: dict, metric: str, results: dict, beside=()) -> str:
    """A number in large print; below it its interval, and the texts `beside` it."""
    between = interval(row, metric)
    small = [f"{100 * results['interval']['level']:.0f} % interval {between}"] if between else []
    small = "<br>".join(map(esc, [*small, *beside]))
    return f'<div class="tile"><small>{esc(title)}</small><b>{number(row.get(metric))}</b><small>{small}</small></div>'


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
