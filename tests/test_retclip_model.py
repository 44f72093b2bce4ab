"""train_retclip.py's model: parity with the original, the weight files it reads, its flags. Small networks."""

import json
import math
import re

import pytest
import torch
from conftest import fundus_args

import common
import train_retclip as retclip

SMALL = {
    "embed": 32, "image_size": 64, "layers": 2, "width": 64, "patch": 16, "head_width": 32, "logit_scale": 4.5,
    "bert": {"vocab": 200, "hidden": 64, "layers": 2, "heads": 4, "ffn": 128, "positions": 64, "dropout": 0.1},
}  # fmt: skip
PLAIN = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)  # colours as they are


@pytest.fixture(scope="module")
def peer(golden):
    return golden.load("golden_retclip")


@pytest.fixture
def filled(golden, peer):
    """(model, what it is given) of the golden file."""
    model = retclip.RETCLIP(SMALL).eval()
    model.load_state_dict(golden.fill_state_dict(peer["state"]), strict=True)
    images = [torch.from_numpy(golden.array(name, (3, 3, 64, 64))) for name in ("img_l", "img_r")]
    ids = torch.from_numpy(golden.array("text", (3, 16), 1, 200))
    ids[0, 12:] = 0
    ids[1, 7:] = 0
    inputs = (
        torch.stack(images, 1),
        PLAIN.expand(3, 2, 3, 4),
        torch.ones(3, 2, dtype=torch.bool),
        ids,
        (ids != 0).long(),
    )
    return model, inputs


def criterion_of(**changes):
    args = retclip.parse_args(["--train-data", "a", "--val-data", "b", "--vocab", "c"])
    vars(args).update({"monocular": False, "same_text": 0.0} | changes)
    return retclip.TripartiteLoss(args)


def value(peer, name):
    found = peer["outputs"][name]
    return torch.tensor(found["data"]).view(found["shape"])


def test_parity_of_features(peer, filled):
    model, inputs = filled
    out = model(*inputs)
    names = {
        "image_patient": "image_features", "text_patient": "text_features", "text_left": "text_features_left",
        "text_right": "text_features_right", "image_left": "left_features", "image_right": "right_features",
        "scale_patient": "exp_logit_scale", "scale_left": "exp_logit_scale_left",
        "scale_right": "exp_logit_scale_right",
    }  # fmt: skip
    for mine, theirs in names.items():
        assert torch.allclose(out[mine], value(peer, f"forward.{theirs}"), atol=1e-5), mine
    images, colour, present, ids, mask = inputs
    eyes = model.encode_eyes(images, colour)
    for level in retclip.LEVELS:
        assert torch.allclose(model.encode_image(eyes, present)[level], value(peer, f"encode_image.{level}"), atol=1e-5)
        assert torch.allclose(model.encode_text(ids, mask)[level], value(peer, f"encode_text.{level}"), atol=1e-5)
    for i, name in enumerate(k for k in peer["outputs"] if k.startswith("mono.")):
        assert torch.allclose(eyes[:, i], value(peer, name), atol=1e-5)
    model.monocular = True
    assert torch.equal(model.encode_image(eyes[:, :1], present[:, :1])["patient"], eyes[:, 0])


@pytest.mark.parametrize("recompute", [False, True])
def test_parity_of_loss_and_gradients(peer, filled, recompute):
    model, inputs = filled
    model.train()
    model.bert.dropout = 0.0
    for part in model.bert.encoder["layer"]:
        part.dropout = 0.0
    model.visual.grad_checkpointing = model.bert.grad_checkpointing = recompute
    batch = {"text_id": torch.arange(3), "present": inputs[2]}
    loss, logs = criterion_of()(model(*inputs), batch)
    loss.backward()
    assert abs(float(loss) - float(value(peer, "loss.total"))) < 1e-5
    for level, name in zip(retclip.LEVELS, ("global", "left", "right"), strict=True):
        assert abs(float(logs[f"loss_{level}"]) - float(value(peer, f"loss.{name}"))) < 1e-5
    checked = 0
    for key, found in peer["outputs"].items():
        if key.startswith("grad_l2") and "key.bias" not in key:
            names = {key: found} if "data" in found else found
            for name, norm in names.items():
                parameter = dict(model.named_parameters()).get(re.sub(r"^grad_l2\.?", "", name))
                norm = norm["data"][0] if isinstance(norm, dict) else norm
                assert abs(float(parameter.grad.norm()) - norm) <= 5e-4 * norm + 1e-6, name
                checked += 1
    assert checked > 80


