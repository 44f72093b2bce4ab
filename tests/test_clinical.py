"""clinical.py, and what evaluate.score makes of it: golden file, scipy, scikit-learn, slow formulas, limits."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, log_softmax, logit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from test_metrics import NAMES, OUR_NAME, check, golden_array, golden_inputs, golden_outputs, needs_golden

import clinical
import common
import evaluate
from cases import Cases


def cases_of(y, p, names, thresholds=0.5, groups=None) -> Cases:
    ids = [f"{i:05d}" for i in range(len(y))]
    return Cases(
        ids=ids,
        groups=ids if groups is None else groups,
        class_names=names,
        targets=y,
        probs=p,
        failed={},
        thresholds=np.full(len(names), thresholds),
        thresholds_source="",
        evaluated="",
        evaluated_on="",
        notes=[],
        files={},
    )


# ---- results.json ----


@needs_golden
def test_golden_scores():
    """Through evaluate.score: every number of a label, at two thresholds; averages; counts."""
    y, s = golden_inputs()
    for key, threshold in (("per_label", 0.5), ("per_label_thr_0_3", 0.3)):
        scored = evaluate.score(cases_of(y, s, NAMES, threshold), 0, 0)
        for row in golden_outputs()[key]:
            for name in set(row) - {"name"}:
                check(scored["per_label"][row["name"]][OUR_NAME.get(name, name)], row[name])
    scored, expected = evaluate.score(cases_of(y, s, NAMES), 0, 0), golden_outputs()["aggregate"]
    check(scored["weighted"]["f1"], expected["weighted_f1"])
    check(scored["weighted"]["auroc"], expected["support_weighted_auroc_over_defined"])
    for name in ("samples_f1", "hamming", "exact_match"):
        check(scored["overall"][name], expected[name])
    check(scored["per_label"]["plain"]["calibration"]["slope"], golden_outputs()["calibration"]["slope_label0"])
    expected = golden_outputs()["decision_curve_label0"]
    check([scored["per_label"]["plain"]["net_benefit"][t]["model"] for t in expected],
          [expected[t]["model"] for t in expected])  # fmt: skip


def test_score_is_complete_and_json():
    """Every label has every key, defined or not; unknown labels and other patients' cases are in no number."""
    rng = np.random.default_rng(0)
    y, p = (rng.random((90, 4)) < 0.4).astype(float), rng.random((90, 4))
    y[:, 1], y[:, 2], y[:, 3] = 0, np.nan, 1
    y[:20, 0] = np.nan
    groups = [f"p{i % 30}" for i in range(90)]
    scored = common.json_safe(evaluate.score(cases_of(y, p, list("abcd"), groups=groups), 20, 0))
    first, *others = (set(row) for row in scored["per_label"].values())
    assert first >= {"npv_low", "mcc_high", "auroc_delong_low", "operating_points", "calibration", "net_benefit", "tp"}
    assert all(keys == first for keys in others)
    assert {f"{name}{end}" for name in evaluate.WEIGHTED for end in ("", "_low", "_high")} == set(scored["weighted"])
    assert {"hamming_low", "samples_f1_high"} <= set(scored["overall"])
    row, known = scored["per_label"]["a"], slice(20, None)
    _, covariance = clinical.delong(y[known, 0], p[known, :1], groups[known])
    low, high = clinical.delong_interval(row["auroc"], covariance[0, 0])
    assert row["auroc_delong_low"] == pytest.approx(low) and row["auroc_delong_high"] == pytest.approx(high)
    assert row["tp"] + row["fp"] == row["flagged"] and row["tp"] + row["fp"] + row["fn"] + row["tn"] == row["n"] == 70
    for name in "bcd":
        row = scored["per_label"][name]
        assert row["operating_points"] == [] and row["auroc_delong_low"] is None
        assert row["calibration"]["slope"] is None and row["mcc"] is None
    assert scored["per_label"]["c"]["net_benefit"]["0.5"] == {"model": None, "treat_all": None}
    shuffled = rng.permutation(90)
    cases = cases_of(y[shuffled], p[shuffled], list("abcd"), groups=[groups[i] for i in shuffled])
    cases.ids = [f"{i:05d}" for i in shuffled]
    assert common.json_safe(evaluate.score(cases, 20, 0)) == scored  # in any order, to the last digit


# ---- DeLong ----


