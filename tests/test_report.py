"""report.py: one self-contained, escaped page that says what is undefined and opens in a browser."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import run
from sklearn.metrics import confusion_matrix
from test_clinical import cases_of

import common
import evaluate
import report
from page import warnings_of

EVIL = "<script>alert(1)</script>"
CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Folder of an evaluation: one good label, one named like an attack, one without positives, one with three."""
    folder = tmp_path_factory.mktemp("report")
    rng, n = np.random.default_rng(0), 120
    y = np.stack([rng.random(n) < 0.4, rng.random(n) < 0.3, np.zeros(n), np.arange(n) < 3], 1).astype(int)
    p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + 2 * y - 1)))
    names, ids = ["Cardiomegaly", EVIL, "never", "few & far"], [f"case{i}" for i in range(n)]
    pd.DataFrame(y, columns=names).assign(id=ids).to_csv(folder / "labels.csv", index=False)
    pd.DataFrame(p, columns=[f"{c}_prob" for c in names]).assign(id=ids).to_csv(folder / "preds.csv", index=False)
    words = ["--predictions", folder / "preds.csv", "--labels", folder / "labels.csv", "--output", folder / "eval"]
    assert evaluate.main([*map(str, words), "--n-bootstrap", "50"]) == 0
    return folder / "eval"


@pytest.fixture(scope="module")
def page(evaluated):
    return (evaluated / "report.html").read_text()


def test_nothing_from_outside_and_no_script(page):
    """No address, no script, no handler; the policy forbids them besides."""
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "<script" not in page and html.escape(EVIL) in page and "few &amp; far" in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|javascript:| on\w+=", page, re.I)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert len(page) < 5e6


def test_figures_hold_no_foreign_text(page):
    """Label names stay in the HTML, where they are escaped; the figures are plain SVG."""
    figures = re.findall(r'<figure><img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)">', page)
    assert len(figures) == 3 + 3 + 4 + 4 + 3  # curves need both classes, diagrams and histograms do not
    for data, _ in figures:
        svg = base64.b64decode(data).decode()
        assert svg.startswith("<svg") and "script" not in svg and "alert" not in svg
    assert sum("Cardiomegaly" in alt for _, alt in figures) == 5


def test_undefined_and_warnings(page, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert results["per_label"]["never"]["auroc"] is None
    row = page[page.index("<tr><td>never") :]
    row = row[: row.index("</tr>")]
    assert row.count(">undefined<") == 2 and "0/0" in row  # AUROC and AUPRC; recall
    assert "with no positive case" in page and "3 of 4 labels" in page
    assert "Fewer than 10" in page and "few &amp; far (3)" in page
    assert "Not drawn: never (no positive case)" in page
    points = page[page.index("<h2>Operating points") :]
    assert re.search(
        r'<td>never</td><td colspan="6"><span class="undefined">undefined</span><small>no positive', points
    )
    assert "read off the scored cases" in points
    row = page[page.index("<tr><td>never", page.index("<h2>Calibration in numbers")) :]
    assert row[: row.index("</tr>")].count("undefined</span><small>no positive") == 3  # slope, intercept, in the large


def test_numbers_and_intervals_are_those_of_the_results(page, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    row = results["per_label"]["Cardiomegaly"]
    assert f"AUROC {row['auroc']:.3f} [{row['auroc_low']:.3f}–{row['auroc_high']:.3f}]" in page
    assert f"<b>{results['macro']['auroc']:.3f}</b>" in page
    assert results["provenance"]["labels"]["sha256"] in page
    assert f"{row['auroc_delong_low']:.3f}–{row['auroc_delong_high']:.3f}" in page
    heads = page[page.index("<th>Label") : page.index("</thead>")]
    assert heads.index("Sensitivity") < heads.index("Specificity") < heads.index("PPV") < heads.index("NPV")
    cells = page[page.index("<tr><td>Cardiomegaly") :]
    values = re.findall(r"<td>(\d\.\d{3})<small>", cells[: cells.index("</tr>")])
    names = ("auroc", "auprc", "recall", "specificity", "precision", "npv", "f1")
    assert values == [f"{row[name]:.3f}" for name in names]
    totals = page[page.index('<tbody class="total">') :]
    assert [totals.index(f"<td>{name}") for name in ("Macro", "Weighted", "Micro")] == sorted(
        totals.index(f"<td>{name}") for name in ("Macro", "Weighted", "Micro"))  # fmt: skip
    assert f"{results['weighted']['auroc']:.3f}" in totals and f"{results['micro']['npv']:.3f}" in totals
    point = row["operating_points"][0]
    assert f"<td>{point['specificity']:.3f}<small>at {point['threshold']:.3g}" in page
    assert f"balanced accuracy {row['balanced_accuracy']:.3f}<br>MCC {row['mcc']:.3f}" in page
    for count, sign in ((row["tp"], "TP"), (row["fp"], "FP"), (row["fn"], "FN"), (row["tn"], "TN")):
        assert re.search(f">{count}<small>{sign} \\d+ %", page)
    slope = f"<td>{row['calibration']['slope']:.3f}</td><td>{row['calibration']['intercept']:.3f}</td>"
    assert slope in page and f"model {row['net_benefit']['0.3']['model']:.3f}, treat all" in page


def numbers_in(section: str) -> list[list[str]]:
    """Of each row of the body the numbers that stand first in its cells."""
    rows = section[section.index("<tbody>") : section.index("</tbody>")].split("</tr>")[:-1]
    return [re.findall(r"<td[^>]*>([-\d.]+)", row) for row in rows]


def test_confusion_of_the_most_probable_class():
    """One K x K table of the cases with one positive label, where there are no thresholds; equal scores share."""
    rng = np.random.default_rng(1)
    y = np.eye(3)[rng.integers(0, 3, 60)]
    p = rng.random((60, 3))
    y[0] = [1, 1, 0]  # two labels: not in the table
    y[1, 2] = np.nan
    y[2], p[2] = [1, 0, 0], [0.4, 0.4, 0.1]
    results = {"per_label": {name: {"threshold": None} for name in ("a", EVIL, "c")}}
    shown = report.confusion_section(results, y, p)
    assert "58 cases" in shown and EVIL not in shown and html.escape(EVIL) in shown
    expected = confusion_matrix(y[3:].argmax(1), p[3:].argmax(1)).astype(float)
    expected[0, :2] += 0.5
    assert np.array(numbers_in(shown), float).tolist() == np.c_[expected, expected.sum(1)].tolist()


def test_temperatures_are_shown_where_there_are_any():
    row = {"n": 9, "positives": 4, "auroc": 0.7, "brier": 0.2, "log_loss": 0.6, "ece": 0.1}
    row["calibration"] = dict.fromkeys(("ece_adaptive", "mce", "in_the_large", "slope", "intercept"), 0.5)
    with_one = row | {"temperature": 1.25, "calibrated": {"brier": 0.19, "log_loss": 0.55, "ece": 0.05}}
    without = row | {"temperature": None, "calibrated": None}
    shown = report.calibration_section({"per_label": {"a": with_one, "b": without}})
    assert "<td>1.250</td><td>0.050</td><td>0.190</td><td>0.550</td>" in shown and shown.count("<td>none</td>") == 4
    assert "Temperature" not in report.calibration_section({"per_label": {"b": without}})


def test_page_of_many_cases_is_small(tmp_path):
    """3039 cases of 18 labels with scores that are all different: 200 KB to 5 MB."""
    rng = np.random.default_rng(2)
    y = (rng.random((3039, 18)) < np.linspace(0.02, 0.5, 18)).astype(float)
    p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + 1.5 * y - 1)))
    cases = cases_of(y, p, [f"label {k}" for k in range(18)])
    results = evaluate.case_facts(cases, 0, 0) | evaluate.score(cases, 0, 0) | {"provenance": {}, "wrong": []}
    report.write_report(tmp_path / "r.html", common.json_safe(results), y, p)
    assert 200e3 < (tmp_path / "r.html").stat().st_size < 5e6
    assert (tmp_path / "r.html").read_text().count("<figure><img") == 5 * 18


