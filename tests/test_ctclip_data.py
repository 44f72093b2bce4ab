"""CT-CLIP's data: the official preprocessing, orientation, HU sources, the tables of CT-RATE, the cache, real scans."""

import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_ct_volumes import SPACING, chest, save_nifti

import common
import demo_data
import prepare_ct
from common import CT_RATE_LABELS, CTCLIP_SIZE, CTCLIP_SPACING, UserError, ctclip_cases, ctclip_volume

SMALL = (24, 48, 48)  # by whole factors of the full size
NAMES = ["train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1"]


def official(volume, spacing, grid=CTCLIP_SIZE) -> torch.Tensor:
    """(S, P, L) HU -> (S, L, P) float64: nii_img_to_tensor of CT-CLIP's data_inference_nii.py, line by line."""
    array = torch.from_numpy(np.clip(volume.astype(np.float64), -1000, 1000).transpose(0, 2, 1).copy())
    scale = [s / t for s, t in zip((spacing[0], spacing[2], spacing[1]), CTCLIP_SPACING, strict=True)]
    new = [int(n * s) for n, s in zip(array.shape, scale, strict=True)]
    array = F.interpolate(array[None, None], size=new, mode="trilinear", align_corners=False)[0, 0] / 1000
    starts = [max((n - t) // 2, 0) for n, t in zip(new, grid, strict=True)]
    array = array[tuple(slice(s, min(s + t, n)) for s, t, n in zip(starts, grid, new, strict=True))]
    pads = []
    for n, t in reversed(list(zip(array.shape, grid, strict=True))):
        before = (t - n) // 2
        pads += [before, t - n - before]
    return F.pad(array, pads, value=-1) * 1000


def far(one, other) -> float:
    """Largest difference in units of 1000 HU."""
    return float((torch.as_tensor(one).double() - torch.as_tensor(other).double()).abs().max()) / 1000


def saved(path, volume, axes="LPS", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_nifti(path, volume, axes, **more)


def prepare(*words) -> int:
    return prepare_ct.main(["ctclip", *map(str, words), "--num-workers", "0"])


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


# ---- the official preprocessing

SHAPES = [  # (S, P, L) voxels and mm: resized smaller or larger than the grid, odd differences, one voxel
    ((30, 41, 37), (1.5, 0.75, 0.75)),
    ((12, 20, 24), (2.5, 0.75, 0.5)),
    ((9, 80, 70), (5.0, 0.644531, 0.9)),
    ((61, 33, 90), (0.6, 1.7, 0.31)),
    ((2, 50, 21), (3.0, 0.7, 2.2)),
    ((25, 47, 49), (1.44, 0.75, 0.74)),
]


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_it_is_the_official_preprocessing(tmp_path, monkeypatch, shape, spacing):
    """On a grid of odd sizes, so that crops and pads of all kinds occur, values beyond +-1000 HU among them."""
    grid = (24, 45, 40)
    monkeypatch.setattr(common, "CTCLIP_SIZE", grid)
    volume = (chest(shape) * 1.3).astype(np.int16)
    path = save_nifti(tmp_path / "v.nii.gz", volume, spacing=spacing)
    got, notes = ctclip_volume(path, grid, spacing=spacing)
    assert got.dtype == np.float32 and got.shape == grid and notes[0] == "stored axes LPS"
    assert -1000 <= got.min() and got.max() <= 1000
    assert far(got, official(volume, spacing, grid)) < 1e-6
    assert far(ctclip_volume(path, grid)[0], got) < 1e-6  # the spacing of the file
    blocks = F.avg_pool3d(official(volume, spacing, grid)[None, None], (3, 5, 4))[0, 0]
    assert far(ctclip_volume(path, (8, 9, 10), spacing=spacing)[0], blocks) < 1e-6


def test_at_full_size(tmp_path):
    volume, spacing = chest((70, 90, 110)), (2.0, 4.5, 3.0)
    path = save_nifti(tmp_path / "v.nii.gz", volume, spacing=spacing)
    got, wanted = ctclip_volume(path)[0], official(volume, spacing)
    assert got.shape == CTCLIP_SIZE and far(got, wanted) < 1e-6
    assert (got[:73] == -1000).all() and (got[:, :20] == -1000).all()  # 140 of 360 mm, 330 of 360 mm are scanned
    assert (got[..., 0] > -1000).any()  # 405 of 360 mm
    small = ctclip_volume(path, SMALL)[0]
    assert far(small, F.avg_pool3d(wanted[None, None], (10, 10, 10))[0, 0]) < 1e-6


def test_a_spacing_that_is_rounded_on_reading_costs_no_voxel(tmp_path):
    """512 voxels of 0.64453125 mm are 330 mm = 440 voxels; of 0.644531 mm they would be 439."""
    spacing = (0.75, 0.75, 0.64453125)
    path = save_nifti(tmp_path / "v.nii.gz", chest((4, 6, 512)), spacing=spacing)
    for options in ({}, {"spacing": spacing}):
        scanned = (ctclip_volume(path, **options)[0] > -1000).any((0, 2))
        assert scanned.sum() == 440


# ---- orientation


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LPI"])
def test_a_marked_voxel_stays_on_its_side(tmp_path, axes):
    """High, left, in front; the axes of the result run toward S, L, P, and air is -1000."""
    volume = np.full((40, 60, 60), -1024, np.int16)
    volume[10:30, 15:45, 15:45] = 40
    volume[26:28, 18:21, 38:42] = 900
    path = save_nifti(tmp_path / "v.nii.gz", volume, axes, spacing=(3.0, 1.5, 1.5))
    got, notes = ctclip_volume(path)
    place = np.argwhere(got > 890)
    assert notes == (f"stored axes {axes}",) and len(place)
    # the scan's 80 x 120 x 120 voxels stand in the middle; a voxel of the scan is two of ours
    middle = np.array([80 + 2 * 27, 180 + 2 * 40, 180 + 2 * 19.5]) - 0.5
    np.testing.assert_allclose(place.mean(0), middle, atol=0.1)
    air = got[[0, -1, 100], [0, -1, 200], [0, -1, 200]]
    assert (air == -1000).all() and got.min() == -1000
    assert far(got, official(volume, (3.0, 1.5, 1.5))) < 1e-6


# ---- Hounsfield units


def write_scaled(path, stored, slope, intercept):
    """A NIfTI file with a scaling in its header."""
    save_nifti(path, stored)
    image = nib.load(path)
    header = image.header.copy()
    raw = bytearray(path.read_bytes())
    header.set_slope_inter(slope, intercept)
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


def test_each_hu_source_has_its_effect(tmp_path):
    hu = chest().clip(-1000, 900)
    path = write_scaled(tmp_path / "v.nii", hu - 100, 1, 60)  # the header leaves 40 HU to the metadata

    def highest(**options):
        return float(ctclip_volume(path, SMALL, spacing=(30, 15, 15), **options)[0].max())

    base = highest(hu_source="header")
    assert highest(hu_source="header", rescale=(1, 40)) == base
    assert highest(hu_source="csv", rescale=(1, 40)) == pytest.approx(base + 40, abs=0.1)
    assert highest(hu_source="none", rescale=(1, 40)) == pytest.approx(base - 60, abs=0.1)
    assert highest(hu_source="auto", rescale=(1, 40)) == base  # not after the header's scaling
    with pytest.raises(UserError, match="v.nii: no RescaleSlope"):
        highest(hu_source="csv")
    with pytest.raises(UserError, match="hu-source 'dicom' is not known"):
        highest(hu_source="dicom")


def test_stored_values_become_hu_by_the_metadata(tmp_path):
    hu = chest().clip(-1000)
    path = save_nifti(tmp_path / "v.nii.gz", hu + 8192)
    for source in ("auto", "csv"):
        got = ctclip_volume(path, hu_source=source, rescale=(1, -8192))[0]
        assert far(got, official(hu, SPACING)) < 1e-6
    for options in ({"hu_source": "none"}, {"hu_source": "header", "rescale": (1, -8192)}, {}):
        with pytest.raises(UserError, match="v.nii.gz: constant bone"):
            ctclip_volume(path, SMALL, **options)


def test_the_trap_of_ct_rate_v2(tmp_path):
    """Files that hold HU beside the old metadata with an intercept of -8192: auto sees it, csv refuses the air."""
    hu = chest()
    path = save_nifti(tmp_path / "v.nii.gz", hu)
    got, notes = ctclip_volume(path, rescale=(1, -8192))
    assert far(got, official(hu, SPACING)) < 1e-6
    assert any("RescaleIntercept -8192 not applied" in n for n in notes)
    with pytest.raises(UserError) as e:
        ctclip_volume(path, hu_source="csv", rescale=(1, -8192))
    message = str(e.value)
    assert all(w in message for w in ("v.nii.gz", "constant air", "-8192", "--hu-source")) and "\n" not in message
    np.testing.assert_array_equal(ctclip_volume(path, hu_source="none", rescale=(1, -8192))[0], got)


def test_what_cannot_be_done_is_said(tmp_path):
    np.savez(tmp_path / "v.npz", image=chest())
    with pytest.raises(UserError, match="no spacing known"):
        ctclip_volume(tmp_path / "v.npz")
    assert ctclip_volume(tmp_path / "v.npz", SMALL, spacing=SPACING)[0].shape == SMALL
    for size in ((23, 48, 48), (0, 48, 48), (48, 48), (480, 480, 480)):
        with pytest.raises(UserError, match="does not divide"):
            ctclip_volume(tmp_path / "v.npz", size, spacing=SPACING)


# ---- the tables


@pytest.fixture
def hub(tmp_path):
    """dataset/ as the hub has it: four volumes of three patients, one without a report, texts that need care."""
    root = tmp_path / "dataset"
    texts = {
        "train_1_a_1": ("Lungs are clear.", "Normal."),
        "train_1_a_2": ("- Nodule, left.", "Not given."),
        "valid_1_a_1": ("Not given.", "=Effusion\nof 2 cm"),
    }
    for i, name in enumerate(NAMES):
        folder = root / name.split("_")[0] / name.rsplit("_", 2)[0] / name.rsplit("_", 1)[0]
        stored = chest(seed=i) + (1024 if name == "train_2_a_1" else 0)
        saved(folder / f"{name}.nii.gz", stored, ["LPS", "RAS", "LPI", "LPS"][i])
    for split, long in (("train", "train"), ("valid", "validation")):
        mine = [n for n in NAMES if n.startswith(split)]
        table = pd.DataFrame({"VolumeName": [f"{n}.nii.gz" for n in mine]})
        zero = table.assign(**{c: str(k % 2) for k, c in enumerate(CT_RATE_LABELS)})
        write = {"multi_abnormality_labels": (f"{split}_predicted_labels.csv", zero)}
        written = [n for n in mine if n in texts]
        reports = pd.DataFrame([texts[n] for n in written], columns=["Findings_EN", "Impressions_EN"])
        reports.insert(0, "VolumeName", [f"{n}.nii.gz" for n in written])
        write["radiology_text_reports"] = (f"{long}_reports.csv", reports)
        meta = table.assign(RescaleSlope="1", RescaleIntercept=["-1024" if "_2_a" in n else "0" for n in mine])
        meta = meta.assign(XYSpacing="[0.5, 0.5]", ZSpacing="2.5")
        write["metadata"] = (f"{long}_metadata.csv", meta)
        for folder, (name, frame) in write.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            frame.to_csv(root / folder / name, index=False)
    return root


def test_the_tree_of_the_hub(hub):
    table, csv = ctclip_cases(hub / "train")
    assert csv == hub / "radiology_text_reports" / "train_reports.csv"
    assert table["series_id"].tolist() == NAMES[:3]
    assert table["patient_id"].tolist() == ["train_1", "train_1", "train_2"]
    columns = ["series_id", "patient_id", "img_path", "findings", "impression", *CT_RATE_LABELS]
    assert table.columns.tolist() == [*columns, *common.RESCALE_COLUMNS, *common.SPACING_COLUMNS]
    assert table["findings"].tolist() == ["Lungs are clear.", "- Nodule, left.", ""]
    assert table["impression"].tolist() == ["Normal.", "", ""]
    assert all(isinstance(v, str) for v in table.to_numpy().ravel())
    assert table["img_path"][2] == str(hub / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz")
    assert common.volume_options(table.loc[2].to_dict()) == {"rescale": (1, -1024), "spacing": (2.5, 0.5, 0.5)}
    assert ctclip_cases(hub / "train", label_columns=[])[0].shape == (3, 10)
    both = ctclip_cases(hub)[0]  # the root itself: the files of both splits
    assert both["series_id"].tolist() == NAMES and both["findings"][3] == ""


def test_tables_by_name_and_several_of_them(hub, tmp_path):
    reports = ["train_reports.csv", hub / "radiology_text_reports" / "validation_reports.csv"]
    given = {"reports": reports, "metadata": ["train_metadata.csv"], "labels": ["train_predicted_labels.csv"]}
    table, csv = ctclip_cases(hub, **given, label_columns=["Emphysema"])
    assert csv.name == "train_reports.csv" and table["impression"][3] == "=Effusion\nof 2 cm"
    assert table["Emphysema"].tolist() == ["1", "1", "1", ""]
    assert table["RescaleSlope"].tolist() == ["1.0", "1.0", "1.0", ""]
    with pytest.raises(UserError, match="valid_1_a_1.nii.gz: --hu-source csv, and no metadata"):
        ctclip_cases(hub, **given, hu_source="csv")
    with pytest.raises(UserError, match="--reports: no such file as .*nothing.csv"):
        ctclip_cases(hub, reports=["nothing.csv"])
    with pytest.raises(UserError, match="has a row in another file too"):
        ctclip_cases(hub, reports=reports[:1] * 2)
    with pytest.raises(UserError, match="has no row for any of 1 volumes, such as valid_1_a_1"):
        ctclip_cases(hub / "valid", reports=["train_reports.csv"])


@pytest.mark.parametrize(
    "kind, file, column",
    [
        ("radiology_text_reports", "train_reports.csv", "VolumeName"),
        ("radiology_text_reports", "train_reports.csv", "Findings_EN"),
        ("metadata", "train_metadata.csv", "RescaleIntercept"),
        ("multi_abnormality_labels", "train_predicted_labels.csv", "Emphysema"),
    ],
)
def test_a_missing_column_is_named(hub, kind, file, column):
    path = hub / kind / file
    read(path).rename(columns={column: "Other"}).to_csv(path, index=False)
    with pytest.raises(UserError, match=f"{file}: column '{column}' is missing"):
        ctclip_cases(hub / "train")


def test_no_volumes_and_no_reports_are_errors_with_the_places(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"0 volumes: .*empty/volumes.csv: no such file; .*empty: no \.nii\.gz"):
        ctclip_cases(tmp_path / "empty")
    result = run("prepare_ct.py", "ctclip", "--data-root", tmp_path / "gone", "--out", tmp_path / "out", check=2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 0 volumes") and "gone: no such folder" in last and not (tmp_path / "out").exists()
    saved(hub / "train" / "again" / "train_2_a_1.nii.gz", chest())
    with pytest.raises(UserError, match="the same volume name as"):
        ctclip_cases(hub / "train")
    saved(tmp_path / "other" / "scans" / "v.nii.gz", chest())
    with pytest.raises(UserError, match="no reports: no .*reports.csv.*radiology_text_reports.*--reports"):
        ctclip_cases(tmp_path / "other" / "scans")


# ---- the cache


def test_the_cache_differs_from_the_scans_by_the_rounding_only(hub, tmp_path):
    names = ["--reports", "train_reports.csv", "--metadata", "train_metadata.csv"]
    names += ["--labels", "train_predicted_labels.csv"]
    assert prepare("--data-root", hub / "train", *names, "--out", tmp_path / "cache", "--size", *SMALL) == 0
    online, _ = ctclip_cases(hub / "train")
    cached, csv = ctclip_cases(tmp_path / "cache")
    assert csv == tmp_path / "cache" / "volumes.csv"
    assert [c for c in online if c not in (*common.RESCALE_COLUMNS, *common.SPACING_COLUMNS)] == list(cached)
    for column in set(cached) - {"img_path"}:
        assert cached[column].tolist() == online[column].tolist(), column  # "- Nodule" is escaped in the file
    for one, other in zip(online.to_dict("records"), cached.to_dict("records"), strict=True):
        whole = np.load(other["img_path"])
        assert whole.dtype == np.int16 and whole.shape == SMALL
        scan = ctclip_volume(one["img_path"], SMALL, **common.volume_options(one))[0]
        assert np.abs(whole - scan).max() <= 0.5 + 1e-4
        got = ctclip_volume(other["img_path"], SMALL, **common.volume_options(other))[0]
        np.testing.assert_array_equal(got, whole.astype(np.float32))
        blocks = ctclip_volume(other["img_path"], (12, 12, 24))[0]
        assert far(blocks, F.avg_pool3d(torch.tensor(got, dtype=torch.float32)[None, None], (2, 4, 2))[0, 0]) < 1e-6
    with pytest.raises(UserError, match="does not divide"):
        ctclip_volume(cached["img_path"][0])
    with pytest.raises(UserError, match="train_reports.csv: not used"):
        ctclip_cases(tmp_path / "cache", reports=["train_reports.csv"])
    with pytest.raises(UserError, match="a table of prepared volumes"):
        prepare("--data-root", tmp_path / "cache", "--out", tmp_path / "twice")
    assert read(csv)["img_path"].tolist() == [f"{n}.npy" for n in NAMES[:3]]  # the folder may be moved
    assert (tmp_path / "cache" / "preview.png").stat().st_size > 10_000


def test_a_stopped_run_continues_and_other_settings_begin_anew(hub, tmp_path, capsys):
    out = tmp_path / "cache"
    command = ["--data-root", hub, "--out", out, "--size", *SMALL]
    assert prepare(*command) == 0
    assert "4 volumes, 0.0 GB; 1 have no report, 0 no labels" in capsys.readouterr().err
    whole = {p.name: p.read_bytes() for p in out.glob("*.npy")}

    def redone():
        before = {p: p.stat().st_mtime_ns for p in out.glob("*.npy")}
        assert prepare(*command) == 0
        return sorted(p.stem for p, t in before.items() if p.stat().st_mtime_ns != t)

    assert redone() == []
    (out / "train_2_a_1.npy").write_bytes(b"half")
    with (out / "progress.jsonl").open("a") as file:
        file.write('{"key": {"id": "train_1')  # a kill in the middle of a line
    assert redone() == ["train_2_a_1"]
    (out / "train_1_a_1.npy").unlink()
    assert redone() == [] and {p.name: p.read_bytes() for p in out.glob("*.npy")} == whole
    command += ["--hu-source", "csv"]
    assert len(redone()) == 4
    command[-3:] = ["16", "--hu-source", "csv"]
    assert len(redone()) == 4 and np.load(out / "train_1_a_1.npy").shape == (24, 48, 16)


def test_a_bad_volume_ends_the_run_or_is_listed(hub, tmp_path):
    metadata = hub / "metadata" / "train_metadata.csv"
    metadata.write_text(metadata.read_text().replace("train_1_a_1.nii.gz,1,0", "train_1_a_1.nii.gz,1,-8192"))
    command = ["--data-root", hub, "--out", tmp_path / "cache", "--size", *SMALL, "--hu-source", "csv"]
    with pytest.raises(UserError, match="train_1_a_1.nii.gz: constant air"):
        prepare(*command)
    assert prepare(*command, "--on-bad-sample", "skip") == 3
    assert read(tmp_path / "cache" / "bad_samples.csv")["series_id"].tolist() == ["train_1_a_1"]
    assert read(tmp_path / "cache" / "volumes.csv")["series_id"].tolist() == NAMES[1:]
    with pytest.raises(UserError, match="--size .* must divide"):
        prepare("--data-root", hub, "--out", tmp_path / "cache", "--size", 24, 48, 47)


# ---- the demo


def test_the_demo_vocabulary_spells_its_reports_and_any_other_word(tmp_path):
    flags = ["--n", "10", "--size", "32", "--slices", "8", "--num-workers", "1"]
    assert demo_data.main(["ct", "--out", str(tmp_path), *flags]) == 0
    pieces = (tmp_path / "vocab.txt").read_text().splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(pieces) == len(set(pieces))
    tokenizer = common.load_tokenizer(tmp_path / "vocab.txt")
    table = ctclip_cases(tmp_path / "dataset" / "train")[0]
    texts = [*table["findings"], *table["impression"]]
    for name in CT_RATE_LABELS:
        texts += [p.format(name) for p in (*demo_data.PROMPTS, *demo_data.PRESENT, *demo_data.ABSENT)]
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        assert tokenizer.encode(text, add_special_tokens=False).tokens == words  # each word is one piece
    assert "[UNK]" not in tokenizer.encode("Ground-glass (3 x 4 mm)? Yes; 50%!").tokens


def test_the_demo_goes_through(tmp_path):
    flags = ["--n", "10", "--size", "32", "--slices", "8", "--num-workers", "1"]
    assert demo_data.main(["ct", "--out", str(tmp_path), *flags]) == 0
    assert prepare("--data-root", tmp_path / "dataset" / "train", "--out", tmp_path / "c", "--size", *SMALL) == 0
    table = ctclip_cases(tmp_path / "c")[0]
    assert len(table) == 7 and (table["findings"] != "").all() and (table[CT_RATE_LABELS] != "").all(axis=None)


# ---- real scans


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """{name: (D, H, W) int16 HU} of the twelve scans, and their table."""
    out = tmp_path_factory.mktemp("real")
    assert prepare("--data-root", shared / "data" / "ct", "--out", out, "--size", 48, 96, 96) == 0
    table = ctclip_cases(out)[0]
    return {r.series_id: np.load(r.img_path) for r in table.itertuples()}, table


def test_real_scans_and_their_reports(real):
    volumes, table = real
    assert len(table) == 12 and (table["findings"] != "").sum() == 8 and (table["Lung nodule"] == "1").sum() == 4
    for name, volume in volumes.items():
        tissue, bone = volume > -300, volume > 250
        assert volume.min() == -1000 and tissue.any() and bone.any()
        place = [np.argwhere(m).mean(0) for m in (tissue, bone)]
        assert place[1][2] > place[0][2], f"{name}: the spine is not behind"
        assert place[1][0] >= place[0][0] - 1, f"{name}: the shoulders are not above"


def test_the_intercept_of_valid_1_a_1_is_applied(real):
    """Stored 0 to 4000 with an intercept of -1000: lungs are air, and the commonest soft tissue is muscle."""
    volume = real[0]["valid_1_a_1"]
    assert -1000 < np.median(volume[(volume > -950) & (volume < -500)]) < -700
    counts, edges = np.histogram(volume, 30, (-150, 150))
    assert 0 <= edges[counts.argmax()] <= 80


def test_orientations_of_the_same_patient_agree(real):
    """train_1_a_1 is stored as LPS, train_1_a_2 as RAS; a mirrored volume would be less alike."""
    one, other = (real[0][f"train_1_a_{i}"].astype(float) for i in (1, 2))
    alike = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert alike > 0.95
    for axis in range(3):
        assert np.corrcoef(one.ravel(), np.flip(other, axis).ravel())[0, 1] < alike - 0.05
    low, high = np.split(real[0]["train_4_a_1"], 2)  # stored as LPI
    assert (low > -300).mean() > (high > -300).mean()  # the abdomen is below
