"""compare.py and subgroups.py: tests against golden and slow numbers, careful words, one-line errors, escaped pages."""

import dataclasses
import html
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, f1_score, roc_auc_score
from test_evaluate_ctclip import world as ct_world  # noqa: F401
from test_zones import Films, score  # noqa: F401  the fixture of planted checkpoints

import cases
import clinical
import common
import compare
import evaluate
import report
import subgroups
import train_csi

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files at {GOLDEN}")
NAMES = ["one", "two", "rare", "never"]
EVIL = "<script>alert('x')</script>"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make(n=160, seed=0):
    """Labels of two scans of each patient, one label rare, one never positive, some unknown; and two models' scores."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 4)) < [0.4, 0.3, 0.08, 0]).astype(float)
    z = rng.normal(size=(n, 4))
    a, b = (np.round(sigmoid(z + rng.normal(size=(n, 4)) + gain * y - 1), 2) for gain in (1.0, 1.6))
    y[rng.random((n, 4)) < 0.05] = np.nan
    return y, a, b, [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(n)]


def write(folder, y, a, b, ids, names=NAMES, **more):
    labels = pd.DataFrame(y, columns=names).astype("Int64").assign(**more)
    labels.insert(0, "id", ids)
    labels.to_csv(folder / "labels.csv", index=False)
    for name, probs in (("a", a), ("b", b)):
        table = pd.DataFrame(probs, columns=[f"{label}_prob" for label in names]).assign(id=ids)
        table.to_csv(folder / f"{name}.csv", index=False)


def run(folder, *words, code=0, models=("a.csv", "b.csv")):
    """evaluate.py --compare, in this process -> results.json."""
    given = ["--compare", *(folder / name for name in models), "--labels", folder / "labels.csv"]
    given += ["--output", folder / "out", *([] if "--n-bootstrap" in words else ["--n-bootstrap", 25]), *words]
    assert common.run_main(lambda: evaluate.main([str(word) for word in given])) == code
    return json.loads((folder / "out" / "results.json").read_text()) if code == 0 else None


@pytest.fixture
def drawn_once(monkeypatch):
    """Without the pages, which other tests look at."""
    monkeypatch.setattr(evaluate, "write_comparison", lambda *given: None)


def differences(results):
    """Every {a, b, difference ...} of the comparison."""
    found = results["comparison"]
    blocks = [found["macro"], found["micro"], *found["per_label"].values()]
    return [row for block in blocks for metric, row in block.items() if metric != "mcnemar"]


def said(results, about):
    return next(one for one in results["comparison"]["sentences"] if one["about"] == about)


# ---- Numbers


@needs_golden
def test_golden_delong_mcnemar_holm(golden, tmp_path, drawn_once):
    """z and p through the whole path: A is the second of the golden scores, so that z has its sign."""
    expected = golden.load("golden_metrics")["outputs"]
    y, z = golden.array("delong.y", (200,)) > 0.4, golden.array("delong.s", (200, 3)).astype(np.float64)
    first = np.round(sigmoid(1.3 * y - 0.6 + 0.8 * z[:, 0] + 0.7 * z[:, 2]), 2)
    second = np.round(sigmoid(0.9 * y - 0.5 + 0.8 * z[:, 1] + 0.7 * z[:, 2]), 2)
    write(tmp_path, y[:, None].astype(float), second[:, None], first[:, None], [f"c{i}" for i in range(200)], ["x"])
    row = run(tmp_path, "--no-bootstrap")["comparison"]["per_label"]["x"]["auroc"]
    assert [row["b"], row["a"]] == pytest.approx(expected["delong"]["auc"], abs=1e-11)
    assert (row["delong_z"], row["delong_p"]) == pytest.approx((expected["delong"]["z"], expected["delong"]["p"]))
    assert row["holm_p"] == row["delong_p"]
    tests = expected["multiple_tests"]
    rows = [{"p": p} for p in tests["p"]]
    compare.with_holm(rows)
    assert [row["holm_p"] for row in rows] == pytest.approx(tests["holm"])
    b, c = expected["mcnemar_exact"]["b"], expected["mcnemar_exact"]["c"]
    right = np.array([[1, 0]] * b + [[0, 1]] * c + [[1, 1]] * 40 + [[0, 0]] * 5, bool)
    found = compare.right_or_wrong(*right.T)
    assert (found["b"], found["c"], found["p"]) == (b, c, pytest.approx(expected["mcnemar_exact"]["p"]))


def test_paired_bootstrap_against_a_slow_loop(tmp_path, drawn_once):
    """Scikit-learn on the rows of each resample, the same rows for both models."""
    y, a, b, ids = make()
    write(tmp_path, y, a, b, ids)
    results = run(tmp_path, "--threshold", 0.4)
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    y, a, b = y[order], a[order], b[order]
    counts = common.bootstrap_counts([common.group_of(ids[i]) for i in order], 25, 0)
    metrics = {
        "auroc": lambda t, s: roc_auc_score(t, s) if len(set(t)) > 1 else np.nan,
        "auprc": lambda t, s: average_precision_score(t, s) if t.any() else np.nan,
        "f1": lambda t, s: f1_score(t, s >= 0.4, zero_division=0),
        "brier": lambda t, s: brier_score_loss(t, s),
    }
    for metric, of in metrics.items():
        gaps = []
        for resample in [np.arange(len(y)), *(np.repeat(np.arange(len(y)), c.astype(int)) for c in counts.T)]:
            own = []
            for k in range(4):
                rows = resample[~np.isnan(y[resample, k])]
                own.append(of(y[rows, k], b[rows, k]) - of(y[rows, k], a[rows, k]))
            gaps.append([*own, np.nanmean(own)])
        gaps = np.array(gaps)
        rows = [
            *(row[metric] for row in results["comparison"]["per_label"].values()),
            results["comparison"]["macro"][metric],
        ]
        for k, row in enumerate(rows):
            spread = gaps[1:, k][~np.isnan(gaps[1:, k])]
            if not len(spread):
                assert row["difference"] is row["low"] is None
                continue
            wanted = [gaps[0, k], *np.quantile(spread, [0.025, 0.975])]
            assert [row["difference"], row["low"], row["high"]] == pytest.approx(wanted, abs=1e-12), (metric, k)
    one = results["models"]["A"]["per_label"]["one"]
    assert results["comparison"]["per_label"]["one"]["auroc"]["a"] == one["auroc"]
    known = ~np.isnan(y[:, 0])
    right = [(p[known, 0] >= 0.4) == y[known, 0] for p in (a, b)]
    row = results["comparison"]["per_label"]["one"]["mcnemar"]
    assert (row["b"], row["c"]) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()) and row["b"] != row["c"]


def test_a_against_itself(tmp_path, drawn_once):
    y, a, _, ids = make()
    write(tmp_path, y, a, a, ids)
    results = run(tmp_path)
    defined = [row for row in differences(results) if row["difference"] is not None]
    assert len(defined) > 40 and all(row["difference"] == row["low"] == row["high"] == 0 for row in defined)
    assert {one["verdict"] for one in results["comparison"]["sentences"]} == {"the same"}
    assert all("the same in A and B" in one["text"] for one in results["comparison"]["sentences"])
    rows = results["comparison"]["per_label"].values()
    assert {row["mcnemar"]["p"] for row in rows} == {1.0}
    assert {row["auroc"]["delong_p"] for row in rows} == {1.0, None}


def test_swapped_signs_and_shuffled_rows(tmp_path, drawn_once):
    y, a, b, ids = make()
    write(tmp_path, y, a, b, ids)
    first = run(tmp_path)
    table = pd.read_csv(tmp_path / "b.csv")
    table.sample(frac=1, random_state=3).to_csv(tmp_path / "b.csv", index=False)
    again = run(tmp_path)
    assert again["comparison"] == first["comparison"] and again["models"] == first["models"]
    swapped = run(tmp_path, models=("b.csv", "a.csv"))
    for one, other in zip(differences(first), differences(swapped), strict=True):
        if one["difference"] is not None:
            wanted = [one["b"], one["a"], -one["difference"], -one["high"], -one["low"]]
            assert [other[k] for k in ("a", "b", "difference", "low", "high")] == pytest.approx(wanted, abs=1e-12)
    z = [x["comparison"]["per_label"]["one"]["auroc"]["delong_z"] for x in (first, swapped)]
    assert z[0] == pytest.approx(-z[1]) and z[0] > 0
    assert (
        "B ranks better" in said(first, "macro AUROC")["text"]
        and "A ranks better" in said(swapped, "macro AUROC")["text"]
    )


# ---- Words


def test_a_better_model_is_supported_and_noise_is_not(tmp_path, drawn_once):
    rng, n = np.random.default_rng(1), 400
    y = (rng.random((n, 3)) < 0.3).astype(float)
    truth = rng.normal(size=(n, 3)) + y
    ids, names = [f"c{i}" for i in range(n)], ["x", "y", "z"]
    noisy = [sigmoid(truth + 0.1 * rng.normal(size=(n, 3)) - 1) for _ in range(2)]
    write(tmp_path, y, *noisy, ids, names)
    same = run(tmp_path, "--n-bootstrap", 200)
    assert [said(same, about)["verdict"] for about in ("macro AUROC", "AUROC by label")] == ["not shown"] * 2
    for one in (said(same, "macro AUROC"), said(same, "AUROC by label")):
        assert "no difference is shown, which is not evidence that there is none" in one["text"]
    better = noisy[0].copy()
    better[:, 1] = sigmoid(truth[:, 1] + 2 * y[:, 1] - 1)
    write(tmp_path, y, noisy[0], better, ids, names)
    results = run(tmp_path, "--n-bootstrap", 200)
    row = results["comparison"]["macro"]["auroc"]
    text = said(results, "macro AUROC")["text"]
    assert f"is higher by {row['difference']:.3f}" in text and f"{row['low']:+.3f} to {row['high']:+.3f}" in text
    assert "200 resamples of 400 patients" in text and "the data support that B ranks better" in text
    text = said(results, "AUROC by label")["text"]
    assert "1 differs: y (+0." in text and "for the other 2 no difference is shown, which is not evidence" in text
    assert "patients" not in said(results, "decisions by label")["text"]  # each case is one


@pytest.mark.parametrize(
    "row, n_patients, interval, verdict, words",
    [
        ((0.1, 0.02, 0.2), 100, True, "supported", "is higher by 0.100 .*the data support that B does well"),
        ((-0.1, -0.2, -0.02), 100, True, "supported", "is lower by 0.100 .*the data support that A does well"),
        ((0.0002, -0.2, 0.2), 100, True, "not shown", "higher by less than 0.001.*not evidence that there is none"),
        ((0.1, 0.02, 0.2), 12, True, "too few cases", "12 patients.*too few patients"),
        ((0.1, None, None), 100, False, "no interval", "--no-bootstrap"),
        ((np.nan, np.nan, np.nan), 100, True, "undefined", "cannot be compared"),
        ((0.1, np.nan, np.nan), 100, True, "undefined", "cannot be compared"),
        ((0.0, 0.0, 0.0), 100, True, "the same", "the same in A and B"),
    ],
)
def test_wording(row, n_patients, interval, verdict, words):
    row = dict(zip(("difference", "low", "high"), row, strict=True)) | {"a": 0.5, "b": 0.5}
    how = {"n_resamples": 9, "level": 0.95} if interval else None
    one = compare.sentence("It", "does well", row, True, {"interval": how, "n_patients": n_patients})
    assert one["verdict"] == verdict and re.search(words, one["text"]), one
    if verdict == "supported":
        other = compare.sentence("It", "does well", row, False, {"interval": how, "n_patients": n_patients})
        assert ("B does" in one["text"]) == ("A does" in other["text"])  # lower is better


def test_what_is_rare_undefined_or_dependent_is_said(tmp_path, drawn_once):
    y, a, b, ids = make()
    write(tmp_path, y, a, b, ids)
    results = run(tmp_path)
    text = said(results, "AUROC by label")["text"]
    assert "over 3 labels" in text and text.endswith(" Undefined for never.") and "Nothing is said of rare: " in text
    assert results["comparison"]["few"] == ["rare", "never"]
    assert "rare" not in said(results, "decisions by label")["text"]  # whose test takes all cases
    assert "160 cases are of 80 patients: its p values may be too small" in said(results, "decisions by label")["text"]
    assert any("hardly evidence" in note and "rare" in note for note in results["notes"])
    known, row = ~np.isnan(y[:, 0]), results["comparison"]["per_label"]["one"]["auroc"]
    pair, groups = np.stack([a, b], 2)[known, 0], np.array([common.group_of(i) for i in ids])[known]
    z = []
    for patients in (groups, None):
        area, cov = clinical.delong(y[known, 0], pair, patients)
        z.append((area[1] - area[0]) / np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]))
    assert row["delong_z"] == pytest.approx(z[0]) and abs(z[0] - z[1]) > 0.01  # over patients, not cases
    assert any("AUROC is undefined for 1 of 4 labels" in note for note in results["notes"])


def test_few_patients_and_no_variance(tmp_path, drawn_once):
    """A small p of a label of few patients is no difference, whatever the cases; AUROC 1 and 0 have no test."""
    n = 90
    ids, patients = [f"c{i}" for i in range(n)], [f"p{i}" for i in range(n)]
    patients[:24] = [f"p{i % 8}" for i in range(24)]  # 24 positive cases of 8 patients
    ill = (np.arange(n) < 24).astype(float)
    noise = np.random.default_rng(0).random(n)
    a, b = noise, np.where(ill, 0.8 + 0.1 * noise, 0.9 * noise)
    write(tmp_path, ill[:, None], a[:, None], b[:, None], ids, ["x"], patient_id=patients)
    results = run(tmp_path, "--n-bootstrap", 200)
    row = results["comparison"]["per_label"]["x"]["auroc"]
    assert row["holm_p"] < 1e-6 and row["low"] > 0 and results["comparison"]["few"] == ["x"]
    assert [said(results, about)["verdict"] for about in ("macro AUROC", "macro F1", "AUROC by label")] == [
        "too few cases"
    ] * 3
    assert "differ" not in said(results, "AUROC by label")["text"].split(":")[1]
    assert "too few patients with a positive, or a negative, case" in said(results, "macro AUROC")["text"]
    assert said(results, "Brier score")["verdict"] == "supported"  # of all cases
    ill = np.arange(n) % 2.0
    both = np.stack([ill, noise > 0.5], 1)
    a, b = np.stack([1 - ill, noise], 1), np.stack([ill, noise], 1)
    for names, verdict in ((["x", "y"], "the same"), (["x"], "no test")):
        k = len(names)
        write(tmp_path, both[:, :k].astype(float), a[:, :k], b[:, :k], ids, names)
        one = said(run(tmp_path), "AUROC by label")
        assert one["verdict"] == verdict and one["text"].endswith("variance: x (+1.000, bootstrap +1.000 to +1.000).")


def test_thresholds_of_different_sources():
    """No difference of decisions is called one of the models then; what needs no threshold is."""
    row = {"a": 0.5, "b": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15, "holm_p": 0.001}
    found = {"macro": {"auroc": row, "f1": row, "brier": row}, "few": []}
    found["per_label"] = {"x": {"auroc": row, "mcnemar": {"b": 1, "c": 20, "p": 0.001, "holm_p": 0.001}}}
    facts = {"n": 90, "n_patients": 90, "interval": {"n_resamples": 9, "level": 0.95}, "all_few": False}
    tuned = planted(thresholds_source="per label, from the checkpoint (tuned on the validation split)")
    for other, verdict in ((planted(thresholds_source="0.5 (default)"), "thresholds"), (tuned, "supported")):
        but = {"but": compare.but_thresholds(tuned, other)}
        of = {one["about"]: one for one in compare.sentences(found, facts | but)}
        assert of["macro F1"]["verdict"] == of["decisions by label"]["verdict"] == verdict
        assert of["macro AUROC"]["verdict"] == of["AUROC by label"]["verdict"] == "supported"
        for about in ("macro F1", "decisions by label"):
            assert ("(A: per label, from" in of[about]["text"]) == (verdict == "thresholds")
        assert ("decides better" in of["macro F1"]["text"]) == (verdict == "supported")
    same = planted(thresholds_source="0.5 (the checkpoint's were fitted to these cases)")
    assert not compare.but_thresholds(same, planted(thresholds_source="0.5 (default)"))


# ---- Cases


def test_files_and_flags(tmp_path, capsys):
    """Complete files, and each flag has its effect; the page is escaped."""
    y, a, b, ids = make()
    names = ["Macro", EVIL, "=rare", "never"]
    write(tmp_path, y, a, b, ["=" + i for i in ids], names, patient_id=[f"@{i // 4}" for i in range(len(ids))])
    results = run(tmp_path)
    made = {"results.json", "predictions_a.csv", "predictions_b.csv", "labels.csv", "report.html"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == made and results["n_patients"] == 40
    assert "- Macro AUROC of B is higher" in capsys.readouterr().out
    page, csv = ((tmp_path / "out" / name).read_text() for name in ("report.html", "predictions_b.csv"))
    assert "<script" not in page and html.escape(EVIL) in page and page.count("<figure>") == 3
    assert "5 differences with" in page and page.count("l8 -7l8 7l-8 7z") == 1  # a label of the mean's name
    assert "\n'=valid" in csv and ",'=rare_prob" in csv and "\n=" not in csv
    for one in results["comparison"]["sentences"]:
        assert html.escape(one["text"]) in page
    rows = [row for part in ("macro", "micro") for row in results["comparison"][part].values()]
    out = sum(row["low"] > 0 or row["high"] < 0 for row in rows)
    assert (page.count("leaves out 0</td>"), page.count("includes 0</td>")) == (out, len(rows) - out) and out
    assert not re.search(r"https?:|url\(|javascript:| on\w+=", page)
    for which, name in (("A", "a.csv"), ("B", "b.csv")):
        assert results["provenance"][f"{which}_predictions"]["sha256"] == common.file_sha256(tmp_path / name)
    for name in "ab":
        (tmp_path / "out" / f"predictions_{name}.csv").rename(tmp_path / f"{name}.csv")
    (tmp_path / "out" / "labels.csv").rename(tmp_path / "labels.csv")
    again = run(tmp_path)  # its own files give the same
    assert again["comparison"] == results["comparison"]
    plain = run(tmp_path, "--no-bootstrap", "--threshold", 0.3, "--label-columns", "Macro")
    assert plain["interval"] is None and list(plain["comparison"]["per_label"]) == ["Macro"]
    assert plain["models"]["B"]["per_label"]["Macro"]["threshold"] == 0.3
    assert "low" not in plain["comparison"]["macro"]["auroc"]
    assert {one["verdict"] for one in plain["comparison"]["sentences"]} >= {"no interval"}
    assert (
        "alone" not in json.dumps(plain["notes"])
        and plain["comparison"]["macro"]["f1"] != results["comparison"]["macro"]["f1"]
    )
    other = run(tmp_path, "--seed", 1)["comparison"]["macro"]["auroc"]
    row = again["comparison"]["macro"]["auroc"]
    assert other["difference"] == row["difference"] and other["low"] != row["low"]
    wrong = ["--results", str(tmp_path / "out" / "results.json"), "--out", str(tmp_path / "r.html")]
    assert common.run_main(lambda: report.main(wrong)) == 2
    assert "run its command of evaluate.py again" in capsys.readouterr().err


def test_labels_of_one_are_left_out_and_named(tmp_path, drawn_once):
    y, a, b, ids = make()
    write(tmp_path, y, a, b, ids)
    table = pd.read_csv(tmp_path / "b.csv")
    table.drop(columns="two_prob").assign(thre_prob=0.5).to_csv(tmp_path / "b.csv", index=False)
    results = run(tmp_path)
    assert "B: labels.csv has no labels of thre: left out" in results["notes"]
    assert list(results["comparison"]["per_label"]) == ["one", "rare", "never"]
    assert any(note.endswith("left out: two (only in A)") for note in results["notes"])


MISTAKES = {
    "gone": (lambda t: t.drop(index=[3, 4]), "b.csv: has no row for 2 ids of .*'valid_1_a_2', 'valid_2_a_1'", []),
    "none": (lambda t: t.rename(columns=lambda c: c.replace("_prob", "_p")), "has no '..._prob' column of a label", []),
    "prob": (lambda t: t.assign(one_prob=2), "'2' is no probability", []),
    "label": (lambda t: t, "no label 'three' in both", ["--label-columns", "three"]),
    "threshold": (lambda t: t, "--oracle-thresholds: of one model", ["--oracle-thresholds"]),
    "subgroup": (lambda t: t, "--subgroup: of one model", ["--subgroup", "sex"]),
    "zero": (lambda t: t, "--zero-shot: needs a checkpoint", ["--zero-shot"]),
    "more": (lambda t: t, "give either --test-only", ["--predictions", "x.csv"]),
    "table": (lambda t: t, "--subgroup-table: of one model", ["--subgroup-table", "x.csv"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, kind):
    change, message, words = MISTAKES[kind]
    y, a, b, ids = make(20)
    write(tmp_path, y, a, b, ids)
    change(pd.read_csv(tmp_path / "b.csv")).to_csv(tmp_path / "b.csv", index=False)
    run(tmp_path, *words, code=2)
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and re.search(message, text), text
    assert not (tmp_path / "out").exists()


def test_what_failed_in_one_is_in_neither(tmp_path, drawn_once):
    """predictions.csv of an evaluation in which a case failed: listed, exit code 3, no number has it."""
    y, a, b, ids = make(60)
    write(tmp_path, y, a, b, ids)
    table = pd.read_csv(tmp_path / "b.csv").astype(object)
    table.loc[[5, 9], [f"{name}_prob" for name in NAMES]] = ""
    table.to_csv(tmp_path / "b.csv", index=False)
    run(tmp_path, code=3)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    reason = "B: no probability in b.csv"
    assert results["failed"] == [{"id": ids[5], "reason": reason}, {"id": ids[9], "reason": reason}]
    left = [i for i in range(60) if i not in (5, 9)]
    write(tmp_path, y[left], a[left], b[left], [ids[i] for i in left])
    assert run(tmp_path)["comparison"] == results["comparison"] and results["n"] == 60


def planted(n=40, which="A", **changes):
    y, a, b, ids = make(n)
    groups = [common.group_of(i) for i in ids]
    facts = {"failed": {}, "thresholds": np.full(4, 0.5), "thresholds_source": "0.5", "evaluated": which, "notes": []}
    facts |= {"ids": ids, "groups": groups, "class_names": NAMES, "targets": y, "probs": a if which == "A" else b}
    return cases.Cases(**facts | {"evaluated_on": "some", "files": {}} | changes)


def test_matched_cases_of_two_checkpoints():
    """Order, failures, thresholds, labels and notes of two sets of cases."""
    a, b = planted(), planted(which="B")
    back = list(reversed(range(40)))
    b = dataclasses.replace(
        b, ids=[b.ids[i] for i in back], targets=b.targets[back][:, ::-1], probs=b.probs[back][:, ::-1],
        class_names=NAMES[::-1], thresholds=np.array([0.1, 0.2, 0.3, 0.4]), failed={b.ids[7]: "torn"},
        groups=[b.groups[i] for i in back], notes=["These are the validation cases by which training chose the model"],
        seen=True,
    )  # fmt: skip
    b.probs[back.index(7)] = np.nan
    one, other = compare.matched(a, b)
    assert other.ids == a.ids and other.class_names == NAMES and other.thresholds.tolist() == [0.4, 0.3, 0.2, 0.1]
    whole = [i for i in range(40) if i != 7]
    assert np.isnan(one.probs[7]).all() and np.isnan(other.probs[7]).all()
    assert (one.probs[whole] == a.probs[whole]).all() and (other.probs[whole] == planted(which="B").probs[whole]).all()
    assert one.failed == other.failed == {a.ids[7]: "B: torn"}
    assert one.notes[0] == "B knows these cases from its training, which favours it; of the other that is not known"
    both = [dataclasses.replace(some, files={"checkpoint": {}}) for some in (a, b)]
    assert "Only B knows these cases" in compare.matched(*both)[0].notes[0]
    assert one.notes[1].startswith("B: These are the validation")
    for change, message in (
        ({"ids": ["x", "y", *a.ids[2:]]}, r"--compare: B lacks 2 cases: 'valid_0_a_1', 'valid_0_a_2'"),
        ({"targets": 1 - a.targets}, r"other labels of \d\d cases: 'valid_0_a_1', .* \.\.\. \(give both"),
        ({"class_names": list("wxyz")}, "no label in common"),
        ({"probs": np.full((40, 4), np.nan)}, "none of 40 cases could be read by both"),
    ):
        with pytest.raises(common.UserError, match=message):
            compare.matched(a, dataclasses.replace(planted(which="B"), **change))
    longer = planted(42, "B")
    with pytest.raises(common.UserError, match="A lacks 2 cases"):
        compare.matched(dataclasses.replace(a, targets=a.targets), longer)


# ---- Zones


def test_zones(score, tmp_path, monkeypatch):  # noqa: F811
    """Two planted checkpoints of train_csi.py: slow numbers on the same resamples, and the page."""
    films = Films(60)
    score(films)  # prepares the checkpoint and the script
    common.save_checkpoint(tmp_path / "n.pth", common.load_checkpoint(tmp_path / "m.pth"))
    other = Films(60)
    other.probs = Films(60, seed=5).probs * 0.5 + 0.5 * other.probs
    other.fail(4)
    real, sets = cases.cases_of_checkpoint, {"m.pth": films, "n.pth": other}
    monkeypatch.setattr(compare, "cases_of_checkpoint", lambda args, ctx: of_set(args, ctx))
    matched_films, kept = compare.matched_films, []

    def spied(a, b):
        kept.extend(some.zones[name] for some in (a, b) for name in ("model", "dataset"))
        return matched_films(a, b)

    monkeypatch.setattr(compare, "matched_films", spied)

    def of_set(args, ctx):
        assert not args.pictures  # which keeps the model
        script, its = sys.modules["planted_csi"], sets[args.test_only.name]
        script.build_eval_dataset = lambda args: its
        out = {"ids": its.ids, "groups": its.groups, "targets": its.targets, "probs": its.probs}
        script.predict = lambda model, dataset, ctx, say: out | {"failed": sorted(its.bad)}
        return real(args, ctx)

    words = ["--compare", tmp_path / "m.pth", tmp_path / "n.pth", "--output", tmp_path / "out", "--device", "cpu"]
    assert common.run_main(lambda: evaluate.main([str(w) for w in [*words, "--n-bootstrap", 20]])) == 3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept == [None] * 4  # one model at a time is in memory
    assert results["failed"] == [{"id": "film4", "reason": results["failed"][0]["reason"]}]
    found = results["comparison"]
    order = sorted((i for i in range(60) if i != 4), key=lambda i: films.ids[i])
    counts = common.bootstrap_counts([films.groups[i] for i in order], 20, 0)
    decided = [train_csi.decide(its.probs, SimpleNamespace(loss="corn")) for its in (films, other)]

    def gap(rows):
        kappas = np.zeros((2, 6))
        for m, k in np.ndindex(2, 6):
            some = rows[films.targets[rows, k] != 4]
            kappas[m, k] = cohen_kappa_score(
                films.targets[some, k], decided[m]["severity"][some, k], weights="quadratic"
            )
        return kappas[1] - kappas[0]

    resamples = [np.repeat(order, c.astype(int)) for c in counts.T]
    point, spread = gap(np.array(order)), np.array([gap(rows) for rows in resamples])
    for k, zone in enumerate(train_csi.ZONES):
        row = found["zones"][zone]["qwk"]
        wanted = [point[k], *np.quantile(spread[:, k], [0.025, 0.975])]
        assert [row["difference"], row["low"], row["high"]] == pytest.approx(wanted, rel=1e-10, abs=1e-12)
        graded = np.array([i for i in order if films.targets[i, k] != 4])
        right = [d["severity"][graded, k] == films.targets[graded, k] for d in decided]
        b, c = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
        assert (found["zones"][zone]["mcnemar"]["b"], found["zones"][zone]["mcnemar"]["c"]) == (b, c)
    row = found["zone_means"]["qwk"]
    wanted = [point.mean(), *np.quantile(spread.mean(1), [0.025, 0.975])]
    assert [row["difference"], row["low"], row["high"]] == pytest.approx(wanted, rel=1e-10)
    models = results["models"]
    declined = [(d["classes"][order] == 4)[films.targets[order] < 4].sum() for d in decided]
    assert [any(f"calls {n} of" in note for note in results["notes"]) for n in declined] == [True, True]
    assert found["zone_means"]["mae"]["b"] == models["B"]["zone_means"]["mae"]
    assert "agrees better" in said(results, "QWK of zones")["text"] or row["low"] <= 0 <= row["high"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By zone" in page and html.escape(said(results, "ICC of the mean CSI")["text"]) in page
    assert len(pd.read_csv(tmp_path / "out" / "predictions_b.csv")) == 59


def test_a_zone_without_kappa_in_one_model_is_in_no_mean():
    """A zone of one class: A errs once (kappa 0), B never (undefined); the others are equal, and so are A and B."""
    a, b = np.full((6, 4), 0.8), np.full((6, 4), 0.8)
    a[2], b[2] = 0, np.nan
    assert compare.means_of_zones(a, b) == pytest.approx(np.full((2, 4), 0.8))
    b[2, 1:] = 0.3  # defined in the resamples
    assert compare.means_of_zones(a, b)[:, 0] == pytest.approx([0.8, 0.8])
    assert compare.means_of_zones(a, b)[:, 1] == pytest.approx([4 / 6, 4.3 / 6])


# ---- Subgroups


def run_one(folder, *words, code=0):
    given = ["--predictions", folder / "a.csv", "--labels", folder / "labels.csv", "--output", folder / "out"]
    given += ["--n-bootstrap", 20, *words]
    assert common.run_main(lambda: evaluate.main([str(word) for word in given])) == code
    return json.loads((folder / "out" / "results.json").read_text()) if code == 0 else None


def same(row: dict, other: dict):
    """The numbers of the one are in the other, but for the last digit."""
    values = [[math.nan if found[key] is None else found[key] for key in row] for found in (row, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-12, nan_ok=True)


def test_subgroups_are_evaluations_of_the_subset(tmp_path, monkeypatch):
    """Numbers and intervals of each value are those of its cases alone."""
    monkeypatch.setattr(evaluate, "write_report", lambda *given, **more: None)
    y, a, b, ids = make(200)
    sex = np.array(["F", "M", ""])[np.arange(200) // 2 % 3]
    write(tmp_path, y, a, b, ids, sex=sex, age=np.arange(200) % 90)
    results = run_one(tmp_path, "--subgroup", "sex", "age", "--threshold", 0.4)
    assert list(results["per_label"]) == NAMES  # the columns are no labels
    found = results["subgroups"]
    assert list(found["sex"]) == ["F", "M", "unknown"]
    assert list(found["age"]) == ["age 0 to 16", "age 17 to 39", "age 40 to 64", "age 65 to 89"]
    assert sum(row["n"] for row in found["age"].values()) == 200
    for value, its in (("F", sex == "F"), ("unknown", sex == "")):
        (tmp_path / value).mkdir()
        write(tmp_path / value, y[its], a[its], b[its], [i for i, ok in zip(ids, its, strict=True) if ok])
        alone = run_one(tmp_path / value, "--threshold", 0.4)
        row = found["sex"][value]
        assert (row["n"], row["n_patients"]) == (alone["n"], alone["n_patients"])
        for name in NAMES:
            same(row["per_label"][name], alone["per_label"][name])
        for part in ("macro", "micro"):
            same(row[part], alone[part])
            assert {"auroc", "f1", "f1_high"} <= row[part].keys()
        assert {"auroc_low", "auprc_high"} <= row["macro"].keys()


def test_largest_gap_against_a_slow_loop():
    """Resampled apart: column i of one value beside another column of the other; labels with few cases take no part."""
    rng = np.random.default_rng(0)
    areas = {name: rng.random((3, 51)) for name in ("x", "y", "z")}
    areas["x"][1] = areas["y"][2] = areas["z"][2] = np.nan
    found = subgroups.largest_gap(areas)
    values = list(areas.values())
    points = {(i, j): np.nanmean(values[i][:, 0] - values[j][:, 0]) for i in range(3) for j in range(3) if i != j}
    high, low = max(points, key=points.get)
    assert (found["higher"], found["lower"], found["n_pairs"]) == ("xyz"[high], "xyz"[low], 3)
    assert found["gap"] == pytest.approx(points[high, low])
    shifted = [np.roll(value[:, 1:], k, axis=1) for k, value in enumerate(values)]
    spread = np.nanmean(shifted[high] - shifted[low], 0)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(spread, [0.025, 0.975]))
    areas = {"x": np.full((1, 5), np.nan), "y": np.ones((1, 5))}
    assert subgroups.largest_gap(areas) is None


def test_subgroup_table_and_page(tmp_path, monkeypatch):
    """Another table, with its own names and order; a hostile column and value are escaped; missing rows are unknown."""
    y, a, b, ids = make(120)
    write(tmp_path, y, a, b, ids)
    table = pd.DataFrame({"VolumeName": [f"{i}.nii.gz" for i in reversed(ids)], EVIL: ["<b>", "x & y"] * 60})
    table[:-2].to_csv(tmp_path / "t.csv", index=False)
    results = run_one(tmp_path, "--subgroup", EVIL, "--subgroup-table", tmp_path / "t.csv")
    values = results["subgroups"][EVIL]
    assert {name: row["n"] for name, row in values.items()} == {"<b>": 59, "x & y": 59, "unknown": 2}
    assert any("2 of 120 cases have no row in t.csv" in note for note in results["notes"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and html.escape(EVIL) in page and "x &amp; y" in page and "<td><b>" not in page
    assert "nothing here shows that the model is fair" in page and "few: " in page and "Largest gap" in page
    again = ["--results", "results.json", "--predictions", "predictions.csv", "--labels", "labels.csv"]
    again = [word if word.startswith("--") else str(tmp_path / "out" / word) for word in again]
    assert report.main([*again, "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text() == page
    monkeypatch.setattr(evaluate, "write_report", lambda *given, **more: None)
    assert results["subgroup_gaps"][EVIL]["n_labels"] == 2  # not the rare one
    plain = run_one(tmp_path, "--subgroup", EVIL, "--subgroup-table", tmp_path / "t.csv", "--no-bootstrap")
    assert "low" not in plain["subgroup_gaps"][EVIL] and "auroc_low" not in json.dumps(plain["subgroups"])


SPLITS = {
    "few numbers": (["2", "10", "1", "", "2.0"], {"1": 1, "2": 2, "10": 1, "unknown": 1}),
    "texts": (["b", "a", "nan", "b", " a "], {"a": 2, "b": 2, "unknown": 1}),
    "bands": ([str(x) for x in range(40)], {"x 0 to 9": 10, "x 10 to 19": 10, "x 20 to 29": 10, "x 30 to 39": 10}),
    "large": (["1000001", "1000002", "1000003", "1000001"], {"1000001": 2, "1000002": 1, "1000003": 1}),
    "large bands": ([f"10000{x}" for x in range(20, 36)], {f"x 10000{x} to 10000{x + 3}": 4 for x in (20, 24, 28, 32)}),
    "written": (["0.50", "1e3", "-2", "1e3"], {"-2": 1, "0.50": 1, "1e3": 2}),
    "zeros": (["007", "07", "7", "7"], {"007": 1, "07": 1, "7": 2}),
    "codes": ([f"{x:03}" for x in range(20)], {f"{x:03}": 1 for x in range(20)}),
    "long": (["12345678901234567", "12345678901234568"], {"12345678901234567": 1, "12345678901234568": 1}),
    "nothing": (["1", "NA", "n/a", "NaN", "None", "Unknown", "-", "?", "", "'-"], {"1": 1, "unknown": 9}),
    "ties": (["0"] * 30 + [str(x) for x in range(1, 15)], {"0": 30, "x 1 to 3": 3, "x 4 to 14": 11}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPLITS)
def test_values_and_bands(tmp_path, kind):
    texts, wanted = SPLITS[kind]
    ids = [f"c{i}" for i in range(len(texts))]
    pd.DataFrame({"id": ids, "x": texts}).to_csv(tmp_path / "t.csv", index=False)
    found, notes = subgroups.subgroups_of(tmp_path / "t.csv", ["x"], ids)
    assert {name: its.sum() for name, its in found["x"].items()} == wanted
    bands = any(" to " in name for name in wanted)
    assert [note.split(" (")[0] for note in notes] == bands * [
        f"{len(set(texts))} different numbers of 'x' were cut into {len(wanted)} bands at their quartiles"
    ]
    assert sum(its.astype(int) for its in found["x"].values()).tolist() == [1] * len(ids)


@pytest.mark.parametrize(
    "table, words, message",
    [
        ({"id": ["q"], "sex": ["F"]}, ["--subgroup", "sex"], "has no id of the cases.*--subgroup-table"),
        ({"id": ["valid_0_a_1"], "sex": ["F"]}, ["--subgroup", "sx"], "column 'sx' is missing .did you mean 'sex'"),
        ({"id": ["valid_0_a_1"] * 2, "sex": ["F", "M"]}, ["--subgroup", "sex"], "several values of 'sex'"),
        ({"id": [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(40)], "sex": [f"t{i}" for i in range(40)]},
         ["--subgroup", "sex"], "has 40 texts, such as 't0', which is no number .at most 30"),
        ({"id": [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(40)], "age": [*range(38), "NA", "80+"]},
         ["--subgroup", "age"], "has 39 texts, such as '80.', which is no number"),
        ({"id": ["q"]}, [], "--subgroup-table: needs --subgroup"),
    ],
)  # fmt: skip
def test_subgroup_mistakes(tmp_path, capsys, table, words, message):
    y, a, b, ids = make(40)
    write(tmp_path, y, a, b, ids)
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    run_one(tmp_path, "--subgroup-table", tmp_path / "t.csv", *words, code=2)
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and re.search(message, text), text


def test_subgroups_of_films(score):  # noqa: F811
    """Of zone scores: the pooled numbers of the films of each view, by the table of the checkpoint's data."""
    films = Films(60)
    table = pd.DataFrame({"FileID": films.ids, "view": films.views})
    table.to_csv(score.folder.parent / "films.csv", index=False)
    results = score(films, "--subgroup", "view", page=True)
    for value, view in (("PA", "PA"), ("unknown", "not known")):
        row, other = results["subgroups"]["view"][value], results["views"][view]
        assert (row["n"], row["n_zones"]) == (other["n_films"], other["n"])
        assert (row["qwk"], row["mae"]) == pytest.approx((other["qwk"], other["mae"]))
        assert row["qwk_low"] < row["qwk"] < row["qwk_high"]
    assert "By view" in (score.folder / "report.html").read_text()


