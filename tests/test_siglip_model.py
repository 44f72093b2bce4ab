"""finetune_siglip.py: models against the originals' outputs, weight layouts, freezing, gradients."""

import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import finetune_siglip as siglip
from common import UserError

TINY = {"family": "siglip", "width": 64, "layers": 3, "heads": 4, "mlp": 128, "patch": 16, "image": 64}


def make_args(*words):
    args = siglip.parse_args(["--csv", "none.csv", "--pretrained", "none", *map(str, words)])
    siglip.prepare_config(args, say=lambda _: None)
    return args


def classifier(*words):
    torch.manual_seed(0)
    return siglip.CTClassifier(make_args(*words))


@pytest.fixture(scope="module")
def vision(golden):
    g = golden.load("golden_siglip_vision")
    state = golden.fill_state_dict(g["state"])
    family, mine = siglip.backbone_weights(state, "golden")
    assert family == "siglip"
    model = siglip.SiglipVision(TINY).eval()
    model.load_state_dict(mine)
    return g, state, model


def sampled(tensor, spec):
    return tensor.detach().flatten()[:: spec.get("stride", 1)].double().numpy()


def close(tensor, spec, atol=2e-5):
    np.testing.assert_allclose(sampled(tensor, spec), np.array(spec["values"]), atol=atol, rtol=1e-5)


def test_vit_equals_hugging_face(vision, golden):
    g, state, model = vision
    x = torch.from_numpy(golden.array("pixel_values", (2, 3, 64, 64)))
    close(model.tokens(x), g["outputs"]["last_hidden_state"])
    close(model(x), g["outputs"]["pooler_output"])
    head = golden.fill_state_dict(g["state_classifier"])  # SiglipForImageClassification: mean of the patch tokens
    close(
        F.linear(model.tokens(x).mean(1), head["classifier.weight"], head["classifier.bias"]),
        g["outputs"]["classifier_logits"],
    )


