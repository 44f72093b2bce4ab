"""train_csi.py's data: tables, splits, films in every format, damaged files, masks, augmentation, --mode check."""

import csv
import gzip
import shutil
import struct
import sys
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import film_args, run
from PIL import Image

import common
import train_csi as csi
from train_csi import UNKNOWN, ZONES

SCORES = [3, 0, 2, 1, 1, 2]  # of the film in most tests


def args_of(folder, *more):
    words = ["--csv", folder / "t.csv", "--image-dir", folder, "--image-size", 64, "--output-dir", folder / "out"]
    return csi.parse_args([str(w) for w in [*words, "--pretrained", "none", *more]])


def table(folder, rows, *columns, sep=";"):
    """t.csv of rows of FileID and six scores, and of further columns."""
    lines = [["FileID", *ZONES, *columns], *rows]
    (folder / "t.csv").write_text("".join(sep.join(map(str, line)) + "\n" for line in lines))
    return folder


def scores_of(folder, *more):
    args = args_of(folder, *more)
    return csi.read_scores(args.csv, args)


def noise(shape=(72, 60), seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, shape)


def save(path, pixels, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8 if np.max(pixels) < 256 else np.uint16)).save(path, **more)
    return path


def films(folder, names, *columns, rows=None):
    """A folder with t.csv and a film of noise for each name."""
    for i, name in enumerate(names):
        save(folder / f"{name}.png", noise(seed=i))
    return table(folder, rows or [[name, *SCORES] for name in names], *columns)


def dataset(folder, *more, split="all", train=False):
    return csi.ChestFilms(args_of(folder, *more), split, train)


def mistake(*words, capsys, code=2) -> str:
    """The one line of a run that ends with a user's mistake."""
    assert common.run_main(lambda: csi.main([str(w) for w in words])) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- the table


@pytest.mark.parametrize("sep", [";", ",", "\t"])
@pytest.mark.parametrize("how", ["plain", "bom", "crlf", "spaces", "quotes"])
def test_spellings_of_a_csv(tmp_path, sep, how):
    rows = [["FileID", *ZONES], ["a", 0, 1, 2, 3, "", 1], ["b", 3, 3, 3, 3, 3, 3]]
    pad = " {} " if how == "spaces" else '"{}"' if how == "quotes" else "{}"
    text = "".join(sep.join(pad.format(x) for x in row) + ("\r\n" if how == "crlf" else "\n") for row in rows)
    (tmp_path / "t.csv").write_bytes((b"\xef\xbb\xbf" if how == "bom" else b"") + text.encode())
    found = scores_of(tmp_path)
    assert found["FileID"].tolist() == ["a", "b"] and found["patient"].tolist() == ["a", "b"]
    assert found[list(ZONES)].to_numpy().tolist() == [[0, 1, 2, 3, UNKNOWN, 1], [3] * 6]
    assert found["csi"].isna().all() and "diagnosis" not in found and "split" not in found


def test_names_of_films(tmp_path):
    """A spreadsheet's 12.0 is 12; zeros in front, dots and words stay."""
    names = ["12.0", "007", "7", "a.b", "3.50", "1.2.840.113", "NA", "13,00", "x 1"]
    found = scores_of(table(tmp_path, [[n, *SCORES] for n in names]))
    assert found["FileID"].tolist() == ["12", "007", "7", "a.b", "3.50", "1.2.840.113", "NA", "13", "x 1"]


@pytest.mark.parametrize("names, message", [
    (["a", "b", "a"], "row 4 has a FileID that came before (a)"), (["12", "b", "12.0"], "row 4 has a FileID that came"),
    (["a", "  ", "c"], "row 3 has no FileID (empty)"), (["", "b", "c"], "row 2 has no FileID (empty)"),
])  # fmt: skip
def test_mistakes_of_names(tmp_path, capsys, names, message):
    films(tmp_path, ["a"], rows=[[n, *SCORES] for n in names])
    assert message in mistake("--mode", "check", "--csv", tmp_path / "t.csv", "--image-dir", tmp_path, capsys=capsys)


@pytest.mark.parametrize("cell", ["4", "-1", "1.7", "1,7", "x", "inf", "True", "0 1", "1e9", "?", "3.0001"])
def test_mistakes_of_scores(tmp_path, capsys, cell):
    films(tmp_path, ["a"], rows=[["a", *SCORES], ["b", 0, 0, 0, cell, 0, 0]])
    error = mistake("--csv", tmp_path / "t.csv", "--image-dir", tmp_path, "--output-dir", tmp_path, capsys=capsys)
    expected = f"row 3, column 'left_mid': '{cell}' is no score (0 to 3, or empty for unknown)"
    assert error == f"error: {tmp_path / 't.csv'}: {expected}"


@pytest.mark.parametrize("cell, score", [
    ("", UNKNOWN), (" ", UNKNOWN), ("NaN", UNKNOWN), ("nan", UNKNOWN), ("NA", UNKNOWN), ("na", UNKNOWN), ("0", 0),
    ("3.0", 3), ("2,0", 2), (" 1 ", 1),
])  # fmt: skip
def test_scores_and_unknown(tmp_path, cell, score):
    found = scores_of(table(tmp_path, [["a", cell, *SCORES[1:]], ["b", *SCORES]]))
    assert found["right_sup"].tolist() == [score, 3] and found["right_sup"].dtype == np.int64


def test_columns_that_may_be_there(tmp_path):
    readers = [f"{zone}_reader2" for zone in ZONES]
    rows = [["a", *SCORES, "1,5", "p1", "PA ", 1, *SCORES], ["b", *SCORES, "2.25", "12.0", "AP", "", *[""] * 6]]
    rows += [["c", *[""] * 6, "", "NaN", "", 0, *SCORES], ["d", *SCORES, "x", "12", "", -1, *SCORES]]
    found = scores_of(table(tmp_path, rows, "csi", "patient_id", "view", "diagnosis", *readers))
    np.testing.assert_array_equal(found["csi"], [1.5, 2.25, np.nan, np.nan])
    assert found["patient"].tolist() == ["p1", "12", "c", "12"]  # unknown: a patient of its own
    assert found["view"].tolist() == ["PA", "AP", "", ""]
    np.testing.assert_array_equal(found["diagnosis"], [1, np.nan, 0, np.nan])
    assert found[readers].to_numpy().tolist() == [SCORES, [UNKNOWN] * 6, SCORES, SCORES]
    for i, name in enumerate("abcd"):
        save(tmp_path / f"{name}.png", noise(seed=i))
    data = dataset(tmp_path)
    assert data.targets[2].tolist() == [UNKNOWN] * 6 and data.reader2.shape == (4, 6) and data.views[0] == "PA"
    assert data.groups == ["p1", "12", "c", "12"] and "3 patients" in data.notes() and "unknown 25%" in data.notes()


def test_patient_column(tmp_path):
    rows = [["a", *SCORES, "p", "m"], ["b", *SCORES, "q", "m"]]
    table(tmp_path, rows, "patient", "mrn")
    assert scores_of(tmp_path)["patient"].tolist() == ["p", "q"]
    assert scores_of(tmp_path, "--patient-column", "mrn")["patient"].tolist() == ["m", "m"]
    with pytest.raises(common.UserError, match="column 'mnr' is missing .did you mean 'mrn'"):
        scores_of(tmp_path, "--patient-column", "mnr")


def test_a_second_reader_needs_all_zones(tmp_path):
    assert "left_inf_reader2" not in scores_of(table(tmp_path, [["a", *SCORES, 1]], "left_inf_reader2"))
    rows = [["a", *SCORES, *SCORES[:5], 5]]
    with pytest.raises(common.UserError, match="row 2, column 'left_inf_reader2': '5' is no score"):
        scores_of(table(tmp_path, rows, *[f"{zone}_reader2" for zone in ZONES]))


