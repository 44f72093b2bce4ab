"""Metrics: golden files, scikit-learn, the VLM3D scorer, really repeated rows, masks, and the bootstrap."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

import common
from common import bootstrap_counts, bootstrap_intervals, calibration_bins, crg_score, f1_thresholds, multilabel_metrics
from common import expected_calibration_error as ece

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files at {GOLDEN}")
NAMES = ["plain", "rare", "ties", "constant", "all_negative", "all_positive", "perfect", "inverted", "at_threshold"]
OUR_NAME = {"logloss": "log_loss", "pos": "positives"}
DIGITS = {"rtol": 1e-11, "atol": 1e-12}  # the files hold 12


def average_precision_of(y, s, w):
    return common._rank_metrics(np.asarray(y, bool), np.asarray(s, np.float64), common._by_resample(w))[1]


def golden_array(*args):
    sys.path.insert(0, str(GOLDEN))
    import golden as recipe

    sys.path.pop(0)
    return recipe.array(*args)


def golden_outputs(name="golden_metrics.json"):
    return json.loads((GOLDEN / name).read_text())["outputs"]


def golden_inputs():
    """Labels and scores (500, 9), as the `inputs` block of the file says."""
    size = (500, 9)
    y = golden_array("metrics.y", size).astype(float) > [0.5, 2, 0.3, 0.3, 99, -99, 0.4, 0.4, 0.2]
    s = np.round(1 / (1 + np.exp(-(golden_array("metrics.s", size).astype(float) + y - 0.5))), 4)
    s[:, 2] = np.round(s[:, 2], 1)
    s[:, 3] = 0.5
    s[:, 6] = np.where(y[:, 6], np.round(0.6 + 0.4 * s[:, 6], 4), np.round(0.4 * s[:, 6], 4))
    s[:, 7] = np.round(1 - s[:, 7], 4)
    s[::5, 8] = 0.5
    assert y.sum(0).tolist() == golden_outputs()["checksum"]["Y_sum"]
    np.testing.assert_allclose(s.sum(0), golden_outputs()["checksum"]["S_sum"])
    return y.astype(float), s


def golden_counts():
    """The file's row and patient resamples as counts, (500, 200) each."""
    rows = golden_array("metrics.boot", (200, 500), 0, 500)
    patient = golden_array("metrics.patient", (500,), 0, 140)
    groups, inverse = np.unique(patient, return_inverse=True)
    drawn = golden_array("metrics.boot_patient", (200, len(groups)), 0, len(groups))
    count = lambda lists, n: np.stack([np.bincount(x, minlength=n) for x in lists], 1).astype(float)  # noqa: E731
    return count(rows, 500), count(drawn, len(groups))[inverse]


def check(ours, expected, **tolerance):
    """Equal to 12 digits, null being NaN."""
    expected = np.array(expected, dtype=float)  # None -> NaN
    np.testing.assert_allclose(ours, expected, **(tolerance or DIGITS))


def check_labels(ours, expected_rows, names):
    compared = 0
    for row in expected_rows:
        for key in set(row) & names:
            check(ours[f"{row['name']}_{OUR_NAME.get(key, key)}"], row[key])
            compared += 1
    return compared


@needs_golden
def test_golden_per_label():
    y, s = golden_inputs()
    names = {"n", "pos", "auroc", "auprc", "precision", "recall", "f1", "specificity", "npv", "accuracy"}
    names |= {"balanced_accuracy", "mcc", "kappa", "brier", "logloss"}
    rows = golden_outputs()["per_label"]
    assert all(set(row) == names | {"name", "tp", "fp", "fn", "tn"} for row in rows)  # the counts: test_clinical.py
    assert check_labels(multilabel_metrics(y, s, NAMES), rows, names) == 9 * 15
    low = multilabel_metrics(y, s, NAMES, thresholds=0.3)
    assert check_labels(low, golden_outputs()["per_label_thr_0_3"], {"precision", "recall", "f1"}) == 9 * 3
    for k, row in enumerate(golden_outputs()["per_label"]):
        check(common.brier_score(y[:, k], s[:, k]), row["brier"])
        check(common.log_loss(y[:, k], s[:, k]), row["logloss"])


