"""pictures.py: errors are chosen as by a slow rule, heat lies where the model looks, drawing changes no model."""

import base64
import html
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, ROOT, film_args, fundus_args, report_args, slice_args, tiny_args
from PIL import Image
from torch import nn

import common
import evaluate
import finetune_siglip
import pictures
import report
import run_task2
import train_csi
import train_ctclip
import train_retclip
from cases import Cases

EVIL = '<img src=x onerror="alert(1)">'
CPU = torch.device("cpu")


def cases_of(probs, targets, thresholds=0.5, ids=None, **more):
    n, k = np.shape(probs)
    ids = ids or [f"c{i:03d}" for i in range(n)]
    empty = dict.fromkeys(("failed", "thresholds_source", "evaluated", "evaluated_on", "notes", "files"))
    thresholds, names = np.full(k, thresholds, float), [f"label{j}" for j in range(k)]
    arrays = {"targets": np.array(targets, float), "probs": np.array(probs, float), "thresholds": thresholds}
    return Cases(ids=ids, groups=ids, class_names=names, **arrays, **empty | more)


# ---- Choice ----


def slow_choice(cases):
    """The rule in words: again and again the worst error that is still allowed."""
    found, n, k = [], *cases.probs.shape
    for kind in ("false positive", "false negative"):
        for _ in range(6):
            best = None
            for i in range(n):
                for j in range(k):
                    p, y, row = cases.probs[i, j], cases.targets[i, j], cases.probs[i]
                    t = cases.thresholds[j]
                    if cases.most_probable:
                        t = max(row[m] for m in range(k) if m != j)
                    wrong = p >= t and y == 0 if kind == "false positive" else p < t and y == 1
                    one = {"id": cases.ids[i], "label": cases.class_names[j], "kind": kind, "prob": p, "threshold": t}
                    twice = sum(o["id"] == one["id"] for o in found) == 2
                    of_label = sum(o["label"] == one["label"] and o["kind"] == kind for o in found) == 2
                    if not wrong or one in found or twice or of_label:
                        continue
                    key = (t - p if kind == "false positive" else p, cases.ids[i], j)
                    if best is None or key < best[0]:
                        best = key, one
            if best:
                found.append(best[1])
    return found


@pytest.mark.parametrize("most_probable", [False, True])
@pytest.mark.parametrize("n", [6, 40])
def test_errors_are_those_of_the_slow_rule(n, most_probable):
    """Ties (probabilities of few digits) by id, unknown labels and failed cases in no error, whatever the order."""
    rng = np.random.default_rng(n)
    probs = np.round(rng.random((n, 5)), 1)
    targets = np.where(rng.random((n, 5)) < 0.2, np.nan, rng.random((n, 5)) < 0.4)
    probs[1] = np.nan
    cases = cases_of(probs, targets, rng.random(5), most_probable=most_probable)
    found = pictures.wrong_cases(cases)
    assert found == slow_choice(cases) and len(found) > 3
    assert "c001" not in {one["id"] for one in found + pictures.found_cases(cases)}
    order = rng.permutation(n)
    shuffled = cases_of(probs[order], targets[order], cases.thresholds, [cases.ids[i] for i in order])
    assert pictures.wrong_cases(replace(shuffled, most_probable=most_probable)) == found


def test_found_cases_are_the_surest_positives():
    probs = [[0.9, 0.2, 0.6], [0.9, 0.8, 0.7], [0.99, 0.95, 0.1], [np.nan] * 3]
    targets = [[1, 1, 0], [1, 1, np.nan], [0, 0, 1], [1, 1, 1]]
    found = pictures.found_cases(cases_of(probs, targets))
    assert [(one["id"], one["label"], one["prob"]) for one in found] == [
        ("c000", "label0", 0.9),
        ("c001", "label1", 0.8),
    ]