def test_other_names_of_the_zones(tmp_path):
    """The Brixia score's letters: A, B, C are the right lung from above, D, E, F the left one."""
    letters = [f"S-{x}" for x in "ABCDEF"]
    (tmp_path / "t.csv").write_text(f"FileID,{','.join(letters)}\nx,0,1,2,3,3,2\n")
    found = scores_of(tmp_path, "--label-columns", "S-A", "S-D", "S-B", "S-E", "S-C", "S-F")
    assert dict(found.iloc[0][list(ZONES)]) == {
        "right_sup": 0, "right_mid": 1, "right_inf": 2, "left_sup": 3, "left_mid": 3, "left_inf": 2,
    }  # fmt: skip
    with pytest.raises(common.UserError, match="takes six"):
        scores_of(tmp_path, "--label-columns", *letters[:5])
    with pytest.raises(common.UserError, match="column 'S-G' is missing"):
        scores_of(tmp_path, "--label-columns", *letters[:5], "S-G")


def test_the_seven_columns_of_the_original_document(tmp_path):
    """Separated by ; and without csi, in another order: the names count."""
    text = "FileID;right_sup;right_mid;right_inf;left_sup;left_mid;left_inf\n1001;0;1;2;3;;1\n1002;1;1;2;0;1;1\n"
    (tmp_path / "t.csv").write_text(text)
    assert scores_of(tmp_path)[list(ZONES)].to_numpy().tolist() == [[0, 3, 1, UNKNOWN, 2, 1], [1, 0, 1, 1, 2, 1]]


@pytest.mark.parametrize("text, message", [
    ("FileID;right_sup\na;1\n", "column 'left_sup' is missing .did you mean 'right_sup'"),
    (f"fileid;{';'.join(ZONES)}\na;1;1;1;1;1;1\n", "column 'FileID' is missing .did you mean 'fileid'"),
    (f"FileID;{';'.join(ZONES)};left_inf\na;1;1;1;1;1;1;2\n", "column 'left_inf' is there twice"),
    (f"FileID;{';'.join(ZONES)}; left_inf \na;1;1;1;1;1;1;2\n", "column 'left_inf' is there twice"),
    (f"FileID;{';'.join(ZONES)}\na;1;1;1;1;1;1;\nb;2;2;2;2;2;2;\n", "row 2 has 8 cells, the first line has 7"),
    (f"FileID;{';'.join(ZONES)}\n", "has no rows"), ("", "not a readable CSV"),
    (f"FileID;{';'.join(ZONES)}\na;1;1;1;1;1;1\nb;1;1;1;1;1;1;1;1\n", "row 3 has 9 cells, the first line has 7"),
    (f"FileID;{';'.join(ZONES)}\na;1;1;1;1;1;1\nb;1;2\n", "row 3 has 3 cells, the first line has 7 .a cut file"),
    (f"FileID;{';'.join(ZONES)};diagnosis\na;1;1;1;1;1;1;sick\n", "row 2, column 'diagnosis': 'sick' is no label"),
])  # fmt: skip
def test_tables_that_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(common.UserError, match=message):
        scores_of(tmp_path)


def test_a_missing_or_binary_table(tmp_path):
    with pytest.raises(common.UserError, match="t.csv: no such file"):
        scores_of(tmp_path)
    (tmp_path / "t.csv").write_bytes(bytes(range(256)))
    with pytest.raises(common.UserError, match="not a readable CSV"):
        scores_of(tmp_path)


def test_empty_cells_are_unknown(tmp_path):
    (tmp_path / "t.csv").write_text(f"FileID;{';'.join(ZONES)}\na;1;2;;;;\n")
    assert scores_of(tmp_path)[list(ZONES)].to_numpy().tolist() == [[1, 2, 4, 4, 4, 4]]


# ---- the split


def cohort(n=400, seed=0, per_patient=3):
    """Table of n films of patients with 1 to `per_patient` films and a severity of their own; some unknown zones."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < n:
        name, level = f"p{len(rows):04d}", rng.random()
        for _ in range(rng.integers(1, per_patient + 1)):
            found = rng.binomial(3, level, 6)
            found[rng.random(6) < 0.1] = UNKNOWN
            rows.append([f"f{len(rows)}", *found, name])
    return pd.DataFrame(rows[:n], columns=["FileID", *ZONES, "patient"])


def test_a_new_split():
    shares = (0.7, 0.15, 0.15)
    for seed in range(5):
        frame = cohort(seed=seed)
        part = csi.new_split(frame, shares, 42)
        assert (part.groupby(frame["patient"]).nunique() == 1).all()
        assert np.allclose(part.value_counts(normalize=True)[["train", "val", "test"]], shares, atol=0.01)


def test_a_split_is_stratified_by_score():
    """The parts' mean scores are closer to each other than those of nearly all random splits of the same patients."""
    gaps, random = [], []
    for seed in range(20):
        frame = cohort(200, seed)
        mean = pd.Series(csi.true_csi(frame[list(ZONES)].to_numpy()))

        def gap(part, mean=mean):
            parts = mean.groupby(part).mean()
            return parts.max() - parts.min()

        gaps.append(gap(csi.new_split(frame, (0.7, 0.15, 0.15), 1)))
        rng, patients = np.random.default_rng(seed), frame["patient"].unique()
        names = dict(zip(rng.permutation(patients), np.linspace(0, 1, len(patients)), strict=True))
        place = frame["patient"].map(names)
        random.append(gap(np.where(place < 0.7, "train", np.where(place < 0.85, "val", "test"))))
    assert np.mean(gaps) < 0.4 * np.mean(random) and np.max(gaps) < np.mean(random)


def test_a_split_depends_on_patients_scores_and_seed_alone():
    frame = cohort()
    part = csi.new_split(frame, (0.7, 0.15, 0.15), 42)
    for seed in range(5):
        other = frame.sample(frac=1, random_state=seed)  # rows in another order, with their old labels
        again = csi.new_split(other.assign(extra=1, view="AP"), (0.7, 0.15, 0.15), 42)
        assert again.sort_index().equals(part)
        again = csi.new_split(other.reset_index(drop=True), (0.7, 0.15, 0.15), 42)
        assert dict(zip(other["FileID"], again, strict=True)) == dict(zip(frame["FileID"], part, strict=True))


def test_last_digits_do_not_decide_a_split():
    """Mean scores on the border of two strata, whose sum depends on the order of the films."""
    rng, rows, n = np.random.default_rng(0), [], 0
    while n < 60:
        films = [[*rng.integers(0, 4, 6 - k), *[UNKNOWN] * k] for k in rng.integers(0, 5, 7)]
        known = [[int(x) for x in film if x != UNKNOWN] for film in films]
        if sum(4 * Fraction(sum(x), len(x)) for x in known) / 7 % 2 == 1:
            rows += [[f"{n}.{j}", *film, f"p{n:02}"] for j, film in enumerate(films)]
            n += 1
    frame = pd.DataFrame(rows, columns=["FileID", *ZONES, "patient"])
    orders = [frame, frame[::-1], *(frame.sample(frac=1, random_state=i) for i in range(4))]
    parts = [csi.new_split(order, (0.7, 0.15, 0.15), 42).sort_index() for order in orders]
    assert all(part.equals(parts[0]) for part in parts)


def test_other_seeds_are_other_splits():
    """As independent of each other as chance: a share of 0.15 of a test part is in another's."""
    frame = cohort(1000, per_patient=1).assign(patient=[f"patient_{i:04d}" for i in range(1000)])
    tests = [set(np.flatnonzero(csi.new_split(frame, (0.7, 0.15, 0.15), seed) == "test")) for seed in range(40, 52)]
    overlap = [len(a & b) / len(a) for i, a in enumerate(tests) for b in tests[:i]]
    assert 0.13 < np.mean(overlap) < 0.17 and 0.05 < min(overlap) and max(overlap) < 0.25


def test_shares_of_a_split():
    frame = cohort(50)
    assert set(csi.new_split(frame, (0.8, 0.2, 0), 1)) == {"train", "val"}
    assert set(csi.new_split(frame, (1, 0, 0), 1)) == {"train"}
    big = frame.assign(patient=["one"] * 30 + frame["patient"].tolist()[30:])  # 60 percent of the films
    part = csi.new_split(big, (0.7, 0.15, 0.15), 1)
    assert part[:30].nunique() == 1 and set(part) == {"train", "val", "test"}


def split_of(folder, *more):
    args = args_of(folder, *more)
    return csi.split_films(csi.read_scores(args.csv, args), args)


@pytest.fixture
def unsplit(tmp_path):
    """t.csv of 40 films of 20 patients."""
    frame = cohort(40).assign(patient=[f"p{i // 2}" for i in range(40)])
    frame.replace({UNKNOWN: ""}).to_csv(tmp_path / "t.csv", index=False, sep=";")
    return tmp_path


