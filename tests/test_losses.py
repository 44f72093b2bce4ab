"""Losses: golden files of the original code, slow formulas, masks, half precision, and one process against two."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import common
from common import asymmetric_loss, balanced_weights, bce_loss, clip_loss, focal_loss, gather_with_grad, siglip_loss

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files at {GOLDEN}")


def golden(name):
    return json.loads((GOLDEN / name).read_text())


def golden_array(*args):
    sys.path.insert(0, str(GOLDEN))
    import golden as recipe

    sys.path.pop(0)
    return torch.from_numpy(recipe.array(*args))


def loss_cases():
    return golden("golden_losses.json")["outputs"] if GOLDEN.is_dir() else {}


def loss_of(case):
    """The call of ours that a golden case describes -> (function of logits and targets, scale of the logits)."""
    number = {k: float(v) for k, v in re.findall(r"(\w+)=(-?[\d.]+(?:e-\d+)?)(?=[,)])", case)}
    weight = torch.linspace(0.5, 9, 18, dtype=torch.float64) if "linspace" in case else None
    scale = 10.0 if case.endswith("scale=10") else 1.0
    reduction = "sum" if "reduction=sum" in case else "mean"
    if case.startswith("AsymmetricLoss"):
        gammas = [number["gamma_neg"], number["gamma_pos"], number["clip"], "detach_weight=True" in case]
        return lambda x, t: asymmetric_loss(x, t, *gammas, reduction="sum"), scale
    if case.startswith("sigmoid_focal_loss"):
        return lambda x, t: focal_loss(x, t, number["alpha"], number["gamma"], "balanced", reduction=reduction), scale
    if case.startswith("bce_with_logits"):
        name = "pos_weight" if "pos_weight" in case else "weight"
        return lambda x, t: bce_loss(x, t, **{name: weight}), scale
    if "loss_type=focal" in case:
        return lambda x, t: focal_loss(x, t, 0.85, 4.0, weight=weight), scale
    if "loss_type=bce" in case:
        return lambda x, t: bce_loss(x, t, weight=weight), scale
    gamma_neg = 4 if "loss_type=asl" in case else 6  # the original builds 4 whatever its document says
    return lambda x, t: asymmetric_loss(x, t, gamma_neg, 1, 0.05, reduction="sum"), scale


def value_and_grad(loss, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def golden_inputs():
    return golden_array("logits", (64, 18)).double(), golden_array("t", (64, 18), 0, 2).double()


def check_golden(case, expected, value, grad):
    rtol = 2e-6 if case.startswith("origin.") else 5e-9  # origin: float32; the others: nine digits
    # the files hold nine digits of sums of up to 1152 terms: an absolute error of that size is theirs
    atol = rtol * expected["grad_absmax"]
    close = {"rtol": 2 * rtol, "atol": atol}
    np.testing.assert_allclose(value.item(), expected["value"], rtol=rtol)
    np.testing.assert_allclose(grad.norm().item(), expected["grad_l2"], **close)
    np.testing.assert_allclose(grad.abs().max().item(), expected["grad_absmax"], **close)
    np.testing.assert_allclose(grad.sum().item(), expected["grad_sum"], rtol=2 * rtol, atol=100 * atol)
    np.testing.assert_allclose(grad.flatten()[::97], expected["grad_sample"], **close)


@needs_golden
@pytest.mark.parametrize("case", [c for c in loss_cases() if not ("Asymmetric" in c and "scale=10" in c)])
def test_golden_value_and_gradient(case):
    loss, scale = loss_of(case)
    logits, targets = golden_inputs()
    check_golden(case, loss_cases()[case], *value_and_grad(lambda x: loss(x, targets), scale * logits))
    single = loss((scale * logits).float(), targets.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.item(), loss_cases()[case]["value"], rtol=1e-6)


@needs_golden
@pytest.mark.parametrize("case", [c for c in loss_cases() if "Asymmetric" in c and "scale=10" in c])
def test_golden_asymmetric_saturated(case):
    """The authors' log(p.clamp(min=1e-8)) cuts the cost at 18.4 and the gradient to 0; ours keeps both there."""
    logits, targets = golden_inputs()
    logits = 10 * logits

    def clamped(x):
        p, q = torch.sigmoid(x), (1 - torch.sigmoid(x) + 0.05).clamp(max=1)
        weight = (targets * (1 - p) + (1 - targets) * (1 - q) ** 6).detach()
        return -(weight * (targets * p.clamp(min=1e-8).log() + (1 - targets) * q.clamp(min=1e-8).log())).sum()

    value, grad = value_and_grad(clamped, logits)
    check_golden(case, loss_cases()[case], value, grad)
    ours, our_grad = value_and_grad(lambda x: loss_of(case)[0](x, targets), logits)
    lost = (targets == 1) & (torch.sigmoid(logits) < 1e-8)
    assert 0 < lost.sum() < 20
    torch.testing.assert_close(our_grad[~lost], grad[~lost], rtol=1e-9, atol=1e-12)
    assert (grad[lost] == 0).all() and (our_grad[lost] < -0.99).all()
    assert ours.item() - value.item() == pytest.approx((-F.logsigmoid(logits[lost]) + math.log(1e-8)).sum().item())


