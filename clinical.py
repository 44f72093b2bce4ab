"""What a clinician and a reviewer ask of one label's scores: intervals, tests, operating points, calibration, benefit.

Scores are (n,) probabilities, labels y (n,) of 0 and 1 (unknown ones left out before); undefined is NaN. No bootstrap
here: common.py has it, with the metrics at a threshold.
"""

import numpy as np
from scipy.special import expit, logit, ndtri
from scipy.stats import binomtest, rankdata

from common import calibration_bins

TARGETS = (0.8, 0.9, 0.95)  # sensitivities, and specificities, at which operating points are given
RISKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # threshold probabilities of the net benefit in results.json


def numbers_of_label(y, p, groups, level=0.95) -> dict:
    """What results.json has of one label from here, NaN = undefined. y, p: (n,); groups: (n,) patients."""
    auc, covariance = delong(y, np.asarray(p)[:, None], groups)
    low, high = delong_interval(auc[0], covariance[0, 0], level)
    benefit = {f"{risk:g}": both for risk, *both in zip(RISKS, *net_benefit(y, p), strict=True)}
    return {
        "auroc_delong_low": float(low),
        "auroc_delong_high": float(high),
        "operating_points": operating_points(y, p),
        "calibration": calibration(y, p),
        "net_benefit": {risk: dict(zip(("model", "treat_all"), both, strict=True)) for risk, both in benefit.items()},
    }


# ==== Intervals and tests ======================================================================================


