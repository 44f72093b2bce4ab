"""evaluate.py on models of images and reports: zero-shot, retrieval, features, linear probe, thresholds of a part."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, ROOT, run
from sklearn.metrics import f1_score, roc_auc_score

import cases
import common
import evaluate
import report

NAMES = ["Cardiomegaly", "<b>Emphysema</b>"]
# What evaluate.py asks of a training script, with features that are drawn instead of computed. A case's features and
# its probabilities depend on its name and labels alone; `noise` in the table makes its features carry no label.
SCRIPT = """
import argparse, zlib
from pathlib import Path
import numpy as np
import torch
import common

TASK = "ctclip"


def build_parser():
    parser = argparse.ArgumentParser()
    for name in ("train-data", "valid-data", "ct-rate-root", "vocab"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("reports", "metadata", "labels", "prompts"):
        parser.add_argument(f"--{name}", nargs="+")
    for name in ("batch-size", "num-workers"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("split", "hu-source", "lr"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--zero-shot", action="store_true")
    parser.add_argument("--config")
    return parser


def args_from_checkpoint(saved, **overrides):
    args = argparse.Namespace(**saved["args"])
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    return args


def data_file(args, split=None):
    return Path(args.train_data if (split or args.split) == "train" else args.valid_data)


class Cases:
    def __init__(self, args):
        self.args, self.class_names = args, ["Cardiomegaly", "<b>Emphysema</b>"]
        if args.reports:
            raise common.UserError(f"{args.reports[0]}: has nothing on {data_file(args)}")
        table = common.read_table(data_file(args))
        self.table, self.ids, self.groups = table, table["id"].tolist(), table["patient"].tolist()
        self.targets = common.label_array(table, self.class_names, data_file(args))
        self.texts = table["text"].tolist()

    def __len__(self):
        return len(self.ids)

    def load(self, index):
        if self.table["img"][index] == "bad":
            raise common.UserError(f"{self.ids[index]}.npy: cut off")


def build_eval_dataset(args):
    return Cases(args)


def build_eval_model(saved, args, device):
    return argparse.Namespace(classifier="head" if saved["thresholds"] else None)


def unit(x):
    return x / np.linalg.norm(x)


def draw(words, size):
    return np.random.default_rng(zlib.crc32(words.encode())).normal(size=size)


def predict(model, dataset, ctx, say=None):
    args, rows = dataset.args, []
    batches = common.eval_batches(len(dataset), 4, ctx)
    for i in sum(batches, []):
        y = np.nan_to_num(dataset.targets[i]) * (dataset.table["img"][i] != "noise")
        words = draw(dataset.texts[i], 10)
        image = unit(np.concatenate([2 * y, words + 1.5 * draw(dataset.ids[i], 10)]))
        text = unit(np.concatenate([2 * y, words]))
        p = 1 / (1 + np.exp(-(image[:2] * 6 - 1)))
        p = p if model.classifier and not args.zero_shot else p ** len(args.prompts)
        bad = dataset.table["img"][i] == "bad"
        rows.append([*(p * (np.nan if bad else 1)), *(image * (np.nan if bad else 1)), *text])
    rows = common.gather_rows(torch.tensor(np.array(rows)), torch.tensor(batches).flatten(), ctx).numpy()
    text = rows[:, 14:].astype(np.float32)
    text[[not t for t in dataset.texts]] = np.nan
    return {
        "ids": dataset.ids, "groups": dataset.groups, "targets": dataset.targets, "texts": dataset.texts,
        "probs": rows[:, :2], "image_features": rows[:, 2:14].astype(np.float32), "text_features": text,
        "failed": np.flatnonzero(np.isnan(rows[:, 0])).tolist(),
    }
"""


def make_table(path, patients, seed, img="", reports=True):
    """Two scans of each patient with the same report, labels of which some are unknown, one patient without report."""
    rng, rows = np.random.default_rng(seed), []
    for patient in patients:
        y = [str(int(v)) for v in rng.random(2) < [0.4, 0.3]]
        if rng.random() < 0.1:
            y[1] = ""
        text = f"report of {patient}" if reports and patient != patients[3] else ""
        rows += [[f"{patient}_a_{i}", patient, *y, text, img] for i in (1, 2)]
    columns = ["id", "patient", *NAMES, "text", "img"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with the script, its data, and checkpoints: model.pt, and head.pt with thresholds of its classifier."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "fake_ctclip.py").write_text(SCRIPT)
    make_table(folder / "train.csv", [f"train_{i}" for i in range(120)], 0)
    make_table(folder / "noise.csv", [f"other_{i}" for i in range(120)], 1, img="noise")
    make_table(folder / "valid.csv", [f"valid_{i}" for i in range(60)], 2)
    make_table(folder / "test.csv", [f"test_{i}" for i in range(20)], 3)
    make_table(folder / "mute.csv", [f"test_{i}" for i in range(20)], 3, reports=False)
    args = {"train_data": str(folder / "train.csv"), "valid_data": str(folder / "valid.csv"), "split": "valid"}
    args |= dict.fromkeys(["reports", "metadata", "labels", "vocab"]) | {"batch_size": 4, "num_workers": 0}
    args |= {"zero_shot": False, "prompts": ["{}", "no {}"], "hu_source": "auto", "lr": 1.0}
    checkpoint = {"task": "ctclip", "args": args, "model": {"w": torch.zeros(1)}, "versions": {}, "thresholds": None}
    common.save_checkpoint(folder / "model.pt", checkpoint)
    common.save_checkpoint(folder / "head.pt", checkpoint | {"thresholds": [0.25, 0.75], "class_names": ["a", "b"]})
    return folder


@pytest.fixture
def score(world, tmp_path, monkeypatch):
    """score(checkpoint, words) -> results.json of an evaluation in this process; the page is drawn with page=True."""
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.setitem(cases.TASKS, "ctclip", "fake_ctclip")

    def call(name, *words, code=0, page=False):
        monkeypatch.setattr(evaluate, "write_report", report.write_report if page else lambda *args: None)
        monkeypatch.setattr(evaluate, "draw", lambda *args: None)  # there is no network
        words = ["--checkpoint", world / name, "--output", tmp_path, "--device", "cpu", "--n-bootstrap", 50, *words]
        assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == code
        return json.loads((tmp_path / "results.json").read_text()) if code in (0, 3) else None

    return call


def numbers(results):
    return {k: v for k, v in results.items() if k not in ("provenance", "notes", "evaluated", "evaluated_on")}


# ---- zero-shot ----


def test_zero_shot_and_prompts(score, world):
    """They reach the script; thresholds of other probabilities are not used; only a change is said."""
    other = score("head.pt", "--valid-data", world / "test.csv")
    assert other["per_label"][NAMES[0]]["threshold"] == 0.25 and other["notes"] == []
    plain = score("head.pt")  # on the cases by which training fitted 0.25
    assert plain["evaluated"] == "head.pt" and plain["per_label"][NAMES[0]]["threshold"] == 0.5
    assert "fitted to these cases" in plain["thresholds_source"] and "chose the model:" in plain["notes"][0]
    prompted = score("head.pt", "--zero-shot")
    assert prompted["evaluated"] == "head.pt, zero-shot" and prompted["per_label"][NAMES[0]]["threshold"] == 0.5
    assert prompted["thresholds_source"] == "0.5 (default); the checkpoint's belong to other probabilities"
    assert "chose the model:" in prompted["notes"][0] and prompted["provenance"]["prompts"] == "{}; no {}"
    more = score("head.pt", "--prompts", "{}", "no {}", "with {}", "without {}")
    assert more["evaluated"] == "head.pt, zero-shot"
    brier = [r["per_label"][NAMES[0]]["brier"] for r in (plain, prompted, more)]
    assert len(set(brier)) == 3
    bare = score("model.pt")  # has no classifier, so that it is zero-shot anyway
    assert bare["evaluated"] == "model.pt, zero-shot" and numbers(bare) == numbers(score("model.pt", "--zero-shot"))
    assert "belong" not in bare["thresholds_source"] and bare["per_label"] == prompted["per_label"]
    same = score("head.pt", "--prompts", "{}", "no {}")
    assert numbers(same) == numbers(plain)
    assert numbers(score("head.pt", "--no-zero-shot")) == numbers(plain)


# ---- thresholds of a part ----


def test_threshold_part(score, world, tmp_path):
    """Its patients are in no number and no file but by name; its thresholds are the best F1 of its cases alone."""
    everyone = score("model.pt")
    table = pd.read_csv(tmp_path / "labels.csv"), pd.read_csv(tmp_path / "predictions.csv")
    results = score("model.pt", "--threshold-part", 0.4, "--retrieval")
    part = results["threshold_part"]
    assert (part["share"], part["seed"]) == (0.4, 0) and 0 < part["n"] < 120 and part["n"] == 2 * len(part["patients"])
    assert results["n"] == 120 - part["n"] and results["n_patients"] == 60 - len(part["patients"])
    written = pd.read_csv(tmp_path / "labels.csv")
    assert not set(written["patient_id"]) & set(part["patients"]) and len(written) == results["n"]
    assert results["retrieval"]["report_to_volume"]["n_gallery"] == results["n"]
    held = table[0]["patient_id"].isin(part["patients"])
    fitted = common.f1_thresholds(table[0].loc[held, NAMES], table[1].loc[held, [f"{n}_prob" for n in NAMES]])
    for k, name in enumerate(NAMES):
        row, y = results["per_label"][name], written[name]
        p = pd.read_csv(tmp_path / "predictions.csv")[f"{name}_prob"]
        assert row["threshold"] == pytest.approx(fitted[k], abs=1e-12)
        assert row["f1"] == pytest.approx(f1_score(y[y.notna()], p[y.notna()] >= row["threshold"]))
        assert row["threshold"] != everyone["per_label"][name]["threshold"] == 0.5
    assert (
        f"on {part['n']} cases of {len(part['patients'])} patients that are not scored" in results["thresholds_source"]
    )
    assert score("model.pt", "--threshold-part", 0.4, "--seed", 1)["threshold_part"]["patients"] != part["patients"]


def test_parts_depend_on_names_alone():
    names = [f"p{i}" for i in range(2000)]
    part = cases.in_part(names, 0.3, 0)
    assert abs(part.mean() - 0.3) < 0.04
    assert (cases.in_part(names[::-1], 0.3, 0)[::-1] == part).all()
    assert (cases.in_part(names[:7], 0.3, 0) == part[:7]).all() and (part <= cases.in_part(names, 0.5, 0)).all()
    assert not cases.in_part(names, 0, 0).any()


def test_threshold_part_of_two_files(tmp_path):
    """Also without a checkpoint; a label without a positive case in the part keeps 0.5, and is named."""
    y = pd.DataFrame({"id": [f"a{i}" for i in range(40)], "one": [0, 1] * 20, "rare": [1] + [0] * 39})
    y.to_csv(tmp_path / "y.csv", index=False)
    p = pd.DataFrame({"id": y["id"], "one_prob": y["one"] * 0.2 + 0.1, "rare_prob": 0.2})
    p.to_csv(tmp_path / "p.csv", index=False)
    seed = next(s for s in range(99) if not cases.in_part(["a0"], 0.5, s)[0])
    words = ["--predictions", tmp_path / "p.csv", "--labels", tmp_path / "y.csv", "--threshold-part", 0.5,
             "--seed", seed, "--output", tmp_path, "--no-bootstrap"]  # fmt: skip
    assert evaluate.main([str(w) for w in words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["per_label"]["one"]["f1"] == 1 and results["per_label"]["rare"]["threshold"] == 0.5
    assert results["thresholds_source"].endswith("0.5 without a positive case there: rare")
    words[words.index(0.5)] = 1e-9
    assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == 2


# ---- retrieval ----


def slow_retrieval(folder, out):
    """The same numbers by double loops over the exported features: {direction: {name: value}}."""
    with np.load(folder / "f.npz", allow_pickle=False) as file:
        ids, patients, image, text, y = (file[k] for k in ("ids", "patient_ids", "image_features", "text_features",
                                                            "targets"))  # fmt: skip
    words = pd.read_csv(out, keep_default_na=False)["text"].tolist()
    told = [i for i, w in enumerate(words) if w]

    def ranks(queries, gallery, right):
        found = []
        for q in queries:
            score = {g: float(q[1] @ v) for g, v in gallery.items()}
            best = max(score[g] for g in gallery if right(q[0], g))
            found.append(1 + sum(s > best + 1e-7 for s in score.values()))
        return np.array(found)

    volumes, reports = dict(enumerate(image)), {words[i]: text[i] for i in told}
    there = ranks([(i, text[i]) for i in told], volumes, lambda q, g: words[q] == words[g])
    back = ranks([(i, image[i]) for i in told], reports, lambda q, g: words[q] == g)
    overlaps = {k: [] for k in (1, 5, 10)}
    ill = [i for i in range(len(ids)) if (y[i] == 1).any()]
    for i in ill:
        others = sorted((g for g in ill if patients[g] != patients[i]), key=lambda g: -float(image[i] @ image[g]))
        for k, values in overlaps.items():
            pairs = [(y[i], y[g]) for g in others[:k]]
            both = [sum(a == b == 1 for a, b in zip(*p, strict=True)) for p in pairs]
            one = [sum(1 in (a, b) and a >= 0 and b >= 0 for a, b in zip(*p, strict=True)) for p in pairs]
            values.append(np.mean([a / b if b else 0 for a, b in zip(both, one, strict=True)]))
    recall = lambda r: {f"recall@{k}": (r <= k).mean() for k in (1, 5, 10)} | {"median_rank": np.median(r)}  # noqa: E731
    return {
        "report_to_volume": {"n": len(told), "n_gallery": len(ids), **recall(there)},
        "volume_to_report": {"n": len(told), "n_gallery": len(reports), **recall(back)},
        "volume_to_volume": {"n": len(ill), "n_gallery": len(ill)}
        | {f"map@{k}": np.mean(v) for k, v in overlaps.items()},
    }


def test_retrieval(score, world, tmp_path, capsys):
    words = ["--valid-data", world / "test.csv", "--retrieval", "--export-features", tmp_path / "f.npz"]
    results = score("model.pt", *words, page=True)
    found = results["retrieval"]
    for direction, expected in slow_retrieval(tmp_path, world / "test.csv").items():
        row = found[direction]
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-6), direction
        for name in [k.removesuffix("_chance") for k in row if k.endswith("_chance")]:
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], (direction, name)
        assert "recall@50" not in row  # 40 volumes: the first 50 hold everything
    row = found["report_to_volume"]  # two of 40 volumes are right
    assert row["recall@5_chance"] == pytest.approx(1 - (38 * 37 * 36 * 35 * 34) / (40 * 39 * 38 * 37 * 36))
    assert row["median_rank_chance"] == 12 and row["recall@5"] > row["recall@5_chance"]
    assert found["volume_to_report"]["recall@5_chance"] == pytest.approx(5 / 19)
    assert found["volume_to_report"]["median_rank_chance"] == 10
    # CT-CLIP's own way: the own volume alone is right, a volume finds itself, each K takes in the smaller ones
    published = found["as_published"]
    assert published["recall@1"] < row["recall@1"] and published["map@1"] < 1 and "map@100" not in published
    ill = found["volume_to_volume"]["n_gallery"]
    assert published["map@1"] == pytest.approx(ill / 40)
    said = capsys.readouterr().out
    assert "report to volume" in said and "R@5" in said and "MAP@10" in said and "median rank" in said
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Retrieval</h2>" in page and page.count("@K against chance") == 3 and "<b>Emph" not in page
    files = {k: tmp_path / f"{k}.csv" for k in ("predictions", "labels")}
    report.main(["--results", str(tmp_path / "results.json"), "--predictions", str(files["predictions"]),
                 "--labels", str(files["labels"]), "--out", str(tmp_path / "again.html")])  # fmt: skip
    assert (tmp_path / "again.html").read_text() == page
    plain = score("model.pt", "--valid-data", world / "test.csv", page=True)
    assert "retrieval" not in plain and plain["per_label"] == results["per_label"]
    assert "Retrieval" not in (tmp_path / "report.html").read_text()
    without = score("model.pt", *words, "--no-bootstrap")["retrieval"]
    assert not any("_low" in k for k in without["report_to_volume"])
    assert without["report_to_volume"]["recall@5"] == row["recall@5"]


def test_retrieval_of_features_without_meaning_is_at_chance(score, world):
    """Images that do not know their reports; the interval holds the chance level."""
    table = pd.read_csv(world / "noise.csv", keep_default_na=False)
    table.assign(text=[f"report {i}" for i in range(len(table))]).to_csv(world / "lone.csv", index=False)
    import fake_ctclip

    whole = fake_ctclip.predict

    def shuffled(*args):
        out = whole(*args)
        return out | {"text_features": np.roll(out["text_features"], 17, axis=0)}

    fake_ctclip.predict = shuffled
    try:
        row = score("model.pt", "--valid-data", world / "lone.csv", "--retrieval")["retrieval"]["report_to_volume"]
    finally:
        fake_ctclip.predict = whole
    for k in (1, 5, 10, 50, 100):
        assert row[f"recall@{k}_chance"] == pytest.approx(k / 240)
        assert row[f"recall@{k}"] == pytest.approx(k / 240, abs=4 * (k / 240 * (1 - k / 240) / 240) ** 0.5)
    assert row["recall@100_low"] < 100 / 240 < row["recall@100_high"] and row["median_rank_chance"] == 120


def test_intervals_of_retrieval_resample_patients(score, world, tmp_path):
    """The bootstrap of the recall by hand: a patient's two reports come and go together."""
    words = ["--valid-data", world / "test.csv", "--retrieval", "--export-features", tmp_path / "f.npz"]
    row = score("model.pt", *words, "--seed", 5)["retrieval"]["report_to_volume"]
    file = np.load(tmp_path / "f.npz", allow_pickle=False)
    told = np.isfinite(file["text_features"]).all(1)
    patients, held = file["patient_ids"][told], file["patient_ids"]
    ranks = common.retrieval_ranks(file["text_features"][told], file["image_features"], patients, held)
    counts, names = common.bootstrap_counts(patients, 50, 5), sorted(set(patients))
    drawn = np.random.default_rng(5).integers(len(names), size=(50, len(names)))
    means, medians = [], []
    for resample in drawn:
        rows = np.concatenate([np.flatnonzero(patients == names[i]) for i in resample])
        means.append((ranks["rank"][rows] <= 1).mean()), medians.append(np.median(ranks["rank"][rows]))
    assert counts.sum() == 50 * len(patients)
    for name, values in (("recall@1", means), ("median_rank", medians)):
        assert [row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(np.quantile(values, [0.025, 0.975])), name


def test_no_reports_and_no_labels(score, world, tmp_path):
    """What cannot be asked is null, and said."""
    found = score("model.pt", "--valid-data", world / "mute.csv", "--retrieval", page=True)["retrieval"]
    assert found["report_to_volume"] is found["volume_to_report"] is None and found["volume_to_volume"]["n"] > 0
    assert "undefined: no query" in (tmp_path / "report.html").read_text()
    table = pd.read_csv(world / "test.csv", keep_default_na=False).assign(**dict.fromkeys(NAMES, ""))
    table.to_csv(tmp_path / "unlabelled.csv", index=False)
    results = score("model.pt", "--valid-data", tmp_path / "unlabelled.csv", "--retrieval")
    assert results["retrieval"]["volume_to_volume"] is None and results["retrieval"]["report_to_volume"]["n"] == 38
    assert results["macro"]["auroc"] is None and "map@1" not in results["retrieval"]["as_published"]


# ---- features ----


def test_export_features(score, world, tmp_path):
    """Opens without pickle; failed cases and missing reports are NaN; text goes through as it is."""
    table = pd.read_csv(world / "test.csv", keep_default_na=False)
    table.loc[0, "img"], table.loc[0, "id"] = "bad", "Ünï-test_0_a_1"
    table.to_csv(tmp_path / "odd.csv", index=False)
    path = tmp_path / "new" / "out.npz"
    results = score("model.pt", "--valid-data", tmp_path / "odd.csv", "--export-features", path, "--retrieval", code=3)
    assert results["failed"] == [{"id": "Ünï-test_0_a_1", "reason": "Ünï-test_0_a_1.npy: cut off"}]
    assert results["retrieval"]["report_to_volume"]["n_gallery"] == 39
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {"ids", "patient_ids", "class_names", "image_features", "text_features", "targets"}
    assert arrays["ids"].tolist() == table["id"].tolist() and arrays["class_names"].tolist() == NAMES
    assert arrays["patient_ids"].tolist() == table["patient"].tolist()
    assert np.isnan(arrays["image_features"][0]).all() and np.isfinite(arrays["image_features"][1:]).all()
    assert (np.isnan(arrays["text_features"]).all(1) == (table["text"] == "")).all()
    np.testing.assert_allclose(np.linalg.norm(arrays["image_features"][1:], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(arrays["targets"], common.label_array(table.astype(str), NAMES, path))


# ---- linear probe ----


def test_linear_probe_finds_what_features_hold(score, world, tmp_path):
    results = score("model.pt", "--linear-probe", "--retrieval")
    assert results["evaluated"] == "linear probe of model.pt" and "chose the model:" in results["notes"][0]
    assert "training cases held out from the probe" in results["thresholds_source"]
    assert results["provenance"]["probe_trained_on"]["sha256"] == common.file_sha256(world / "train.csv")
    for name in NAMES:
        row = results["per_label"][name]
        assert row["auroc_low"] > 0.8 and row["threshold"] != 0.5
    y, p = pd.read_csv(tmp_path / "labels.csv"), pd.read_csv(tmp_path / "predictions.csv")
    known = y[NAMES[1]].notna()
    assert results["per_label"][NAMES[1]]["auroc"] == pytest.approx(
        roc_auc_score(y[NAMES[1]][known], p[f"{NAMES[1]}_prob"][known])
    )
    again = score("model.pt", "--linear-probe", "--threshold", 0.3)
    assert again["per_label"][NAMES[0]]["threshold"] == 0.3 and again["thresholds_source"] == "0.3 (--threshold)"
    assert again["per_label"][NAMES[0]]["auroc"] == results["per_label"][NAMES[0]]["auroc"]


def test_linear_probe_on_noise_is_at_chance(score, world):
    """Trained on features without labels, and scored on such: no label is found."""
    make_table(world / "noise_valid.csv", [f"noisy_{i}" for i in range(150)], 7, img="noise")
    results = score("model.pt", "--linear-probe", "--train-data", world / "noise.csv",
                    "--valid-data", world / "noise_valid.csv")  # fmt: skip
    for name in NAMES:
        row = results["per_label"][name]
        assert row["auroc_low"] < 0.5 < row["auroc_high"] and abs(row["auroc"] - 0.5) < 0.12


def test_linear_probe_is_that_of_scikit_learn(score, world, tmp_path):
    """The same probabilities from the exported features, by the textbook pipeline with the same held-out patients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(split):
        score("model.pt", "--split", split, "--export-features", tmp_path / f"{split}.npz", "--no-bootstrap")
        return dict(np.load(tmp_path / f"{split}.npz", allow_pickle=False))

    train, valid = features("train"), features("valid")
    score("model.pt", "--linear-probe", "--no-bootstrap")
    probs = pd.read_csv(tmp_path / "predictions.csv")
    held = cases.in_part(train["patient_ids"], cases.PROBE_HELD_OUT, 0)
    scaler = StandardScaler().fit(train["image_features"].astype(float))
    for k, name in enumerate(NAMES):
        y, found = train["targets"][:, k], []
        for c in cases.PROBE_C:
            model = make_pipeline(LogisticRegression(C=c, max_iter=2000))
            known = ~held & ~np.isnan(y)
            model.fit(scaler.transform(train["image_features"][known].astype(float)), y[known])
            known = held & ~np.isnan(y)
            p = model.predict_proba(scaler.transform(train["image_features"][known].astype(float)))[:, 1]
            found.append((log_loss(y[known], p), c))
        best = LogisticRegression(C=min(found)[1], max_iter=2000)
        known = ~np.isnan(y)
        best.fit(scaler.transform(train["image_features"][known].astype(float)), y[known])
        expected = best.predict_proba(scaler.transform(valid["image_features"].astype(float)))[:, 1]
        np.testing.assert_allclose(probs[f"{name}_prob"], expected, atol=1e-6)


def test_linear_probe_of_odd_training_data(score, world, tmp_path):
    """A label of one class is constant and named; unreadable training cases are counted, and make the exit code 3."""
    table = pd.read_csv(world / "train.csv", keep_default_na=False)
    table[NAMES[1]] = "0"
    table.loc[5, "img"] = "bad"
    table.to_csv(tmp_path / "odd.csv", index=False)
    results = score("model.pt", "--linear-probe", "--train-data", tmp_path / "odd.csv", code=3, page=True)
    assert any("gives a constant, for <b>Emphysema</b>" in note for note in results["notes"])
    assert any("1 of 240 training cases failed to load" in note for note in results["notes"])
    assert results["per_label"][NAMES[1]]["auroc"] == 0.5 and results["per_label"][NAMES[0]]["auroc"] > 0.8
    assert "gives a constant, for &lt;b&gt;Emphysema" in (tmp_path / "report.html").read_text()


# ---- all of it ----


@pytest.mark.slow  # test_evaluate_scale.py has the same for other scripts
def test_ranks_agree(world, tmp_path):
    """To the last digit for 1 and 2 ranks, with all flags."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        f"import sys\nsys.path[:0] = [{str(world)!r}, {str(ROOT)!r}]\n"
        "import cases, common, evaluate\ncases.TASKS['ctclip'] = 'fake_ctclip'\n"
        "sys.exit(common.run_main(evaluate.main))\n"
    )
    outputs = []
    for n in (1, 2):
        out = tmp_path / str(n)
        run(runner, "--checkpoint", world / "model.pt", "--linear-probe", "--retrieval", "--output", out, "--device",
            "cpu", "--export-features", out / "f.npz", "--n-bootstrap", 100, world=n,
            env={"OMP_NUM_THREADS": str(3 - n)})  # fmt: skip
        results = json.loads((out / "results.json").read_text())
        outputs.append((results["per_label"], results["retrieval"], *(
            (out / name).read_bytes() for name in ("predictions.csv", "labels.csv", "f.npz"))))  # fmt: skip
    assert outputs[0] == outputs[1]


def test_order_of_cases_changes_nothing(score, world, tmp_path):
    words = ["--retrieval", "--threshold-part", 0.3, "--valid-data"]
    table = pd.read_csv(world / "test.csv", keep_default_na=False, dtype=str)
    table.sample(frac=1, random_state=1).to_csv(tmp_path / "shuffled.csv", index=False)
    one, other = score("model.pt", *words, world / "test.csv"), score("model.pt", *words, tmp_path / "shuffled.csv")
    assert numbers(one) == numbers(other)


def test_training_config_serves(score, world, tmp_path, capsys):
    """Data keys of the training's files are used, in the order given; `labels` of a config is no --predictions."""
    (tmp_path / "a.yaml").write_text(f"data:\n  valid_data: {world / 'valid.csv'}\n  zero_shot: true\nlr: 3\n")
    (tmp_path / "b.yaml").write_text(f"valid_data: {world / 'test.csv'}\nn_bootstrap: 7\n")
    results = score("model.pt", "--config", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert results["n"] == 40 and results["evaluated"] == "model.pt, zero-shot"
    assert "not used, the checkpoint has its own: lr" in capsys.readouterr().out


def test_tables_of_training_stay_with_its_folder(score, world, tmp_path, capsys):
    """Other data bring their own; tables given now are used; the probe's training data keep theirs."""
    saved = common.load_checkpoint(world / "model.pt")
    common.save_checkpoint(world / "tables.pt", saved | {"args": saved["args"] | {"reports": ["r.csv"]}})
    score("tables.pt", code=2)
    score("tables.pt", "--valid-data", world / "valid.csv", code=2)
    assert score("tables.pt", "--valid-data", world / "test.csv")["n"] == 40
    score("tables.pt", "--valid-data", world / "test.csv", "--reports", "mine.csv", code=2)
    score("tables.pt", "--valid-data", world / "test.csv", "--linear-probe", code=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    expected = [("r", "valid"), ("r", "valid"), ("mine", "test"), ("r", "train")]
    assert said == [f"error: {table}.csv: has nothing on {world / name}.csv" for table, name in expected]


MISTAKES = [
    (["--threshold-part", "0.95"], "--threshold-part 0.95: not a share of the patients"),
    (["--threshold-part", "0.2", "--threshold", "0.5"], "--threshold brings its own thresholds"),
    (["--threshold-part", "0.2", "--linear-probe"], "--linear-probe brings its own thresholds"),
    (["--threshold-part", "1e-9"], "no patient of 60 falls into it"),
    (["--linear-probe", "--zero-shot"], "takes the place of --zero-shot"),
    (["--linear-probe", "--train-data", "{world}/valid.csv"], "patient valid_0 is in the training data and scored"),
    (["--linear-probe", "--train-data", "{world}/none.csv"], "none.csv: no such file"),
    (["--csv", "x.csv"], "--csv: not an option of fake_ctclip.py's checkpoints"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line(score, world, capsys, words, message):
    score("model.pt", *[w.replace("{world}", str(world)) for w in words], code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


@pytest.mark.parametrize("flag", ["--zero-shot", "--retrieval", "--linear-probe", "--export-features=x.npz"])
def test_flags_that_need_features(tmp_path, capsys, flag):
    """Neither two CSV files nor a classifier have them; said before anything is read or computed."""
    saved = {"task": "siglip", "args": {"csv": "x.csv", "metadata": None}, "model": {"w": torch.zeros(1)}}
    common.save_checkpoint(tmp_path / "s.pt", saved)
    assert common.run_main(lambda: evaluate.main(["--predictions", "a.csv", "--labels", "b.csv", flag])) == 2
    assert common.run_main(lambda: evaluate.main(["--checkpoint", str(tmp_path / "s.pt"), flag])) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "needs a checkpoint (--test-only)" in said[0]
    assert "--zero-shot: not an option of finetune_siglip.py's" in said[1] or "give no features" in said[1]


def test_one_file_where_a_script_takes_one(tmp_path, capsys):
    saved = {"task": "siglip", "args": {"csv": "x.csv", "metadata": None}, "model": {"w": torch.zeros(1)}}
    common.save_checkpoint(tmp_path / "s.pt", saved)
    words = ["--checkpoint", str(tmp_path / "s.pt"), "--metadata", "a.csv", "b.csv"]
    assert common.run_main(lambda: evaluate.main(words)) == 2
    assert "--metadata: finetune_siglip.py takes one file" in capsys.readouterr().err


# ---- train_ctclip.py itself ----


@pytest.fixture(scope="module")
def untrained(tiny_reports, tmp_path_factory):
    """A checkpoint of the tiny model with random weights and a head for the labels, made without data."""
    import train_ctclip

    path = tmp_path_factory.mktemp("untrained") / "model.pt"
    words = ["--preset", "tiny", "--pretrained", "none", "--vocab", tiny_reports / "vocab.txt", "--label-columns"]
    words += [*LABELS, "--label-loss-weight", 1, "--batch-size", 4, "--num-workers", 0]
    words += ["--train-data", "none", "--valid-data", "none"]
    args = train_ctclip.parse_args([str(w) for w in words])
    args.train_data = args.valid_data = None
    model = train_ctclip.build_model(args, lambda *x: None)
    common.save_checkpoint(path, common.model_checkpoint("ctclip", args, model, {}))
    return path


def test_train_ctclip(untrained, tiny_reports, tmp_path, monkeypatch, capsys):
    """The commands of issue 4 and of document 000 on a real checkpoint."""
    monkeypatch.setattr(evaluate, "write_report", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw", lambda *args: None)

    def call(*words, code=0):
        words = ["--checkpoint", untrained, "--device", "cpu", "--n-bootstrap", 20, "--output", tmp_path, *words]
        assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == code
        return json.loads((tmp_path / "results.json").read_text()) if code == 0 else capsys.readouterr().err

    assert "--valid-data is missing" in call("--retrieval", code=2)
    data, config = ["--valid-data", tiny_reports / "valid"], ROOT / "configs" / "ctclip.yaml"
    head = call(*data, "--config", config)  # whose batch_size and seed are used
    first = call(*data, "--zero-shot", "--retrieval", "--export-features", tmp_path / "f.npz")
    assert first["n"] == 9 and first["notes"] == [] and first["evaluated"] == "model.pt, zero-shot"
    assert head["evaluated"] == "model.pt" and head["per_label"] != first["per_label"]
    assert head["interval"]["seed"] == 2025
    assert first["retrieval"]["report_to_volume"]["n"] == 8  # the last case has no report
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert file["image_features"].shape == file["text_features"].shape == (9, 64)
    prompts = ["There is {}.", "There is no {}.", "{} is present.", "{} is not present."]
    assert call(*data, "--prompts", *prompts)["per_label"] != first["per_label"]
    assert "pairs of a prompt" in call(*data, "--prompts", "{} alone", code=2)
    probe = call(*data, "--linear-probe", "--train-data", tiny_reports / "train")
    assert probe["evaluated"] == "linear probe of model.pt" and "held out" in probe["thresholds_source"]