def slow(kind, x, t, **options):
    """One entry, from the paper's formula, in plain Python."""
    p = 1 / (1 + math.exp(-x))
    if kind == "bce":
        return -(t * options.get("pos_weight", 1) * math.log(p) + (1 - t) * math.log(1 - p)) * options.get("weight", 1)
    if kind == "focal":
        p_t = p if t == 1 else 1 - p
        alpha = options["alpha"] if options["form"] == "constant" or t == 1 else 1 - options["alpha"]
        return -alpha * (1 - p_t) ** options["gamma"] * math.log(p_t) * options.get("weight", 1)
    p_m = max(p - options["clip"], 0)
    if t == 1:
        return -((1 - p) ** options["gamma_pos"]) * math.log(p)
    return -(p_m ** options["gamma_neg"]) * math.log(1 - p_m)


PER_LABEL = {"weight": [0.5, 2.0, 1.0], "pos_weight": [3.0, 0.25, 1.0]}
LOSSES = {
    "bce": (bce_loss, "bce", {}),
    "bce weighted": (bce_loss, "bce", PER_LABEL),
    "focal constant": (focal_loss, "focal", {"alpha": 0.8, "gamma": 2.5, "form": "constant"}),
    "focal balanced": (focal_loss, "focal", {"alpha": 0.25, "gamma": 1.5, "form": "balanced"}),
    "focal weighted": (
        focal_loss,
        "focal",
        {"alpha": 0.85, "gamma": 4.0, "form": "constant", "weight": PER_LABEL["weight"]},
    ),
    "asl": (asymmetric_loss, "asl", {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05, "detach_weight": False}),
    "asl without clip": (asymmetric_loss, "asl", {"gamma_neg": 2, "gamma_pos": 0, "clip": 0.0, "detach_weight": False}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def options_of(name, dtype=torch.float64):
    return {k: torch.tensor(v, dtype=dtype) if k in PER_LABEL else v for k, v in LOSSES[name][2].items()}


def small_batch():
    """Logits and targets (7, 3) with entries unknown in both spellings."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (7, 3), generator=generator).double()
    targets[0, 0], targets[3, 1], targets[4, 2], targets[5] = torch.nan, -1, torch.nan, -1
    return logits, targets


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_slow_formula_over_known_entries(name, reduction):
    function, kind, options = LOSSES[name]
    logits, targets = small_batch()
    terms = []
    for i, k in zip(*torch.nonzero(targets >= 0, as_tuple=True), strict=True):
        own = {key: v[k] if key in PER_LABEL else v for key, v in options.items()}
        terms.append(slow(kind, logits[i, k].item(), targets[i, k].item(), **own))
    assert len(terms) == 15
    expected = sum(terms) / (len(terms) if reduction == "mean" else 1)
    assert function(logits, targets, **options_of(name), reduction=reduction).item() == pytest.approx(expected, 1e-12)


@each_loss
def test_gradcheck_and_zero_where_unknown(name):
    logits, targets = small_batch()
    loss = lambda x: LOSSES[name][0](x, targets, **options_of(name))  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits.clone().requires_grad_())
    _, grad = value_and_grad(loss, logits)
    assert (grad[~(targets >= 0)] == 0).all() and (grad[targets >= 0] != 0).all()


@each_loss
def test_all_unknown_costs_nothing(name):
    for unknown in (torch.nan, -1.0):
        value, grad = value_and_grad(
            lambda x: LOSSES[name][0](x, torch.full((4, 3), unknown), **options_of(name)),  # noqa: B023
            torch.randn(4, 3),
        )
        assert value == 0 and (grad == 0).all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    logits, targets = small_batch()
    logits[0, 1], logits[1, 0], logits[6, 2] = -20, 20, 15  # where 16 bits would give log(0)
    rounded = logits.to(dtype)
    loss = lambda x: LOSSES[name][0](x, targets.float(), **options_of(name, torch.float32))  # noqa: E731
    expected, expected_grad = value_and_grad(loss, rounded.double())
    value, grad = value_and_grad(loss, rounded)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(rounded), value)


@each_loss
def test_saturated_logits_stay_finite_and_teach(name):
    """A confident mistake keeps its gradient; nothing becomes NaN, whatever gamma is."""
    logits, targets = torch.tensor([[-200.0] * 3, [200.0] * 3]), torch.tensor([[1.0] * 3, [0.0] * 3])
    for scale in (0.1, 0.5, 1.0):
        value, grad = value_and_grad(
            lambda x: LOSSES[name][0](x, targets, **options_of(name, torch.float32)),
            scale * logits,
        )
        assert value.isfinite() and grad.isfinite().all() and (grad[0] < 0).all()
        value, grad = value_and_grad(
            lambda x: LOSSES[name][0](x, 1 - targets, **options_of(name, torch.float32)),
            scale * logits,
        )
        assert value.abs() < 1e-6 and (grad.abs() < 1e-6).all()
    for gamma in (0.5, 0.0):
        for loss in (
            lambda x: focal_loss(x, targets, gamma=gamma),  # noqa: B023
            lambda x: asymmetric_loss(x, targets, gamma, gamma, detach_weight=False),  # noqa: B023
        ):
            for sign in (1, -1):
                value, grad = value_and_grad(loss, sign * logits)
                assert value.isfinite() and grad.isfinite().all()


def test_soft_targets():
    """Mixed labels (MixUp): BCE is linear in the target, focal keeps torchvision's p_t."""
    logits, targets = torch.randn(5, 3).double(), torch.rand(5, 3).double()
    mixed = (targets * -F.logsigmoid(logits) + (1 - targets) * -F.logsigmoid(-logits)).mean()
    assert bce_loss(logits, targets).item() == pytest.approx(mixed.item())
    p = torch.sigmoid(logits)
    p_t = p * targets + (1 - p) * (1 - targets)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    alpha_t = 0.3 * targets + 0.7 * (1 - targets)
    expected = (alpha_t * (1 - p_t) ** 2 * bce).mean().item()
    assert focal_loss(logits, targets, 0.3, 2.0, "balanced").item() == pytest.approx(expected)


def test_detached_weight_has_the_value_but_not_the_gradient():
    logits, targets = small_batch()
    (a, grad_a), (b, grad_b) = (
        value_and_grad(lambda x: asymmetric_loss(x, targets, detach_weight=detach), logits)  # noqa: B023
        for detach in (True, False)
    )
    assert a == b and not torch.allclose(grad_a, grad_b, rtol=0.01)


def test_wrong_options_are_refused():
    logits, targets = small_batch()
    with pytest.raises(ValueError, match="form"):
        focal_loss(logits, targets, form="typo")
    for loss in (bce_loss, focal_loss, asymmetric_loss):
        with pytest.raises(ValueError, match="reduction"):
            loss(logits, targets, reduction="none")


def test_balanced_weights():
    nan = np.nan
    targets = np.array([[1, 0, 1, 1, 0, nan], [0, 0, 1, nan, 0, -1], [0, 0, 1, -1, 1, nan], [nan, 0, 1, 0, 1, -1]])
    weights = balanced_weights(targets)
    assert weights.dtype == torch.float32 and weights.tolist() == [2, 1, 1, 1, 1, 1]
    skewed = (np.arange(1000)[:, None] < [1, 500, 999, 800]).astype(np.float32)
    assert balanced_weights(torch.from_numpy(skewed), max_weight=10).tolist() == pytest.approx([10, 1, 0.1, 0.25])


# ---- contrastive losses ----


def contrastive_inputs(dtype=torch.float64):
    return golden_array("image_features", (16, 32)).to(dtype), golden_array("text_features", (16, 32)).to(dtype)


def random_inputs(n=12, e=8):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, e, generator=generator, dtype=torch.float64) for _ in range(2))


