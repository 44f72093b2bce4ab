"""evaluate.py on RET-CLIP: retrieval of pairs and texts, zero-shot classes, linear probe of eyes, the gallery."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

import cases
import common
import evaluate
import report
import retrieval

KINDS = ["<i>DR</i>", "glaucoma", "healthy"]
LEVELS = ("patient", "left", "right")
# What evaluate.py asks of train_retclip.py, with features that are drawn instead of computed: those of a text depend on
# its words and the class they name, those of an eye on its class, the patient's texts and its id; with `noise` on that
# alone.
SCRIPT = """
import argparse, json, zlib
from pathlib import Path
import numpy as np
from PIL import Image
import common

TASK = "retclip"


def build_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train-data", type=Path)
    parser.add_argument("--valid-data", "--val-data", type=Path)
    parser.add_argument("--templates", type=Path)
    parser.add_argument("--split")
    for name in ("batch-size", "num-workers"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--config")
    return parser


def args_from_checkpoint(saved, **overrides):
    args = argparse.Namespace(**saved["args"])
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    args.train_data, args.valid_data = Path(args.train_data), Path(args.valid_data)
    if not isinstance(args.templates, list):
        args.templates = Path(args.templates).read_text().splitlines()
    return args


def data_file(args, split=None):
    return (args.train_data if (split or args.split) == "train" else args.valid_data) / "cases.json"


class Pairs:
    def __init__(self, args):
        self.args, self.file = args, data_file(args)
        self.table = json.loads(self.file.read_text())
        self.ids = [row["id"] for row in self.table["images"]]
        self.class_names = sorted({row["class"] for row in self.table["images"]} - {""})
        self.source, self.has_patients = self.file.parent, True

    def __len__(self):
        return len(self.ids)

    def load(self, index):
        if self.table["images"][index].get("bad"):
            raise common.UserError(f"{self.file}: image {self.ids[index]}: cut off")

    def pictures(self, index):
        self.load(index)
        row = self.table["images"][index]
        eyes = [Image.new("RGB", (400, 300), (60 * e + 90, index % 200, 40)) for e in range(len(row["eyes"]))]
        return [None if side in row.get("missing", []) else eye for side, eye in zip(("left", "right"), eyes)]


def build_eval_dataset(args):
    return Pairs(args)


def build_eval_model(saved, args, device):
    return None


def unit(x):
    return (x / np.linalg.norm(x)).astype(np.float32)


def draw(words, size=8):
    return np.random.default_rng(zlib.crc32(words.encode())).normal(size=size)


def of_class(name):
    return draw(name) if name else np.zeros(8)


def predict(model, dataset, ctx, say=None):
    table, names = dataset.table, dataset.class_names
    images, texts = table["images"], table["texts"]
    sides = ("left", "right") if len(images[0]["eyes"]) == 2 else ("",)
    levels = ("patient", "left", "right") if len(sides) == 2 else ("patient",)
    n, m = len(images), len(texts)
    pairs = [(dataset.ids.index(name), j) for j, text in enumerate(texts) for name in text["images"]]
    features = {level: np.full((n, 16), np.nan, np.float32) for level in levels}
    eyes, classes = np.full((n, len(sides), 8), np.nan, np.float32), {level: [""] * n for level in levels}
    for i, row in enumerate(images):
        classes["patient"][i] = row["class"]
        said = " ".join(sorted(texts[j]["text"].lower() for k, j in pairs if k == i)).split()
        for e, side in enumerate(sides):
            if side:
                classes[side][i] = row["eyes"][e] or row["class"]
            if side in row.get("missing", []) or row.get("bad"):
                continue
            eyes[i, e] = 1.5 * of_class(row["eyes"][e]) + draw(f"{row['id']}{side}")
            if side:
                vague = 0 if row.get("noise") else 1
                own = [vague * of_class(classes[side][i]), vague * draw(" ".join(said))]
                features[side][i] = unit(np.concatenate(own) + 0.8 * draw(row["id"] + side, 16))
        if not row.get("bad") and not row.get("missing"):
            vague = 0 if row.get("noise") else 1
            own = [vague * of_class(row["class"]), vague * draw(" ".join(said))]
            features["patient"][i] = unit(np.concatenate(own) + 0.8 * draw(row["id"], 16))
    kind = lambda words: next((c for c in names if c in words), "")
    words = [" ".join(text["text"].lower().split()) for text in texts]
    told = {level: np.stack([unit(np.concatenate([of_class(kind(t["text"])), draw(w)]) + 0.1 * draw(level, 16))
                             for t, w in zip(texts, words)]) for level in levels}
    prompts = np.stack([np.concatenate([of_class(c), np.zeros(8)]) for c in names]) if names else np.zeros((0, 16))
    logits = len(dataset.args.templates) * features["patient"] @ prompts.T
    probs = np.exp(logits - logits.max(1, keepdims=True, initial=-9))
    return {
        "ids": dataset.ids, "groups": [row["patient"] for row in images], "classes": classes,
        "eye_labels": [list(row["eyes"]) for row in images],
        "targets": np.array([[float(row["class"] == c) if row["class"] else np.nan for c in names] for row in images]
                            ).reshape(n, len(names)),
        "probs": probs / probs.sum(1, keepdims=True) if names else probs,
        "failed": [i for i, r in enumerate(images) if r.get("bad")],
        "image_features": features, "eye_features": eyes, "text_ids": [text["id"] for text in texts],
        "texts": [text["text"] for text in texts], "text_features": told, "pairs": np.array(pairs, np.int64),
        "logit_scale": dict.fromkeys(levels, 14.0),
    }
"""


def make_data(folder, n, seed, name="p", labels=True, eyes=2, own_texts=True):
    """n pairs; every third patient has two; most texts are one image's, one three images', some come twice."""
    rng, images, texts = np.random.default_rng(seed), [], []
    for i in range(n):
        kind = KINDS[rng.choice(3, p=[0.3, 0.3, 0.4])] if labels else ""
        other = KINDS[rng.integers(3)] if rng.random() < 0.2 and labels else kind
        patient = f"{name}{i - (i % 3 == 1):03d}"
        images.append({"id": f"{name}_{i:03d}", "patient": patient, "class": kind, "eyes": [kind, other][:eyes]})
        named = f" {kind}" if labels else ""
        text = f"Report {rng.integers(n // 2)}:{named}" if own_texts else f"Both eyes:{named}"
        texts.append(
            {
                "id": 1000 - i,
                "text": text if i % 2 else f" {text.upper().replace('DR', 'dr')}  ",
                "images": [f"{name}_{i:03d}"],
            }
        )
    for row in texts:  # the class stays as it is written
        for kind in KINDS:
            row["text"] = re.sub(re.escape(kind), kind, row["text"], flags=re.I)
    if own_texts:
        texts[5]["images"] += [f"{name}_002", f"{name}_009"]
        texts.append({"id": 1, "text": "nobody's", "images": []})
        texts.append({"id": 2, "text": "  ", "images": [f"{name}_000"]})
        texts.append({"id": 3, "text": "a second <b>text</b>", "images": [f"{name}_003"]})
        if labels:
            images[7]["class"] = ""
            images[7]["eyes"] = ["", KINDS[0]][:eyes]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps({"images": images, "texts": texts}))
    return folder


def edit(folder, to, change):
    table = json.loads((folder / "cases.json").read_text())
    change(table["images"], table["texts"])
    to.mkdir(parents=True, exist_ok=True)
    (to / "cases.json").write_text(json.dumps(table))
    return to


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "fake_retclip.py").write_text(SCRIPT)
    make_data(folder / "lmdb" / "train", 120, 0, "train")
    make_data(folder / "lmdb" / "val", 60, 1, "val")
    make_data(folder / "lmdb" / "test", 45, 2, "test")
    make_data(folder / "few", 45, 3, "few", own_texts=False)
    make_data(folder / "mute", 30, 4, "mute", labels=False)
    make_data(folder / "one_eye" / "train", 60, 5, "tr", eyes=1)
    make_data(folder / "one_eye" / "test", 40, 6, "te", eyes=1)
    args = {"train_data": str(folder / "lmdb" / "train"), "valid_data": str(folder / "lmdb" / "val"), "split": "valid"}
    args |= {"templates": ["{}"], "batch_size": 4, "num_workers": 0, "label_columns": ["of", "another"]}
    saved = {"task": "retclip", "args": args, "model": {"w": torch.zeros(1)}, "versions": {}, "thresholds": None}
    common.save_checkpoint(folder / "model.pt", saved | {"class_names": []})
    return folder


@pytest.fixture
def score(world, tmp_path, monkeypatch):
    """score(words) -> evaluation_results.json of model.pt on lmdb/test; the page is drawn with page=True."""
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.setitem(cases.TASKS, "retclip", "fake_retclip")

    def call(*words, code=0, page=False, data="lmdb/test", out=tmp_path):
        monkeypatch.setattr(evaluate, "write_report", report.write_report if page else lambda *args: None)
        monkeypatch.setattr(evaluate, "draw", lambda *args: None)  # there is no network
        command = ["--test-only", world / "model.pt", "--output", out, "--device", "cpu", "--n-bootstrap", 50]
        command += ["--val-data", world / data] if data else []
        assert common.run_main(lambda: evaluate.main([str(w) for w in [*command, *words]])) == code
        return json.loads((out / "evaluation_results.json").read_text()) if code in (0, 3) else None

    return call


@pytest.fixture
def predicted(world, monkeypatch):
    """predicted(data) -> what the stand-in predicts of it."""
    monkeypatch.syspath_prepend(str(world))
    import fake_retclip

    def call(data):
        args = fake_retclip.args_from_checkpoint(common.load_checkpoint(world / "model.pt"), valid_data=world / data)
        dataset = fake_retclip.Pairs(args)
        return fake_retclip.predict(None, dataset, None)

    return call


def numbers(results):
    return {k: v for k, v in results.items() if k not in ("provenance", "notes", "evaluated", "evaluated_on")}


# ---- retrieval


def slow_truth(out):
    """By loops: the words of each text, those of each image's texts, and (words, level) -> their class."""
    same = [" ".join(t.lower().split()) for t in out["texts"]]
    texts_of = [{same[j] for i, j in out["pairs"] if i == row} - {""} for row in range(len(out["ids"]))]

    def class_of(words, level):
        kinds = {out["classes"][level][i] for i in range(len(texts_of)) if words in texts_of[i]}
        return kinds.pop() if len(kinds) == 1 else ""

    return same, texts_of, class_of


def slow_direction(out, level, direction):
    """{metric: mean}, counts too, of one direction, by sorting for each query. No equal scores."""
    same, texts_of, class_of = slow_truth(out)
    image, text, kinds = out["image_features"][level], out["text_features"][level], out["classes"][level]
    first = {words: j for j, words in reversed(list(enumerate(same))) if words}
    read = [i for i in range(len(image)) if np.isfinite(image[i]).all()]
    if direction == "image_to_text":
        queries = [(image[i], texts_of[i], kinds[i]) for i in read]
        items = [(text[j], words, class_of(words, level)) for words, j in first.items()]
        right = lambda q, g: g[1] in q[1]  # noqa: E731
    else:
        asked = [j for j in range(len(text)) if same[j] and any(k == j for _, k in out["pairs"])]
        queries = [(text[j], same[j], class_of(same[j], level)) for j in asked]
        items = [(image[i], texts_of[i], kinds[i]) for i in read]
        right = lambda q, g: q[1] in g[1]  # noqa: E731
    rows = {}

    def ask(prefix, queries, items, right):
        ranks, precisions = [], []
        for q in queries:
            order = sorted(items, key=lambda g: -float(np.float64(q[0]) @ np.float64(g[0])))
            hits = [right(q, g) for g in order]
            if any(hits):
                ranks.append(1 + hits.index(True))
                places = [k for k, hit in enumerate(hits, 1) if hit]
                precisions.append(np.mean([(n + 1) / k for n, k in enumerate(places)]))
        ranks = np.array(ranks)
        rows.update({f"{prefix}n": len(ranks), f"{prefix}n_gallery": len(items)})
        rows.update({f"{prefix}recall@{k}": (ranks <= k).mean() for k in (1, 5, 10) if k < len(items)})
        return ranks, precisions

    ranks, _ = ask("", queries, items, right)
    rows["median_rank"], rows["mean_recall"] = np.median(ranks), np.mean([rows[f"recall@{k}"] for k in (1, 5, 10)])
    known = [q for q in queries if q[2]], [g for g in items if g[2]]
    rows["class_map"] = np.mean(ask("class_", *known, lambda q, g: q[2] == g[2])[1])
    return rows


def damage(images, texts):
    """An unreadable image, and a missing left eye."""
    images[4]["bad"], images[11]["missing"] = True, ["left"]


def test_numbers_are_those_of_slow_loops(world, predicted):
    edit(world / "lmdb" / "test", world / "damaged", damage)
    out = predicted("damaged")
    found = retrieval.pair_retrieval(out, out["ids"], 0, 0)
    assert [*found] == ["image_to_text", "text_to_image"]
    for direction, heads in found.items():
        assert tuple(heads) == LEVELS
        for level, row in heads.items():
            expected = slow_direction(out, level, direction)
            assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-9), (direction, level)
            assert row["recall@1"] > row["recall@1_chance"] and row["class_map"] > row["class_map_chance"]
            assert not any(k.endswith("_low") for k in row)
    assert found["image_to_text"]["patient"]["n"] == 43 and found["image_to_text"]["right"]["n"] == 44
    row = found["text_to_image"]["patient"]
    assert row["distinct_texts"] == found["image_to_text"]["patient"]["n_gallery"] < row["n"]
    for name, part in row["per_class"].items():
        assert part["n"] <= part["class_n"] + 2 and part["class_recall@1_chance"] < 0.6, name
    mean = np.average(
        [p["class_map"] for p in row["per_class"].values()], weights=[p["class_n"] for p in row["per_class"].values()]
    )
    assert (
        mean == pytest.approx(row["class_map"])
        and sum(p["class_n"] for p in row["per_class"].values()) == row["class_n"]
    )


