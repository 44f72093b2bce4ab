"""CT-CLIP's model: parity with the original's outputs, the lean forms against slow literal ones, weight files."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import train_ctclip as ctclip

CTX = common.Context(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def peer(golden):
    return golden.load("golden_ctclip")


def golden_config(peer, **more) -> dict:
    v, b, c = (peer["config"][k] for k in ("ctvit", "bert", "ctclip"))
    bert = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    bert = dict(zip(ctclip.BERT, [*(b[k] for k in bert), b["max_position_embeddings"], 0.0], strict=True))
    size = [30, v["image_size"], v["image_size"]]
    values = [size, *(v[k] for k in ("patch_size", "temporal_patch_size", "dim", "codebook_size", "spatial_depth"))]
    values += [v["temporal_depth"], v["heads"], v["dim_head"], c["dim_latent"], 1.0]
    return {**dict(zip(ctclip.CTVIT, values, strict=True)), "bert": bert, **more}


@pytest.fixture
def filled(peer, golden):
    """(model, image, input_ids, attention_mask) with the weights of the golden file; sharp: steeper attention."""

    def make(sharp: bool):
        model = ctclip.CTCLIP(golden_config(peer))
        state = golden.fill_state_dict(peer["state"])
        if sharp:
            state = {k: v + 1 if k.endswith((".q_scale", ".k_scale")) else v for k, v in state.items()}
        model.load_state_dict(state)
        image = torch.from_numpy(golden.array("ctclip.image", (2, 1, 30, 80, 80))).clamp(-1, 1)
        ids = torch.from_numpy(golden.array("ctclip.input_ids", (2, 16), 5, 100)).long()
        ids[:, 0], ids[1, 10:] = 2, 0
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, 10:] = 0
        return model, image, ids, mask

    return make


def check(ours, theirs, tolerance):
    ours = ours.detach().double()
    assert list(ours.shape) == theirs["shape"]
    np.testing.assert_allclose(ours.flatten()[:: theirs["stride"]], theirs["values"], rtol=0, atol=tolerance)
    if "mean" in theirs:
        assert abs(ours.mean() - theirs["mean"]) < tolerance and abs(ours.std(correction=0) - theirs["std"]) < tolerance


@pytest.mark.parametrize("which", ["outputs", "outputs_sharp"])
def test_parity_in_evaluation(peer, filled, which):
    model, image, ids, mask = filled(which == "outputs_sharp")
    expected, vit = peer[which], model.eval().visual_transformer
    seen = {}
    for name, module in (("patch_tokens", vit.to_patch_emb[3]), ("spatial_bias", vit.spatial_rel_pos_bias),
                         ("spatial_out", vit.enc_spatial_transformer), ("temporal_out", vit.enc_temporal_transformer),
                         ("vq_out", vit.vq["_codebook"]), ("enc_text", model.text_transformer)):  # fmt: skip
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    vit.vq["_codebook"].register_forward_pre_hook(lambda m, i: seen.update(vq_in=i[0]))
    with torch.no_grad():
        image_latents, text_latents = model.encode_image(image), model.encode_text(ids, mask)
    for name in ("patch_tokens", "spatial_bias", "spatial_out", "temporal_out", "vq_in", "vq_out"):
        got, shape = seen[name], expected[name]["shape"]
        check(got.reshape(shape) if got.numel() == math.prod(shape) else got, expected[name], 1e-5)
    f, e = F.normalize(seen["vq_in"].flatten(0, -2), dim=-1), F.normalize(vit.vq["_codebook"].embed[0], dim=-1)
    index = (f @ e.T).argmax(1)
    assert index.tolist()[:: expected["vq_idx"]["stride"]] == np.ravel(expected["vq_idx"]["values"]).tolist()
    assert torch.equal(seen["vq_out"].flatten(0, -2), vit.vq["_codebook"].embed[0][index])  # rows of the codebook
    check(text_latents, expected["text_latents"], 1e-5)
    check(image_latents, expected["image_latents"], 1e-5)
    logits = model.temperature.exp() * text_latents @ image_latents.T
    check(logits, expected["logits_text_x_image"], 1e-5)
    check(common.clip_loss(image_latents, text_latents, model.temperature.exp())[None], expected["loss"], 1e-6)
    shot = model.temperature.exp() * (text_latents * image_latents[:1]).sum(1)
    check(shot.softmax(0), expected["zero_shot_softmax"], 1e-5)


@pytest.mark.parametrize("which", ["outputs", "outputs_sharp"])
@pytest.mark.parametrize("recompute", [False, True])
def test_parity_in_training(peer, filled, which, recompute):
    """Loss, the norm of every gradient, the codebook after the step; also with recomputed blocks."""
    model, image, ids, mask = filled(which == "outputs_sharp")
    expected = peer[which]["train"]
    for part in model.modules():
        if hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = recompute
    model.train()
    loss = common.clip_loss(model.encode_image(image), model.encode_text(ids, mask), model.temperature.exp())
    check(loss[None], expected["loss"], 1e-6)
    loss.backward()
    model.end_step(CTX)
    for name, p in model.named_parameters():
        norm = expected["grad_norm"][name]
        if norm is None or p.numel() == 0:
            assert p.grad is None and ctclip.is_unused(name), name
        elif norm > 1e-7:
            assert float(p.grad.norm()) == pytest.approx(norm, rel=1e-4), name
    book = model.visual_transformer.vq["_codebook"]
    check(book.embed, expected["codebook_embed_after"], 1e-6)
    check(book.cluster_size, expected["cluster_size_after"], 1e-6)