def normalized(loss):
    return lambda image, text, *scalars: loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), *scalars)


@needs_golden
@pytest.mark.parametrize("case", golden("golden_contrastive.json")["outputs"] if GOLDEN.is_dir() else [])
def test_golden_contrastive(case):
    expected = golden("golden_contrastive.json")["outputs"][case]
    names = ["logit_scale", "logit_bias"][: 2 if case.startswith("siglip") else 1]
    scalars = [torch.tensor(expected[name], dtype=torch.float64) for name in names]
    loss = siglip_loss if case.startswith("siglip") else clip_loss
    close = {"rtol": 2e-5, "atol": 1e-7}  # the files were computed in float32
    value, image, text, *grads = value_and_grad(normalized(loss), *contrastive_inputs(), *scalars)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(image.norm(), expected["grad_norm_image_raw"], **close)
    np.testing.assert_allclose(text.norm(), expected["grad_norm_text_raw"], **close)
    np.testing.assert_allclose(image[0], expected["grad_image_raw_row0"], rtol=1e-4, atol=1e-6 * image.abs().max())
    for name, grad in zip(names, grads, strict=True):
        np.testing.assert_allclose(grad, expected[f"grad_{name}"], **close)
    _, image, text, *_ = value_and_grad(loss, *(F.normalize(x, dim=-1) for x in contrastive_inputs()), *scalars)
    np.testing.assert_allclose(image.norm(), expected["grad_norm_image_normalized"], **close)
    np.testing.assert_allclose(text.norm(), expected["grad_norm_text_normalized"], **close)