def test_features_that_are_all_the_same_get_the_chance_level(predicted):
    """With many right answers to some queries, duplicates and unknown classes: value = chance, to the last digits."""
    out = predicted("lmdb/test")
    for features in (out["image_features"], out["text_features"]):
        for level in features:
            features[level] = np.ones_like(features[level]) / 4
    for heads in retrieval.pair_retrieval(out, out["ids"], 20, 0).values():
        for row in [r for head in heads.values() for r in (head, *head["per_class"].values())]:
            names = [k.removesuffix("_chance") for k in row if k.endswith("_chance")]
            assert {"recall@1", "mean_recall", "class_recall@10", "class_map"} <= {*names}
            for name in [n for n in names if n != "median_rank"]:
                assert row[name] == pytest.approx(row[f"{name}_chance"], abs=1e-12), name


def test_fixed_order(predicted):
    """What always the same answers find, the most often right first: by loops over the queries."""
    out = predicted("few")  # three texts, one for each class
    row = retrieval.pair_retrieval(out, out["ids"], 20, 0)
    counts = np.sort(np.unique(out["classes"]["patient"], return_counts=True)[1])[::-1]
    one, back = row["image_to_text"]["patient"], row["text_to_image"]["patient"]
    assert one["recall@1_fixed"] == one["class_recall@1_fixed"] == counts[0] / 45 and one["median_rank_fixed"] == 2
    assert one["class_map_fixed"] == pytest.approx(counts @ [1, 1 / 2, 1 / 3] / 45)
    assert back["recall@10_fixed"] == counts[0] / 45 and counts[0] >= 10
    starts = np.cumsum([0, *counts])
    precisions = [
        np.mean((np.arange(n) + 1) / np.arange(start + 1, start + n + 1))
        for start, n in zip(starts, counts, strict=False)
    ]
    assert back["class_map_fixed"] == pytest.approx(counts @ precisions / 45)
    for part, n in zip(sorted(one["per_class"].values(), key=lambda part: -part["n"]), (1, 1 / 2, 1 / 3), strict=True):
        assert part["class_map_fixed"] == pytest.approx(n)
    out["image_features"]["patient"][:] = out["image_features"]["patient"][0]  # a model that does not look
    found = retrieval.pair_retrieval(out, out["ids"], 0, 0)["image_to_text"]["patient"]
    assert found["recall@1"] <= found["recall@1_fixed"] and found["class_map"] <= found["class_map_fixed"] + 1e-12