def test_a_file_of_predictions_has_a_table(tmp_path, capsys):
    """No images: ids and labels in a table, escaped; results.json has the same; report.py alone repeats it."""
    rng = np.random.default_rng(0)
    y, p, ids = rng.integers(0, 2, (30, 2)), rng.random((30, 2)), [f"{EVIL}{i}" for i in range(30)]
    pd.DataFrame(y, columns=["a", EVIL]).assign(id=ids).to_csv(tmp_path / "l.csv", index=False)
    pd.DataFrame(p, columns=["a_prob", f"{EVIL}_prob"]).assign(id=ids).to_csv(tmp_path / "p.csv", index=False)
    words = ["--predictions", tmp_path / "p.csv", "--labels", tmp_path / "l.csv", "--output", tmp_path / "eval"]
    assert evaluate.main([*map(str, words), "--no-bootstrap"]) == 0
    wrong = json.loads((tmp_path / "eval" / "results.json").read_text())["wrong"]
    expected = slow_choice(cases_of(p, y, 0.5, ids))
    assert [(o["id"], o["kind"], o["prob"]) for o in wrong] == [(o["id"], o["kind"], o["prob"]) for o in expected]
    files = [tmp_path / "eval" / name for name in ("results.json", "predictions.csv", "labels.csv")]
    words = [
        x for flag, file in zip(("--results", "--predictions", "--labels"), files, strict=True) for x in (flag, file)
    ]
    assert report.main([*map(str, words), "--out", str(tmp_path / "again.html")]) == 0
    for page in (tmp_path / "eval" / "report.html", tmp_path / "again.html"):
        section = section_of(page)
        assert section.count("<tr>") == 1 + len(wrong) and html.escape(EVIL, quote=True) in section
        assert "<img" not in section and "evaluate.py draws their pictures" in section


# ---- Heat maps: models whose weights say where they look ----


def section_of(page):
    text = page.read_text()
    start = text.index("<h2>The most confident errors")
    return text[start : text.index("</section>", start)]


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)


def source_of(script, args, dataset):
    torch.manual_seed(0)
    model = script.build_model(args, say=lambda *said: None).eval()
    return {"task": script.TASK, "script": script, "dataset": dataset, "model": model, "device": CPU, "out": {}}


def blind_but_for_brightness(patches, positions, blocks, attention):
    """A ViT whose tokens say bright or dark alone, and whose last block looks at all of them alike."""
    with torch.no_grad():
        patches.weight.zero_()
        patches.weight[0] = 1
        if patches.bias is not None:
            patches.bias.zero_()
        positions.zero_()
        for block in blocks[:-1]:
            for last in (
                p for name, p in block.named_parameters() if "out_proj" in name or "fc2" in name or "c_proj" in name
            ):
                last.zero_()
        for p in attention:
            p.zero_()


@pytest.fixture(scope="module")
def siglip():
    """A SigLIP of 6 slices of 64 pixels, of which slice 4 is bright in a corner and the rest is dark; behind the last
    block it is linear, and label 1 is the contrary of label 0."""
    words = [*tiny_args(ROOT, "x")[1:], "--image-size", 64, "--slice-pool", "attention"]
    args = finetune_siglip.parse_args([*map(str, words)])
    volume = np.full((6, 64, 64), -1000, np.int16)
    volume[3, 32:48, 16:32] = 1000
    source = source_of(finetune_siglip, args, SimpleNamespace(load=lambda row: volume, class_names=LABELS, args=args))
    model = source["model"]
    tower = model.backbone
    layers = tower.encoder["layers"]
    last = layers[-1].self_attn
    keys = [last.q_proj.weight, last.q_proj.bias, last.k_proj.weight, last.k_proj.bias, last.v_proj.bias]
    keys += layers[-1].mlp.fc2.parameters()
    table = tower.embeddings["position_embedding"].weight
    blind_but_for_brightness(tower.embeddings["patch_embedding"], table, layers, keys)
    tower.post_layernorm, tower.head = nn.Identity(), nn.AdaptiveAvgPool2d((1, None))
    tower.head.register_forward_hook(lambda module, given, out: out[:, 0])
    weight = torch.randn(1, 96)
    model.classifier = nn.Sequential(nn.Identity(), nn.Linear(96, 3))
    model.classifier[1].weight = nn.Parameter(weight * torch.tensor([[1.0], [-1.0], [0.0]]))
    return source