def test_a_split_is_written_once_and_reused(unsplit):
    found, path = split_of(unsplit), unsplit / "out/split.csv"
    written = path.read_bytes()
    kept = pd.read_csv(path)
    assert kept.columns.tolist() == ["FileID", "patient", "split"] and kept["split"].tolist() == found["split"].tolist()
    for more in (["--seed", 7], ["--split-share", 0.2, 0.4, 0.4]):
        assert split_of(unsplit, *more)["split"].equals(found["split"]) and path.read_bytes() == written
    other = unsplit / "kept/of/us.csv"
    assert not split_of(unsplit, "--seed", 7, "--split-file", other)["split"].equals(found["split"])
    assert other.exists() and path.read_bytes() == written


def test_one_rank_writes_the_split(unsplit, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    one = split_of(unsplit)
    assert not (unsplit / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert split_of(unsplit)["split"].equals(one["split"]) and (unsplit / "out/split.csv").exists()


def test_a_split_file_of_a_spreadsheet(unsplit):
    """; and CRLF, capitals, other words, columns and films more, 12.0 for 12, an empty cell: in no part."""
    names = [f"f{i}" for i in range(40)]
    lines = [f"{n};{'Train' if i < 20 else ' Validation' if i < 30 else 'TEST' if i < 38 else ''};x"
             for i, n in enumerate(names)]  # fmt: skip
    text = "\r\n".join(["FileID;split;note", *lines, "f999;test;x"]).replace("f12;", "12.0;")
    (unsplit / "s.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    t = unsplit / "t.csv"
    t.write_text(t.read_text().replace("f12;", "12;"))
    found = split_of(unsplit, "--split-file", unsplit / "s.csv")["split"]
    assert found.tolist() == ["train"] * 20 + ["val"] * 10 + ["test"] * 8 + [""] * 2


def test_split_files_that_are_refused(unsplit):
    good = split_of(unsplit)[["FileID", "split"]]
    path = unsplit / "s.csv"

    def error(frame):
        frame.to_csv(path, index=False)
        with pytest.raises(common.UserError) as e:
            split_of(unsplit, "--split-file", path)
        return str(e.value)

    assert error(good[3:]).startswith(f"{path}: has no row for 3 films of {unsplit / 't.csv'}, first f0 (add them")
    parted = good.assign(split=good["split"].where(good["FileID"] != "f1", "other"))
    assert error(parted) == f"{path}: patient p0 is in several splits (1 are)"
    assert error(pd.concat([good, good[5:6]])) == f"{path}: film f5 is there twice"
    assert "column 'split' is missing" in error(good.rename(columns={"split": "part"}))


def test_names_that_a_spreadsheet_would_run(tmp_path):
    """Written with a quote in front, and found again."""
    names = ["-5a", "+x", "@b", "=1+1", "c", "-7"]
    table(tmp_path, [[n, *SCORES, n] for n in names], "patient", sep=",")
    found = split_of(tmp_path)["split"]
    assert "'=1+1" in (tmp_path / "out/split.csv").read_text()
    assert split_of(tmp_path)["split"].equals(found)


def test_a_split_of_the_table(tmp_path, capsys):
    parts = ["train", "Valid", "validation", " VAL", "test", "training", "", "Train"]
    names = list("abcdefgh")
    films(tmp_path, names, "split", rows=[[n, *SCORES, p] for n, p in zip(names, parts, strict=True)])
    assert split_of(tmp_path)["split"].tolist() == ["train", "val", "val", "val", "test", "train", "", "train"]
    assert not (tmp_path / "out").exists()
    assert [len(dataset(tmp_path, split=s)) for s in ("train", "val", "test", "all")] == [3, 3, 1, 8]
    with pytest.raises(common.UserError, match=r"no film in split 'tset' \(it has test, train, val\)"):
        dataset(tmp_path, split="tset")
    rows = [[n, *SCORES, p, "q" if n in "ab" else n] for n, p in zip(names, parts, strict=True)]
    table(tmp_path, rows, "split", "patient")
    error = mistake("--csv", tmp_path / "t.csv", "--image-dir", tmp_path, "--output-dir", tmp_path, "--no-tensorboard",
                    "--pretrained", "none", capsys=capsys)  # fmt: skip
    assert error == f"error: {tmp_path / 't.csv'}: patient q is in several splits (1 are)"
    assert len(dataset(tmp_path, split="all")) == 8  # which needs no split


def test_a_split_file_wins_over_the_table(tmp_path):
    table(tmp_path, [["a", *SCORES, "train"], ["b", *SCORES, "train"]], "split")
    (tmp_path / "s.csv").write_text("FileID,split\na,val\nb,test\n")
    assert split_of(tmp_path, "--split-file", tmp_path / "s.csv")["split"].tolist() == ["val", "test"]


def test_evaluation_makes_no_split_of_its_own(unsplit):
    """Where the split of the training is missing, a new one could judge by films that were learned from."""
    for i in range(40):
        save(unsplit / f"f{i}.png", noise(seed=i))
    with pytest.raises(common.UserError, match=r"out/split.csv: the split of the training is not here .--split-file"):
        csi.build_eval_dataset(args_of(unsplit))
    assert len(csi.build_eval_dataset(args_of(unsplit, "--split", "all"))) == 40
    sizes = [len(x) for x in csi.build_datasets(args_of(unsplit))]
    assert len(csi.build_eval_dataset(args_of(unsplit))) == sizes[1] == 6 and sizes[0] == 28


# ---- finding the films


def test_a_film_is_found_by_its_name(tmp_path):
    names = ["a.png", "b.JPG", "c.jpeg", "d.x.PNG"]
    for name in names:
        save(tmp_path / name, noise())
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4), np.int16), np.eye(4)), tmp_path / "e.nii.gz")
    shutil.copy(tmp_path / "e.nii.gz", tmp_path / "notes.txt")
    table(tmp_path, [[n, *SCORES] for n in ("a", "b", "c", "d.x", "e")])
    assert [p.name for p in dataset(tmp_path).paths] == [*names, "e.nii.gz"]


def test_missing_films_are_listed(tmp_path):
    films(tmp_path, ["a", "b"], rows=[[n, *SCORES] for n in ("a", "x1", "b", "x2", "x3", "x4")])
    with pytest.raises(common.UserError, match=r"no film for 4 of 6 rows of .*t.csv, first x1, x2, x3 .looked for F"):
        dataset(tmp_path)
    data = dataset(tmp_path, "--on-bad-sample", "skip")
    with pytest.raises(common.UserError, match=r"x1\.\*: no such file"):
        data.read(1)
    table(tmp_path, [["x1", *SCORES]])
    with pytest.raises(common.UserError, match="no film for 1 of 1 rows"):  # a wrong folder, whatever the flag says
        dataset(tmp_path, "--on-bad-sample", "skip")
    with pytest.raises(common.UserError, match="nowhere: no such folder .--image-dir"):
        dataset(tmp_path, "--image-dir", tmp_path / "nowhere")


def test_two_files_of_one_film(tmp_path):
    films(tmp_path, ["a", "b"])
    save(tmp_path / "c.png", noise())
    save(tmp_path / "c.jpg", noise())
    assert len(dataset(tmp_path)) == 2  # c is in no row
    save(tmp_path / "b.jpg", noise())
    with pytest.raises(common.UserError, match=r"b.jpg: there is b.png too .--image-column"):
        dataset(tmp_path)


def test_paths_of_a_column(tmp_path):
    images = tmp_path / "images"
    save(images / "sub/a.png", noise())
    save(images / "b.png", noise())
    save(tmp_path / "c.png", noise())
    texts = ["sub/a.png", "sub/../b.png", str(images / "b.png"), "images/b.png", "../c.png", "c.png"]
    table(tmp_path, [[f"f{i}", *SCORES, text] for i, text in enumerate(texts)], "file")
    found = dataset(tmp_path, "--image-dir", images, "--image-column", "file").paths
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "images/sub/a.png", "images/b.png", "images/b.png", "images/b.png", "c.png", "c.png",
    ]  # fmt: skip
    table(tmp_path, [["b", *SCORES, "nothing.png"], ["f1", *SCORES, "b.png"], ["f2", *SCORES, ""]], "file")
    with pytest.raises(common.UserError, match=r"no film for 2 of 3 rows.*first b, f2 .looked in column 'file'"):
        dataset(tmp_path, "--image-dir", images, "--image-column", "file")
    data = dataset(tmp_path, "--image-dir", images, "--image-column", "file", "--on-bad-sample", "skip")
    with pytest.raises(common.UserError, match="no such file"):  # and not images/b.png
        data.read(0)
    with pytest.raises(common.UserError, match="column 'flie' is missing"):
        dataset(tmp_path, "--image-column", "flie")


