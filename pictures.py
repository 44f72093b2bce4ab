"""The cases that a model gets most confidently wrong, and right, as they look, with what moved its score.

evaluate.py draws them from a checkpoint, one case at a time; predictions from a file have no images.

A heat map is HiResCAM (Draelos and Carin, arXiv 2011.08891) against the mean: gradient of the label's log-odds times
(activation - its mean over all places), summed over the channels of the last map that still has places, what raises
the score alone. That is, to first order, what the score would lose if the place looked like the average one. Against 0,
as in the paper, the map of a label whose logit is negative is empty as a rule, and that of a rare one mostly is. Unlike
Grad-CAM it does not average the gradient over places: it shows no place that the model did not use. On checkpoints of
the demo, hiding the hottest tenth of the places lowered the log-odds by 2.2, 4.9 and 0.41 (SigLIP, CT-CLIP, RET-CLIP;
40 cases each; against 0 by 1.8, 4.8 and 0.37), hiding a random tenth by 0.10, 0.40 and 0.01. What is before that map
runs without a graph: a case costs one forward pass and the memory of the layers behind the map. The maps, in float32:
  finetune_siglip  SigLIP: the tokens that the last block's attention reads; Merlin: the output of the last block
  run_task2        the backbone's last map, of the one slice that is shown, and of that slice's own score
  train_ctclip     the tokens of the codebook, over space and slices
  train_retclip    the tokens that the last block's attention reads
Tokens are taken behind the norm: before it the product is 0, for a norm ignores the length of what it is given.
"""

import base64
import io
from collections import Counter
from contextlib import contextmanager

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import UserError
from page import esc, number

WRONG, PER_LABEL, PER_CASE = 6, 2, 2  # at most: of each kind; of a label and kind; of a case, of both kinds
LABELS = 18  # labels whose most confident right case is shown
SIDE, OPACITY = 288, 0.6  # pixels of a picture's longer side; of the heat map where it is highest
KINDS = {
    "false positive": "False positives: called present, labelled absent",
    "false negative": "False negatives: called absent, labelled present",
    "found": f"Found: the most confident right case of a label, of up to {LABELS} labels",
}


# ==== Choice ===================================================================================================


def to_reach(cases) -> np.ndarray:
    """What each probability must reach to count as present, (n, K): the threshold of its label or, where the most
    probable label counts, the highest probability of the others."""
    if not cases.most_probable:
        return np.broadcast_to(cases.thresholds, cases.probs.shape)
    second, top = np.sort(cases.probs, axis=1)[:, -2:].T[..., None]
    return np.where(cases.probs == top, second, top)


def entry(cases, i: int, k: int, kind: str, must) -> dict:
    facts = {"id": cases.ids[i], "label": cases.class_names[k], "kind": kind}
    return facts | {"prob": float(cases.probs[i, k]), "threshold": float(must[i, k])}


def wrong_cases(cases) -> list[dict]:
    """The most confident errors -> [{id, label, kind, prob, threshold}], false positives first.

    False positives by how far they are above the threshold, false negatives by the lowest probability, ties by id; at
    most 6 of a kind, of which 2 of a label; a case comes at most twice. A case that failed to load is in no error.
    """
    if not cases.class_names:
        return []
    y, p, must, found, of_case = cases.targets, cases.probs, to_reach(cases), [], Counter()
    kinds = {"false positive": ((y == 0) & (p >= must), must - p), "false negative": ((y == 1) & (p < must), p)}
    for kind, (wrong, rank) in kinds.items():
        of_label = Counter()
        for i, k in sorted(map(tuple, np.argwhere(wrong)), key=lambda at: (rank[at], cases.ids[at[0]], at[1])):
            if of_label.total() < WRONG and of_label[k] < PER_LABEL and of_case[i] < PER_CASE:
                found.append(entry(cases, i, k, kind, must))
                of_label[k] += 1
                of_case[i] += 1
    return found


def found_cases(cases) -> list[dict]:
    """For each label, as far as there is one, the positive case with the highest probability that reaches the
    threshold; entries as of `wrong_cases`, of kind "found"."""
    must, found = to_reach(cases), []
    right = (cases.targets == 1) & (cases.probs >= must)
    for k in np.flatnonzero(right.any(0))[:LABELS]:
        best = min(np.flatnonzero(right[:, k]), key=lambda i: (-cases.probs[i, k], cases.ids[i]))
        found.append(entry(cases, best, k, "found", must))
    return found


# ==== Heat maps ================================================================================================