def test_positions_interpolate_as_hugging_face(vision, golden):
    g, _, model = vision
    close(model.positions(6, 6), g["outputs"]["interp96_position_embedding"], 1e-6)
    square = torch.from_numpy(golden.array("pixel_values_96", (1, 3, 96, 96)))
    close(model.tokens(square), g["outputs"]["interp96_last_hidden_state"], 5e-5)
    close(model(square), g["outputs"]["interp96_pooler_output"], 5e-5)
    close(
        model(torch.from_numpy(golden.array("pixel_values_64x96", (1, 3, 64, 96)))),
        g["outputs"]["interp64x96_pooler_output"],
        5e-5,
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_vit_gradients_equal_hugging_face(vision, golden, recompute):
    g, _, model = vision
    model.grad_checkpointing = recompute
    model.train().zero_grad()
    pooled = model(torch.from_numpy(golden.array("pixel_values", (2, 3, 64, 64))))
    (pooled * torch.from_numpy(golden.array("grad_pooler", (2, 64)))).sum().backward()
    theirs = {k.removeprefix("vision_model."): v for k, v in g["outputs"]["grad_norms"].items()}
    mine = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    assert mine.keys() == theirs.keys()
    for key, norm in theirs.items():
        assert math.isclose(mine[key], norm, rel_tol=2e-4, abs_tol=1e-3), (key, mine[key], norm)
    model.eval().grad_checkpointing = False


def test_merlin_equals_the_original(golden):
    g = golden.load("golden_merlin_i3resnet")
    state = golden.fill_state_dict(g["state"])
    family, mine = siglip.backbone_weights(state, "golden")
    assert family == "merlin" and siglip.config_of(family, mine, "x")["blocks"] == [1, 1, 1, 1]
    model = siglip.MerlinResNet({"blocks": [1, 1, 1, 1]}).eval()
    model.load_state_dict(mine)
    volume = torch.from_numpy(golden.array("volume", (2, 1, 64, 64, 32))).permute(0, 1, 4, 2, 3)  # (B, C, D, H, W)
    features = model(volume.expand(-1, 3, -1, -1, -1))
    close(features, g["outputs"]["embedding_volume"], 1e-4)
    close(
        model(torch.from_numpy(golden.array("volume3", (1, 3, 64, 64, 32))).permute(0, 1, 4, 2, 3)),
        g["outputs"]["embedding_volume3"],
        1e-4,
    )
    prefix = "visual.model.encode_image.i3_resnet."
    for head, out in (
        ("contrastive_head", "contrastive_512"),
        ("classifier", "ehr_1692"),
    ):  # not built: nothing uses them
        weight, bias = state[f"{prefix}{head}.weight"].flatten(1), state[f"{prefix}{head}.bias"]
        close(F.linear(features, weight, bias), g["outputs"][out], 1e-4)


def test_merlin_sees_the_volume_in_its_own_orientation():
    """Merlin's arrays run (x to the right, y to the front); ours run (to the back, to the left)."""
    model = classifier("--arch", "merlin-tiny", "--num-slices", 4, "--image-size", 16)
    seen = []
    model.backbone.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    volume = torch.full((1, 4, 16, 16), -1000, dtype=torch.int16)
    volume[0, 1, 2, 3] = 1000  # slice 1, near the front, on the right
    model.eval()(volume)
    assert seen[0].shape == (1, 3, 4, 16, 16)
    assert torch.nonzero(seen[0][0, 2] > 0.5).tolist() == [[1, 12, 13]]  # x = 15 - 3, y = 15 - 2


@pytest.mark.parametrize("name", ["base-224", "large-384", "so400m-384"])
def test_full_size_keys(golden, name):
    keys = golden.load("keys_siglip_full")["keys"]
    theirs = next(v for k, v in keys.items() if name.split("-")[0] in k)
    theirs = {k: tuple(v) for k, v in theirs.items() if k.startswith("vision_model.")}
    with torch.device("meta"):
        model = siglip.SiglipVision(siglip.ARCHS[name])
    assert {"vision_model." + k: tuple(v.shape) for k, v in model.state_dict().items()} == theirs
    assert siglip.config_of("siglip", model.state_dict(), "nowhere") == siglip.ARCHS[name]


def test_full_size_merlin_keys(golden):
    g = golden.load("keys_merlin_i3resnet152")
    theirs = g["keys"]
    with torch.device("meta"):
        model = siglip.MerlinResNet(siglip.ARCHS["merlin"])
    _, mine = siglip.backbone_weights({k: torch.empty(v, device="meta") for k, v in theirs.items()}, "keys")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in model.state_dict().items()}


