"""Retrieval metrics: golden values, slow double loops, really shuffled ties, chance, memory."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from sklearn.metrics import average_precision_score

from common import (
    average_precision,
    average_precision_chance,
    hit_chance,
    overlap_at_k,
    recall_at_k,
    retrieval_ranks,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files at {GOLDEN}")
KS = [1, 5, 10]


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scores_as_features(scores):
    """Queries and gallery whose products are exactly `scores` (n, m)."""
    return scores, np.eye(scores.shape[1])


@needs_golden
@pytest.mark.parametrize("side", ["i2t", "t2i", "groups_of_3_i2t"])
def test_golden(side):
    """R@K, median, mean and reciprocal rank, with ties for and against."""
    sys.path.insert(0, str(GOLDEN))
    import golden

    sys.path.pop(0)
    a, b = golden.array("ret.img", (60, 16)), golden.array("ret.txt", (60, 16))
    b = 0.6 * a + b
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    scores = np.round(a @ b.T, 2)
    ids = np.arange(60) // 3 if side.startswith("groups") else np.arange(60)
    ranks = retrieval_ranks(*scores_as_features(scores.T if side == "t2i" else scores), ids, ids, chunk=7)
    expected = json.loads((GOLDEN / "golden_metrics.json").read_text())["outputs"]["retrieval"][side]
    for rule, ours in (("optimistic", ranks["best"]), ("pessimistic", ranks["worst"])):
        values = {f"R@{k}": (ours <= k).mean() for k in KS}
        values |= {"median_rank": np.median(ours), "mean_rank": ours.mean(), "mrr": (1 / ours).mean()}
        assert values == pytest.approx(expected[rule], abs=1e-11), rule
    between = recall_at_k(ranks, KS).mean(0)
    assert (between <= [expected["optimistic"][f"R@{k}"] + 1e-11 for k in KS]).all()
    assert (between >= [expected["pessimistic"][f"R@{k}"] - 1e-11 for k in KS]).all()


def slow_recall(scores, right, ks):
    """Of one query: the mean over every order of the gallery in which a higher score comes first."""
    hits, ranks = [], []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[i] >= scores[j] for i, j in itertools.pairwise(order)):
            first = next(place for place, i in enumerate(order, 1) if right[i])
            hits.append([first <= k for k in ks]), ranks.append(first)
    return np.mean(hits, axis=0), np.mean(ranks), min(ranks), max(ranks)


def test_ties_are_the_mean_over_all_orders():
    rng = np.random.default_rng(0)
    ids = np.array([0, 0, 1, 1, 1, 2, 3])
    scores = rng.integers(0, 3, (4, 7)) / 4  # three distinct scores among seven
    queries = np.array([0, 1, 2, 3])
    ranks = retrieval_ranks(*scores_as_features(scores), queries, ids, chunk=3)
    ours = recall_at_k(ranks, [1, 2, 3, 6, 7])
    for i in range(4):
        recall, mean, low, high = slow_recall(scores[i], ids == queries[i], [1, 2, 3, 6, 7])
        np.testing.assert_allclose(ours[i], recall, atol=1e-12)
        assert ranks["rank"][i] == pytest.approx(mean) and (ranks["best"][i], ranks["worst"][i]) == (low, high)
    assert ranks["right"].tolist() == [2, 3, 1, 1]


def test_equal_features_get_the_chance_level():
    x = np.tile(unit(np.random.default_rng(0), 1, 8).astype(np.float32), (40, 1))
    ids = np.repeat(np.arange(20), 2)
    ranks = retrieval_ranks(x, x, ids, ids)
    for k, recall in zip(KS, recall_at_k(ranks, KS).T, strict=True):
        np.testing.assert_allclose(recall, hit_chance(2, 40, k), atol=1e-12)
    y = (np.random.default_rng(1).random((40, 3)) < 0.4).astype(float)
    values, chance = overlap_at_k(x, x, y, y, KS)
    np.testing.assert_allclose(values, np.repeat(chance[:, None], 3, 1), atol=1e-12)


def test_noise_of_float32_is_a_tie():
    x = unit(np.random.default_rng(0), 3, 8)
    ranks = retrieval_ranks(x[:1], np.concatenate([x[:1] - 1e-8, x[:1], x[1:]]))
    assert (ranks["best"][0], ranks["worst"][0], ranks["rank"][0]) == (1, 2, 1.5)


def test_hit_chance_is_the_share_of_all_draws():
    for right, total in ((0, 3), (1, 4), (2, 5), (3, 3)):
        for k in range(-1, total + 3):
            draws = list(itertools.combinations(range(total), min(max(k, 0), total)))
            assert hit_chance(right, total, k) == pytest.approx(np.mean([min([*d, 9]) < right for d in draws]))
    assert hit_chance(1, 3039, 100) == pytest.approx(100 / 3039)


def test_random_features_are_at_chance():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(600), 2)
    ranks = retrieval_ranks(unit(rng, 1200, 6), unit(rng, 1200, 6), ids, ids)
    found, chance = recall_at_k(ranks, [10, 100]).mean(0), hit_chance(2, 1200, [10, 100])
    assert (abs(found - chance) < 4 * np.sqrt(chance / 1200)).all()


def test_no_right_answer_is_undefined():
    ranks = retrieval_ranks(np.eye(2), np.eye(2), ["a", "b"], ["a", "c"])
    assert ranks["right"].tolist() == [1, 0] and np.isnan(ranks["rank"][1]) and np.isnan(recall_at_k(ranks, [1])[1, 0])


def test_a_matrix_of_right_answers():
    """The same numbers as equal ids, and as they come for many to many."""
    rng = np.random.default_rng(5)
    x, y, a, b = unit(rng, 30, 6), unit(rng, 40, 6), rng.integers(0, 9, 30), rng.integers(0, 9, 40)
    one = retrieval_ranks(x, y, a, b)
    other = retrieval_ranks(x, y, right=a[:, None] == b, chunk=7)
    assert all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)
    same = average_precision(x, y, a, b), average_precision(x, y, right=a[:, None] == b, chunk=7)
    np.testing.assert_array_equal(*same)
    right = rng.random((30, 40)) < 0.1
    right[:, 7] = True
    right[3] = False
    ranks = retrieval_ranks(x, y, right=right, chunk=11)
    slow = [1 + [right[i, j] for j in np.argsort(-(y @ x[i]))].index(True) if i != 3 else np.nan for i in range(30)]
    np.testing.assert_array_equal(ranks["rank"], slow)


def slow_average_precision(scores, right):
    """Of one query: the mean over every order of the gallery in which a higher score comes first."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[i] >= scores[j] for i, j in itertools.pairwise(order)):
            hits = [right[i] for i in order]
            values.append(np.mean([np.mean(hits[: k + 1]) for k in range(len(hits)) if hits[k]]))
    return np.mean(values)