@pytest.mark.parametrize("text", ["../secret.png", "sub/../../secret.png", "{}/secret.png"])
def test_a_path_of_the_table_stays_in_the_folder(tmp_path, text):
    save(tmp_path / "secret.png", noise())
    (tmp_path / "data/sub").mkdir(parents=True)
    save(tmp_path / "data/b.png", noise())
    text = text.format(tmp_path)
    table(tmp_path / "data", [["a", *SCORES, text], ["b", *SCORES, "b.png"]], "file")
    with pytest.raises(common.UserError, match=r"film a: .*secret.png leads out of .*--image-dir"):
        dataset(tmp_path / "data", "--image-column", "file", "--on-bad-sample", "skip")


def test_a_name_of_the_table_stays_in_the_folder(tmp_path):
    save(tmp_path / "secret.png", noise())
    save(tmp_path / "data/b.png", noise())
    table(tmp_path / "data", [["../secret", *SCORES], ["../secret.png", *SCORES], ["b", *SCORES]])
    data = dataset(tmp_path / "data", "--on-bad-sample", "skip")
    for i in (0, 1):
        with pytest.raises(common.UserError, match="no such file"):
            data.read(i)


def test_links_are_followed(tmp_path):
    """A folder of links to a store is its owner's will, by name and by column."""
    save(tmp_path / "store/1.png", noise())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").symlink_to(tmp_path / "store/1.png")
    (tmp_path / "data/all").symlink_to(tmp_path / "store")
    table(tmp_path / "data", [["a", *SCORES, "all/1.png"]], "file")
    one, other = dataset(tmp_path / "data"), dataset(tmp_path / "data", "--image-column", "file")
    assert np.array_equal(one.read(0)[0], other.read(0)[0])
    (tmp_path / "store/1.png").unlink()
    with pytest.raises(common.UserError, match="a.png: no such file"):
        one.read(0)


# ---- reading a film


def test_png_and_jpeg(tmp_path):
    deep = noise(high=65536)
    for pixels in (noise(), deep, deep // 16):
        assert np.array_equal(csi.read_film(save(tmp_path / "a.png", pixels)), pixels)
    smooth = np.add.outer(np.arange(72), np.arange(60)) + 60
    found = csi.read_film(save(tmp_path / "a.jpg", smooth, quality=95))
    assert found.shape == (72, 60) and found.dtype == np.float32 and abs(found - smooth).max() < 4
    shutil.copy(tmp_path / "a.jpg", tmp_path / "b.png")  # what it is counts, not its name
    assert np.array_equal(csi.read_film(tmp_path / "b.png"), found)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_modes_of_a_png(tmp_path, mode):
    pixels = noise().astype(np.uint8)
    if mode == "1":
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise(seed=1).astype(np.uint8)))
    image.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(csi.read_film(tmp_path / "a.png"), pixels)


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    image.putpalette([x for i in range(256) for x in [255 - 10 * i % 256] * 3])
    image.save(tmp_path / "a.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(csi.read_film(tmp_path / "a.png").ravel(), 255 - 10 * np.arange(16))


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_film_as_in_every_viewer(tmp_path, kind, orientation):
    stored = np.zeros((48, 64), np.uint8)
    stored[:24, :32], stored[:24, 32:] = 80, 160  # of four quarters
    stored[24:, 32:] = 240
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"a.{kind}", stored, exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    shown = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
             6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}[orientation]  # fmt: skip
    found = csi.read_film(tmp_path / f"a.{kind}")
    assert found.shape == shown.shape and abs(found - shown).max() <= 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_no_film(tmp_path):
    path = save(tmp_path / "a.jpg", noise(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40)
    assert csi.read_film(path).shape == (72, 60)


def nifti(path, array, **more):
    image = nibabel.Nifti1Image(array, np.eye(4))
    if "slope" in more:
        image.header.set_slope_inter(more["slope"], more["inter"])
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_turned_as_the_original_tool_does(tmp_path, suffix):
    array = noise((60, 72), high=4096).astype(np.int16)
    found = csi.read_film(nifti(tmp_path / f"a{suffix}", array))
    assert np.array_equal(found, np.fliplr(array.T)) and np.array_equal(found, np.rot90(array, -1))
    assert found.dtype == np.float32
    assert np.array_equal(csi.read_film(nifti(tmp_path / f"b{suffix}", array[:, :, None])), found)
    assert np.array_equal(csi.read_film(nifti(tmp_path / f"c{suffix}", array.astype(np.float64))), found)


def test_nifti_is_scaled(tmp_path):
    array = noise((60, 72), high=4096).astype(np.int16)
    path = nifti(tmp_path / "a.nii.gz", array)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:120] = struct.pack("<ff", 0.5, -1024)  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(bytes(raw)))
    assert np.array_equal(csi.read_film(path), np.rot90(array * 0.5 - 1024, -1))


def test_niftis_that_are_no_film(tmp_path):
    for shape in ((8, 8, 3), (8, 8, 1, 2), (8,), (64, 1)):
        with pytest.raises(common.UserError, match="one film of at most 100,000,000 pixels was expected"):
            csi.read_film(nifti(tmp_path / "a.nii.gz", np.zeros(shape, np.int16)))
    colour = np.zeros((8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(common.UserError, match="a.nii: "):
        csi.read_film(nifti(tmp_path / "a.nii", colour))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers(tmp_path, value):
    array = np.ones((8, 8), np.float32)
    array[3, 4] = value
    with pytest.raises(common.UserError, match="has pixels that are not numbers"):
        csi.read_film(nifti(tmp_path / "a.nii.gz", array))


def dicom(path, pixels, bits=12, syntax="1.2.840.10008.1.2.1", **tags):
    """A film as a scanner stores it; PixelData of the caller for compressed syntaxes."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3", "DX"
    values = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": pixels.shape[0],
              "Columns": pixels.shape[1], "BitsAllocated": 16 if bits > 8 else 8, "BitsStored": bits,
              "HighBit": bits - 1, "PixelRepresentation": 0} | tags  # fmt: skip
    encoded = values.pop("encoded", None)
    for name, value in values.items():
        setattr(data, name, value)
    data.PixelData = encoded or pixels.astype(np.uint16 if bits > 8 else np.uint8).tobytes()
    data["PixelData"].VR = "OW" if bits > 8 else "OB"
    if encoded:
        data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    """12 bits in 16, 8 bits; rescaled; MONOCHROME1 is the negative."""
    path, pixels = tmp_path / "a.dcm", noise(high=4096)
    pixels[0, :2] = 0, 4095
    assert np.array_equal(csi.read_film(dicom(path, pixels)), pixels)
    assert np.array_equal(csi.read_film(dicom(path, pixels // 16, bits=8)), pixels // 16)
    scaled = dicom(path, pixels, RescaleSlope="2.5", RescaleIntercept="-100")
    assert np.array_equal(csi.read_film(scaled), pixels * 2.5 - 100)
    assert csi.read_film(scaled).dtype == np.float32
    negative = dicom(path, 4095 - pixels, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(csi.read_film(negative), pixels)
    window = dicom(path, pixels, WindowCenter="2000", WindowWidth="10")
    assert np.array_equal(csi.read_film(window), pixels)  # a display's, not applied
    overlay = dicom(path, pixels + 4096 * noise(high=2))  # bits above those that count
    assert np.array_equal(csi.read_film(overlay), pixels)
    signed = (pixels - 2048).astype(np.int16).view(np.uint16)
    assert np.array_equal(csi.read_film(dicom(path, signed, bits=16, PixelRepresentation=1)), pixels - 2048)


def test_monochrome1_gives_the_model_the_same(tmp_path):
    pixels = noise(high=4000)  # its highest is not the highest of 12 bits
    dicom(tmp_path / "a.dcm", pixels)
    dicom(tmp_path / "b.dcm", 4095 - pixels, PhotometricInterpretation="MONOCHROME1")
    save(tmp_path / "c.png", pixels)
    data = dataset(table(tmp_path, [[n, *SCORES] for n in "abc"]))
    a, b, c = (data.read(i)[0].astype(int) for i in range(3))
    assert np.array_equal(a, c) and abs(a - b).max() <= 1


def test_dicoms_that_are_no_film(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path, pixels = tmp_path / "a.dcm", noise((8, 12), high=4096)
    rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    for make in (lambda: dicom(path, np.zeros((8, 12, 3)), bits=8, **rgb),
                 lambda: dicom(path, np.concatenate([pixels, pixels]), Rows=8, NumberOfFrames=2),
                 lambda: dicom(path, pixels, bits=8, PhotometricInterpretation="PALETTE COLOR")):  # fmt: skip
        with pytest.raises(common.UserError, match="a.dcm: not one grey image"):
            csi.read_film(make())
    data = pydicom.dcmread(dicom(path, pixels))
    del data.PixelData
    data.save_as(path)
    with pytest.raises(common.UserError, match="a.dcm: not one grey image"):
        csi.read_film(path)
    assert np.array_equal(csi.read_film(dicom(path, pixels, NumberOfFrames=1)), pixels)


def test_a_compressed_dicom_without_its_decoder(tmp_path, monkeypatch):
    """JPEG lossless, the usual one of an archive: one line that names it and what helps."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder

    junk = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(64) + b"\xff\xd9"])
    path = dicom(tmp_path / "a.dcm", noise((8, 12)), syntax="1.2.840.10008.1.2.4.70", encoded=junk)
    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg>=2.0",)})
    with pytest.raises(common.UserError) as e:
        csi.read_film(path)
    assert str(e.value).startswith(f"{path}: no decoder of JPEG Lossless") and "\n" not in str(e.value)
    assert "pip install 'pylibjpeg[all]'" in str(e.value)