def delong(y, scores, groups=None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of M scores of the same cases, (M,), and the covariance matrix of those M areas, (M, M).

    y: (n,) of 0 and 1; scores: (n, M); groups: (n,) patients, whose cases depend on each other. NaN without both
    classes; covariance also NaN with the positives, or the negatives, of one patient alone. DeLong, DeLong and
    Clarke-Pearson (Biometrics 1988), where each case is its own patient, else Obuchowski (Biometrics 1997): the
    structural components of a patient's cases are summed.
    """
    y, scores = np.asarray(y) == 1, np.asarray(scores, np.float64)
    m, n, models = y.sum(), (~y).sum(), scores.shape[1]
    if not m or not n:
        return np.full(models, np.nan), np.full((models, models), np.nan)
    rank = rankdata(scores, axis=0)
    component = np.empty(scores.shape)  # share of the other class that a case is ranked right against; ties half
    component[y] = (rank[y] - rankdata(scores[y], axis=0)) / n
    component[~y] = 1 - (rank[~y] - rankdata(scores[~y], axis=0)) / m
    auc = component[y].mean(0)

    patients, of_case = np.unique(np.arange(len(y)) if groups is None else groups, return_inverse=True)
    sums, there = np.zeros((2, len(patients), models)), np.zeros(2)  # of positives, of negatives
    for i, (side, size) in enumerate(((y, m), (~y, n))):
        np.add.at(sums[i], of_case[side], (component[side] - auc) / size)
        there[i] = len(np.unique(of_case[side]))
    if (there < 2).any():
        return auc, np.full((models, models), np.nan)
    corrected = there / (there - 1)  # as many patients as have such a case, less one
    covariance = sum(c * s.T @ s for c, s in zip(corrected, sums, strict=True))
    mixed = sums[0].T @ sums[1] * len(patients) / (len(patients) - 1)
    return auc, covariance + mixed + mixed.T


def delong_interval(auc, variance, level=0.95) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of an AUROC, symmetric on the logit scale, and so inside [0, 1]; arrays allowed.

    A perfect area has no variance, and gives (1, 1), an inverted one (0, 0): that is no certainty, but the end of what
    this interval can say.
    """
    auc, variance = np.asarray(auc, np.float64), np.asarray(variance, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = ndtri((1 + level) / 2) * np.sqrt(variance) / (auc * (1 - auc))
        ends = [expit(logit(auc) + side * half) for side in (-1, 1)]
    at_end = (variance == 0) & ((auc == 0) | (auc == 1))
    return np.where(at_end, auc, ends[0]), np.where(at_end, auc, ends[1])


def wilson_interval(k, n, level=0.95) -> tuple[np.ndarray, np.ndarray]:
    """Ends of Wilson's interval (JASA 1927) of the proportion k / n; arrays allowed; NaN where n is 0."""
    k, n, z = np.asarray(k, np.float64), np.asarray(n, np.float64), ndtri((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (k + z**2 / 2) / (n + z**2)
        half = z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    return np.where(k == 0, 0 * half, centre - half), np.where(k == n, 1 + 0 * half, centre + half)


def holm(p) -> np.ndarray:
    """p values adjusted for having made all these tests (Holm 1979), in the same order; NaN is a test not made."""
    p = np.array(p, np.float64)
    order = np.argsort(p)[: (~np.isnan(p)).sum()]  # NaN comes last
    p[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return p


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: b cases only the first was right about, c only the second; 1 if no case."""
    return float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


# ==== Operating points and benefit =============================================================================


def operating_points(y, p, targets=TARGETS) -> list[dict]:
    """What the scores do where the sensitivity, or the specificity, is at least each target; [] without both classes.

    Flagged is p >= threshold, which is a score: for a sensitivity the highest that reaches the target, for a
    specificity the lowest; infinite where only flagging nobody does. ppv and npv are at the prevalence of these cases,
    NaN where they are 0 / 0.
    """
    y, p = np.asarray(y) == 1, np.asarray(p, np.float64)
    if y.all() or not y.any():
        return []
    thresholds = np.append(np.inf, np.unique(p)[::-1])
    tp, fp = (len(some) - np.searchsorted(np.sort(some), thresholds) for some in (p[y], p[~y]))
    fn, tn = y.sum() - tp, (~y).sum() - fp
    rates = {"threshold": thresholds, "sensitivity": tp / y.sum(), "specificity": tn / (~y).sum()}
    with np.errstate(invalid="ignore"):
        rates |= {"ppv": tp / (tp + fp), "npv": tn / (tn + fn)}
    found = []
    for at in ("sensitivity", "specificity"):
        for target in targets:
            reached = np.flatnonzero(rates[at] >= target - 1e-12)
            i = reached[0] if at == "sensitivity" else reached[-1]
            found.append({"at": at, "target": target} | {name: float(values[i]) for name, values in rates.items()})
    return found


def net_benefit(y, p, risks=RISKS) -> tuple[np.ndarray, np.ndarray]:
    """Net benefit of treating whom the model gives p >= risk, and of treating everybody, (R,) each; nobody: 0.

    Per case: true positives, less false positives worth risk / (1 - risk) each (Vickers and Elkin, Med Decis Making
    2006). risks: (R,) in [0, 1). NaN without a case.
    """
    y, p, risks = np.asarray(y) == 1, np.asarray(p, np.float64), np.asarray(risks, np.float64)
    if not len(y):
        return np.full(len(risks), np.nan), np.full(len(risks), np.nan)
    tp, fp = (len(some) - np.searchsorted(np.sort(some), risks) for some in (p[y], p[~y]))
    odds = risks / (1 - risks)
    return (tp - odds * fp) / len(y), (y.sum() - odds * (~y).sum()) / len(y)


# ==== Calibration ==============================================================================================


def calibration(y, p) -> dict[str, float]:
    """How the probabilities lie about the frequencies (Van Calster et al., BMC Medicine 2019): five numbers.

    slope, intercept: of the logistic regression of the label on logit(p), fitted together, without a penalty; 1 and 0
    are perfect, a slope below 1 means that the probabilities are too extreme. NaN where a score separates the classes
    (no finite slope fits best), or all scores are equal.
    in_the_large: the intercept with the slope held at 1; below 0 the probabilities are too high. NaN without both
    classes. Logits are of p kept 1e-7 away from 0 and 1, as for temperatures: a float32 probability rounds to 1.
    mce: largest distance of frequency and mean probability among the 15 bins of `common.calibration_bins`.
    ece_adaptive: mean such distance over `adaptive_bins`, by their counts.
    """
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    found = dict.fromkeys(("slope", "intercept", "in_the_large", "mce", "ece_adaptive"), np.nan)
    if not len(y):
        return found
    bins = calibration_bins(y, p)
    found["mce"] = np.nanmax(abs(bins["mean_prob"] - bins["frequency"]))
    found["ece_adaptive"] = abs(np.bincount(adaptive_bins(p), p - y)).sum() / len(y)
    x, one = logit(np.clip(p, 1e-7, 1 - 1e-7)), np.ones_like(p)
    positive, negative = x[y == 1], x[y == 0]
    if len(positive) and len(negative):
        found["in_the_large"] = float(logistic_fit(y, one[:, None], x)[0])
        if negative.max() > positive.min() and positive.max() > negative.min():
            mean, sd = x.mean(), x.std()  # standardised: scores that hardly differ would be a multiple of `one`
            a, b = logistic_fit(y, np.stack([one, (x - mean) / sd], 1))
            found["intercept"], found["slope"] = float(a - b * mean / sd), float(b / sd)
    return {name: float(value) for name, value in found.items()}


def patients_with(targets, groups) -> np.ndarray:
    """(K, 2) int: patients with a negative, and with a positive, case of each label; targets (n, K), groups (n,)."""
    return np.array([[len(set(groups[y == sign])) for sign in (0, 1)] for y in np.asarray(targets).T], int)


def adaptive_bins(p, n_bins: int = 15) -> np.ndarray:
    """(n,) bin of each score, of as equal counts as can be with equal scores in one bin, whatever the order."""
    return (n_bins * (rankdata(p) - 0.5) / len(p)).astype(int)


def logistic_fit(y, x, offset=0.0) -> np.ndarray:
    """Coefficients (F,) of the logistic regression of y (n,) on x (n, F), beside a fixed `offset` (n,), by Newton's
    method with steps halved where they overshoot; no penalty. NaN if it does not converge."""

    def loss(b):
        z = x @ b + offset
        return (np.logaddexp(0, z) - y * z).sum()

    b = np.zeros(x.shape[1])
    for _ in range(100):
        p = expit(x @ b + offset)
        step = np.linalg.lstsq((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p), rcond=None)[0]
        while loss(b + step) > loss(b) * (1 + 1e-12):  # more than rounding
            step /= 2
        b = b + step
        if abs(step).max() <= 1e-13 * (1 + abs(b).max()):
            return b
    return np.full(len(b), np.nan)
