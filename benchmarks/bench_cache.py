"""Reading a CT volume: the int16 cache beside compressed float32 npz, and our NIfTI reader beside nibabel's get_fdata.

    python benchmarks/bench_cache.py

One synthetic chest (air, body, lungs, noise of 25 HU, so that it compresses like a real one) is written in each format
and read back whole, the readers taking turns; medians of wall and CPU seconds. The npz is what a preprocessing that
resamples leaves: 0-1, not rounded, np.savez_compressed. All files are in the page cache: a slow disk adds to each side
what its bytes cost, which are printed. Required of the cache against np.load of the npz: >= 50 times faster to an int16
array, >= 15 times to a float32 tensor.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def chest(shape, seed=0) -> np.ndarray:
    """(D, H, W) float32 HU: a body with lungs and a spine in air, with the noise of a scanner in each."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    body, lungs = x**2 + 1.8 * y**2 < 0.8, 5 * (np.abs(x) - 0.4) ** 2 + 2.5 * y**2 < 0.3
    spine = x**2 + (y - 0.5) ** 2 < 0.01
    slice_ = np.where(spine, 500, np.where(lungs, -850, np.where(body, 40, -1000)))
    noise = 25 * rng.standard_normal(shape, dtype=np.float32)
    return (slice_ + np.where(body, noise, 0.3 * noise)).clip(-1000, 1500).astype(np.float32)


def write_files(folder: Path, volume: np.ndarray) -> dict[str, Path]:
    paths = {n: folder / f"v.{n}" for n in ("npy", "npz", "nii.gz")}
    rounded = np.rint(volume).astype(np.int16)
    np.save(paths["npy"], rounded)
    np.savez_compressed(paths["npz"], image=(volume[None] + 1000) / 2500)
    nib.save(nib.Nifti1Image(rounded.transpose(2, 1, 0), np.diag([-0.7, -0.7, 1.5, 1])), paths["nii.gz"])
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 224, 224], help="slices, rows, columns")
    parser.add_argument("--rounds", type=int, default=7, help="times each reader has its turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        volume = chest(args.shape)
        paths = write_files(Path(folder), volume)
        rounded = np.rint(volume).astype(np.int16)
        readers = {  # the second of each pair is ours
            "npz, float32 array": lambda: np.load(paths["npz"])["image"][0],
            "cache, int16 array": lambda: np.array(common.read_volume(paths["npy"]).array),
            "npz, float32 tensor": lambda: torch.from_numpy(np.load(paths["npz"])["image"][0]),
            "cache, float32 tensor": lambda: torch.from_numpy(
                common.read_volume(paths["npy"]).array.astype(np.float32)
            ),
            "nii.gz, get_fdata": lambda: nib.load(paths["nii.gz"]).get_fdata().transpose(2, 1, 0),
            "nii.gz, read_volume": lambda: common.read_volume(paths["nii.gz"]).array,
            "copy in memory, int16": rounded.copy,  # the floor
        }
        wall, cpu = {n: [] for n in readers}, {n: [] for n in readers}
        for i in range(args.rounds + 1):
            for name, read in readers.items():
                clock = time.perf_counter(), time.process_time()
                got = read()
                wall[name].append(time.perf_counter() - clock[0])
                cpu[name].append(time.process_time() - clock[1])
                if i == 0:  # the first round warms up and is not counted
                    hu = np.asarray(got) * 2500 - 1000 if name.startswith("npz") else np.asarray(got)
                    assert np.abs(hu - volume).max() < 0.51, name
                    wall[name].clear(), cpu[name].clear()
        sizes = ", ".join(f"{n} {p.stat().st_size / 2**20:.1f} MiB" for n, p in paths.items())
    print(f"{' x '.join(map(str, args.shape))} voxels: {sizes}; {torch.get_num_threads()} threads")
    wall, cpu = ({n: float(np.median(s)) for n, s in d.items()} for d in (wall, cpu))
    names, failed = list(readers), False
    for peer, ours, required in zip(names[:-1:2], names[1::2], (50, 15, 1), strict=True):
        ratio = wall[peer] / wall[ours]
        failed |= ratio < required
        for name in (peer, ours):
            print(f"  {name:24s} {1000 * wall[name]:9.2f} ms wall {cpu[name]:9.4f} s CPU")
        print(f"    {ratio:.1f} times faster ({cpu[peer] / cpu[ours]:.1f} times less CPU), required {required}")
    print(f"  {names[-1]:24s} {1000 * wall[names[-1]]:9.2f} ms wall")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
