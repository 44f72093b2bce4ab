"""Models of run_task2.py: parity with torchvision and the original tool, weight layouts, attention, freezing, MIL."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import run_task2 as task2

MODELS = ["resnet50", "resnet101", "efficientnet_b0", "densenet121"]


def args_of(*words, **more):
    args = task2.parse_args(["--pretrained", "none", *words])
    vars(args).update(
        {"window_values": [[-300, 1400]], "slice_store": "uint8", "slice_size": 64, "image_size": 64} | more
    )
    return args


def close(found, expected, atol):
    sample = found.detach().float().flatten()[:: expected["stride"]].numpy()
    np.testing.assert_allclose(sample, expected["sample"], atol=atol, rtol=0)
    assert list(found.shape) == expected["shape"]


def batch_statistics(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    return model


@pytest.fixture
def filled(golden):
    """name -> (backbone with the golden weights, fc weight and bias, input, the golden file)."""

    def make(name):
        expected = golden.load(f"golden_{name}")
        state = golden.fill_state_dict(expected["state"])
        backbone = task2.build_backbone(args_of("--model", name)).eval()
        body = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
        assert {k: list(v.shape) for k, v in backbone.state_dict().items()} == {
            k: list(v.shape) for k, v in body.items()
        }
        backbone.load_state_dict(body)
        last = [v for k, v in state.items() if k.startswith(("fc.", "classifier."))]
        return backbone, last, torch.from_numpy(golden.array("x", (2, 3, 64, 64))), expected

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", ["outputs", "outputs_bn_batch"])
def test_backbone_equals_torchvision(filled, name, case):
    """Logits, pooled features and the three stages; with running and with batch statistics; float64 to 1e-5."""
    backbone, (weight, bias), x, expected = filled(name)
    batch = case == "outputs_bn_batch"
    atol = 2e-5 if not batch else 5e-3 if name.startswith("resnet") else 1e-4
    maps = (batch_statistics(backbone) if batch else backbone)(x)
    wanted, stages = expected[case], expected[case]["stages"]
    pooled = maps[-1].mean((2, 3))
    close(F.linear(pooled, weight, bias), wanted["logits"], atol)
    close(pooled, wanted["pooled"], atol)
    names = {"r": ("layer2", "layer3", "layer4"), "e": ("features_3", "features_5", "features_8"), "d": ()}[name[0]]
    for found, stage in zip(maps, names, strict=bool(names)) if names else ():
        close(found, stages[stage], atol)
    if name == "densenet121":
        close(maps[0], stages["denseblock2"], atol)
        close(maps[1], stages["denseblock3"], atol)
    if batch:
        for key, stats in wanted["running_stats_after"].items():
            close(backbone.state_dict()[key], stats, 1e-3)
    double, _, _, _ = filled(name)
    double = double.double()
    logits = F.linear((batch_statistics(double) if batch else double)(x.double())[-1].mean((2, 3)), *(
        v.double() for v in (weight, bias)))  # fmt: skip
    expected64 = expected["outputs_float64"]["logits_bn_batch" if batch else "logits"]
    sample = logits.flatten()[:: expected64["stride"]].detach().numpy()
    np.testing.assert_allclose(sample, expected64["sample"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["none", "se", "cbam"])
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_checkpoint_of_the_original_tool(golden, tmp_path, name, attention):
    """A Lightning file with the original's keys: the same 18 logits; class names and form are known; exported back."""
    expected = golden.load("golden_task2_origin")
    case = f"{name}/{attention}"
    shapes = {**expected["state"][f"{name}/none"]["backbone_shapes"], **expected["state"][case]["non_backbone"]}
    state = golden.fill_state_dict(shapes)
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5.3"}, tmp_path / "old.ckpt")
    saved = task2.read_checkpoint(tmp_path / "old.ckpt")
    assert saved["class_names"] == expected["config"]["class_order"] == task2.LABELS
    args = task2.args_from_checkpoint(saved)
    assert (args.model, args.use_attention, args.attention_place) == (name, attention, "pooled")
    model = task2.build_eval_model(saved, args, torch.device("cpu"))
    x = torch.from_numpy(golden.array("x", (2, 3, 64, 64)))
    logits = model.head(model.features(x)).detach().numpy()
    np.testing.assert_allclose(logits, expected["outputs"][case]["logits"], atol=2e-5)
    logits = model.double().head(model.features(x.double())).detach().numpy()
    np.testing.assert_allclose(logits, expected["outputs"][case]["logits_float64"], rtol=1e-5, atol=1e-6)
    if attention == "none":
        back = task2.export_weights(model.float())
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    if attention == "se":  # this checkpoint's form is not ours: before pooling SE weighs the same, CBAM does not
        args.attention_place = "map"
        ours = task2.SliceClassifier(args).eval()
        ours.load_state_dict(saved["model"])
        assert ours.head(ours.features(x)).isfinite().all()