def test_siglip_heat_is_where_the_model_looks(siglip):
    """Heat is on exactly the bright patch for one label, on exactly the dark ones for the other."""
    bright, dark = sorted((view for (view,) in pictures.views_of_siglip(siglip, 0, [0, 1]).values()), reverse=True)
    name, image, heat = bright
    assert name == "slice 4 of 6" and np.argwhere(heat > 0).tolist() == [[2, 1]]
    assert image.shape == (64, 64) and image[40, 20] == 255 and image[0, 0] == 0
    name, image, heat = dark
    assert name != "slice 4 of 6" and (heat > 0).all() and np.ptp(heat) < 1e-5 * heat.max() and image.max() == 0
    ((name, _, heat),) = pictures.views_of_siglip(siglip, 0, [2])[2]
    assert name == "slice 4 of 6" and not heat.any()  # nothing raises the score: the middle


class Mean(nn.Module):
    """In place of a tower: the image's mean over cells of `cell` pixels, in all channels, is the last map."""

    widths, out_width = (1, 1, 64), 64

    def __init__(self, cell, dims):
        super().__init__()
        pool, self.dims = nn.AvgPool3d((1, cell, cell)) if dims == 3 else nn.AvgPool2d(cell), dims
        self.layer4 = nn.Sequential(pool, nn.ReLU())

    def forward(self, x):
        last = self.layer4(x[:, :1]).expand(-1, 64, *[-1] * self.dims)
        return (x, x, last) if self.dims == 2 else last.mean((2, 3, 4))


def test_merlin_heat_is_turned_back():
    """Merlin sees columns, rows, both turned round; its map is laid over the slice as one looks at it."""
    words = [*tiny_args(ROOT, "x")[1:], "--arch", "merlin-tiny", "--image-size", 64]
    args = finetune_siglip.parse_args([*map(str, words)])
    volume = np.full((6, 64, 64), -1200, np.int16)  # black in every window
    volume[4, 48:56, 8:16] = 1000
    source = source_of(finetune_siglip, args, SimpleNamespace(load=lambda row: volume))
    source["model"].backbone = Mean(8, 3)
    source["model"].classifier = nn.Sequential(nn.Identity(), nn.Linear(64, 3))
    with torch.no_grad():
        source["model"].classifier[1].weight.copy_(torch.tensor([[1.0], [-1], [0]]).expand(-1, 64))
    views = pictures.views_of_siglip(source, 0, [0, 1, 2])
    ((name, image, heat),) = views[0]
    assert name == "slice 5 of 6" and np.argwhere(heat > 0).tolist() == [[6, 1]] and image[50, 10] == 255
    ((name, _, heat),) = views[1]
    assert name != "slice 5 of 6" and (heat > 0).all() and np.ptp(heat) < 1e-4 * heat.max()
    assert not views[2][0][2].any() and views[2][0][0] == "slice 4 of 6"  # nothing raises the score: the middle