def test_loss_at_the_initial_scale(peer, filled):
    model, inputs = filled
    for level in retclip.LEVELS:
        model.scale(level).data.fill_(torch.log(torch.tensor(90.0)))
    loss, _ = criterion_of()(model(*inputs), {"text_id": torch.arange(3), "present": inputs[2]})
    assert abs(float(loss) - float(value(peer, "loss_at_ln90.total"))) < 2e-4


def test_full_size_has_the_keys_of_the_released_file(golden):
    full = golden.load("keys_retclip_full")["state"]
    config = dict(zip(retclip.VIT, retclip.VISION["ViT-B-16"], strict=True))
    bert = dict(zip(retclip.BERT, retclip.TEXT["RoBERTa-wwm-ext-base-chinese"], strict=True))
    with torch.device("meta"):
        model = retclip.RETCLIP(config | {"bert": bert | {"vocab": 21128}})
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: list(v[0]) for k, v in full.items()}
    assert sum(p.numel() for p in model.parameters()) == 191_871_235
    config = dict(zip(retclip.VIT, retclip.VISION["ViT-L-14"], strict=True))
    with torch.device("meta"):
        model = retclip.RETCLIP(config | {"bert": bert | {"vocab": 21128}})
    assert len(model.state_dict()) == 511 and sum(p.numel() for p in model.parameters()) == 411_546_115


def test_decay_groups_and_layer_decay(golden):
    """161 tensors decay by the original's rule on B-16 (206 not); by ours no norm, position or class embedding does."""
    config = dict(zip(retclip.VIT, retclip.VISION["ViT-B-16"], strict=True)) | {"width": 48, "head_width": 24}
    bert = dict(zip(retclip.BERT, (24, 12, 2, 48, 512, 0.0), strict=True)) | {"vocab": 30}
    model = retclip.RETCLIP(config | {"bert": bert})
    args = retclip.parse_args(["--train-data", "a", "--val-data", "b", "--vocab", "c"])
    args.model_config = config | {"bert": bert}

    def groups(**changes):
        vars(args).update(changes)
        names = {id(p): n for n, p in model.named_parameters()}
        optimizer = retclip.build_optimizer(model, args)
        return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups for p in g["params"]}

    official = groups(official_decay=True)
    assert sum(decay > 0 for decay, _ in official.values()) == 161 and len(official) == 367
    ours = groups(official_decay=False)
    plain = {n for n, (decay, _) in ours.items() if not decay}
    assert {n for n, p in model.named_parameters() if p.ndim < 2} < plain
    assert "bert.embeddings.position_embeddings.weight" in plain and "visual.positional_embedding" in plain
    assert "visual.proj" not in plain and "bert.embeddings.word_embeddings.weight" not in plain
    scaled = groups(layer_decay=0.5)
    assert scaled["visual.proj"][1] == 1 and scaled["text_projection.0.weight"][1] == 1
    assert scaled["visual.transformer.resblocks.11.ln_1.weight"][1] == 0.5
    assert scaled["bert.encoder.layer.0.output.dense.weight"][1] == 0.5**12
    assert scaled["visual.conv1.weight"][1] == 0.5**13


