"""The literal form of CT-CLIP in benchmarks/bench_ctclip.py against what the original's own code computed."""

import importlib.util

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("bench_ctclip", ROOT / "benchmarks" / "bench_ctclip.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def close(x, want, tolerance):
    torch.testing.assert_close(
        x.detach().flatten()[:: want.get("stride", 1)].float(), torch.tensor(want["values"]), rtol=0, atol=tolerance
    )


def build(golden, g, sharp):
    """The literal model with the golden weights, and the golden inputs."""
    c, b = g["config"]["ctvit"], g["config"]["bert"]
    model = bench.LiteralCTCLIP({
        "size": (30, c["image_size"], c["image_size"]), "patch": c["patch_size"],
        "temporal_patch": c["temporal_patch_size"], "codebook": c["codebook_size"],
        "latent": g["config"]["ctclip"]["dim_latent"],
        **{k: c[k] for k in ("dim", "spatial_depth", "temporal_depth", "heads", "dim_head")},
        "bert": {"vocab": b["vocab_size"], "hidden": b["hidden_size"], "layers": b["num_hidden_layers"],
                 "heads": b["num_attention_heads"], "ffn": b["intermediate_size"],
                 "positions": b["max_position_embeddings"]},
    })  # fmt: skip
    state = golden.fill_state_dict(g["state"])
    for key in state if sharp else ():
        if key.endswith(("q_scale", "k_scale")):
            state[key] += 1
    model.load_state_dict(state)
    image = torch.from_numpy(golden.array("ctclip.image", (2, 1, 30, 80, 80))).clamp(-1, 1)
    ids = torch.from_numpy(golden.array("ctclip.input_ids", (2, 16), 5, 100)).long()
    ids[:, 0], ids[1, 10:] = 2, 0
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return model, (ids, mask, image)


@pytest.mark.parametrize("name", ["outputs", "outputs_sharp"])
def test_literal_equals_the_original(golden, name):
    g = golden.load("golden_ctclip")
    want = g[name]
    model, (ids, mask, image) = build(golden, g, name == "outputs_sharp")

    model.eval()
    trace = {}
    with torch.no_grad():
        tokens = model.visual_transformer(image, trace)
        text, visual = model.encode_text(ids, mask), model.encode_image(image)
        got = {
            **trace,
            "enc_text": model.text_transformer(ids, mask),
            "enc_image_flat": tokens.mean(1).flatten(1),
            "text_latents": text,
            "image_latents": visual,
            "logits_text_x_image": text @ visual.T * model.temperature.exp(),
            "loss": model(ids, mask, image, return_loss=True),
            "paired_sim": model(ids, mask, image),
            "zero_shot_2texts_1image": model(ids, mask, image[:1]),
        }
    assert trace["vq_idx"].tolist() == torch.tensor(want["vq_idx"]["values"]).long().view(2, -1).tolist()
    for key, x in got.items():
        close(x, want[key], 1e-5)
    close(got["zero_shot_2texts_1image"].softmax(0), want["zero_shot_softmax"], 1e-5)

    model.train()
    loss = model(ids, mask, image, return_loss=True)
    loss.backward()
    close(loss, want["train"]["loss"], 1e-6)
    codebook = model.visual_transformer.vq._codebook
    close(codebook.embed, want["train"]["codebook_embed_after"], 1e-6)
    close(codebook.cluster_size, want["train"]["cluster_size_after"], 1e-6)
    norms = {k: None if p.grad is None else p.grad.norm().item() for k, p in model.named_parameters()}
    assert norms.keys() == want["train"]["grad_norm"].keys()
    for key, norm in want["train"]["grad_norm"].items():
        if norm is None or norms[key] is None:
            assert norm is norms[key], key
        else:
            assert norms[key] == pytest.approx(norm, rel=1e-4, abs=1e-7), key


def test_literal_has_the_keys_of_the_full_model(golden):
    keys = golden.load("keys_ctclip_full")
    bert = {"vocab": 30522, "hidden": 768, "layers": 12, "heads": 12, "ffn": 3072, "positions": 512}
    with torch.device("meta"):
        model = bench.LiteralCTCLIP({
            "size": (240, 480, 480), "patch": 20, "temporal_patch": 10, "dim": 512, "codebook": 8192, "latent": 512,
            "spatial_depth": 4, "temporal_depth": 4, "heads": 8, "dim_head": 32, "bert": bert,
        })  # fmt: skip
    want = {k: tuple(shape) for k, (shape, _) in keys["state"].items() if k not in keys["optional_keys"]}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == want