def test_attention_equals_the_papers_formulas():
    """SE eq. 2-4 and CBAM eq. 1-3, written out for one image."""
    torch.manual_seed(0)
    x = torch.randn(2, 32, 5, 6)
    se = task2.SE(32)
    down, up = se.excitation[0].weight, se.excitation[2].weight
    z = x[1].mean((1, 2))
    torch.testing.assert_close(se(x)[1], x[1] * torch.sigmoid(up @ torch.relu(down @ z))[:, None, None])

    cbam = task2.CBAM(32)
    down, up = cbam.channel_attention[0].weight[:, :, 0, 0], cbam.channel_attention[2].weight[:, :, 0, 0]
    hidden = [up @ torch.relu(down @ v) for v in (x[1].mean((1, 2)), x[1].amax((1, 2)))]
    y = x[1] * torch.sigmoid(hidden[0] + hidden[1])[:, None, None]
    both = torch.stack([y.mean(0), y.amax(0)])[None]
    y = y * torch.sigmoid(F.conv2d(both, cbam.spatial_attention[0].weight, padding=3))[0]
    torch.testing.assert_close(cbam(x)[1], y)
    assert not torch.allclose(task2.CBAM(32, summed=True)(x), x)
    before = task2.SliceClassifier(args_of("--model", "efficientnet_b0", "--use-attention", "cbam")).eval()
    seen = []
    before.attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape))
    before(torch.zeros(1, 1, 1, 64, 64, dtype=torch.uint8))
    assert seen == [(1, 1280, 2, 2)]  # the map, not its mean


def test_multiscale_fuses_three_stages():
    """Width is that of three stages, and a gradient reaches the head from each of them."""
    for name, width in (("resnet50", 3584), ("efficientnet_b0", 1432), ("densenet121", 2560)):
        model = task2.SliceClassifier(args_of("--model", name, "--use-multiscale")).eval()
        x = torch.randn(2, 3, 64, 64)
        f = model.features(x)
        assert f.shape == (2, width) == (2, sum(model.backbone.widths))
        torch.testing.assert_close(f, torch.cat([m.mean((2, 3)) for m in model.backbone(x)], 1), rtol=2e-3, atol=1e-4)


