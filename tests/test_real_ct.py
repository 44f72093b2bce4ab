"""The twelve real CT volumes of the shared folder: three ways to read them, one training, a complete report."""

import json

import pandas as pd
import pytest
import torch
from conftest import run

import common
import finetune_siglip as siglip
from common import CT_RATE_LABELS


@pytest.fixture(scope="module")
def three_ways(shared, tmp_path_factory):
    """{way: training CSV} for .nii.gz themselves, npz, and the cache; patients train_1 ... and valid_1 ... as named."""
    ct, folder = shared / "data" / "ct", tmp_path_factory.mktemp("real")
    made = ["--metadata", ct / "metadata.csv", "--labels", ct / "labels.csv", "--num-workers", 2]
    run("prepare_ct.py", "volumes", "--nifti-dir", ct, *made, "--out", folder / "npz")
    npz = folder / "npz" / "all_ct_wlabels.csv"
    run("prepare_ct.py", "cache", "--csv", npz, "--out", folder / "cache", "--num-workers", 2)
    table = common.read_table(npz)
    rescale = common.read_table(ct / "metadata.csv").set_index("VolumeName").loc[table["series_id"] + ".nii.gz"]
    direct = table.assign(img_path=[str(ct / f"{i}.nii.gz") for i in table["series_id"]])
    for column in common.RESCALE_COLUMNS:
        direct[column] = rescale[column].to_list()
    direct.to_csv(folder / "direct.csv", index=False)
    return {"nii.gz": folder / "direct.csv", "npz": npz, "cache": folder / "cache" / "volumes.csv"}


def test_the_three_ways_give_the_same_tensors(three_ways):
    data = {}
    for way, csv in three_ways.items():
        args = siglip.parse_args(
            ["--csv", str(csv), "--pretrained", "none", "--arch", "siglip-tiny", "--num-slices", "8"]
        )
        siglip.prepare_config(args, say=lambda _: None)
        data[way] = siglip.build_datasets(args)
    for split in (0, 1):
        assert len(data["npz"][split]) == (9, 3)[split]
        for i in range(len(data["npz"][split])):
            items = [data[way][split][0, i] for way in three_ways]
            for other in items[1:]:
                assert all(torch.equal(v.nan_to_num(), other[k].nan_to_num()) for k, v in items[0].items())


def test_training_and_evaluation(three_ways, tmp_path):
    """One epoch from each of the three is the same run; 16 labels without positives are undefined, not 0."""
    records = {}
    for way, csv in three_ways.items():
        words = ["--csv", csv, "--pretrained", "none", "--arch", "siglip-tiny", "--num-slices", 8, "--batch-size", 3]
        run("finetune_siglip.py", *words, "--epochs", 2, "--num-workers", 0, "--output-dir", tmp_path / way)
        records[way] = (tmp_path / way / "results.jsonl").read_text()
    assert records["nii.gz"] == records["npz"] == records["cache"]
    out = tmp_path / "eval"
    run("evaluate.py", "--test-only", tmp_path / "npz" / "best_model.pth", "--output", out)
    table = pd.read_csv(out / "predictions.csv")
    assert sorted(table["id"]) == ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1"] and table.notna().all(axis=None)
    labels = json.loads((out / "results.json").read_text())["per_label"]
    defined = [name for name, row in labels.items() if row["auroc"] is not None]
    assert defined == ["Lung nodule"] and len(labels) == len(CT_RATE_LABELS)
    assert (out / "report.html").read_text().count("undefined") >= 17