def test_average_precision():
    """scikit-learn's where no scores are equal, else the mean over all orders; undefined where nothing is right."""
    rng = np.random.default_rng(6)
    scores, right = rng.normal(size=(25, 60)), rng.random((25, 60)) < 0.15
    right[4] = False
    ours = average_precision(*scores_as_features(scores), right=right, chunk=8)
    assert np.isnan(ours[4])
    for i in np.flatnonzero(right.any(1)):
        assert ours[i] == pytest.approx(average_precision_score(right[i], scores[i]), abs=1e-12)
    scores, right = rng.integers(0, 3, (8, 7)) / 4, rng.random((8, 7)) < 0.4
    right[:, 0] = True
    ours = average_precision(*scores_as_features(scores + rng.normal(size=(8, 7)) * 1e-9), right=right, chunk=3)
    np.testing.assert_allclose(ours, [slow_average_precision(*row) for row in zip(scores, right, strict=True)])


def test_chance_of_average_precision():
    """The mean over all orders; what random features get on average, and equal features exactly."""
    for right, total in ((1, 1), (1, 5), (2, 5), (5, 5), (3, 7)):
        slow = slow_average_precision(np.zeros(total), np.arange(total) < right)
        assert average_precision_chance(right, total) == pytest.approx(slow, abs=1e-12)
    assert np.isnan(average_precision_chance([0, 1], 3)).tolist() == [True, False]
    rng, ids = np.random.default_rng(7), np.repeat(np.arange(4), [3, 7, 15, 25])
    chance = average_precision_chance(np.bincount(ids)[ids], 50)
    same = np.ones((50, 3)) / 3**0.5
    np.testing.assert_allclose(average_precision(same, same, ids, ids), chance, atol=1e-12)
    means = [average_precision(unit(rng, 50, 8), unit(rng, 50, 8), ids, ids).mean() for _ in range(200)]
    assert abs(np.mean(means) - chance.mean()) < 4 * np.std(means) / 200**0.5


