"""Models of train_csi.py: parity with the original tool, transformers and torchvision; weight layouts; zones; maps."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Evil

import common
import train_csi as csi


def args_of(*words, **more):
    args = csi.parse_args(["--pretrained", "none", "--image-size", "64", *map(str, words)])
    args.mean, args.std = [0.5], [0.5]
    vars(args).update(more)
    return args


def model_of(*words, **more):
    torch.manual_seed(0)
    return csi.ZoneModel(args_of(*words, **more)).eval()


GOLDEN = {"ResNet50": "resnet50", "CheXNet": "chexnet_densenet121", "Custom_1": "custom_1"}


@pytest.fixture
def original(golden):
    """name -> (the original tool's model with the golden weights, normalised input, the golden outputs)."""
    expected = golden.load("golden_csi_backbones")

    def make(name, *words, normalised=True):
        part = expected["outputs"][GOLDEN[name]]
        shapes = {k: v for k, v in part["backbone_state"].items() if not k.startswith(("fc.", "classifier."))}
        model = model_of("--model", name, "--zone-focus", "none", *words, rectified=False)
        assert {k: list(v.shape) for k, v in model.backbone.state_dict().items()} == {
            k: v[0] for k, v in shapes.items()
        }
        model.backbone.load_state_dict(golden.fill_state_dict(shapes))
        model.head.load_state_dict(golden.fill_state_dict(part["head_state"]))
        x = torch.from_numpy(golden.array("csi/pixels", (2, 3, 96, 64)))
        return model, x * 0.5 + 0.5, expected["outputs"]  # the model normalises: (x - 0.5) / 0.5

    return make


@pytest.mark.parametrize("name", GOLDEN)
def test_backbone_and_head_equal_the_original(original, name):
    model, x, outputs = original(name)
    expected = outputs[GOLDEN[name]]
    with torch.no_grad():
        features, logits = model.features(x)[0][:, 0], model(x)
    np.testing.assert_allclose(features[0, ::8].numpy(), expected["features_stride8_row0"], atol=3e-5)
    np.testing.assert_allclose(features.mean(), expected["features_mean"], atol=1e-5)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=5e-5)


@pytest.mark.parametrize("strategy", ["zero", "attention"])
def test_masking_equals_the_original(original, strategy):
    words = ["--masking-strategy", strategy]
    model, x, outputs = original("Custom_1", *words)
    model.args.zone_focus = "masking"
    key = {"zero": "zero_masking_logits", "attention": "attention_masking_0.7_logits"}[strategy]
    with torch.no_grad():
        found = model(x)
    np.testing.assert_allclose(found.numpy(), outputs["custom_1_zone_masking_grid"][key], atol=2e-6)


def test_densenet_without_its_last_relu_differs(original):
    model, x, _ = original("CheXNet")
    bare = model.features(x)[0]
    model.backbone.rectified = True
    assert bare.min() < 0 <= model.features(x)[0].min()


