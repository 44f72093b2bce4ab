"""Losses and metrics of train_csi.py: parity with the original tool's outputs, second opinions, not gradable films."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, precision_score, recall_score

import train_csi as csi

CASES = ["random", "signal", "perfect"]


@pytest.fixture
def case(golden):
    """name -> (logits, targets, the original tool's outputs)."""
    outputs = golden.load("golden_csi")["outputs"]

    def make(name):
        if name == "random":
            logits, targets = golden.array("csi/logits", (16, 6, 5)), golden.array("csi/targets", (16, 6), 0, 5)
        else:
            targets = golden.array("csi/targets2", (64, 6), 0, 5)
            one_hot = np.eye(5, dtype=np.float32)[targets]
            logits = 10 * one_hot if name == "perfect" else golden.array("csi/logits2", (64, 6, 5)) + 2 * one_hot
        return torch.from_numpy(logits), torch.from_numpy(targets.astype(np.int64)), outputs[name]

    return make


def same(found: dict, expected: dict, skip=()):
    for key, value in expected.items():
        if key not in skip and value is not None:
            np.testing.assert_allclose(found[key], value, atol=2e-6, err_msg=key)


# ---- losses


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_weighted_loss_and_its_gradient_equal_the_original(case, name, weight):
    logits, targets, outputs = case(name)
    expected = outputs[f"loss_unknown_weight_{weight}"]
    logits.requires_grad_()
    loss = csi.WeightedCSILoss(unknown_weight=weight)(logits, targets)
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=2e-6)
    np.testing.assert_allclose(logits.grad.norm().item(), expected["grad_norm_l2"], rtol=2e-5)
    np.testing.assert_allclose(logits.grad[0].numpy(), expected["grad_sample_0"], atol=1e-7)


def test_denominators_join_micro_batches():
    """The gradient of parts, weighted by `count`, is that of the whole; a mean of the parts' losses is not."""
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 6, 5), torch.randint(0, 5, (8, 6))
    targets[:4, :5] = csi.UNKNOWN  # the parts have other weights
    criterion = csi.WeightedCSILoss(0.3)
    whole = criterion(logits, targets)
    parts = [
        (criterion(x, t), criterion.count({"target": t}))
        for x, t in zip(logits.split(4), targets.split(4), strict=True)
    ]
    joined = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    torch.testing.assert_close(joined, whole)
    assert abs(sum(loss for loss, _ in parts) / 2 - whole) > 0.01


def test_weightless_unknown_zones_never_divide_by_zero():
    logits, targets = torch.randn(2, 6, 5, requires_grad=True), torch.full((2, 6), csi.UNKNOWN)
    loss = csi.WeightedCSILoss(0.0)(logits, targets)
    loss.backward()
    assert loss == 0 and logits.grad.abs().sum() == 0


def test_four_classes_leave_unknown_zones_out():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 6, 4), torch.randint(0, 5, (3, 6))
    graded = targets != csi.UNKNOWN
    args = argparse.Namespace(unknown_weight=0.3, num_classes=4, loss="ce")
    torch.testing.assert_close(
        csi.build_criterion(args, None)(logits, targets), F.cross_entropy(logits[graded], targets[graded])
    )