@needs_golden
def test_golden_thresholds_per_label():
    y, s = golden_inputs()
    mixed = multilabel_metrics(y, s, NAMES, thresholds=np.where(np.arange(9) % 2, 0.3, 0.5))
    at = {0: golden_outputs()["per_label"], 1: golden_outputs()["per_label_thr_0_3"]}
    for k, name in enumerate(NAMES):
        check(mixed[f"{name}_f1"], at[k % 2][k]["f1"])


@needs_golden
@pytest.mark.parametrize("masked", [False, True])
def test_golden_aggregate(masked):
    y, s = golden_inputs()
    expected = golden_outputs()["masked" if masked else "aggregate"]
    if masked:
        unknown = ~(golden_array("metrics.known", y.shape) > -1)
        y[unknown] = np.where(np.arange(9) % 2, np.nan, -1.0)[np.nonzero(unknown)[1]]  # both spellings
        ours = multilabel_metrics(y, s, NAMES)
        assert check_labels(ours, expected["per_label"], {"n", "pos", "auroc", "auprc", "f1"}) == 9 * 5
        expected = expected["aggregate"]
    else:
        ours = multilabel_metrics(y, s, NAMES)
    for key, value in expected.items():
        metric = key.removeprefix("n_defined_")
        if metric in ("precision", "recall", "f1", "specificity", "brier"):
            check(sum(not np.isnan(ours[f"{name}_{metric}"]) for name in NAMES), value)
        else:
            name = key.replace("_over_defined", "").replace("macro_brier", "brier").removeprefix("support_")
            check(ours[name], value)


@needs_golden
def test_golden_sample_weight():
    y, s = golden_inputs()
    counts = golden_counts()[0][:, :3]
    for name, function in (("auroc", common.weighted_auroc), ("auprc", average_precision_of)):
        ours = np.stack([function(y[:, k], s[:, k], counts) for k in range(9)], axis=1)
        check(ours, golden_outputs()["sample_weight"][name])


@needs_golden
def test_golden_bootstrap():
    y, s = golden_inputs()
    rows, patients = golden_counts()
    expected = golden_outputs()["bootstrap"]
    ours = bootstrap_intervals(y, s, NAMES, counts=rows)
    for metric in ("auroc", "auprc"):
        for k, name in enumerate(NAMES):
            check(ours[f"{name}_{metric}"], [expected[f"{metric}_q"]["lo"][k], expected[f"{metric}_q"]["hi"][k]])
    check(ours["macro_auroc"], [expected["macro_auroc"]["lo"], expected["macro_auroc"]["hi"]])
    arrays = common._metric_arrays(y, s, NAMES, 0.5, rows)
    check([common.mean_defined(arrays[f"{name}_auroc"]) for name in NAMES], expected["auroc_q"]["mean"])
    check(arrays["macro_auroc"][:5], expected["first5_macro"])
    check(arrays["macro_auroc"].mean(), expected["macro_auroc"]["mean"])
    check(arrays["macro_auroc"].std(ddof=1), expected["macro_auroc"]["std_ddof1"])
    assert [int(np.isnan(arrays[f"{name}_auroc"]).sum()) for name in NAMES] == expected["undefined"]

    expected = golden_outputs()["bootstrap_patient"]
    ours = bootstrap_intervals(y, s, NAMES, counts=patients)
    for k, name in enumerate(NAMES):
        check(ours[f"{name}_auroc"], [expected["auroc_q"]["lo"][k], expected["auroc_q"]["hi"][k]])
    check(ours["macro_auroc"], [expected["macro"]["lo"], expected["macro"]["hi"]])
    arrays = common._metric_arrays(y, s, NAMES, 0.5, patients)
    assert [int(np.isnan(arrays[f"{name}_auroc"]).sum()) for name in NAMES] == expected["undefined"]
    assert len(np.unique(golden_array("metrics.patient", (500,), 0, 140))) == expected["G"]


