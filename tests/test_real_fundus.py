"""The README's RET-CLIP commands on 113 real pairs: tiny presets, random weights, a fixed schedule, the last epoch.

    python tests/test_real_fundus.py            # prints the table of the README

86 pairs train, 27 are scored and choose nothing. Beside the linear probe of the trained image encoder: the same of the
untrained one, and of 50 principal components of 32 x 32 pixels. Intervals: 1000 resamples of patients.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

import common
import demo_data
import evaluate
import prepare_retclip
import train_retclip as retclip

RECIPE = [
    "--vision-model", "tiny", "--text-model", "tiny", "--batch-size", "4", "--epochs", "10", "--lr", "5e-4", "--warmup",
    "10", "--num-workers", "0",
]  # fmt: skip

TITLES = {"class R@1": "class_recall@1", "class MAP": "class_map"}


def quietly(main, *words) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = common.run_main(lambda: main([str(w) for w in words]))
    assert code == 0, said.getvalue()[-2000:]


def results_of(checkpoint: Path, folder: Path, *more) -> dict:
    out, words = folder / "results.json", ["--train-data", folder / "lmdb/train", "--val-data", folder / "lmdb/val"]
    quietly(evaluate.main, "--test-only", checkpoint, *words, "--output", out, *more)
    return json.loads(out.read_text())


def pixels_probe() -> float:
    """Macro AUROC of the four diagnoses, one against the rest, from principal components of the pixels of an eye."""
    root = SHARED / "data/fundus"
    table = pd.read_csv(root / "labels.csv")
    x = [np.asarray(Image.open(root / p).convert("RGB").resize((32, 32))).ravel() / 255 for p in table["image_path"]]
    train = (table["split"] == "train").to_numpy()
    model = make_pipeline(PCA(50, random_state=0), LogisticRegression(max_iter=5000))
    x, y = np.stack(x), table["diagnosis"]
    probs = model.fit(x[train], y[train]).predict_proba(x[~train])
    return np.mean([roc_auc_score(y[~train] == name, p) for name, p in zip(model.classes_, probs.T, strict=True)])


def trial(folder: Path, seeds=(123,)):
    """Rows (name, seed, results of the retrieval, of the probe, of the untrained network's probe)."""
    csv, vocab = SHARED / "data/fundus/pairs.csv", folder / "phantoms/vocab.txt"
    quietly(demo_data.main, "fundus", "--out", folder / "phantoms", "--n", 20)
    words = ["--out", folder / "data", "--lmdb", folder / "lmdb"]
    quietly(prepare_retclip.main, "--csv", csv, "--split-column", "split", *words)
    data = ["--train-data", folder / "lmdb/train", "--val-data", folder / "lmdb/val", "--vocab", vocab]
    for seed in seeds:
        own = ["--seed", seed, "--logs", folder / "logs", "--name", seed]
        quietly(retclip.main, *data, *RECIPE, *own)
        quietly(retclip.main, *data, *RECIPE, *own, "--convert", folder / "untrained.pt")
        last = folder / f"logs/{seed}/checkpoints/epoch_latest.pt"
        found = results_of(last, folder)["retrieval"]["image_to_text"]["patient"]
        probes = [results_of(x, folder, "--linear-probe")["macro"] for x in (last, folder / "untrained.pt")]
        yield seed, found, *probes


@pytest.mark.slow
def test_learns_on_real_pairs(shared, tmp_path):
    """R@1 and MAP of classes are above chance with their intervals, and the probe is better than before training."""
    ((_, found, probe, untrained),) = trial(tmp_path)
    for name in TITLES.values():
        assert found[f"{name}_low"] > found[f"{name}_chance"], found
    assert probe["auroc"] > untrained["auroc"] and probe["auroc"] > 0.7


if __name__ == "__main__":
    if not SHARED.is_dir():
        pytest.exit(f"needs {SHARED} (real photographs)", 2)
    shown = lambda row, name: f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"  # noqa: E731
    print(f"probe of the principal components of pixels: {pixels_probe():.3f}")
    with tempfile.TemporaryDirectory() as place:
        for seed, found, probe, untrained in trial(Path(place), [*map(int, sys.argv[1:])] or (123, 1, 2)):
            said = [f"{title} {shown(found, name)} (chance {found[f'{name}_chance']:.3f}, fixed order "
                    f"{found[f'{name}_fixed']:.3f})" for title, name in TITLES.items()]  # fmt: skip
            probes = f"probe {shown(probe, 'auroc')}, untrained {shown(untrained, 'auroc')}"
            print(f"seed {seed}: {', '.join(said)}; {probes}", flush=True)
