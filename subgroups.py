"""What evaluate.py --subgroup COLUMN adds: the same numbers for the cases of each value of a column, and a section.

Subgroups show where a model was hardly tried, and where it may be worse; they never show that it is fair.
results.json:
    subgroups       {column: {value: {n, n_patients, per_label, macro, micro}}}, of the cases that were read: what the
                    evaluation of those cases alone would say, bootstrap included (but micro AUROC and AUPRC
                    have no interval). Of train_csi.py: {n, n_patients, n_zones, qwk, mae, exact}, pooled over the zones
    subgroup_gaps   {column: {higher, lower: values, n_labels, n_pairs, gap, low, high}}: the two values whose macro
                    AUROC differ most, over the labels with enough cases in both, and the interval of their difference,
                    resampled apart; chosen as the largest of n_pairs, so that it looks larger than it is. null: no two
                    values with such a label. "unknown" takes no part
"""

import itertools
import re

import numpy as np
import pandas as pd

import common
from clinical import patients_with
from common import UserError, need_columns, read_table, with_interval
from page import FEW_POSITIVES, esc, interval, mark, number, rarer

ID_COLUMNS = ("id", "series_id", "VolumeName", "volume_name", "FileID")
UNKNOWN = "unknown"  # no row, or a cell that says nothing, in any case of letters:
NOTHING = ("", "na", "n/a", "nan", "none", "unknown", "-", "?")
CODE = re.compile(r"0\d.*|\d{16,}")  # no number: 007 is not 7, and floats do not tell so many digits apart
QUOTE = r"^'(?=[=+\-@\t\r])"  # that write_csv puts before what a spreadsheet would run
BANDS, MANY_NUMBERS, MANY_TEXTS = 4, 12, 30  # more numbers are cut into bands, more texts are refused
METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "accuracy", "brier", "log_loss", "ece")


# ==== Columns ==================================================================================================


def read_columns(path, columns: list[str]) -> pd.DataFrame:
    """The table of --subgroup, without the quotes of write_csv in what names columns. Raises UserError."""
    if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        raise UserError(f"{path}: no table of ids and columns (--subgroup-table gives one)")
    table = read_table(path, ",;\t")
    table.columns = table.columns.str.replace(QUOTE, "", regex=True)
    need_columns(table, columns, path)
    return table