# ---- Checkpoints


@pytest.fixture
def world(ct_world, tmp_path, monkeypatch):  # noqa: F811
    """run(words) -> results.json: evaluate.py on checkpoints of a script with drawn features, model.pt and head.pt."""
    monkeypatch.syspath_prepend(str(ct_world))
    monkeypatch.setitem(cases.TASKS, "ctclip", "fake_ctclip")
    monkeypatch.setattr(evaluate, "write_report", lambda *given, **more: None)

    def call(*words, code=0):
        words = [*words, "--output", tmp_path / "out", "--device", "cpu", "--n-bootstrap", 20, "--no-pictures"]
        assert common.run_main(lambda: evaluate.main([str(word) for word in words])) == code
        return json.loads((tmp_path / "out" / "results.json").read_text()) if code in (0, 3) else None

    return call


def test_two_checkpoints(world, ct_world, tmp_path, capsys):  # noqa: F811
    """Each with its own thresholds; the same other data for both; files of predictions; a checkpoint and a table."""
    pair = ["--compare", ct_world / "model.pt", ct_world / "head.pt"]
    results = world(*pair, "--valid-data", ct_world / "test.csv")
    models, name = results["models"], "Cardiomegaly"
    assert results["evaluated"] == "model.pt, zero-shot against head.pt" and results["n"] == 40
    assert [note[:22] for note in results["notes"]] == ["Fewer than 10 patients"]
    assert [models[which]["per_label"][name]["threshold"] for which in "AB"] == [0.5, 0.25]
    for which, file in (("A", "model.pt"), ("B", "head.pt")):
        assert results["provenance"][f"{which}_checkpoint"]["sha256"] == common.file_sha256(ct_world / file)
    assert "tuned on the validation" in results["provenance"]["B_thresholds"]
    alone = world("--test-only", ct_world / "head.pt", "--valid-data", ct_world / "test.csv")
    assert models["B"]["per_label"] == alone["per_label"]
    (tmp_path / "out" / "predictions_a.csv").rename(tmp_path / "a.csv")
    (tmp_path / "out" / "labels.csv").rename(tmp_path / "labels.csv")
    mixed = ["--compare", tmp_path / "a.csv", ct_world / "head.pt", "--labels", tmp_path / "labels.csv"]
    again = world(*mixed, "--valid-data", ct_world / "test.csv")
    assert again["comparison"]["macro"]["auroc"] == pytest.approx(results["comparison"]["macro"]["auroc"], rel=1e-9)
    seen = world(*pair)  # both know them
    assert seen["n"] == 120 and "validation cases by which training chose the model" in seen["notes"][0]
    (tmp_path / "c.yaml").write_text(f"valid_data: {ct_world / 'test.csv'}\nlr: 3\n")
    capsys.readouterr()
    assert world(*pair, "--config", tmp_path / "c.yaml")["comparison"] == results["comparison"]
    assert "not used, the checkpoint has its own: lr" in capsys.readouterr().out
    world(*mixed, code=2)  # the table is of other cases than the checkpoint's own
    assert re.search("--compare: B lacks 40 cases: 'test_0_a_1', .* .give both the same data", capsys.readouterr().err)