@needs_golden
def test_golden_delong():
    expected, noise = golden_outputs()["delong"], golden_array("delong.s", (200, 3)).astype(float)
    y = (golden_array("delong.y", (200,)) > 0.4).astype(float)
    first = expit(1.3 * y - 0.6 + 0.8 * noise[:, 0] + 0.7 * noise[:, 2])
    second = expit(0.9 * y - 0.5 + 0.8 * noise[:, 1] + 0.7 * noise[:, 2])
    scores = np.round(np.stack([first, second], 1), 2)
    assert y.sum() == expected["n_pos"]
    for groups in (None, [f"patient {i}" for i in np.random.default_rng(0).permutation(200)]):
        auc, covariance = clinical.delong(y, scores, groups)
        check(auc, expected["auc"])
        check(covariance, expected["cov"])
    z = (auc[0] - auc[1]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    check(z, expected["z"])
    check(2 * stats.norm.sf(abs(z)), expected["p"])
    check(np.stack(clinical.delong_interval(auc, np.diag(covariance)), 1), expected["ci95_logit"])
    half = stats.norm.ppf(0.975) * np.sqrt(np.diag(covariance))
    check(np.stack([auc - half, auc + half], 1), expected["ci95_wald"])


def slow_obuchowski(y, scores, groups):
    """Obuchowski (1997), section 2: sums over pairs and over patients, as printed."""
    x, w = scores[y == 1], scores[y == 0]
    psi = (x[:, None] > w).astype(float) + 0.5 * (x[:, None] == w)  # (m, n, M)
    theta, v10, v01 = psi.mean((0, 1)), psi.mean(1), psi.mean(0)
    m, n, names = len(x), len(w), sorted(set(groups))
    with_positive, with_negative = (len(set(groups[y == side])) for side in (1, 0))
    s10 = s01 = s11 = 0.0
    for name in names:
        a, b = v10[groups[y == 1] == name], v01[groups[y == 0] == name]
        a, b = a.sum(0) - len(a) * theta, b.sum(0) - len(b) * theta
        s10, s01, s11 = s10 + np.outer(a, a), s01 + np.outer(b, b), s11 + np.outer(a, b)
    s10 *= with_positive / ((with_positive - 1) * m)
    s01 *= with_negative / ((with_negative - 1) * n)
    s11 *= len(names) / (len(names) - 1)
    return theta, s10 / m + s01 / n + (s11 + s11.T) / (m * n)


def clustered(n=120, patients=45):
    rng = np.random.default_rng(3)
    groups = rng.integers(0, patients, n)
    own = rng.normal(size=patients)[groups]  # what the cases of a patient share
    y = (own + rng.normal(size=n) > 0.3).astype(float)
    scores = np.stack([own + 0.8 * y, 0.5 * own - y, y], 1) + rng.normal(size=(n, 3)) * [1, 1, 0.4]
    return y, scores.round(1), groups.astype(str)


def test_delong_of_patients_is_obuchowskis_formula():
    y, scores, groups = clustered()
    for of in (groups, np.arange(len(y)).astype(str)):
        auc, covariance = clinical.delong(y, scores, of)
        theta, expected = slow_obuchowski(y, scores, of)
        np.testing.assert_allclose(auc, [sk.roc_auc_score(y, s) for s in scores.T], atol=1e-13)
        np.testing.assert_allclose(auc, theta, atol=1e-13)
        np.testing.assert_allclose(covariance, expected, rtol=1e-10, atol=1e-16)
    counts = common.bootstrap_counts(groups, 2000, 0)
    spread = common.weighted_auroc(y, scores[:, 0], counts).std()
    assert np.sqrt(clinical.delong(y, scores, groups)[1][0, 0]) == pytest.approx(spread, rel=0.1)


def test_copies_of_a_patient_are_no_evidence():
    """Every case three times under one patient: the variance of a single copy; as if of three patients: a third."""
    y, scores, _ = clustered()
    thrice, who = np.repeat(np.arange(len(y)), 3), np.repeat(np.arange(len(y)), 3)
    once = clinical.delong(y, scores)[1]
    np.testing.assert_allclose(clinical.delong(y[thrice], scores[thrice], who)[1], once, rtol=1e-12, atol=1e-18)
    ratio = np.diag(once) / np.diag(clinical.delong(y[thrice], scores[thrice])[1])
    assert ((ratio > 2.95) & (ratio < 3.2)).all()


def test_delong_undefined_and_at_the_ends():
    for y in (np.zeros(4), np.ones(4), np.zeros(0)):
        auc, covariance = clinical.delong(y, np.zeros((len(y), 2)))
        assert np.isnan(auc).all() and np.isnan(covariance).all() and covariance.shape == (2, 2)
    auc, covariance = clinical.delong([1, 0, 0], [[3], [1], [2]])
    assert auc == 1 and np.isnan(covariance).all()  # of one positive no variance
    auc, covariance = clinical.delong([1, 1, 0, 0], [[3], [4], [1], [2]], ["a", "a", "b", "c"])
    assert auc == 1 and np.isnan(covariance).all()  # of one patient's positives neither
    auc, covariance = clinical.delong([1, 1, 0, 0], [[3, 1], [4, 0], [1, 3], [2, 4]])
    assert auc.tolist() == [1, 0] and not covariance.any()
    low, high = clinical.delong_interval([1, 0, 0.5, 1, np.nan], [0, 0, 0, np.nan, np.nan])
    np.testing.assert_array_equal(low, [1, 0, 0.5, np.nan, np.nan])
    np.testing.assert_array_equal(high, low)
    low, high = clinical.delong_interval(0.97, 0.001, level=0.9)
    half = 1.6448536269514722 * np.sqrt(0.001) / (0.97 * 0.03)  # delta method: d logit(a) / da = 1 / (a (1 - a))
    assert [logit(low), logit(high)] == pytest.approx([logit(0.97) - half, logit(0.97) + half])


# ---- proportions and tests ----


@needs_golden
def test_golden_proportions():
    rows = golden_outputs()["proportions"]
    k, n = np.array([[row["k"], row["n"]] for row in rows]).T
    check(np.stack(clinical.wilson_interval(k, n), 1), [row["wilson"] for row in rows])
    for row in rows:
        check(stats.binomtest(row["k"], row["n"]).proportion_ci(method="exact"), row["clopper_pearson"])


def test_wilson_against_scipy():
    for k, n, level in itertools.product((0, 1, 5, 9, 10), (10,), (0.8, 0.95, 0.99)):
        expected = stats.binomtest(k, n).proportion_ci(level, "wilson")
        assert clinical.wilson_interval(k, n, level) == pytest.approx(expected, abs=1e-12)
    assert clinical.wilson_interval(0, 7)[0] == 0 and clinical.wilson_interval(7, 7)[1] == 1
    assert np.isnan(clinical.wilson_interval([0, 1], [0, 2])).tolist() == [[True, False], [True, False]]


@needs_golden
def test_golden_multiple_tests():
    expected = golden_outputs()["multiple_tests"]
    check(clinical.holm(expected["p"]), expected["holm"])
    check(stats.false_discovery_control(expected["p"]), expected["bh"])
    expected = golden_outputs()["mcnemar_exact"]
    check(clinical.mcnemar(expected["b"], expected["c"]), expected["p"])


def test_holm_and_mcnemar_at_their_limits():
    p = [0.03, np.nan, 0.01, 0.9, 0.9]
    np.testing.assert_allclose(clinical.holm(p), [0.09, np.nan, 0.04, 1, 1])
    assert p[0] == 0.03 and clinical.holm([0.2]) == [0.2] and clinical.holm([]).tolist() == []
    assert clinical.mcnemar(0, 0) == 1 and clinical.mcnemar(0, 5) == clinical.mcnemar(5, 0) == pytest.approx(1 / 16)


# ---- operating points, benefit ----


@needs_golden
def test_golden_operating_points():
    y, s = golden_inputs()
    for name, expected in golden_outputs()["operating_points"].items():
        k, compared = NAMES.index(name), 4  # of which f1max is in test_metrics.py
        for point in clinical.operating_points(y[:, k], s[:, k]):
            own, other = ("sens", "spec") if point["at"] == "sensitivity" else ("spec", "sens")
            value = point["specificity" if own == "sens" else "sensitivity"]
            check(value, expected[f"{other}_at_{own}_{point['target']}"])
            check(point["threshold"], expected[f"thr_at_{own}_{point['target']}"])
            compared += 2
            if own == "sens":
                check(point["sensitivity"], expected[f"sens_reached_{point['target']}"])
                compared += 1
        assert compared == len(expected)
        fpr, tpr, thresholds = sk.roc_curve(y[:, k], s[:, k], drop_intermediate=False)
        check(max(tpr - fpr), expected["youden_J"])
        assert thresholds[np.argmax(tpr - fpr)] == expected["youden_thr"]


def test_operating_points_are_the_best_of_all():
    """Against every threshold; with ties, and where nothing but flagging nobody reaches a specificity."""
    rng = np.random.default_rng(1)
    for decimals in (1, 2):
        y = rng.random(60) < 0.4
        p = np.round(np.clip(rng.random(60) * 0.7 + 0.3 * y, 0, 1), decimals)
        for point in clinical.operating_points(y, p):
            every = {t: (np.mean(p[y] >= t), np.mean(p[~y] < t)) for t in [*np.unique(p), np.inf]}
            side = 0 if point["at"] == "sensitivity" else 1
            reached = {t: pair for t, pair in every.items() if pair[side] >= point["target"] - 1e-12}
            best = max(pair[1 - side] for pair in reached.values())
            assert every[point["threshold"]] == (point["sensitivity"], point["specificity"])
            assert (point["sensitivity"], point["specificity"])[1 - side] == best
            said = p >= point["threshold"]
            assert point["npv"] == pytest.approx(np.mean(~y[~said])) if (~said).any() else np.isnan(point["npv"])
            assert point["ppv"] == pytest.approx(np.mean(y[said]))
    points = clinical.operating_points([1, 0, 0, 1], [0.5] * 4)
    assert [x["threshold"] for x in points] == [0.5] * 3 + [np.inf] * 3
    assert (
        points[0]["specificity"] == points[3]["sensitivity"] == 0
        and np.isnan([points[0]["npv"], points[3]["ppv"]]).all()
    )
    assert clinical.operating_points([1, 1], [0.2, 0.3]) == clinical.operating_points([], []) == []


@needs_golden
def test_golden_decision_curve():
    y, s = golden_inputs()
    expected = golden_outputs()["decision_curve_label0"]
    model, everybody = clinical.net_benefit(y[:, 0], s[:, 0], [float(risk) for risk in expected])
    check(model, [row["model"] for row in expected.values()])
    check(everybody, [row["treat_all"] for row in expected.values()])


def test_net_benefit_by_counting():
    y, p = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.2, 0.5, 0.5, 0.1])
    model, everybody = clinical.net_benefit(y, p, [0, 0.2, 0.5, 0.95])
    assert model == pytest.approx([2 / 5, 2 / 5 - 2 / 5 / 4, 1 / 5 - 2 / 5, 0])
    assert everybody == pytest.approx([2 / 5, 2 / 5 - 3 / 5 / 4, 2 / 5 - 3 / 5, 2 / 5 - 3 / 5 * 19])
    assert np.isnan(clinical.net_benefit([], [])).all()


