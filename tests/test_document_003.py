"""Every command, default and file name of the user document of run_task2.py, read from the document itself.

`python` stands for `conda run -n svenv python`, run_task2.py for train_multi_abnormality_model.py; `--epochs 1` and
`--num-workers 0` are added at the end. The ResNets have one block a stage, the slices 32 pixels.
"""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from test_ct_volumes import chest, save_nifti

import common
import run_task2 as task2

if not SHARED.is_dir():
    pytest.skip(f"needs {SHARED} (the user documents)", allow_module_level=True)

TEXT = next((SHARED / "seeds").glob("003*.txt")).read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
LINES = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in BLOCKS.splitlines()]
COMMANDS = [
    line.replace("conda run -n svenv python ", "").replace("train_multi_abnormality_model.py", "run_task2.py")
    for line in LINES
    if line.startswith("conda run") and ".py " in line
]
FLAGS = sorted({line for line in LINES if line.startswith("--")})
LOGS = "logs/multi_abnormality_classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ct_rate_data with the labels, ct_rate_2d with 44 + 8 slices, the files that predict names, ImageNet files."""
    folder = tmp_path_factory.mktemp("document_003")
    rng, labels = np.random.default_rng(0), []
    for split, n in (("train", 22), ("valid", 4)):
        rows = []
        for path in ("splits", f"slices/{split}"):
            (folder / "ct_rate_2d" / path).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            y, name = (rng.random(18) < 0.4).astype(int), f"{split}_{i + 1}_a_1.nii.gz"
            labels.append([name, *y, split])
            for j in (45, 60):
                file = f"slices/{split}/{name}_slice_{j:03d}.npy"
                image = rng.uniform(0, 0.6, (32, 32)) + 0.4 * y[0]
                np.save(folder / "ct_rate_2d" / file, image.astype(np.float32))
                rows.append([f"{name}_slice_{j:03d}", name, j, 0.5, file, "[32, 32]", "[100, 512, 512]", split])
        columns = ["slice_id", "volume_name", "slice_index", "relative_position", "file_path", "slice_shape"]
        table = pd.DataFrame(rows, columns=[*columns, "original_volume_shape", "split"])
        table.to_csv(folder / "ct_rate_2d" / "splits" / f"{split}_slices.csv", index=False)
    (folder / "ct_rate_data").mkdir()
    table = pd.DataFrame(labels, columns=["VolumeName", *task2.LABELS, "split"])
    table.to_csv(folder / "ct_rate_data" / "multi_abnormality_labels.csv", index=False)
    for name in ("slice1", "slice2", "slice3", "file1"):
        np.save(folder / f"{name}.npy", rng.uniform(0, 1, (32, 32)).astype(np.float32))
    for i in (1, 2):
        save_nifti(folder / f"volume{i}.nii.gz", chest((30, 40, 40), seed=i))
    return folder


@pytest.fixture(autouse=True)
def run_there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(task2, "RESNETS", {"resnet50": (1, 1, 1, 1), "resnet101": (1, 1, 2, 1)})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    for name in task2.IMAGENET:
        path = folder / "hub" / "checkpoints" / task2.IMAGENET[name]
        if not path.exists() and name != "densenet121":
            path.parent.mkdir(parents=True, exist_ok=True)
            state = task2.build_backbone(task2.parse_args(["--model", name])).state_dict()
            torch.save({**state, "fc.weight": torch.zeros(1000, 8)}, path)


def call(words) -> int:
    return common.run_main(lambda: task2.main([*words, "--epochs", "1", "--num-workers", "0"]))


def test_every_line_of_the_document_is_known():
    others = [x for x in LINES if x and x not in FLAGS and not x.startswith("conda run")]
    assert len(COMMANDS) == 30 and len(FLAGS) >= 15
    assert {line.split()[0] for line in others} == {"tensorboard", "ls", "nvidia-smi", "python"}
    known = {o for a in task2.build_parser()._actions for o in a.option_strings} | {"--logdir", "--help"}
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)} <= known