@contextmanager
def at_rest(model):
    """Evaluation mode, and no gradients of parameters; at the end everything is as it was."""
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_()
        model.train(training)


@contextmanager
def cut_behind(module):
    """A list of what the module puts out (the last of several), cut off there: what comes before has no graph."""
    maps = []

    def cut(module, given, out):
        *others, last = out if isinstance(out, tuple) else (out,)
        maps.append(last.detach().requires_grad_())
        return (*others, maps[-1]) if others else maps[-1]

    handle = module.register_forward_hook(cut)
    try:
        yield maps
    finally:
        handle.remove()


def evidence(score, maps: list, channel: int, places=lambda x: x) -> torch.Tensor:
    """What raises the score at each place of the maps, >= 0, without the dimension `channel`; see the head of the file.

    `places` takes from a map, channels last, those that count.
    """
    gradients = torch.autograd.grad(score, maps, retain_graph=True)
    g, x = (torch.cat([places(part.detach().movedim(channel, -1)) for part in some]) for some in (gradients, maps))
    return (g * (x - x.flatten(0, -2).mean(0))).sum(-1).relu().nan_to_num().float().cpu()


def slice_of(heat: torch.Tensor, volume: np.ndarray) -> tuple:
    """The slice of a volume (D, H, W) HU with the most of a heat (D', h, w) -> name, (H, W) uint8, its heat (h, w)."""
    deep = F.interpolate(heat[None, None], (len(volume), *heat.shape[1:]), mode="trilinear", align_corners=False)[0, 0]
    at = int(deep.sum((1, 2)).argmax()) if deep.any() else len(volume) // 2
    return f"slice {at + 1} of {len(volume)}", windowed(volume[at]), deep[at].numpy()


def windowed(image: np.ndarray) -> np.ndarray:
    """HU -> uint8 in a window of lung and soft tissue; uint8 stays."""
    centre, width = common.WINDOWS["chest"]
    levels = ((np.float32(image) - centre) / width + 0.5).clip(0, 1) * 255
    return image if image.dtype == np.uint8 else levels.round().astype(np.uint8)