@pytest.mark.parametrize("kind,width", [("corn", 4), ("cdw", 5), ("emd", 5)])
def test_ordinal_losses_are_of_graded_zones_plus_gradability(kind, width):
    """By a loop over zones; the gradient by differences."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 6, width, dtype=torch.float64), torch.randint(0, 5, (2, 6))
    targets[0, 0], targets[0, 1] = csi.UNKNOWN, 2
    criterion = csi.OrdinalLoss(kind, 0.3, 2.0, True)
    total = weight_sum = 0.0
    for b in range(2):
        for z in range(6):
            x, y = logits[b, z], int(targets[b, z])
            weight = 0.3 if y == csi.UNKNOWN else 1.0
            p = 1 / (1 + np.exp(-float(x[-1])))
            loss = -np.log(1 - p) if y == csi.UNKNOWN else -np.log(p)
            if y != csi.UNKNOWN and kind == "corn":
                for k in range(3):
                    if y >= k:
                        q = 1 / (1 + np.exp(-float(x[k])))
                        loss -= np.log(q) if y > k else np.log(1 - q)
            elif y != csi.UNKNOWN:
                q = np.exp(x[:4].numpy()) / np.exp(x[:4].numpy()).sum()
                if kind == "cdw":
                    loss -= sum(np.log(1 - q[i]) * abs(i - y) ** 2 for i in range(4) if i != y)
                else:
                    loss += np.square(np.cumsum(q) - (np.arange(4) >= y)).sum()
            total, weight_sum = total + weight * loss, weight_sum + weight
    np.testing.assert_allclose(
        float(criterion(logits, targets)), total / weight_sum, rtol=1e-6
    )  # the weights are float32
    assert torch.autograd.gradcheck(lambda x: criterion(x, targets), logits.requires_grad_())


# ---- the document's metrics


@pytest.mark.parametrize("name", CASES)
def test_f1_equals_the_original_with_unknown_as_a_class(case, name):
    logits, targets, outputs = case(name)
    same(csi.compute_f1_metrics(logits, targets, ignore_index=None), outputs["compute_f1_metrics_with_unknown"])


@pytest.mark.parametrize("name", CASES)
def test_f1_of_graded_zones_is_the_originals_without_its_empty_class(case, name):
    """The original counts the ignored class as F1 0: its macro values are 4/5 of the right ones."""
    logits, targets, outputs = case(name)
    found = csi.compute_f1_metrics(logits, targets)
    for part in ("compute_f1_metrics__ignore_4", "compute_enhanced_f1_metrics__ignore_4_per_class"):
        for key, value in outputs[part].items():
            if "unknown" in key:
                assert key not in found
                continue
            macro = key in ("f1_macro", "f1_overall") or (key.startswith("f1_zone_") and key.count("_") == 2)
            np.testing.assert_allclose(found[key], value * (1.25 if macro else 1), atol=2e-6, err_msg=key)
    assert name != "perfect" or found["f1_macro"] == found["f1_weighted_macro"] == 1.0


@pytest.mark.parametrize("name", CASES)
def test_precision_recall_csi_and_ahf_equal_the_original(case, name, monkeypatch):
    """The original compares a float32 mean with 2.2: 11 / 5, so of medium likelihood, is high there."""
    logits, targets, outputs = case(name)
    assert csi.ahf_class([11 / 5]) == 1
    monkeypatch.setattr(csi, "AHF_LIMITS", (1.3, 2.2 - 1e-9))
    same(csi.compute_precision_recall(logits, targets), outputs["compute_precision_recall__all_classes"])
    same(csi.compute_csi_average_metrics(logits, targets), outputs["compute_csi_average_metrics"])
    same(csi.compute_ahf_classification_metrics(logits, targets), outputs["compute_ahf_classification_metrics"])


def test_f1_precision_recall_equal_scikit_learn(case):
    logits, targets, _ = case("signal")
    found = csi.compute_f1_metrics(logits, targets) | csi.compute_precision_recall(logits, targets, csi.UNKNOWN)
    for zone in range(6):
        graded = targets[:, zone] != csi.UNKNOWN
        y, p = targets[graded, zone].numpy(), logits[graded, zone].argmax(-1).numpy()
        labels = [c for c in range(4) if c in y or c in p]
        common = {"labels": labels, "zero_division": 0}
        for key, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
            each = [found[f"{key}_zone_{zone + 1}_{csi.CLASSES[c].lower()}"] for c in labels]
            np.testing.assert_allclose(each, score(y, p, average=None, **common))
            np.testing.assert_allclose(found[f"{key}_zone_{zone + 1}"], score(y, p, average="macro", **common))
        weighted = f1_score(y, p, average="weighted", labels=[0, 1, 2, 3], zero_division=0)
        np.testing.assert_allclose(found[f"f1_weighted_zone_{zone + 1}"], weighted)


def test_a_perfect_model_has_one_everywhere_also_with_few_classes():
    targets = np.array([[0, 1, 1, 0, 4, 4], [0, 1, 0, 0, 4, 1]])
    found = csi.compute_f1_metrics(targets, targets)
    assert found["f1_macro"] == found["f1_overall"] == found["f1_weighted_overall"] == 1.0
    assert csi.compute_precision_recall(targets, targets)["recall_macro"] == 1.0
    assert np.isnan(csi.compute_f1_metrics(targets[:, [4] * 6], np.full((2, 6), 4))["f1_macro"])  # nothing was graded


def test_a_film_that_cannot_be_graded_is_no_low_risk():
    targets = np.array([[3] * 6, [0] * 6, [4] * 6])
    predicted = np.array([[4] * 6, [0] * 6, [0] * 6])
    found = csi.compute_ahf_classification_metrics(predicted, targets)
    assert found["ahf_confusion_matrix"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found["ahf_not_gradable"] == [0, 0, 1] and found["ahf_accuracy"] == 0.5
    assert found["ahf_class_2_recall"] == 0
    assert np.isnan(csi.true_csi(predicted)[0]) and csi.ahf_class(csi.true_csi(predicted)).tolist() == [-1, 0, 0]
    mean = csi.compute_csi_average_metrics(predicted, targets)
    assert mean["csi_avg_n"] == 1 and mean["csi_avg_mae"] == 0


def test_limits_of_the_ahf_classes():
    assert csi.ahf_class([1.3, 1.3001, 2.2, 2.21, np.nan]).tolist() == [0, 1, 1, 2, -1]


def test_mean_score_against_the_csv_and_by_side():
    targets = np.array([[0, 3, 0, 3, 0, 3], [1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 4]])
    predicted = np.array([[0, 3, 0, 3, 0, 0], [1, 1, 2, 2, 3, 4], [0, 0, 0, 0, 0, 0]])
    table = pd.DataFrame({"FileID": [7.0, 8.0, 9.0], "csi": ["1.5", "2.0", ""]})  # as a spreadsheet gives them
    found = csi.compute_csi_average_metrics(torch.tensor(predicted), torch.tensor(targets), [7, 8, 9], table)
    np.testing.assert_allclose(found["csi_avg_mae"], (0.5 + abs(9 / 5 - 2) + 0) / 3)
    assert found["csi_csv_avg_n"] == 2
    np.testing.assert_allclose(found["csi_csv_avg_mae"], (0.5 + 0.2) / 2)
    assert found["csi_right_mae"] == 0
    np.testing.assert_allclose(found["csi_left_mae"], (1 + 0.5 + 0) / 3)
    np.testing.assert_allclose(found["csi_lower_mae"], (1.5 + 0 + 0) / 3)


# ---- what the model's outputs mean


def args_of(loss, classes=5):
    return argparse.Namespace(loss=loss, num_classes=classes)


@pytest.mark.parametrize("loss,width", [("ce", 5), ("corn", 4), ("cdw", 5), ("emd", 5)])
def test_probabilities_are_of_one_whole(loss, width):
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, 6, width)
    probs = csi.zone_probs(logits, args_of(loss))
    assert probs.shape == (7, 6, 5) and (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1)
    four = csi.zone_probs(logits[..., :-1], args_of(loss, 4))
    assert (four[..., 4] == 0).all()
    if loss != "ce":
        np.testing.assert_allclose(probs[..., 4], 1 / (1 + np.exp(logits[..., -1].double().numpy())))
        np.testing.assert_allclose(probs[..., :4] / probs[..., :4].sum(-1, keepdims=True), four[..., :4])
    expected = csi.decide(probs, args_of(loss))["expected"]
    slow = csi.expected_scores(logits[0].double(), args_of(loss)).numpy()
    np.testing.assert_allclose(expected[0], slow, atol=1e-9)


def test_decisions():
    probs = np.zeros((3, 6, 5))
    probs[..., 0] = 1
    probs[0, 0] = [0.3, 0.0, 0.0, 0.3, 0.4]  # unknown is the most probable, but less than half
    probs[1] = [0, 0, 0, 0.1, 0.9]
    probs[2] = np.nan
    ce, ordinal = csi.decide(probs, args_of("ce")), csi.decide(probs, args_of("emd"))
    assert ce["classes"][0, 0] == csi.UNKNOWN and ordinal["classes"][0, 0] == 2  # round(1.5), to the even
    assert ce["severity"][1].tolist() == [3] * 6 and np.isnan(ce["csi"][1])
    assert ce["csi"][0] == 0 and ordinal["csi"][0] == 0.25
    assert ce["classes"][2].tolist() == [-1] * 6 and np.isnan(ce["csi"][2])


def test_metrics_of_an_evaluation_are_plain_numbers():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 5, (20, 6))
    probs = rng.dirichlet(np.ones(5), (20, 6))
    found = csi.zone_metrics(targets, probs, args_of("ce"))
    assert json.loads(json.dumps(found)) == found
    perfect = csi.zone_metrics(targets, np.eye(5)[targets], args_of("ce"))
    for name in ("qwk", "f1_macro", "f1_weighted", "accuracy", "csi_correlation", "csi_icc", "gradable_auroc"):
        assert perfect[name] == pytest.approx(1.0)
    assert perfect["zone_mae"] == perfect["csi_mae"] == 0


# ---- the document's helpers


def test_early_stopping_gives_the_best_weights_back():
    """A true copy: the original's were the last ones."""
    model = torch.nn.Linear(1, 1)
    stop = csi.EarlyStopping(patience=2, min_delta=0.1)
    for weight, loss in ((1.0, 0.5), (2.0, 0.45), (3.0, 0.6)):  # the second gain is too small to count
        model.weight.data.fill_(weight)
        stopped = stop(loss, model)
    assert stopped and stop.early_stop and float(model.weight) == 1.0
    keep = csi.EarlyStopping(patience=1, restore_best_weights=False, mode="max")
    assert not keep(0.5, model) and keep(0.4, model)