def test_a_compressed_dicom(tmp_path):
    """Run-length encoding, which pydicom reads by itself."""
    pydicom = pytest.importorskip("pydicom")
    pixels = noise(high=4096) // 256 * 256
    data = pydicom.dcmread(dicom(tmp_path / "a.dcm", pixels))
    data.compress(pydicom.uid.RLELossless)
    data.save_as(tmp_path / "b.dcm")
    assert np.array_equal(csi.read_film(tmp_path / "b.dcm"), pixels)


def test_without_pydicom(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", noise((8, 12)))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(common.UserError, match=r"a.dcm: DICOM needs pydicom .pip install pydicom"):
        csi.read_film(path)


def png_that_claims(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_claims_of_a_header_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    """A small file can claim 4 GB."""
    (tmp_path / "a.png").write_bytes(png_that_claims(10_001, 10_000))
    with pytest.raises(common.UserError, match="at most 100,000,000 pixels"):
        csi.read_film(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png_that_claims(60_000, 60_000))
    (tmp_path / "c.png").write_bytes(png_that_claims(0, 5))
    for name in ("b.png", "c.png"):
        with pytest.raises(common.UserError, match=name):
            csi.read_film(tmp_path / name)
    raw = bytearray(nifti(tmp_path / "a.nii", np.zeros((4, 4), np.int16)).read_bytes())
    raw[42:46] = struct.pack("<hh", 32000, 32000)
    (tmp_path / "a.nii").write_bytes(bytes(raw))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    dicom(tmp_path / "a.dcm", noise((4, 4)), Rows=65535, Columns=65535)
    monkeypatch.setattr(np, "asarray", None)  # what would allocate it
    for name in ("a.nii", "a.nii.gz", "a.dcm"):
        with pytest.raises(common.UserError, match="at most 100,000,000 pixels"):
            csi.read_film(tmp_path / name)


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """One film in each format."""
    folder, pixels = tmp_path_factory.mktemp("formats"), noise(high=4096)
    save(folder / "a.png", pixels)
    save(folder / "a.jpg", pixels // 16)
    nifti(folder / "a.nii", pixels.astype(np.int16))
    nifti(folder / "a.nii.gz", pixels.astype(np.int16))
    dicom(folder / "a.dcm", pixels)
    return folder


KINDS = ["png", "jpg", "nii", "nii.gz", "dcm"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_foreign_files(formats, tmp_path, kind):
    whole = (formats / f"a.{kind}").read_bytes()
    contents = [whole[: int(len(whole) * share)] for share in (0, 0.02, 0.1, 0.5, 0.9)]
    contents += [b"not an image\n", b"GIF89a" + bytes(99), b"<html></html>" * 99, bytes(500)]
    path = tmp_path / f"a.{kind}"
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(common.UserError) as e:
            csi.read_film(path)
        assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value) and len(str(e.value)) < 500
    path.unlink()
    with pytest.raises(common.UserError, match="no such file"):
        csi.read_film(path)
    path.mkdir()
    with pytest.raises(common.UserError, match=f"a.{kind}"):
        csi.read_film(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_raise_nothing_else(formats, tmp_path, kind):
    whole, rng = (formats / f"a.{kind}").read_bytes(), np.random.default_rng(0)
    path, read = tmp_path / f"a.{kind}", 0
    for _ in range(40):
        content = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 600), 3):  # headers are at the front
            content[at] = rng.integers(256)
        path.write_bytes(bytes(content))
        try:
            read += csi.read_film(path).size > 0
        except common.UserError as e:
            assert "\n" not in str(e)
    assert read < 40


# ---- from the file to the tensor


def slow_levels(film, percent):
    """The definition, pixel by pixel in float64: percentiles interpolated between the sorted values."""
    ranks = np.sort(film.astype(float).ravel())

    def percentile(p):
        at = (len(ranks) - 1) * p / 100
        low = int(at)
        return ranks[low] + (at - low) * (ranks[min(low + 1, len(ranks) - 1)] - ranks[low])

    low, high = percentile(percent), percentile(100 - percent)
    return ((film - low) / (high - low)).clip(0, 1)


def slow_resize(image, height, width):
    """Triangle filter as wide as the scale, as matrices."""

    def weights(n, m):
        scale = max(1.0, n / m)
        centre = (np.arange(m) + 0.5) * n / m
        w = np.maximum(0, 1 - abs(np.arange(n) + 0.5 - centre[:, None]) / scale)
        return w / w.sum(1, keepdims=True)

    return weights(image.shape[0], height) @ image @ weights(image.shape[1], width).T


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64), (33, 100), (20, 30)])
@pytest.mark.parametrize("percent", [0, 0.5, 5])
def test_percentiles_and_aspect(tmp_path, shape, percent):
    """Second opinion: sorted values, matrices."""
    film = (np.add.outer(np.arange(shape[0]), 2 * np.arange(shape[1])) * 20 + noise(shape, high=500)).astype(np.uint16)
    save(tmp_path / "a.png", film)
    data = dataset(table(tmp_path, [["a", *SCORES]]), "--clip-percent", percent)
    found, levels = data.read(0)[0] / 65535, slow_levels(film, percent)
    h, w = (round(n * 64 / max(shape)) for n in shape)
    top, left = (64 - h) // 2, (64 - w) // 2
    assert abs(found[top : top + h, left : left + w] - slow_resize(levels, h, w)).max() < 2e-5
    outside = np.ones((64, 64), bool)
    outside[top : top + h, left : left + w] = False
    assert (found[outside] == 0).all() and outside.sum() == 64 * 64 - h * w
    data = dataset(tmp_path, "--clip-percent", percent, "--no-keep-aspect")
    assert abs(data.read(0)[0] / 65535 - slow_resize(levels, 64, 64)).max() < 2e-5


def test_percentiles_of_a_large_film(tmp_path):
    """From every third pixel: within a tenth of a percent; without clipping from all, a single bright pixel counts."""
    film = np.random.default_rng(0).normal(1000, 100, (1500, 1800)).astype(np.float32)
    film[7, 7] = 5000
    found = csi.grey_levels(film.copy(), 0.5, "x")
    assert abs(found - slow_levels(film, 0.5)).max() < 0.02
    assert abs(csi.grey_levels(film.copy(), 0, "x") - slow_levels(film, 0)).max() < 1e-5


