"""MetaImage volumes and 2-D slices in common.py: reading, choice, windows, storage; and prepare_ct.py slices."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED, run
from test_ct_volumes import SPACING, chest, refused, save_nifti
from test_prepare_ct import prepare, read, tree  # noqa: F401 (a fixture)

import common
from common import CT_RATE_LABELS, UserError, read_volume

CODES = ["".join(c) for p in itertools.permutations(["SI", "PA", "LR"]) for c in itertools.product(*p)]
REAL = sorted((SHARED / "data" / "ct").glob("*.nii.gz"))


# ---- MetaImage


def save_mha(path, volume, code="LPS", dtype=np.int16, compress=False):
    """(D, H, W) = S, P, L volume with spacing SPACING, written by SimpleITK with its axes along `code`."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(volume.astype(dtype))
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-7.0, 11.0, 5.0))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, code), str(path), compress)
    return path


@pytest.mark.parametrize("code", CODES)
def test_mha_of_all_orientations_against_simpleitk(tmp_path, code):
    volume = read_volume(save_mha(tmp_path / "v.mha", chest(), code, compress=CODES.index(code) % 2 == 0))
    assert (volume.array == chest()).all() and volume.spacing == SPACING
    assert f"stored axes {code}" in volume.notes


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint8, np.float32, np.float64])
def test_mha_types(tmp_path, dtype):
    values = chest().clip(0, 255) if dtype in (np.uint8, np.uint16) else chest()
    volume = read_volume(save_mha(tmp_path / "v.mha", values, dtype=dtype), value_range="hu")
    assert (volume.array == values).all()