def slow_overlap(scores, query_label, labels, own, k, rng, rounds=1):
    """Of one query: sort, take the first k of others, label by label; ties in random order."""
    means = []
    for _ in range(rounds):
        candidates = [i for i in rng.permutation(len(scores)) if not own[i]]
        found = sorted(candidates, key=lambda i: -scores[i])[:k]
        overlaps = []
        for i in found:
            both = sum(a == 1 and b == 1 for a, b in zip(query_label, labels[i], strict=True))
            one = sum(a == 1 or b == 1 for a, b in zip(query_label, labels[i], strict=True) if a >= 0 and b >= 0)
            overlaps.append(both / one if one else 0)
        means.append(np.mean(overlaps))
    return np.mean(means)


def test_overlap_against_a_double_loop():
    rng = np.random.default_rng(3)
    x, y = unit(rng, 23, 5), (rng.random((23, 4)) < 0.4).astype(float)
    y[rng.random(y.shape) < 0.15] = np.nan
    groups = [f"p{i // 2}" for i in range(23)]
    values, chance = overlap_at_k(x, x, y, y, [1, 5, 22, 100], groups, groups, chunk=4)
    for i in range(23):
        own = [g == groups[i] for g in groups]
        expected = [slow_overlap(x @ x[i], y[i], y, own, k, rng) for k in (1, 5, 22, 100)]
        np.testing.assert_allclose(values[i], expected, atol=1e-12)
        assert chance[i] == pytest.approx(expected[-1])
    everyone = overlap_at_k(x, x, y, y, [1])[0][:, 0]  # without groups a case finds itself
    np.testing.assert_allclose(everyone, (y == 1).any(1))


def test_overlap_of_ties_is_their_mean():
    rng = np.random.default_rng(4)
    scores, y = rng.integers(0, 4, (3, 12)) / 4, (rng.random((12, 3)) < 0.5).astype(float)
    values, _ = overlap_at_k(*scores_as_features(scores), y[:3], y, [1, 4, 9])
    for i in range(3):
        slow = [slow_overlap(scores[i], y[i], y, [False] * 12, k, rng, 4000) for k in (1, 4, 9)]
        np.testing.assert_allclose(values[i], slow, atol=0.03)


def test_a_query_with_nobody_else_is_undefined():
    values, chance = overlap_at_k(np.eye(2), np.eye(2), np.ones((2, 1)), np.ones((2, 1)), [1], ["a", "a"], ["a", "a"])
    assert np.isnan(values).all() and np.isnan(chance).all()


def test_ten_thousand_by_ten_thousand_within_400_mib():
    """What the process needs on top of its imports and inputs."""
    code = """
import resource, numpy as np, common
rng = np.random.default_rng(0)
x, y = (rng.normal(size=(10_000, 512)).astype(np.float32) for _ in range(2))
labels = (rng.random((10_000, 18)) < 0.2).astype(np.float32)
for f in (x, y): f /= np.linalg.norm(f, axis=1, keepdims=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
n = 1024  # queries of two chunks: each further chunk takes the same again
common.retrieval_ranks(np.concatenate([x[:n]]), y)
common.average_precision(x[:n], y, np.arange(n) % 9, np.arange(10_000) % 9)
common.overlap_at_k(x[:n], y, labels[:n], labels, [1, 5, 10, 50, 100])
print(peak() - before)
"""
    done = run("-c", code)
    assert float(done.stdout) < 360  # and 41 for the float64 copy of all ten thousand queries