def subgroups_of(path, columns: list[str], ids: list[str]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """{column: {value: (n,) bool, which cases have it}} of the cases, by a table of their ids; and notes.

    The values in their order, unknown last. Raises UserError.
    """
    table, notes = read_columns(path, columns), []
    key = next((name for name in ID_COLUMNS if name in table.columns), table.columns[0])
    own = table[key].str.replace(QUOTE, "", regex=True)
    own = own.where(own.isin(ids), own.map(common.volume_name))  # VolumeName has an extension, ids may have none
    if not own.isin(ids).any():
        hint = "--subgroup-table gives a table that has them"
        raise UserError(f"{path}: column '{key}' has no id of the cases, such as '{ids[0]}' ({hint})")
    found = {}
    for name in columns:
        texts = table[name].str.replace(QUOTE, "", regex=True).str.strip()
        texts = texts.where(~texts.str.lower().isin(NOTHING), "")
        per_case = texts.groupby(own).agg(["first", "nunique"]).reindex(ids)
        twice = per_case.index[per_case["nunique"] > 1]
        if len(twice):
            raise UserError(f"{path}: id '{twice[0]}' has several values of '{name}' (keep one per case)")
        found[name], said = split(per_case["first"].fillna("").to_numpy(str), name, path)
        notes += said
    there = set(own)
    missing = [name for name in ids if name not in there]
    first = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    text = f"{len(missing)} of {len(ids)} cases have no row in {path.name}: their subgroup is '{UNKNOWN}' ({first})"
    return found, notes + [text] * bool(missing)


def split(texts: np.ndarray, name: str, path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Values as they are written, or bands of them, and which cases have each; a note on bands."""
    told, notes = texts != "", []
    some = texts[told]
    numbers = pd.to_numeric(pd.Series(some), errors="coerce").to_numpy(np.float64)
    words = [text for text, x in zip(some, numbers, strict=True) if not np.isfinite(x) or CODE.fullmatch(text)]
    if words:
        titles, kinds = np.unique(some, return_inverse=True)
        if len(titles) > MANY_TEXTS:
            text = f"{path}: column '{name}' has {len(titles)} texts, such as '{words[0]}', which is no number"
            raise UserError(f"{text} (at most {MANY_TEXTS} texts make subgroups, or numbers alone)")
    else:
        kinds, n = numbers, len(np.unique(numbers))
        if n > MANY_NUMBERS:
            kinds = np.searchsorted(np.quantile(numbers, np.arange(1, BANDS) / BANDS), numbers)
            text = f"{n} different numbers of '{name}' were cut into {len(np.unique(kinds))} bands at their quartiles"
            notes.append(f"{text} (write codes as text, such as 'site 7', to keep them apart)")
        written = lambda x: min(some[numbers == x], key=len)  # noqa: E731
        ends = [(numbers[kinds == kind].min(), numbers[kinds == kind].max()) for kind in np.unique(kinds)]
        titles = [written(x) if x == y else f"{name} {written(x)} to {written(y)}" for x, y in ends]
    found = {}
    for title, kind in zip(titles, np.unique(kinds), strict=True):
        found[str(title)] = told.copy()
        found[str(title)][told] = kinds == kind
    return found | ({} if told.all() else {UNKNOWN: ~told}), notes


# ==== Numbers ==================================================================================================


def score_subgroups(cases, path, columns: list[str], n_resamples: int, seed: int, film_cell=None) -> tuple:
    """What results.json has of subgroups, and notes; film_cell(films, n_resamples, seed): numbers of zone scores."""
    if not film_cell and not cases.class_names:
        raise UserError("--subgroup: the data have no two classes (leave it out)")
    found, gaps = {}, {}
    groups, notes = subgroups_of(path, columns, cases.ids)
    order = np.array(sorted(range(len(cases.ids)), key=lambda i: cases.ids[i]))
    probs = cases.zones["films"].probs if film_cell else cases.probs
    read = np.isfinite(probs.reshape(len(order), -1)).all(1)
    for name, values in groups.items():
        found[name], areas = {}, {}
        for value, its in values.items():
            rows = order[(its & read)[order]]
            if not len(rows):
                continue
            patients = {"n": len(rows), "n_patients": len({cases.groups[i] for i in rows})}
            if film_cell:
                found[name][value] = patients | film_cell(cases.zones["films"].rows(rows), n_resamples, seed)
            else:
                cell, areas[value] = label_cell(cases, rows, n_resamples, seed)
                found[name][value] = patients | cell
        gaps[name] = largest_gap({value: area for value, area in areas.items() if value != UNKNOWN})
    return {"subgroups": found} | ({} if film_cell else {"subgroup_gaps": gaps}), notes


def label_cell(cases, rows: np.ndarray, n_resamples: int, seed: int) -> tuple[dict, np.ndarray]:
    """Numbers of some cases, and the AUROC of the labels (K, 1 + B), NaN for those of few patients."""
    y, p, names = cases.targets[rows], cases.probs[rows], cases.class_names
    weights = common.bootstrap_weights(np.array(cases.groups)[rows], n_resamples, seed)
    given = y, p, [f"label{k}" for k in range(len(names))], cases.cut(p)
    arrays = common._metric_arrays(*given, weights[:, :1]) | common._metric_arrays(*given, weights, micro_areas=False)

    def block(prefix: str, plain=False) -> dict:
        keys = {m: prefix + m if prefix + m in arrays else m for m in METRICS if plain or prefix + m in arrays}
        return with_interval({metric: arrays[key] for metric, key in keys.items()})

    patients, per_label = patients_with(y, np.array(cases.groups)[rows]), {}
    for k, name in enumerate(names):
        sizes = {"n": (y[:, k] >= 0).sum(), "positives": (y[:, k] == 1).sum()}
        sizes |= {"positive_patients": patients[k, 1], "negative_patients": patients[k, 0]}
        per_label[name] = sizes | block(f"label{k}_")
    enough = patients.min(1) >= FEW_POSITIVES
    areas = np.stack([np.where(ok, arrays[f"label{k}_auroc"], np.nan) for k, ok in enumerate(enough)])
    return {"per_label": per_label, "macro": block("macro_", True), "micro": block("micro_")}, areas


def largest_gap(areas: dict[str, np.ndarray]) -> dict | None:
    """areas: value -> (K, 1 + B) AUROC of the labels, NaN where patients are few; `subgroup_gaps` has the result."""
    best, pairs = None, list(itertools.combinations(enumerate(areas.items()), 2))
    for (i, (one, a)), (j, (other, b)) in pairs:
        both = ~np.isnan(a[:, 0] - b[:, 0])
        # values with as many patients have the same draws in resample 1, 2, ...: one beside another makes them apart
        a, b = (np.append(x[both, :1], np.roll(x[both, 1:], shift, axis=1), axis=1) for x, shift in ((a, i), (b, j)))
        gap = common.mean_defined(a - b, 0)
        if both.any() and (best is None or abs(gap[0]) > best[0]):
            names = (one, other) if gap[0] >= 0 else (other, one)
            best = abs(gap[0]), names, both.sum(), gap if gap[0] >= 0 else -gap
    if best is None:
        return None
    row = {name.removeprefix("gap_"): value for name, value in with_interval({"gap": best[3]}).items()}
    return {"higher": best[1][0], "lower": best[1][1], "n_labels": best[2], "n_pairs": len(pairs)} | row


# ==== Page =====================================================================================================


def cell(row: dict, metric: str) -> str:
    if row[metric] is None:
        return '<td><span class="undefined">undefined</span></td>'
    return f"<td>{number(row[metric])}<small>{interval(row, metric)}</small></td>"


def subgroup_section(results: dict) -> str:
    """HTML of `subgroups`: by column a table of its values, and one of the labels' AUROC; '' without --subgroup."""
    found = results.get("subgroups")
    if not found:
        return ""
    text = (
        "The same numbers for the cases of each value. Differences between the rows have many causes: how ill the "
        "patients are, how common a label is, chance; many were looked at, so some are large by chance alone. A gap is "
        "a reason to look closer, and no visible gap is no proof that there is none: nothing here shows that the model "
        "is fair."
    )
    if results["interval"]:
        how = f"{100 * results['interval']['level']:.0f} % intervals, percentile bootstrap over the patients of the row"
        text += f" Small print and bars: {how}."
    if any(UNKNOWN in values for values in found.values()):
        text += f" {UNKNOWN.capitalize()}: no row in the table, or an empty cell, NA, none, unknown, - or ?."
    draw = column_of_labels if "per_label" in results else column_of_films
    parts = "".join(f"<h3>By {esc(name)}</h3>{draw(name, values, results)}" for name, values in found.items())
    return f"\n<section><h2>Subgroups</h2><p>{esc(text)}</p>{parts}</section>"


def column_of_labels(name: str, values: dict, results: dict) -> str:
    rows, labels, metrics = "", "", ("auprc", "f1", "recall", "specificity")
    for value, row in values.items():
        few = sum(rarer(its) < FEW_POSITIVES for its in row["per_label"].values())
        under = f"few patients of {few} of {len(row['per_label'])} labels" if few else ""
        rows += f"<tr><td>{esc(value)}<small>{under}</small></td><td>{row['n']}</td><td>{row['n_patients']}</td>"
        rows += cell(row["macro"], "auroc") + f"<td>{mark(*map(row['macro'].get, AREA))}</td>"
        rows += "".join(cell(row["macro"], metric) for metric in metrics) + "</tr>\n"
    for label, whole in results["per_label"].items():
        labels += f"<tr><td>{esc(label)}</td>" + cell(whole, "auroc")
        for row in (row["per_label"][label] for row in values.values()):
            few = f"<small>few: {row['positives']} of {row['n']}</small>" if rarer(row) < FEW_POSITIVES else ""
            labels += cell(row, "auroc").replace("</td>", few + "</td>") + "\n"
        labels += "</tr>\n"
    head = "".join(f"<th>{esc(value)}</th>" for value in values)
    return f"""<div class="scroll"><table><thead><tr><th>{esc(name)}</th><th>Cases</th><th>Patients</th>
<th>Macro AUROC</th><th class="scale">0 – 0.5 – 1</th><th>Macro AUPRC</th><th>Macro F1</th><th>Macro sensitivity</th>
<th>Macro specificity</th></tr></thead><tbody>{rows}</tbody></table></div>{gap_text(name, results)}
<div class="scroll"><table><thead><tr><th>AUROC of a label</th><th>All</th>{head}</tr></thead><tbody>{labels}</tbody>
</table></div><p class="sub">few: positives of all known; fewer than {FEW_POSITIVES} patients with a positive, or with
a negative, case are hardly evidence, whatever the interval. Macro numbers are over the labels that are defined in the
row, which may be others in the next.</p>"""


AREA = ("auroc", "auroc_low", "auroc_high")


def gap_text(name: str, results: dict) -> str:
    """The sentence on the largest gap of a column."""
    gap = results["subgroup_gaps"][name]
    if gap is None:
        return f"<p>No two values have a label with {FEW_POSITIVES} patients of each sign.</p>"
    between = f", interval {number(gap['low'])} to {number(gap['high'])}".replace("-", "−") if "low" in gap else ""
    labels = f"the {gap['n_labels']} label{'s' * (gap['n_labels'] > 1)} with at least {FEW_POSITIVES} patients of each "
    text = (
        f"Largest gap of macro AUROC: {gap['higher']} above {gap['lower']} by {number(gap['gap'])}{between} (over "
        f"{labels}sign in both)."
    )
    if gap["n_pairs"] > 1:
        text += f" It is the largest of {gap['n_pairs']} pairs: it, and its interval, look larger than they are."
    return f"<p>{esc(text)}</p>"


def column_of_films(name: str, values: dict, results: dict) -> str:
    rows = ""
    for value, row in values.items():
        counts = "".join(f"<td>{row[key]}</td>" for key in ("n", "n_patients", "n_zones"))
        rows += f"<tr><td>{esc(value)}</td>{counts}{''.join(cell(row, m) for m in ('qwk', 'mae', 'exact'))}</tr>\n"
    return f"""<div class="scroll few"><table><thead><tr><th>{esc(name)}</th><th>Films</th><th>Patients</th>
<th>Graded zones</th><th>QWK</th><th>MAE</th><th>Exact</th></tr></thead><tbody>{rows}</tbody></table></div>"""
