"""What brightness and contrast alone give away on the chest films of the demo: what a trained model must beat.

    python demo_data.py cxr --out demo/cxr --n 400
    python benchmarks/bench_demo_cxr.py [--csv demo/cxr/labels.csv] [--image-dir demo/cxr/images]
        [--split-file runs/csi/split.csv] [--split test] [--predictions runs/csi/eval/predictions.csv]

The peers are each zone's median score, and for each zone a ridge regression on mean and standard deviation of all six
zones, which are thirds and halves of the film or, where masks/ stands beside the films, thirds of the lungs. They are
fitted on the split "train" and scored on --split: quadratic weighted kappa (QWK) and mean absolute error (MAE) of the
rounded scores, all graded zones together. --split-file: FileID and split (train, val, test), as train_csi.py writes it;
without it, and without a column split, 70 % of the patients are for training and the others for --split.
--predictions: what evaluate.py wrote for the films of --split, {zone}_expected.
Required: no peer above a QWK of 0.6; the model, if given, at least 0.8.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from demo_data import ZONES  # noqa: E402


def read_grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels / np.float32(np.iinfo(pixels.dtype).max)


def moments(film: np.ndarray, zones: np.ndarray) -> list[float]:
    """Mean and standard deviation of the six zones; zones: (H, W), the place in ZONES or -1."""
    parts = [film[zones == k] for k in range(6)]
    return [number for part in parts for number in (part.mean(), part.std())]


def zones_of_film(shape) -> np.ndarray:
    rows, columns = (np.arange(n) * parts // n for n, parts in zip(shape, (3, 2), strict=True))
    return 2 * rows[:, None] + columns


def zones_of_lungs(masks: list[np.ndarray]) -> np.ndarray:
    """Masks of the right and of the left lung, (H, W) bool."""
    zones = np.full(masks[0].shape, -1)
    for side, mask in enumerate(masks):
        rows = np.flatnonzero(mask.any(1))
        third = (np.arange(len(mask)) - rows[0]) * 3 // (rows[-1] - rows[0] + 1)
        zones[mask] = np.broadcast_to(2 * third[:, None] + side, mask.shape)[mask]
    return zones


def split_of(table: pd.DataFrame, path: Path | None, wanted: str) -> np.ndarray:
    """(n,) str: the split of each film."""
    if path:
        known = common.read_table(path)
        return table["FileID"].map(dict(zip(known["FileID"], known["split"], strict=True))).to_numpy(str)
    if "split" in table:
        return table["split"].to_numpy(str)
    patients = np.random.default_rng(0).permutation(table["patient"].unique())
    return np.where(table["patient"].isin(patients[: int(0.7 * len(patients))]), "train", wanted)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path("demo/cxr/labels.csv"), help="table of the films")
    parser.add_argument("--image-dir", type=Path, help="folder of the films (images beside --csv)")
    parser.add_argument("--split-file", type=Path, help="CSV of FileID and split")
    parser.add_argument("--split", default="test", help="films that are scored")
    parser.add_argument("--predictions", type=Path, help="the model's")
    args = parser.parse_args(argv)
    table = common.read_table(args.csv, ";,\t")
    truth = table[ZONES].replace("", "nan").to_numpy(np.float32)  # (n, 6), NaN: not graded
    split = split_of(table, args.split_file, args.split)
    train, test = split == "train", split == args.split
    if not train.any() or not test.any():
        raise SystemExit(f"error: {train.sum()} films are in the split train, {test.sum()} in {args.split}")
    folder = args.image_dir or args.csv.parent / "images"
    masks = folder.parent / "masks"
    numbers = {"film": [], "lungs": [] if masks.is_dir() else None}
    for film in table["FileID"]:
        pixels = read_grey(folder / f"{film}.png")
        numbers["film"].append(moments(pixels, zones_of_film(pixels.shape)))
        if masks.is_dir():
            lungs = [read_grey(masks / f"{film}_{side}_lung_mask.png") > 0.5 for side in ("right", "left")]
            numbers["lungs"].append(moments(pixels, zones_of_lungs(lungs)))

    said = {"median of the zone": np.broadcast_to(np.nanmedian(truth[train], 0), truth[test].shape)}
    for name, rows in numbers.items():
        if rows:
            x, scores = np.array(rows), []
            for y in truth.T:
                use = train & ~np.isnan(y)
                ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))).fit(x[use], y[use])
                scores.append(ridge.predict(x[test]))
            said[f"ridge, thirds of the {name}"] = np.stack(scores, 1)
    if args.predictions:
        rows = common.read_table(args.predictions).set_index("FileID").loc[table["FileID"][test]]
        said["the model"] = rows[[f"{zone}_expected" for zone in ZONES]].to_numpy(np.float32)

    graded = ~np.isnan(truth[test])
    true, kappa = truth[test][graded].astype(int), {}
    print(f"{train.sum()} films to fit, {test.sum()} of the split {args.split} with {graded.sum()} graded zones")
    for name, scores in said.items():
        rounded = np.clip(np.rint(scores[graded]), 0, 3).astype(int)
        counts = np.zeros((4, 4))
        np.add.at(counts, (true, rounded), 1)
        kappa[name] = float(common.quadratic_kappa(counts))
        print(f"{name:24s} QWK {kappa[name]:.3f}   MAE {np.abs(rounded - true).mean():.3f}")
    model = kappa.pop("the model", 1.0)
    return int(max(kappa.values()) > 0.6 or model < 0.8)


if __name__ == "__main__":
    sys.exit(main())