# ---- calibration ----


@needs_golden
def test_golden_calibration():
    y, s = golden_inputs()
    expected = golden_outputs()["calibration"]
    ours = [clinical.calibration(y[:, k], s[:, k]) for k in range(9)]
    check([row["mce"] for row in ours], expected["mce"])
    assert len(common.calibration_bins(y, s)["count"]) == expected["bins"]
    check(ours[0]["ece_adaptive"], expected["adaptive_ece15_label0_1"][0])
    check(ours[0]["slope"], expected["slope_label0"])
    check(ours[0]["intercept"], expected["intercept_joint_label0"])
    check(ours[0]["in_the_large"], expected["calibration_in_the_large_label0"])


def test_calibration_slope_against_sklearn():
    rng = np.random.default_rng(2)
    for n, scale in ((60, 1), (3000, 4), (3000, 0.1)):
        z = rng.normal(size=n) * scale - 1
        y = (rng.random(n) < expit(0.7 * z + 0.5)).astype(float)
        p = expit(z)
        p[:2], y[:4] = [0, 1], [1, 0, 0, 1]  # clipped, both wrong
        ours, x = clinical.calibration(y, p), logit(np.clip(p, 1e-7, 1 - 1e-7))
        fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(x[:, None], y)
        assert [ours["slope"], ours["intercept"]] == pytest.approx([fit.coef_.item(), fit.intercept_.item()], abs=1e-6)
        residual = y - expit(ours["slope"] * x + ours["intercept"])  # what defines the fit
        assert abs(residual.sum()) < 1e-9 * n and abs((residual * x).sum()) < 1e-9 * n
        assert expit(x + ours["in_the_large"]).mean() == pytest.approx(y.mean(), abs=1e-12)


