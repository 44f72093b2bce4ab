"""zones.py: scikit-learn's numbers of planted probabilities, missing scores, complete files, an escaped page."""

import argparse
import base64
import html
import io
import json
import re
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

import cases
import common
import evaluate
import report
import train_csi
import zones

EVIL = '"><script>alert(1)</script>'
UNKNOWN = 4


class Films:
    """A data set of train_csi.py with planted probabilities: no pixel is read for them."""

    def __init__(self, n=120, seed=0, second=True, diagnosis=True, views=True):
        rng = np.random.default_rng(seed)
        self.ids = [f"film{i}" for i in range(n)]
        self.groups = [f"p{i // 2}" for i in range(n)]
        self.views = ["PA", "AP", ""] * (n // 3) if views else [""] * n
        self.class_names = list(train_csi.ZONES)
        ill = np.repeat(rng.uniform(-0.4, 3.4, (n // 2, 1)), 2, axis=0)
        score = np.clip(np.rint(ill + rng.normal(0, 0.7, (n, 6))), 0, 3).astype(int)
        self.targets = np.where(rng.random((n, 6)) < 0.1, UNKNOWN, score)
        other = np.where(rng.random((n, 6)) < 0.1, UNKNOWN, np.clip(score + rng.integers(-1, 2, (n, 6)), 0, 3))
        self.reader2 = other if second else None
        sick = (ill[:, 0] + rng.normal(0, 1, n) > 1.5).astype(float)
        sick[rng.random(n) < 0.1] = np.nan
        self.diagnosis = sick if diagnosis else None
        given = np.exp(-((np.arange(4) - (score + rng.normal(0, 0.9, (n, 6)))[..., None]) ** 2))
        given /= given.sum(-1, keepdims=True)
        blind = np.where(self.targets == UNKNOWN, rng.beta(3, 2, (n, 6)), rng.beta(1, 6, (n, 6)))[..., None]
        self.probs = np.concatenate([given * (1 - blind), blind], -1)
        self.bad = set()

    def __len__(self):
        return len(self.ids)

    def load(self, i):
        if i in self.bad:
            raise common.UserError(f"{self.ids[i]}.png: no such film")

    def picture(self, i):
        self.load(i)
        y, x = np.mgrid[:96, :96]
        return (127 + 60 * np.sin(x / 9 + i) * np.cos(y / 15)).astype(np.uint8)

    def fail(self, *indices):
        self.bad |= set(indices)
        self.probs[list(indices)] = np.nan


@pytest.fixture
def score(tmp_path, monkeypatch):
    """evaluate.py on a checkpoint whose script predicts what is planted -> results.json, and the folder."""
    (tmp_path / "films.csv").write_text("FileID\n")
    saved = {"task": "csi", "args": {"csv": str(tmp_path / "films.csv"), "image_dir": ".", "split": "val"}, "model": {}}
    common.save_checkpoint(tmp_path / "m.pth", saved | {"versions": {}, "zone_medians": [1, 1, 2, 2, 1, 0]})

    def run(films, *words, code=0, loss="corn", maps=True, page=False):
        script = types.ModuleType("planted_csi")
        for name in ("ZONES", "CLASSES", "decide", "true_csi", "ahf_class", "build_parser", "data_file"):
            setattr(script, name, getattr(train_csi, name))
        known = {"csv": tmp_path / "films.csv", "split": "val", "loss": loss}
        script.args_from_checkpoint = lambda saved, **given: argparse.Namespace(**known | given)
        script.build_eval_dataset = lambda args: films
        script.build_eval_model = lambda saved, args, device: None
        out = {"ids": films.ids, "groups": films.groups, "targets": films.targets, "probs": films.probs}
        script.predict = lambda model, dataset, ctx, say: out | {"failed": sorted(films.bad)}
        corner = np.zeros((6, 96, 96), np.float32)
        corner[:, :30, :30] = 1
        script.zone_maps = lambda model, dataset, i, device: corner if maps else None
        monkeypatch.setitem(sys.modules, "planted_csi", script)
        monkeypatch.setitem(cases.TASKS, "csi", "planted_csi")
        monkeypatch.setattr(evaluate, "write_zones", zones.write_zones if page else lambda *given: None)
        base = ["--test-only", tmp_path / "m.pth", "--output", tmp_path / "eval", "--device", "cpu"]
        words = words if "--n-bootstrap" in words else [*words, "--n-bootstrap", 20]
        assert common.run_main(lambda: evaluate.main([str(w) for w in [*base, *words]])) == code
        return json.loads((tmp_path / "eval" / "results.json").read_text()) if code in (0, 3) else None

    run.folder = tmp_path / "eval"
    return run


def numbers_of(results):
    return {k: v for k, v in results.items() if k != "provenance"}


def test_constants_are_those_of_the_script():
    assert (zones.UNKNOWN, zones.CUTS) == (train_csi.UNKNOWN, train_csi.AHF_LIMITS)
    for part, columns in train_csi.PARTS.items():
        named = [k for k, zone in enumerate(train_csi.ZONES) if zones.PARTS[part] in zone.split("_")]
        assert named == list(columns)


# ---- Numbers


@pytest.mark.parametrize("loss", ["corn", "ce"])
def test_zones_against_sklearn(score, loss):
    films = Films()
    results = score(films, loss=loss)
    found = train_csi.decide(films.probs, argparse.Namespace(loss=loss))
    places = {zone: np.s_[:, k] for k, zone in enumerate(train_csi.ZONES)} | {"pooled": np.s_[:, :]}
    for zone, place in places.items():
        row = results["pooled"] if zone == "pooled" else results["zones"][zone]
        truth, classes = films.targets[place].ravel(), found["classes"][place].ravel()
        severity, expected = found["severity"][place].ravel(), found["expected"][place].ravel()
        graded = truth != UNKNOWN
        gap, far, given = abs(severity - truth)[graded], abs(expected - truth)[graded], (truth[graded], classes[graded])
        over = {"labels": range(4), "zero_division": 0}
        wanted = {
            "n": graded.sum(), "n_unknown": (~graded).sum(), "n_declined": (classes[graded] == UNKNOWN).sum(),
            "qwk": sk.cohen_kappa_score(truth[graded], severity[graded], weights="quadratic"),
            "mae": far.mean(), "mae_class": gap.mean(), "exact": (gap == 0).mean(), "off_2": (gap > 1).mean(),
            "accuracy": sk.accuracy_score(*given), "precision": sk.precision_score(*given, average="macro", **over),
            "recall": sk.recall_score(*given, average="macro", **over),
            "f1_macro": sk.f1_score(*given, average="macro", **over),
            "f1_weighted": sk.f1_score(*given, average="weighted", **over),
            "gradable_auroc": sk.roc_auc_score(graded, -films.probs[(*place, UNKNOWN)].ravel()),
        }  # fmt: skip
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-12), zone
        assert row["confusion"] == sk.confusion_matrix(truth, classes, labels=range(5)).tolist()
        by_class = zip(sk.f1_score(*given, average=None, **over), row["per_class"].values(), strict=True)
        assert all(one["f1"] == pytest.approx(f1, rel=1e-12) for f1, one in by_class)
        assert row["n_declined"] > 0 or zone != "pooled"
    for name in ("qwk", "f1_macro", "gradable_auroc"):
        mean = np.mean([row[name] for row in results["zones"].values()])
        assert results["zone_means"][name] == pytest.approx(mean, rel=1e-12)


def test_it_is_what_the_training_says(score):
    """The numbers that training prints of its validation films are those of the report."""
    films = Films()
    results = score(films)
    said = train_csi.zone_metrics(films.targets, films.probs, argparse.Namespace(loss="corn"))
    pooled, mean = results["pooled"], results["csi"]["mean"]
    pairs = {"qwk": pooled["qwk"], "zone_mae": pooled["mae"], "accuracy": pooled["accuracy"], "csi_icc": mean["icc"]}
    pairs |= {"f1_macro": results["zone_means"]["f1_macro"], "f1_weighted": pooled["f1_weighted"]}
    pairs |= {"gradable_auroc": pooled["gradable_auroc"], "csi_mae": mean["mae"], "csi_correlation": mean["pearson"]}
    assert {name: said[name] for name in pairs} == pytest.approx(pairs, rel=1e-12)


def test_golden_confusions_and_f1(score, golden):
    """The original tool's numbers, but for its macro mean, which counts the class it leaves out as a fifth, with 0."""
    expected = golden.load("golden_csi")["outputs"]["signal"]
    targets = golden.array("csi/targets2", (64, 6), 0, 5)
    logits = golden.array("csi/logits2", (64, 6, 5)) + 2 * np.eye(5)[targets]
    films = Films(66)
    films.ids, films.groups, films.views = ([f"f{i}" for i in range(64)] for _ in range(3))
    films.diagnosis = films.reader2 = None
    films.targets, films.probs = targets, torch.as_tensor(logits).double().softmax(-1).numpy()
    results = score(films, loss="ce")
    assert results["pooled"]["confusion"] == expected["confusion_overall_all_classes_rows_true"]
    by_zone = {zone: row["confusion"] for zone, row in results["zones"].items()}
    assert by_zone == expected["confusion_per_zone_rows_true"]
    f1 = expected["compute_f1_metrics__ignore_4"]
    assert results["pooled"]["f1_weighted"] == pytest.approx(f1["f1_weighted_overall"], abs=1e-6)
    assert results["zone_means"]["f1_weighted"] == pytest.approx(f1["f1_weighted_macro"], abs=1e-6)
    assert results["zone_means"]["f1_macro"] == pytest.approx(f1["f1_macro"] * 5 / 4, abs=1e-6)


def test_films_against_slow_formulas(score):
    """Mean scores of all zones and of a side, AHF classes, diagnosis, views: film by film."""
    films = Films()
    films.probs[4, :, UNKNOWN], films.probs[4, :, :4] = 0.9, 0.025  # not gradable, and far from low
    films.targets[4], films.diagnosis[4] = 3, 1
    films.targets[8] = UNKNOWN
    results, found = score(films), train_csi.decide(films.probs, argparse.Namespace(loss="corn"))

    def means(columns):
        pairs = []
        for truth, classes, expected in zip(films.targets, found["classes"], found["expected"], strict=True):
            true = [truth[k] for k in columns if truth[k] != UNKNOWN]
            said = [expected[k] for k in columns if classes[k] != UNKNOWN]
            pairs.append((np.mean(true) if true else np.nan, np.mean(said) if said else np.nan))
        return np.array(pairs)

    for part, columns in {"mean": range(6), "left": (1, 3, 5), "lower": (4, 5)}.items():
        pairs, row = means(columns), results["csi"][part]
        true, said = pairs[~np.isnan(pairs).any(1)].T
        wanted = {
            "n": len(true), "n_not_gradable": (np.isnan(pairs[:, 1]) & ~np.isnan(pairs[:, 0])).sum(),
            "mean_true": true.mean(), "mean_predicted": said.mean(), "mae": abs(said - true).mean(),
            "pearson": np.corrcoef(true, said)[0, 1], "bias": (said - true).mean(), "sd": (said - true).std(ddof=1),
        }  # fmt: skip
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-10), part
    names = np.array(["low", "medium", "high", "not gradable"])
    pairs = means(range(6))
    level = np.where(np.isnan(pairs), 3, (pairs > 1.3).astype(int) + (pairs > 2.2))
    true, said = names[level].T
    ahf = results["ahf"]
    assert ahf["table"] == sk.confusion_matrix(true, said, labels=names).tolist()
    assert ahf["table"][2][3] >= 1 and true[8] == "not gradable" and ahf["n"] == 119
    graded, some = true != "not gradable", {"labels": names[:3], "average": "macro"}
    assert ahf["accuracy"] == pytest.approx((true == said)[graded].mean())
    assert ahf["f1_macro"] == pytest.approx(sk.f1_score(true[graded], said[graded], **some))

    ill, csi = films.diagnosis, pairs[:, 1]
    use = ~np.isnan(ill) & ~np.isnan(csi)
    row = results["diagnosis"]
    assert (row["n"], row["positives"], row["n_not_gradable"]) == (use.sum(), ill[use].sum(), 1)
    assert row["auroc"] == pytest.approx(sk.roc_auc_score(ill[use], csi[use]), rel=1e-12)
    for cut in ("1.3", "2.2"):
        above = csi[use] > float(cut)
        assert row["cutoffs"][cut]["sensitivity"] == pytest.approx(above[ill[use] == 1].mean())
        assert row["cutoffs"][cut]["specificity"] == pytest.approx(1 - above[ill[use] == 0].mean())
    for view, name in (("AP", "AP"), ("", "not known")):
        its = np.array([v == view for v in films.views])
        truth, severity = films.targets[its].ravel(), found["severity"][its].ravel()
        kappa = sk.cohen_kappa_score(*(x[truth != UNKNOWN] for x in (truth, severity)), weights="quadratic")
        assert results["views"][name]["qwk"] == pytest.approx(kappa, rel=1e-12)
        assert results["views"][name]["n_films"] == its.sum()


def test_second_reader_and_baseline(score):
    films = Films()
    results, found = score(films), train_csi.decide(films.probs, argparse.Namespace(loss="corn"))
    both = (films.targets != UNKNOWN) & (films.reader2 != UNKNOWN)
    second = results["second_reader"]
    assert second["n"] == both.sum()
    for name, scores in (("reader", films.reader2), ("model", found["severity"])):
        kappa = sk.cohen_kappa_score(films.targets[both], scores[both], weights="quadratic")
        assert second[name]["qwk"] == pytest.approx(kappa, rel=1e-12)
    assert second["reader"]["mae"] == pytest.approx(abs(films.targets - films.reader2)[both].mean())
    means = [np.where(both, x, 0).sum(1) / both.sum(1) for x in (films.reader2, films.targets)]
    assert second["reader"]["csi_mae"] == pytest.approx(abs(means[0] - means[1]).mean())
    assert second["reader"]["csi_icc"] == pytest.approx(common.agreement(*means)["icc"][0])
    graded, always = films.targets != UNKNOWN, np.tile([1, 1, 2, 2, 1, 0], (120, 1))
    assert results["baseline"]["mae"] == pytest.approx(abs(films.targets - always)[graded].mean())
    kappa = sk.cohen_kappa_score(films.targets[graded], always[graded], weights="quadratic")
    assert results["baseline"]["qwk"] == pytest.approx(kappa, rel=1e-12)


def test_calibration_against_sklearn(score):
    films = Films()
    graded = films.targets != UNKNOWN
    given = films.probs[graded][:, :4] / films.probs[graded][:, :4].sum(1, keepdims=True)
    for k, row in enumerate(score(films)["calibration"].values(), 1):
        y, p = films.targets[graded] >= k, given[:, k:].sum(1)
        assert row["positives"] == y.sum() and row["brier"] == pytest.approx(sk.brier_score_loss(y, p), rel=1e-12)


def test_intervals_are_over_patients(score):
    """By hand, resample for resample; and without them no number has one."""
    films = Films()
    row, found = score(films)["pooled"], train_csi.decide(films.probs, argparse.Namespace(loss="corn"))
    order = sorted(range(120), key=lambda i: films.ids[i])
    counts = common.bootstrap_counts([films.groups[i] for i in order], 20, 0)
    kappas = []
    for b in range(20):
        drawn = np.repeat(order, counts[:, b].astype(int))
        truth, said = films.targets[drawn].ravel(), found["severity"][drawn].ravel()
        known = truth != UNKNOWN
        kappas.append(sk.cohen_kappa_score(truth[known], said[known], weights="quadratic"))
    low, high = np.quantile(kappas, [0.025, 0.975])
    assert (row["qwk_low"], row["qwk_high"]) == pytest.approx((low, high), rel=1e-10)
    plain = score(films, "--no-bootstrap")
    assert plain["interval"] is None and plain["pooled"]["qwk"] == row["qwk"]
    text = json.dumps(numbers_of(plain))
    assert "_low" not in text.replace("loa_low", "") and "--no-bootstrap" not in text


def test_order_changes_nothing(score):
    films = Films()
    films.fail(3, 50)
    first = numbers_of(score(films, code=3))
    order = np.random.default_rng(1).permutation(120)
    for name in ("ids", "groups", "views"):
        setattr(films, name, [getattr(films, name)[i] for i in order])
    for name in ("targets", "reader2", "diagnosis", "probs"):
        setattr(films, name, getattr(films, name)[order])
    films.bad = {int(np.flatnonzero(order == i)[0]) for i in films.bad}
    again = numbers_of(score(films, code=3))
    for results in (first, again):
        results["failed"].sort(key=lambda one: one["id"])  # in the order of the data
    assert again == first


def test_perfect_is_one(score):
    films = Films()
    films.probs = np.eye(5)[films.targets]
    results = score(films)
    for row in (results["pooled"], *results["zones"].values(), results["zone_means"]):
        assert all(row[name] == 1 for name in ("qwk", "accuracy", "f1_macro", "f1_weighted", "gradable_auroc"))
        assert row["mae"] == row["off_2"] == 0
    assert results["csi"]["mean"]["icc"] == results["ahf"]["accuracy"] == results["ahf"]["f1_macro"] == 1


def test_undefined_is_null(score):
    """Nothing graded, or one score for all: null, said in a note, and the page is written all the same."""
    films = Films(second=False, diagnosis=False, views=False)
    films.targets[:] = UNKNOWN
    results = score(films, page=True)
    pooled = results["pooled"]
    assert pooled["n"] == 0 and pooled["n_unknown"] == 720
    assert all(pooled[m] is None for m in ("qwk", "mae", "exact", "accuracy", "f1_macro", "gradable_auroc"))
    assert results["csi"]["mean"]["n"] == results["ahf"]["n"] == 0 and results["csi"]["mean"]["icc"] is None
    assert results["diagnosis"] is results["views"] is results["second_reader"] is None
    assert any("No film has a graded zone" in note for note in results["notes"])
    assert "undefined" in (score.folder / "report.html").read_text()
    films.targets[:] = 2
    films.probs[:] = np.eye(5)[2]
    results = score(films)
    assert results["pooled"]["qwk"] is None and results["pooled"]["f1_macro"] == 1
    assert results["csi"]["mean"]["pearson"] is None and results["csi"]["mean"]["mae"] == 0
    assert any("Normal (0), Mild (0), Severe (0)" in note for note in results["notes"])


# ---- Files


def test_failed_films_are_in_no_number(score, capsys):
    films = Films()
    films.fail(7, 20)
    results = score(films, code=3, page=True)
    assert "2 of 120 cases failed to load" in capsys.readouterr().err
    assert results["failed"] == [{"id": f"film{i}", "reason": f"film{i}.png: no such film"} for i in (7, 20)]
    assert sum(map(sum, results["pooled"]["confusion"])) == 118 * 6 and results["n"] == 120
    predictions, labels = (pd.read_csv(score.folder / f"{name}.csv") for name in ("predictions", "labels"))
    assert predictions["FileID"].tolist() == labels["FileID"].tolist() == films.ids
    assert np.flatnonzero(predictions.drop(columns=["FileID", "patient", "view"]).isna().all(1)).tolist() == [7, 20]
    assert predictions["left_mid_prob_unknown"].isna().sum() == 2 and labels["csi"].notna().sum() > 118
    films.fail(*range(120))
    score(films, code=2)
    assert "none of 120 films could be read" in capsys.readouterr().err


def test_files_are_complete(score):
    """Probabilities, decisions and labels read back are what was scored."""
    films = Films()
    films.probs[4, :, UNKNOWN], films.probs[4, :, :4] = 0.9, 0.025
    films.ids[5] = "=cmd()"
    results = score(films, page=True)
    predictions, labels = (pd.read_csv(score.folder / f"{name}.csv") for name in ("predictions", "labels"))
    assert list(predictions.columns[:5]) == ["FileID", "patient", "view", "right_sup_prob_0", "right_sup_prob_1"]
    assert list(labels.columns) == ["FileID", "patient", "view", *train_csi.ZONES, "csi", "diagnosis"]
    columns = [f"{zone}_prob_{c}" for zone in train_csi.ZONES for c in (0, 1, 2, 3, "unknown")]
    np.testing.assert_allclose(predictions[columns].to_numpy().reshape(120, 6, 5), films.probs, rtol=1e-14)
    np.testing.assert_array_equal(labels[list(train_csi.ZONES)].fillna(UNKNOWN), films.targets)
    truth, said = labels["left_inf"].fillna(UNKNOWN), predictions["left_inf_pred"]
    table = results["zones"]["left_inf"]["confusion"]
    assert sk.confusion_matrix(truth, said, labels=range(5)).tolist() == table
    assert predictions.loc[4, "ahf_class"] == "not gradable" and np.isnan(predictions.loc[4, "csi"])
    assert abs(predictions["csi"] - labels["csi"]).mean() == pytest.approx(results["csi"]["mean"]["mae"])
    assert predictions.loc[5, "FileID"] == "'=cmd()"
    np.testing.assert_array_equal(labels["diagnosis"], films.diagnosis)


FLAGS = {
    "--threshold 0.5": "have no threshold",
    "--threshold-part 0.2": "have no threshold",
    "--retrieval": "no features of images and texts",
    "--linear-probe": "no features of images and texts",
    "--export-features f.npz": "no features of images and texts",
    "--label-columns a": "the labels of a checkpoint are fixed",
    "--zero-shot": "--zero-shot: not an option of planted_csi.py's checkpoints",
    "--templates t.txt": "--templates: not an option",
    "--slice-dir s": "--slice-dir: not an option",
}


@pytest.mark.parametrize("words", FLAGS)
def test_options_of_other_tasks_are_refused(score, capsys, words):
    score(Films(6), *words.split(), code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: --") and said.count("\n") == 1 and FLAGS[words] in said


# ---- Page


@pytest.fixture
def page(score):
    films = Films()
    films.ids[5], films.groups[5], films.views[5] = EVIL, EVIL, EVIL
    films.targets[5], films.probs[5] = 0, np.eye(5)[3]  # the largest error of all
    films.fail(7)
    films.bad.add(9)  # readable when it was scored, and gone when it is drawn
    films.targets[9], films.probs[9] = 3, np.eye(5)[0]
    score(films, code=3, page=True)
    return (score.folder / "report.html").read_text()


def test_page_is_escaped_and_closed(page):
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "<script" not in page and html.escape(EVIL) in page
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|javascript:| on\w+=", page, re.I)
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(s.startswith(("data:image/svg+xml;base64,", "data:image/jpeg;base64,")) for s in sources)
    assert sum("svg" in s for s in sources) == 7 + 2 + 3 + 1 and sum("jpeg" in s for s in sources) == 10
    assert 200e3 < len(page) < 5e6
    assert page.index("Before you use these numbers") < page.index("Zones: QWK") < page.index("Numbers by zone")


def test_page_shows_films_as_they_are(page, score):
    """Film, map of the worst zone over it, scores; a film that is gone is not made up."""
    section = page[page.index("Largest errors") :]
    first, second = section.split('<div class="film">')[1:3]
    gone, evil = (first, second) if "film9" in first else (second, first)
    assert "no film" in gone and "no map of right_sup" in gone and "<img" not in gone
    assert evil.count("<img") == 2 and evil.count("<b>0</b> → 3.0") == 6 and html.escape(EVIL) in evil
    plain, drawn = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
        for data in re.findall(r"jpeg;base64,([^\"]+)", evil)
    )
    assert abs(plain - drawn)[:80, :80].mean() > 20 and abs(plain - drawn)[150:, 150:].mean() < 2
    assert abs(plain[..., 0] - plain[..., 2]).mean() < 2 and abs(drawn[..., 0] - drawn[..., 2])[:80, :80].mean() > 20


def test_no_map_is_said(score):
    score(Films(), maps=False, page=True)
    page = (score.folder / "report.html").read_text()
    assert len(re.findall("no map of (right|left)_(sup|mid|inf)</span>", page)) == zones.SHOWN
    assert page.count("image/jpeg") == zones.SHOWN


def test_report_alone_refuses(score, tmp_path, capsys):
    score(Films(6), page=False)
    assert common.run_main(lambda: report.main(["--results", str(score.folder / "results.json")])) == 2
    assert "not a results file of evaluate.py with labels" in capsys.readouterr().err


# ---- A checkpoint


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folder of eight films, their labels, and a checkpoint whose weights are random."""
    folder, rng = tmp_path_factory.mktemp("csi"), np.random.default_rng(0)
    (folder / "images").mkdir()
    table = pd.DataFrame(rng.integers(0, 4, (8, 6)).astype(str), columns=train_csi.ZONES)
    table = table.mask(rng.random((8, 6)) < 0.2, "").assign(FileID=[f"c{i}" for i in range(8)], split="val")
    table["view"] = ["AP", "PA"] * 4
    table.to_csv(folder / "labels.csv", sep=";", index=False)
    for name in table["FileID"]:
        film = rng.integers(0, 256, (6, 5), np.uint8)
        Image.fromarray(film).resize((80, 96), Image.Resampling.BILINEAR).save(folder / "images" / f"{name}.png")
    words = ["--csv", folder / "labels.csv", "--image-dir", folder / "images", "--model", "Custom_1"]
    words += ["--image-size", "64", "--pretrained", "none", "--loss", "corn", "--num-workers", "0"]
    args = train_csi.parse_args([*map(str, words)])
    torch.manual_seed(0)
    model = train_csi.build_model(args, say=lambda *said: None)
    with torch.no_grad():  # batch norm as it is after training, or the maps would be of next to nothing
        model.train()(torch.rand(8, 1, 64, 64))
    saved = common.model_checkpoint("csi", args, model, {}) | {"zone_medians": [1] * 6}
    common.save_checkpoint(folder / "m.pth", saved)
    return folder


def test_checkpoint_end_to_end(untrained, tmp_path, capsys):
    """Real films and maps; another table of films, of which one is missing."""
    base = ["--test-only", str(untrained / "m.pth"), "--device", "cpu", "--n-bootstrap", "20"]
    assert common.run_main(lambda: evaluate.main([*base, "--output", str(tmp_path / "a")])) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["n"] == 8 and "chose the model:" in results["notes"][0] and set(results["views"]) == {"AP", "PA"}
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("image/jpeg") == 2 * zones.SHOWN and 'class="gone"' not in page.split("<body>")[1]
    assert "mean CSI: ICC" in capsys.readouterr().out

    table = pd.read_csv(untrained / "labels.csv", sep=";", dtype=str, keep_default_na=False).drop(columns="split")
    table.loc[2, "FileID"] = "gone"
    table.to_csv(tmp_path / "other.csv", index=False)
    words = [*base, "--csv", str(tmp_path / "other.csv"), "--output", str(tmp_path / "b" / "r.json")]
    assert common.run_main(lambda: evaluate.main([*words, "--image-dir", str(untrained / "images")])) == 3
    other = json.loads((tmp_path / "b" / "r.json").read_text())
    assert other["failed"][0]["id"] == "gone" and other["evaluated_on"] == "split 'all' of other.csv"
    assert not any("training" in note for note in other["notes"])
    first, second = (pd.read_csv(tmp_path / name / "predictions.csv").drop(index=2) for name in "ab")
    pd.testing.assert_frame_equal(first.drop(columns="patient"), second.drop(columns="patient"), check_dtype=False)