def test_weight_files(tmp_path, capsys):
    """torchvision, old DenseNet keys, CheXNet, `module.`, our own checkpoint: the backbone loads; heads stay out."""
    torch.manual_seed(1)
    for name, head in (("resnet50", "fc"), ("densenet121", "classifier"), ("efficientnet_b0", "classifier.1")):
        body = task2.build_backbone(args_of("--model", name)).state_dict()
        whole = {**body, f"{head}.weight": torch.zeros(1000, 4), f"{head}.bias": torch.zeros(1000)}
        layouts = {"torchvision": whole, "ddp": {f"module.{k}": v for k, v in whole.items()}}
        if name == "densenet121":
            old = {re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", k): v for k, v in whole.items()}
            assert "features.denseblock1.denselayer1.norm.1.weight" in old
            layouts |= {"old": old, "chexnet": {"state_dict": {f"module.densenet121.{k}": v for k, v in old.items()}}}
        for layout, state in layouts.items():
            torch.save(state, tmp_path / f"{layout}.pth")
            args = args_of("--model", name, "--pretrained", str(tmp_path / f"{layout}.pth"))
            model = task2.build_model(args, print)
            assert all(torch.equal(v, body[k]) for k, v in model.backbone.state_dict().items()), layout
        args = args_of("--model", name)
        model = task2.build_model(args)
        common.save_checkpoint(tmp_path / "own.ckpt", common.model_checkpoint("task2", args, model, {}))
        again = task2.build_model(args_of("--model", name, "--pretrained", str(tmp_path / "own.ckpt")), print)
        assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in again.backbone.state_dict().items())
    assert "loaded" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    cases = {
        "ctclip.pt": ({"visual_transformer.to_patch_emb.2.weight": torch.ones(2)}, "CT-CLIP"),
        "vgg.pth": ({"features.0.weight": torch.ones(2), "classifier.3.weight": torch.ones(2)}, "no tensor fits"),
        "other.pth": ({"conv1.weight": torch.ones(2, 2)}, "no tensor fits"),
    }  # fmt: skip
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(common.UserError, match=message):
            task2.build_model(args_of("--model", "efficientnet_b0", "--pretrained", str(tmp_path / name)), lambda x: 0)
    state = task2.build_backbone(args_of("--model", "resnet50")).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4.2")}, tmp_path / "part.pth")
    words = ("--model", "resnet50", "--pretrained", str(tmp_path / "part.pth"))
    with pytest.raises(common.UserError, match="--allow-partial"):
        task2.build_model(args_of(*words), lambda x: 0)
    model = task2.build_model(args_of(*words, "--allow-partial"), lambda x: 0)
    assert torch.equal(model.backbone.state_dict()["layer4.1.conv1.weight"], state["layer4.1.conv1.weight"])


def test_imagenet_weights_come_from_the_cache_or_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(common.UserError, match=r"resnet50-0676ba61.pth could not be had: no route .*--pretrained FILE"):
        task2.imagenet_weights("resnet50")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    state = task2.build_backbone(args_of("--model", "resnet50")).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "resnet50-0676ba61.pth")
    model = task2.build_model(args_of("--model", "resnet50", pretrained="imagenet"), lambda x: 0)
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])


def no_network(*words, **more):
    raise OSError("no route to host")


def frozen_stages(model):
    return [all(not p.requires_grad for m in stage for p in m.parameters()) for stage in model.backbone.stages()]


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "densenet121"])
def test_progressive_unfreezing(name):
    """Frozen until epoch N, then a stage an epoch from the last; a function of the epoch alone, so resume is right."""
    args = args_of("--model", name, "--progressive-unfreeze", "--unfreeze-epoch", "3")
    model = task2.SliceClassifier(args)
    n = len(model.backbone.stages())
    for epoch, free in ((0, 0), (2, 0), (3, 1), (4, 2), (3 + n, n), (99, n)):
        task2.set_trainable(model, args, epoch, lambda x: 0)
        assert frozen_stages(model) == [True] * (n - free) + [False] * free
    assert not task2.set_trainable(model, args, 100, lambda x: 0)
    assert sum(len(list(m.parameters())) for s in model.backbone.stages() for m in s) == len(
        list(model.backbone.parameters())
    )


def test_a_frozen_backbone_keeps_its_batch_norm():
    args = args_of("--model", "efficientnet_b0", "--freeze-backbone")
    model = task2.SliceClassifier(args)
    task2.set_trainable(model, args, 0, lambda x: 0)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model.train()
    loss = model(torch.randint(0, 255, (4, 1, 1, 64, 64), dtype=torch.uint8)).sum()
    loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.classifier.parameters())
    args.freeze_backbone = False
    task2.set_trainable(model, args, 0, lambda x: 0)
    model.train()
    model(torch.randint(0, 255, (4, 1, 1, 64, 64), dtype=torch.uint8))
    assert not torch.equal(model.backbone.features[0][1].running_mean, before["features.0.1.running_mean"])


