"""Paths and golden files for all tests. The shared folder is optional: tests that need it skip, saying so."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

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


@pytest.fixture(autouse=True)
def own_signals():
    """train() listens to signals; give them back to pytest."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def tensors_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(one, other, script):
    """Two run folders of a training script hold the same last checkpoint, results and best models, bit for bit."""
    import common

    a, b = (common.load_checkpoint(common.last_files(folder / script.LAST)[0]) for folder in (one, other))
    different = [p for p in ("model", "ema", "optimizer", "state") if not tensors_equal(a[p], b[p])]
    assert not different, different
    results = script.RESULTS.format(version=0)
    assert (one / results).read_bytes() == (other / results).read_bytes()
    names = [e["path"] for e in a["state"]["best"]]
    assert names == [e["path"] for e in b["state"]["best"]] and names
    for name in [*names, script.BEST]:
        x, y = (common.load_checkpoint(folder / name) for folder in (one, other))
        assert tensors_equal(x["model"], y["model"]) and x["metrics"].keys() == y["metrics"].keys(), name


def start_and_kill(words, world, after, out):
    """Start a run, wait until its log shows step `after`, kill -9 everything."""
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    process = subprocess.Popen(
        [*launcher, *map(str, words)], cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline, text = time.time() + 120, ""
    while time.time() < deadline and process.poll() is None and f"Step {after}/" not in text:
        logs = [*out.rglob("training.log"), *out.rglob("out_*.log")]
        text = "".join(log.read_text() for log in logs)
        time.sleep(0.005)
    # launcher, ranks (in their own sessions), data workers
    subprocess.run(["pkill", "-9", "-f", str(out)], check=False)
    process.wait()
    assert f"Step {after}/" in text


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/plainscan_was_owned",))


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


@pytest.fixture(scope="session")
def tiny_slices(tmp_path_factory):
    """A slice folder: 16 train and 7 valid volumes with 2 to 4 uint8 slices of 32 pixels each; labels as in tiny_ct."""
    folder = tmp_path_factory.mktemp("tiny_slices")
    rng, labels = np.random.default_rng(0), []
    (folder / "splits").mkdir()
    for split, cases in (("train", range(16)), ("valid", range(16, 23))):
        rows = []
        (folder / "slices" / split).mkdir(parents=True)
        for i in cases:
            y, name = [i % 2, (i // 2) % 2, (i // 4) % 2], f"case{i}.nii.gz"
            labels.append([name, y[0], y[1], "" if i % 4 == 3 else y[2]])
            for j in range(2 + i % 3):
                image = rng.normal(90, 20, (32, 32))
                image[4:14, 4:14] += 90 * y[0]
                image[18:28, 4:14] -= 70 * y[1]
                path = f"slices/{split}/{name}_slice_{j:03d}.npy"
                np.save(folder / path, image.clip(0, 255).astype(np.uint8))
                rows.append([f"{name}_slice_{j:03d}", name, path])
        table = pd.DataFrame(rows, columns=["slice_id", "volume_name", "file_path"])
        table.to_csv(folder / "splits" / f"{split}_slices.csv", index=False)
    table = pd.DataFrame(labels, columns=["VolumeName", *LABELS])
    table.to_csv(folder / "multi_abnormality_labels.csv", index=False)
    return folder


def slice_args(folder, out, *more):
    """Command line of a run of seconds: EfficientNet-B0 on 32 pixels, no ImageNet weights."""
    return [
        "run_task2.py", "--slice-dir", folder, "--mode", "train", "--model", "efficientnet_b0", "--pretrained", "none",
        "--label-columns", *LABELS, "--batch-size", 8, "--epochs", 3, "--lr", "1e-3", "--num-workers", 0,
        "--no-tensorboard", "--output-dir", out, "--log-interval", 1, *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_reports(tmp_path_factory):
    """A folder with train (16 volumes) and valid (9), caches of CT-CLIP's tiny preset, and vocab.txt.

    `first` is a bright block low in the volume, `second` a dark one, `third` is unknown for every fourth row; the last
    validation case has no report, and two of training have the same one.
    """
    folder = tmp_path_factory.mktemp("tiny_reports")
    rng = np.random.default_rng(0)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . first second third is not present there no seen case".split()
    words += [str(i) for i in range(30)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    for split, cases in (("train", range(16)), ("valid", range(16, 25))):
        (folder / split).mkdir()
        rows = []
        for i in cases:
            y = [i % 2, (i // 2) % 2, (i // 4) % 2]
            volume = rng.normal(-500, 100, (24, 96, 96))
            volume[4:12, 16:48, 16:48] += 500 * y[0]
            volume[14:22, 48:80, 16:48] -= 400 * y[1]
            np.save(folder / split / f"case{i}.npy", volume.clip(-1000, 1000).astype(np.int16))
            findings = " ".join(f"{n} is {'seen' if v else 'not seen'}." for n, v in zip(LABELS, y, strict=True))
            findings = "" if i == 24 else "case 1. " + findings if i in (1, 9) else f"case {i}. " + findings
            rows.append([f"case{i}", f"p{i}", f"case{i}.npy", findings, "", y[0], y[1], "" if i % 4 == 3 else y[2]])
        columns = ["series_id", "patient_id", "img_path", "findings", "impression", *LABELS]
        pd.DataFrame(rows, columns=columns).to_csv(folder / split / "volumes.csv", index=False)
    return folder


def report_args(folder, out, *more):
    """Command line of a run of seconds: the tiny preset, steps of 4 pairs, three epochs."""
    return [
        "train_ctclip.py", "--preset", "tiny", "--train-data", folder / "train", "--valid-data", folder / "valid",
        "--vocab", folder / "vocab.txt", "--label-columns", *LABELS, "--batch-size", 4, "--max-steps", 12,
        "--eval-every", 4, "--save-every", 3, "--lr", "1e-3", "--warmup", 0, "--num-workers", 0, "--output-dir", out,
        "--log-interval", 1, *more,
    ]  # fmt: skip


@pytest.fixture
def shell_env() -> dict:
    """Environment for shell scripts in which `python`, `python3` and `torchrun` are those that run the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = ["CSV_FILE", "PRETRAINED_PATH", "OUTPUT_BASE_DIR", "NUM_GPUS", "SEED", "WANDB_MODE", "WANDB_API_KEY"]
    names += ["TRAIN_CSV", "VAL_CSV", "TEST_CSV", "DATASET", "IMAGE_DIR", "VOCAB", "PRETRAINED", "OUT", "RUN_NAME"]
    names += ["VISION_MODEL", "TEXT_MODEL", "BATCH_SIZE", "MAX_EPOCHS", "USE_FLASH_ATTN", "DEMO_N", "DEMO_EPOCHS"]
    own = {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "PET_MASTER_PORT": str(free_port()),
    }  # torchrun's own port may be taken
    return {k: v for k, v in os.environ.items() if k not in names} | own


def real_slices(shared: Path, folder: Path) -> Path:
    """The labelled slices of the shared folder as run_task2.py reads them: a slice is a volume, a paper a patient."""
    from PIL import Image

    source = shared / "data" / "ct_slices"
    table = pd.read_csv(source / "labels.csv")
    (folder / "splits").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "valid")):
        part = table[table["split"] == split]
        rows = []
        for row in part.itertuples():
            stem = Path(row.image_path).stem
            path = folder / "slices" / name / f"{stem}_slice_000.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.asarray(Image.open(source / row.image_path).convert("L"), np.uint8))
            rows.append([path.stem, stem, str(path.relative_to(folder)), row.group, row.label])
        columns = ["slice_id", "volume_name", "file_path", "patient_id", "COVID"]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "splits" / f"{name}_slices.csv", index=False)
    return folder


def write_fundus(folder: Path, pairs, images, labels=None, monocular: bool = False) -> None:
    """An LMDB folder as the original builders write it, and the same as TSV and JSONL beside it ({folder}_imgs.tsv).

    pairs: [(image id, text id, text)]; images: {id: (left, right)} of image files, b'' = missing, or {id: (file,)}.
    """
    import base64
    import pickle

    import lmdb

    encoded = {k: tuple(base64.urlsafe_b64encode(x).decode() for x in v) for k, v in images.items()}
    value = (lambda v: v[0].encode()) if monocular else pickle.dumps
    contents = {"imgs": {str(k): value(v) for k, v in encoded.items()} | {"num_images": b"%d" % len(images)}}
    contents["pairs"] = {str(i): pickle.dumps(p) for i, p in enumerate(pairs)} | {"num_samples": b"%d" % len(pairs)}
    for name, items in contents.items():
        (folder / name).mkdir(parents=True)
        with lmdb.open(str(folder / name), map_size=2**24) as env, env.begin(write=True) as txn:
            for k, v in items.items():
                txn.put(k.encode(), v)
    lines = ["\t".join([str(k), *v]) + "\n" for k, v in encoded.items()]
    folder.with_name(folder.name + "_imgs.tsv").write_text("".join(lines))
    texts = {}
    for image, text_id, text in pairs:
        texts.setdefault(text_id, {"text_id": text_id, "text": text, "image_ids": []})["image_ids"].append(image)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in texts.values()]
    folder.with_name(folder.name + "_texts.jsonl").write_text("".join(lines))
    if labels is not None:
        labels.to_csv(folder / "labels.csv", index=False)
        labels.to_csv(folder.with_name(folder.name + "_labels.csv"), index=False)


@pytest.fixture(scope="session")
def tiny_fundus(tmp_path_factory):
    """A folder with train (16 pairs of eyes, 18 reports) and val (9 and 10), as LMDB and as TSV/JSONL, and vocab.txt.

    `first` is a bright upper half of an eye, `second` a bright lower half, of 32 pixels; patient 1 of val has no right
    eye. The first two images of a split have a second report, and two of training the same report.
    """
    import io

    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("tiny_fundus"), np.random.default_rng(0)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . : left right both eyes eye first second case again".split()
    words += [str(i) for i in range(40)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    for split, cases in (("train", range(16)), ("val", range(16, 25))):
        images, pairs, rows = {}, [], []
        for i in cases:
            eyes, names = [], ["first" if bit else "second" for bit in (i % 2, (i // 2) % 2)]
            for eye in names:
                pixels = rng.normal(90, 20, (32, 32, 3))
                half = slice(0, 16) if eye == "first" else slice(16, 32)
                pixels[half] += 90
                file = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
                eyes.append(file.getvalue())
            images[f"P{i}"] = (eyes[0], b"" if i == 17 else eyes[1])
            case = 1 if i in (1, 9) else i  # 1 and 9: the same patient's words
            pairs.append((f"P{i}", i, f"case {case}. left eye: {names[0]}. right eye: {names[1]}."))
            if i in (0, 1, 16):
                pairs.append((f"P{i}", 100 + i, f"again case {i}: left {names[0]}, right {names[1]}."))
            label = names[0] if names[0] == names[1] else " / ".join(names)
            rows.append([f"P{i}", f"p{i}", label, *names])
        table = pd.DataFrame(rows, columns=["image_id", "patient_id", "label", "left_label", "right_label"])
        write_fundus(folder / split, pairs, images, table)
    return folder


def fundus_args(folder, out, *more):
    """Command line of a run of seconds: the tiny presets on 32 pixels, steps of 4 pairs, three epochs."""
    return [
        "train_retclip.py", "--train-data", folder / "train", "--val-data", folder / "val", "--vision-model", "tiny",
        "--text-model", "tiny", "--image-size", 32, "--vocab", folder / "vocab.txt", "--batch-size", 4, "--epochs", 3,
        "--lr", "1e-3", "--warmup", 2, "--num-workers", 0, "--save-every", 3, "--log-interval", 1, "--output-dir", out,
        *more,
    ]  # fmt: skip


ZONES = ["right_sup", "left_sup", "right_mid", "left_mid", "right_inf", "left_inf"]


@pytest.fixture(scope="session")
def tiny_films(tmp_path_factory):
    """A folder with images/ (26 films of 60 x 72 pixels, PNG) and labels.csv with ;: 16 train, 7 val, 3 test.

    A zone is as bright as its score; every fifth zone is unknown, film 20 altogether. Films 2 i and 2 i + 1 are of one
    patient up to film 11; every third has a diagnosis, view PA or AP.
    """
    from PIL import Image

    folder, rng, rows = tmp_path_factory.mktemp("tiny_films"), np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(26):
        scores = rng.integers(0, 4, 6)
        film = rng.normal(60, 12, (72, 60))
        for zone, score in enumerate(scores):
            row, column = divmod(zone, 2)
            film[24 * row : 24 * row + 24, 30 * column : 30 * column + 30] += 45 * score
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        shown = ["" if i == 20 or (6 * i + zone) % 5 == 4 else score for zone, score in enumerate(scores)]
        known = [s for s in shown if s != ""]
        csi = round(float(np.mean(known)), 3) if known else ""
        split = "train" if i < 16 else "val" if i < 23 else "test"
        rows.append([i, *shown, csi, f"p{i // 2 if i < 12 else i}", "AP" if i % 2 else "PA", int(i % 3 == 0), split])
    columns = ["FileID", *ZONES, "csi", "patient", "view", "diagnosis", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "labels.csv", index=False, sep=";")
    return folder


def film_args(folder, out, *more):
    """Command line of a run of seconds: Custom_1 on 64 pixels, three epochs of four steps."""
    return [
        "train_csi.py", "--csv", folder / "labels.csv", "--image-dir", folder / "images", "--model", "Custom_1",
        "--pretrained", "none", "--image-size", 64, "--batch-size", 4, "--epochs", 3, "--lr", "1e-3", "--num-workers",
        0, "--no-tensorboard", "--output-dir", out, "--log-interval", 1, *more,
    ]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest file first, so that two test processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def pytest_terminal_summary(terminalreporter):
    """The last line but one: how many faults the tests that count them have injected (test_faults.py)."""
    reports = [r for some in terminalreporter.stats.values() for r in some if getattr(r, "when", None) == "teardown"]
    n = sum(value for r in reports for name, value in r.user_properties if name == "faults")
    if n:
        terminalreporter.write_line(f"{n} faults injected")
