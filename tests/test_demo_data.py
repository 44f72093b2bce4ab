"""The phantoms are what their labels say, the same for any number of workers, and not told apart by brightness."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
import demo_data
from common import CT_RATE_LABELS

SIZE, SLICES, SEED = 64, 12, 7
N = 20


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    flags = ["--n", str(N), "--size", str(SIZE), "--slices", str(SLICES), "--seed", str(SEED), "--num-workers", "1"]
    assert demo_data.main(["ct", "--out", str(folder), *flags]) == 0
    return folder


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_workers_and_n_do_not_matter(out, tmp_path):
    flags = ["--n", "12", "--size", str(SIZE), "--slices", str(SLICES), "--seed", str(SEED), "--num-workers", "2"]
    assert demo_data.main(["ct", "--out", str(tmp_path), *flags]) == 0
    whole, part = bytes_of(out), bytes_of(tmp_path)
    volumes = [p for p in part if p.suffix in (".npz", ".gz")]
    assert len(volumes) == 24
    assert all(whole[p] == part[p] for p in volumes)


def test_table_has_the_documents_form(out):
    table = pd.read_csv(out / "ct" / "all_ct_wlabels.csv")
    assert list(table.columns) == ["series_id", "split", "img_path", "patient_id", *CT_RATE_LABELS]
    assert len(table) == N and table["series_id"].is_unique
    assert table["split"].value_counts().to_dict() == {"train": 14, "val": 2, "test": 4}
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert set(np.unique(table[CT_RATE_LABELS])) <= {0, 1}
    with np.load(out / "ct" / table["img_path"][0]) as volume:
        assert volume["image"].shape == (1, SLICES, SIZE, SIZE) and volume["image"].dtype == np.int16
        assert volume["spacing"].shape == (3,)


def test_nifti_tree_is_the_same_volumes(out):
    table = pd.read_csv(out / "ct" / "all_ct_wlabels.csv")
    for series, path in zip(table["series_id"][:4], table["img_path"][:4], strict=True):
        hub = series.split("_")[0]
        name = out / "dataset" / hub / series.rsplit("_", 2)[0] / series.rsplit("_", 1)[0] / f"{series}.nii.gz"
        a, b = common.read_volume(out / "ct" / path), common.read_volume(name)
        assert np.array_equal(a.array, b.array)
        assert np.allclose(a.spacing, b.spacing, rtol=1e-5)


def test_ct_rate_tables_agree(out):
    table = pd.read_csv(out / "ct" / "all_ct_wlabels.csv").set_index("series_id")
    base = out / "dataset"
    for hub, long in (("train", "train"), ("valid", "validation")):
        labels = pd.read_csv(base / "multi_abnormality_labels" / f"{hub}_predicted_labels.csv")
        reports = pd.read_csv(base / "radiology_text_reports" / f"{long}_reports.csv")
        metadata = pd.read_csv(base / "metadata" / f"{long}_metadata.csv")
        names = list(labels["VolumeName"])
        assert list(labels.columns) == ["VolumeName", *CT_RATE_LABELS]
        assert list(reports.columns) == ["VolumeName", "Findings_EN", "Impressions_EN"]
        assert names == list(reports["VolumeName"]) == list(metadata["VolumeName"])
        ids = [n.removesuffix(".nii.gz") for n in names]
        assert np.array_equal(labels[CT_RATE_LABELS].to_numpy(), table.loc[ids, CT_RATE_LABELS].to_numpy())
        for impression, row in zip(reports["Impressions_EN"], labels[CT_RATE_LABELS].to_numpy(), strict=True):
            said = [name for name in CT_RATE_LABELS if f"{name}." in impression]
            assert said == [name for name, value in zip(CT_RATE_LABELS, row, strict=True) if value]
        assert metadata["XYSpacing"].str.match(r"\[[\d.]+, [\d.]+\]$").all() and (metadata["RescaleSlope"] == 1).all()


def test_without_nifti(tmp_path):
    flags = ["--n", "10", "--size", "32", "--slices", "8", "--num-workers", "1", "--no-nifti"]
    assert demo_data.main(["ct", "--out", str(tmp_path), *flags]) == 0
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("k", range(18), ids=CT_RATE_LABELS)
def test_finding_is_drawn_when_its_label_is_1_and_only_there(k):
    none, one = np.zeros(18, int), np.eye(18, dtype=int)[k]
    for index in range(3):
        healthy, spacing, _ = demo_data.draw_ct(SEED, index, 96, 16, none)
        again, _, _ = demo_data.draw_ct(SEED, index, 96, 16, none)
        ill, _, labels = demo_data.draw_ct(SEED, index, 96, 16, one)
        assert np.array_equal(healthy, again) and np.array_equal(labels, one)
        change = np.abs(ill.astype(int) - healthy) > 40
        assert 10 < change.sum() < 0.12 * change.size  # visible, and most of the patient is as before
        z, y, _ = np.nonzero(change)
        depth = (z.mean() + 0.5) / 16
        if CT_RATE_LABELS[k] in ("Pleural effusion", "Atelectasis", "Hiatal hernia", "Bronchiectasis"):
            assert depth < 0.5  # the lower half
        if CT_RATE_LABELS[k] in ("Pulmonary fibrotic sequela", "Emphysema"):
            assert depth > 0.5
        if CT_RATE_LABELS[k] == "Pleural effusion":
            assert y.mean() > 48  # at the back
        if CT_RATE_LABELS[k] in ("Medical material", "Arterial wall calcification"):
            assert ill[change].mean() > healthy[change].mean() + 300


def test_prevalence():
    labels = np.stack([demo_data.draw_labels(0, index) for index in range(4000)])
    p = np.array(demo_data.PREVALENCE)
    assert (np.abs(labels.mean(0) - p) < 4 * np.sqrt(p * (1 - p) / 4000)).all()


def test_brightness_tells_little():
    """Logistic regression on the mean and standard deviation of a volume, macro AUROC over the common findings."""
    drawn = [demo_data.draw_ct(0, index, 48, 12) for index in range(300)]
    moments = np.array([(image.mean(), image.std()) for image, _, _ in drawn])
    labels = np.stack([row for _, _, row in drawn])
    scores = []
    for y in labels.T:
        if min(y[:200].sum(), y[200:].sum()) >= 8:
            model = make_pipeline(StandardScaler(), LogisticRegression()).fit(moments[:200], y[:200])
            scores.append(roc_auc_score(y[200:], model.predict_proba(moments[200:])[:, 1]))
    assert len(scores) >= 12 and np.mean(scores) < 0.63


@pytest.mark.parametrize("flags", [["--n", "3"], ["--size", "8"], ["--slices", "2"]])
def test_mistakes_are_one_line(flags, tmp_path, capsys):
    assert demo_data.main(["ct", "--out", str(tmp_path), "--n", "10", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")
