"""Losses and metrics of ordered classes: slow formulas, gradcheck, scikit-learn, golden files, repeated rows."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from common import (
    agreement,
    bootstrap_counts,
    bootstrap_intervals,
    bootstrap_weights,
    class_distance_loss,
    class_metrics,
    confusion_counts,
    corn_loss,
    corn_probs,
    emd_loss,
    mean_defined,
    multilabel_metrics,
    ordinal_metrics,
    quadratic_kappa,
    top_1_metrics,
    weighted_auroc,
    with_interval,
)

LOSSES = {"corn": corn_loss, "cdw": class_distance_loss, "cdw 1.5": lambda *a, **k: class_distance_loss(*a, 1.5, **k)}
LOSSES["emd"] = emd_loss
TARGETS = torch.tensor([0, 1, 2, 3, -1, 3, 0])


def logits_for(name, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(len(TARGETS), 3 if name == "corn" else 4, generator=generator, dtype=dtype)


def slow(name, x, c):
    """One row, from the paper's formula, in plain Python."""
    if name == "corn":
        total = 0.0
        for k, logit in enumerate(x):
            if c >= k:
                p = 1 / (1 + math.exp(-logit))
                total -= math.log(p) if c > k else math.log(1 - p)
        return total
    p = [math.exp(v) / sum(map(math.exp, x)) for v in x]
    if name == "emd":
        return sum((sum(p[: i + 1]) - (1.0 if c <= i else 0.0)) ** 2 for i in range(len(p)))
    return -sum(math.log(1 - q) * abs(i - c) ** (1.5 if "1.5" in name else 2) for i, q in enumerate(p))


@pytest.mark.parametrize("name", LOSSES)
def test_slow_formula_and_reductions(name):
    logits = logits_for(name)
    rows = [slow(name, x, c) if c >= 0 else 0.0 for x, c in zip(logits.tolist(), TARGETS.tolist(), strict=True)]
    found = {how: LOSSES[name](logits, TARGETS, reduction=how) for how in ("none", "sum", "mean")}
    np.testing.assert_allclose(found["none"], rows, rtol=1e-12)
    assert found["sum"].item() == pytest.approx(sum(rows), 1e-12)
    assert found["mean"].item() == pytest.approx(sum(rows) / 6, 1e-12)  # one of the seven is unknown
    assert LOSSES[name](logits, torch.full_like(TARGETS, -1)).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    """By finite differences; an unknown row gets none, and a target moves its own way: up to class 3, down to 0."""
    logits = logits_for(name).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, TARGETS, reduction="none"), logits)
    (grad,) = torch.autograd.grad(LOSSES[name](logits, TARGETS), logits)
    assert (grad[4] == 0).all() and (grad[[0, 1, 2, 3, 5, 6]] != 0).any(1).all()
    lower = torch.zeros(2, logits.shape[1], requires_grad=True)
    (grad,) = torch.autograd.grad(LOSSES[name](lower, torch.tensor([0, 3])), lower)
    assert grad[0, -1] >= 0 and grad[1, -1] < 0 and grad[0, 0] * grad[1, 0] <= 0


@pytest.mark.parametrize("name", LOSSES)
def test_saturated_and_half_precision(name):
    """Certain and wrong costs as much as in float64 and has a gradient; a half-precision model gets float32."""
    logits = torch.full((1, 3 if name == "corn" else 4), -40.0)
    logits[0, 0] = 40.0  # "above class 0" for CORN, "class 0" for the others
    target = torch.tensor([0 if name == "corn" else 3])
    logits.requires_grad_()
    loss = LOSSES[name](logits, target)
    exact = LOSSES[name](logits.double(), target)
    assert loss.item() == pytest.approx(exact.item(), 1e-5) and loss.item() > 2
    if name != "emd":  # whose slope vanishes with that of the softmax
        assert loss.item() > 39 and torch.autograd.grad(loss, logits)[0].abs().max() > 0.5
    half = logits_for(name, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](half, TARGETS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOSSES[name](half.double(), TARGETS).item(), 1e-5)


def test_distance_counts():
    """CDW-CE and EMD punish class 3 for a true 0 more than class 1, as cross-entropy does not."""
    logits = 4.0 * torch.eye(4)[[1, 3]]
    for loss in (class_distance_loss, emd_loss):
        near, far = loss(logits, torch.tensor([0, 0]), reduction="none")
        assert far > 2 * near