@needs_golden
def test_golden_calibration():
    y, s = golden_inputs()
    expected = golden_outputs()["calibration"]
    check([ece(y[:, k], s[:, k]) for k in range(9)], expected["ece"])
    check([ece(y[:, k], s[:, k], n_bins=10) for k in range(9)], expected["ece10"])
    ours = multilabel_metrics(y, s, NAMES)
    check(ours["ece"], np.mean(expected["ece"]))
    assert expected["ece"][7] != expected["ece_left_closed"][7]  # scores on an edge tell the two rules apart
    check([ece(y[:, k], s[:, k], closed="left") for k in range(9)], expected["ece_left_closed"])


@needs_golden
def test_golden_f1_thresholds():
    """The same decisions as the file's best threshold, which is the lowest score called positive."""
    y, s = golden_inputs()
    ours = f1_thresholds(y, s)
    at_best = multilabel_metrics(y, s, NAMES, thresholds=ours)
    for name, expected in golden_outputs()["operating_points"].items():
        k = NAMES.index(name)
        check(at_best[f"{name}_f1"], expected["f1max"])
        assert ((s[:, k] >= ours[k]) == (s[:, k] >= expected["f1max_thr"])).all()


@needs_golden
@pytest.mark.parametrize("tag", ["m1", "m2"])
def test_golden_challenge_scorer(tag):
    expected = golden_outputs("golden_task2_metrics.json")[tag]
    size = (expected["n"], 18)
    y = (golden_array(f"{tag}.labels", size).astype(float) > expected["label_threshold"]).astype(float)
    if expected["empty_class"] is not None:
        y[:, expected["empty_class"]] = 0
    p = np.round(1 / (1 + np.exp(-(golden_array(f"{tag}.scores", size).astype(float) + 1.2 * y - 0.5))), 6)
    assert y.sum() == expected["positives"] and p.sum() == pytest.approx(expected["probs_sum"])
    ours = multilabel_metrics(y, p, common.CT_RATE_LABELS)
    nine = {"rtol": 1e-8}
    for name, value in expected["classification_macro"].items():
        check(ours[f"macro_{name}"], value, **nine)
    for row in expected["per_pathology"]:
        for name in ("precision", "recall", "f1", "accuracy", "auroc"):
            check(ours[f"{row['name']}_{name}"], row[name], **nine)
    check(crg_score(y, p >= 0.5), expected["crg"]["CRG"], **nine)
    check(ours["crg"], expected["crg"]["CRG"], **nine)


# ---- against scikit-learn ----