def test_a_missing_eye_is_masked(filled):
    """It is no row and no column of its level; at the patient's level the other eye stands for it."""
    model, (images, colour, present, ids, mask) = filled
    present = present.clone()
    present[1, 1] = False
    batch = {"text_id": torch.arange(3), "present": present}
    loss, logs = criterion_of()(model(images, colour, present, ids, mask), batch)
    whole = model(images, colour, torch.ones_like(present), ids, mask)
    kept = [0, 2]
    right = common.clip_loss(whole["image_right"][kept], whole["text_right"][kept], whole["scale_right"])
    assert abs(float(logs["loss_right"]) - float(right)) < 1e-6
    assert abs(float(logs["loss_left"]) - float(criterion_of()(whole, batch)[1]["loss_left"])) < 1e-6
    twice = images.clone()
    twice[1, 1] = twice[1, 0]
    out = model(images, colour, present, ids, mask)
    assert torch.allclose(out["image_patient"], model(twice, colour, present, ids, mask)["image_patient"], atol=1e-6)
    out["image_right"].retain_grad()
    criterion_of()(out, batch)[0].backward()
    assert out["image_right"].grad[1].eq(0).all() and out["image_right"].grad[0].ne(0).any()


def test_same_reports_are_positives_of_each_other(filled):
    model, inputs = filled
    out = {k: v.detach() for k, v in model(*inputs).items()}
    batch = {"text_id": torch.tensor([4, 7, 4]), "present": inputs[2]}
    expected = 0
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    for level in retclip.LEVELS:
        logits = out[f"scale_{level}"] * out[f"image_{level}"] @ out[f"text_{level}"].T
        expected -= (
            (logits.log_softmax(1) * target).sum(1).mean() + (logits.T.log_softmax(1) * target).sum(1).mean()
        ) / 2
    assert abs(float(criterion_of(same_text=1.0)(out, batch)[0]) - float(expected)) < 1e-5
    assert abs(float(criterion_of(same_text=0.0)(out, batch)[0]) - float(expected)) > 1e-3


def test_level_weights_and_the_level_of_one_photograph(filled):
    model, inputs = filled
    out, batch = model(*inputs), {"text_id": torch.arange(3), "present": inputs[2]}
    loss, logs = criterion_of(level_weights=[1, 0.5, 0])(out, batch)
    assert torch.allclose(loss, logs["loss_patient"] + 0.5 * logs["loss_left"])
    model.monocular = True
    images, colour, present, *text = inputs
    out = model(images[:, :1], colour[:, :1], present[:, :1], *text)
    assert set(out) == {"image_patient", "text_patient", "scale_patient"}
    loss, logs = criterion_of(monocular=True)(out, {"text_id": torch.arange(3), "present": present[:, :1]})
    assert torch.equal(loss, logs["loss_patient"])


def test_the_scales_are_bounded(filled):
    model, _ = filled
    model.max_logit_scale = 50.0
    model.logit_scale.data.fill_(7.0)
    model.logit_scale_left.data.fill_(-1.0)
    model.begin_step()
    assert abs(float(model.logit_scale.exp()) - 50) < 1e-3 and float(model.logit_scale_left) == 0


def test_masked_patches_are_other_ones_for_each_eye(filled):
    model, (images, *_) = filled
    model.visual.mask_ratio = 0.5
    seen = []
    model.visual.transformer["resblocks"][0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.visual(images[:, 0])
    model.visual.train()
    model.visual(images[:1, 0].expand(2, -1, -1, -1))
    assert seen[0].shape[1] == 17 and seen[1].shape[1] == 9  # all, and half of 16, with the class token
    assert torch.equal(seen[1][0, 0], seen[1][1, 0]) and not torch.equal(seen[1][0, 1:], seen[1][1, 1:])


def test_bf16_stays_near_fp32(filled):
    model, inputs = filled
    images = (inputs[0] * 60 + 120).clamp(0, 255).to(torch.uint8)
    colour = torch.from_numpy(retclip.plain_colour()).expand(3, 2, 3, 4)
    whole = model(images, colour, *inputs[2:])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, colour, *inputs[2:])
    for key, x in whole.items():
        assert half[key].dtype == torch.float32 and torch.allclose(x, half[key], atol=0.05), key


