"""train_retclip.py's data: what the original builders wrote, foreign and damaged files, augmentation, its flags."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Evil, fundus_args, write_fundus
from PIL import Image

import common
import train_retclip as retclip


def args_of(folder, *more):
    args = retclip.parse_args([str(w) for w in fundus_args(folder, folder / "none", *more)[1:]])
    return args


def dataset(folder, *more, split="train", train=True):
    return retclip.FundusPairs(folder / split, args_of(folder, *more), train)


# ---- what others wrote


@pytest.mark.parametrize("name", ["retclip", "chinese_clip", "many"])
def test_the_originals_lmdb_is_read(shared, name):
    root = shared / "golden/retclip_lmdb"
    expected = json.loads((root / "expected.json").read_text())[name]
    folder = root / expected["path"]
    pairs = retclip.lmdb_pairs(folder)
    assert len(pairs) == int(expected["num_samples"])
    for key, row in expected["pairs"].items():
        assert list(pairs[int(key)]) == row["value"]
    images = retclip.LMDBImages(folder)
    assert images.names() == set(expected["imgs_key_order"]) - {"num_images"}
    for key, row in expected["imgs"].items():
        found = images.get(key)
        if name == "many":
            wanted = [row["left_sha256"], row["right_sha256"]]
        else:
            wanted = [row[side]["sha256"] for side in (("left", "right") if name == "retclip" else ("image",))]
        assert [hashlib.sha256(x).hexdigest() for x in found] == wanted
    assert images.get("nobody") is None


def test_the_originals_tensors(shared, tmp_path, tiny_fundus):
    """The values of the official evaluation transform, on its own images."""
    root = shared / "golden/retclip_lmdb"
    expected = json.loads((root / "expected.json").read_text())["retclip"]
    args = args_of(tiny_fundus, "--image-size", 224)
    data = retclip.FundusPairs(root / expected["path"], args, False)
    items = expected["dataset_items (official LMDBDataset, split='val' transform)"]
    assert len(items) > 3
    for row in items:
        at = data.image_ids.index(row["index"])
        item = data[0, at]
        colour = item["colour"].double()
        pixels = torch.einsum("eij,ejhw->eihw", colour[..., :3], item["images"].double()) + colour[..., 3:, None]
        for eye, side in enumerate(("img_l", "img_r")):
            sample = pixels[eye, :, ::56, ::56].flatten()
            assert torch.allclose(sample, torch.tensor(row[side]["sample[:, ::56, ::56]"]).double(), atol=1e-5)
            assert abs(float(pixels[eye].mean()) - row[side]["mean"]) < 1e-5


def test_lmdb_and_tsv_hold_the_same(tiny_fundus):
    one, other = dataset(tiny_fundus), retclip.FundusPairs(tiny_fundus / "train_imgs.tsv", args_of(tiny_fundus), True)
    assert len(one) == len(other) == 18 and one.texts == other.texts and one.classes == other.classes
    assert one.pairs.tolist() == other.pairs.tolist() and one.groups == other.groups
    for i in (0, 7, 17):
        assert all(torch.equal(one[1, i][k], other[1, i][k]) for k in one[1, i])


def test_many_to_many(tiny_fundus):
    data = dataset(tiny_fundus, split="val", train=False)
    assert len(data) == 9 and len(data.texts) == 10 and len(data.pairs) == 10
    assert data.class_names == ["first", "second"] and np.isnan(data.targets).sum() == 0
    both = data.targets[[w == "second / first" for w in data.classes["patient"]]]
    assert len(both) and (both == 1).all()
    assert data.classes["left"][2] == data.eye_labels[2][0] in ("first", "second")


def test_base64_of_both_alphabets():
    data = bytes(range(256))
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert retclip.from_base64(encode(data), "x") == data
    with pytest.raises(common.UserError, match="not base64"):
        retclip.from_base64("abc", "x")


def test_one_photograph_a_patient(tiny_fundus, tmp_path):
    """As Chinese-CLIP stores it: monocular by itself, or for both eyes with --no-monocular."""
    images = {i: retclip.LMDBImages(tiny_fundus / "train").get(f"P{i}")[:1] for i in range(4)}
    write_fundus(tmp_path / "one", [(i, i, f"case {i}") for i in range(4)], images, monocular=True)
    shutil.copy(tiny_fundus / "vocab.txt", tmp_path)
    for source in ("one", "one_imgs.tsv"):
        data = dataset(tmp_path, split=source)
        assert data.args.monocular and data[0, 2]["images"].shape == (1, 3, 32, 32)
        data = dataset(tmp_path, "--no-monocular", "--no-augment", split=source)
        images = data[0, 2]["images"]
        assert images.shape[0] == 2 and torch.equal(images[0], images[1]) and data[0, 2]["present"].all()


def test_a_missing_eye(tiny_fundus):
    data = dataset(tiny_fundus, split="val", train=False)
    item = data[0, 1]
    assert item["present"].tolist() == [True, False] and item["images"][1].eq(0).all()
    assert data.pictures(1)[1] is None and data.pictures(1)[0].size == (32, 32)


# ---- foreign and damaged files


@pytest.mark.parametrize("where", ["pairs", "imgs"])
def test_an_lmdb_runs_no_code(tiny_fundus, tmp_path, where):
    import lmdb

    owned = "/tmp/plainscan_was_owned"
    shutil.copytree(tiny_fundus, tmp_path / "data")
    with lmdb.open(str(tmp_path / "data/train" / where)) as env, env.begin(write=True) as txn:
        txn.put(b"3" if where == "pairs" else b"P3", pickle.dumps(Evil()))
    with pytest.raises(common.UserError, match="refused, not plain data.*system"):
        data = dataset(tmp_path / "data")
        data[0, data.ids.index("P3")]
    assert not os.path.exists(owned)


@pytest.mark.parametrize("value", [
    pickle.dumps(("P1", 2)), pickle.dumps(["P1", 2, "x"]), pickle.dumps((1.5, 2, "x")), b"\x80\x05X\xff\xff\xff\x7f",
    b"", b"garbage", pickle.dumps((np.int64(1), 2, "x")), b"\x80\x02\x82\x01.",
])  # fmt: skip
def test_other_pickles_are_refused(value):
    with pytest.raises(common.UserError, match="^there: "):
        retclip.plain_pickle(value, ((int, str), (int, str), str), "there")


def test_a_cut_lmdb_is_refused(tiny_fundus, tmp_path):
    """Reading past the end of a mapped file would end the process."""
    for size in (0, 100, 4096, 8192, 12000):
        shutil.copytree(tiny_fundus, tmp_path / str(size))
        for name in ("pairs", "imgs"):
            os.truncate(tmp_path / f"{size}/train/{name}/data.mdb", size)
        with pytest.raises(common.UserError, match="LMDB"):
            dataset(tmp_path / str(size))
    (tmp_path / "0/train/pairs/data.mdb").write_bytes(b"no LMDB at all, but long enough" * 1000)
    with pytest.raises(common.UserError, match="not a whole LMDB"):
        dataset(tmp_path / "0")


def test_an_unfinished_lmdb_is_refused(tiny_fundus, tmp_path):
    import lmdb

    for key, message in ((b"5", "pair 5 of 18 is missing"), (b"num_samples", "has no num_samples")):
        folder = tmp_path / key.decode()
        shutil.copytree(tiny_fundus, folder)
        with lmdb.open(str(folder / "train/pairs")) as env, env.begin(write=True) as txn:
            txn.delete(key)
        with pytest.raises(common.UserError, match=message):
            dataset(folder)


@pytest.mark.parametrize("line, message", [
    ("{not json", "line 3: not a text"), ('{"text_id": 1, "text": "x"}', "line 3: not a text"),
    ('{"text_id": 1, "text": 5, "image_ids": []}', "line 3"),
    ('{"text_id": 1, "text": "x", "image_ids": "P1"}', "line 3"),
    ('{"text_id": 77, "text": "x", "image_ids": ["P99"]}', "1 images of the reports are missing, first P99"),
])  # fmt: skip
def test_mistakes_of_jsonl_are_named(tiny_fundus, tmp_path, line, message):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    path = tmp_path / "data/train_texts.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(common.UserError, match=message):
        dataset(tmp_path / "data", split="train_imgs.tsv")


@pytest.mark.parametrize("change, message", [
    (lambda x: x + x[:1], "line 17: id P0 comes twice"), (lambda x: ["no tab\n"] + x, "line 1: no id and tab"),
    (lambda x: [x[0].rstrip("\n") + "\tYWJj\n"] + x[1:], "3 images"),
    (lambda x: [x[0].split("\t")[0] + "\t\t\n"] + x[1:], "has 0 photographs"),
])  # fmt: skip
def test_mistakes_of_tsv_are_named(tiny_fundus, tmp_path, change, message):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    path = tmp_path / "data/train_imgs.tsv"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(common.UserError, match=message):
        dataset(tmp_path / "data", split="train_imgs.tsv")[0, 0]


def test_line_separators_within_texts(tiny_fundus, tmp_path):
    """U+2028 in a report, and CRLF line ends."""
    shutil.copytree(tiny_fundus, tmp_path / "data")
    path = tmp_path / "data/train_texts.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    rows[0]["text"] = "case\u2028 1 \u201cleft\u201d"
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows).encode())
    tsv = tmp_path / "data/train_imgs.tsv"
    tsv.write_bytes(tsv.read_bytes().replace(b"\n", b"\r\n"))
    data = dataset(tmp_path / "data", split="train_imgs.tsv")
    assert data.texts[0] == 'case\u2028 1 "left"' and data[0, 0]["images"].shape == (2, 3, 32, 32)


def test_huge_and_broken_photographs(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    assert retclip.open_photograph(file.getvalue(), "x").size == (40, 30)
    monkeypatch.setattr(retclip, "MAX_PIXELS", 1000)
    with pytest.raises(common.UserError, match="x: 40 x 30 pixels"):
        retclip.open_photograph(file.getvalue(), "x")
    monkeypatch.undo()
    for data in (b"", b"GIF89a", file.getvalue()[:60]):
        with pytest.raises(common.UserError, match="not a readable image"):
            retclip.resized(retclip.open_photograph(data, "x"), 16)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_modes_of_photographs(mode):
    grey = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    found = retclip.resized(image, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    if mode != "1":
        expected = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
        assert abs(found.mean(2) - expected).max() < 12


# ---- texts


def test_context_length_truncation_and_unknown_words_are_said(tiny_fundus):
    data = dataset(tiny_fundus, "--context-length", 8)
    assert len(data[0, 0]["input_ids"]) == 8 and data[0, 0]["input_ids"][-1] == 3  # [SEP]
    assert "100.0 % of the reports are cut at 8 tokens (median " in data.notes()
    data = dataset(tiny_fundus)
    assert "0.0 % of the reports are cut at 100 tokens" in data.notes()
    assert "; 17 different reports of 18" in data.notes()
    assert ", 0.8 % of their words are unknown" in data.notes()  # three commas


def test_same_text():
    same = retclip.same_texts
    ids = [[2, 5, 6, 7, 3], [2, 5, 6, 7, 3], [2, 7, 6, 5, 3], [2, 5, 6, 8, 3], [2, 9, 3]]
    assert same(ids, 0).tolist() == [0, 1, 2, 3, 4]
    assert len(set(same(ids, 1.0).tolist())) == 4 and same(ids, 1.0)[0] == same(ids, 1.0)[1]
    near = same(ids, 2 / 6)  # (2,5) (5,6) of six pairs of neighbours; the same words in another order are not near
    assert near[0] == near[1] == near[3] != near[2] and len(set(near.tolist())) == 3
    rng = np.random.default_rng(0)
    ids = [list(rng.integers(0, 6, 8)) for _ in range(40)]
    pairs = [set(zip(x, x[1:], strict=False)) for x in ids]
    found = same(ids, 0.5, chunk=7)
    group = list(range(40))  # the slow way: join what is near until nothing changes
    for _ in range(40):
        for i in range(40):
            for j in range(40):
                if len(pairs[i] & pairs[j]) >= 0.5 * len(pairs[i] | pairs[j]):
                    group[i] = group[j] = min(group[i], group[j])
    assert all((found[i] == found[j]) == (group[i] == group[j]) for i in range(40) for j in range(40))


def test_same_text_of_a_data_set(tiny_fundus):
    ids = [int(dataset(tiny_fundus)[0, i]["text_id"]) for i in range(18)]
    texts = [dataset(tiny_fundus).texts[j] for j in dataset(tiny_fundus).pairs[:, 1]]
    assert all((ids[i] == ids[j]) == (texts[i] == texts[j]) for i in range(18) for j in range(18))
    assert len({int(dataset(tiny_fundus, "--same-text", 0)[0, i]["text_id"]) for i in range(18)}) == 18
    assert len({int(dataset(tiny_fundus, "--same-text", 0.3)[0, i]["text_id"]) for i in range(18)}) < len(set(ids))


def test_templates(tiny_fundus, tmp_path):
    (tmp_path / "t.txt").write_text("# prompts\nboth eyes {}\n\ncase {} .\n")
    assert args_of(tiny_fundus, "--templates", tmp_path / "t.txt").templates == ["both eyes {}", "case {} ."]
    assert args_of(tiny_fundus).templates == retclip.TEMPLATES
    (tmp_path / "t.txt").write_text("both eyes\n")
    with pytest.raises(common.UserError, match="a prompt with {} for the class on each line"):
        args_of(tiny_fundus, "--templates", tmp_path / "t.txt")


# ---- augmentation


def photograph(size=120):
    y, x = np.mgrid[:size, :size] / size
    return Image.fromarray((255 * np.stack([x, y, 1 - x], 2)).astype(np.uint8))


def normalised(image, colour):
    return np.einsum("ij,hwj->hwi", colour[:, :3], image.astype(float)) + colour[:, 3]


def test_augmentation_is_a_function_of_seed_epoch_and_index(tiny_fundus):
    data, other = dataset(tiny_fundus), dataset(tiny_fundus, "--seed", 4)
    keys = ("images", "colour")
    assert all(torch.equal(data[3, 5][k], data[3, 5][k]) for k in keys)
    assert not torch.equal(data[3, 5]["colour"], data[4, 5]["colour"])
    assert not torch.equal(data[3, 5]["colour"], other[3, 5]["colour"])
    plain = dataset(tiny_fundus, "--no-augment")
    assert torch.equal(plain[3, 5]["images"], plain[4, 5]["images"])
    assert torch.equal(plain[3, 5]["images"], plain.load(5)[0])


def test_colours_are_those_of_three_steps():
    """One affine map is brightness, contrast, saturation (torchvision's definitions) and normalisation in a row."""
    seen = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, colour = retclip.augmented(photograph(), 32, rng)
        rng = np.random.default_rng(seed)
        for _ in range(10):
            area, ratio = 120**2 * rng.uniform(0.9, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            if max(area * ratio, area / ratio) <= 120**2:
                break
        rng.uniform(), rng.uniform()
        brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
        if rng.random() < 0.1:  # erased
            continue
        x = image / 255 * brightness
        x = contrast * x + (1 - contrast) * (x @ retclip.GREY).mean()
        x = saturation * x + (1 - saturation) * (x @ retclip.GREY)[..., None]
        expected = (x - retclip.MEAN) / retclip.STD
        seen.append(abs(normalised(image, colour) - expected).max())
    assert len(seen) > 20 and max(seen) < 1e-4


def test_nothing_is_mirrored_by_accident():
    """Red grows to the right and blue to the left in every view."""
    for seed in range(30):
        image, _ = retclip.augmented(photograph(), 32, np.random.default_rng(seed))
        assert image[:, -4:, 0].mean() > image[:, :4, 0].mean() + 40


def test_erased_parts_have_the_mean_colour():
    shares = []
    for seed in range(200):
        image = retclip.erased(np.full((64, 64, 3), 200, np.uint8), np.random.default_rng(seed))
        hit = (image != 200).any(2)
        shares.append(hit.mean())
        assert abs(normalised(image, retclip.plain_colour())[hit]).max() < 0.01
    assert 0.01 < min(shares) and max(shares) < 0.36


def test_large_jpegs_are_decoded_small():
    """With draft mode the views look alike: no worse than half a step of the grid."""
    file = io.BytesIO()
    photograph(1600).save(file, "JPEG", quality=95)
    image = retclip.open_photograph(file.getvalue(), "x")
    found, _ = retclip.augmented(image, 64, np.random.default_rng(3))
    whole, _ = retclip.augmented(photograph(1600), 64, np.random.default_rng(3))
    assert image.size == (200, 200) and abs(found.astype(int) - whole).mean() < 3


def test_flip_mirrors_sides_and_words(tiny_fundus):
    data, plain = dataset(tiny_fundus, "--flip", "--no-augment"), dataset(tiny_fundus, "--no-augment")
    mirrored = 0
    for i in range(18):
        one, other = data[0, i], plain[0, i]
        if torch.equal(one["images"], other["images"]):
            assert torch.equal(one["input_ids"], other["input_ids"])
            continue
        mirrored += 1
        assert torch.equal(one["images"][0], other["images"][1].flip(-1))
        words = data.tokenizer.decode(one["input_ids"].tolist())
        assert words == data.tokenizer.decode(
            data.tokenizer.encode(retclip.mirrored_text(data.texts[data.pairs[i, 1]])).ids
        )
        assert words != data.tokenizer.decode(other["input_ids"].tolist()) and one["text_id"] != other["text_id"]
    assert 3 < mirrored < 15
    assert retclip.mirrored_text("Left eye: a. RIGHT eye, OD, 左眼") == "right eye: a. left eye, os, 右眼"
    assert retclip.mirrored_text("bright, leftover") == "bright, leftover"


# ---- evaluation


def test_every_rank_count_gives_the_same_digits(tiny_fundus, tmp_path, monkeypatch):
    """predict on 1 and on 3 pretended ranks."""
    args = args_of(tiny_fundus, "--eval-batch-size", 2)
    args.monocular = False
    data = retclip.FundusPairs(tiny_fundus / "val", args, False)
    model = retclip.build_model(args, lambda text: None).eval()
    with common.process_group("cpu") as ctx:
        whole = retclip.predict(model, data, ctx)
        parts, gathered = [], common.gather_rows
        for rank in range(3):
            rows, pretended = [], dataclasses.replace(ctx, rank=rank, world=3)
            note = lambda r, i, _, rows=rows: rows.append((r, i)) or torch.zeros(int(i.max()) + 9, *r.shape[1:])  # noqa: E731
            monkeypatch.setattr(common, "gather_rows", note)
            try:
                retclip.predict(model, data, pretended)
            except (RuntimeError, ValueError, IndexError):
                pass
            parts.append(rows)
    monkeypatch.setattr(common, "gather_rows", gathered)
    assert sorted(whole) == sorted(
        ["ids", "groups", "classes", "eye_labels", "targets", "probs", "failed", "image_features", "eye_features",
         "text_ids", "texts", "text_features", "pairs", "logit_scale"]
    )  # fmt: skip
    assert np.isnan(whole["image_features"]["right"][1]).all() and np.isfinite(whole["image_features"]["patient"]).all()
    index = torch.cat([p[-1][1] for p in parts])
    rows = torch.cat([p[-1][0] for p in parts])[:, :-1].unflatten(1, (len(retclip.LEVELS) + 2, -1))  # and both eyes
    for level, x in enumerate(retclip.LEVELS):
        found = torch.zeros(9, rows.shape[2])
        found[index] = rows[:, level]
        np.testing.assert_array_equal(found.numpy(), whole["image_features"][x])


def test_metrics_against_a_slow_formula(tiny_fundus):
    args = args_of(tiny_fundus, "--eval-batch-size", 5, "--level-weights", 1, 0.5, 2)
    args.monocular = False
    data = retclip.FundusPairs(tiny_fundus / "val", args, False)
    model = retclip.build_model(args, lambda text: None).eval()
    with common.process_group("cpu") as ctx:
        out = retclip.predict(model, data, ctx)
    rng = np.random.default_rng(1)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    for group in (out["image_features"], out["text_features"]):
        for level, x in group.items():
            group[level] = np.where(np.isnan(x), np.nan, unit(rng.normal(size=x.shape)))
    metrics = retclip.metrics_of(out, data)
    image, text = out["image_features"]["left"], out["text_features"]["left"]
    hits = 0
    for i in range(9):
        order = np.argsort(-image[i] @ text.T)
        hits += any((i, j) in set(map(tuple, data.pairs)) for j in order[:5])
    assert abs(metrics["left_i2t_recall_at_5"] - hits / 9) < 1e-9
    score, loss = out["image_features"]["patient"] @ out["text_features"]["patient"].T, 0.0
    ranks = [1 + (score[:, j] > score[i, j]).sum() for i, j in data.pairs]
    expected = np.mean([np.array(ranks) <= k for k in (1, 5, 10)])
    found = np.mean([metrics[f"patient_t2i_recall_at_{k}"] for k in (1, 5, 10)])
    assert abs(found - expected) < 1e-9
    halves = [metrics[f"patient_{w}_recall_at_{k}"] for w in ("i2t", "t2i") for k in (1, 5, 10)]
    assert abs(metrics["mean_recall"] - np.mean(halves)) < 1e-12
    classes = np.array(data.classes["patient"])
    of_text = np.array([classes[data.pairs[data.pairs[:, 1] == j, 0][0]] for j in range(10)])
    best = [of_text[np.argmax(score[i])] == classes[i] for i in range(9)]
    assert abs(metrics["class_recall_at_1"] - np.mean(best)) < 1e-9
    for level, weight in zip(retclip.LEVELS, (1, 0.5, 2), strict=True):
        x, y = (torch.from_numpy(out[k][level]).double() for k in ("image_features", "text_features"))
        for some in np.array_split(data.pairs, 2):
            seen = [k for k, (i, _) in enumerate(some) if x[i].isfinite().all()]
            logits = out["logit_scale"][level] * x[some[seen, 0]] @ y[some[seen, 1]].T
            match = torch.arange(len(seen))
            value = torch.nn.functional.cross_entropy
            loss += weight * float(value(logits, match) + value(logits.T, match)) / 2 * len(some) / len(data.pairs)
    assert abs(metrics["val_loss"] - loss) < 1e-6


def test_zero_shot_probabilities(tiny_fundus):
    args = args_of(tiny_fundus)
    args.monocular, args.templates = False, ["both eyes {}", "left {} right {}"]
    data = retclip.FundusPairs(tiny_fundus / "val", args, False)
    model = retclip.build_model(args, lambda text: None).eval()
    with common.process_group("cpu") as ctx, torch.no_grad():
        out = retclip.predict(model, data, ctx)
        prompts = []
        for name in data.class_names:
            found = []
            for template in args.templates:
                ids = torch.tensor(data.tokenizer.encode(template.replace("{}", name)).ids)[None]
                x = model.encode_text(ids, torch.ones_like(ids))["patient"][0]
                found.append(x / x.norm())
            x = torch.stack(found).mean(0)
            prompts.append(x / x.norm())
    logits = model.logit_scale.exp() * torch.from_numpy(out["image_features"]["patient"]) @ torch.stack(prompts).T
    np.testing.assert_allclose(out["probs"], logits.softmax(1).detach(), atol=1e-5)


def test_without_labels(tiny_fundus, tmp_path):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "labels.csv").unlink()
    data = dataset(tmp_path / "data", split="val", train=False)
    assert data.class_names == [] and data.targets.shape == (9, 0) and data.groups == data.ids
    words = fundus_args(tmp_path / "data", tmp_path / "out", "--epochs", 1)
    assert common.run_main(lambda: retclip.main([str(w) for w in words[1:]])) == 0
    record = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert record["class_map"] is None and record["mean_recall"] > 0
    words += ["--monitor", "class_map", "--overwrite"]
    with pytest.raises(common.UserError, match="no labels, so --monitor class_map is undefined"):
        retclip.main([str(w) for w in words[1:]])


def test_labels_of_a_table(tiny_fundus, tmp_path):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    table = pd.DataFrame({"image_id": ["P16", "P18", "P20"], "label": ["x", "x / y", ""]})
    table.to_csv(tmp_path / "data/val/labels.csv", index=False)
    data = dataset(tmp_path / "data", split="val", train=False)
    assert data.class_names == ["x", "y"] and np.isnan(data.targets[[1, 3, 4]]).all()
    assert data.targets[[0, 2]].tolist() == [[1, 0], [1, 1]]


def test_an_id_may_stand_for_two_texts(tiny_fundus, tmp_path):
    """In an LMDB each pair has its own text; all of them may have the same id."""
    shutil.copytree(tiny_fundus, tmp_path / "data")
    path = tmp_path / "data/train_texts.jsonl"
    rows = [json.loads(x) | {"text_id": 0} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data, plain = (dataset(f, split="train_imgs.tsv") for f in (tmp_path / "data", tiny_fundus))
    told = lambda d: [(d.image_ids[i], d.texts[j]) for i, j in d.pairs]  # noqa: E731
    assert told(data) == told(plain) and set(data.text_ids) == {0}


def test_postscript_is_not_handed_to_a_program(tiny_fundus, tmp_path, monkeypatch):
    """Pillow would give an EPS file to Ghostscript, which runs it."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(common.UserError, match="not a readable image"):
        retclip.resized(retclip.open_photograph(eps, "x"), 16)
    assert not (tmp_path / "ran").exists()


def test_a_byte_order_mark_and_foreign_labels(tiny_fundus, tmp_path):
    shutil.copytree(tiny_fundus, tmp_path / "data")
    for name in ("train_imgs.tsv", "train_texts.jsonl"):
        path = tmp_path / "data" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert dataset(tmp_path / "data", split="train_imgs.tsv").ids[0] == "P0"
    pd.DataFrame({"image_id": ["x"], "label": ["y"]}).to_csv(tmp_path / "data/train_labels.csv", index=False)
    with pytest.raises(common.UserError, match="has none of the images, the first of which is P0"):
        dataset(tmp_path / "data", split="train_imgs.tsv")


def test_training_and_evaluation_count_alike(tiny_fundus, tmp_path):
    """metrics_of has the recall and MAP of evaluate.py's results, here with a report of no class among them."""
    import retrieval

    args = args_of(tiny_fundus)
    args.monocular = False
    data = retclip.FundusPairs(tiny_fundus / "val", args, False)
    data.classes["patient"][4] = ""
    model = retclip.build_model(args, lambda text: None).eval()
    with common.process_group("cpu") as ctx:
        out = retclip.predict(model, data, ctx)
    metrics = retclip.metrics_of(out, data)
    found = retrieval.pair_retrieval(out, out["ids"], 0, 0)
    for level in retclip.LEVELS:
        for way, name in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
            for k in (1, 5):
                assert metrics[f"{level}_{way}_recall_at_{k}"] == pytest.approx(found[name][level][f"recall@{k}"])
    patient = found["image_to_text"]["patient"]
    assert metrics["class_map"] == pytest.approx(patient["class_map"])
    assert metrics["class_recall_at_1"] == pytest.approx(patient["class_recall@1"])