@pytest.mark.parametrize("aggregate", ["mean", "mil"])
def test_task2_heat_is_of_the_chosen_slice(aggregate, tmp_path):
    """The slice with the highest probability or attention, not an unreadable one; heat at its bright corner."""
    words = [*slice_args(ROOT, "x")[1:], "--image-size", 64, "--aggregate", aggregate]
    args = run_task2.parse_args([*map(str, words)])
    args.window_values = [(-300.0, 1400.0)] * 3
    images = np.zeros((4, 1, 64, 64), np.uint8)
    images[2, 0, 8:16, 40:48] = 255
    dataset = SimpleNamespace(
        image=lambda index: images[index], slices_of=[np.array([]), np.arange(4)], class_names=LABELS
    )
    source = source_of(run_task2, args, dataset)
    source["model"].backbone = Mean(8, 2)
    source["model"].classifier = nn.Sequential(nn.Linear(64, 512, bias=False), nn.Linear(512, 3, bias=False))
    with torch.no_grad():
        source["model"].classifier[0].weight.fill_(1)
        source["model"].classifier[1].weight.copy_(torch.tensor([[1.0], [-1], [1]]).expand(-1, 512))
    rows = np.full((4, 6), np.nan, np.float32)
    rows[1:] = [[0, 0, 0, 0, 0, 0], [3, 1, 1, -1, 5, 5], [1, 2, 2, 9, 4, 4]]  # logits of 3 labels, attention of 3
    source["out"] = {"rows": rows if aggregate == "mil" else rows[:, :3]}
    views = pictures.views_of_task2(source, 1, [0, 1])
    first, second = (view for (view,) in views.values())
    names = ["slice 4 of 4", "slice 3 of 4"] if aggregate == "mil" else ["slice 3 of 4", "slice 4 of 4"]
    assert [first[0], second[0]] == names
    name, image, heat = first
    expected = [[1, 5]] if aggregate == "mean" else []
    assert np.argwhere(heat > 0).tolist() == expected and image[10, 44] == (255 if expected else 0)
    corner = np.arange(64).reshape(8, 8) == 13
    assert (second[2] > 0).tolist() == (~corner if aggregate == "mil" else corner & False).tolist()


def test_ctclip_heat_is_that_of_the_formula(tiny_reports):
    """Zero-shot: the gradient of a difference of cosines to a token, written down; slices of 6 share their tokens."""
    args = train_ctclip.parse_args([*map(str, report_args(tiny_reports, "x")[1:])])
    args.split = "valid"
    source = source_of(train_ctclip, args, train_ctclip.CTReports(args.valid_data, args, False))
    model, volume = source["model"], np.asarray(source["dataset"].load(2))
    with torch.no_grad():
        model.to_visual_latent.weight[:, 5 * 64 :] = 0  # of the 4 x 4 places it sees the first five
        tokens = model.visual_transformer(torch.from_numpy(np.float32(volume))[None, None] / 1000)[0]  # (T, 4, 4, E)
        z = model.to_visual_latent(tokens.mean(0).flatten())
        prompts = train_ctclip.prompt_features(model, args, CPU)
        d = prompts[1, 0] - prompts[1, 1]
        f = z / z.norm()
        slope = model.temperature.exp() * (d - f * (f @ d)) / z.norm() / len(tokens)
        weight = model.to_visual_latent.weight.unflatten(1, (4, 4, 64))  # (L, 4, 4, E)
        heat = torch.einsum("thwe,lhwe,l->thw", tokens - tokens.mean((0, 1, 2)), weight, slope).relu()
    deep = np.repeat(heat.numpy(), 6, 0)
    ((name, image, found),) = pictures.views_of_ctclip(source, 2, [1])[1]
    at = int(name.split()[1]) - 1
    assert abs(at - 2.5 - 6 * heat.sum((1, 2)).argmax()) <= 3 and name.endswith("of 24") and heat.any()
    if at % 6 in (2, 3):  # the middle of a token, where the interpolation is nearly the token
        np.testing.assert_allclose(found, deep[at].T, atol=0.2 * deep.max())
    assert set(map(tuple, np.argwhere(found > 0))) <= {
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 0),
        (0, 1),
    }  # transposed: H is across
    expected = ((volume[at].T + 300) / 1400 + 0.5).clip(0, 1) * 255
    assert abs(image - expected).max() <= 0.51