def test_recomputed_blocks_compile(filled):
    model, inputs = filled
    model.train()
    model.bert.dropout = 0.0
    for part in model.bert.encoder["layer"]:
        part.dropout = 0.0
    model.visual.grad_checkpointing = model.bert.grad_checkpointing = True
    batch = {"text_id": torch.arange(3), "present": inputs[2]}
    criterion_of()(model(*inputs), batch)[0].backward()
    expected = model.visual.conv1.weight.grad.clone()
    model.zero_grad()
    model.compile(backend="aot_eager")
    criterion_of()(model(*inputs), batch)[0].backward()
    assert torch.allclose(model.visual.conv1.weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_flops_are_counted(tiny_fundus, tmp_path):
    args = args_of(tiny_fundus, tmp_path)
    args.monocular = False
    model = retclip.build_model(args, lambda text: None)
    both = retclip.forward_flops(model, args)
    args.monocular = True
    assert 0.3 * both < retclip.forward_flops(model, args) < both


# ---- weight files


def args_of(folder, out, *more):
    return retclip.parse_args([str(w) for w in fundus_args(folder, out, *more)[1:]])


@pytest.fixture(scope="module")
def tiny(tiny_fundus, tmp_path_factory):
    """A tiny model with other weights than those of a fresh one."""
    torch.manual_seed(5)
    args = args_of(tiny_fundus, tmp_path_factory.mktemp("none"))
    args.monocular = False
    return retclip.build_model(args, lambda text: None)


def chinese(state):
    """As Chinese-CLIP: one text projection, a matrix, and one scale."""
    own = {k: v for k, v in state.items() if k.startswith(("visual.", "bert."))}
    return own | {"text_projection": torch.zeros(64, 256), "logit_scale": state["logit_scale"]}


def huggingface(state):
    """The towers as transformers' ChineseCLIPModel names them."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    found = {new: state[old] for old, new in names.items()}
    found["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    found["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    for key, tensor in state.items():
        if key.startswith("bert."):
            found["text_model." + key.removeprefix("bert.")] = tensor
        block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.(.*)", key)
        for old, new in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
            if key.startswith(f"visual.{old}."):
                found[key.replace(f"visual.{old}", f"vision_model.{new}")] = tensor
        if block:
            to = f"vision_model.encoder.layers.{block[1]}."
            parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            parts["attn.out_proj"] = "self_attn.out_proj"
            if block[2].startswith("attn.in_proj_"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{to}self_attn.{letter}_proj.{block[2].removeprefix('attn.in_proj_')}"] = part
            else:
                name = next(p for p in parts if block[2].startswith(p))
                found[to + block[2].replace(name, parts[name])] = tensor
    return found


def early(state):
    """RET-CLIP's upload of before July 2024: the side heads are numbered 2 and 4."""
    number = lambda k: k.replace(".2.", ".4.").replace(".0.", ".2.")  # noqa: E731
    return {number(k) if k.startswith("text_projection_") else k: v for k, v in state.items()}


FORMS = {
    "flat": lambda s: s,
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "wrapped": lambda s: {"epoch": 3, "step": 9, "name": "x", "state_dict": {f"module.{k}": v for k, v in s.items()}},
    "half": lambda s: {f"module.{k}": v.half() for k, v in s.items()},
    "other prefix": lambda s: {f"clip.{k}": v for k, v in s.items()},
    "early": early,
    "with pooler": lambda s: s | {"bert.pooler.dense.weight": torch.zeros(64, 64)},
    "Chinese-CLIP": chinese,
    "transformers": huggingface,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_weights_loads(tiny_fundus, tiny, tmp_path, capsys, form):
    torch.save(FORMS[form](tiny.state_dict()), tmp_path / "weights.pt")
    args = args_of(tiny_fundus, tmp_path, "--pretrained", tmp_path / "weights.pt")
    args.monocular = False
    torch.manual_seed(9)
    model, tolerance = retclip.build_model(args).state_dict(), 1e-3 if form == "half" else 0
    heads = () if form not in ("Chinese-CLIP", "transformers") else retclip.HEADS
    for key, tensor in tiny.state_dict().items():
        if not key.startswith(heads or "-"):
            assert (model[key] - tensor).abs().max() <= tolerance, key
    table = capsys.readouterr().out
    assert re.search(r"loaded +\d+", table) and (form != "early" or ".2 and .4 are read as .0 and .2" in table)
    if heads:
        assert "missing" in table and not torch.equal(model["text_projection.0.weight"], tiny.text_projection[0].weight)


def test_towers_from_files_of_their_own(tiny_fundus, tiny, tmp_path):
    state = tiny.state_dict()
    openai = {k: v for k, v in state.items() if k.startswith("visual.")} | {"token_embedding.weight": torch.zeros(9, 4)}
    bert = {k: v for k, v in state.items() if k.startswith("bert.")}
    bert = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in bert.items()} | {"cls.predictions.bias": torch.zeros(3)}  # fmt: skip
    torch.save(openai, tmp_path / "clip.pt")
    (tmp_path / "bert").mkdir()
    bare = {k.removeprefix("bert."): v for k, v in bert.items()}
    torch.save(bare, tmp_path / "bert/pytorch_model.bin")
    torch.save(bert, tmp_path / "bert.bin")
    for source in (tmp_path / "bert", tmp_path / "bert.bin"):
        words = ["--clip-weight-path", tmp_path / "clip.pt", "--bert-weight-path", source]
        args = args_of(tiny_fundus, tmp_path, *words)
        args.monocular = False
        model = retclip.build_model(args, lambda text: None).state_dict()
        for key, tensor in state.items():
            if key.startswith(("visual.", "bert.")):
                assert torch.equal(model[key], tensor), key


@pytest.mark.parametrize("flag, content, message", [
    ("--pretrained", lambda s: {"a.weight": torch.zeros(2)}, "no tensor fits this model"),
    ("--pretrained", lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "--allow-partial"),
    ("--vision-pretrained", lambda s: {k: v for k, v in s.items() if k.startswith("bert.")}, "no tensor of an image"),
    ("--text-pretrained", lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "no tensor of a BERT"),
    ("--text-pretrained", lambda s: {"bert.embeddings.word_embeddings.weight": torch.zeros(90, 64)}, "has 56 words"),
])  # fmt: skip
def test_other_files_are_refused(tiny_fundus, tiny, tmp_path, flag, content, message):
    torch.save(content(tiny.state_dict()), tmp_path / "weights.pt")
    args = args_of(tiny_fundus, tmp_path, flag, tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match=message):
        retclip.build_model(args, lambda text: None)
    if "--allow-partial" in message:
        args = args_of(tiny_fundus, tmp_path, flag, tmp_path / "weights.pt", "--allow-partial")
        retclip.build_model(args, lambda text: None)


def test_an_archive_of_code_is_refused_with_the_way_out(tiny_fundus, tmp_path):
    """OpenAI's files are TorchScript: loading one runs it."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    args = args_of(tiny_fundus, tmp_path, "--vision-pretrained", tmp_path / "ViT-B-16.pt")
    with pytest.raises(common.UserError, match=r"TorchScript.*torch\.jit\.load"):
        retclip.build_model(args, lambda text: None)


def test_positions_of_another_image_size(tiny_fundus, tiny, tmp_path):
    """Bicubic with aligned corners: the corners stay, a plane stays a plane."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = torch.stack([y / 3, x / 3], -1).flatten(0, 1)
    state = {"visual.positional_embedding": torch.cat([torch.full((1, 2), 7.0), plane])}
    found = retclip.fit_positions(state, 1 + 49)["visual.positional_embedding"]
    assert found.shape == (50, 2) and torch.equal(found[0], torch.full((2,), 7.0))
    assert torch.allclose(found[[1, 7, 43, 49]], plane[[0, 3, 12, 15]], atol=1e-6)
    assert retclip.fit_positions(state, 17) is state
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    args = args_of(tiny_fundus, tmp_path, "--pretrained", tmp_path / "weights.pt", "--image-size", 64)
    args.monocular = False
    assert retclip.build_model(args, lambda text: None).visual.positional_embedding.shape == (17, 192)


def test_convert_makes_a_checkpoint_of_any_weights(tiny_fundus, tiny, tmp_path, capsys):
    torch.save(FORMS["module"](tiny.state_dict()), tmp_path / "ret-clip.pt")
    words = fundus_args(tiny_fundus, tmp_path, "--pretrained", tmp_path / "ret-clip.pt", "--convert", tmp_path / "c.pt")
    assert common.run_main(lambda: retclip.main([str(w) for w in words[1:]])) == 0
    saved = common.load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(saved["model"]["visual.proj"], tiny.visual.proj) and json.loads(saved["tokenizer"])


# ---- flags of the model


@pytest.mark.parametrize("flag, still, moving", [
    (["--freeze-text"], ["bert."], ["visual.", "text_projection.", "global_"]),
    (["--freeze-vision"], ["visual."], ["bert.", "text_projection_left.", "left_"]),
    (["--freeze-layers", 1],
     ["visual.conv1", "visual.class_", "visual.positional_", "visual.ln_pre", "visual.transformer.resblocks.0.",
      "bert.embeddings", "bert.encoder.layer.0."],
     ["visual.transformer.resblocks.1.", "bert.encoder.layer.1.", "visual.proj"]),
    (["--no-monocular"], [], ["visual.", "bert.", "global_", "logit_scale_left"]),
])  # fmt: skip
def test_frozen_parts_rest(tiny_fundus, tmp_path, flag, still, moving):
    args = args_of(tiny_fundus, tmp_path, "--text-dropout", 0.2, *flag)
    args.monocular = False
    model = retclip.build_model(args, lambda text: None)
    retclip.set_trainable(model, args, 0, lambda text: None)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or name.startswith(tuple(still)), name
        assert not parameter.requires_grad or not still or not name.startswith(tuple(still)), name
    for start in moving:
        assert any(p.requires_grad for n, p in model.named_parameters() if n.startswith(start)), start
    model.train()
    assert model.bert.training == ("--freeze-text" not in flag)
    assert model.bert.dropout == 0.2


def test_grad_checkpointing_and_flash_attention(tiny_fundus, tmp_path, monkeypatch):
    args = args_of(tiny_fundus, tmp_path, "--grad-checkpointing")
    args.monocular = False
    assert retclip.build_model(args, lambda text: None).visual.grad_checkpointing
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", allowed.append)
    words = fundus_args(tiny_fundus, tmp_path / "out", "--max-steps", 1, "--use-flash-attention")
    assert common.run_main(lambda: retclip.main([str(w) for w in words[1:]])) == 0
    assert allowed == [False]


def test_flags_reach_their_places(tiny_fundus, tmp_path):
    words = ["--max-logit-scale", 50, "--grad-cache-chunk", 3, "--accum-freq", 2, "--wd", 0.2, "--use-augment"]
    args = args_of(tiny_fundus, tmp_path, *words, "--level-weights", 1, 2, 3)
    args.monocular = False
    model = retclip.build_model(args, lambda text: None)
    criterion = retclip.build_criterion(args, None)
    assert model.max_logit_scale == 50 and criterion.chunk == 3 and args.accum_steps == 2 and args.augment
    assert {g["weight_decay"] for g in retclip.build_optimizer(model, args).param_groups} == {0.0, 0.2}
    assert criterion.chance(10) == pytest.approx(6 * math.log(10))
    assert args_of(tiny_fundus, tmp_path).grad_cache_chunk == 0
    assert retclip.build_criterion(args_of(tiny_fundus, tmp_path), None).chunk == 4  # the micro-batch


def test_amp_trains_and_top_k_keeps(tiny_fundus, tmp_path):
    words = fundus_args(tiny_fundus, tmp_path, "--amp", "bf16", "--top-k", 2, "--scheduler", "plateau")
    assert common.run_main(lambda: retclip.main([str(w) for w in words[1:]])) == 0
    assert len(list((tmp_path / "checkpoints").glob("best_epoch*.pt"))) == 2
