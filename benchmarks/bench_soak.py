"""A long run of a tiny model: is the memory, the number of open files and the time of a step flat?

    python benchmarks/bench_soak.py [--steps 20000] [--worker-steps 2000] [--output-dir DIR]

finetune_siglip.py trains on eight volumes of 2 x 32 x 32 voxels with averaged weights and TensorBoard: 200 log lines,
40 evaluations and checkpoints a run; once without data workers, once, shorter, with two. From outside, at every log
line: resident memory, open files, threads and CPU time of the process, and resident memory of its data workers. Printed
are medians of the second and the last tenth of the run, and the CPU time per step in its second and last fifth. Exit
code 1 if memory grows by 2 % or more, if open files or threads become more, or if a step comes to take over 1.2 times
the CPU time.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")


def write_data(folder: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        volume = rng.normal(-500 + 300 * (i % 2), 100, (1, 2, 32, 32)).astype(np.int16)
        np.savez(folder / f"v{i}.npz", image=volume, spacing=np.float32([2, 1, 1]))
        rows.append([f"case{i}", "train" if i < 8 else "val", f"v{i}.npz", i % 2])
    pd.DataFrame(rows, columns=["series_id", "split", "img_path", "bright"]).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def resident(pid: int) -> float:
    """MiB of memory; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def look(pid: int, workers: int) -> list[float]:
    """CPU seconds so far, MiB, open files, threads, MiB of the training's data workers (the oldest children)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    files = len(os.listdir(f"/proc/{pid}/fd"))
    theirs = sum(map(resident, children[:workers]))
    return [(int(fields[11]) + int(fields[12])) / TICK, resident(pid), files, int(fields[17]), theirs]


def soak(csv: Path, out: Path, steps: int, workers: int) -> np.ndarray:
    """Train -> rows of (step, CPU seconds, MiB, open files, threads, MiB of workers), one for each log line."""
    words = ["finetune_siglip.py", "--csv", csv, "--pretrained", "none", "--arch", "siglip-tiny", "--num-slices", 2]
    words += ["--label-columns", "bright", "--image-size", 32, "--batch-size", 2, "--max-steps", steps, "--lr", 1e-4]
    words += ["--num-workers", workers, "--early-stopping-patience", steps, "--use-ema", "--tensorboard", "--overwrite"]
    words += ["--eval-every", steps // 40, "--save-every", steps // 40, "--log-interval", max(1, steps // 200)]
    words += ["--device", "cpu", "--output-dir", out]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / "text.txt").open("w") as text:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=env, stdout=text, stderr=text)
    rows, log, file = [], out / "training.log", None
    while process.poll() is None:
        file = file or (log.open() if log.exists() else None)
        found = re.findall(r"Step (\d+)/", file.read()) if file else []
        if found:
            try:
                rows.append([int(found[-1]), *look(process.pid, workers)])
            except (OSError, IndexError):  # it has ended
                break
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {(out.parent / 'text.txt').read_text()[-2000:]}")
    return np.array(rows)


def judge(rows: np.ndarray, steps: int, limit: float, slowdown: float) -> bool:
    """Print what was seen; whether all of it is flat."""
    share = rows[:, 0] / steps
    start, end = (share > 0.1) & (share <= 0.2), share > 0.9
    flat = True
    for column, name, allowed in ((2, "memory, MiB", limit), (5, "workers, MiB", limit), (3, "open files", 0),
                                  (4, "threads", 0)):  # fmt: skip
        a, b = (float(np.median(rows[part, column])) for part in (start, end))
        growth = 100 * (b / a - 1) if a else 0.0
        flat &= growth < allowed if allowed else b <= a
        if a:
            print(f"  {name:13} {a:9.2f} -> {b:9.2f}   {growth:+.2f} %")
    fifths = [rows[(share > low) & (share <= low + 0.2)] for low in (0.2, 0.8)]
    a, b = (1000 * (x[-1, 1] - x[0, 1]) / (x[-1, 0] - x[0, 0]) for x in fifths)
    print(f"  {'CPU ms / step':13} {a:9.2f} -> {b:9.2f}   x {b / a:.3f}")
    return bool(flat and b <= slowdown * a)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps without data workers")
    parser.add_argument("--worker-steps", type=int, default=2000, help="optimizer steps with two data workers")
    parser.add_argument("--max-growth", type=float, default=2.0, help="growth of memory that is too much, percent")
    parser.add_argument("--max-slowdown", type=float, default=1.2, help="CPU time of a late step over an early one's")
    parser.add_argument("--output-dir", type=Path, help="keeps the runs and the samples; default: a temporary folder")
    args = parser.parse_args(argv)
    flat = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        for workers, steps in ((0, args.steps), (2, args.worker_steps)):
            if steps:
                out = folder / f"workers{workers}" / "run"
                out.parent.mkdir(parents=True, exist_ok=True)
                rows = soak(write_data(out.parent), out, steps, workers)
                np.savetxt(out.parent / "samples.csv", rows, "%.3f", ",", header="step,cpu,rss,files,threads,workers")
                print(f"{steps} steps, {workers} data workers ({len(rows)} samples):")
                flat &= judge(rows, steps, args.max_growth, args.max_slowdown)
    print("flat" if flat else "NOT flat")
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
