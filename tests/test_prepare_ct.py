"""prepare_ct.py: NIfTI -> npz -> cache on real volumes, resumption after kill -9, bad samples, and the checks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED, run
from test_ct_volumes import SPACING, chest, save_nifti

import common
import prepare_ct
from common import CT_RATE_LABELS, UserError, read_volume, sample_volume

REAL = SHARED / "data" / "ct"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no CT volumes at {REAL}")


def prepare(*words) -> int:
    """In this process, without workers: the commands of most tests."""
    return prepare_ct.main([*map(str, words), "--num-workers", "0"])


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture
def tree(tmp_path):
    """Five scans in the CT-RATE tree, labels (one cell unknown, one -1) and metadata; valid_2 has stored values."""
    rows = []
    for i, name in enumerate(["train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1", "valid_2_a_1"]):
        folder = tmp_path / "dataset" / name.split("_")[0] / name.rsplit("_", 2)[0] / name.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        stored = chest(seed=i).clip(-1024) + (1024 if name == "valid_2_a_1" else 0)
        save_nifti(folder / f"{name}.nii.gz", stored, ["LPS", "RAS", "LPI", "SAR", "LPS"][i])
        rows.append([f"{name}.nii.gz", *[(i + k) % 2 for k in range(18)]])
    labels = pd.DataFrame(rows, columns=["VolumeName", *CT_RATE_LABELS]).astype(str)
    labels.iloc[0, 1], labels.iloc[1, 2] = "", "-1"
    labels.to_csv(tmp_path / "labels.csv", index=False)
    metadata = labels[["VolumeName"]].assign(RescaleSlope="1", RescaleIntercept="0")
    metadata.loc[4, "RescaleIntercept"] = "-1024"
    metadata.to_csv(tmp_path / "metadata.csv", index=False)
    return tmp_path


def volumes_command(tree, out="npz", *more):
    words = ["volumes", "--nifti-dir", tree / "dataset", "--labels", tree / "labels.csv", "--out", tree / out]
    return [*words, "--metadata", tree / "metadata.csv", *more]


def truth(name: str) -> np.ndarray:
    return chest(seed=["train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1", "valid_2_a_1"].index(name)).clip(
        -1024
    )


def test_from_the_tree_to_the_cache(tree):
    assert prepare(*volumes_command(tree)) == 0
    table = read(tree / "npz" / "all_ct_wlabels.csv")
    assert list(table.columns) == ["series_id", "split", "img_path", *CT_RATE_LABELS]
    assert table["split"].tolist() == ["train"] * 3 + ["val"] * 2
    assert table.iloc[0, 3] == "" and table.iloc[1, 4] == ""  # an empty cell and -1 are both unknown
    np.testing.assert_array_equal(table.iloc[2, 3:].to_numpy(int), [k % 2 for k in range(18)])
    for row in table.itertuples():
        with np.load(tree / "npz" / row.img_path, allow_pickle=False) as file:
            assert file["image"].dtype == np.int16 and file["spacing"].dtype == np.float32
            np.testing.assert_array_equal(file["image"][0], truth(row.series_id))
            np.testing.assert_array_equal(file["spacing"], np.float32(SPACING))

    assert prepare("cache", "--csv", tree / "npz" / "all_ct_wlabels.csv", "--out", tree / "cache") == 0
    cached = read(tree / "cache" / "volumes.csv")
    pd.testing.assert_frame_equal(cached.iloc[:, 3:21], table.iloc[:, 3:])
    for row in cached.to_dict("records"):
        got = read_volume(tree / "cache" / row["img_path"], **common.volume_options(row))
        np.testing.assert_array_equal(got.array, truth(row["series_id"]))
        assert got.spacing == SPACING and got.notes == ()

    sizes = ["--num-slices", 6, "--image-size", 16]
    assert prepare("cache", "--csv", tree / "npz" / "all_ct_wlabels.csv", "--out", tree / "small", *sizes) == 0
    again = ["cache", "--csv", tree / "small" / "volumes.csv", "--out", tree / "again", *sizes]
    assert prepare(*again) == 0  # sampling the sampled: nothing changes
    for row in read(tree / "small" / "volumes.csv").itertuples():
        once = np.load(tree / "small" / row.img_path)
        np.testing.assert_array_equal(once, sample_volume(truth(row.series_id), SPACING, 6, 16))
        np.testing.assert_array_equal(np.load(tree / "again" / row.img_path), once)
        assert [float(v) for v in (row.spacing_z, row.spacing_y, row.spacing_x)] == [5, 1.125, 0.75]


def test_rescale_columns_of_the_csv_are_applied_and_then_dropped(tree):
    rows = [
        ["valid_2_a_1", "val", "dataset/valid/valid_2/valid_2_a/valid_2_a_1.nii.gz", 1, "1", "-1024", "2", "3", "4"]
    ]
    columns = ["series_id", "split", "img_path", "Emphysema", *common.RESCALE_COLUMNS, *common.SPACING_COLUMNS]
    pd.DataFrame(rows, columns=columns).to_csv(tree / "t.csv", index=False)
    assert prepare("cache", "--csv", tree / "t.csv", "--out", tree / "cache") == 0
    np.testing.assert_array_equal(np.load(tree / "cache" / "valid_2_a_1.npy"), truth("valid_2_a_1"))
    table = read(tree / "cache" / "volumes.csv")
    assert table.columns.tolist() == ["series_id", "split", "img_path", "Emphysema", *common.SPACING_COLUMNS]
    assert table.iloc[0, -3:].astype(float).tolist() == [2, 3, 4]


def test_metadata_on_top_of_converted_volumes_changes_nothing(tree):
    prepare(*volumes_command(tree))
    command = ["cache", "--csv", tree / "npz" / "all_ct_wlabels.csv", "--metadata", tree / "metadata.csv"]
    assert prepare(*command, "--out", tree / "cache") == 0
    np.testing.assert_array_equal(np.load(tree / "cache" / "valid_2_a_1.npy"), truth("valid_2_a_1"))


@needs_real
def test_real_volumes_are_bit_equal_as_nifti_npz_and_cache(tmp_path):
    source, labels = ["--metadata", REAL / "metadata.csv"], ["--labels", REAL / "labels_partial.csv"]
    run("prepare_ct.py", "volumes", "--nifti-dir", REAL, "--out", tmp_path / "npz", *source, *labels)
    table = read(tmp_path / "npz" / "all_ct_wlabels.csv")
    partial = read(REAL / "labels_partial.csv")
    assert (table[CT_RATE_LABELS].to_numpy() == partial[CT_RATE_LABELS].to_numpy()).all() and len(table) == 12
    direct = table.assign(img_path=[str(REAL / f"{i}.nii.gz") for i in table["series_id"]])
    direct.to_csv(tmp_path / "direct.csv", index=False)
    sizes = ["--num-slices", 24, "--image-size", 96]
    caches = {
        "from_npz": ["--csv", tmp_path / "npz" / "all_ct_wlabels.csv"],
        "from_nifti": ["--csv", tmp_path / "direct.csv", *source],
        "small_npz": ["--csv", tmp_path / "npz" / "all_ct_wlabels.csv", *sizes],
        "small_nifti": ["--csv", tmp_path / "direct.csv", *source, *sizes],
    }
    for name, words in caches.items():
        assert prepare("cache", *words, "--out", tmp_path / name) == 0
    rescale = read(REAL / "metadata.csv").set_index("VolumeName")["RescaleIntercept"]
    for row in table.itertuples():
        nifti = read_volume(REAL / f"{row.series_id}.nii.gz", rescale=(1, float(rescale[f"{row.series_id}.nii.gz"])))
        npz = read_volume(tmp_path / "npz" / row.img_path)
        assert nifti.spacing == npz.spacing
        for got in [npz.array, *(np.load(tmp_path / n / f"{row.series_id}.npy") for n in ("from_npz", "from_nifti"))]:
            np.testing.assert_array_equal(got, nifti.array)
        sampled = sample_volume(nifti.array, nifti.spacing, 24, 96)
        for n in ("small_npz", "small_nifti"):
            np.testing.assert_array_equal(np.load(tmp_path / n / f"{row.series_id}.npy"), sampled)
    for one, other in (("from_npz", "from_nifti"), ("small_npz", "small_nifti")):
        assert (tmp_path / one / "volumes.csv").read_bytes() == (tmp_path / other / "volumes.csv").read_bytes()
    air = np.percentile(np.load(tmp_path / "from_nifti" / "valid_1_a_1.npy"), 10)
    assert -1010 < air < -980


# ---- runs that end early


@pytest.fixture
def many(tmp_path):
    """40 volumes that take a few seconds to convert."""
    rows, volume = [], chest((80, 160, 160))
    for i in range(40):
        np.savez(tmp_path / f"v{i}.npz", image=volume + i)
        rows.append([f"train_{i}_a_1", "train", f"v{i}.npz", i % 2])
    pd.DataFrame(rows, columns=["series_id", "split", "img_path", "Emphysema"]).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path


def outputs(folder: Path) -> dict[str, bytes]:
    names = [p for p in folder.iterdir() if p.suffix in (".npy", ".csv")]
    return {p.name: p.read_bytes() for p in names}


def processes_of(group: int) -> list[str]:
    stats = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat") if os.access(p, os.R_OK)]
    return [s for s in stats if s.rsplit(")", 1)[1].split()[2] == str(group) and s.rsplit(")", 1)[1].split()[0] != "Z"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_continues(many, stop):
    def command(out):
        return ["prepare_ct.py", "cache", "--csv", many / "t.csv", "--out", many / out, "--num-slices", 64,
                "--image-size", 128, "--num-workers", 2]  # fmt: skip

    prepare(*command("whole")[1:])
    process = subprocess.Popen(
        [sys.executable, *map(str, command("cut"))], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list((many / "cut").glob("*.npy"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)  # only the parent: its workers have to notice
    assert process.wait(60) == (-9 if stop == signal.SIGKILL else 143)
    while os.path.isdir("/proc") and processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.isdir("/proc") or not processes_of(process.pid), "workers were left behind"
    done = {p.name: p.stat().st_mtime_ns for p in (many / "cut").glob("*.npy")}
    assert 5 <= len(done) < 40, "it finished before it was stopped" if len(done) == 40 else done
    assert not (many / "cut" / "volumes.csv").exists()
    lines = (many / "cut" / "progress.jsonl").read_text().split("\n")[:-1]
    noted = [json.loads(line)["key"]["id"] for line in lines if line]
    (many / "cut" / ".v.npy.tmp123").write_bytes(b"half")  # what a kill in the middle of a write leaves
    with (many / "cut" / "progress.jsonl").open("a") as file:
        file.write('{"key": {"id": "train_3')

    message = run(*command("cut")).stderr
    assert "are there already" in message
    assert outputs(many / "cut") == outputs(many / "whole")
    assert not list((many / "cut").glob(".*.tmp*"))
    kept = {n for n, t in done.items() if (many / "cut" / n).stat().st_mtime_ns == t}
    assert noted and {f"{i}.npy" for i in noted} <= kept


def test_only_what_changed_is_done_again(tree):
    prepare(*volumes_command(tree))
    csv, out = tree / "npz" / "all_ct_wlabels.csv", tree / "cache"
    command = ["cache", "--csv", csv, "--out", out]

    def redone():
        before = {p: p.stat().st_mtime_ns for p in out.glob("*.npy")}
        assert prepare(*command) == 0
        return sorted(p.stem for p, t in before.items() if p.stat().st_mtime_ns != t)

    prepare(*command)
    command += ["--max-voxels", 10**6]  # no part of the result
    assert redone() == []
    (out / "train_2_a_1.npy").write_bytes((out / "train_2_a_1.npy").read_bytes()[:-2])  # cut short
    (out / "train_1_a_1.npy").write_bytes(b"x" * (out / "train_1_a_1.npy").stat().st_size)  # not an array
    assert redone() == ["train_1_a_1", "train_2_a_1"]
    shutil.copyfile(tree / "npz" / "valid_1_a_1.npz", tree / "npz" / "valid_2_a_1.npz")  # another source
    assert redone() == ["valid_2_a_1"]
    np.testing.assert_array_equal(np.load(out / "valid_2_a_1.npy"), truth("valid_1_a_1"))
    command += ["--num-slices", 4, "--image-size", 8]  # other settings
    assert len(redone()) == 5
    assert np.load(out / "train_1_a_1.npy").shape == (4, 8, 8)
    shutil.move(out, tree / "moved")
    out = tree / "moved"
    command[4] = out
    assert redone() == []


def test_labels_and_splits_of_ones_own(tree):
    """--label-columns; the columns patient_id and split of the label table reach the CSV of the training."""
    own = read(tree / "labels.csv")[["VolumeName"]].assign(fracture=["1", "0", "", "-1", "1"], patient_id=list("aabcd"))
    own.assign(split=["test", "test", "train", "val", "valid"]).to_csv(tree / "labels.csv", index=False)
    with pytest.raises(UserError, match="column 'Medical material' is missing"):
        prepare(*volumes_command(tree))
    assert prepare(*volumes_command(tree), "--label-columns", "fracture") == 0
    table = read(tree / "npz" / "all_ct_wlabels.csv")
    assert list(table.columns) == ["series_id", "split", "img_path", "fracture", "patient_id"]
    assert table["split"].tolist() == ["test", "test", "train", "val", "val"]
    assert table["fracture"].tolist() == ["1", "0", "", "", "1"] and table["patient_id"].tolist() == list("aabcd")
    (tree / "labels.csv").rename(tree / "npz" / "all_ct_wlabels.csv")
    with pytest.raises(UserError, match="is read, and would be overwritten"):
        words = ["volumes", "--nifti-dir", tree / "dataset", "--out", tree / "npz"]
        prepare(*words, "--labels", tree / "npz" / "all_ct_wlabels.csv", "--label-columns", "fracture")


def test_two_runs_into_one_folder_are_refused(tree, monkeypatch):
    monkeypatch.setattr(prepare_ct.time, "sleep", lambda seconds: None)
    with prepare_ct.output_folder(tree / "npz", "x.csv"):
        with pytest.raises(UserError, match="another run"):
            prepare(*volumes_command(tree))


# ---- bad input


def test_a_bad_volume_ends_the_run_or_is_listed(tree):
    bad = tree / "dataset" / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:500])
    for workers in (0, 2):
        result = run("prepare_ct.py", *volumes_command(tree, f"fail{workers}"), "--num-workers", workers, check=2)
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "train_2_a_1.nii.gz" in last and "Traceback" not in result.stderr
        assert not (tree / f"fail{workers}" / "all_ct_wlabels.csv").exists()
    assert (tree / "fail0" / "train_1_a_1.npz").exists()

    assert prepare(*volumes_command(tree, "skip"), "--on-bad-sample", "skip") == 3
    listed = read(tree / "skip" / "bad_samples.csv")
    assert listed["series_id"].tolist() == ["train_2_a_1"] and "damaged" in listed["error"][0]
    assert "train_2_a_1" not in read(tree / "skip" / "all_ct_wlabels.csv")["series_id"].tolist()
    save_nifti(bad, truth("train_2_a_1"))  # repaired: the same command finishes
    assert prepare(*volumes_command(tree, "skip"), "--on-bad-sample", "skip") == 0
    assert not (tree / "skip" / "bad_samples.csv").exists()
    assert len(read(tree / "skip" / "all_ct_wlabels.csv")) == 5


def test_a_missing_file_is_known_before_any_work(tree):
    prepare(*volumes_command(tree))
    (tree / "npz" / "valid_2_a_1.npz").unlink()
    command = ["cache", "--csv", tree / "npz" / "all_ct_wlabels.csv", "--out", tree / "cache"]
    with pytest.raises(UserError, match=r"valid_2_a_1.npz: no such file \(1 of 5"):
        prepare(*command)
    assert not list((tree / "cache").glob("*.npy"))
    assert prepare(*command, "--on-bad-sample", "skip") == 3


def edit(path, change):
    table = read(path)
    change(table).to_csv(path, index=False)


def test_mistakes_in_the_tables_are_named(tree):
    def fails(match, *more):
        with pytest.raises(UserError, match=match):
            prepare(*volumes_command(tree), *more)

    original = (tree / "labels.csv").read_text()
    edit(tree / "labels.csv", lambda t: t.iloc[1:])
    fails("no row for 1 of 5 volumes, first train_1_a_1")
    assert prepare(*volumes_command(tree), "--unlabelled", "keep") == 0
    assert (read(tree / "npz" / "all_ct_wlabels.csv").iloc[0, 3:] == "").all()
    (tree / "labels.csv").write_text(original.replace("Cardiomegaly", "Cardiomegali"))
    fails("column 'Cardiomegaly' is missing .did you mean 'Cardiomegali'")
    (tree / "labels.csv").write_text(original.replace("train_1_a_2", "train_1_a_1"))
    fails("train_1_a_1 has two rows")
    edit(tree / "labels.csv", lambda t: t.assign(VolumeName=range(5), Emphysema="yes"))
    fails("row 2, column 'Emphysema': 'yes' is no label")
    (tree / "labels.csv").write_text(original)
    fails("no such column", "--split-column", "fold")
    edit(tree / "labels.csv", lambda t: t.assign(fold=["val", "val", "test", "train", "maybe"]))
    fails("valid_2_a_1: no split, column 'fold' says 'maybe'", "--split-column", "fold")
    edit(tree / "labels.csv", lambda t: t.replace("maybe", "valid"))
    assert prepare(*volumes_command(tree), "--split-column", "fold") == 0
    assert read(tree / "npz" / "all_ct_wlabels.csv")["split"].tolist() == ["val", "val", "test", "train", "val"]
    (tree / "labels.csv").write_text(original)
    edit(tree / "metadata.csv", lambda t: t.iloc[:-1])
    fails("no row for valid_2_a_1")
    edit(tree / "metadata.csv", lambda t: t.assign(RescaleIntercept="low"))
    fails("not all numbers")
    with pytest.raises(UserError, match="no .nii.gz, .nii, .mha in it"):
        (tree / "empty").mkdir()
        prepare("volumes", "--nifti-dir", tree / "empty", "--out", tree / "npz")
    save_nifti(tree / "dataset" / "scan7.nii.gz", chest())
    with pytest.raises(UserError, match="scan7: no split, its name"):
        prepare("volumes", "--nifti-dir", tree / "dataset", "--out", tree / "npz")
    (tree / "dataset" / "twice").mkdir()
    shutil.copyfile(tree / "dataset" / "scan7.nii.gz", tree / "dataset" / "twice" / "scan7.nii.gz")
    with pytest.raises(UserError, match="the same volume name"):
        prepare("volumes", "--nifti-dir", tree / "dataset", "--out", tree / "npz")


def test_spacing_of_the_metadata_is_used(tree):
    edit(tree / "metadata.csv", lambda t: t.assign(XYSpacing="[0.7, 0.7]", ZSpacing="1.5"))
    assert prepare(*volumes_command(tree)) == 0
    assert read_volume(tree / "npz" / "train_1_a_1.npz").spacing == (1.5, 0.7, 0.7)


def test_ids_cannot_leave_the_folder(tree):
    rows = [["../../evil", "train", "a.npz", 1], [".hidden", "val", "a.npz", 0]]
    pd.DataFrame(rows, columns=["series_id", "split", "img_path", "Emphysema"]).to_csv(tree / "t.csv", index=False)
    np.savez(tree / "a.npz", image=chest())
    assert prepare("cache", "--csv", tree / "t.csv", "--out", tree / "deep" / "cache") == 0
    assert read(tree / "deep" / "cache" / "volumes.csv")["img_path"].tolist() == ["_._.._evil.npy", "_hidden.npy"]
    assert {p.name for p in tree.iterdir()} >= {"deep"} and not list(tree.glob("evil*"))
    edit(tree / "t.csv", lambda t: t.assign(series_id=["a/b", "a_b"]))
    with pytest.raises(UserError, match="the same output file a_b.npy"):
        prepare("cache", "--csv", tree / "t.csv", "--out", tree / "deep" / "cache")


def test_flags_that_do_not_fit(tree):
    prepare(*volumes_command(tree))
    csv = ["cache", "--csv", tree / "npz" / "all_ct_wlabels.csv", "--out", tree / "cache"]
    for words, match in [
        (["--num-slices", 4], "belong together"),
        (["--slice-spacing", 2], "needs both"),
        (["--num-slices", 0, "--image-size", 8], "above 0"),
    ]:
        with pytest.raises(UserError, match=match):
            prepare(*csv, *words)
    prepare(*csv)
    with pytest.raises(UserError, match="would be overwritten"):
        prepare("cache", "--csv", tree / "cache" / "volumes.csv", "--out", tree / "cache")
    np.savez(tree / "npz" / "train_1_a_1.npz", image=chest())
    with pytest.raises(UserError, match=r"train_1_a_1.npz: slices a number of mm apart need the volume's spacing"):
        prepare(*csv, "--num-slices", 4, "--image-size", 8, "--slice-spacing", 3)
    with pytest.raises(UserError, match="over the cap"):
        prepare(*csv, "--max-voxels", 100)


# ---- check


def test_check_passes_good_data_with_its_facts(tree):
    prepare(*volumes_command(tree))
    result = run("prepare_ct.py", "check", "--csv", tree / "npz" / "all_ct_wlabels.csv")
    assert "5 volumes of 4 patients" in result.stdout and "0 errors, " in result.stdout
    assert "12 x 20 x 24 (5)" in result.stdout and "spacing z: 2.5 to 2.5 mm" in result.stdout
    line = next(x for x in result.stdout.splitlines() if x.startswith("Medical material"))
    assert line.split(maxsplit=2)[2].split() == "1 / 1 / 1 1 / 1 / 0".split()


def test_check_finds_what_was_planted(tree):
    csv = tree / "npz" / "t.csv"
    prepare(*volumes_command(tree))
    good = read(tree / "npz" / "all_ct_wlabels.csv")
    stored, cut = tree / "npz" / "stored.npz", tree / "npz" / "cut.npz"
    np.savez(stored, image=chest().clip(-1024) + 1024)
    cut.write_bytes((tree / "npz" / "train_1_a_1.npz").read_bytes()[:-400])
    more = good.iloc[[0, 0, 0, 0, 0, 0]].copy()
    more["series_id"] = ["train_1_a_1", "train_1_b_1", "train_5_a_1", "train_6_a_1", "train_7_a_1", "train_8_a_1"]
    more["img_path"] = ["train_1_a_1.npz", "train_1_a_2.npz", "stored.npz", "cut.npz", "gone.npz", "train_2_a_1.npz"]
    more["split"] = ["train", "val", "train", "train", "train", "holdout"]
    pd.concat([good, more]).assign(Emphysema="0").to_csv(csv, index=False)
    result = run("prepare_ct.py", "check", "--csv", csv, check=2)
    errors = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    for words in [
        "series_id train_1_a_1 stands in rows 2, 7",
        "row 12: split 'holdout' is not known",
        "patient train_1 is in train and val",
        "gone.npz: no such file",
        "cut.npz: damaged",
    ]:
        assert sum(words in e for e in errors) == 1, (words, errors)
    assert len(errors) == 5
    assert "train_1_a_2.npz is the volume of train_1_a_2, train_1_b_1" in result.stdout
    assert "looks like stored values, not HU" in result.stdout and "first train_5_a_1" in result.stdout
    assert "train: no positive for 1 labels, so no AUROC: Emphysema" in result.stdout
    assert "no spacing known: 1 volumes, first train_5_a_1" in result.stdout
    assert "shapes" not in run("prepare_ct.py", "check", "--csv", csv, "--no-read", check=2).stdout


@needs_real
def test_check_of_the_real_volumes_warns_of_the_one_with_stored_values(tmp_path):
    labels = read(REAL / "labels.csv")
    table = pd.DataFrame({"series_id": labels["VolumeName"].str.removesuffix(".nii.gz"), "split": "train"})
    table["img_path"] = [str(REAL / n) for n in labels["VolumeName"]]
    table = pd.concat([table, labels[CT_RATE_LABELS]], axis=1)
    table.to_csv(tmp_path / "t.csv", index=False)
    bare = run("prepare_ct.py", "check", "--csv", tmp_path / "t.csv").stdout
    assert "give RescaleSlope and RescaleIntercept): 1 volumes, first valid_1_a_1" in bare
    assert "stored axes LPS: 9 volumes" in bare and "stored axes LPI: 2 volumes" in bare
    told = run("prepare_ct.py", "check", "--csv", tmp_path / "t.csv", "--metadata", REAL / "metadata.csv").stdout
    assert "looks like stored values" not in told and "rescaled by slope 1, intercept -1000: 1 volumes" in told


def test_every_flag_has_help(capsys):
    for command in ("volumes", "cache", "check"):
        with pytest.raises(SystemExit) as end:
            prepare_ct.main([command, "--help"])
        assert end.value.code == 0
        flags = [x for x in capsys.readouterr().out.split("options:")[1].splitlines() if x.startswith("  -")]
        assert len(flags) > 7
    parser = prepare_ct.argparse.ArgumentParser()
    prepare_ct.add_reading(parser)
    prepare_ct.add_output(parser, "files")
    assert all(action.help for action in parser._actions)
