"""Volumes to slice batches for prediction: run_task2.py's path beside plain nibabel, from .nii.gz files.

    python benchmarks/bench_nifti.py [--n 4] [--shape 300 512 512] [--threads 2]

The peer is what most prediction scripts do, one volume after the other: nibabel.load(path).get_fdata(), turned to
depth first, then the slices that are wanted, windowed, resized to 224 pixels with the same antialiased filter. Ours
inflates with isal, keeps int16, finds the chest, takes the same number of slices and reads ahead in threads. Wall and
CPU seconds of each, in turns, files in the page cache. Required: >= 1.5 times in wall seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_cache import chest  # noqa: E402

import run_task2 as task2  # noqa: E402

N_SLICES, SIZE = 12, 224


def peer(paths, index):
    """(volumes, slices, size, size) uint8."""
    out = []
    for path, places in zip(paths, index, strict=True):
        volume = np.transpose(nib.load(path).get_fdata(), (2, 1, 0))[places]  # (S, H, W) float64 HU
        levels = (np.clip(volume, -1000, 400) + 1000) / 1400 * 255
        image = torch.from_numpy(levels)[:, None].float()
        out.append(F.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)[:, 0].round().to(torch.uint8))
    return torch.stack(out)


def ours(paths, args, threads):
    found = list(task2.in_threads(lambda path: task2.slices_of_volume(path, args, {}), paths, threads))
    return [index for _, (index, _) in found], torch.from_numpy(np.stack([pixels[:, 0] for _, (_, pixels) in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4, help="volumes")
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="slices, rows, columns")
    parser.add_argument("--threads", type=int, default=2, help="of our reader (--num-workers of run_task2.py)")
    parser.add_argument("--turns", type=int, default=3, help="times each side reads all volumes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task_args = task2.parse_args([])
    task_args.slice_size = task_args.image_size = SIZE
    task_args.slice_store, task_args.window_values, task_args.extraction = "uint8", [[-300.0, 1400.0]], {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.nii.gz" for i in range(args.n)]
        for i, path in enumerate(paths):
            array = np.ascontiguousarray(chest(args.shape, seed=i).astype(np.int16).transpose(2, 1, 0))
            nib.save(nib.Nifti1Image(array, np.diag([-0.7, -0.7, 1.25, 1])), path)
        index, pixels = ours(paths, task_args, args.threads)
        difference = (peer(paths, index).int() - pixels.int()).abs()
        shape, size = " x ".join(map(str, args.shape)), paths[0].stat().st_size / 2**20
        print(f"{args.n} volumes of {shape}, {size:.0f} MiB each; grey levels differ by at most {difference.max()}, "
              f"mean {difference.float().mean():.3f} (ours resizes HU, then windows)")  # fmt: skip
        wall, cpu = {"ours": [], "peer": []}, {"ours": [], "peer": []}
        for _ in range(args.turns):
            for who, run in (
                ("ours", lambda: ours(paths, task_args, args.threads)),
                ("peer", lambda: peer(paths, index)),
            ):
                start = time.perf_counter(), time.process_time()
                run()
                wall[who].append((time.perf_counter() - start[0]) / args.n)
                cpu[who].append((time.process_time() - start[1]) / args.n)
        for name, seconds in (("wall", wall), ("CPU", cpu)):
            a, b = np.median(seconds["ours"]), np.median(seconds["peer"])
            print(f"{name:4} seconds a volume: ours {a:.2f}, nibabel {b:.2f}: {b / a:.1f} x")


if __name__ == "__main__":
    main()