@pytest.mark.parametrize("case,shape", [("56", (2, 3, 56, 56)), ("84x70", (2, 3, 84, 70)), ("42", (1, 3, 42, 42))])
def test_dino_equals_transformers(golden, case, shape):
    """Pooler output and last hidden state, also on grids that the positions are resampled to."""
    expected = golden.load("golden_dinov2")
    model = csi.Dino(cls=True, width=64, depth=2, heads=4, grid=4).eval()
    state = golden.fill_state_dict(expected["state"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: list(v.shape) for k, v in state.items()}
    model.load_state_dict(state)
    x = torch.from_numpy(golden.array(f"dinov2/pixels{case}", shape))
    name = case if case == "56" else f"{case}_interpolated_pos"
    with torch.no_grad():
        token = model(x)[0]
        model.cls = False
        tokens = torch.cat([token[:, None], model(x)[0].flatten(2).transpose(1, 2)], 1)
    np.testing.assert_allclose(token.numpy(), expected["outputs"][name]["pooler_output"], atol=1e-5)
    whole = expected["outputs"][name]["last_hidden_state"]
    assert list(tokens.shape) == whole["shape"]
    np.testing.assert_allclose(tokens.flatten()[:: whole["stride"]].numpy(), whole["sample"], atol=1e-5)


def test_dino_gradients_equal_transformers():
    """Every parameter's gradient, on a grid that needs resampling."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    peer = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model = csi.Dino(cls=False, width=64, depth=2, heads=4, grid=4).eval()
    args = args_of("--model", "RadDINO", "--image-size", 84)
    state, kind = csi.model_weights({k: v.clone() for k, v in peer.state_dict().items()}, args)  # names in memory
    assert kind == "raddino"
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    x = torch.randn(2, 3, 84, 70)
    ours = model(x)[0].flatten(2).transpose(1, 2)
    theirs = peer(x).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = {k: p.grad for k, p in peer.named_parameters() if p.grad is not None}
    renamed = csi.model_weights(grads, args)[0]
    own = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == {k.removeprefix("backbone.") for k in renamed} - {"embeddings.mask_token"}
    for name, grad in own.items():
        torch.testing.assert_close(grad, renamed[f"backbone.{name}"], atol=2e-3, rtol=1e-3, msg=name)


def test_raddino_has_the_released_names_and_shapes(golden):
    with torch.device("meta"):
        model = csi.get_backbone("RadDINO")
    expected = golden.load("keys_raddino_full")
    expected = expected.get("state", expected.get("keys", expected))
    shapes = {k: list(v[0] if isinstance(v[0], list) else v) for k, v in expected.items()}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == 86_580_480


@pytest.mark.parametrize("text", ["ResNet50", "resnet50", "CHEXNET", "densenet121", "RadDINO", "raddino", "custom_1"])
def test_names_of_models_in_any_case(text):
    with torch.device("meta"):
        assert csi.get_backbone(text) is not None
    assert csi.parse_args(["--model-arch", text]).model in csi.WIDTHS


def torchvision_state(name):
    """A state dict as torchvision has it, with a head; made up."""
    torch.manual_seed(1)
    state = {k: torch.randn(v.shape) if v.is_floating_point() else v
             for k, v in csi.get_backbone(name).state_dict().items()}  # fmt: skip
    head = "fc" if name == "ResNet50" else "classifier"
    return state | {f"{head}.weight": torch.randn(1000, csi.WIDTHS[name]), f"{head}.bias": torch.randn(1000)}


def original_state(name, model):
    """What the original tool would have saved: the backbone twice, and the heads."""
    state = csi.export_weights(model)
    return state | {"backbone.backbone.fc.weight": torch.randn(1000, 4)} if name != "RadDINO" else state


@pytest.mark.parametrize("name", ["ResNet50", "CheXNet"])
def test_layouts_of_torchvision(name, tmp_path):
    """Plain, in a wrapper with module., old DenseNet keys, CheXNet's form: the same backbone and features."""
    state = torchvision_state(name)
    body = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    layouts = {"plain": state, "wrapped": {"state_dict": {f"module.{k}": v for k, v in state.items()}}}
    if name == "CheXNet":
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", k): v for k, v in state.items()}
        assert old.keys() != state.keys()
        layouts |= {"old": old, "chexnet": {"state_dict": {f"module.densenet121.{k}": v for k, v in old.items()}}}
    for form, content in layouts.items():
        torch.save(content, tmp_path / f"{form}.pth")
        said = []
        args = args_of("--model", name, pretrained=str(tmp_path / f"{form}.pth"))
        model = csi.build_model(args, said.append)
        assert all(torch.equal(v, body[k]) for k, v in model.backbone.state_dict().items()), form
        assert args.mean == csi.NORMALIZATIONS["imagenet"][0]
        assert any(re.search(r"unexpected +0", line) for line in said)


def test_one_channel_weights_give_the_same_features(tmp_path):
    """TorchXRayVision's first convolution has one channel; a film in three equal ones must give what it gave in one."""
    state = torchvision_state("CheXNet")
    one = state["features.conv0.weight"].sum(1, keepdim=True)
    xrv = state | {"features.conv0.weight": one, "op_threshs": torch.full((18,), 0.5)}
    torch.save(xrv, tmp_path / "xrv.pt")
    args = args_of("--model", "CheXNet", pretrained=str(tmp_path / "xrv.pt"))
    model = csi.build_model(args, lambda line: None)
    film = torch.rand(1, 1, 64, 64)
    expected = F.conv2d((2 * film - 1) * 1024, one, stride=2, padding=3)
    x = ((film - model.mean) / model.std).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model.backbone.features.conv0(x), expected, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("name", ["ResNet50", "CheXNet", "Custom_1"])
def test_the_originals_own_checkpoint(name, tmp_path):
    """Loads with its heads and gives the same outputs; --export writes it."""
    model = model_of("--model", name, "--zone-focus", "masking", rectified=False)
    content = {"epoch": 3, "model_state_dict": original_state(name, model), "loss": 1.0}
    torch.save(content, tmp_path / "original.pth")
    args = args_of("--model", name, "--zone-focus", "masking", pretrained=str(tmp_path / "original.pth"))
    loaded = csi.build_model(args, lambda line: None).eval()
    film = torch.rand(2, 1, 64, 64)
    assert not args.rectified or name != "CheXNet"
    torch.testing.assert_close(loaded(film), model(film))


def test_raddino_checkpoint_of_the_original_and_of_transformers(tmp_path, monkeypatch):
    small = lambda cls: csi.Dino(cls, width=64, depth=1, heads=4, grid=4)  # noqa: E731
    monkeypatch.setitem(csi.WIDTHS, "RadDINO", 64)
    monkeypatch.setattr(csi, "get_backbone", lambda name, focus: small(focus != "pool"))
    model = model_of("--model", "RadDINO", "--zone-focus", "none", "--image-size", 56)
    film = torch.rand(2, 1, 56, 56)
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    common.save_weights(tmp_path / "model.safetensors", state)
    torch.save({"model_state_dict": csi.export_weights(model)}, tmp_path / "original.pth")
    for file in ("model.safetensors", "original.pth"):
        args = args_of(
            "--model", "RadDINO", "--zone-focus", "none", "--image-size", 56, pretrained=str(tmp_path / file)
        )
        loaded = csi.build_model(args, lambda line: None).eval()
        assert args.mean == ([0.5307] if file.startswith("model") else [0.5])
        features = loaded.features(film * 0 + 0.3)[0]
        assert features.shape == (2, 6, 64)
        assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in state.items())
    assert torch.equal(loaded(film), model(film))