def random_data(n=400, seed=0, decimals=1):
    """Five labels with many ties; probabilities that say something about them."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 5)) < [0.5, 0.1, 0.3, 0.9, 0.02]).astype(float)
    y[0, 4], y[1, 3] = 1, 0
    return y, np.round(1 / (1 + np.exp(-rng.normal(size=y.shape) - y)), decimals)


@pytest.mark.parametrize("decimals", [1, 2, 16])
@pytest.mark.parametrize("kind", ["counts", "fractions"])
def test_ranking_equals_sklearn(kind, decimals):
    y, p = random_data(decimals=decimals)
    rng = np.random.default_rng(1)
    w = rng.poisson(1, (400, 7)).astype(float) if kind == "counts" else rng.random((400, 7)) ** 3
    w[p[:, 0] == p[:, 0].max(), 0] = 0  # leading rows without weight
    for k in range(5):
        auroc = [sk.roc_auc_score(y[:, k], p[:, k], sample_weight=column) for column in w.T]
        auprc = [sk.average_precision_score(y[:, k], p[:, k], sample_weight=column) for column in w.T]
        np.testing.assert_allclose(common.weighted_auroc(y[:, k], p[:, k], w), auroc, rtol=0, atol=1e-12)
        np.testing.assert_allclose(average_precision_of(y[:, k], p[:, k], w), auprc, rtol=0, atol=1e-12)
        small = common._rank_metrics(
            y[:, k] == 1, p[:, k], common._by_resample(w), chunk_bytes=1
        )  # one column at a time
        np.testing.assert_allclose(small, (auroc, auprc), rtol=0, atol=1e-12)


def test_ranking_undefined():
    w = np.ones((4, 2))
    assert np.isnan(common.weighted_auroc([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], w)).all()
    assert np.isnan(common.weighted_auroc([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4], w)).all()
    assert np.isnan(average_precision_of([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], w)).all()
    assert (average_precision_of([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4], w) == 1).all()
    w[0, 0] = 0  # the only positive has no weight in the first column
    assert np.isnan(common.weighted_auroc([1, 0, 0, 0], [0.9, 0.2, 0.3, 0.4], w)).tolist() == [True, False]
    assert np.isnan(common.weighted_auroc(np.zeros(0), np.zeros(0), np.ones((0, 3)))).all()
    integers = np.array([3, 0, 2], np.uint8)  # unsigned scores must not wrap when negated
    assert common.weighted_auroc([1, 0, 0], integers, np.ones((3, 1))) == 1


def test_every_metric_equals_sklearn():
    y, p = random_data(decimals=2)
    names, thresholds = list("abcde"), np.array([0.5, 0.3, 0.62, 0.7, 0.4])
    ours = multilabel_metrics(y, p, names, thresholds)
    z = (p >= thresholds).astype(float)
    expected = {
        "macro_auroc": sk.roc_auc_score(y, p, average="macro"),
        "micro_auroc": sk.roc_auc_score(y, p, average="micro"),
        "macro_auprc": sk.average_precision_score(y, p, average="macro"),
        "micro_auprc": sk.average_precision_score(y, p, average="micro"),
        "macro_accuracy": np.mean([sk.accuracy_score(y[:, k], z[:, k]) for k in range(5)]),
        "macro_specificity": np.mean([sk.recall_score(y[:, k], z[:, k], pos_label=0) for k in range(5)]),
        "macro_npv": np.mean([sk.precision_score(1 - y[:, k], 1 - z[:, k]) for k in range(5)]),
        "macro_balanced_accuracy": np.mean([sk.balanced_accuracy_score(y[:, k], z[:, k]) for k in range(5)]),
        "macro_mcc": np.mean([sk.matthews_corrcoef(y[:, k], z[:, k]) for k in range(5)]),
        "macro_kappa": np.mean([sk.cohen_kappa_score(y[:, k], z[:, k]) for k in range(5)]),
        "micro_specificity": sk.recall_score(1 - y, 1 - z, average="micro"),
        "micro_npv": sk.precision_score(1 - y, 1 - z, average="micro"),
        "weighted_auroc": sk.roc_auc_score(y, p, average="weighted"),
        "weighted_auprc": sk.average_precision_score(y, p, average="weighted"),
        "exact_match": sk.accuracy_score(y, z),
        "hamming": sk.hamming_loss(y, z),
        "samples_f1": sk.f1_score(y, z, average="samples", zero_division=0),
        "brier": np.mean([sk.brier_score_loss(y[:, k], p[:, k]) for k in range(5)]),
        "log_loss": np.mean([sk.log_loss(y[:, k], p[:, k]) for k in range(5)]),
        "n_defined_auroc": 5,
        "n_defined_auprc": 5,
        "ece": np.mean([ece(y[:, k], p[:, k]) for k in range(5)]),
        "crg": crg_score(y, z),
    }
    for average in ("macro", "micro", "weighted"):
        for name, function in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
            expected[f"{average}_{name}"] = function(y, z, average=average, zero_division=0)
    for k, name in enumerate(names):
        a, b, c = y[:, k], p[:, k], z[:, k]
        expected |= {
            f"{name}_auroc": sk.roc_auc_score(a, b),
            f"{name}_auprc": sk.average_precision_score(a, b),
            f"{name}_f1": sk.f1_score(a, c, zero_division=0),
            f"{name}_precision": sk.precision_score(a, c, zero_division=0),
            f"{name}_recall": sk.recall_score(a, c, zero_division=0),
            f"{name}_specificity": sk.recall_score(a, c, pos_label=0),
            f"{name}_npv": sk.precision_score(1 - a, 1 - c),
            f"{name}_balanced_accuracy": sk.balanced_accuracy_score(a, c),
            f"{name}_mcc": sk.matthews_corrcoef(a, c),
            f"{name}_kappa": sk.cohen_kappa_score(a, c),
            f"{name}_accuracy": sk.accuracy_score(a, c),
            f"{name}_brier": sk.brier_score_loss(a, b),
            f"{name}_log_loss": sk.log_loss(a, b),
            f"{name}_ece": ece(a, b),
            f"{name}_n": 400,
            f"{name}_positives": a.sum(),
        }
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
        assert type(ours[name]) is float


def test_crg_is_a_third_without_information():
    y = random_data()[0]
    for guess in (np.zeros_like(y), np.ones_like(y)):
        assert crg_score(y, guess) == pytest.approx(1 / 3)
    assert crg_score(y, y) == 1
    assert np.isnan(crg_score(np.zeros((4, 2)), np.ones((4, 2))))
    y[:3], y[3:5] = np.nan, -1
    assert crg_score(y, np.ones_like(y)) == pytest.approx(1 / 3)


# ---- unknown labels, weights ----


def with_unknowns():
    y, p = random_data(decimals=2)
    hidden = np.random.default_rng(2).random(y.shape) < 0.3
    hidden[:4] = True  # rows with nothing known
    y[hidden] = np.random.default_rng(3).choice([np.nan, -1, -0.5], hidden.sum())
    return y, p, ~hidden


def test_unknown_equals_dropping():
    y, p, known = with_unknowns()
    ours = multilabel_metrics(y, p, list("abcde"))
    np.testing.assert_equal(multilabel_metrics(y, np.where(known, p, 0.987), list("abcde")), ours)
    for k, name in enumerate("abcde"):
        alone = multilabel_metrics(y[known[:, k], k, None], p[known[:, k], k, None], [name])
        for key in (key for key in alone if key.startswith(f"{name}_")):
            assert ours[key] == pytest.approx(alone[key], abs=1e-12), key
    pooled = multilabel_metrics(y[known][:, None], p[known][:, None], ["all"])
    for key in ("micro_auroc", "micro_auprc", "micro_f1", "micro_precision", "micro_recall", "crg", "hamming"):
        assert ours[key] == pytest.approx(pooled[key], abs=1e-12), key
    support = [ours[f"{name}_positives"] for name in "abcde"]
    for metric in ("auroc", "auprc", "f1", "precision", "recall"):
        values = [ours[f"{name}_{metric}"] for name in "abcde"]
        assert ours[f"weighted_{metric}"] == pytest.approx(np.average(values, weights=support)), metric
    rows = [sk.f1_score(y[i][known[i]], p[i][known[i]] >= 0.5, zero_division=0) for i in np.flatnonzero(known.any(1))]
    assert ours["samples_f1"] == pytest.approx(np.mean(rows))
    right = [((p[i] >= 0.5) == y[i])[known[i]].all() for i in np.flatnonzero(known.any(1))]
    assert ours["exact_match"] == pytest.approx(np.mean(right))
    for function in (ece, common.brier_score, common.log_loss):
        assert function(y, p) == pytest.approx(function(y[known], p[known]))
    assert (f1_thresholds(y, p)[0] == f1_thresholds(y[known[:, 0], :1], p[known[:, 0], :1])).all()


def test_label_without_any_known_entry():
    y, p = random_data()
    y[:, 2] = np.nan
    ours = multilabel_metrics(y, p, list("abcde"))
    assert np.isnan(
        [ours[f"c_{name}"] for name in ("auroc", "auprc", "f1", "recall", "accuracy", "brier", "ece")]
    ).all()
    assert ours["c_n"] == 0 and ours["n_defined_auroc"] == 4
    rest = multilabel_metrics(np.delete(y, 2, 1), np.delete(p, 2, 1), list("abde"))
    for key in ("macro_auroc", "macro_f1", "macro_accuracy", "micro_auroc", "brier", "ece", "exact_match", "crg"):
        assert ours[key] == pytest.approx(rest[key]), key
    nothing = multilabel_metrics(np.full((3, 1), np.nan), np.full((3, 1), 0.5), ["x"])
    assert np.isnan(nothing["macro_auroc"]) and np.isnan(nothing["exact_match"]) and np.isnan(nothing["crg"])


def test_weights_equal_repeated_rows():
    y, p, _ = with_unknowns()
    counts = np.random.default_rng(4).poisson(1, len(y))
    ours = multilabel_metrics(y, p, list("abcde"), 0.4, weights=counts)
    repeated = multilabel_metrics(np.repeat(y, counts, 0), np.repeat(p, counts, 0), list("abcde"), 0.4)
    for key, value in repeated.items():
        assert ours[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([[1, 0]], [[0.5, np.nan]], "finite"),
        ([[1, 0]], [[0.5, 1.5]], "sigmoid"),
        ([[1, 0.5]], [[0.5, 0.5]], "0 or 1"),
        ([[1, 2]], [[0.5, 0.5]], "0 or 1"),
        ([[1, 0], [0, 1]], [[0.5, 0.5]], "must be"),
        ([[1, 0, 1]], [[0.5, 0.5, 0.5]], "must be"),
    ],
)
def test_bad_input_is_refused(y, p, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(np.array(y), np.array(p), ["a", "b"])


# ---- bootstrap ----


def test_bootstrap_counts_draw_whole_groups():
    groups = np.random.default_rng(0).integers(0, 40, 200).astype(str)
    counts = bootstrap_counts(groups, 500, seed=3)
    assert counts.shape == (200, 500) and counts.dtype == np.float64
    per_group = np.stack([counts[groups == g] for g in np.unique(groups)[:1]])[0]
    assert (per_group == per_group[0]).all()
    first = [np.flatnonzero(groups == g)[0] for g in np.unique(groups)]
    assert (counts[first].sum(0) == len(first)).all()  # as many patients as there are
    assert abs(counts[first].mean() - 1) < 1e-12 and abs(counts[first].var() - (1 - 1 / len(first))) < 0.02
    assert (counts == bootstrap_counts(groups, 500, seed=3)).all()
    assert (counts != bootstrap_counts(groups, 500, seed=4)).any()
    assert (counts[first, 0] != counts[first, 1]).any()


def test_intervals_equal_one_resample_at_a_time():
    y, p, _ = with_unknowns()
    y[5:, 4] = np.where(y[5:, 4] == 1, 0, y[5:, 4])  # a label with very few positives: undefined in some resamples
    y[4, 4] = 1
    names, groups = list("abcde"), np.arange(len(y)) // 3
    ours = bootstrap_intervals(y, p, names, 0.4, groups, n_resamples=60, seed=5, level=0.9)
    counts = bootstrap_counts(groups, 60, 5)
    one_by_one = [multilabel_metrics(y, p, names, 0.4, weights=column) for column in counts.T]
    assert set(ours) == set(one_by_one[0])
    dropped = 0
    for name, interval in ours.items():
        values = np.array([row[name] for row in one_by_one])
        dropped += np.isnan(values).any()
        assert interval == pytest.approx(np.nanquantile(values, [0.05, 0.95]), abs=1e-12), name
    assert dropped


def test_patients_widen_the_interval():
    """Ten copies of every row are no new evidence: rows would say so, patients must not."""
    y, p = random_data(100, decimals=3)
    many = np.repeat(y, 10, 0), np.repeat(p, 10, 0), list("abcde")
    patient = np.repeat(np.arange(100), 10)
    true = np.subtract(*bootstrap_intervals(y, p, list("abcde"))["macro_auroc"])
    grouped = np.subtract(*bootstrap_intervals(*many, groups=patient)["macro_auroc"])
    rows = np.subtract(*bootstrap_intervals(*many)["macro_auroc"])
    assert grouped == pytest.approx(true, rel=1e-9) and abs(rows) < abs(true) / 2


def test_interval_of_an_undefined_metric():
    y, p = random_data()
    y[:, 0] = 0
    intervals = bootstrap_intervals(y, p, list("abcde"), n_resamples=20)
    assert np.isnan(intervals["a_auroc"]).all() and np.isfinite(intervals["macro_auroc"]).all()


# ---- thresholds, calibration ----


def test_f1_thresholds_are_the_best_of_all():
    y, p = random_data(decimals=2)
    ours = f1_thresholds(y, p)
    for k in range(5):
        every = np.unique(np.concatenate([p[:, k], [0, 1]]))
        best = max(sk.f1_score(y[:, k], p[:, k] >= t, zero_division=0) for t in every)
        assert sk.f1_score(y[:, k], p[:, k] >= ours[k]) == pytest.approx(best)
        assert not (p[:, k] == ours[k]).any() and 0 < ours[k] < 1
    y[:, 1], y[:, 2], y[:, 3] = 0, np.nan, 1
    assert f1_thresholds(y, p)[[1, 2]].tolist() == [0.5, 0.5]
    assert (p[:, 3] >= f1_thresholds(y, p)[3]).all()
    assert f1_thresholds([[1], [0], [1], [0]], [[0.9], [0.8], [0.4], [0.2]]).tolist() == pytest.approx([0.3])
    assert f1_thresholds([[1.0], [1.0]], [[0.0], [0.0]]).tolist() == [0]


def test_calibration_bins_close_on_the_right():
    bins = calibration_bins([0, 1, 1, 0, np.nan, 1, -1], [0.0, 0.2, 0.2001, 0.6, 0.6, 1.0, 1.0], n_bins=5)
    assert bins["count"].tolist() == [2, 1, 1, 0, 1]
    np.testing.assert_allclose(bins["frequency"], [0.5, 1, 0, np.nan, 1])
    np.testing.assert_allclose(bins["mean_prob"], [0.1, 0.2001, 0.6, np.nan, 1])
    edges = np.arange(16) / 15
    assert calibration_bins(np.ones(16), edges)["count"].tolist() == [2] + [1] * 14


def test_calibration_of_nothing_is_undefined():
    assert all(np.isnan(f([np.nan], [0.5])) for f in (ece, common.brier_score, common.log_loss))
    assert common.log_loss([1, 0], [0.0, 0.0]) == pytest.approx(-np.log(np.finfo(float).eps) / 2)


def test_crg_thresholds_are_the_best_of_all():
    """Against every combination of cuts of three small labels; where every cut costs more than it gains: none."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        y = (rng.random((12, 3)) < [0.5, 0.3, 0.2]).astype(float)
        y[0] = 1
        p = np.round(rng.random((12, 3)) * 0.8 + 0.15 * y, 2)
        cuts = [[*np.unique(p[:, k]), 2.0] for k in range(3)]
        best = max(crg_score(y, p >= np.array([a, b, c])) for a in cuts[0] for b in cuts[1] for c in cuts[2])
        assert crg_score(y, p >= common.crg_thresholds(y, p)) == pytest.approx(best, abs=1e-12)
    y = np.zeros((100, 2))
    y[:50, 0] = 1
    y[0, 1] = 1  # one positive, below every negative
    p = np.column_stack([np.linspace(1, 0, 100), np.linspace(0.1, 0.9, 100)])
    assert not (p[:, 1] >= common.crg_thresholds(y, p)[1]).any()
    assert (common.crg_thresholds(np.full((4, 1), np.nan), np.full((4, 1), 0.3)) == 0.5).all()


