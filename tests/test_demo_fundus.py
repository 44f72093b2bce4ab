"""demo_data.py fundus: pictures that are what their texts say, left and right, the same for any number of workers."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import common
import demo_data

N, SIZE = 40, 64


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fundus")
    assert (
        demo_data.main(["fundus", "--out", str(folder), "--n", str(N), "--size", str(SIZE), "--num-workers", "1"]) == 0
    )
    return folder


def test_form_of_the_real_data(out, shared):
    table, real = pd.read_csv(out / "pairs.csv"), pd.read_csv(shared / "data" / "fundus" / "pairs.csv")
    assert list(table) == list(real) and set(real["left_diagnosis"]) <= set(demo_data.FINDINGS)
    tokenizer = common.load_tokenizer(out / "vocab.txt")
    assert not any("[UNK]" in tokenizer.encode(text).tokens for text in real["text"])


def test_tables_and_pictures(out):
    table = pd.read_csv(out / "pairs.csv")
    assert list(table) == demo_data.FUNDUS_COLUMNS[0] and len(table) == N and table["patient_id"].is_unique
    assert table["split"].value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}
    findings = set(table["left_diagnosis"]) | set(table["right_diagnosis"])
    assert findings <= set(demo_data.FINDINGS)
    for path in [*table["left_image"], *table["right_image"]]:
        with Image.open(out / path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (SIZE, SIZE), "RGB")
    assert {p.name for p in (out / "images").iterdir()} == {
        p[7:] for c in ("left", "right") for p in table[f"{c}_image"]
    }


def test_prompts_name_the_pictures_by_index(out):
    pairs = pd.read_csv(out / "pairs.csv")
    parts = [pd.read_csv(out / f"prompts_{split}.csv") for split in ("train", "test")]
    assert [len(p) for p in parts] == [28, 12] and not parts[0]["dataset_index"].is_monotonic_increasing
    for row in pd.concat(parts).itertuples():
        side = "left" if "left" in row.prompt else "right"
        data = (out / "by_index" / f"{row.dataset_index}.jpg").read_bytes()
        assert data == (out / pairs[f"{side}_image"][row.dataset_index]).read_bytes()
        assert row.label == pairs[f"{side}_diagnosis"][row.dataset_index]
        assert row.label in row.prompt.lower()


def test_texts_say_what_each_eye_has():
    rows = [demo_data.draw_patient(0, i) for i in range(300)]
    same = [f[0] == f[1] for f, _, _ in rows]
    assert 0.65 < np.mean(same) < 0.85
    shares = pd.Series([f for r in rows for f in r[0]]).value_counts(normalize=True)
    assert all(abs(shares[name] - share) < 0.1 for name, share in demo_data.FINDINGS.items())
    for findings, severities, cups in rows:
        assert all(0 < s <= 1 for s in severities)
        assert all((cup >= 0.6) == (f == "glaucoma") for f, cup in zip(findings, cups, strict=True))


def test_laterality_of_texts(out):
    table = pd.read_csv(out / "pairs.csv")
    plain = 0
    for row in table.itertuples():
        text, left, right = row.text, row.left_diagnosis, row.right_diagnosis
        plain += text in (f"Both eyes: {left}.", f"Left eye: {left}. Right eye: {right}.")
        if text.startswith("Both eyes"):
            assert left == right
        elif left != right:
            marks = {"Left eye": "Right eye", "OD": "OS", "The right": "The left", "Fundus": "left eye,"}
            start, turn = next((a, b) for a, b in marks.items() if text.startswith(a))
            first, second = text.split(turn)
            one, other = (right, left) if start in ("OD", "The right") else (left, right)
            assert one in first and other in second, text
    assert 3 <= plain <= 20 and table["text"].nunique() > 0.6 * N


def test_vocabulary_spells_all_texts(out):
    tokenizer = common.load_tokenizer(out / "vocab.txt")
    assert (out / "vocab.txt").read_text().split("\n")[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for text in [*pd.read_csv(out / "pairs.csv")["text"], *pd.read_csv(out / "prompts_train.csv")["prompt"]]:
        assert "[UNK]" not in tokenizer.encode(text).tokens
    assert tokenizer.encode("Both eyes: normal fundus.").tokens[1:-1] == ["both", "eyes", ":", "normal", "fundus", "."]


def test_a_patient_depends_on_seed_and_number_only(out, tmp_path):
    flags = ["--size", str(SIZE), "--num-workers", "2"]
    assert demo_data.main(["fundus", "--out", str(tmp_path), "--n", "12", *flags]) == 0
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes() == (out / "images" / path.name).read_bytes()
    part, whole = pd.read_csv(tmp_path / "pairs.csv"), pd.read_csv(out / "pairs.csv")
    pd.testing.assert_frame_equal(part, whole[:12])
    assert (tmp_path / "vocab.txt").read_bytes() == (out / "vocab.txt").read_bytes()
    assert demo_data.main(["fundus", "--out", str(tmp_path), "--n", "12", "--seed", "7", *flags]) == 0
    assert not pd.read_csv(tmp_path / "pairs.csv")["text"].equals(part["text"])


def eye(index, side, finding="normal fundus", severity=0.9, cup=0.3, size=128):
    return demo_data.draw_fundus(3, index, side, finding, severity, cup, size).astype(int)


@pytest.mark.parametrize("side", [0, 1])
def test_the_disc_is_on_the_nasal_side(side):
    """The brightest spot: to the left of the picture in a left eye, to the right in a right one."""
    for index in range(8):
        green = np.asarray(Image.fromarray(eye(index, side)[..., 1].astype(np.uint8)).reduce(6), int)
        column = np.unravel_index(green[4:-4, 2:-2].argmax(), green[4:-4, 2:-2].shape)[1] / green[4:-4, 2:-2].shape[1]
        assert (column < 0.4) if side == 0 else (column > 0.6), (index, column)


@pytest.mark.parametrize("finding", [f for f in demo_data.FINDINGS if f != "normal fundus"])
def test_findings_are_seen_where_they_belong(finding):
    for index in range(3):
        healthy, mild, severe = (eye(index, 1, f, s, c) for f, s, c in (
            ("normal fundus", 0.5, 0.3), (finding, 0.1, 0.6 if finding == "glaucoma" else 0.3),
            (finding, 0.95, 0.9 if finding == "glaucoma" else 0.3)))  # fmt: skip
        change = np.abs(severe - healthy).sum(-1)
        disc, macula = change[48:80, 80:112], change[50:82, 46:80]  # of a right eye
        assert change.mean() > np.abs(mild - healthy).sum(-1).mean() * 0.5 and change.mean() > 1
        if finding in ("glaucoma", "pathological myopia"):
            assert disc.mean() > (2 if finding == "glaucoma" else 1.1) * macula.mean()
        if finding == "macular degeneration":
            assert macula.mean() > 2 * disc.mean()
        if finding == "diabetic retinopathy":
            assert severe.sum(-1)[change > 90].mean() < healthy.sum(-1)[change > 90].mean() + 30  # blood, some exudates
        if finding == "cataract":  # no edges left
            assert (
                np.abs(np.diff(severe[40:88, 40:88].sum(-1))).mean()
                < np.abs(np.diff(healthy[40:88, 40:88].sum(-1))).mean()
            )
        corner = severe[:8, :8]
        assert corner.mean() < 6  # black around the field


def test_findings_can_be_told_apart_and_not_by_brightness_alone():
    """A linear probe on 24 x 24 pixels sees every finding; one on the mean colour sees less."""
    rows = [(i, side, *(v[side] for v in demo_data.draw_patient(5, i))) for i in range(150) for side in (0, 1)]
    images = np.stack([demo_data.draw_fundus(5, i, side, f, s, c, 48) for i, side, f, s, c in rows])
    images = np.where(np.array([r[1] for r in rows])[:, None, None, None] == 0, images[:, :, ::-1], images) / 255.0
    labels = np.array([r[2] for r in rows])
    scores = {}
    for name, features in (("mean", images.mean((1, 2))), ("pixels", images[:, ::2, ::2].reshape(len(rows), -1))):
        model = LogisticRegression(max_iter=1000, C=0.1).fit(features[:200], labels[:200])
        probs = model.predict_proba(features[200:])
        scores[name] = np.mean([roc_auc_score(labels[200:] == c, probs[:, k]) for k, c in enumerate(model.classes_)])
    assert scores["pixels"] > scores["mean"] + 0.03 and scores["pixels"] > 0.75 and scores["mean"] < 0.8, scores


@pytest.mark.parametrize("flags", [["--n", "3"], ["--size", "8"]])
def test_mistakes_are_one_line(flags, tmp_path, capsys):
    assert demo_data.main(["fundus", "--out", str(tmp_path / "x"), "--n", "10", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "x").exists()