def test_subgroups_of_a_checkpoint(world, ct_world, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Its own table is read; what that does not hold needs another."""
    results = world("--test-only", ct_world / "model.pt", "--subgroup", "Cardiomegaly")
    values = results["subgroups"]["Cardiomegaly"]
    assert list(values) == ["0", "1"] and sum(row["n"] for row in values.values()) == 120
    assert values["1"]["per_label"]["Cardiomegaly"]["auroc"] is None
    monkeypatch.delattr(sys.modules["fake_ctclip"], "predict")  # mistakes are found before it
    pd.DataFrame({"id": ["x"], "age": ["1"]}).to_csv(tmp_path / "t.csv", index=False)
    for words, message in (
        (["--subgroup", "sex"], "valid.csv: column 'sex' is missing"),
        (["--subgroup", "agee", "--subgroup-table", tmp_path / "t.csv"], "did you mean 'age'"),
        (["--validation", tmp_path / "no.csv", tmp_path / "t.csv"], "no.csv"),
    ):
        world("--test-only", ct_world / "model.pt", *words, code=2)
        assert message in capsys.readouterr().err


def test_config_for_two_checkpoints(tmp_path, monkeypatch):
    """The flags of both scripts, which have many in common."""
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path: {"task": path.stem})
    (tmp_path / "c.yaml").write_text(f"csv: {tmp_path / 'x.csv'}\nlr: 3\nseed: 7\n")
    for pair in (["siglip", "siglip"], ["siglip", "ctclip"], ["ctclip", "siglip"]):
        words = ["--compare", *(f"{name}.pt" for name in pair), "--config", str(tmp_path / "c.yaml")]
        args = evaluate.parse_args([*words, "--n-bootstrap", "30"])
        assert (args.csv, args.seed, args.n_bootstrap) == (tmp_path / "x.csv", 7, 30)
        assert [path.stem for path in args.compare] == pair