def test_folded_thresholds_keep_decisions_and_rankings():
    """p >= t before is p >= 0.5 after, to the last bit; the map rises, 0 and 1 stay; thresholds at the ends too."""
    rng = np.random.default_rng(0)
    for t in (1e-9, 0.1, 1 / 3, 0.5, 0.93, 1.0):
        p = np.sort(np.concatenate([rng.random(2000), [0, t, np.nextafter(t, 0), 1]]))[:, None]
        folded = common.fold_thresholds(p, [t])
        assert ((folded >= 0.5) == (p >= t)).all() and (np.diff(folded[:, 0]) >= 0).all()
        assert folded[0] == 0 and folded[-1] == 1


# ---- every value of the golden file ----

COVERED = {  # path in "outputs": the test that compares it
    "checksum": "test_metrics.py::golden_inputs",
    "per_label": "test_metrics.py::test_golden_per_label",  # its counts: test_clinical.py::test_golden_scores
    "aggregate": "test_metrics.py::test_golden_aggregate",
    "per_label_thr_0_3": "test_clinical.py::test_golden_scores",
    "masked": "test_metrics.py::test_golden_aggregate",
    "sample_weight": "test_metrics.py::test_golden_sample_weight",
    "bootstrap": "test_metrics.py::test_golden_bootstrap",
    "bootstrap_patient": "test_metrics.py::test_golden_bootstrap",
    "calibration/bins": "test_clinical.py::test_golden_calibration",
    "calibration/binning": "test_metrics.py::test_calibration_bins_close_on_the_right",
    "calibration/left_closed_binning": "test_metrics.py::test_golden_calibration",
    "calibration/ece": "test_metrics.py::test_golden_calibration",
    "calibration/ece10": "test_metrics.py::test_golden_calibration",
    "calibration/ece_left_closed": "test_metrics.py::test_golden_calibration",
    "calibration/mce": "test_clinical.py::test_golden_calibration",
    "calibration/adaptive_ece15_label0_1": "test_clinical.py::test_golden_calibration",
    "calibration/slope_label0": "test_clinical.py::test_golden_calibration",
    "calibration/intercept_joint_label0": "test_clinical.py::test_golden_calibration",
    "calibration/calibration_in_the_large_label0": "test_clinical.py::test_golden_calibration",
    "operating_points": "test_clinical.py::test_golden_operating_points",  # f1max: test_golden_f1_thresholds here
    "decision_curve_label0": "test_clinical.py::test_golden_decision_curve",
    "delong": "test_clinical.py::test_golden_delong",
    "multiclass/full": "test_clinical.py::test_golden_classes",
    "multiclass/class2_absent_from_truth": "test_clinical.py::test_golden_classes",
    "multiclass/csi_expected_score_over_0_3": "test_ordinal.py::test_agreement_of_golden_expected_scores",
    "multiclass/temperature": "test_clinical.py::test_golden_temperature",
    "retrieval": "test_retrieval.py::test_golden",
    "proportions": "test_clinical.py::test_golden_proportions",
    "multiple_tests": "test_clinical.py::test_golden_multiple_tests",
    "mcnemar_exact": "test_clinical.py::test_golden_multiple_tests",
}


@needs_golden
def test_no_golden_value_is_forgotten():
    def leaves(value, path=""):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}/{key}" if path else key)
        else:
            yield path

    missing = {path for path in leaves(golden_outputs()) if not any(f"{path}/".startswith(f"{p}/") for p in COVERED)}
    assert not missing
    for path, test in COVERED.items():
        file, name = test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), (path, test)
        assert any(f"{leaf}/".startswith(f"{path}/") for leaf in leaves(golden_outputs())), path