@pytest.mark.parametrize("what", ["evil", "other", "cut", "lacking", "heads", "chexnet"])
def test_refused_weights(what, tmp_path):
    path = tmp_path / "w.pth"
    state = torchvision_state("ResNet50")
    torch.save(
        {"evil": {"model_state_dict": state, "config": Evil()}, "other": {"a": torch.ones(1)}}.get(what, state), path
    )
    if what == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    if what == "heads":  # nothing of the backbone
        torch.save({"fc.weight": torch.ones(2, 2)}, path)
    if what == "chexnet":  # the original tool's, of another architecture
        model = model_of("--model", "CheXNet", "--zone-focus", "masking")
        torch.save({"model_state_dict": csi.export_weights(model)}, path)
    if what == "lacking":
        torch.save({k: v for k, v in state.items() if "layer4" not in k}, path)
    with pytest.raises(common.UserError, match="w.pth"):
        csi.build_model(args_of("--model", "ResNet50", pretrained=str(path)), lambda line: None)
    assert not (tmp_path.parent / "plainscan_was_owned").exists()


def test_pretrained_without_weights_at_hand_is_an_error(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(common.UserError, match="put the file into .*checkpoints.*--pretrained FILE or none"):
        csi.build_model(args_of("--model", "ResNet50", pretrained="true"))
    with pytest.raises(common.UserError, match="no published weights"):
        csi.build_model(args_of("--model", "Custom_1", pretrained="true"))
    monkeypatch.setattr(
        common, "_download", lambda hub_id: (_ for _ in ()).throw(common.UserError(f"{hub_id}: offline"))
    )
    with pytest.raises(common.UserError, match="microsoft/rad-dino"):
        csi.build_model(args_of("--model", "RadDINO", "--image-size", 56, pretrained="true"))


def test_zones_of_one_pass_see_their_own_place():
    """Pooling of a map of places: each zone's feature is the mean of its third and half."""
    x = torch.zeros(1, 2, 6, 4)
    for i in range(6):
        row, column = divmod(i, 2)
        x[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = i
    assert csi.pool_zones(x, csi.zone_masks(None, torch.zeros(1, 3, 12, 8)))[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    zones = torch.zeros(1, 12, 8, dtype=torch.uint8)
    zones[0, 4:8, 0:4] = 3  # only right_mid, and only there
    found = csi.pool_zones(x, csi.zone_masks(zones, x))[0, :, 0]
    assert found[2] == 2 and found[[0, 1, 3, 4, 5]].abs().sum() == 0


def test_masks_of_the_grid_follow_the_original():
    """Rows of H // 3, columns of W // 2, the last ones take what is left."""
    masks = csi.zone_masks(None, torch.zeros(1, 1, 100, 65))[0]
    assert masks.sum(0).eq(1).all()
    assert [int(m.any(1).sum()) for m in masks[::2]] == [33, 33, 34]
    assert [int(m.any(0).sum()) for m in masks[:2]] == [32, 33]


@pytest.mark.parametrize("name", ["ResNet50", "Custom_1", "CheXNet"])
@pytest.mark.parametrize("focus", ["pool", "masking", "none"])
def test_forms_and_shapes(name, focus):
    model = model_of("--model", name, "--zone-focus", focus, "--loss", "corn")
    with torch.no_grad():
        assert model(torch.rand(2, 1, 64, 64)).shape == (2, 6, 4)  # three of CORN and "gradable"


def test_our_own_checkpoint_keeps_its_scale_as_pretrained_weights(tmp_path):
    """Averaged weights, ImageNet's scale, no last ReLU: the same outputs; the head of another loss is left out."""
    mean, std = csi.NORMALIZATIONS["imagenet"]
    model = model_of("--model", "CheXNet", mean=mean, std=std, rectified=False)
    saved = common.model_checkpoint("csi", model.args, model, {})
    worse = {k: torch.zeros_like(v) for k, v in saved["model"].items()}
    common.save_checkpoint(tmp_path / "m.pth", saved | {"model": worse, "ema": saved["model"]})
    film = torch.rand(1, 1, 64, 64)
    same = csi.build_model(args_of("--model", "CheXNet", pretrained=str(tmp_path / "m.pth"), mean=None), print).eval()
    torch.testing.assert_close(same(film), model(film))
    args = args_of("--model", "CheXNet", "--loss", "emd", pretrained=str(tmp_path / "m.pth"), mean=None)
    other = csi.build_model(args, print).eval()
    torch.testing.assert_close(other.features(film)[0], model.features(film)[0])
    assert not torch.equal(other.head.zone_classifiers[0].weight, model.head.zone_classifiers[0].weight)


@pytest.mark.parametrize("name", ["CheXNet", "Custom_1"])
def test_an_exported_model_is_the_one_that_was_trained(name, tmp_path):
    """--export trains in the original's form from the start: its scale of the pixels, and no last ReLU."""
    words = ["--model", name, "--zone-focus", "masking", "--export", tmp_path / "w.pth"]
    torch.save(csi.get_backbone("CheXNet").state_dict(), tmp_path / "imagenet.pth")
    args = args_of(
        *words, mean=None, std=None, pretrained=str(tmp_path / "imagenet.pth") if name == "CheXNet" else "none"
    )
    model = csi.build_model(args, print).eval()
    common.save_weights(args.export, csi.export_weights(model))
    again = args_of(*words[:4], mean=None, std=None, pretrained=str(args.export))
    film = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(csi.build_model(again, print).eval()(film), model(film))
    with pytest.raises(common.UserError, match="does not scale pixels by"):
        args_of(*words, "--normalization", "imagenet")


def test_bare_weights_of_the_original_bring_their_form(tmp_path):
    model = model_of("--model", "CheXNet", "--zone-focus", "masking", rectified=False)
    torch.save({"model_state_dict": csi.export_weights(model)}, tmp_path / "original.pth")
    other, film = model_of("--model", "CheXNet", "--zone-focus", "masking"), torch.rand(1, 1, 64, 64)
    csi.load_checkpoint(other, tmp_path / "original.pth")
    torch.testing.assert_close(other.eval()(film), model(film))


def test_load_checkpoint_takes_over_the_scale_of_the_pixels(tmp_path):
    """Trained on the scale of ImageNet, loaded into the defaults: the same outputs; another form is refused."""
    mean, std = csi.NORMALIZATIONS["imagenet"]
    model = model_of("--model", "CheXNet", mean=mean, std=std, rectified=False)
    common.save_checkpoint(tmp_path / "m.pth", common.model_checkpoint("csi", model.args, model, {}))
    other, film = model_of("--model", "CheXNet"), torch.rand(1, 1, 64, 64)
    csi.load_checkpoint(other, tmp_path / "m.pth")
    torch.testing.assert_close(other.eval()(film), model(film))
    with pytest.raises(common.UserError, match="zone_focus is pool there and none in this model"):
        csi.load_checkpoint(model_of("--model", "CheXNet", "--zone-focus", "none"), tmp_path / "m.pth")


def test_checkpointing_changes_nothing_but_memory():
    film = torch.rand(2, 1, 64, 64)
    grads = []
    for words in ([], ["--grad-checkpointing"]):
        model = model_of("--model", "ResNet50", *words).train()
        model.head.dropout.p = 0.0
        model(film).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_frozen_backbone_rests():
    model = model_of("--model", "Custom_1", "--freeze-backbone")
    assert csi.set_trainable(model, model.args, 0) and not csi.set_trainable(model, model.args, 1)
    model.train()
    before = model.backbone.features[1].running_mean.clone()
    model(torch.rand(4, 1, 64, 64)).sum().backward()
    assert torch.equal(before, model.backbone.features[1].running_mean)
    assert (
        all(p.grad is None for p in model.backbone.parameters())
        and model.head.zone_classifiers[0].weight.grad is not None
    )


# ---- maps


class OneFilm:
    """A data set of one film of noise, with a bright patch where asked."""

    def __init__(self, patch=None, side=224):
        torch.manual_seed(0)
        self.image = 0.2 * torch.rand(1, side, side)
        if patch:
            y, x = patch
            self.image[:, y : y + 28, x : x + 28] = 1.0

    def __getitem__(self, key):
        return {"image": self.image, "target": torch.zeros(6, dtype=torch.int64)}


def bright_model(*words):
    """A model whose severity grows with brightness: its map must lie on the bright patch."""
    model = model_of("--model", "Custom_1", "--image-size", 224, *words, mean=[0.0], std=[1.0])
    for module in model.backbone.features:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)
            middle = module.weight.shape[-1] // 2
            module.weight.data[:, :, middle, middle] = 1 / module.weight.shape[1]  # each place sees itself
    for layer in model.head.zone_classifiers:
        torch.nn.init.zeros_(layer.weight)
        layer.weight.data[3] = 0.01
    return model


def test_the_map_lies_on_the_planted_patch_and_moves_with_it():
    model = bright_model()
    for i, (y, x) in enumerate([(20, 40), (20, 160), (100, 40), (100, 160), (180, 40), (180, 160)]):
        maps = csi.zone_maps(model, OneFilm((y, x)), 0, "cpu")
        top = np.unravel_index(maps[i].argmax(), maps[i].shape)
        assert abs(top[0] - y - 14) < 40 and abs(top[1] - x - 14) < 40, (i, top)  # a cell of the map has 32 pixels
        assert maps.max() == 1 and maps[i].sum() == maps.sum((1, 2)).max()  # the zone of the patch is the brightest


def test_the_map_changes_with_the_weights_and_the_zone():
    film, model = OneFilm((20, 40)), model_of("--model", "Custom_1", "--image-size", 224)
    first = csi.zone_maps(model, film, 0, "cpu")
    assert not np.allclose(first[0], first[1])
    with torch.no_grad():
        model.backbone.features[0].weight += torch.randn_like(model.backbone.features[0].weight)
    assert not np.allclose(first, csi.zone_maps(model, film, 0, "cpu"), atol=0.05)


def test_the_map_is_the_zones_share_of_the_score():
    """For one linear layer on pooled features, gradient times activation sums up to the change of the logits."""
    model = model_of("--model", "Custom_1", "--image-size", 224)
    item = OneFilm((20, 40))[0]
    features, x = model.features(item["image"][None])
    logit = model.head(features)[0, 0, 3]
    gradient = torch.autograd.grad(logit, x)[0]
    bias = model.head.zone_classifiers[0].bias[3]
    torch.testing.assert_close((gradient * x).sum(), logit - bias)


def test_no_map_is_better_than_an_invented_one(monkeypatch):
    monkeypatch.setitem(csi.WIDTHS, "RadDINO", 64)
    monkeypatch.setattr(csi, "get_backbone", lambda name, focus: csi.Dino(focus != "pool", 64, 1, 4, 4))
    film = OneFilm(side=56)
    model = model_of("--model", "RadDINO", "--zone-focus", "none", "--image-size", 56)
    assert csi.zone_maps(model, film, 0, "cpu") is None  # a class token has no places
    model = model_of("--model", "RadDINO", "--image-size", 56)
    assert csi.zone_maps(model, film, 0, "cpu").shape == (6, 56, 56)
    for layer in model.head.zone_classifiers:
        torch.nn.init.zeros_(layer.weight)
    assert csi.zone_maps(model, film, 0, "cpu") is None  # nothing speaks for severity
    model.head.zone_classifiers[0].weight.data.fill_(float("nan"))
    assert csi.zone_maps(model, film, 0, "cpu") is None


def test_maps_of_masking_are_each_zones_own():
    model = model_of("--model", "Custom_1", "--zone-focus", "masking", "--masking-strategy", "zero")
    assert csi.zone_maps(model, OneFilm((20, 40)), 0, "cpu").shape == (6, 224, 224)