def test_meters_and_trackers(tmp_path):
    meter = csi.AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0)
    assert (meter.avg, meter.val, meter.count) == (2.0, 5.0, 4)
    tracker = csi.MetricsTracker()
    for loss in (3.0, 1.0, float("nan"), 2.0):
        tracker.update({"train_loss": loss + 1}, {"val_loss": loss})
    assert tracker.best("val_loss") == (1.0, 1) and tracker.latest("train_loss") == 3.0
    tracker.save(tmp_path / "h.json")
    assert json.loads((tmp_path / "h.json").read_text())["val_loss"] == [3.0, 1.0, None, 2.0]


@pytest.mark.parametrize(
    "name,kind", [("plateau", "ReduceLROnPlateau"), ("step", "StepLR"), ("cosine", "CosineAnnealingLR")]
)
def test_schedulers_take_a_loss(name, kind):
    model = torch.nn.Linear(2, 2)
    config = csi.parse_args(["--scheduler", name, "--step-size", "2", "--epochs", "10", "--patience", "1"])
    optimizer = csi.create_optimizer(model, config)
    scheduler = csi.create_scheduler(optimizer, config)
    assert type(scheduler).__name__ == kind
    rates = []
    for _ in range(10):
        optimizer.step()
        scheduler.step(7.5)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = {"plateau": rates, "step": [config.lr * 0.5 ** (i // 2) for i in range(1, 11)]}
    expected["cosine"] = [config.lr * (1 + np.cos(np.pi * i / 10)) / 2 for i in range(1, 11)]
    np.testing.assert_allclose(rates, expected[name], atol=1e-12)
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("name,kind", [("adam", "Adam"), ("AdamW", "AdamW"), ("sgd", "SGD")])
def test_optimizers(name, kind):
    config = csi.parse_args(["--optimizer", name.lower()])
    assert type(csi.create_optimizer(torch.nn.Linear(2, 2), config)).__name__ == kind