def views_of_siglip(source: dict, row: int, labels: list[int]) -> dict:
    """Each `views_of_...`: the views {label: [(name, image (H, W) or (H, W, 3) uint8, heat (h, w) float32 >= 0)]} of a
    case by its row in the data set; raises UserError if it cannot be read."""
    model, volume = source["model"], source["dataset"].load(row)  # (S, H, W) HU
    backbone, found = model.backbone, {}
    last = backbone.layer4[-1] if model.is_3d else backbone.encoder["layers"][-1].layer_norm1
    with cut_behind(last) as maps:
        logits = model(torch.from_numpy(volume)[None].to(source["device"]))[0]
    if not model.is_3d:
        patch = backbone.embeddings["patch_embedding"].kernel_size[0]
        rows, columns = (side // patch for side in volume.shape[1:])
        volume = volume[:, : rows * patch, : columns * patch]  # the model does not see the rest
    for k in labels:
        if model.is_3d:  # it sees columns, rows, both turned round
            heat = evidence(logits[k], maps, 1)[0].transpose(1, 2).flip(1, 2)  # (S', h, w)
        else:
            heat = evidence(logits[k], maps, 2).unflatten(1, (rows, columns))  # (S, h, w)
        found[k] = [slice_of(heat, volume)]
    return found


def views_of_task2(source: dict, row: int, labels: list[int]) -> dict:
    """The slice with the highest attention for the label (--aggregate mil) or, without attention, probability."""
    model, dataset, found = source["model"], source["dataset"], {}
    slices = dataset.slices_of[row]
    rows, n_labels = source["out"]["rows"][slices], len(dataset.class_names)
    for k in labels:
        at = int(np.nanargmax(rows[:, k if model.mil is None else n_labels + k]))  # NaN: the slice is unreadable
        image = dataset.image(slices[at])  # (1, H, W)
        with cut_behind(model.backbone) as maps:
            logits = model.slice_rows(torch.from_numpy(image)[None].to(source["device"]))[0]
        heat = evidence(logits[k], [maps[0]], 1)[0]
        found[k] = [(f"slice {at + 1} of {len(slices)}", windowed(image[0]), heat.numpy())]
    return found


def views_of_ctclip(source: dict, row: int, labels: list[int]) -> dict:
    model, args, device = source["model"], source["dataset"].args, source["device"]
    volume = np.asarray(source["dataset"].load(row))  # (D, H, W) HU, toward S, L, P
    with cut_behind(model.visual_transformer) as maps:
        features = model.encode_image(torch.from_numpy(np.float32(volume))[None, None].to(device) / 1000)
    if model.classifier is not None and not args.zero_shot:
        logits = model.classify(features)[0]
    else:
        if "prompts" not in source:
            source["prompts"] = source["script"].prompt_features(model, args, device)  # (K, 2, E)
        cosine = torch.einsum("be,kpe->kp", features, source["prompts"])
        logits = model.temperature.exp() * (cosine[:, 0] - cosine[:, 1])
    shown = volume.transpose(0, 2, 1)  # as one looks at a CT: the back below, the patient's left on the right
    return {k: [slice_of(evidence(logits[k], maps, 4)[0].transpose(1, 2), shown)] for k in labels}


def views_of_retclip(source: dict, row: int, labels: list[int]) -> dict:
    script, model, dataset, device = (source[name] for name in ("script", "model", "dataset", "device"))
    if "classes" not in source:
        with torch.no_grad():
            alone = common.Context(0, 1, device)
            source["classes"] = script.class_features(model, dataset.class_names, dataset.args, alone).to(device)
    images, present = dataset.load(row)  # (eyes, 3, R, R) uint8, (eyes,)
    colour = torch.from_numpy(np.stack([script.plain_colour()] * len(images)))
    with cut_behind(model.visual.transformer["resblocks"][-1].ln_1) as maps:
        eyes = model.encode_eyes(images[None].to(device), colour[None].to(device))
        feature = F.normalize(model.encode_image(eyes, present[None].to(device))["patient"].float(), dim=-1)
    logits, found = model.scale("patient").exp() * (source["classes"] @ feature[0]), {}
    grid = images.shape[-1] // model.visual.conv1.kernel_size[0]
    names = ("left eye", "right eye") if dataset.eyes == 2 else ("photograph",) * len(images)
    there = [name for name, seen in zip(names, present, strict=True) if seen]
    for k in labels:
        others = torch.cat([logits[:k], logits[k + 1 :]]).logsumexp(0)
        heat = evidence(logits[k] - others, maps, 2, lambda x: x[present, 1:])  # (eyes, h * w), no class token
        heat = heat.unflatten(1, (grid, grid)).numpy()
        found[k] = list(zip(there, images[present].permute(0, 2, 3, 1).numpy(), heat, strict=True))
    return found


VIEWS = {"siglip": views_of_siglip, "task2": views_of_task2, "ctclip": views_of_ctclip, "retclip": views_of_retclip}


# ==== Pictures =================================================================================================


@torch.enable_grad()
def draw(cases, chosen: list[dict]) -> dict:
    """-> {about: a sentence, cases: the `chosen` ones, each with `views`: [(name, JPEG data URI, one with the heat map
    or None where no place raises the score)], or with `gone`: why it cannot be drawn}.

    `cases.images` has what is needed: task, script, dataset, model, device, out (of `predict`). The model stays as it
    is.
    """
    source, drawn, labels_of = cases.images, {}, {}
    row_of = {name: row for row, name in enumerate(source["out"]["ids"])}
    for one in chosen:
        labels_of.setdefault(one["id"], []).append(cases.class_names.index(one["label"]))
    with at_rest(source["model"]):
        for name, labels in labels_of.items():
            try:
                views = VIEWS[source["task"]](source, row_of[name], labels)
            except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as e:  # it could be read a moment ago
                drawn |= {(name, k): {"gone": " ".join(str(e).split())} for k in labels}
                continue
            for k, some in views.items():
                top = max(heat.max() for _, _, heat in some)
                uris = [
                    (title, picture_uri(image), picture_uri(image, heat / top) if top > 0 else None)
                    for title, image, heat in some
                ]
                drawn[name, k] = {"views": uris}
    drawn = [one | drawn[one["id"], cases.class_names.index(one["label"])] for one in chosen]
    return {"about": about(source, cases.most_probable), "cases": drawn}


def picture_uri(image: np.ndarray, heat: np.ndarray | None = None) -> str:
    """A small JPEG of an image (H, W) or (H, W, 3) uint8, with a heat map (h, w) in [0, 1] over all of it, as a data
    URI. Under a heat map a photograph is grey, so that the colours are the map's."""
    small = Image.fromarray(image)
    scale = SIDE / max(small.size)
    small = small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling.BICUBIC)
    if heat is not None:
        heat = Image.fromarray(np.float32(heat)).resize(small.size, Image.Resampling.BICUBIC)
        heat, grey = np.asarray(heat).clip(0, 1), np.asarray(small.convert("L"))[..., None] / 255
        weight = OPACITY * np.sqrt(heat)[..., None]
        mixed = (1 - weight) * grey + weight * matplotlib.colormaps["inferno"](heat)[..., :3]
        small = Image.fromarray(np.round(255 * mixed).astype(np.uint8))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ==== Page =====================================================================================================