def test_features_without_meaning_are_at_chance(world, predicted):
    """Few distinct texts, each of many images: copies in the gallery would put the MAP of chance far above its name."""
    edit(world / "few", world / "noise", lambda images, texts: [row.update(noise=True) for row in images])
    out, values = predicted("noise"), []
    for seed in range(60):  # other features each time
        rng = np.random.default_rng(seed)
        for level in LEVELS:
            words = rng.normal(size=(3, 16))
            index = [next(k for k, kind in enumerate(KINDS) if kind in t) for t in out["texts"]]
            out["text_features"][level] = np.stack([words[k] / np.linalg.norm(words[k]) for k in index])
            x = rng.normal(size=(45, 16))
            out["image_features"][level] = x / np.linalg.norm(x, axis=1, keepdims=True)
        rows = retrieval.pair_retrieval(out, out["ids"], 0, 0)
        values += [[heads[level][k] - heads[level][f"{k}_chance"] for k in ("recall@1", "class_map")]
                   for heads in rows.values() for level in LEVELS[:2]]  # fmt: skip
    values = np.array(values).reshape(60, 4, 2).mean(0)
    assert rows["image_to_text"]["left"]["n_gallery"] == 3 and abs(values).max() < 0.07, values


def test_order_and_other_images_change_nothing(world, predicted):
    """Shuffled rows give the same digits; the images of other ids, and their texts, are not there."""

    def shuffle(images, texts):
        rng = np.random.default_rng(0)
        rng.shuffle(images), rng.shuffle(texts)

    out, other = predicted("lmdb/test"), None
    edit(world / "lmdb" / "test", world / "shuffled", shuffle)
    other = predicted("shuffled")
    assert other["ids"] != out["ids"]
    assert retrieval.pair_retrieval(out, out["ids"], 30, 0) == retrieval.pair_retrieval(other, out["ids"], 30, 0)
    some = out["ids"][:20]
    found = retrieval.pair_retrieval(out, some, 0, 0)
    row = found["text_to_image"]["patient"]
    assert row["n_gallery"] == 20 and row["n"] == 21  # the own 20 and one that is a second
    assert found["image_to_text"]["patient"]["n"] == 20