def naive_siglip(image, text, scale, bias):
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)


@pytest.mark.parametrize("block", [1, 5, 12, 64])
def test_siglip_blocks_equal_autograd(block):
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (7.0, -3.0)]
    ours = value_and_grad(lambda *x: siglip_loss(*x, block=block), *random_inputs(), *scalars)
    for a, b in zip(ours, value_and_grad(naive_siglip, *random_inputs(), *scalars), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    inputs = [x.requires_grad_() for x in (*random_inputs(4, 3), *scalars)]
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, block=block), inputs)


def test_siglip_scalar_of_shape_one():
    scale, bias = torch.full((1,), 7.0, requires_grad=True), torch.full((1,), -3.0, requires_grad=True)
    siglip_loss(*random_inputs(), scale, bias).backward()
    assert scale.grad.shape == bias.grad.shape == (1,) and bias.grad != 0


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_contrastive_in_half_precision(loss):
    """bf16 features under autocast: float32 logits, so a scale of 100 does not cost two digits."""
    image, text = (F.normalize(x, dim=-1).bfloat16() for x in random_inputs(32, 64))
    scalars = [torch.tensor(100.0), torch.tensor(-10.0)][: 2 if loss is siglip_loss else 1]
    expected = value_and_grad(loss, image.double(), text.double(), *(x.double() for x in scalars))

    def autocast_loss(*tensors):  # backward outside, as in training
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*tensors)

    value, *grads = value_and_grad(autocast_loss, image, text, *scalars)
    assert value.dtype == torch.float32 and grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
    for grad, true in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=2 * torch.finfo(grad.dtype).eps, atol=1e-5)


def saved_elements(loss, *tensors):
    """Elements of distinct tensors that autograd keeps between forward and backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), (t, t.untyped_storage().nbytes())) or t, lambda t: t
    ):
        value = loss(*tensors)
    total = sum(nbytes for _, nbytes in kept.values()) // tensors[0].element_size()
    value.backward()
    return total


def test_siglip_keeps_features_only():
    """One rank's view of 8: 64 local images, 512 texts. The logits (64 x 512) must not survive the forward."""
    image, text = torch.randn(64, 16).requires_grad_(), torch.randn(512, 16).requires_grad_()
    scalars = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    features = image.numel() + text.numel()
    ids = torch.arange(64), torch.arange(512)
    kept = saved_elements(lambda *x: common._SigmoidLoss.apply(*x, *ids, 16), image, text, *scalars)
    assert features <= kept <= features + 2 + 2 * (64 + 512)  # int64 counts twice
    naive = saved_elements(lambda i, t, s, b: F.softplus(s * i @ t.T + b).sum(), image, text, *scalars)
    assert naive > 64 * 512  # the same count does see what autograd would keep


# ---- several ranks against one process ----


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = torch.nn.Linear(8, 5).double(), torch.nn.Linear(8, 5).double()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, image, text, loss):
        features = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        if loss == "siglip":
            return siglip_loss(*features, self.scale.exp(), self.bias, block=4)
        return clip_loss(*features, self.scale.exp()) + 0 * self.bias  # DDP waits for a gradient of every parameter


def tower_gradients(wrap, image, text, loss):
    towers = Towers()
    net = wrap(towers)  # DDP averages only while it lives
    value = net(image, text, loss)
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in towers.named_parameters()}}


def feature_gradients(rows, loss):
    scalars = [torch.tensor(10.0 if loss == "siglip" else 1 / 0.07).double(), torch.tensor(-10.0).double()]
    function, scalars = (siglip_loss, scalars) if loss == "siglip" else (clip_loss, scalars[:1])
    return value_and_grad(normalized(function), *(x[rows] for x in contrastive_inputs()), *scalars)