def to_timm(state):
    """Hugging Face names -> timm names, written the other way round than the loader does."""
    s = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    width = s["post_layernorm.weight"].shape[0]
    out = {
        "patch_embed.proj.weight": s["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": s["embeddings.patch_embedding.bias"],
        "pos_embed": s["embeddings.position_embedding.weight"][None],
        "norm.weight": s["post_layernorm.weight"],
        "norm.bias": s["post_layernorm.bias"],
        "attn_pool.latent": s["head.probe"],
    }
    for n in ("weight", "bias"):
        packed = s[f"head.attention.in_proj_{n}"]
        out |= {f"attn_pool.q.{n}": packed[:width], f"attn_pool.kv.{n}": packed[width:]}
        out |= {
            f"attn_pool.proj.{n}": s[f"head.attention.out_proj.{n}"],
            f"attn_pool.norm.{n}": s[f"head.layernorm.{n}"],
        }
        out |= {f"attn_pool.mlp.{f}.{n}": s[f"head.mlp.{f}.{n}"] for f in ("fc1", "fc2")}
        for i in range(3):
            a, b = f"encoder.layers.{i}.", f"blocks.{i}."
            out[f"{b}attn.qkv.{n}"] = torch.cat([s[f"{a}self_attn.{p}_proj.{n}"] for p in "qkv"])
            out[f"{b}attn.proj.{n}"] = s[f"{a}self_attn.out_proj.{n}"]
            out |= {f"{b}norm{j}.{n}": s[f"{a}layer_norm{j}.{n}"] for j in (1, 2)}
            out |= {f"{b}mlp.{f}.{n}": s[f"{a}mlp.{f}.{n}"] for f in ("fc1", "fc2")}
    return out


def to_big_vision(state, scanned):
    s = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    D, heads = s["post_layernorm.weight"].shape[0], 4
    out = {}

    def linear(name, weight, bias):
        out[f"{name}/kernel"], out[f"{name}/bias"] = weight.T.contiguous(), bias

    def attention(name, weights):
        for part, (w, b) in weights.items():
            if part == "out":
                out[f"{name}/out/kernel"], out[f"{name}/out/bias"] = w.T.reshape(heads, D // heads, D), b
            else:
                out[f"{name}/{part}/kernel"] = w.T.reshape(D, heads, D // heads)
                out[f"{name}/{part}/bias"] = b.reshape(heads, D // heads)

    def norm(name, theirs):
        out[f"{name}/scale"], out[f"{name}/bias"] = s[f"{theirs}.weight"], s[f"{theirs}.bias"]

    out["embedding/kernel"] = s["embeddings.patch_embedding.weight"].permute(2, 3, 1, 0)
    out["embedding/bias"] = s["embeddings.patch_embedding.bias"]
    out["pos_embedding"] = s["embeddings.position_embedding.weight"][None]
    norm("Transformer/encoder_norm", "post_layernorm")
    for i in range(3):
        b, a = f"Transformer/encoderblock_{i}", f"encoder.layers.{i}"
        norm(f"{b}/LayerNorm_0", f"{a}.layer_norm1")
        norm(f"{b}/LayerNorm_1", f"{a}.layer_norm2")
        parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        attention(
            f"{b}/MultiHeadDotProductAttention_0",
            {p: (s[f"{a}.self_attn.{q}.weight"], s[f"{a}.self_attn.{q}.bias"]) for p, q in parts.items()},
        )
        for j in (0, 1):
            linear(f"{b}/MlpBlock_0/Dense_{j}", s[f"{a}.mlp.fc{j + 1}.weight"], s[f"{a}.mlp.fc{j + 1}.bias"])
    out["MAPHead_0/probe"] = s["head.probe"]
    norm("MAPHead_0/LayerNorm_0", "head.layernorm")
    w, b = s["head.attention.in_proj_weight"].chunk(3), s["head.attention.in_proj_bias"].chunk(3)
    pool = dict(zip(("query", "key", "value"), zip(w, b, strict=True), strict=True))
    pool["out"] = (s["head.attention.out_proj.weight"], s["head.attention.out_proj.bias"])
    attention("MAPHead_0/MultiHeadDotProductAttention_0", pool)
    for j in (0, 1):
        linear(f"MAPHead_0/MlpBlock_0/Dense_{j}", s[f"head.mlp.fc{j + 1}.weight"], s[f"head.mlp.fc{j + 1}.bias"])
    if scanned:
        names = {k.split("/", 2)[2] for k in out if "encoderblock_0/" in k}
        for name in names:
            out[f"Transformer/encoderblock/{name}"] = torch.stack(
                [out.pop(f"Transformer/encoderblock_{i}/{name}") for i in range(3)]
            )
        return {f"img/{k}": v for k, v in out.items()}
    return {f"params/img/{k}": v for k, v in out.items()} | {
        "params/txt/Embed_0/embedding": torch.zeros(5, D),
        "params/t": torch.zeros(1),
    }


@pytest.mark.parametrize(
    "layout",
    [
        "v4",
        "v5",
        "siglip.",
        "_orig_mod.module.",
        "full",
        "timm",
        "open_clip",
        "big_vision",
        "scanned",
        "ours",
        "sharded",
    ],
)
def test_every_layout_gives_the_same_model(vision, golden, tmp_path, layout):
    """A file of each layout, read from disk by the public path, gives the golden features."""
    g, state, _ = vision
    path = tmp_path / (
        "w.npz" if layout in ("big_vision", "scanned") else "w.safetensors" if layout == "v5" else "w.bin"
    )
    if layout == "v5":
        common.save_weights(path, {k.removeprefix("vision_model."): v for k, v in state.items()})
    elif layout in ("big_vision", "scanned"):
        np.savez(path, **{k: v.numpy() for k, v in to_big_vision(state, layout == "scanned").items()})
    elif layout == "sharded":
        keys = sorted(state)
        for i, part in enumerate((keys[:20], keys[20:])):
            common.save_weights(tmp_path / f"model-0000{i + 1}-of-00002.safetensors", {k: state[k] for k in part})
        path = tmp_path
    else:
        prefixed = {
            "v4": lambda: state,
            "siglip.": lambda: {"siglip." + k: v for k, v in state.items()},
            "_orig_mod.module.": lambda: {"model": {"_orig_mod.module." + k: v for k, v in state.items()}},
            "full": lambda: {
                **state,
                "text_model.embeddings.token_embedding.weight": torch.zeros(9, 64),
                "logit_scale": torch.zeros(1),
            },
            "timm": lambda: {"state_dict": to_timm(state)},
            "open_clip": lambda: (
                {f"visual.trunk.{k}": v for k, v in to_timm(state).items()} | {"text.x": torch.zeros(1)}
            ),
            "ours": lambda: {
                "format": 1,
                "model": {"backbone." + k.removeprefix("vision_model."): v for k, v in state.items()}
                | {"classifier.1.weight": torch.zeros(2, 2)},
            },
        }[layout]()
        torch.save(prefixed, path)
    if path.is_dir() or layout == "v4":
        (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 4}}')
    family, mine = siglip.backbone_weights(common.load_weights(str(path)), str(path))
    config = siglip.config_of(family, mine, str(path))
    assert {**config, "heads": 4} == TINY and (config["heads"] == 4) == (tmp_path / "config.json").exists()
    model = siglip.SiglipVision(TINY).eval()
    common.apply_weights(model, mine, str(path), say=lambda _: None)
    close(model(torch.from_numpy(golden.array("pixel_values", (2, 3, 64, 64)))), g["outputs"]["pooler_output"])


def test_foreign_and_partial_weights_are_refused(vision, tmp_path):
    _, state, _ = vision
    with pytest.raises(UserError, match="neither a SigLIP nor a Merlin"):
        siglip.backbone_weights({"layer1.0.weight": torch.zeros(2)}, "x")
    model, lines = siglip.SiglipVision(TINY), []
    part = {k.removeprefix("vision_model."): v for k, v in state.items() if ".1." not in k}
    with pytest.raises(UserError, match=r"16 tensors do not fit, first encoder.layers.1"):
        common.apply_weights(model, part, "x", say=lines.append)
    assert any("missing" in line and "16" in line for line in lines)
    common.apply_weights(model, part, "x", allow_partial=True, say=lines.append)
    with pytest.raises(UserError, match="no tensor fits"):
        common.apply_weights(model, {"a": torch.zeros(1)}, "x", allow_partial=True, say=lines.append)


def test_export_can_be_loaded_again(tmp_path):
    for arch in ("siglip-tiny", "merlin-tiny"):
        model = classifier("--arch", arch)
        common.save_weights(tmp_path / "out.safetensors", siglip.export_weights(model))
        family, mine = siglip.backbone_weights(common.load_weights(str(tmp_path / "out.safetensors")), "x")
        assert family == model_family(arch)
        assert all(torch.equal(v, mine[k]) for k, v in model.backbone.state_dict().items())
    keys = siglip.export_weights(classifier("--arch", "siglip-tiny"))
    assert all(k.startswith("vision_model.") for k in keys)


def model_family(arch):
    return siglip.ARCHS[arch]["family"]


# ---- slices, windows, pooling


def volume_of(S=5, side=32, B=2):
    return torch.randint(-1000, 1000, (B, S, side, side), dtype=torch.int16, generator=torch.Generator().manual_seed(1))


def test_windows_are_the_documents():
    model = classifier("--arch", "siglip-tiny", "--num-slices", 5, "--image-size", 32)
    v = volume_of()
    x = model.to_channels(v)  # (B, S, 3, h, w)
    for c, (low, high) in enumerate([(-1100, -100), (-160, 240), (-50, 1450)]):
        expected = ((v.double() - low) / (high - low)).clamp(0, 1)
        torch.testing.assert_close(x[:, :, c].double(), expected, atol=1e-6, rtol=0)
    x = classifier("--arch", "siglip-tiny", "--windows", "lung", "50,350", "bone").to_channels(v)
    torch.testing.assert_close(x[:, :, 1].double(), ((v.double() + 125) / 350).clamp(0, 1), atol=1e-6, rtol=0)
    for bad in (["lung"], ["lung", "x", "bone"], ["lung", "0,0", "bone"]):
        with pytest.raises(UserError, match="--windows"):
            classifier("--arch", "siglip-tiny", "--windows", *bad)


def test_neighbours_are_the_slices_below_and_above():
    x = classifier("--arch", "siglip-tiny", "--channels", "neighbours").to_channels(volume_of())
    plain = ((volume_of().float() + 1000) / 2000).clamp(0, 1)
    torch.testing.assert_close(x[:, :, 1], plain)
    torch.testing.assert_close(x[:, 1:, 0], plain[:, :-1])
    torch.testing.assert_close(x[:, :-1, 2], plain[:, 1:])
    torch.testing.assert_close(x[:, 0, 0], plain[:, 0])


def test_attention_over_slices_starts_as_the_mean_and_then_moves():
    mean = classifier("--arch", "siglip-tiny", "--num-slices", 5, "--slice-pool", "mean").eval()
    attention = classifier("--arch", "siglip-tiny", "--num-slices", 5).eval()
    attention.load_state_dict(mean.state_dict(), strict=False)
    v = volume_of()
    torch.testing.assert_close(attention(v), mean(v))
    assert attention.features(v)[1].eq(0.2).all()
    attention(v).square().sum().backward()
    assert attention.slice_pool.score.weight.grad.abs().max() > 0
    with torch.no_grad():
        attention.slice_pool.score.weight.normal_()
    weights = attention.features(v)[1]
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 18))
    assert weights.std() > 0.001 and not torch.allclose(attention(v), mean(v))


def test_slice_chunks_change_memory_only():
    model = classifier("--arch", "siglip-tiny", "--num-slices", 5).eval()
    whole = model(volume_of())
    model.slice_chunk = make_args("--arch", "siglip-tiny", "--slice-chunk", 3).slice_chunk
    torch.testing.assert_close(model(volume_of()), whole)
    sizes = []
    model.backbone.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    model(volume_of())
    assert sizes == [3, 3, 3, 1]


def test_drop_path_drops_whole_branches_in_training_only():
    block = siglip.Block(8, 2, 16, 0.5)
    x = torch.randn(200, 3, 8)
    kept = block.train().drop(x).abs().sum((1, 2)) > 0
    assert 60 < kept.sum() < 140
    torch.testing.assert_close(block.drop(x)[0].abs().max().clamp(min=1e-9).log2().isfinite(), torch.tensor(True))
    assert torch.equal(block.eval().drop(x), x)
    assert [
        round(b.drop_path, 3)
        for b in classifier("--arch", "siglip-tiny", "--drop-path", 0.3).backbone.encoder["layers"]
    ] == [0, 0.3]


def test_augmentation_moves_the_picture_and_its_brightness():
    model = classifier("--arch", "siglip-tiny", "--channels", "neighbours")
    v = torch.full((1, 1, 32, 32), -1000, dtype=torch.int16)
    v[0, 0, 8:12, 8:12] = 500
    still = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    shifted = torch.tensor([[[1.0, 0, -0.25], [0, 1, 0]]])  # the picture moves right by 0.25 * 32 / 2 = 4 pixels
    same = model.to_channels(v, still, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(same, model.to_channels(v), atol=1e-5, rtol=0)
    moved = model.to_channels(v, shifted, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(moved[..., :, 4:], same[..., :, :-4], atol=1e-5, rtol=0)
    assert moved[..., :4].max() == 0  # what comes in is air
    brighter = model.to_channels(v, still, torch.tensor([[1.0, 30.0]]))
    torch.testing.assert_close((brighter - same)[..., 9, 9], torch.full((1, 1, 3), 0.015), atol=1e-5, rtol=0)
    thetas = [siglip.draw_augmentation(np.random.default_rng(i)) for i in range(50)]
    turns = torch.stack([torch.atan2(t[1, 0], t[0, 0]) for t, _ in thetas]).rad2deg()
    assert turns.abs().max() <= 5 and turns.std() > 1


# ---- freezing


@pytest.mark.parametrize(("n", "last"), [(30, "encoder.layers.3.self_attn.v_proj"), (50, "encoder.layers.5.mlp.fc2")])
def test_freeze_up_to_names_its_layers(n, last):
    """In forward order: patch and position embedding, then norm, q, k, v, out, norm, fc1, fc2 a block."""
    args = make_args("--arch", "base-224", "--freeze-up-to", n, "--label-columns", "a")
    with torch.device("meta"):
        model = siglip.CTClassifier(args)
    lines = []
    assert siglip.set_trainable(model, args, 0, lines.append)
    names = ["norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"]
    expected = {
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.bias",
        "embeddings.position_embedding.weight",
    }
    full = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"} | {
        p: f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")
    }
    for i in range(n - 2):
        expected |= {f"encoder.layers.{i // 8}.{full[names[i % 8]]}.{w}" for w in ("weight", "bias")}
    assert {k for k, p in model.backbone.named_parameters() if not p.requires_grad} == expected
    assert f"embeddings.patch_embedding to {last}" in lines[0]
    assert not siglip.set_trainable(model, args, 1)


def test_freezing_more_than_there_is_is_an_error():
    model, args = classifier("--arch", "siglip-tiny"), make_args("--arch", "siglip-tiny", "--freeze-up-to", 500)
    with pytest.raises(UserError, match="has 25 layers"):
        siglip.set_trainable(model, args, 0)


@pytest.mark.parametrize("arch", ["siglip-tiny", "merlin-tiny"])
@pytest.mark.parametrize("mode", ["eager", "checkpointed", "compiled"])
def test_every_unfrozen_layer_gets_a_gradient(arch, mode):
    """The original loses every backbone gradient with a frozen stem and reentrant checkpointing."""
    words = ["--arch", arch, "--num-slices", 3, "--image-size", 32, "--freeze-up-to", 4, "--label-columns", "a", "b"]
    words += ["--grad-checkpointing"] if mode == "checkpointed" else []
    model, args = classifier(*words), make_args(*words)
    siglip.set_trainable(model, args, 0, lambda _: None)
    if mode == "compiled":
        model.compile(backend="aot_eager")
    model.train()
    model(volume_of(3)).square().sum().backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all("slice_pool.hidden" in k or "slice_pool.position" in k or "k_proj.bias" in k for k in without), (
        without
    )  # zero by symmetry, not by loss
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) >= 4 and all(dict(model.named_parameters())[k].grad is None for k in frozen)


def test_frozen_batch_norm_and_dropout_are_still():
    words = [
        "--arch",
        "merlin-tiny",
        "--num-slices",
        3,
        "--image-size",
        32,
        "--freeze-up-to",
        10,
        "--label-columns",
        "a",
    ]
    model, args = classifier(*words), make_args(*words)
    siglip.set_trainable(model, args, 0, lambda _: None)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train()(volume_of(3))
    moved = {k for k, v in model.named_buffers() if not torch.equal(v, before[k]) and "running" in k}
    layers = [n for n, _ in siglip.layers_in_order(model.backbone)]
    frozen_norms = {f"backbone.{n}.running_mean" for n in layers[:10] if "bn" in n or n.endswith("downsample.1")}
    assert frozen_norms and not frozen_norms & moved
    assert {f"backbone.{n}.running_mean" for n in layers[10:] if "bn" in n or n.endswith("downsample.1")} <= moved


def test_head_only_epochs_train_the_head_alone():
    words = ["--arch", "siglip-tiny", "--head-only-epochs", 2]
    model, args = classifier(*words), make_args(*words)
    assert siglip.set_trainable(model, args, 0, lambda _: None)
    assert {k.split(".")[0] for k, p in model.named_parameters() if p.requires_grad} == {"slice_pool", "classifier"}
    assert not siglip.set_trainable(model, args, 1)
    assert siglip.set_trainable(model, args, 2, lambda _: None)
    assert all(p.requires_grad for p in model.parameters())


# ---- optimizer and schedule


def test_layer_decay_and_weight_decay_groups():
    words = ["--arch", "siglip-tiny", "--layer-decay", 0.5, "--weight-decay", 0.1]
    model, args = classifier(*words), make_args(*words)
    optimizer = siglip.build_optimizer(model, args)
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {k: of[id(p)] for k, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)
    scales = {
        "backbone.embeddings.patch_embedding.weight": 0.5**3,
        "backbone.encoder.layers.0.mlp.fc1.weight": 0.5**2,
        "backbone.encoder.layers.1.mlp.fc1.weight": 0.5,
        "backbone.head.mlp.fc1.weight": 1.0,
        "classifier.1.weight": 1.0,
    }
    assert {k: named[k]["lr_scale"] for k in scales} == scales
    for key, decay in {
        "classifier.1.weight": 0.1, "classifier.1.bias": 0.0, "backbone.post_layernorm.weight": 0.0,
        "backbone.embeddings.position_embedding.weight": 0.0, "backbone.head.probe": 0.0,
        "backbone.embeddings.patch_embedding.weight": 0.1,
    }.items():  # fmt: skip
        assert named[key]["weight_decay"] == decay, key
    assert isinstance(
        siglip.build_optimizer(model, make_args("--arch", "siglip-tiny", "--optimizer", "sgd")), torch.optim.SGD
    )


def test_learning_rate_schedule():
    args = argparse.Namespace(lr=1.0, warmup=10, scheduler="cosine", min_lr_ratio=0.1)
    rates = [siglip.lr_at(u, 110, args) for u in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert math.isclose(rates[60], 0.55) and math.isclose(rates[110], 0.1)
    args.scheduler = "plateau"
    assert siglip.lr_at(0, 110, args) == 0.1 and siglip.lr_at(100, 110, args) == 1.0


def test_ema_is_an_exponential_average_with_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = siglip.EMA(model, 0.9), 0.0
    for u in range(1, 200):
        torch.nn.init.constant_(model.weight, float(u))
        ema.update(model, u)
        decay = min(0.9, (1 + u) / (10 + u))
        expected = decay * expected + (1 - decay) * u
    assert math.isclose(ema.module.weight.item(), expected, rel_tol=1e-5)


def test_sampler_order_does_not_depend_on_the_split():
    """The same samples make up each step for 1 to 4 ranks and any accumulation; a resumed sampler goes on."""

    def steps(world, accum, batch, n_steps=5, start=0):
        out = []
        for rank in range(world):
            args = argparse.Namespace(batch_size=batch, accum_steps=accum, seed=3)
            ctx = common.Context(rank, world, torch.device("cpu"))
            it = iter(siglip.StepSampler(26, args, ctx, start))
            out.append([[k for _ in range(accum) for k in next(it)] for _ in range(n_steps)])
        return [[k for rank in out for k in rank[s]] for s in range(n_steps)]

    reference = steps(1, 1, 8)
    assert [k[0] for k in sum(reference, [])] == [0] * 24 + [1] * 16
    assert len({k[1] for k in sum(reference[:3], [])}) == 24
    for world, accum, batch in [(2, 1, 4), (4, 2, 1), (1, 4, 2), (2, 2, 2)]:
        assert steps(world, accum, batch) == reference
    assert steps(2, 2, 2, 3, start=2) == reference[2:]


def test_flops_of_a_slice_are_the_closed_form():
    """35.42 GFLOP for one 224-pixel image through base-224 (a multiply-add is two), the reference's count."""
    args = make_args("--arch", "base-224", "--num-slices", 1, "--slice-pool", "mean", "--label-columns", "a")
    with torch.device("meta"):
        model = siglip.CTClassifier(args)
    assert siglip.forward_flops(model, args) == pytest.approx(35.42e9, rel=0.01)


def test_a_hub_id_without_network_ends_in_one_line(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="google/siglip-none: could not be fetched from the hub"):
        common.load_weights("google/siglip-none")


@pytest.mark.parametrize("size", [(5, 9), (14, 14), (3, 2)])
def test_positions_are_resized_as_by_interpolate(size):
    """common.resize_bicubic: values, and the gradient that torch has no deterministic kernel for on CUDA."""
    grid = torch.randn(2, 8, 7, 6, requires_grad=True)
    slope = torch.randn(2, 8, *size)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # which rounds matrix products
            ours = common.resize_bicubic(grid, *size)
        theirs = F.interpolate(grid, size, mode="bicubic", align_corners=False)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        both = [torch.autograd.grad((x * slope).sum(), grid)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*both, rtol=0, atol=5e-6)