def test_a_text_of_several_patients_weighs_their_mean(predicted):
    """The bootstrap by hand."""
    out = predicted("lmdb/test")
    row = retrieval.pair_retrieval(out, out["ids"], 200, 7)["text_to_image"]["patient"]
    same, texts_of, _ = slow_truth(out)
    images = out["image_features"]["patient"].astype(float)
    hits, owners = [], []
    for j in sorted(range(len(same)), key=lambda j: str(out["text_ids"][j])):
        own = sorted({out["groups"][i] for i, k in out["pairs"] if k == j})
        if own and same[j]:
            best = np.argmax(images @ out["text_features"]["patient"][j].astype(float))
            hits.append(same[j] in texts_of[best]), owners.append(own)
    assert max(map(len, owners)) == 3
    names = sorted({name for own in owners for name in own})
    drawn = np.random.default_rng(7).integers(len(names), size=(200, len(names)))
    values = []
    for sample in drawn:
        times = [sum(names[k] == name for k in sample) for name in names]
        weights = [np.mean([times[names.index(name)] for name in own]) for own in owners]
        values.append(np.average(hits, weights=weights))
    assert [row["recall@1_low"], row["recall@1_high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]))
    assert row["recall@1"] == pytest.approx(np.mean(hits))


def test_median_of_weights():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 8):
        values, weights = rng.integers(1, 9, n) / 2, rng.integers(0, 3, (n, 40)).astype(float)
        weights[0, weights.sum(0) == 0] = 1
        expected = [np.median(np.repeat(values, w.astype(int))) for w in weights.T]
        np.testing.assert_array_equal(retrieval._median(values, weights), expected)
        np.testing.assert_array_equal(retrieval._median(values, weights / 3), expected)


# ---- one evaluation, its files and its page


def test_files_and_numbers(score, world, tmp_path, capsys):
    """The document's command: names of files, classes by the highest probability, features by id."""
    results = score(page=True)
    assert {f.name for f in tmp_path.iterdir()} == {
        "evaluation_results.json", "predictions.csv", "labels.csv", "report.html", "test_imgs_features.pt",
        "test_texts_features.pt"}  # fmt: skip
    assert results["evaluated"] == "model.pt, zero-shot" and results["evaluated_on"] == "lmdb/test"
    assert results["thresholds_source"].startswith("none: the most probable class") and results["n"] == 45
    assert results["provenance"]["prompts"] == "{}" and results["notes"] == [] and results["n_patients"] == 30
    y, p = pd.read_csv(tmp_path / "labels.csv"), pd.read_csv(tmp_path / "predictions.csv")
    probs, flags = (p[[f"{name}_{end}" for name in KINDS]].to_numpy() for end in ("prob", "pred"))
    assert (flags == (probs == probs.max(1, keepdims=True))).all() and (flags.sum(1) == 1).all()
    known = y[KINDS].notna().all(axis=1).to_numpy()
    truth, said = y.loc[known, KINDS].to_numpy().argmax(1), probs[known].argmax(1)
    overall = results["overall"]
    assert overall["accuracy_n"] == known.sum() == 44
    assert overall["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert overall["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert overall["accuracy_majority"] == np.bincount(truth).max() / 44
    assert overall["accuracy_low"] < overall["accuracy"] < overall["accuracy_high"]
    for k, name in enumerate(KINDS):
        row = results["per_label"][name]
        assert row["threshold"] is None and row["flagged"] == flags[known, k].sum()
        assert row["auroc"] == pytest.approx(roc_auc_score(truth == k, probs[known, k]))
    said = capsys.readouterr().out
    assert "image to text, patient" in said and "class MAP" in said and "Results: " in said

    images, texts = (torch.load(tmp_path / f"test_{k}_features.pt", weights_only=True) for k in ("imgs", "texts"))
    assert images["ids"] == y["id"].tolist() and images["patient_ids"] == y["patient_id"].tolist()
    assert images["features"]["left"].shape == (45, 16) and images["eyes"].shape == (45, 2, 8)
    assert images["classes"]["patient"][7] == "" and set(images["features"]) == set(LEVELS)
    assert texts["ids"][0] == "1000" and len(texts["texts"]) == len(texts["features"]["right"]) == 48
    assert texts["image_ids"][5] == ["test_005", "test_002", "test_009"] and texts["image_ids"][45] == []
    score("--output", tmp_path / "x" / "numbers.json", "--no-bootstrap")
    assert (tmp_path / "x" / "numbers.json").exists() and (tmp_path / "x" / "test_imgs_features.pt").exists()
    text = (tmp_path / "x" / "numbers.json").read_text().split("provenance")[0]
    assert "_low" not in text.replace("auroc_delong_low", "")


def test_page(score, tmp_path):
    results = score(page=True)
    page = (tmp_path / "report.html").read_text()
    for text in ("<h2>Retrieval</h2>", "<h2>Retrieval gallery</h2>", "By class", "Top-1 accuracy", "✓ same report",
                 "○ same class", "✗ other class", "<small>fixed ", "left eye of te", "to text, right"):  # fmt: skip
        assert text in page, text
    assert page.count(': recall at K against chance">') == 6 and len(page) < 2e6
    asked = re.findall(r'<div class="ask (text|image)">', page)
    assert asked.count("text") == asked.count("image") == 6 and page.count("<li class=") == 60
    assert "<b>text" not in page and "<i>DR" not in page and "&lt;i&gt;DR&lt;/i&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(s.startswith(("data:image/svg+xml;base64,", "data:image/jpeg;base64,")) for s in sources)
    assert not re.search(r"https?:|@import|url\(|<link|<script|javascript:| on\w+=", page, re.I)
    row = results["retrieval"]["text_to_image"]["patient"]
    assert f"<td>{row['class_map']:.3f}<small>{row['class_map_low']:.3f}–{row['class_map_high']:.3f}</small>" in page
    files = ["--predictions", tmp_path / "predictions.csv", "--labels", tmp_path / "labels.csv"]
    words = ["--results", tmp_path / "evaluation_results.json", *files, "--out", tmp_path / "again.html"]
    assert report.main([str(w) for w in words]) == 0
    again = (tmp_path / "again.html").read_text()
    assert "made again from the results files" in again and "data:image/jpeg" not in again
    head = page[: page.index("<section><h2>Retrieval gallery")]
    assert again.startswith(head)
    assert common.run_main(lambda: report.main([str(w) for w in (*words[:2], *words[-2:])])) == 2


def test_gallery_shows_what_a_sort_finds(predicted, world, monkeypatch):
    """Queries evenly by id; answers in the order of the scores, marked by the truth; small pictures."""
    import fake_retclip

    edit(world / "lmdb" / "test", world / "damaged", damage)
    out = predicted("damaged")
    args = fake_retclip.args_from_checkpoint(common.load_checkpoint(world / "model.pt"), valid_data=world / "damaged")
    shown = retrieval.gallery(out, out["ids"], fake_retclip.Pairs(args).pictures)
    _, texts_of, class_of = slow_truth(out)
    image, text = out["image_features"]["patient"], out["text_features"]["patient"]
    rows, numbers_of = (
        {name: i for i, name in enumerate(out["ids"])},
        {str(t): j for j, t in enumerate(out["text_ids"])},
    )
    assert [one["kind"] for one in shown] == ["text"] * 6 + ["image"] * 6
    asked = [one["query"]["id"] for one in shown]
    assert asked[:6] == sorted(asked[:6]) and asked[6:] == sorted(asked[6:]) and asked[6] == "test_000"
    for one in shown:
        marks = set()
        for answer in one["answers"]:
            pair = [answer, one["query"]] if one["kind"] == "text" else [one["query"], answer]
            i, j = rows[pair[0]["id"]], numbers_of[pair[1]["id"]]
            words = " ".join(out["texts"][j].lower().split())
            kinds = out["classes"]["patient"][i], class_of(words, "patient")
            expected = "report" if words in texts_of[i] else "wrong" if "" in kinds else None
            expected = expected or ("class" if kinds[0] == kinds[1] else "other")
            assert answer["mark"] == expected and answer["score"] == pytest.approx(float(image[i] @ text[j]), abs=1e-6)
            marks.add(expected)
        scores = [answer["score"] for answer in one["answers"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == 5
        assert ("report" in marks) == (one["rank"] <= 5)
    drawn = [uri for one in shown for a in (one["query"], *one["answers"]) for uri in a["pictures"]]
    assert len(drawn) == 2 * (30 + 6) and all(len(uri) < 6000 for uri in drawn)
    assert retrieval.thumbnails(fake_retclip.Pairs(args).pictures, 4) == []
    assert retrieval.thumbnails(fake_retclip.Pairs(args).pictures, 11)[0] is None


def test_without_classes(score, world, tmp_path, capsys):
    """No table, no predictions, no class level; the page and its second making cope."""
    results = score("--no-bootstrap", data="mute", page=True)
    assert results["per_label"] == results["macro"] == results["micro"] == results["overall"] == {}
    assert not (tmp_path / "predictions.csv").exists() and not (tmp_path / "labels.csv").exists()
    row = results["retrieval"]["image_to_text"]["patient"]
    assert row["class_map"] is None and row["per_class"] is None and row["class_n"] == 0 and row["recall@1"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "no two classes" in page and "Numbers by label" not in page and "✗ another report" in page
    words = ["--results", str(tmp_path / "evaluation_results.json"), "--out", str(tmp_path / "again.html")]
    assert report.main(words) == 0 and "Retrieval gallery" in (tmp_path / "again.html").read_text()
    assert "no classes" in capsys.readouterr().out
    score("--linear-probe", "--train-data", world / "mute", data="mute", code=2)
    score("--threshold-part", "0.3", data="mute", code=2)
    assert [line.count("no two classes") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_few_texts(score, tmp_path, capsys):
    """K below the gallery alone; no mean over missing K; the reader is told."""
    results = score(data="few", page=True)
    row = results["retrieval"]["image_to_text"]["patient"]
    assert row["n_gallery"] == row["distinct_texts"] == 3 and "recall@5" not in row and row["mean_recall"] is None
    assert row["recall@1_chance"] == pytest.approx(1 / 3) and row["class_map_chance"] == pytest.approx(11 / 18)
    back = results["retrieval"]["text_to_image"]["patient"]
    assert back["n"] == 45 and back["recall@10"] > 0 and back["mean_recall_chance"] > back["recall@1_chance"]
    assert "only 3 distinct texts" in capsys.readouterr().err
    assert "only 3 distinct texts" in (tmp_path / "report.html").read_text()


def test_unreadable_and_missing(score, world, tmp_path, capsys):
    """Exit code 3, the case stays listed; a pair without an eye is in no number of both, and is named."""
    edit(world / "lmdb" / "test", world / "damaged", damage)
    results = score(data="damaged", code=3, page=True)
    assert [f["id"] for f in results["failed"]] == ["test_004"] and "cut off" in results["failed"][0]["reason"]
    assert (
        results["n"] == 45 and "1 pairs lack an eye, and are in no number that needs both: test_011" in results["notes"]
    )
    assert results["retrieval"]["image_to_text"]["patient"]["n"] == 43
    p = pd.read_csv(tmp_path / "predictions.csv")
    assert p[p[f"{KINDS[1]}_pred"].isna()]["id"].tolist() == ["test_004", "test_011"]
    assert "1 of 45 cases failed to load" in capsys.readouterr().err
    images = torch.load(tmp_path / "test_imgs_features.pt", weights_only=True)
    assert images["eyes"][11, 0].isnan().all() and images["eyes"][11, 1].isfinite().all()


# ---- flags


def test_thresholds_and_templates(score, world, tmp_path):
    plain, given = score(), score("--threshold", "0.4")
    row = given["per_label"][KINDS[1]]
    assert row["threshold"] == 0.4 and row["auroc"] == plain["per_label"][KINDS[1]]["auroc"]
    assert given["overall"]["accuracy"] == plain["overall"]["accuracy"]
    (tmp_path / "t.txt").write_text("{}\nan eye with {}\n")
    other = score("--templates", tmp_path / "t.txt")
    assert other["provenance"]["prompts"] == "{}; an eye with {}"
    assert other["per_label"][KINDS[1]]["brier"] != plain["per_label"][KINDS[1]]["brier"]
    part = score("--threshold-part", "0.3")
    kept = set(pd.read_csv(tmp_path / "labels.csv")["patient_id"])
    assert not kept & set(part["threshold_part"]["patients"]) and part["per_label"][KINDS[1]]["threshold"] > 0
    assert part["retrieval"]["text_to_image"]["patient"]["n_gallery"] == part["n"] < 45


def test_notes_on_the_data(score):
    assert "training chose its best epoch" in score(data=None)["notes"][0]
    assert "was trained on these cases" in score(data="lmdb/train")["notes"][0]
    assert "was trained on these cases" in score("--split", "train", data=None)["notes"][0]


def test_export_features(score, tmp_path):
    score("--export-features", tmp_path / "f.npz", "--retrieval")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert set(file) == {"ids", "patient_ids", "class_names", "image_features", "targets"}
        images = torch.load(tmp_path / "test_imgs_features.pt", weights_only=True)
        np.testing.assert_array_equal(file["image_features"], images["features"]["patient"])


MISTAKES = [
    (["--zero-shot"], "--zero-shot: of train_ctclip.py; fake_retclip.py has no other classifier (--templates)"),
    (["--prompts", "{} a", "{} b"], "--prompts: of train_ctclip.py"),
    (["--csv", "x.csv"], "--csv: not an option of fake_retclip.py's checkpoints"),
    (["--linear-probe", "--train-data", "{world}/lmdb/test"], "patient test000 is in the training data and scored"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line(score, world, capsys, words, message):
    score(*[w.replace("{world}", str(world)) for w in words], code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


# ---- linear probe


def test_linear_probe_of_eyes(score, world, tmp_path):
    """Cases are eyes with their own label; a missing eye is no case, an unreadable pair is two failed ones."""
    edit(world / "lmdb" / "test", world / "damaged", damage)
    results = score("--linear-probe", "--retrieval", data="damaged", code=3, page=True)
    assert "retrieval" not in results and results["evaluated"] == "linear probe of model.pt" and results["n"] == 89
    assert [f["id"] for f in results["failed"]] == ["test_004_left", "test_004_right"] and results["n_patients"] == 30
    y, table = (
        pd.read_csv(tmp_path / "labels.csv"),
        json.loads((world / "damaged" / "cases.json").read_text())["images"],
    )
    expected = {f"{r['id']}_{s}": e for r in table for s, e in zip(("left", "right"), r["eyes"], strict=True)}
    assert len(y) == 89 and "test_011_left" not in set(y["id"])
    for _, row in y.iterrows():
        assert [name for name in KINDS if row[name] == 1] == [k for k in [expected[row["id"]]] if k]
    assert all(results["per_label"][name]["auroc_low"] > 0.6 for name in KINDS)
    assert results["overall"]["accuracy"] > results["overall"]["accuracy_majority"]
    assert results["per_label"][KINDS[0]]["threshold"] is not None
    assert not (tmp_path / "test_imgs_features.pt").exists()
    assert "Retrieval" not in (tmp_path / "report.html").read_text()


def test_linear_probe_of_pairs_and_of_single_photographs(score, world, tmp_path):
    """Without labels of eyes: both eyes' output beside each other; one photograph a patient: its own id."""

    def no_eyes(images, texts):
        for row in images:
            row["eyes"] = ["", ""]

    def rare(images, texts):
        no_eyes(images, texts)
        images[3]["class"] = "rare"

    edit(world / "lmdb" / "train", world / "plain" / "train", rare)
    edit(world / "lmdb" / "test", world / "plain" / "test", no_eyes)
    words = ["--linear-probe", "--train-data", world / "plain" / "train", "--export-features", tmp_path / "f.npz"]
    results = score(*words, data="plain/test")
    assert results["n"] == 45 and results["overall"]["accuracy_n"] == 44
    assert list(results["per_label"]) == sorted([*KINDS, "rare"]) and results["per_label"]["rare"]["positives"] == 0
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert file["image_features"].shape == (45, 16) and file["ids"][0] == "test_000"
    results = score("--linear-probe", "--train-data", world / "one_eye" / "train", data="one_eye/test")
    assert results["n"] == 40 and pd.read_csv(tmp_path / "labels.csv")["id"][0] == "te_000"
    assert list(score(data="one_eye/test")["retrieval"]["image_to_text"]) == ["patient"]


def test_an_eye_of_two_classes(predicted):
    """A label "one / other" is of both."""
    out = predicted("lmdb/test")
    out["eye_labels"][0] = [f"{KINDS[1]} / {KINDS[2]}", "other / "]
    names, part = retrieval.eyes_of([], out)
    assert names == sorted([*KINDS, "other"]) and part["pair_rows"][:3] == [0, 0, 1] and len(part["ids"]) == 90
    assert part["targets"][0].tolist() == [0, 1, 1, 0] and part["targets"][1].tolist() == [0, 0, 0, 1]
    assert np.isnan(part["targets"][14]).all() and part["groups"][14] == "test006"


# ---- train_retclip.py itself


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A checkpoint of the tiny model with random weights, and 9 pairs of eyes as a TSV with its texts and labels."""
    import base64
    import io

    from PIL import Image

    import train_retclip

    folder, rng = tmp_path_factory.mktemp("untrained"), np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "both", "eyes", ":", ".", "glaucoma", "healthy"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    images, texts, labels = [], [], []
    for i in range(9):
        files = []
        for _ in range(2):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)).save(file, "JPEG")
            files.append(base64.urlsafe_b64encode(file.getvalue()).decode())
        kind = KINDS[1 + i % 2]
        images.append("\t".join([f"p{i}", *files]))
        texts.append(json.dumps({"text_id": i, "text": f"Both eyes: {kind}.", "image_ids": [f"p{i}"]}))
        labels.append([f"p{i}", f"p{i}", kind, kind, kind])
    for split in ("test", "cut"):
        if split == "cut":
            images[2] = images[2][:90]
        (folder / f"{split}_imgs.tsv").write_text("\n".join(images) + "\n")
        (folder / f"{split}_texts.jsonl").write_text("\n".join(texts) + "\n")
        columns = ["image_id", "patient_id", "label", "left_label", "right_label"]
        pd.DataFrame(labels, columns=columns).to_csv(folder / f"{split}_labels.csv", index=False)
    words = ["--convert", folder / "model.pt", "--vision-model", "tiny", "--text-model", "tiny"]
    words += ["--vocab", folder / "vocab.txt", "--batch-size", 4, "--num-workers", 0]
    assert train_retclip.main([str(w) for w in words]) == 0
    return folder


def test_train_retclip(untrained, tmp_path, capsys):
    """The document's command on a real checkpoint, with the photographs of the gallery; a file cut off is listed."""
    command = ["--test-only", untrained / "model.pt", "--device", "cpu", "--n-bootstrap", 20, "--output", tmp_path]

    def call(split, *words, code=0):
        words = [str(w) for w in [*command, "--val-data", untrained / split, *words]]
        assert common.run_main(lambda: evaluate.main(words)) == code
        return json.loads((tmp_path / "evaluation_results.json").read_text())

    results = call("test")
    assert results["n"] == 9 and results["per_label"][KINDS[1]]["n"] == 9 and results["notes"] == []
    assert results["retrieval"]["image_to_text"]["right"]["n_gallery"] == 2
    page = (tmp_path / "report.html").read_text()
    assert page[: page.index("The most confident errors")].count("data:image/jpeg") == 2 * (2 * 5 + 6)
    texts = torch.load(tmp_path / "test_texts_features.pt", weights_only=True)
    assert texts["ids"] == [str(i) for i in range(9)] and texts["features"]["left"].shape == (9, 256)
    (tmp_path / "t.txt").write_text("{}.\neyes: {}\n")
    other = call("test", "--templates", tmp_path / "t.txt")
    assert other["provenance"]["prompts"] == "{}.; eyes: {}" and other["per_label"] != results["per_label"]
    assert call("cut", code=3)["failed"][0]["id"] == "p2"
    capsys.readouterr()
    assert common.run_main(lambda: evaluate.main([str(w) for w in command])) == 2
    assert "--val-data is missing" in capsys.readouterr().err