STYLE = """
.cases { display: grid; grid-template-columns: repeat(3, 1fr); gap: 20px 22px; margin-top: 12px; }
.case { border-top: 1px solid #d9d9d9; padding-top: 8px; break-inside: avoid; overflow-wrap: anywhere; }
.views { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; margin-top: 6px; align-items: start; }
.views img { width: 100%; display: block; } .views span { color: #555; font-size: 13px; line-height: 1.3; }
.heat { display: inline-block; width: 120px; height: 11px; margin: 0 6px; vertical-align: -1px;
  background: linear-gradient(90deg, #666666, #624c68, #8a525e, #b37b36, #c0c28b); }
@media screen and (max-width: 900px) { .cases { grid-template-columns: 1fr; } }
"""

TEXT = (
    "The false positives farthest above their threshold, and the false negatives of the lowest probability: at most "
    f"{WRONG} of each, of which {PER_LABEL} of one label, and no case more than {PER_CASE} times. An error of the "
    "model and one of the labels look alike here."
)
NO_PICTURES = "evaluate.py draws their pictures where the scores are a checkpoint's own, unless --no-pictures."
HOW = (
    "Beside each image its heat map: where the last places of the network raise the score of the label more than their "
    "average does (gradient times activation, HiResCAM), relative to the highest of the picture. It shows what moved "
    "the score, not where the disease is, and is as coarse as those places."
)


def about(source: dict, most_probable: bool) -> str:
    """What a reader must know of the views of this model."""
    if source["task"] == "retclip":
        text = "Photographs are as the model sees them, squeezed to a square; both eyes have one scale of heat."
        return text + " The threshold of a case is the highest probability of the other classes." * most_probable
    if source["task"] == "task2":
        most = "highest probability" if source["model"].mil is None else "most attention"
        return f"Shown is the slice with the {most} for the label, in the order of the table; the map is of its score."
    return "Shown is the slice with the most heat, of those that the model sees, counted from below."


def card(one: dict) -> str:
    """A case and its views; everything that came from a file is escaped here."""
    said = f"{esc(one['label'])}<br>probability {number(one['prob'])}, threshold {number(one['threshold'])}"
    views = "" if "views" in one else f"<span>Could not be drawn: {esc(one['gone'])}</span>"
    for name, image, heat in one.get("views", []):
        alt = esc(f"{name} of {one['id']}")
        views += f'<span><img src="{image}" alt="{alt}">{esc(name)}</span><span>'
        views += f'<img src="{heat}" alt="heat map, {alt}">' if heat else "No place raises the score more than others."
        views += "</span>"
    return f'<div class="case"><b>{esc(one["id"])}</b><small>{said}</small><div class="views">{views}</div></div>'


def errors_section(results: dict, drawn: dict | None) -> str:
    """The most confident errors and right cases, as `draw` gives them; None: a table of the errors alone."""
    if not results["per_label"]:
        return ""
    wrong, parts = results.get("wrong", []), ""
    if not wrong:
        parts = "<p>No case is wrong at these thresholds.</p>"
    elif drawn is None:
        rows = "".join(
            f"<tr><td>{esc(one['id'])}</td><td>{esc(one['label'])}</td><td>{esc(one['kind'])}</td>"
            f"<td>{number(one['prob'])}</td><td>{number(one['threshold'])}</td></tr>\n"
            for one in wrong
        )
        head = "".join(f"<th>{title}</th>" for title in ("Case", "Label", "Error", "Probability", "Threshold"))
        parts = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    text = f"<p>{TEXT}{' ' + NO_PICTURES if drawn is None else ''}</p>"
    if drawn and drawn["cases"]:
        text += f'<p>{HOW} {esc(drawn["about"])}</p><p class="sub">nothing<span class="heat"></span>most</p>'
    for kind, title in KINDS.items():
        cards = "".join(card(one) for one in drawn["cases"] if one["kind"] == kind) if drawn else ""
        parts += f'<h3>{title}</h3><div class="cases">{cards}</div>' if cards else ""
    return f"\n<section><h2>The most confident errors</h2>{text}{parts}</section>"
