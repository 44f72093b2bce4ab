"""Each flag of train_ctclip.py does what its help says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, report_args

import common
import train_ctclip as ctclip


def parsed(folder, *more):
    return ctclip.parse_args([str(w) for w in report_args(folder, "unused", *more)[1:]])


def built(folder, *more):
    """(args, training set, validation set, model) of a command line."""
    args = parsed(folder, *more)
    sets = ctclip.build_datasets(args)
    common.seed_everything(args.seed)
    return args, *sets, ctclip.build_model(args, lambda *x: None)


def log_of(folder, tmp_path, *more):
    out = tmp_path / "run"
    words = report_args(folder, out, "--max-steps", 4, "--overwrite", *more)[1:]
    assert common.run_main(lambda: ctclip.main([str(w) for w in words])) == 0
    return out, (out / "training.log").read_text()


# ---- data


@pytest.mark.parametrize("part, expected", [("findings", "A b"), ("impression", "C"), ("both", "A b\nC")])
def test_text(part, expected):
    assert ctclip.report_text({"findings": " (A) 'b\"", "impression": "C"}, part) == expected


def test_max_text_length(tiny_reports):
    short = built(tiny_reports, "--max-text-length", 5)[1][(0, 0)]["input_ids"]
    whole = built(tiny_reports)[1][(0, 0)]["input_ids"]
    assert len(short) == 5 and len(whole) > 5 and torch.equal(short[:4], whole[:4]) and short[4] == whole[-1]  # [SEP]


def test_a_batch_is_padded_to_its_longest_report(tiny_reports):
    data = built(tiny_reports)[1]
    batch = data.collate([data[(0, 0)], data[(0, 1)]])
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == max(lengths) < 30
    data.texts[1] = "first"
    batch = data.collate([data[(0, 0)], data[(0, 1)]])
    assert batch["attention_mask"][1].tolist() == [1, 1, 1] + [0] * (len(batch["input_ids"][0]) - 3)
    assert (batch["input_ids"][1, 3:] == 0).all()


def test_padding_does_not_change_the_features(tiny_reports):
    *_, model = built(tiny_reports)
    ids, mask = torch.randint(5, 20, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    padded, padded_mask = torch.cat([ids, torch.full((1, 30), 7)], 1), torch.cat([mask, torch.zeros(1, 30).long()], 1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_text(ids, mask), model.encode_text(padded, padded_mask))


def test_roots_lead_to_data_weights_and_vocabulary(tiny_reports, tmp_path):
    root, weights = tmp_path / "dataset", tmp_path / "weights"
    root.mkdir()
    weights.mkdir()
    for name, source in (("train", "train"), ("valid_fixed", "valid"), ("valid", "valid")):
        (root / name).symlink_to(tiny_reports / source)
    (weights / "vocab.txt").write_bytes((tiny_reports / "vocab.txt").read_bytes())
    (weights / "CT-CLIP_v2.pt").write_bytes(b"")
    args = ctclip.parse_args(["--DATA_ROOT", str(root), "--WEIGHTS_ROOT", str(weights)])
    assert args.train_data == root / "train" and args.valid_data == root / "valid_fixed"  # v2 before v1
    assert args.vocab == weights / "vocab.txt" and args.pretrained == str(weights / "CT-CLIP_v2.pt")
    (weights / "CT-CLIP_v2.pt").unlink()
    with pytest.raises(common.UserError, match="--pretrained is missing .*CT-CLIP_v2.pt"):
        ctclip.parse_args(["--ct-rate-root", str(root), "--weights-root", str(weights)])
    args = ctclip.parse_args(["--DATA_ROOT", str(root), "--WEIGHTS_ROOT", str(weights), "--preset", "tiny"])
    assert args.pretrained == "none"
    with pytest.raises(common.UserError, match="--train-data is missing .*there is no .*train_fixed, .*train"):
        ctclip.parse_args(["--DATA_ROOT", str(weights), "--WEIGHTS_ROOT", str(weights)])


def test_reports_metadata_and_labels_of_a_tree_are_used(tiny_reports, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "ctclip_cases", lambda *a, **k: seen.append(a) or (_ for _ in ()).throw(KeyError))
    args = parsed(
        tiny_reports, "--reports", "r.csv", "s.csv", "--metadata", "m.csv", "--labels", "l.csv", "--hu-source", "csv"
    )
    with pytest.raises(KeyError):
        ctclip.CTReports(args.train_data, args, True)
    assert seen[0][1:] == ([Path("r.csv"), Path("s.csv")], [Path("m.csv")], [Path("l.csv")], LABELS, "csv")


# ---- model


def test_presets_and_text_dropout(tiny_reports):
    *_, tiny = built(tiny_reports, "--text-dropout", 0.3)
    assert tiny.text_transformer.dropout == 0.3 == tiny.text_transformer.encoder["layer"][0].dropout
    args = parsed(tiny_reports, "--preset", "small", "--pretrained", "none")
    args.model_config = ctclip.settled_config(args)
    assert args.model_config["size"] == [120, 240, 240] and args.model_config["bert"]["vocab"] == 46


def test_text_pretrained(tiny_reports, tmp_path):
    """A BERT file, with the prefix of a model with heads and without a pooler; a foreign one is refused."""
    *_, donor = built(tiny_reports, "--seed", 7)
    state = {f"bert.{k}": v for k, v in donor.text_transformer.state_dict().items() if not k.startswith("pooler")}
    common.save_weights(tmp_path / "bert.pt", {**state, "cls.predictions.bias": torch.zeros(3)})
    *_, model = built(tiny_reports, "--text-pretrained", tmp_path / "bert.pt")
    a, b = model.text_transformer.encoder.state_dict(), donor.text_transformer.encoder.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    common.save_weights(tmp_path / "other.pt", {"x": torch.zeros(3)})
    with pytest.raises(common.UserError, match="no tensor fits"):
        built(tiny_reports, "--text-pretrained", tmp_path / "other.pt")


def test_allow_partial(tiny_reports, tmp_path):
    *_, model = built(tiny_reports)
    state = ctclip.export_weights(model)
    del state["to_text_latent.weight"]
    common.save_weights(tmp_path / "part.pt", state)
    with pytest.raises(common.UserError, match="to_text_latent.weight is missing .--allow-partial"):
        built(tiny_reports, "--pretrained", tmp_path / "part.pt")
    built(tiny_reports, "--pretrained", tmp_path / "part.pt", "--allow-partial")


@pytest.mark.parametrize("flag, still, moving", [
    ("--freeze-vq", "visual_transformer.vq._codebook.embed", "to_visual_latent.weight"),
    ("--freeze-text", "text_transformer.encoder.layer.0.output.dense.weight", "to_visual_latent.weight"),
    ("--freeze-vision", "visual_transformer.to_patch_emb.2.weight", "to_text_latent.weight"),
    ("--freeze-vision", "visual_transformer.vq._codebook.embed", "to_text_latent.weight"),
])  # fmt: skip
def test_frozen_parts_rest(tiny_reports, tmp_path, flag, still, moving):
    *_, model = built(tiny_reports)
    before = model.state_dict()
    out, _ = log_of(tiny_reports, tmp_path, flag, "--seed", 2025)
    after = common.load_checkpoint(out / "checkpoint_step_4.pt")["model"]
    assert torch.equal(before[still], after[still]) and not torch.equal(before[moving], after[moving])


def test_the_codebook_moves_and_unused_parameters_rest(tiny_reports, tmp_path):
    *_, model = built(tiny_reports)
    before = model.state_dict()
    out, _ = log_of(tiny_reports, tmp_path)
    after = common.load_checkpoint(out / "checkpoint_step_4.pt")["model"]
    assert not torch.equal(
        before["visual_transformer.vq._codebook.embed"], after["visual_transformer.vq._codebook.embed"]
    )
    for name in before:
        if ctclip.is_unused(name):
            assert torch.equal(before[name], after[name]), name


# ---- loss and optimization


def test_loss_temperature_and_its_bound(tiny_reports):
    assert built(tiny_reports)[3].logit_bias is None
    *_, model = built(tiny_reports, "--loss", "siglip", "--max-logit-scale", 3)
    assert model.logit_bias.item() == -10 and model.temperature.exp() > 3
    model.begin_step()
    assert model.temperature.exp().item() == pytest.approx(3)


def test_dedup_positives(tiny_reports):
    """The two training cases with the same report are each other's positives only with the flag."""
    ids = torch.tensor([0, 1, 1])
    features = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    out = {"image": features[0], "text": features[1], "logit_scale": torch.tensor(5.0)}
    batch = {"text_id": ids, "target": torch.zeros(3, 3)}
    losses = [ctclip.ContrastiveLoss(parsed(tiny_reports, *w))(out, batch)[0] for w in ([], ["--dedup-positives"])]
    logits = 5 * features[0] @ features[1].T
    same = ids[:, None] == ids
    by_hand = [
        -sum((x[i].log_softmax(0) * same[i]).sum() / same[i].sum() for i in range(3)) / 3 for x in (logits, logits.T)
    ]
    assert losses[1].item() == pytest.approx(sum(by_hand).item() / 2, rel=1e-5) and losses[0] != losses[1]
    args = parsed(tiny_reports)
    train = ctclip.CTReports(args.train_data, args, True)
    assert train.text_ids[1] != train.text_ids[9]  # "case 1" with other findings
    train = ctclip.CTReports(args.train_data, args, True)
    assert len(set(train.text_ids.tolist())) == len(set(train.texts))