def test_wrong_reduction_is_refused():
    for name, loss in LOSSES.items():
        with pytest.raises(ValueError, match="reduction"):
            loss(logits_for(name), TARGETS, reduction="typo")


def test_corn_probs():
    """The chain rule by hand, over any leading shape; and the loss's minimum is at the frequencies of the classes."""
    logits = logits_for("corn").reshape(7, 1, 3)
    a, b, c = torch.sigmoid(logits).unbind(-1)
    expected = torch.stack([1 - a, a * (1 - b), a * b * (1 - c), a * b * c], -1)
    torch.testing.assert_close(corn_probs(logits), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(corn_probs(logits).sum(-1), torch.ones(7, 1, dtype=torch.float64))
    assert corn_probs(logits.bfloat16()).dtype == torch.float32
    assert corn_probs(torch.tensor([200.0, 200.0, -200.0])).tolist() == [0, 0, 1, 0]

    targets = torch.tensor([0] * 5 + [1] * 3 + [2] * 1 + [3] * 2)
    fitted = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = corn_loss(fitted.expand(len(targets), 3), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(corn_probs(fitted.detach()), np.array([5, 3, 1, 2]) / 11, atol=1e-8)


# ---- Metrics


def scores(n=200, k=4, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    return truth, np.clip(truth + rng.integers(-1, 3, n), 0, k - 1), rng.integers(0, 60, n)


def test_confusion_and_kappa_against_sklearn():
    truth, predicted, patients = scores()
    weights = bootstrap_counts(patients, 20, 3)
    counts = confusion_counts(truth, predicted, 4, weights)
    assert counts.shape == (20, 4, 4) and counts.dtype == np.float64
    kappa = quadratic_kappa(counts)
    for b in range(20):
        repeated = np.repeat(np.arange(200), weights[:, b].astype(int))
        assert (counts[b] == confusion_matrix(truth[repeated], predicted[repeated], labels=range(4))).all()
        expected = cohen_kappa_score(truth[repeated], predicted[repeated], weights="quadratic", labels=range(4))
        assert kappa[b] == pytest.approx(expected, 1e-12)
    assert (confusion_counts(truth, predicted, 4) == confusion_matrix(truth, predicted)).all()


def test_confusion_leaves_out_what_is_no_class():
    counts = confusion_counts([0, 1, 4, -1, 2, 3], [0, 2, 1, 1, 4, -1], 4)
    assert counts.sum() == 2 and counts[0, 0, 0] == 1 and counts[0, 1, 2] == 1
    assert confusion_counts(np.array([], int), np.array([], int), 4).tolist() == np.zeros((1, 4, 4)).tolist()


def test_kappa_of_golden_confusions(golden):
    cases = golden.load("golden_metrics")["outputs"]["multiclass"]
    for case in (cases["full"], cases["class2_absent_from_truth"]):
        assert quadratic_kappa(case["confusion"]) == pytest.approx(case["qwk"], abs=1e-11)


def test_kappa_at_its_limits():
    assert np.isnan(quadratic_kappa(np.zeros((4, 4)))) and np.isnan(quadratic_kappa(np.diag([0, 7, 0, 0])))
    assert quadratic_kappa(np.diag([1, 2, 3, 4])) == 1
    assert quadratic_kappa([[0, 0, 5], [0, 0, 0], [5, 0, 0]]) == -1
    assert quadratic_kappa([[3, 0], [4, 0]]) == 0  # a constant prediction
    assert quadratic_kappa(np.ones((2, 3, 4, 4))).shape == (2, 3)


def anova_icc(a, b):
    """ICC(2,1) from the two-way table of mean squares, and what goes with it, as a statistics book has it."""
    x = np.stack([a, b], 1)
    n, k = x.shape
    rows = k * ((x.mean(1) - x.mean()) ** 2).sum()
    columns = n * ((x.mean(0) - x.mean()) ** 2).sum()
    error = ((x - x.mean()) ** 2).sum() - rows - columns
    rows, columns, error = rows / (n - 1), columns / (k - 1), error / ((n - 1) * (k - 1))
    return (rows - error) / (rows + (k - 1) * error + k * (columns - error) / n)


def raters(n=80):
    rng = np.random.default_rng(5)
    a = rng.uniform(0, 3, n)
    b = 0.8 * a + rng.normal(0.4, 0.4, n)
    a[3], b[7], a[9], b[9] = (np.nan,) * 4
    return a, b, rng.integers(0, 30, n)


def test_agreement_against_the_books():
    a, b, patients = raters()
    weights = bootstrap_counts(patients, 10, 1)
    found = agreement(a, b, weights)
    for column in (*range(10), None):
        times = np.ones(80, int) if column is None else weights[:, column].astype(int)
        x, y = np.repeat(a, times), np.repeat(b, times)
        x, y = (v[~np.isnan(np.repeat(a + b, times))] for v in (x, y))
        gap, sd = x - y, (x - y).std(ddof=1)
        expected = {
            "n": len(x), "mean_a": x.mean(), "mean_b": y.mean(), "mae": abs(gap).mean(),
            "rmse": np.sqrt((gap**2).mean()), "pearson": np.corrcoef(x, y)[0, 1], "icc": anova_icc(x, y),
            "bias": gap.mean(), "sd": sd, "loa_low": gap.mean() - 1.96 * sd, "loa_high": gap.mean() + 1.96 * sd,
        }  # fmt: skip
        one = {name: values[0 if column is None else column] for name, values in found.items()}
        if column is None:
            one = {name: values.item() for name, values in agreement(a, b).items()}
        assert one == pytest.approx(expected, rel=1e-10) and one.keys() == expected.keys()


def test_agreement_knows_bias_from_noise():
    """Pearson does not see a constant shift, the ICC does."""
    a = np.linspace(0, 3, 40)
    found = agreement(a, a + 1)
    assert found["pearson"] == pytest.approx(1) and found["icc"] < 0.7 and found["bias"] == pytest.approx(-1)
    assert agreement(a, a)["icc"] == 1


def test_agreement_is_undefined_rather_than_noise():
    third = np.full(5, 1 / 3)
    for a, b in ((third, third), (third[:1], third[:1])):
        found = {name: values.item() for name, values in agreement(a, b).items()}
        assert found["mae"] == 0 and found["n"] == len(a)
        assert np.isnan(found["pearson"]) and np.isnan(found["icc"])
    # constant only in a resample, where rounding leaves a spread of 1e-15
    found = agreement([2.3] + [1.8] * 6, [0.0] + [1.8 / 3] * 6, [[k] for k in (0, 1, 2, 3, 1, 5, 2)])
    assert np.isnan(found["pearson"][0]) and found["sd"][0] == found["icc"][0] == 0
    found = agreement([np.nan, 1], [1, np.nan])
    assert found.pop("n") == 0 and all(np.isnan(values).all() for values in found.values())


def test_agreement_of_golden_expected_scores(golden):
    """The mean of the probabilities of classes 0 to 3 against the class, where that is one of them."""
    y, logits = golden.array("mc.y", (300,), 0, 5), golden.array("mc.logits", (300, 5)).astype(float)
    logits[np.arange(300), y] += 1
    p = torch.as_tensor(logits.round(3)).softmax(1).numpy()[:, :4]
    found = agreement((p @ np.arange(4) / p.sum(1))[y < 4], y[y < 4])
    expected = golden.load("golden_metrics")["outputs"]["multiclass"]["csi_expected_score_over_0_3"]
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("absent", [None, 2])
def test_class_metrics_against_sklearn(absent):
    """Four classes and a fifth that is no class; with one of them neither there nor predicted, and with one only
    predicted."""
    truth, predicted, patients = scores(k=5)
    predicted = np.where(predicted == absent, 1, predicted)
    keep = (truth < 4) & (truth != absent)
    truth, predicted, weights = truth[keep], predicted[keep], bootstrap_counts(patients[keep], 5, 0)
    counts = confusion_counts(truth, predicted, 5, weights)[:, :4]
    means, by_class = class_metrics(counts)
    for b in range(5):
        times = weights[:, b].astype(int)
        t, p = np.repeat(truth, times), np.repeat(predicted, times)
        labels = [k for k in range(4) if k != absent]
        rows = precision_recall_fscore_support(t, p, labels=labels, zero_division=0)
        for name, row in zip(("precision", "recall", "f1"), rows[:3], strict=True):
            np.testing.assert_allclose(by_class[name][b][labels], row, rtol=1e-12)
            mean = means["f1_macro" if name == "f1" else name][b]
            assert mean == pytest.approx(row.mean(), 1e-12)
        assert means["f1_weighted"][b] == pytest.approx(np.average(rows[2], weights=rows[3]), 1e-12)
        assert means["accuracy"][b] == pytest.approx((t == p).mean(), 1e-12)
    assert absent is None or np.isnan(by_class["f1"][:, absent]).all()
    only_predicted = class_metrics([[[2, 1], [0, 0]]])[1]
    assert [only_predicted[name][0, 1] for name in ("precision", "recall", "f1")] == [0, 0, 0]
    assert all(np.isnan(values).all() for values in class_metrics(np.zeros((1, 3, 4)))[0].values())


def test_ordinal_metrics():
    truth, predicted, _ = scores()
    found, gap = ordinal_metrics(confusion_counts(truth, predicted, 4)), abs(truth - predicted)
    assert found["mae_class"] == pytest.approx(gap.mean()) and found["off_2"] == pytest.approx((gap > 1).mean())
    assert found["exact"] == pytest.approx((gap == 0).mean())
    assert found["qwk"] == pytest.approx(cohen_kappa_score(truth, predicted, weights="quadratic"))
    assert all(np.isnan(values).all() for values in ordinal_metrics(np.zeros((2, 4, 4))).values())


@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # a class that nothing is, meant
def test_top_1_against_sklearn():
    rng = np.random.default_rng(2)
    truth, probs = rng.integers(0, 3, 90), rng.random((90, 4))
    weights = rng.integers(0, 3, (90, 4)).astype(float)
    found = top_1_metrics(np.eye(4)[truth], probs, weights)
    for b in range(4):
        args = truth, probs.argmax(1)
        recall = balanced_accuracy_score(*args, sample_weight=weights[:, b])
        assert found["balanced_accuracy"][b] == pytest.approx(recall, 1e-12)
        assert found["accuracy"][b] == pytest.approx(np.average(args[0] == args[1], weights=weights[:, b]), 1e-12)
    shared = top_1_metrics([[1, 0, 0]], np.array([[0.4, 0.4, 0.2]]), np.ones((1, 1)))
    assert shared["accuracy"] == 0.5


def test_with_interval_is_the_bootstrap():
    """Value and quantiles are those of `bootstrap_intervals`, which leaves out what is undefined in a resample."""
    rng = np.random.default_rng(4)
    y, p, groups = rng.random(12) < 0.25, rng.random(12), rng.integers(0, 6, 12)
    weights = bootstrap_weights(groups, 200, 1)
    assert weights.shape == (12, 201) and (weights[:, 0] == 1).all()
    values = weighted_auroc(y, p, weights)
    assert np.isnan(values).any()
    found = with_interval({"auroc": values})
    low, high = bootstrap_intervals(y[:, None], p[:, None], ["a"], 0.5, groups, 200, 1)["a_auroc"]
    assert (found["auroc_low"], found["auroc_high"]) == (low, high)
    assert found["auroc"] == multilabel_metrics(y[:, None], p[:, None], ["a"])["a_auroc"]
    assert with_interval({"x": bootstrap_weights(groups, 0, 1)[0]}) == {"x": 1.0}
    assert np.isnan(with_interval({"x": np.array([1, np.nan, np.nan])})["x_low"])


def test_auroc_of_rows_that_share_a_weight():
    rng = np.random.default_rng(6)
    y, p, weights = rng.random((30, 6)) < 0.4, rng.random((30, 6)), rng.integers(0, 3, (30, 4)).astype(float)
    found = weighted_auroc(y.ravel(), p.ravel(), weights, np.repeat(np.arange(30), 6))
    for b in range(4):
        expected = roc_auc_score(y.ravel(), p.ravel(), sample_weight=np.repeat(weights[:, b], 6))
        assert found[b] == pytest.approx(expected, 1e-12)


def test_mean_defined():
    values = np.array([[1, np.nan, 3], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_defined(values), [2, np.nan])
    np.testing.assert_array_equal(mean_defined(values, 0), [1, np.nan, 3])