def test_mil_equals_pooling_the_features():
    """Averaging the slices' logits by attention is the paper's z = sum a h with the same linear layer behind it."""
    torch.manual_seed(0)
    args = args_of("--model", "efficientnet_b0", "--aggregate", "mil", "--label-columns", "a", "b", "c")
    model = task2.SliceClassifier(args).eval()
    image = torch.randint(0, 255, (2, 5, 1, 64, 64), dtype=torch.uint8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    logits = model(image, mask=mask)
    for b in range(2):
        h = model.classifier[:-1](model.features(model.to_input(image[b, mask[b]])))  # (s, 512)
        m, last = model.mil, model.classifier[-1]
        for k in range(3):
            a = torch.softmax(m.score.weight[k] @ (torch.tanh(m.tanh(h)) * torch.sigmoid(m.gate(h))).T, 0)
            torch.testing.assert_close(logits[b, k], last.weight[k] @ (a @ h) + last.bias[k], atol=1e-5, rtol=1e-4)
        rows = model.slice_rows(image[b, mask[b]]).detach().numpy()
        np.testing.assert_allclose(task2.volume_probs(rows, args), logits[b].sigmoid().detach(), atol=1e-6)
    order = torch.randperm(5)
    torch.testing.assert_close(model(image[:1, order], mask=mask[:1]), logits[:1], atol=1e-5, rtol=1e-4)


def test_aggregates():
    """Against loops over plain numbers; unread slices are left out; a volume without any is NaN."""
    logits = np.float32([[0.0, -2], [1.0, 3], [-1.0, 1000], [np.nan, np.nan]])
    p = [[1 / (1 + math.exp(-x)) if x < 700 else 1.0 for x in row] for row in logits[:3].tolist()]
    for k in range(2):
        column = sorted((row[k] for row in p), reverse=True)
        expected = {
            "mean": sum(column) / 3,
            "max": column[0],
            "topk": (column[0] + column[1]) / 2,
            "noisy-or": 1 - math.prod(1 - x for x in column),
        }
        for how, value in expected.items():
            args = args_of("--aggregate", how, "--top-slices", "2", "--label-columns", "a", "b")
            assert task2.volume_probs(logits, args)[k] == pytest.approx(value, abs=1e-7)
            assert task2.volume_probs(logits, args_of("--label-columns", "a", "b", "--top-slices", "2"), how)[
                k
            ] == pytest.approx(value, abs=1e-7)
    assert np.isnan(task2.volume_probs(logits[3:], args_of("--label-columns", "a", "b"))).all()


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "densenet121"])
def test_grad_checkpointing_changes_nothing_but_memory(name):
    """Gradients and batch-norm statistics are equal, although blocks run twice; far less is kept for backward."""
    torch.manual_seed(0)
    image = torch.randint(0, 255, (2, 1, 1, 64, 64), dtype=torch.uint8)
    grads, states, kept = [], [], []
    for more in ([], ["--grad-checkpointing"]):
        args = args_of("--model", name, "--dropout-rate", "0", *more)
        torch.manual_seed(3)
        model = task2.SliceClassifier(args).train()
        own, sizes = {p.data_ptr() for p in model.parameters()}, {}

        def keep(x, own=own, sizes=sizes):
            if x.data_ptr() not in own:
                sizes[x.data_ptr()] = x.nbytes
            return x

        torch.manual_seed(4)  # of stochastic depth
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(image).square().sum()
        kept.append(sum(sizes.values()))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        states.append({k: v for k, v in model.state_dict().items() if "running" in k or "tracked" in k})
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()) and len(states[0]) > 100
    assert kept[1] < 0.5 * kept[0], kept


def test_forward_flops_against_a_count_by_hand():
    """ResNet-50 at 224: 4.09 billion multiply-adds (the paper says 3.8 for the form with strides in the 1x1)."""
    args = args_of("--model", "resnet50", "--label-columns", "a", image_size=224)
    model = task2.SliceClassifier(args)
    assert task2.forward_flops(model, args) == pytest.approx(2 * 4.089e9, rel=2e-3)
    bag = args_of(
        "--model", "resnet50", "--label-columns", "a", "--aggregate", "mil", "--bag-size", "5", image_size=224
    )
    assert task2.forward_flops(task2.SliceClassifier(bag), bag) == pytest.approx(5 * 2 * 4.089e9, rel=2e-3)
