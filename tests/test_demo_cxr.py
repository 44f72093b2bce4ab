"""demo_data.py cxr: films that show the scores of their zones, on the right side, whatever their brightness."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

import demo_data
from demo_data import ZONES

N, SIZE = 40, 64
BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_demo_cxr.py"
spec = importlib.util.spec_from_file_location("bench_demo_cxr", BENCH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cxr")
    assert demo_data.main(["cxr", "--out", str(folder), "--n", str(N), "--size", str(SIZE), "--num-workers", "1"]) == 0
    return folder


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_table_has_the_form_of_the_csi_tool(out):
    first, *lines = (out / "labels.csv").read_text().splitlines()
    zones = "right_sup;left_sup;right_mid;left_mid;right_inf;left_inf"
    assert first == f"FileID;{zones};csi;patient;view;diagnosis"
    table = pd.read_csv(out / "labels.csv", sep=";", dtype=str, keep_default_na=False)
    assert list(table) == demo_data.CXR_COLUMNS and len(table) == len(lines) and table["FileID"].is_unique
    assert set(table[ZONES].to_numpy().ravel()) == {"0", "1", "2", "3", ""}  # whole numbers, never 1.0
    assert set(table["view"]) == {"PA", "AP"} and set(table["diagnosis"]) == {"0", "1"}
    films = table.groupby("patient").size()
    assert len(films) == N and set(films) == {1, 2} and (table.groupby("patient")["diagnosis"].nunique() == 1).all()


def test_csi_is_the_mean_of_the_known_zones(out):
    table = pd.read_csv(out / "labels.csv", sep=";")
    assert np.allclose(table[ZONES].mean(axis=1), table["csi"], atol=1e-4, equal_nan=True)
    assert table[ZONES].isna().any(axis=None)


def test_scores_of_many_patients():
    courses = [demo_data.draw_course(3, index) for index in range(1500)]
    films = np.stack([scores for _, films in courses for _, scores in films])
    known = ~np.isnan(films)
    assert set(films[known]) == {0, 1, 2, 3} and 0.04 < 1 - known.mean() < 0.08
    empty = ~known.any(1)
    assert 0.005 < empty.mean() < 0.03 and 0.2 < len(films) / len(courses) - 1 < 0.3
    csi = np.array([row[~np.isnan(row)].mean() for row in films[~empty]])
    assert 1.2 < csi.mean() < 1.45 and 0.65 < csi.std() < 0.85
    upper, mid, lower = (np.nanmean(films[:, k : k + 2]) for k in (0, 2, 4))
    assert upper < mid - 0.1 and mid < lower - 0.1
    pairs = pd.DataFrame(films, columns=ZONES).corr()
    assert 0.35 < pairs.loc["right_mid", "left_mid"] < 0.8 and 0.2 < pairs.loc["right_sup", "left_inf"] < 0.65
    diagnosis = np.array([diagnosis for diagnosis, films in courses for _ in films])[~empty]
    assert 0.2 < diagnosis.mean() < 0.32 and diagnosis[csi > 2].mean() > 0.5 > 0.1 > diagnosis[csi < 1].mean()


def test_films_and_masks(out):
    table = pd.read_csv(out / "labels.csv", sep=";")
    shapes, depths = set(), []
    for film in table["FileID"]:
        image = read(out / "images" / f"{film}.png")
        right, left = (read(out / "masks" / f"{film}_{side}_lung_mask.png") for side in ("right", "left"))
        assert image.ndim == 2 and min(image.shape) == SIZE and max(image.shape) <= 1.2 * SIZE
        assert right.shape == left.shape == image.shape and right.dtype == left.dtype == np.uint8
        assert set(np.unique(right)) == set(np.unique(left)) == {0, 255} and not (right & left).any()
        assert np.nonzero(right)[1].mean() < image.shape[1] / 2 < np.nonzero(left)[1].mean()  # the patient faces us
        shapes.add(np.sign(image.shape[0] - image.shape[1]))
        depths.append(image.dtype)
        if image.dtype == np.uint16:
            assert len(np.unique(image)) > 1000 and (image % 257 != 0).mean() > 0.9 and image.max() > 30_000
    assert {-1, 1} <= shapes and 0.2 < np.mean([d == np.uint16 for d in depths]) < 0.65
    assert {d.name for d in depths} == {"uint8", "uint16"}
    assert len(list((out / "images").iterdir())) == len(table) == len(list((out / "masks").iterdir())) / 2


def test_a_patient_depends_on_seed_and_number_only(out, tmp_path):
    flags = ["--n", "12", "--size", str(SIZE), "--num-workers", "2"]
    assert demo_data.main(["cxr", "--out", str(tmp_path / "a"), *flags]) == 0
    paths = sorted((tmp_path / "a").rglob("*.png"))
    assert len(paths) >= 36
    for path in paths:
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "a")).read_bytes()
    lines = (tmp_path / "a" / "labels.csv").read_text().splitlines()
    assert lines == (out / "labels.csv").read_text().splitlines()[: len(lines)]
    assert demo_data.main(["cxr", "--out", str(tmp_path / "b"), *flags, "--seed", "7"]) == 0
    assert (tmp_path / "b" / "labels.csv").read_text().splitlines() != lines


def thirds(masks):
    """(H, W): the place in ZONES of each pixel of the lungs, by thirds of their height; -1 elsewhere."""
    return bench.zones_of_lungs([mask > 0 for mask in masks])


@pytest.mark.parametrize("zone", range(6), ids=ZONES)
def test_a_score_changes_its_zone_alone(zone):
    for index, view in ((1, "PA"), (2, "AP")):
        others = np.array([1.0, 0, 2, 1, 0, 3])
        drawn = []
        for score in (0, 1, 2, 3, 3):
            others[zone] = score
            drawn.append(demo_data.draw_cxr(5, index, 0, view, others.copy(), 128))
        assert np.array_equal(drawn[3][0], drawn[4][0])
        zones = thirds(drawn[0][1])
        for k in range(4):
            for image, _ in drawn[k + 1 : 4]:
                change = np.abs(image - drawn[k][0])
                assert change[zones == zone].mean() > 0.012 and (change > 0.03).sum() > 30
                near = Image.fromarray(np.uint8(255 * (zones == zone))).filter(ImageFilter.MaxFilter(9))
                assert change[np.asarray(near) == 0].sum() < 0.02 * change.sum()  # thirds have soft borders
                other = (zones >= 0) & (zones != zone) & (np.abs(zones - zone) != 2)
                assert change[other].max() < 1e-6  # neither the other lung nor the far third


def test_what_cannot_be_graded_is_hidden():
    """Fluid, a pad, the end of the field: the lung's pattern is gone; a film without a known zone is blurred."""
    known = np.array([1.0, 2, 1, 2, 1, 2])
    for zones in ((0,), (3,), (4,), (0, 1), (4, 5), range(6)):
        scores = known.copy()
        scores[list(zones)] = np.nan
        for index in range(2):
            (seen, masks), (hidden, same) = (demo_data.draw_cxr(9, index, 0, "PA", s, 128) for s in (known, scores))
            assert all(np.array_equal(a, b) for a, b in zip(masks, same, strict=True))
            place = np.isin(thirds(masks), list(zones))
            assert np.abs(seen - hidden)[place].mean() > 0.03
            if len(zones) == 2:  # outside of the field: black
                assert np.median(hidden[place]) < 0.01
            if len(zones) == 6:
                seen, hidden = (np.asarray(Image.fromarray(image).reduce(4)) for image in (seen, hidden))
                assert np.abs(np.diff(hidden)).mean() < 0.4 * np.abs(np.diff(seen)).mean()
            if tuple(zones) == (4,):
                assert hidden[place].mean() > seen[place].mean()


