"""run_task2.py on the labelled real slices (COVID or not): from random weights, a fixed schedule, the last epoch.

    python tests/test_real_slices.py            # prints the table of the README; about 3 minutes on 2 cores

Beside it two baselines, fitted on the same training slices: a logistic regression on mean and standard deviation of the
grey levels (brightness is a shortcut in this collection), and on 50 principal components of 32 x 32 pixels. Intervals:
1000 resamples of source papers.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, real_slices
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
import run_task2 as task2

RECIPE = [
    "--model", "efficientnet_b0", "--pretrained", "none", "--image-size", "64", "--stochastic-depth", "0",
    "--loss", "bce", "--class-weights", "none", "--batch-size", "16", "--epochs", "30",
    "--early-stopping-patience", "30", "--lr", "3e-3", "--weight-decay", "0.05", "--scheduler", "cosine",
    "--warmup", "30", "--num-workers", "0",
]  # fmt: skip


def score(name: str, dataset, probs) -> tuple[str, float, float, float]:
    targets = dataset.volume_targets
    auroc = common.multilabel_metrics(targets, probs, ["COVID"])["macro_auroc"]
    low, high = common.bootstrap_intervals(targets, probs, ["COVID"], groups=dataset.groups)["macro_auroc"]
    return name, auroc, low, high


def baselines(train_set, val_set):
    """Scores of the two baselines, from the same stored slices."""
    pixels = [np.stack([d.read(i) for i in range(len(d))]) for d in (train_set, val_set)]
    simple = [np.stack([p.mean((1, 2)), p.std((1, 2))], 1) for p in pixels]
    small = [common.resize_slices(p, 32).reshape(len(p), -1) / 255 for p in pixels]
    models = {"mean and standard deviation": make_pipeline(StandardScaler(), LogisticRegression())}
    models["PCA of 32 x 32 pixels"] = make_pipeline(PCA(50, random_state=0), LogisticRegression(max_iter=5000))
    for (name, model), (x, x_val) in zip(models.items(), (simple, small), strict=True):
        model.fit(x, train_set.targets[:, 0])
        yield score(name, val_set, model.predict_proba(x_val)[:, 1:])


def trial(folder: Path, seeds=(1, 2, 3), more=()) -> list[tuple[str, float, float, float]]:
    """Rows (name, AUROC, low, high) on the validation split: baselines, then the last epoch of each seed."""
    data = real_slices(SHARED, folder / "data")
    words = ["--slice-dir", data, "--data-dir", data, "--label-columns", "COVID"]
    words = [str(w) for w in (*words, *RECIPE, *more)]
    args = task2.parse_args(words)
    rows = list(baselines(*task2.build_datasets(args)))
    for seed in seeds:
        out = str(folder / f"seed{seed}")
        quiet = contextlib.redirect_stderr(io.StringIO())
        with quiet, contextlib.redirect_stdout(io.StringIO()):
            code = task2.main([*words, "--mode", "train", "--no-tensorboard", "--output-dir", out, "--seed", str(seed)])
        assert code == 0
        saved = common.load_checkpoint(Path(out) / task2.LAST)  # the last epoch, not the best on the scored slices
        last = task2.args_from_checkpoint(saved)
        with common.process_group("cpu") as ctx:
            dataset = task2.build_eval_dataset(last)
            probs = task2.predict(task2.build_eval_model(saved, last, ctx.device), dataset, ctx)["probs"]
        rows.append(score(f"run_task2.py, seed {seed}", dataset, probs))
    return rows


def table(rows) -> str:
    lines = [f"{name:30} {auroc:.3f} [{low:.3f}, {high:.3f}]" for name, auroc, low, high in rows]
    trained = [auroc for name, auroc, _, _ in rows if name.startswith("run_task2")]
    return "\n".join([*lines, f"{'mean of the seeds':30} {np.mean(trained):.3f}"])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED} (real images)")
def test_learns_on_real_slices(tmp_path):
    rows = trial(tmp_path)
    print(table(rows))
    trained = [auroc for name, auroc, _, _ in rows if name.startswith("run_task2")]
    assert len(trained) == 3 and np.mean(trained) >= 0.72
    assert rows[0][1] == pytest.approx(0.79, abs=0.02)  # the shortcut that these slices offer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(table(trial(Path(folder), more=sys.argv[1:])))
