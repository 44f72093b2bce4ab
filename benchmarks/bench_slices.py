"""Slices per CPU-second from disk to batch: ours beside the usual path of a folder of .npy files.

    python benchmarks/bench_slices.py [--n 2000] [--size 224]

The peer is what mehreen019/vlm3d-task-2 and many slice trainings do: a float32 .npy file a slice, three copies as a PIL
image, two warps with nearest neighbours (RandomRotation, RandomAffine) and two jitters when augmenting, ToTensor,
normalisation, and 18 look-ups in a pandas row. Ours is the training data set of run_task2.py on the packed array: one
warp, bilinear or nearest, with the jitters in one multiplication. It hands grey levels to the model, which converts and
normalises on its device: "to input" has our time with that on the CPU. Both run in this process without workers, in
turns, with the page cache warm. Required: >= 10 times without augmentation, >= 2 bilinear, >= 5 nearest.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_task2 as task2  # noqa: E402
from common import CT_RATE_LABELS  # noqa: E402
from prepare_ct import Pack  # noqa: E402

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (task2.IMAGENET_MEAN, task2.IMAGENET_STD))


def make_data(folder: Path, n: int, size: int) -> None:
    """n slices of smooth noise: float32 files, the packed array, the table with 18 labels."""
    rng = np.random.default_rng(0)
    (folder / "slices").mkdir(parents=True)
    (folder / "splits").mkdir()
    coarse = rng.uniform(0, 255, (64, size // 8, size // 8)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(c).resize((size, size), Image.BILINEAR)) for c in coarse]
    for split, count in (("train", n), ("valid", 8)):
        labels = rng.integers(0, 2, (count // 12 + 1, 18))
        pack, rows = Pack(folder / "packed" / f"{split}.npy", "uint8", size), []
        for i in range(count):
            image = images[i % 64]
            name = f"{split}_{i // 12}_a_1.nii.gz"
            path = f"slices/{name}_slice_{i % 12:03d}.npy"
            np.save(folder / path, image.astype(np.float32) / 255)
            rows.append([f"{name}_slice_{i % 12:03d}", name, path, pack.append(image[None]), *labels[i // 12]])
        columns = ["slice_id", "volume_name", "file_path", "packed_row", *CT_RATE_LABELS]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "splits" / f"{split}_slices.csv", index=False)


class Peer:
    """The usual data set."""

    def __init__(self, folder: Path, augment: bool):
        self.folder, self.augment = folder, augment
        self.table = pd.read_csv(folder / "splits" / "train_slices.csv")

    def __getitem__(self, index):
        row = self.table.iloc[index]
        pixels = np.load(self.folder / row["file_path"])
        image = Image.fromarray((np.stack([pixels] * 3, -1) * 255).astype(np.uint8))
        if self.augment:
            rng = np.random.default_rng(index)
            image = image.rotate(rng.uniform(-10, 10))
            image = image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
            shift = rng.uniform(-0.05, 0.05, 2) * image.size[0]
            image = image.transform(image.size, Image.AFFINE, (1, 0, shift[0], 0, 1, shift[1]))
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1))
            image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.9, 1.1))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        labels = torch.tensor([float(row[name]) for name in CT_RATE_LABELS])
        return (x - MEAN) / STD, labels


def peer_batch(peer, index):
    images, labels = zip(*(peer[i] for i in index), strict=True)
    return torch.stack(images), torch.stack(labels)


def our_batch(dataset, index):
    return torch.utils.data.default_collate([dataset[0, i] for i in index])


def measure(dataset, model, peer, batches) -> dict[str, float]:
    """CPU seconds of each, in turns."""
    spent = {"ours": 0.0, "to input": 0.0, "peer": 0.0}
    for index in batches:
        marks = [time.process_time()]
        batch = our_batch(dataset, index)
        marks.append(time.process_time())
        model.to_input(batch["image"][:, 0])
        marks.append(time.process_time())
        peer_batch(peer, index)
        marks.append(time.process_time())
        for who, seconds in zip(spent, np.diff(marks), strict=True):
            spent[who] += seconds
    spent["to input"] += spent["ours"]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="slices")
    parser.add_argument("--size", type=int, default=224, help="side of a slice in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.n, args.size)
        words = ["--slice-dir", folder, "--data-dir", folder, "--augment-on", "workers", "--label-columns"]
        cases = {"no augmentation": ["--no-augment"], "bilinear": [], "nearest": ["--interpolation", "nearest"]}
        print(f"{args.n} slices of {args.size} x {args.size}, batches of 32; slices per CPU-second")
        print(f"{'':16} {'ours':>8} {'to input':>9} {'peer':>6} {'ratio':>7} {'to input':>9}")
        for name, more in cases.items():
            task_args = task2.parse_args([*words, *CT_RATE_LABELS, *more])
            dataset = task2.build_datasets(task_args)[0]
            model, peer = task2.SliceClassifier(task_args), Peer(Path(folder), name != "no augmentation")
            batches = np.random.default_rng(0).permutation(args.n)[: args.n // 32 * 32].reshape(-1, 32).tolist()
            if name == "no augmentation":  # the same pixels and labels first
                batch, (images, labels) = our_batch(dataset, batches[0]), peer_batch(peer, batches[0])
                assert (model.to_input(batch["image"][:, 0]) - images).abs().max() < 2 / 255 / 0.22
                assert torch.equal(batch["target"], labels)
            spent = measure(dataset, model, peer, batches)
            ours, whole, theirs = (len(batches) * 32 / seconds for seconds in spent.values())
            ratios = f"{ours / theirs:6.1f}x {whole / theirs:8.1f}x"
            print(f"{name:16} {ours:8.0f} {whole:9.0f} {theirs:6.0f} {ratios}")


if __name__ == "__main__":
    main()
