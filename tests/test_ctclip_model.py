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


def test_full_size_has_the_keys_of_the_released_file(golden):
    """On the meta device: names and shapes in the file's order; position_ids is of older transformers only."""
    expected = golden.load("keys_ctclip_full")
    with torch.device("meta"):
        model = ctclip.CTCLIP(ctclip.PRESETS["ctclip-v2"])
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    theirs = {k: shape for k, (shape, _) in expected["state"].items() if k not in expected["optional_keys"]}
    assert ours == theirs and len(ours) == 361
    assert sorted(n for n, _ in model.named_buffers()) == sorted(expected["buffers"])
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 438_148_761
    frozen = [p for n, p in parameters.items() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 154_447_184 and sum(p.numel() > 0 for p in frozen) == 22


# ---- lean forms


def test_codebook_in_chunks_and_under_autocast():
    torch.manual_seed(0)
    book, x = ctclip.Codebook(32, 8).train(), torch.randn(3, 5, 8, requires_grad=True)
    nearest = (F.normalize(x, dim=-1) @ F.normalize(book.embed[0], dim=-1).T).argmax(-1)
    expected = book.embed[0][nearest]
    assert torch.equal(book(x), expected) and torch.equal(book(x, chunk=4), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book(x), expected) and book(x).dtype == torch.float32
    out = book(x)
    (out * expected).sum().backward()
    assert torch.equal(x.grad, expected)  # straight through


def test_codebook_follows_its_tokens_once_a_step():
    """The literal update of vector-quantize-pytorch with one-hot sums; in parts, and not without gradient."""
    torch.manual_seed(0)
    book, x = ctclip.Codebook(6, 8).train(), torch.randn(20, 8)
    e, f = F.normalize(book.embed[0].clone(), dim=-1), F.normalize(x, dim=-1)
    onehot = F.one_hot((f @ e.T).argmax(1), 6).float()
    bins = onehot.sum(0)
    new = torch.where(bins[:, None] > 0, F.normalize(onehot.T @ f / bins[:, None].clamp(min=1), dim=-1), e)
    expected, size = book.embed[0] * 0.8 + new * 0.2, book.cluster_size[0] * 0.8 + bins * 0.2
    with torch.no_grad():
        book(x)
    book(x[:7]), book(x[7:])
    before = book.embed.clone()
    assert not torch.equal(before[0], expected)
    book.move(CTX)
    torch.testing.assert_close(book.embed[0], expected)
    torch.testing.assert_close(book.cluster_size[0], size)
    book.move(CTX)  # nothing was seen since
    torch.testing.assert_close(book.embed[0], expected)
    book(torch.full((2, 8), math.nan))
    book.move(CTX)
    torch.testing.assert_close(book.embed[0], expected)  # a step that is not finite moves nothing
    book.eval()(x)
    assert book.sums is None


def test_depthwise_convolution_in_slices_equals_the_3d_one():
    """Forward and gradients, for fewer frames than the kernel has too."""
    for T in (1, 2, 5):
        torch.manual_seed(T)
        peg, x = ctclip.PEG(6).double(), torch.randn(2 * T, 12, 6, dtype=torch.double, requires_grad=True)
        grid = x.reshape(2, T, 3, 4, 6).permute(0, 4, 1, 2, 3)
        literal = peg.dsconv(F.pad(grid, (1, 1, 1, 1, 2, 0))).permute(0, 2, 3, 4, 1).reshape(x.shape)
        wanted = [x, *peg.parameters()]
        weight = torch.randn_like(x)
        for ours, theirs in zip(
            [peg(x, (2, T, 3, 4)), *torch.autograd.grad((peg(x, (2, T, 3, 4)) * weight).sum(), wanted)],
            [literal, *torch.autograd.grad((literal * weight).sum(), wanted)],
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_bf16_stays_near_fp32(filled):
    model, image, ids, mask = filled(False)
    with torch.no_grad():
        exact = model.eval().encode_text(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            found, text = model.encode_image(image), model.encode_text(ids, mask)
    assert found.dtype == text.dtype == torch.float32
    torch.testing.assert_close(text, exact, atol=0.02, rtol=0)


def test_recomputed_blocks_compile(filled):
    """--compile and --grad-checkpointing together, as on a GPU, and a block with batch norm."""
    model, image, ids, mask = filled(False)
    losses = []
    for compiled in (False, True):
        for part in model.modules():
            if hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = compiled
        if compiled:
            model.compile(backend="aot_eager")
        model.train().zero_grad()
        out = model(1000 * image[:, 0], ids, mask)
        loss = common.clip_loss(out["image"], out["text"], out["logit_scale"])
        loss.backward()
        losses.append((loss.item(), model.to_visual_latent.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    class Recomputed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

        def forward(self, x):
            return common.checkpointed(self.block, x)

    block = Recomputed()
    torch.compile(block, backend="eager")(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert block.block[1].num_batches_tracked == 1
    torch.compiler.reset()


def test_flops_are_counted():
    args = ctclip.build_parser().parse_args(["--preset", "tiny"])
    args.model_config = {**ctclip.PRESETS["tiny"], "bert": {**ctclip.PRESETS["tiny"]["bert"], "vocab": 100}}
    flops = ctclip.forward_flops(None, args)
    args.model_config = {**args.model_config, "spatial_depth": 4}
    assert 0 < flops < ctclip.forward_flops(None, args)


# ---- weight files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, command line without data, state dict of a model of the tiny preset)."""
    folder = tmp_path_factory.mktemp("ctclip_weights")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {**ctclip.PRESETS["tiny"], "bert": {**ctclip.PRESETS["tiny"]["bert"], "vocab": len(words)}}
    torch.manual_seed(3)
    state = ctclip.export_weights(ctclip.CTCLIP(config))
    line = ["--preset", "tiny", "--vocab", str(folder / "vocab.txt"), "--convert", str(folder / "converted.pt")]
    return folder, line, state


WRAPPED = {
    "flat": lambda s: s,
    "position_ids": lambda s: {**s, "text_transformer.embeddings.position_ids": torch.arange(512)[None]},
    "ddp": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "model_state_dict": lambda s: {"model_state_dict": s, "step": 3},  # CTCLIP_MODERN
    "model": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "optim": {}},  # the original's trainer
    "lipro": lambda s: {
        **{f"trained_model.{k}": v for k, v in s.items()},
        "classifier.weight": torch.ones(18, 64), "classifier.bias": torch.zeros(18),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_every_form_of_the_weights_loads(tiny, form, capsys):
    folder, line, state = tiny
    torch.save(WRAPPED[form](state), folder / f"{form}.pt")
    assert ctclip.main([*line, "--pretrained", str(folder / f"{form}.pt")]) == 0
    saved = common.load_checkpoint(folder / "converted.pt")
    assert all(torch.equal(saved["model"][k], v) for k, v in state.items())
    assert ("classifier.weight" in saved["model"]) == (form == "lipro") and saved["thresholds"] is None
    args = ctclip.args_from_checkpoint(saved)
    model = ctclip.build_eval_model(saved, args, torch.device("cpu"))
    assert not model.training and ctclip.tokenizer_of(args).encode("a b").ids == [2, 5, 6, 3]


def test_a_head_is_only_taken_for_its_own_labels(tiny):
    """18 numbers without names: CT-LiPro's are those of CT-RATE, in its order."""
    folder, line, state = tiny
    torch.save(WRAPPED["lipro"](state), folder / "lipro.pt")
    labels = ["--label-columns", *reversed(common.CT_RATE_LABELS)]
    assert ctclip.main([*line, "--pretrained", str(folder / "lipro.pt"), *labels]) == 0
    assert "classifier.weight" not in common.load_checkpoint(folder / "converted.pt")["model"]


@pytest.mark.parametrize("change, message", [
    (lambda s: {**s, "visual_transformer.to_patch_emb.1.weight": torch.zeros(13500)}, "weights of CT-CLIP v1"),
    (lambda s: {**s, "to_visual_latent.weight": torch.zeros(1, 2097152)}, "weights of CT-CLIP v1"),
    (lambda s: {"conv1.weight": torch.zeros(3)}, "not a CT-CLIP file (its first key is conv1.weight)"),
    (lambda s: {k: v for k, v in s.items() if k != "temperature"}, "first temperature is missing"),
])  # fmt: skip
def test_other_files_are_refused(tiny, change, message):
    folder, line, state = tiny
    torch.save(change(state), folder / "bad.pt")
    with pytest.raises(common.UserError) as e:
        ctclip.main([*line, "--pretrained", str(folder / "bad.pt")])
    assert message in str(e.value)


def test_the_tokenizer_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] there is no plaque in lung ##s ##ing café cafe , . - ( ) 3 mm ##4 \u2028 end"
    )
    (tmp_path / "vocab.txt").write_text("\n".join(words.split(" ")) + "\n", encoding="utf-8")
    ours, theirs = common.load_tokenizer(tmp_path), transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    assert ours.token_to_id("end") == len(words.split(" ")) - 1  # U+2028 ends no line
    for text in ("There is NO plaque, in the lungs.", "Café (34 mm) - xyz\nend", "", "lung\u2028ing"):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    (tmp_path / "tokenizer.json").write_text(ours.to_str())
    assert common.load_tokenizer(tmp_path / "tokenizer.json").encode("lungs").ids == ours.encode("lungs").ids
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert common.load_tokenizer(tmp_path).encode("NO").ids == [2, 1, 3]
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(common.UserError, match="has no .PAD."):
        common.load_tokenizer(tmp_path / "vocab.txt")