def test_calibration_slope_of_scores_that_hardly_differ():
    """Against a fit of the standardised scores; a constant beside nearly constant ones is no well-posed problem."""
    rng = np.random.default_rng(3)
    for sd in (1e-2, 1e-4, 1e-6):
        z = rng.normal(size=300)
        y, x = (rng.random(300) < expit(0.8 * z)).astype(float), -1 + sd * z
        ours, spread = clinical.calibration(y, expit(x)), (x - x.mean()) / x.std()
        fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(spread[:, None], y)
        slope = fit.coef_.item() / x.std()
        assert ours["slope"] == pytest.approx(slope, rel=1e-6)
        assert ours["intercept"] == pytest.approx(fit.intercept_.item() - slope * x.mean(), rel=1e-6)


def test_calibration_undefined():
    def slope(y, p):
        found = clinical.calibration(y, p)
        return found["slope"], found["intercept"]

    assert np.isnan(slope([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])).all()  # perfect, inverted, touching, constant
    assert np.isnan(slope([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4])).all()
    assert np.isnan(slope([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.4])).all()
    assert np.isnan(slope([0, 1, 0, 1], [0.3] * 4)).all()
    assert np.isfinite(slope([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])).all()
    assert clinical.calibration([0, 1, 0, 1], [0.3] * 4)["in_the_large"] == pytest.approx(logit(0.5) - logit(0.3))
    one = clinical.calibration([1, 1], [0.3, 0.4])
    assert one["mce"] == pytest.approx(0.7) and np.isnan([one["in_the_large"], one["slope"]]).all()
    assert np.isnan(list(clinical.calibration([], []).values())).all()