def test_brightness_tells_little(out, capsys):
    """The benchmark's ridge regression of 28 patients, scored on 12: far from a reader's agreement (kappa 0.8)."""
    assert bench.main(["--csv", str(out / "labels.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("median of the zone") and "thirds of the lungs" in lines[3]
    table = pd.read_csv(out / "labels.csv", sep=";")
    split = table[["FileID"]].assign(split=np.where(table["patient"] < "P0030", "train", "val"))
    split.to_csv(out / "split.csv", index=False)
    expected = table[["FileID", *ZONES]].fillna(0).rename(columns={zone: f"{zone}_expected" for zone in ZONES})
    expected.to_csv(out / "predictions.csv", index=False)
    flags = ["--split-file", str(out / "split.csv"), "--split", "val", "--predictions", str(out / "predictions.csv")]
    assert bench.main(["--csv", str(out / "labels.csv"), *flags]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["the", "model", "QWK", "1.000", "MAE", "0.000"]


@pytest.mark.parametrize("flags", [["--n", "3"], ["--size", "8"], ["--size", "48"], ["--seed", "-1"]])
def test_mistakes_are_one_line(flags, tmp_path, capsys):
    assert demo_data.main(["cxr", "--out", str(tmp_path / "x"), "--n", "10", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_file_in_the_way_is_one_line(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert demo_data.main(["cxr", "--out", str(tmp_path / "x"), "--n", "10"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
