"""evaluate.py on more: memory that does not grow with the cases, and the same digits for any number of ranks."""

import gc
import importlib
import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import film_args, fundus_args, report_args, run, slice_args, tiny_args
from torch._subclasses import FakeTensor

import cases
import common
import evaluate
import retrieval

# ---- retrieval: never all scores, or all right answers, at once


def unit(rng, n, size=8):
    x = rng.normal(size=(n, size)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs_of(rng, n_images, n_texts):
    """What `predict` of train_retclip.py gives, for one level: few distinct texts, so that many queries share one."""
    owner = np.arange(n_texts) % n_images
    return {
        "ids": [f"i{i:05d}" for i in range(n_images)],
        "groups": [f"p{i // 2}" for i in range(n_images)],
        "texts": [f"report {i % 97}" for i in range(n_texts)],
        "text_ids": list(range(n_texts)),
        "pairs": np.stack([owner, np.arange(n_texts)], 1),
        "image_features": {"patient": unit(rng, n_images)},
        "text_features": {"patient": unit(rng, n_texts)},
        "classes": {"patient": ["abc"[i % 97 % 3] for i in range(n_images)]},
    }


def ranks_of_all(rng, n, m):
    queries, gallery = unit(rng, n), unit(rng, m)
    return lambda: common.retrieval_ranks(queries, gallery, np.arange(n) % m, np.arange(m))


def precision_of_all(rng, n, m):
    queries, gallery = unit(rng, n), unit(rng, m)
    return lambda: common.average_precision(queries, gallery, np.arange(n) % 50, np.arange(m) % 50)


def overlap_of_all(rng, n, m):
    some = unit(rng, n), unit(rng, m), rng.integers(0, 2, (n, 4)) * 1.0, rng.integers(0, 2, (m, 4)) * 1.0
    return lambda: common.overlap_at_k(*some, [1, 5], np.arange(n) // 2, np.arange(m) // 2)


def search_of_pairs(rng, n, m):
    out = pairs_of(rng, m, n)
    return lambda: retrieval.pair_retrieval(out, out["ids"], 5, 0)


def gallery_of_pairs(rng, n, m):
    out = pairs_of(rng, m, n)
    out["texts"] = [f"report {i}" for i in range(n)]
    return lambda: retrieval.gallery(out, out["ids"], lambda row: [])


def whole_matrix(rng, n, m):
    """The usual way, which the limit must catch."""
    queries, gallery = unit(rng, n), unit(rng, m)
    return lambda: (queries @ gallery.T > 0).sum(1)


def bytes_per_query(make, few=1200, many=3200, m=1000) -> float:
    """How much the peak of memory grows with each further query of the same gallery (m)."""
    peaks = []
    for n in (few, many):
        call = make(np.random.default_rng(0), n, m)
        tracemalloc.start()
        call()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (many - few)


@pytest.mark.parametrize(
    "make",
    [ranks_of_all, precision_of_all, overlap_of_all, search_of_pairs, gallery_of_pairs],
    ids=lambda f: f.__name__,
)
def test_retrieval_needs_no_matrix(make):
    """A further query costs less than one byte for each of the gallery: not even who is right is there as a whole."""
    assert bytes_per_query(make) < 1000


def test_the_whole_matrix_is_seen():
    assert bytes_per_query(whole_matrix) > 1000


@pytest.mark.slow
def test_retrieval_of_10000_in_400_mb():
    """Of a process of its own, and of a whole evaluation's retrieval with intervals; see the benchmark."""
    run("benchmarks/bench_evaluate.py", "--part", "memory", timeout=1800)


# ---- inference: no case outlives its batch


def live_bytes() -> int:
    """Of all tensors that Python holds, and of NumPy's arrays."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and type(x) is not FakeTensor]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


def last_bytes(words, script, names, n_calls, monkeypatch, keep) -> int:
    """What is alive in `predict` at the last of n calls of the model, `names` of its place; keep: every input is."""
    owner, name = names
    call, predict, seen = getattr(owner, name), script.predict, []

    def watched(model, inputs, *more):
        assert not torch.is_grad_enabled()  # a graph would hold what Python does not
        seen.append(inputs if keep else None)
        watched.bytes = live_bytes() if len(seen) == n_calls else None
        return call(model, inputs, *more)

    def traced(*given):
        tracemalloc.start()
        try:
            return predict(*given)
        finally:
            tracemalloc.stop()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, watched)
        patch.setattr(script, "predict", traced)
        patch.setattr(evaluate, "write_outputs", lambda *given: None)
        assert evaluate.main([str(w) for w in [*words, "--no-bootstrap"]]) == 0
    return watched.bytes


@pytest.mark.slow
@pytest.mark.parametrize("task", ["siglip", "ctclip"])
def test_inference_holds_one_batch(task, request, tmp_path, monkeypatch):
    """Of 64 cases no more than of 8, but for their names, features and logits."""
    data = request.getfixturevalue(TASKS[task][0])
    words, script = checkpoint(task, data, tmp_path), importlib.import_module(cases.TASKS[task])
    names = (script, "encode") if task == "ctclip" else (script.CTClassifier, "features")
    table = data / ("valid/volumes.csv" if task == "ctclip" else "t.csv")
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows = rows[rows["img_path"] == rows["img_path"].iloc[-2]]  # the same volume again and again
    rows["img_path"] = [str(table.parent / path) for path in rows["img_path"]]

    def alive(n, keep=False):
        many = pd.concat([rows.assign(series_id=f"case{i}", patient_id=f"p{i}", split="val") for i in range(n)])
        folder = tmp_path / f"{n}"
        folder.mkdir(exist_ok=True)
        many.to_csv(folder / table.name, index=False)
        given = ["--valid-data", folder] if task == "ctclip" else ["--csv", folder / table.name]
        return last_bytes([*words, *given, "--output", folder], script, names, n // 4, monkeypatch, keep)

    volume = {"ctclip": 24 * 96 * 96 * 2, "siglip": 6 * 32 * 32 * 2}[task]  # bytes of int16
    many, few = alive(64), alive(8)  # in this order: what the first call makes once counts against it
    assert many - few < 56 * volume / 2
    assert alive(32, keep=True) - few > 24 * volume * 0.9  # a leak would be seen


# ---- checkpoints of all tasks, with random weights, and data of which a case is damaged


def spoil_volumes(tiny_ct, folder):
    shutil.copytree(tiny_ct, folder)
    (folder / "v18.npz").write_bytes(b"no zip")
    return ["--csv", folder / "t.csv"]


def spoil_slices(tiny_slices, folder):
    """All slices of one volume, and one of another."""
    shutil.copytree(tiny_slices, folder)
    for path in [*folder.glob("slices/valid/case18.*"), folder / "slices/valid/case19.nii.gz_slice_001.npy"]:
        path.write_bytes(b"no array")
    return ["--slice-dir", folder]


def spoil_reports(tiny_reports, folder):
    shutil.copytree(tiny_reports, folder)
    (folder / "valid" / "case18.npy").write_bytes(b"no array")
    return ["--valid-data", folder / "valid", "--retrieval"]


def spoil_fundus(tiny_fundus, folder):
    folder.mkdir()
    for kind in ("_texts.jsonl", "_labels.csv", "_imgs.tsv"):
        shutil.copy(tiny_fundus / f"val{kind}", folder)
    lines = (folder / "val_imgs.tsv").read_text().splitlines(keepends=True)
    lines = ["P18\tAAAA\tAAAA\n" if line.startswith("P18\t") else line for line in lines]
    (folder / "val_imgs.tsv").write_text("".join(lines))
    return ["--val-data", folder / "val"]


def spoil_films(tiny_films, folder):
    shutil.copytree(tiny_films, folder)
    (folder / "images" / "18.png").write_bytes(b"no picture")
    return ["--csv", folder / "labels.csv", "--image-dir", folder / "images"]


TASKS = {  # folder, arguments of a training, what damages a case and says where the data are, the case
    "siglip": ("tiny_ct", tiny_args, spoil_volumes, "case18"),
    "task2": ("tiny_slices", slice_args, spoil_slices, "case18"),
    "ctclip": ("tiny_reports", report_args, spoil_reports, "case18"),
    "retclip": ("tiny_fundus", fundus_args, spoil_fundus, "P18"),
    "csi": ("tiny_films", film_args, spoil_films, "18"),
}


def checkpoint(task: str, data, folder):
    """A checkpoint of a model of random weights, and the words that evaluate.py is called with."""
    script = importlib.import_module(cases.TASKS[task])
    words = TASKS[task][1](data, folder / "run")[1:]
    args = script.parse_args([str(word) for word in words])
    script.build_datasets(args)  # settles what the data decide
    torch.manual_seed(0)
    model = script.build_model(args, lambda *said: None)
    common.save_checkpoint(folder / "model.pth", common.model_checkpoint(task, args, model, {}))
    return ["--checkpoint", folder / "model.pth", "--device", "cpu", "--n-bootstrap", 50]


def written(folder) -> dict:
    """What an evaluation wrote, without what differs between two runs: the command and the date."""
    results = json.loads(next(folder.glob("*results.json")).read_text())
    tables = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    return {"results": {k: v for k, v in results.items() if k != "provenance"}, **tables}


def compare_ranks(task, request, folder, worlds, more=()) -> None:
    data = request.getfixturevalue(TASKS[task][0])
    words = [*checkpoint(task, data, folder), *TASKS[task][2](data, folder / "spoilt"), *more]
    code = common.run_main(lambda: evaluate.main([str(w) for w in [*words, "--output", folder / "1"]]))
    first = written(folder / "1")
    assert code == 3 and [case["id"] for case in first["results"]["failed"]] == [TASKS[task][3]]
    assert "labels.csv" in first or task == "csi"
    for world in worlds:  # torchrun turns any exit code but 0 into 1
        run("evaluate.py", *words, "--output", folder / f"{world}", world=world, check=3 if world == 1 else 1)
        assert written(folder / f"{world}") == first, world


def test_two_ranks_agree(request, tmp_path):
    compare_ranks("csi", request, tmp_path, [2])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_ranks_agree(task, request, tmp_path):
    """To the last digit, for 1 to 4 ranks, and batches that the ranks cannot share evenly."""
    compare_ranks(task, request, tmp_path, [1, 2, 3, 4], ["--batch-size", 2])