def test_a_film_is_not_changed_by_scaling():
    film = noise().astype(np.float32)
    csi.grey_levels(film, 0.5, "x")
    assert np.array_equal(film, noise())


def test_exposure_and_depth_do_not_count(tmp_path):
    film = noise(high=200) + np.arange(60)
    nifti(tmp_path / "a.nii", np.rot90(film.astype(np.float32)))
    nifti(tmp_path / "b.nii", np.rot90((film * 37.7 - 5000).astype(np.float32)))
    save(tmp_path / "c.png", film.clip(0, 255))
    save(tmp_path / "d.png", film.clip(0, 255) * 257)
    data = dataset(table(tmp_path, [[n, *SCORES] for n in "abcd"]))
    a, b, c, d = (data.read(i)[0].astype(int) for i in range(4))
    assert abs(a - b).max() <= 1 and abs(c - d).max() <= 1 and len(np.unique(a)) > 1000


def test_sixteen_bits_reach_the_model(tmp_path):
    """Two films that are the same in 8 bits."""
    film = np.add.outer(np.arange(64) * 500, np.arange(64) * 500)
    save(tmp_path / "a.png", film)
    save(tmp_path / "b.png", film + 100 * (np.arange(64) % 2))
    data = dataset(table(tmp_path, [["a", *SCORES], ["b", *SCORES]]), "--clip-percent", 0)
    a, b = (data[i]["image"] for i in range(2))
    assert a.shape == (1, 64, 64) and a.dtype == torch.float32 and a.min() == 0 and a.max() == 1
    gap = (a - b).abs()
    assert 0 < gap.max() < 1 / 255 and (gap > 0).float().mean() > 0.3 and len(a.unique()) > 120


def test_films_of_one_grey_level(tmp_path):
    save(tmp_path / "a.png", np.full((40, 50), 7))
    data = dataset(table(tmp_path, [["a", *SCORES]]))
    with pytest.raises(common.UserError, match="a.png: the film is of one grey level"):
        data.read(0)


# ---- masks