def masked_gradients(rows):
    """Loss and gradients of 12 pairs with equal reports, of which every third is missing, and all of the first four."""
    rng, number = torch.Generator().manual_seed(3), torch.arange(12)
    image, text = (F.normalize(torch.randn(12, 8, generator=rng, dtype=torch.float64), dim=1)[rows] for _ in range(2))
    present = (number % 3 > 0) & (number > 3)
    scale = torch.tensor(14.0, dtype=torch.float64)
    return value_and_grad(lambda *x: clip_loss(*x, number[rows] % 5, present[rows]), image, text, scale)


def rank_main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    out = {}
    image, text = random_inputs()
    rows = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for loss in ("clip", "siglip"):
        out[loss, "towers"] = tower_gradients(DistributedDataParallel, image[rows], text[rows], loss)
        if GOLDEN.is_dir():
            out[loss, "features"] = feature_gradients(slice(rank * 16 // world, (rank + 1) * 16 // world), loss)
    x = torch.full((2, 3), float(rank)).t().contiguous().t().requires_grad_()  # not contiguous
    gathered, seen = gather_with_grad(x), []
    gathered.register_hook(seen.append)
    (gathered * torch.arange(2.0 * world)[:, None] * (rank + 1)).sum().backward()
    out["gathered"], out["gathered_grad"], out["own_grad"] = gathered.detach(), x.grad, seen[0]
    out["masked"] = masked_gradients(rows)
    common.gather_with_grad = plain_gather
    out["plain gather"] = tower_gradients(DistributedDataParallel, image[rows], text[rows], "clip")
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def plain_gather(x):
    """What many programs do: the right loss, the wrong gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world, tmp_path):
    torch.multiprocessing.spawn(rank_main, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    close = {"rtol": 1e-11, "atol": 1e-13}

    for rank, out in enumerate(ranks):
        torch.testing.assert_close(
            out["gathered"], torch.arange(world).float().repeat_interleave(2)[:, None].expand(-1, 3)
        )
        factor = world * (world + 1) / 2
        expected = factor * torch.tensor([2.0 * rank, 2.0 * rank + 1])[:, None].expand(-1, 3)
        torch.testing.assert_close(out["gathered_grad"], expected)
        own = (rank + 1) * torch.arange(2.0 * world)[:, None].expand(-1, 3)  # summed over ranks in a copy, not in place
        torch.testing.assert_close(out["own_grad"], own)

    value, *grads, scale = masked_gradients(slice(None))
    torch.testing.assert_close(sum(out["masked"][0] for out in ranks) / world, value, **close)
    torch.testing.assert_close(sum(out["masked"][3] for out in ranks) / world, scale, **close)
    for i, grad in enumerate(grads, 1):
        torch.testing.assert_close(torch.cat([out["masked"][i] for out in ranks]) / world, grad, **close)
        assert grad[:4].eq(0).all() and grad[4].ne(0).any()

    for loss in ("clip", "siglip"):
        single = tower_gradients(lambda towers: towers, *random_inputs(), loss)
        mean = sum(out[loss, "towers"]["loss"] for out in ranks) / world
        torch.testing.assert_close(mean, single["loss"], **close)
        for name in set(single) - {"loss"}:
            for out in ranks:
                torch.testing.assert_close(out[loss, "towers"][name], single[name], **close)
        if not GOLDEN.is_dir():
            continue
        value, image, text, *scalars = feature_gradients(slice(None), loss)
        parts = [out[loss, "features"] for out in ranks]
        torch.testing.assert_close(torch.cat([p[1] for p in parts]) / world, image, **close)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]) / world, text, **close)
        for i, scalar in enumerate(scalars):
            torch.testing.assert_close(sum(p[3 + i] for p in parts) / world, scalar, **close)
        case = "siglip_gather" if loss == "siglip" else "clip_local1_grad1"
        expected = golden("golden_contrastive.json")["distributed"][f"world{world}"][case]
        np.testing.assert_allclose([p[0] for p in parts], expected["rank_losses"], atol=2e-6)
        np.testing.assert_allclose(value, expected["mean_over_ranks"], atol=2e-6)
        np.testing.assert_allclose(scalars[0], expected["mean_grad_logit_scale"], atol=1e-6)

    single = tower_gradients(lambda towers: towers, *random_inputs(), "clip")
    wrong = [out["plain gather"] for out in ranks]
    assert (sum(out["loss"] for out in wrong) / world).item() == pytest.approx(single["loss"].item())
    assert not torch.allclose(wrong[0]["text.weight"], single["text.weight"], rtol=0.05)  # this test sees it
