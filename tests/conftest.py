"""Paths and golden files for all tests. The shared folder is optional: tests that need it skip, saying so."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED} (golden files and real images)")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared):
    """golden.fill_state_dict and golden.array of the shared folder, and golden('name') -> dict."""
    spec = importlib.util.spec_from_file_location("golden", shared / "golden" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load = lambda name: json.loads((shared / "golden" / f"{name}.json").read_text())
    return module


def run(*words, world: int = 1, env: dict | None = None, check: int | None = 0, timeout: int = 300):
    """Run a script of the project as a user does (under torchrun for world > 1); returns the finished process."""
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    result = subprocess.run(
        [*launcher, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check is not None:
        assert result.returncode == check, (
            f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
    return result


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


LABELS = ["first", "second", "third"]


@pytest.fixture(scope="session")
def tiny_ct(tmp_path_factory):
    """A folder with 26 volumes (int16 HU, (1, 10, 24, 24) npz) and t.csv: 16 train, 7 val, 3 test; three labels.

    `first` is a bright block low in the volume, `second` a dark one, `third` is unknown for every fourth row.
    """
    folder = tmp_path_factory.mktemp("tiny_ct")
    rng, rows = np.random.default_rng(0), []
    for i in range(26):
        y = [i % 2, (i // 2) % 2, (i // 4) % 2]
        volume = rng.normal(-500, 100, (10, 24, 24))
        volume[2:5, 4:12, 4:12] += 500 * y[0]
        volume[6:9, 12:20, 4:12] -= 400 * y[1]
        np.savez_compressed(folder / f"v{i}.npz", image=volume[None].astype(np.int16), spacing=np.float32([2, 1, 1]))
        split = "train" if i < 16 else "val" if i < 23 else "test"
        rows.append([f"case{i}", split, f"v{i}.npz", y[0], y[1], "" if i % 4 == 3 else y[2]])
    pd.DataFrame(rows, columns=["series_id", "split", "img_path", *LABELS]).to_csv(folder / "t.csv", index=False)
    return folder


def tiny_args(folder, out, *more):
    """Command line of a run of seconds: two-layer-like tiny ViT, 6 slices of 24 pixels."""
    return [
        "finetune_siglip.py", "--csv", folder / "t.csv", "--pretrained", "none", "--arch", "siglip-tiny",
        "--label-columns", *LABELS, "--num-slices", 6, "--image-size", 32, "--batch-size", 4, "--epochs", 3,
        "--lr", "1e-3", "--num-workers", 0, "--output-dir", out, "--log-interval", 1, *more,
    ]  # fmt: skip


@pytest.fixture
def shell_env() -> dict:
    """Environment for shell scripts in which `python`, `python3` and `torchrun` are those that run the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = ("CSV_FILE", "PRETRAINED_PATH", "OUTPUT_BASE_DIR", "NUM_GPUS", "SEED", "WANDB_MODE", "WANDB_API_KEY")
    return {k: v for k, v in os.environ.items() if k not in names} | {"PATH": path, "OMP_NUM_THREADS": "1"}