def test_oblique_mha_agrees_with_nifti(tmp_path):
    """The same turned image through both writers of SimpleITK."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(chest())
    image.SetSpacing((0.8, 0.7, 2.0))
    turn = SimpleITK.Euler3DTransform((0, 0, 0), 0.2, -0.3, 2.0).GetMatrix()
    image.SetDirection(turn)
    for name in ("v.mha", "v.nii.gz"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
    a, b = (read_volume(tmp_path / name) for name in ("v.mha", "v.nii.gz"))
    assert (a.array == b.array).all() and np.allclose(a.spacing, b.spacing, rtol=1e-5)


def test_hostile_and_damaged_mha(tmp_path):
    whole = save_mha(tmp_path / "v.mha", chest()).read_bytes()
    header, data = whole.split(b"ElementDataFile = LOCAL\n")
    packed = save_mha(tmp_path / "z.mha", chest(), compress=True).read_bytes()
    bad = tmp_path / "bad.mha"
    for content, said in (
        (whole[:-10], "it ends after"),
        (whole[:60], "not a MetaImage header"),
        (b"", "not a MetaImage header"),
        (packed[:-30], "damaged"),
        (header + b"ElementDataFile = ../../etc/passwd\n" + data, "in another file"),
        (header + b"ElementDataFile = LIST\n" + data, "in another file"),
        (whole.replace(b"MET_SHORT", b"MET_OTHER"), "elements of type MET_OTHER"),
        (whole.replace(b"DimSize = 24 20 12", b"DimSize = 90000 90000 9000"), "over the cap"),
        (packed.replace(b"DimSize = 24 20 12", b"DimSize = 24 20 6"), "of 5760 bytes"),
        (whole.replace(b"DimSize = 24 20 12", b"DimSize = 24 20"), "(X, Y, Z) was expected"),
        (whole.replace(b"TransformMatrix = 1 0 0", b"TransformMatrix = 0 0 0"), "singular"),
        (whole.replace(b"TransformMatrix = 1", b"TransformMatrix = x"), "damaged"),
        (b"a = b\n" * 20000 + whole, "not a MetaImage header"),
    ):
        bad.write_bytes(content)
        assert said in refused(bad), said


# ---- slices of a volume


def test_window_levels_against_a_loop():
    hu = torch.tensor([-2000, -1000, -999, -301, -300, 399, 400, 3000], dtype=torch.int16).view(1, 2, 4)
    low, width = torch.tensor([-1000.0, -160]).view(2, 1, 1), torch.tensor([1400.0, 400]).view(2, 1, 1)
    levels = common.window_levels(hu, low, width)
    assert levels.shape == (2, 2, 4)
    for c, (lo, w) in enumerate(((-1000, 1400), (-160, 400))):
        for found, value in zip(levels[c].flatten().tolist(), hu.flatten().tolist(), strict=True):
            exact = min(max((value - lo) / w, 0), 1) * 255
            assert found == int(found) and abs(found - exact) <= 0.5 + 1e-3


def test_windows_by_name_and_number():
    assert common.parse_windows(["lung", "40,400"]) == [(-600, 1000), (40, 400)]
    for bad in ("liver", "40", "40,0", "40,-1", "40,nan", "1,inf"):
        with pytest.raises(UserError, match="--windows"):
            common.parse_windows([bad])


def test_chest_range_is_the_longest_run_of_structure():
    rng = np.random.default_rng(0)
    volume = np.full((60, 40, 40), -1000, np.int16)
    volume[3:9] = rng.normal(0, 200, (6, 40, 40))  # a short island
    volume[20:50] = rng.normal(-200, 400, (30, 40, 40))
    first, last = common.chest_range(volume)
    assert 20 <= first <= 24 and 45 <= last <= 49


def test_strategies_take_the_documents_positions():
    """On a volume that is chest from end to end: 20 % below, 60 % in the middle, 20 % above; six levels; one."""
    volume = np.random.default_rng(0).normal(-300, 300, (101, 32, 32)).astype(np.int16)
    first, last = common.chest_range(volume)

    def at(levels):
        return sorted({first + round(x * (last - first)) for x in levels})

    expected = at([*np.linspace(0, 0.3, 2), *np.linspace(0.25, 0.75, 7), *np.linspace(0.7, 1, 3)])
    assert common.pick_slices(volume, "multi_slice", 12) == expected and len(expected) == 12
    assert common.pick_slices(volume, "anatomical") == at([0.1, 0.25, 0.4, 0.55, 0.7, 0.85])
    for n in (1, 2, 3, 30):
        index = common.pick_slices(volume, "multi_slice", n)
        assert index == sorted(set(index)) and 1 <= len(index) <= n and first <= index[0] and index[-1] <= last
    volume[60] = np.random.default_rng(1).choice([-1000, 400], (32, 32))  # the most structure, the sharpest edges
    assert common.pick_slices(volume, "best_slice") == [60]
    one = volume[:1]
    assert all(common.pick_slices(one, s) == [0] for s in ("multi_slice", "best_slice", "anatomical"))
    with pytest.raises(UserError, match="not known"):
        common.pick_slices(volume, "random")


def test_stored_slices_are_one_path():
    """Grey levels stored at extraction equal HU stored and windowed later; sizes as sample_volume makes them."""
    volume = chest((30, 50, 70))
    index = [3, 9, 20]
    hu = common.stored_slices(volume, index, 32, "hu", (-300, 1400))
    levels = common.stored_slices(volume, index, 32, "uint8", (-300, 1400))
    assert hu.dtype == np.int16 and levels.dtype == np.uint8 and hu.shape == levels.shape == (3, 32, 32)
    later = common.window_levels(torch.from_numpy(hu)[:, None], torch.tensor(-1000.0), torch.tensor(1400.0))
    assert (later[:, 0].numpy() == levels).all()
    assert (hu == common.sample_volume(volume[index], None, 3, 32)).all()
    assert (common.resize_slices(levels, 32) is levels) and common.resize_slices(levels, 16).dtype == np.uint8
    assert common.resize_slices(levels[:, :20], 20)[:, 0].max() == 0  # padded with the darkest level


def test_read_slice(tmp_path):
    path = tmp_path / "s.npy"
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for array in (grey, (grey / 255).astype(np.float32), (grey / 255).astype(np.float16), grey[None], grey[..., None]):
        np.save(path, array)
        assert (common.read_slice(path) == grey).all() and common.read_slice(path).dtype == np.uint8
    np.save(path, grey.astype(np.int16) - 1000)
    assert common.read_slice(path).dtype == np.int16 and common.read_slice(path).min() == -1000
    for array, said in (
        (np.full((4, 4), 2.0), "outside 0 to 1"), (np.full((4, 4), np.nan), "outside 0 to 1"),
        (np.zeros((2, 4, 4), np.uint8), "one slice"), (np.zeros(4), "(H, W) was expected"),
        (np.zeros((4, 4), np.int64), "type int64"), (np.zeros((4, 4), complex), "plain integers or floats"),
        (np.array([[None]]), "damaged"),
    ):  # fmt: skip
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError) as e:
            common.read_slice(path)
        assert said in str(e.value) and "s.npy" in str(e.value), str(e.value)
    with pytest.raises(UserError, match="no such slice"):
        common.read_slice(tmp_path / "gone.npy")


# ---- prepare_ct.py slices


def test_slices_of_a_tree(tree):  # noqa: F811
    """Names, columns, files and pixels of the layout; labels of every volume; one array a split, in any orientation."""
    out = tree / "ct_rate_2d"
    words = [
        "slices",
        "--data-dir",
        tree / "dataset",
        "--labels",
        tree / "labels.csv",
        "--metadata",
        tree / "metadata.csv",
    ]
    assert prepare(*words, "--output-dir", out, "--image-size", 16, "--slices-per-volume", 5) == 0
    table = read(out / "splits" / "train_slices.csv")
    columns = ["slice_id", "volume_name", "slice_index", "relative_position", "file_path", "slice_shape"]
    columns += ["original_volume_shape", "split", "patient_id", "packed_row", *CT_RATE_LABELS]
    assert list(table.columns) == columns
    row = table.iloc[0]
    assert row["slice_id"] == f"train_1_a_1.nii.gz_slice_{int(row['slice_index']):03d}"
    assert row["file_path"] == f"slices/train/{row['slice_id']}.npy" and row["slice_shape"] == "[16, 16]"
    assert row["original_volume_shape"] == "[12, 20, 24]" and row["split"] == "train" and row["patient_id"] == "train_1"
    labels = read(tree / "labels.csv").set_index("VolumeName").replace("-1", "")
    for split in ("train", "valid"):
        table = read(out / "splits" / f"{split}_slices.csv")
        pack = np.load(out / "packed" / f"{split}.npy", mmap_mode="r")
        assert pack.dtype == np.uint8 and len(pack) == len(table)
        for _, row in table.iterrows():
            file = np.load(out / row["file_path"])
            assert file.dtype == np.float32 and file.shape == (16, 16) and 0 <= file.min() <= file.max() <= 1
            assert (common.read_slice(out / row["file_path"]) == pack[int(row["packed_row"])]).all()
            assert list(row[CT_RATE_LABELS]) == list(labels.loc[row["volume_name"], CT_RATE_LABELS])
            name, intercept = row["volume_name"], -1024 if row["volume_name"].startswith("valid_2") else 0
            path = next((tree / "dataset").rglob(name))
            whole = read_volume(path, rescale=(1, intercept)).array
            expected = common.stored_slices(whole, [int(row["slice_index"])], 16, "uint8", (-300, 1400))[0]
            assert (pack[int(row["packed_row"])] == expected).all()
    of_volumes = read(out / "multi_abnormality_labels.csv")
    assert len(of_volumes) == 5 and list(of_volumes["split"]) == ["train"] * 3 + ["valid"] * 2
    notes = json.loads((out / "slice_extraction_stats.json").read_text())
    assert notes["settings"]["window"] == [-300, 1400] and notes["splits"]["train"]["volumes"] == 3
    assert (out / "sample_slices_visualization.png").stat().st_size > 1000


def test_flags_of_slices(tree, capsys):  # noqa: F811
    words = ["slices", "--data-dir", tree / "dataset", "--labels", tree / "labels.csv", "--image-size", 16]
    hu = tree / "hu"
    assert prepare(*words, "--output-dir", hu, "--store", "hu", "--strategy", "anatomical", "--no-slice-files") == 0
    assert np.load(hu / "packed" / "train.npy").dtype == np.int16 and not (hu / "slices").exists()
    assert read(hu / "splits" / "train_slices.csv").groupby("volume_name").size().max() <= 6
    lung = tree / "lung"
    assert prepare(*words, "--out", lung, "--window", "lung", "--strategy", "best_slice", "--splits", "valid") == 0
    assert not (lung / "packed" / "train.npy").exists() and len(read(lung / "splits" / "valid_slices.csv")) == 2
    assert len(read(lung / "multi_abnormality_labels.csv")) == 5
    wide = tree / "wide"
    assert prepare(*words, "--out", wide, "--strategy", "best_slice", "--splits", "valid") == 0
    assert (np.load(lung / "packed" / "valid.npy") != np.load(wide / "packed" / "valid.npy")).any()
    with pytest.raises(UserError, match="holds slices of other settings"):
        prepare(*words, "--out", wide, "--window", "bone", "--strategy", "best_slice", "--splits", "valid")
    assert prepare(*words, "--out", wide, "--window", "bone", "--strategy", "best_slice", "--overwrite") == 0
    assert json.loads((wide / "slice_extraction_stats.json").read_text())["settings"]["window"] == [700, 1500]
    table = read(tree / "labels.csv").assign(where=["train", "train", "train", "train", "val"])
    table.to_csv(tree / "other.csv", index=False)
    words[4] = tree / "other.csv"
    assert prepare(*words, "--out", tree / "by_column", "--split-column", "where") == 0
    assert read(tree / "by_column" / "splits" / "train_slices.csv")["volume_name"].nunique() == 4


def test_other_columns_of_slices(tree, capsys):  # noqa: F811
    """What is no label is named, what --label-columns names is one; the table that is read stays as it is."""
    data = tree / "dataset"
    table = read(tree / "labels.csv").assign(age="60", Pneumothorax=["1", "0", "", "0", "1"])
    table.to_csv(data / "multi_abnormality_labels.csv", index=False)
    words = ["slices", "--data-dir", data, "--image-size", 16, "--strategy", "best_slice", "--no-slice-files"]
    assert prepare(*words, "--out", tree / "a") == 0
    assert "not taken as labels: age, Pneumothorax (--label-columns)" in capsys.readouterr().err
    assert prepare(*words, "--out", tree / "b", "--label-columns", "Pneumothorax") == 0
    assert read(tree / "b" / "multi_abnormality_labels.csv")["Pneumothorax"].tolist() == ["1", "0", "", "0", "1"]
    with pytest.raises(UserError, match="multi_abnormality_labels.csv: is read, and would be overwritten"):
        prepare(*words, "--out", data)
    pd.testing.assert_frame_equal(read(data / "multi_abnormality_labels.csv"), table)


def test_labels_are_found_in_a_ct_rate_folder(tree):  # noqa: F811
    """multi_abnormality_labels.csv at the top, or the folder of the same name as published; -1 becomes empty."""
    labels = read(tree / "labels.csv")
    top = tree / "dataset" / "multi_abnormality_labels.csv"
    labels.to_csv(top, index=False)
    words = ["slices", "--data-dir", tree / "dataset", "--image-size", 16, "--slices-per-volume", 3]
    assert prepare(*words, "--out", tree / "a") == 0
    top.unlink()
    hub = tree / "dataset" / "multi_abnormality_labels"
    hub.mkdir()
    for split in ("train", "valid"):
        part = labels[labels["VolumeName"].str.startswith(split)]
        part.to_csv(hub / f"{split}_predicted_labels.csv", index=False)
    assert prepare(*words, "--out", tree / "b") == 0
    assert (tree / "a" / "multi_abnormality_labels.csv").read_bytes() == (
        tree / "b" / "multi_abnormality_labels.csv"
    ).read_bytes()
    shutil.rmtree(hub)
    with pytest.raises(UserError, match="--unlabelled keep"):
        prepare(*words, "--out", tree / "c")
    assert prepare(*words, "--out", tree / "c", "--unlabelled", "keep") == 0
    assert not (tree / "c" / "multi_abnormality_labels.csv").exists()
    named = labels.iloc[1:].assign(split="train").assign(split=lambda t: ["train"] * 2 + ["valid"] * 2)
    named.to_csv(top, index=False)  # a volume without a row has its split in its name
    assert prepare(*words, "--out", tree / "e", "--unlabelled", "keep") == 0
    assert read(tree / "e" / "splits" / "train_slices.csv")["volume_name"].nunique() == 3
    own = labels[["VolumeName"]].assign(COVID="1", Other="0")  # another label set
    own.to_csv(top, index=False)
    assert prepare(*words, "--out", tree / "d") == 0
    assert {"COVID", "Other"} <= set(read(tree / "d" / "splits" / "train_slices.csv").columns)


@pytest.mark.parametrize(
    ("more", "change", "message"),
    [
        ([], lambda t: edit(t, lambda x: x.iloc[1:]), "no row for 1 of 5 volumes"),
        ([], lambda t: edit(t, lambda x: x.assign(patient_id="p")), "patient p is in"),
        ([], lambda t: edit(t, lambda x: x.assign(Emphysema="yes")), "'yes' is no label"),
        (["--splits", "test"], lambda t: None, "none of 5 volumes is in test"),
        (["--window", "x"], lambda t: None, "'x' is neither of"),
        (["--image-size", 4], lambda t: None, "--image-size at least 8"),
        (["--data-dir", "nowhere"], lambda t: None, "no such folder"),
    ],
)
def test_mistakes_of_slices(tree, more, change, message):  # noqa: F811
    change(tree)
    words = ["slices", "--data-dir", tree / "dataset", "--labels", tree / "labels.csv", "--out", tree / "o", *more]
    with pytest.raises(UserError, match=message):
        prepare(*words)


def edit(tree, change):  # noqa: F811
    change(read(tree / "labels.csv")).to_csv(tree / "labels.csv", index=False)


def test_unreadable_volumes_of_slices(tree, capsys):  # noqa: F811
    path = next((tree / "dataset").rglob("train_2_a_1.nii.gz"))
    path.write_bytes(path.read_bytes()[:500])
    words = ["slices", "--data-dir", tree / "dataset", "--labels", tree / "labels.csv", "--out", tree / "o"]
    with pytest.raises(UserError, match="train_2_a_1"):
        prepare(*words)
    assert prepare(*words, "--on-bad-sample", "skip") == 3
    assert read(tree / "o" / "bad_samples.csv")["series_id"].tolist() == ["train_2_a_1"]
    assert read(tree / "o" / "splits" / "train_slices.csv")["volume_name"].nunique() == 2


def test_slices_go_on_after_kill_9_and_take_new_volumes(tree):  # noqa: F811
    """Killed while it writes, cut in the middle of a slice: the same tables and pixels; a later volume is added."""
    words = ["slices", "--data-dir", tree / "dataset", "--labels", tree / "labels.csv", "--image-size", 16]
    assert prepare(*words, "--out", tree / "whole") == 0
    again = tree / "again"
    process = subprocess.Popen(
        [sys.executable, "prepare_ct.py", *map(str, words), "--out", str(again), "--num-workers", "1"],
        cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    journal, deadline = again / "progress.jsonl", time.time() + 60
    while not (journal.exists() and journal.read_text().count("key")) and time.time() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pack = again / "packed" / "train.npy"
    with pack.open("ab") as file:
        file.write(b"half a slice")
    assert prepare(*words, "--out", again) == 0
    for split in ("train", "valid"):
        a, b = (read(f / "splits" / f"{split}_slices.csv") for f in (tree / "whole", again))
        pixels = [np.load(f / "packed" / f"{split}.npy") for f in (tree / "whole", again)]
        assert a.drop(columns="packed_row").equals(b.drop(columns="packed_row"))
        for i, j in zip(a["packed_row"].astype(int), b["packed_row"].astype(int), strict=True):
            assert (pixels[0][i] == pixels[1][j]).all()
    before = np.load(pack).copy()
    folder = tree / "dataset" / "train" / "train_9" / "train_9_a"
    folder.mkdir(parents=True)
    save_nifti(folder / "train_9_a_1.nii.gz", chest(seed=9))
    edit(tree, lambda t: pd.concat([t, t.iloc[:1].assign(VolumeName="train_9_a_1.nii.gz")]))
    assert prepare(*words, "--out", again) == 0
    after = np.load(pack)
    assert (after[: len(before)] == before).all() and len(after) > len(before)
    table = read(again / "splits" / "train_slices.csv")
    new = table[table["volume_name"] == "train_9_a_1.nii.gz"]["packed_row"].astype(int)
    assert new.min() == len(before) and new.max() == len(after) - 1
    (again / new.index.map(lambda i: table["file_path"][i])[0]).unlink()  # a lost file: that volume is done again
    assert prepare(*words, "--out", again) == 0
    assert all((again / p).exists() for p in table["file_path"])


@pytest.mark.slow
def test_workers_write_the_same_slices(tree):  # noqa: F811
    words = ["slices", "--data-dir", tree / "dataset", "--labels", tree / "labels.csv", "--image-size", 16]
    assert prepare(*words, "--out", tree / "one") == 0
    run("prepare_ct.py", *words, "--out", tree / "two", "--num-workers", 2)
    for split in ("train", "valid"):
        a, b = (read(tree / f / "splits" / f"{split}_slices.csv") for f in ("one", "two"))
        pixels = [np.load(tree / f / "packed" / f"{split}.npy") for f in ("one", "two")]
        rows = [t["packed_row"].astype(int).to_numpy() for t in (a, b)]
        assert (pixels[0][rows[0]] == pixels[1][rows[1]]).all() and a["slice_id"].equals(b["slice_id"])


@pytest.mark.skipif(not REAL, reason=f"no CT volumes at {SHARED / 'data' / 'ct'}")
def test_real_volumes_in_every_orientation(tmp_path):
    """The twelve real volumes: the spine behind in the stored slices of all; an intercept of -1000 applied once."""
    source = SHARED / "data" / "ct"
    words = ["slices", "--data-dir", source, "--labels", source / "labels_partial.csv", "--image-size", 96]
    assert prepare(*words, "--metadata", source / "metadata.csv", "--out", tmp_path, "--no-slice-files") == 0
    for split in ("train", "valid"):
        table = read(tmp_path / "splits" / f"{split}_slices.csv")
        pack = np.load(tmp_path / "packed" / f"{split}.npy", mmap_mode="r")
        for name, part in table.groupby("volume_name"):
            image = pack[part["packed_row"].astype(int).to_numpy()].mean(0)  # (96, 96)
            assert 30 < image.mean() < 200, name  # shifted by 1000 HU it would be all black or all white
            middle = slice(38, 58)
            bone = (pack[part["packed_row"].astype(int).to_numpy()] == 255).mean(0)[:, middle]  # above 400 HU
            if name.startswith(("train_1_", "train_2_", "train_7_", "valid_1_")):  # whole chests, not crops
                assert bone[48:].mean() > bone[:48].mean(), name  # the spine lies behind the sternum's half