def test_retclip_heat_is_where_the_model_looks(tiny_fundus):
    """Log-odds of two classes are opposite, as are bright and dark tokens: of an eye either the one half is hot, or the
    other, and for the other class the contrary. A missing eye is not shown."""
    args = train_retclip.parse_args([*map(str, fundus_args(tiny_fundus, "x")[1:])])
    args.split, args.monocular = "valid", None
    source = source_of(train_retclip, args, train_retclip.FundusPairs(args.valid_data, args, False))
    source["dataset"].class_names, tower = source["dataset"].class_names[:2], source["model"].visual
    blocks = tower.transformer["resblocks"]
    blind_but_for_brightness(tower.conv1, tower.positional_embedding, blocks, [])
    with torch.no_grad():
        blocks[-1].attn.in_proj_weight[: 2 * tower.conv1.out_channels] = 0  # all places get the same attention
    for row, eyes in ((0, ["left eye", "right eye"]), (1, ["left eye"])):
        views = pictures.views_of_retclip(source, row, [0, 1])
        images = source["dataset"].load(row)[0].numpy()
        for e, (one, other) in enumerate(zip(*views.values(), strict=True)):
            assert one[0] == other[0] == eyes[e] and (one[1] == images[e].transpose(1, 2, 0)).all()
            cells = images[e].mean(0).reshape(len(one[2]), -1, len(one[2]), 32 // len(one[2])).mean((1, 3))
            bright = cells > cells.mean()
            assert 0 < bright.sum() < bright.size
            assert (one[2] > 0).tolist() in (bright.tolist(), (~bright).tolist())
            assert ((one[2] > 0) ^ (other[2] > 0)).all()
        assert len(views[0]) == len(eyes)


# ---- Checkpoints, from the command line to the page ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_ct, tiny_slices, tiny_reports, tiny_fundus, tiny_films):
    """Task -> checkpoint of a model with random weights, and of SigLIP a hostile id; batch norm as after training."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    table = pd.read_csv(tiny_ct / "t.csv", dtype=str, keep_default_na=False)
    table["series_id"] = [EVIL + name if i in (16, 17, 18) else name for i, name in enumerate(table["series_id"])]
    table["img_path"] = [str(tiny_ct / name) for name in table["img_path"]]
    table.loc[21, "img_path"] = str(tiny_ct / "gone.npz")
    table.to_csv(folder / "t.csv", index=False)
    commands = {
        "siglip": (finetune_siglip, tiny_args(folder, "x", "--image-size", 64, "--slice-pool", "attention")),
        "merlin": (finetune_siglip, tiny_args(folder, "x", "--arch", "merlin-tiny", "--image-size", 64)),
        "task2": (run_task2, slice_args(tiny_slices, "x", "--image-size", 64)),
        "ctclip": (train_ctclip, report_args(tiny_reports, "x")),
        "retclip": (train_retclip, fundus_args(tiny_fundus, "x")),
        "csi": (train_csi, film_args(tiny_films, "x")),
    }
    for name, (script, words) in commands.items():
        args = script.parse_args([*map(str, words[1:]), "--on-bad-sample", "skip"])
        torch.manual_seed(1)
        if name in ("task2", "retclip"):  # settle what the data decide
            script.build_datasets(args)
        model = script.build_model(args, say=lambda *said: None)
        common.save_checkpoint(folder / f"{name}.pth", common.model_checkpoint(script.TASK, args, model, {}))
        found[name] = folder / f"{name}.pth"
    return found


def score(checkpoint, out, *words, code=0):
    words = ["--test-only", checkpoint, "--output", out, "--no-bootstrap", "--device", "cpu", *words]
    assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == code
    return json.loads(next(out.glob("*results.json")).read_text()), out / "report.html"


@pytest.fixture(scope="module")
def evaluated(checkpoints, tmp_path_factory):
    """Task -> results, page, and what was given to `draw` and came back, of one evaluation."""
    found = {}

    def evaluation(name):
        if name not in found:
            given = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    evaluate, "draw", lambda *some: given.append((*some, pictures.draw(*some))) or given[0][2]
                )
                words = [] if name == "retclip" else ["--threshold", 0.5]
                code = 3 if name in ("siglip", "merlin") else 0  # a case is gone
                found[name] = *score(checkpoints[name], tmp_path_factory.mktemp(name), *words, code=code), *given[0]
        return found[name]

    return evaluation


@pytest.mark.parametrize(
    "name", ["siglip", pytest.param("merlin", marks=pytest.mark.slow), "task2", "ctclip", "retclip"]
)
def test_section_of_each_task(name, evaluated):
    """Pictures that open and show something; the errors of results.json, in their order; nothing unescaped."""
    results, page, *_ = evaluated(name)
    section, wrong = section_of(page), results["wrong"]
    cards = section.split('<div class="case">')[1:]
    assert wrong and len(cards) >= len(wrong) and len(page.read_text()) < 5e6
    for one, card in zip(wrong, cards, strict=False):
        assert f"<b>{html.escape(one['id'], quote=True)}</b>" in card and f"probability {one['prob']:.3f}" in card
    assert "<script" not in section and EVIL not in section
    assert (html.escape(EVIL, quote=True) in section) == (name in ("siglip", "merlin"))
    assert name not in ("siglip", "merlin") or ("case21" in str(results["failed"]) and "case21" not in section)
    uris = re.findall(r'src="(data:image/jpeg;base64,[^"]+)"', section)
    assert len(uris) > len(cards) and "not where the disease is" in section
    assert ("right eye" if name == "retclip" else re.search(r"slice \d+ of \d+<", section)) and "heat map, " in section
    for uri in uris:
        assert max(pixels(uri).shape) == pictures.SIDE and len(uri) < 40e3
    assert np.std(pixels(uris[0])) > 5 and not np.array_equal(pixels(uris[0]), pixels(uris[1]))


@pytest.mark.parametrize("name", ["siglip", "task2", "ctclip", "retclip"])
def test_drawing_leaves_the_model_as_it_is(name, evaluated, monkeypatch):
    """Parameters, their gradients, what needs one, buffers, mode, hooks; the second time the same bytes; the scores are
    those of `predict`."""
    *_, cases, chosen, drawn = evaluated(name)
    model, scores, evidence = cases.images["model"], [], pictures.evidence
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad is not None) for p in parameters]
    monkeypatch.setattr(
        pictures, "evidence", lambda score, *more: scores.append(score.item()) or evidence(score, *more)
    )
    assert pictures.draw(cases, chosen) == drawn
    assert flags == [(p.requires_grad, p.grad is not None) for p in parameters] and flags[0][0] is False
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    assert all((p.grad == 1).all() for p in parameters if p.grad is not None)
    assert not any(m._forward_hooks for m in model.modules())
    if name in ("siglip", "ctclip"):
        probs = [1 / (1 + np.exp(-score)) for score in scores]
        assert np.allclose(sorted(probs), sorted(one["prob"] for one in chosen), atol=1e-5)


@pytest.mark.parametrize("name", ["retclip", "csi"])
def test_without_pictures(name, checkpoints, tmp_path):
    results, page = score(checkpoints[name], tmp_path, "--no-pictures")
    assert "image/jpeg" not in page.read_text()
    if name == "csi":
        assert page.read_text().count("no film") == 6
    else:
        assert section_of(page).count("<tr>") == 1 + len(results["wrong"]) and results["wrong"]


def test_a_vanished_case_is_named(evaluated, monkeypatch):
    results, _, cases, chosen, _ = evaluated("siglip")
    dataset, row = cases.images["dataset"], cases.ids.index(chosen[0]["id"])
    paths = [p.with_name("no<w> gone") if i == row else p for i, p in enumerate(dataset.paths)]
    monkeypatch.setattr(dataset, "paths", paths)
    drawn = pictures.draw(cases, chosen)
    assert "gone" in drawn["cases"][0] and any("views" in one for one in drawn["cases"])
    section = pictures.errors_section(results, drawn)
    assert "Could not be drawn: " in section and "no&lt;w&gt; gone" in section and "no<w>" not in section


@pytest.mark.slow
def test_linear_probe_has_a_table(checkpoints, tmp_path):
    """The model knows nothing of a probe's scores: no heat maps."""
    results, page = score(checkpoints["ctclip"], tmp_path, "--linear-probe")
    assert "image/jpeg" not in page.read_text() and section_of(page).count("<tr>") == 1 + len(results["wrong"])