@pytest.mark.parametrize("line", list(dict.fromkeys(COMMANDS)))
def test_command(line, folder, capsys):
    words = shlex.split(line)[1:]
    if "[MODE]" in words:
        return
    args = task2.parse_args(words)
    if args.mode in ("evaluate", "predict") and not (folder / task2.BEST).exists():
        assert call(["--mode", "train"]) == 0
    if args.checkpoint:
        (folder / args.checkpoint).write_bytes((folder / task2.BEST).read_bytes())
    capsys.readouterr()
    assert call(words) == 0
    out = capsys.readouterr()
    if "--gpu-device" in words:
        assert "CUDA is not available: running on the CPU" in out.err
    if args.mode in ("train", "both"):
        version = sorted((folder / LOGS).iterdir(), key=lambda p: int(p.name.split("_")[1]))[-1]
        assert {"hparams.yaml", "training.log", "results.jsonl"} <= {p.name for p in version.iterdir()}
        assert len(list(version.glob("events.out.tfevents.*"))) == 1
        log = (version / "training.log").read_text()
        assert "Epoch 1 - " in log and re.search(r"loaded +\d{2,}", log)
        frozen = "--freeze-backbone" in words or "--progressive-unfreeze" in words
        assert (" 0 of " in log) == frozen
        saved = common.load_checkpoint(folder / task2.BEST)
        assert saved["class_names"] == task2.LABELS and saved["args"]["loss"] == args.loss
        (top,) = (folder / "checkpoints").glob("multi_abnormality-epoch=01-val_loss=*.ckpt")
        assert re.fullmatch(r"multi_abnormality-epoch=01-val_loss=\d+\.\d{3}\.ckpt", top.name)
        assert (folder / "checkpoints" / "last.ckpt").exists()
    if args.mode in ("evaluate", "both"):
        results = json.loads((folder / "results" / "evaluation_results.json").read_text())
        assert {"auroc_macro", "auroc_micro", "f1_macro_05", "f1_macro_opt", "accuracy"} <= set(results)
        assert results["n_volumes"] == 4 and results["n_slices"] == 8
    if args.mode == "predict":
        found = json.loads((folder / f"predictions_{args.predict_type}.json").read_text())["predictions"]
        assert [one["file_path"] for one in found] == [str(p) for p in args.predict_input]
        assert all(list(one["probabilities"]) == task2.LABELS for one in found)


@pytest.mark.parametrize("line", FLAGS)
def test_flag_lines_parse(line):
    for choice in re.findall(r"\{(.*?)\}", line):
        for value in choice.split(","):
            task2.parse_args(shlex.split(re.sub(r"\{.*?\}", value, line)))
    if "{" not in line:
        task2.parse_args(shlex.split(line))


def test_defaults():
    args = task2.parse_args([])
    assert (args.lr, args.weight_decay, args.plateau_factor, args.plateau_patience) == (1e-4, 1e-5, 0.5, 5)
    assert (args.batch_size, args.epochs, args.early_stopping_patience, args.top_k) == (32, 100, 10, 3)
    assert (args.mode, args.monitor, args.scheduler, args.optimizer) == ("both", "val_loss", "plateau", "adamw")
    assert (str(args.data_dir), str(args.slice_dir), args.model) == ("ct_rate_data", "ct_rate_2d", "resnet50")
    assert (args.cutmix_prob, args.unfreeze_epoch, args.use_attention, args.loss) == (0.5, 10, "none", "focal")
    assert (args.focal_alpha, args.focal_gamma) == (0.85, 4.0)
    assert (args.asl_gamma_neg, args.asl_gamma_pos, args.asl_clip) == (6, 1, 0.05)
    assert (args.rotation, args.flip_prob, args.augment, args.use_advanced_aug) == (10, 0.5, True, False)
    for name, value in re.findall(r"^(learning_rate|weight_decay|factor|patience): ([\d.e-]+)", TEXT, re.M):
        ours = {"learning_rate": [args.lr], "weight_decay": [args.weight_decay], "factor": [args.plateau_factor]}
        assert float(value) in ours.get(name, [args.plateau_patience, args.early_stopping_patience])


def test_classes_and_tree_are_the_documents():
    names = re.findall(r'"([^"]+)"', re.search(r"abnormality_classes = \[(.*?)\]", TEXT, re.DOTALL)[1])
    assert names == task2.LABELS and sorted(names) == sorted(common.CT_RATE_LABELS)
    name = task2.TOP.format(epoch=1, val_loss=0.123).split("/")[1]
    assert name in TEXT and "└── last.ckpt" in TEXT and task2.LAST.endswith("/last.ckpt")
    assert "multi_abnormality_classification/" in TEXT and "hparams.yaml" in TEXT


def test_tensorboard_reads_the_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (folder / LOGS).exists():
        assert call(["--mode", "train"]) == 0
    events = EventAccumulator(str(next((folder / LOGS).iterdir()))).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "val/val_loss", "val/macro_auroc"} <= set(tags)