def test_adaptive_bins_hold_equal_counts_and_equal_scores():
    rng = np.random.default_rng(4)
    p = rng.permutation(150) / 150
    assert (np.bincount(clinical.adaptive_bins(p)) == 10).all()
    assert (np.diff(clinical.adaptive_bins(np.sort(p))) >= 0).all()
    y = (rng.random(150) < p).astype(float)
    order = np.argsort(p)
    slow = sum(abs((p - y)[part].mean()) * 10 / 150 for part in np.split(order, 15))
    assert clinical.calibration(y, p)["ece_adaptive"] == pytest.approx(slow, abs=1e-12)
    ties = p.round(1)
    assert all(len(set(clinical.adaptive_bins(ties)[ties == t])) == 1 for t in set(ties))


# ---- classes ----


def golden_classes():
    y, logits = golden_array("mc.y", (300,), 0, 5), golden_array("mc.logits", (300, 5)).astype(float)
    logits[np.arange(300), y] += 1
    return y, logits.round(3)


@needs_golden
@pytest.mark.parametrize("case", ["full", "class2_absent_from_truth"])
def test_golden_classes(case):
    expected, (y, logits) = golden_outputs()["multiclass"][case], golden_classes()
    if case != "full":
        y, logits = y[y != 2], logits[y != 2]
    p, said = np.exp(log_softmax(logits, 1)), logits.argmax(1)
    counts = common.confusion_counts(y, said, 5)
    means, by_class = common.class_metrics(counts)
    assert counts[0].tolist() == expected["confusion"] and counts[0].sum(1).tolist() == expected["support"]
    for name, ours in {
        "accuracy": means["accuracy"][0], "macro_f1": means["f1_macro"][0], "weighted_f1": means["f1_weighted"][0],
        "precision": by_class["precision"][0], "recall": by_class["recall"][0], "f1": by_class["f1"][0],
        "qwk": common.quadratic_kappa(counts)[0], "mae": common.agreement(y, said)["mae"][0],
        "rmse": common.agreement(y, said)["rmse"][0], "pearson": common.agreement(y, said)["pearson"][0],
        "ovr_auroc": [common.weighted_auroc(y == k, p[:, k], np.ones((len(y), 1)))[0] for k in range(5)],
        "top_label_ece15": common.expected_calibration_error(said == y, p.max(1)),
        "nll": -log_softmax(logits, 1)[np.arange(len(y)), y].mean(), "spearman": stats.spearmanr(y, said).statistic,
        "lwk": sk.cohen_kappa_score(y, said, weights="linear"), "kappa": sk.cohen_kappa_score(y, said),
    }.items():  # fmt: skip
        check(ours, expected[name])


@needs_golden
def test_golden_temperature():
    """The file has 6 digits of the temperature, at the minimum of a flat curve, and 8 of the loss there."""
    expected, (y, logits) = golden_outputs()["multiclass"]["temperature"], golden_classes()
    temperature = common.fit_temperature(logits, y)
    assert temperature == pytest.approx(expected["T"], abs=1e-5)
    nll = -log_softmax(logits / temperature, 1)[np.arange(300), y].mean()
    assert nll == pytest.approx(expected["nll"], abs=1e-7)