def test_rebuilt_from_files_it_is_the_same_page(page, evaluated, tmp_path):
    run("report.py", "--results", evaluated / "results.json", "--predictions", evaluated / "predictions.csv",
        "--labels", evaluated / "labels.csv", "--out", tmp_path / "r.html")  # fmt: skip
    assert (tmp_path / "r.html").read_text() == page


def test_wrong_files_are_one_line(evaluated, tmp_path, capsys):
    files = ["--predictions", str(evaluated / "predictions.csv"), "--labels", str(evaluated / "labels.csv")]
    (tmp_path / "r.json").write_text("[]")
    for name, message in (("r.json", "not a results file"), ("no.json", "no such file")):
        assert common.run_main(lambda n=name: report.main(["--results", str(tmp_path / n), *files])) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_failed_cases_come_first():
    row = {"n": 5, "positives": 0, "positive_patients": 0, "negative_patients": 5, "auroc": None}
    results = {
        "failed": [{"id": "<b>", "reason": "no such file"}], "n": 6, "notes": ["These are the validation cases"],
        "per_label": {"a": row, "b": row | {"positives": 5, "negative_patients": 0}, "c": {**row, "n": 0}},
        "interval": None,
    }  # fmt: skip
    said = warnings_of(results)
    assert said[0] == "1 of 6 cases failed to load and are in no number: <b> (no such file)"
    assert said[1] == "These are the validation cases"
    assert [re.search(r"with (no [^(]+) \(", s)[1] for s in said[2:5]] == [
        "no positive case", "no negative case", "no case with a known label"]  # fmt: skip
    assert "--no-bootstrap" in said[-1]


@pytest.mark.skipif(not shutil.which(CHROMIUM), reason=f"needs {CHROMIUM}")
def test_opens_in_chromium(evaluated, tmp_path):
    """No console message, every figure drawn, and it prints to PDF."""
    from PIL import Image

    def chromium(*words, profile):
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / profile}", *words]
        done = subprocess.run(
            [*command, (evaluated / "report.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]

    chromium(f"--screenshot={tmp_path / 's.png'}", "--window-size=1280,6400", profile="a")
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    blue = (abs(pixels - (0x00, 0x72, 0xB2)).sum(2) < 12).sum(axis=1)  # curves, rows of the picture
    orange = (abs(pixels - (0xD5, 0x5E, 0x00)).sum(2) < 12).sum(axis=1)
    assert (blue > 0).sum() > 500 and (orange > 0).sum() > 250  # without the figures: 22 and 199
    chromium(f"--print-to-pdf={tmp_path / 'p.pdf'}", "--no-pdf-header-footer", profile="b")
    pdf = (tmp_path / "p.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(pdf) > 30_000
