"""The README's chest films: six-zone scores of 122 real films (BrixIA, two readers), Custom_1 from random weights.

    python tests/test_real_cxr.py               # prints the table of the README

92 films train; 30 are scored and choose nothing: a fixed schedule, the last epoch. Beside it the second reader on the
same films, and the median score of each zone in the training films. Intervals: 1000 resamples of patients.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

import common
import train_csi as csi

RECIPE = [
    "--image-column", "image_path", "--model-arch", "Custom_1", "--image-size", "128", "--epochs", "30", "--batch-size",
    "16", "--optimizer", "adamw", "--weight-decay", "0.05", "--scheduler", "cosine", "--num-workers", "0",
    "--early-stopping-patience", "99", "--save-every", "9999", "--no-tensorboard",
]  # fmt: skip


def numbers(targets, classes, expected, groups) -> dict:
    """QWK of the classes and mean absolute error of the expected scores over all zones, with intervals."""
    counts = common.bootstrap_counts(groups, 1000, 0)
    weights = np.append(np.ones((len(counts), 1)), counts, axis=1)
    graded = targets != csi.UNKNOWN
    each = weights.repeat(6, axis=0)[graded.ravel()]  # (zones, 1 + B)
    qwk = common.quadratic_kappa(common.confusion_counts(targets[graded], classes[graded], 4, each))
    off = np.abs(expected - targets)[graded]
    mae = off @ each / each.sum(0)
    return {k: (v[0], *np.quantile(v[1:], (0.025, 0.975))) for k, v in (("QWK", qwk), ("MAE", mae))}


def trial(folder: Path, seed: int, loss: str):
    """-> numbers of the model, of the second reader, of the medians; seconds."""
    root, start = SHARED / "data/cxr", time.perf_counter()
    words = ["--csv", root / "zone_scores.csv", "--image-dir", root / "images", "--output-dir", folder, *RECIPE]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = common.run_main(lambda: csi.main([str(w) for w in [*words, "--seed", seed, "--loss", loss]]))
    assert code == 0, said.getvalue()[-2000:]
    seconds = time.perf_counter() - start
    saved = common.load_checkpoint(folder / csi.LAST)
    args = csi.args_from_checkpoint(saved)
    dataset = csi.build_eval_dataset(args)
    with common.process_group("cpu") as ctx:
        out = csi.predict(csi.build_eval_model(saved, args, ctx.device), dataset, ctx)
    found, targets, groups = csi.decide(out["probs"], args), dataset.targets, dataset.groups
    medians = common.load_checkpoint(folder / csi.BEST)["zone_medians"]
    medians = np.broadcast_to(medians, targets.shape)
    model = numbers(targets, found["severity"], found["expected"], groups)
    return model, *(numbers(targets, x, x, groups) for x in (dataset.reader2, medians)), seconds


@pytest.mark.slow
def test_learns_on_real_films(shared, tmp_path):
    model, reader, medians, _ = trial(tmp_path, 42, "ce")
    assert model["QWK"][0] >= 0.30 and model["MAE"][0] <= 0.85
    assert medians["QWK"][0] < model["QWK"][0] < reader["QWK"][0]
    assert medians["MAE"][0] > model["MAE"][0] > reader["MAE"][0]


if __name__ == "__main__":
    if not SHARED.is_dir():
        pytest.exit(f"needs {SHARED} (real films)", 2)
    shown = lambda row: ", ".join(f"{k} {v:.3f} [{low:.3f}, {high:.3f}]" for k, (v, low, high) in row.items())  # noqa: E731
    for loss in ("ce", "corn", "cdw", "emd"):
        for seed in [*map(int, sys.argv[1:])] or (42, 1, 2):
            with tempfile.TemporaryDirectory() as place:
                model, reader, medians, seconds = trial(Path(place), seed, loss)
            print(f"{loss}, seed {seed}: {shown(model)} ({seconds:.0f} s)", flush=True)
    print(f"second reader: {shown(reader)}\nzone medians: {shown(medians)}")