def test_label_loss(tiny_reports, tmp_path):
    _, text = log_of(tiny_reports, tmp_path, "--label-loss-weight", 0.5)
    saved = common.load_checkpoint(tmp_path / "run" / "best_model.pt")
    assert saved["model"]["classifier.weight"].shape == (3, 64) and saved["args"]["model_config"]["num_labels"] == 3
    args, train, _, model = built(tiny_reports, "--label-loss-weight", 0.5)
    batch = train.collate([train[(0, i)] for i in range(4)])
    head = [built(tiny_reports, "--label-loss-weight", 0.5, "--dropout-rate", x)[3].train() for x in (0, 0.5)]
    features = torch.ones(2, 64)
    assert torch.equal(head[0].classify(features)[0], head[0].classify(features)[1])
    assert not torch.equal(head[1].classify(features)[0], head[1].classify(features)[1])
    loss, logs = ctclip.compute_loss(model.eval(), batch, ctclip.build_criterion(args, train))
    assert loss.item() == pytest.approx((logs["contrastive_loss"] + 0.5 * logs["label_loss"]).item())
    expected = common.bce_loss(
        model.classify(model.encode_image(batch["volume"][:, None].float() / 1000)), batch["target"]
    )
    assert logs["label_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_epochs_replace_max_steps(tiny_reports, tmp_path):
    """Of a file, and of the default; on the command line --max-steps decides, as in the other scripts."""
    (tmp_path / "c.yaml").write_text("max_steps: 7")
    config = ["--config", tmp_path / "c.yaml"]
    for words, expected in (
        (["--max-steps", 7], (7, 1)),
        (config, (7, 1)),
        (["--epochs", 2], (0, 2)),
        ([*config, "--epochs", 2], (0, 2)),
        (["--max-steps", 7, "--epochs", 2], (7, 2)),
    ):
        given = report_args(tiny_reports, "unused", *words)[1:]
        first = given.index("--max-steps")  # of the fixture
        args = ctclip.parse_args([str(w) for w in given[:first] + given[first + 2 :]])
        assert (args.max_steps, args.epochs) == expected, words


def test_weight_decay_spares_norms_biases_scales_and_positions(tiny_reports):
    args, *_, model = built(tiny_reports, "--weight-decay", 0.2)
    optimizer = ctclip.build_optimizer(model, args)
    names = {id(p): n for n, p in model.named_parameters()}
    by_decay = {}
    for group in optimizer.param_groups:
        by_decay.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
    assert by_decay.keys() == {0.0, 0.2} and "to_visual_latent.weight" in by_decay[0.2]
    spared = {"temperature", "text_transformer.embeddings.position_embeddings.weight"}
    assert spared <= by_decay[0.0] and all(
        "bias" not in n and "norm" not in n.lower() for n in by_decay[0.2] if "rel_pos" not in n
    )
    assert not any(ctclip.is_unused(n) for group in by_decay.values() for n in group)


# ---- evaluation


def test_eval_samples_are_stratified_and_fixed():
    rng = np.random.default_rng(0)
    targets = (rng.random((3000, 18)) < np.linspace(0.02, 0.5, 18)).astype(np.float32)
    targets[::7, 3] = np.nan
    chosen = ctclip.stratified(targets, 200, 2025)
    assert len(set(chosen)) == 200 and np.array_equal(chosen, ctclip.stratified(targets, 200, 2025))
    assert not np.array_equal(chosen, ctclip.stratified(targets, 200, 1))
    share, of_all = np.nan_to_num(targets[chosen]).mean(0), np.nan_to_num(targets).mean(0)
    assert abs(share - of_all).max() < 0.01  # at random: 0.035 for a prevalence of 0.5
    assert len(ctclip.stratified(targets, 5000, 0)) == 3000


def test_eval_samples_metrics_monitor(tiny_reports, tmp_path):
    words = ["--eval-samples", 5, "--best-metric", "f1", "--metrics", "f1", "recall"]
    out, text = log_of(tiny_reports, tmp_path, *words)
    record = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    assert record["n"] == 5 and "on all 9 validation cases" in text
    assert "macro_f1" in record and "macro_recall" in record and "macro_auroc" not in record
    entry = common.load_checkpoint(out / "checkpoint_step_4.pt")["state"]["best"][0]
    assert entry["score"] == record["macro_f1"]
    assert "macro_f1:" in text and "macro_precision:" not in text


def test_prompts_and_zero_shot(tiny_reports):
    args, _, valid, model = built(tiny_reports, "--label-loss-weight", 1)
    ctx = common.Context(0, 1, torch.device("cpu"))
    head = ctclip.predict(model.eval(), valid, ctx)
    args.zero_shot = True
    shot = ctclip.predict(model, valid, ctx)
    assert not np.allclose(head["probs"], shot["probs"])
    # by hand: softmax over the cosines of a finding present and absent, as the original does
    texts = [p.format(n) for n in LABELS for p in ctclip.PROMPTS]
    ids = [torch.tensor(valid.tokenizer.encode(t).ids) for t in texts]
    with torch.no_grad():
        found = torch.cat([model.encode_text(x[None], torch.ones_like(x)[None]) for x in ids])
        logits = model.temperature.exp() * torch.from_numpy(shot["image_features"]) @ found.T
    expected = logits.unflatten(1, (3, 2)).softmax(-1)[..., 0]
    np.testing.assert_allclose(shot["probs"], expected, atol=1e-6)
    assert np.isnan(shot["text_features"][8]).all() and np.isfinite(shot["text_features"][:8]).all()  # no report
    args.prompts = ["{} is seen.", "{} is not seen.", "there is {}.", "there is no {}."]
    ensemble = ctclip.predict(model, valid, ctx)
    assert not np.allclose(ensemble["probs"], shot["probs"])


def test_threshold_changes_the_metrics(tiny_reports):
    _, _, valid, model = built(tiny_reports)
    ctx = common.Context(0, 1, torch.device("cpu"))
    metrics = []
    for threshold in (None, 0.0):
        valid.args.threshold = threshold
        metrics.append(ctclip.evaluate(model, valid, None, ctx))
    assert metrics[1]["macro_recall"] == 1.0 and metrics[0]["macro_auroc"] == metrics[1]["macro_auroc"]
