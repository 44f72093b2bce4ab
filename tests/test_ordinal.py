"""Losses and metrics of ordered classes: slow formulas, gradcheck, scikit-learn, golden files, repeated rows."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from common import (
    agreement,
    bootstrap_counts,
    class_distance_loss,
    confusion_counts,
    corn_loss,
    corn_probs,
    emd_loss,
    quadratic_kappa,
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
    # constant only in a resample, about a mean that rounds
    found = agreement([0.1, 0.7, 0.7, 0.7], [0.3, 0.9, 0.9, 0.9], [[0], [9], [7], [3]])
    assert np.isnan(found["pearson"][0]) and found["sd"][0] == 0
    found = agreement([np.nan, 1], [1, np.nan])
    assert found.pop("n") == 0 and all(np.isnan(values).all() for values in found.values())