def lungs(shape=(72, 60)):
    """Two lungs of different heights: the right one of the patient, on the image's left, begins and ends lower."""
    h, w = shape
    left, right = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    left[h // 4 : h - h // 12, w // 8 : w // 2 - 2] = 255
    right[h // 12 : 2 * h // 3, w // 2 + 3 : w - w // 8] = 255
    return left, right


def masked(folder, film=None, swapped=False, masks=None):
    on_left, on_right = masks or lungs()
    save(folder / "a.png", noise() if film is None else film)
    save(folder / f"m/a_{'left' if swapped else 'right'}_lung_mask.png", on_left)
    save(folder / f"m/a_{'right' if swapped else 'left'}_lung_mask.png", on_right)
    return table(folder, [["a", *SCORES]])


def test_zones_are_thirds_of_each_lung(tmp_path):
    folder, (left, right) = masked(tmp_path), lungs()
    data = dataset(folder, "--mask-dir", tmp_path / "m", "--image-size", 72)
    zones = data[0]["zones"].numpy()
    assert zones.shape == (72, 72) and zones.dtype == np.uint8 and data.args.masked
    inner = zones[:, 6:66]  # 60 of 72 columns
    assert np.array_equal(inner > 0, (left > 0) | (right > 0)) and (zones[:, :6] == 0).all()
    for mask, numbers in ((left, [1, 3, 5]), (right, [2, 4, 6])):
        rows = np.flatnonzero(mask.any(1))
        for part, number in zip(np.array_split(rows, 3), numbers, strict=True):
            assert set(np.unique(inner[part][mask[part] > 0])) == {number}


def test_sides_are_by_place_not_by_name(tmp_path):
    """Masks named by the side of the image, as a tool does that takes the image's left for the left lung."""
    data = dataset(masked(tmp_path / "a"), "--mask-dir", tmp_path / "a/m")
    other = dataset(masked(tmp_path / "b", swapped=True), "--mask-dir", tmp_path / "b/m")
    assert torch.equal(data[0]["zones"], other[0]["zones"])


@pytest.mark.parametrize("scale", [0.25, 1, 3, 20])
def test_masks_of_another_size(tmp_path, scale):
    """The same aspect in any size fits; another does not, in any size."""

    def load(folder, *size):
        masks = [np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in lungs()]
        return dataset(masked(folder, noise((360, 300)), masks=masks), "--mask-dir", folder / "m")

    data = load(tmp_path / "a", round(60 * scale), round(72 * scale))
    assert set(np.unique(data[0]["zones"])) == set(range(7))
    with pytest.raises(common.UserError, match=r"_lung_mask.png: .* pixels do not fit the film's .360, 300"):
        load(tmp_path / "b", round(66 * scale), round(66 * scale))[0]


def test_masks_that_are_refused(tmp_path):
    left, right = lungs()
    nothing, line = np.zeros_like(left), np.zeros_like(left)
    line[30, 10:50] = 255
    for i, masks in enumerate([(nothing, right), (left, nothing), (line, right), (left, left)]):
        folder = masked(tmp_path / str(i), masks=masks)
        with pytest.raises(common.UserError, match="mask is empty|leaves no pixel for"):
            dataset(folder, "--mask-dir", folder / "m")[0]
    grey = masked(tmp_path / "grey", masks=(left // 255, right // 2))  # 0 and 1, 0 and 127
    assert set(np.unique(dataset(grey, "--mask-dir", grey / "m")[0]["zones"])) == set(range(7))


def test_missing_masks_are_found_before_the_training(tmp_path):
    masked(tmp_path)
    save(tmp_path / "b.png", noise())
    table(tmp_path, [["a", *SCORES], ["b", *SCORES]])
    with pytest.raises(common.UserError, match=r"no two lung masks for 1 of 2 films, first b_left_lung_mask.png"):
        dataset(tmp_path, "--mask-dir", tmp_path / "m")
    data = dataset(tmp_path, "--mask-dir", tmp_path / "m", "--on-bad-sample", "skip")
    assert data[1]["bad"] == 1 and data[1]["zones"].shape == (64, 64) and data[0]["bad"] == 0
    with pytest.raises(common.UserError, match="b_left_lung_mask.png: no such file"):
        data.read(1)
    for more in ([], ["--on-bad-sample", "skip"]):
        with pytest.raises(common.UserError, match="nowhere: no two lung masks for 2 of 2 films"):
            dataset(tmp_path, "--mask-dir", tmp_path / "nowhere", *more)


# ---- augmentation


def drawn(zones, target):
    """A film whose zones are as bright as their scores: 0.1 outside, 0.2 to 1 for the five values."""
    bright = 0.2 + 0.2 * torch.cat([torch.tensor([-0.5]), target.float()])
    return bright[zones.long()][None]


NORMAL = torch.zeros(6, dtype=torch.long)


def grid_zones(side=96):
    return csi.zone_masks(None, torch.zeros(1, 1, side, side))[0].argmax(0).add(1).to(torch.uint8)


def lung_zones(side=96):
    zones = torch.zeros(side, side, dtype=torch.uint8)
    for i in range(6):
        top, left = 12 + i // 2 * 22 + 6 * (i % 2), 12 + 40 * (i % 2)
        zones[top : top + 22, left : left + 30] = 1 + i
    return zones


@pytest.mark.parametrize("more", [
    {"rotation": 0, "shift": 0, "zoom": 0}, {"rotation": 15, "shift": 0.05, "zoom": 0.1}, {"rotation": 180, "zoom": 0},
])  # fmt: skip
@pytest.mark.parametrize("flip", [0, 1])
def test_film_zones_and_scores_move_together(tmp_path, more, flip):
    """Wherever a film's pixel is as bright as a score, its zone has that score: turned, shifted, scaled, mirrored."""
    args = args_of(tmp_path, "--flip-prob", flip, "--jitter", 0, "--image-size", 96)
    vars(args).update(more)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        target, zones = torch.from_numpy(rng.integers(0, 5, 6)), lung_zones()
        image, moved, found = csi.augmented(drawn(zones, target), zones, target, rng, args)
        expected, inside = drawn(moved, found), moved > 0
        same = (image - expected).abs()[0] < 1e-4
        assert same[inside].float().mean() > 0.8 and inside.sum() > 1000  # all but the borders
        if not more["rotation"]:
            assert same[inside].all() and torch.equal(moved > 0, (zones.flip(1) if flip else zones) > 0)
        wanted = target[[1, 0, 3, 2, 5, 4]] if flip else target
        assert torch.equal(found, wanted) and image.shape == (1, 96, 96) and moved.dtype == torch.uint8


@pytest.mark.parametrize("flip", [0, 1])
def test_scores_fit_the_thirds_and_halves_of_a_mirrored_film(tmp_path, flip):
    """Without masks: what the model takes for zone i is as bright as score i."""
    args = args_of(tmp_path, "--flip-prob", flip, "--jitter", 0, "--rotation", 0, "--shift", 0, "--zoom", 0)
    target = torch.tensor([3, 0, 2, 1, 4, 2])
    film, rng = drawn(grid_zones(), target), np.random.default_rng(0)
    image, zones, found = csi.augmented(film, grid_zones(), target, rng, args)
    means = csi.pool_zones(image[None], csi.zone_masks(zones[None], image[None]))[0, :, 0]
    assert torch.equal(zones, grid_zones()) and torch.allclose(means, 0.2 + 0.2 * found, atol=0.01)


@pytest.mark.parametrize("size", [(200, 300), (300, 200), (90, 90), (37, 301)])
@pytest.mark.parametrize("keep", ["--keep-aspect", "--no-keep-aspect"])
def test_zones_are_thirds_and_halves_of_the_film_not_of_its_frame(tmp_path, size, keep):
    """A film whose thirds are of three greys: each zone holds one of them, whatever the aspect."""
    film = np.repeat(np.float32([[0.2, 0.3], [0.5, 0.6], [0.8, 0.9]]), size[1] // 2, 1)
    film = np.repeat(film, size[0] // 3, 0)
    args = args_of(tmp_path, keep, "--image-size", 224)
    shown, zones = csi.fitted(film, args, Image.Resampling.NEAREST), csi.film_zones(film.shape, args)
    assert ((zones > 0) == (shown > 0)).all()
    for i, grey in enumerate((0.2, 0.3, 0.5, 0.6, 0.8, 0.9)):
        assert abs(np.median(shown[zones == i + 1]) - grey) < 1e-6
        assert (np.abs(shown[zones == i + 1] - grey) < 1e-6).mean() > 0.85


@pytest.mark.parametrize("flip", [0, 1])
def test_a_turn_is_a_turn(tmp_path, flip):
    """Lengths stay: no shear and no stretching in a film that is padded to a square."""
    args = args_of(tmp_path, "--flip-prob", flip, "--jitter", 0, "--shift", 0, "--zoom", 0, "--rotation", 40)
    y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")
    disc = ((x**2 + y**2).sqrt() < 30).float()[None]
    for seed in range(5):
        found = csi.augmented(disc, grid_zones(96), NORMAL, np.random.default_rng(seed), args)[0]
        assert (found - disc).abs().mean() < 0.01


def test_brightness_and_contrast_stay_within(tmp_path):
    args, image = args_of(tmp_path, "--jitter", 0.5), torch.rand(1, 64, 64)
    seen = []
    for seed in range(50):
        found = csi.augmented(image, grid_zones(64), NORMAL, np.random.default_rng(seed), args)[0]
        assert 0 <= found.min() and found.max() <= 1
        seen.append(float(found.mean()))
    assert np.std(seen) > 0.05 and 0.3 < np.mean(seen) < 0.7
    vars(args).update(rotation=0, shift=0, zoom=0, jitter=0.2)
    image, ratios, gaps = 0.4 + 0.2 * image, [], []
    for seed in range(50):
        found = csi.augmented(image, grid_zones(64), NORMAL, np.random.default_rng(seed), args)[0]
        ratios.append(float(found.std() / image.std()))
        gaps.append(float(found.mean() - image.mean()))
    assert 0.8 < min(ratios) < 0.85 and 1.15 < max(ratios) < 1.2  # contrast
    assert -0.1 < min(gaps) < -0.08 and 0.08 < max(gaps) < 0.1  # brightness


def test_mirrored_twice_is_the_film():
    target, zones = torch.tensor([0, 1, 2, 3, 4, 1]), lung_zones()
    one = csi.mirrored(target, zones)
    assert one[0].tolist() == [1, 0, 3, 2, 1, 4] and torch.equal((one[1] == 0), zones == 0)
    assert torch.equal(one[1][zones == 3], torch.full_like(one[1][zones == 3], 4))
    again = csi.mirrored(*one)
    assert torch.equal(again[0], target) and torch.equal(again[1], zones)
    batch = torch.stack([target, target.flip(0)])
    assert torch.equal(csi.mirrored(batch, zones)[0][0], one[0])


# ---- items


def items(data, epoch, workers=0):
    args = data.args
    args.num_workers, args.timeout_minutes = workers, 1
    with common.process_group("cpu") as ctx:
        batches = [[(epoch, i) for i in part] for part in np.array_split(np.arange(len(data)), 3)]
        return [batch for batch in common.data_loader(data, batches, args, ctx)]


def same_items(one, other):
    return all(torch.equal(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in a)


def test_an_item_is_a_function_of_seed_epoch_and_index(tiny_films, tmp_path):
    def data(*more):
        words = film_args(tiny_films, tmp_path, *more)[1:]
        return csi.ChestFilms(csi.parse_args([str(w) for w in words]), "train", True)

    first = data()
    expected = items(first, 3)
    assert sorted(expected[0]) == ["bad", "image", "index", "target", "zones"] and len(expected) == 3
    assert same_items(items(first, 3), expected) and same_items(items(data(), 3, workers=2), expected)
    kept = data()
    kept.load_to_memory("films")
    assert same_items(items(kept, 3), expected) and same_items(items(kept, 3, workers=1), expected)
    assert not same_items(items(first, 4), expected) and not same_items(items(data("--seed", 1), 3), expected)
    assert torch.equal(first[3, 5]["image"], items(first, 3)[0]["image"][5])
    plain = data("--no-augment")
    assert same_items(items(plain, 3), items(plain, 4))
    for i in (0, 7):
        assert torch.equal(plain[3, i]["image"][0], torch.from_numpy(plain.read(i)[0].astype(np.float32) / 65535))
        assert plain[3, i]["target"].tolist() == plain.targets[i].tolist()
    flips = [not torch.equal(first[e, 0]["target"], plain[0, 0]["target"]) for e in range(60)]
    assert 18 <= sum(flips) <= 42


def test_evaluation_is_never_augmented(tiny_films, tmp_path):
    args = csi.parse_args([str(w) for w in film_args(tiny_films, tmp_path, "--augment")[1:]])
    data = csi.build_datasets(args)[1]
    assert not data.train and same_items(items(data, 0), items(data, 5))
    for i in range(len(data)):
        assert torch.equal(data[9, i]["image"][0], torch.from_numpy(data.read(i)[0].astype(np.float32) / 65535))
        assert data[i]["target"].tolist() == data.targets[i].tolist() and data[i]["index"] == i


def test_a_training_step_does_not_change_the_targets(tiny_films, tmp_path):
    data = csi.ChestFilms(csi.parse_args([str(w) for w in film_args(tiny_films, tmp_path)[1:]]), "train", True)
    before = data.targets.copy()
    batch = items(data, 0)[0]
    batch["target"] += 9
    assert np.array_equal(data.targets, before)


# ---- unreadable films


def damaged(folder, names, bad, *more, train=True):
    films(folder, names)
    for name in bad:
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:300])
    rows = [[n, *np.random.default_rng(i).integers(0, 4, 6)] for i, n in enumerate(names)]
    table(folder, rows)
    return dataset(folder, "--no-augment", *more, train=train)


@pytest.mark.parametrize("memory", [False, True])
def test_a_bad_sample_ends_the_run_or_is_replaced(tmp_path, memory):
    def load(*more):
        data = damaged(tmp_path, "abcde", "bce", *more)
        if memory:
            data.load_to_memory("films")
        return data

    data = load()
    with pytest.raises(common.UserError, match="b.png: damaged"):
        data[0, 1]
    data = load("--on-bad-sample", "skip")
    for index, source, bad in ((0, 0, 0), (1, 3, 2), (2, 3, 1), (3, 3, 0), (4, 0, 1)):  # the next film and its scores
        item = data[0, index]
        assert item["target"].tolist() == data.targets[source].tolist() and item["bad"] == bad
        assert torch.equal(item["image"], data[0, source]["image"]) and item["index"] == index and item["image"].any()


def test_all_bad(tmp_path):
    data = damaged(tmp_path, "abc", "abc", "--on-bad-sample", "skip")
    with pytest.raises(common.UserError, match="damaged"):
        data[0, 1]


def test_in_evaluation_a_bad_sample_is_marked_and_has_no_answer(tmp_path):
    with pytest.raises(common.UserError, match="b.png: damaged"):
        damaged(tmp_path, "abcd", "bd", train=False)[1]
    data = damaged(tmp_path, "abcd", "bd", "--on-bad-sample", "skip", "--model", "Custom_1", "--num-workers", 0,
                   train=False)  # fmt: skip
    assert [int(data[i]["bad"]) for i in range(4)] == [0, 1, 0, 1]
    args = data.args
    model = csi.ZoneModel(args).eval()
    with common.process_group("cpu") as ctx:
        out = csi.predict(model, data, ctx)
        metrics = csi.evaluate(model, data, csi.build_criterion(args, None), ctx)
    assert out["failed"] == [1, 3] and np.isnan(out["probs"][[1, 3]]).all() and np.isfinite(out["probs"][[0, 2]]).all()
    assert metrics["n_missing"] == 2
    one = damaged(tmp_path / "whole", "ac", "", "--model", "Custom_1", "--num-workers", 0, train=False)
    for name in "ac":
        shutil.copy(tmp_path / f"{name}.png", tmp_path / f"whole/{name}.png")
    one.targets = data.targets[[0, 2]]
    with common.process_group("cpu") as ctx:
        alone = csi.evaluate(model, one, csi.build_criterion(args, None), ctx)
    assert {k: v for k, v in alone.items() if v == v and k != "n_missing"} == {
        k: v for k, v in metrics.items() if v == v and k != "n_missing"
    }


def test_bad_samples_of_a_run_are_listed(tiny_films, tmp_path, capsys):
    folder = shutil.copytree(tiny_films, tmp_path / "data")
    (folder / "images/3.png").write_bytes(b"nothing")
    (folder / "images/5.png").unlink()
    (folder / "images/17.png").write_bytes(b"nothing")
    words = film_args(folder, tmp_path / "run", "--epochs", 1)[1:]
    assert "no film for 1 of 16 rows" in mistake(*words, capsys=capsys)
    skip = [*words, "--on-bad-sample", "skip", "--max-bad-fraction", 0.2]
    assert common.run_main(lambda: csi.main([str(w) for w in skip])) == 0
    listed = pd.read_csv(tmp_path / "run/bad_samples.csv")
    assert listed["id"].tolist() == [3, 5] and listed["path"][0] == str(folder / "images/3.png")
    assert '"n_missing": 1' in (tmp_path / "run" / csi.RESULTS).read_text()
    few = [*words, "--on-bad-sample", "skip", "--overwrite", "--max-bad-fraction", 0.1]
    assert "2 of 16 training samples are unreadable" in mistake(*few, capsys=capsys)


# ---- --mode check


def test_check_of_good_films(tiny_films, tmp_path):
    result = run(*film_args(tiny_films, tmp_path, "--mode", "check"))
    with open(tmp_path / "check/films.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["FileID"] for r in rows] == [str(i) for i in range(26)] and rows[4]["height"] == "72"
    assert float(rows[4]["highest"]) <= 255 and 0 < float(rows[4]["mean"]) < 1 and "error" not in rows[4]
    assert "26 films; 0, 20 patients" in result.stdout and "0 films could not be read, 0 other" in result.stdout
    assert "split: train: 16, val: 7, test: 3\n" in result.stdout
    assert result.stdout.count("Normal:") == 6 and not list(tmp_path.glob("split.csv"))
    with Image.open(tmp_path / "check/films.png") as image:
        assert image.size[0] > 6 * 200 and image.size[1] > 4 * 200 and image.mode == "RGB"
        assert np.asarray(image).std() > 30


def test_check_lists_problems(tmp_path, capsys):
    names = list("abcdef")
    rows = [[n, *SCORES, 1.5, "p" if n in "ab" else n, "train" if n < "b" else "val"] for n in names]
    rows[2][7] = 2.5
    films(tmp_path, names, "csi", "patient", "split", rows=rows)
    (tmp_path / "d.png").write_bytes(b"=cmd()")
    (tmp_path / "e.png").unlink()
    shutil.copy(tmp_path / "a.png", tmp_path / "f.png")
    words = ["--csv", tmp_path / "t.csv", "--image-dir", tmp_path, "--mode", "check", "--output-dir", tmp_path / "out"]
    assert common.run_main(lambda: csi.main([str(w) for w in words])) == 3
    out = capsys.readouterr()
    problems = [x.removeprefix("problem: ") for x in out.err.splitlines() if x.startswith("problem: ")]
    assert problems[0].endswith("patient p is in several splits (1 are)")
    assert problems[1:2] == ["c: csi is 2.5, the mean of its zones 1.50"]
    assert "d.png: damaged" in problems[2] and "e.*: no such file" in problems[3]
    assert problems[4:] == ["f: the same film as a"]
    assert "2 films could not be read, 3 other problems" in out.out
    listed = pd.read_csv(tmp_path / "out/check/films.csv")
    assert listed["error"].notna().tolist() == [False, False, False, True, True, False]
    for name in "de":
        save(tmp_path / f"{name}.png", noise(seed=ord(name)))
    assert common.run_main(lambda: csi.main([str(w) for w in words])) == 0


def test_check_draws_masks(tmp_path, capsys):
    masked(tmp_path)
    words = ["--csv", tmp_path / "t.csv", "--image-dir", tmp_path, "--mask-dir", tmp_path / "m", "--mode", "check"]
    assert common.run_main(lambda: csi.main([str(w) for w in [*words, "--output-dir", tmp_path / "out"]])) == 0
    assert (tmp_path / "out/check/films.png").stat().st_size > 1000
    film, zones = np.zeros((64, 64), np.uint8), dataset(tmp_path, "--mask-dir", tmp_path / "m")[0]["zones"].numpy()
    tile = np.asarray(csi.film_tile(film, zones, "a", np.array([0, 1, 2, 3, 4, 0])))
    whole = np.asarray(csi.film_tile(film, csi.thirds_and_halves(*film.shape), "a", np.array([0, 1, 2, 3, 4, 0])))
    lines = [(x == (130, 130, 0)).all(2) for x in (tile, whole)]
    assert lines[0].sum() > 300 and lines[1].sum() > 600 and not np.array_equal(*lines)


def test_check_of_the_real_films(shared, tmp_path):
    folder = shared / "data/cxr"
    words = ["--csv", folder / "zone_scores.csv", "--image-dir", folder / "images", "--image-column", "image_path"]
    args = csi.parse_args([str(w) for w in [*words, "--output-dir", tmp_path, "--pretrained", "none"]])
    args.mode = "check"
    assert csi.check_films(args) == 0
    data = csi.ChestFilms(args, "val", False)
    assert len(data) == 30 and data.reader2.shape == (30, 6) and set(data.views) >= {"PA", "AP Supine"}
    raw = pd.read_csv(folder / "zone_scores.csv").set_index("FileID")
    for i in (0, 9, 29):
        assert data.targets[i].tolist() == raw.loc[data.ids[i], list(ZONES)].tolist()
    table = csi.read_scores(args.csv, args).drop(columns="split")
    assert len(set(csi.new_split(table, args.split_share, 1))) == 3
    assert data.groups[0].startswith("b") and Path(data.paths[0]).is_file()


def test_a_patients_name_is_no_formula(tmp_path):
    """In what a spreadsheet opens."""
    films(tmp_path, ["a"], "patient", rows=[["a", *SCORES, "=1+1"]])
    args = args_of(tmp_path)
    assert csi.check_films(args) == 0
    assert "a,'=1+1," in (args.output_dir / "check/films.csv").read_text()
