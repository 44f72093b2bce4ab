"""Every command, default and file name of the user document of finetune_siglip.py, read from the document itself.

Replaced are the two data paths of its commands; `--epochs 1` is added at the end.
"""

import ast
import json
import re
import shlex
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED

import finetune_siglip as siglip
from common import CT_RATE_LABELS

if not SHARED.is_dir():
    pytest.skip(f"needs {SHARED} (the user documents)", allow_module_level=True)

TEXT = next((SHARED / "seeds").glob("004*.txt")).read_text()
OTHERS = ("pip ", "...")  # lines of code blocks that are not about our scripts


def command_lines() -> list[str]:
    """Lines of the document's bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [" ".join(line.split()) for line in lines if line and not line.startswith(OTHERS)]


LINES = command_lines()
SCRIPT = [line for line in LINES if line.startswith("python finetune_siglip.py ")]
SHELL = [line for line in LINES if line.startswith("./run_finetune.sh ")]
FLAGS = sorted({line for line in LINES if line.startswith("--")})
DEFAULTS = re.findall(r"^- `(--[\w-]+)`: (.*?)(?:\[(.*?)\].*)?\(default: (.*?)\)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """all_ct_wlabels.csv (72 train, 8 val) in the document's form, small.csv (16, 8), SigLIP and Merlin weight files.

    The SigLIP tower is narrow, but has layers enough for `--freeze-up-to 50`.
    """
    folder = tmp_path_factory.mktemp("document_004")
    rng, rows = np.random.default_rng(0), []
    for i in range(80):
        y = (rng.random(18) < 0.4).astype(int)
        volume = rng.normal(-600, 100, (1, 6, 32, 32)) + 300 * y[0]
        if i % 2:  # the document allows 0-1 and HU
            volume = ((volume + 1000) / 2500).clip(0, 1).astype(np.float32)
        np.savez(folder / f"ct{i:03}.npz", image=volume if i % 2 else volume.astype(np.int16))
        rows.append([f"CT{i:03}", "train" if i < 72 else "val", folder / f"ct{i:03}.npz", *y])
    header = re.search(r"```csv\n(.*)\n", TEXT)[1].split(",")
    table = pd.DataFrame(rows, columns=header)
    table.to_csv(folder / "all_ct_wlabels.csv", index=False)
    table.iloc[56:].to_csv(folder / "small.csv", index=False)

    torch.manual_seed(0)
    vit = siglip.SiglipVision(dict(zip(siglip.VIT, (32, 8, 2, 64, 16, 32), strict=True)))
    torch.save({f"vision_model.{k}": v for k, v in vit.state_dict().items()}, folder / "pytorch_model.bin")
    merlin = siglip.MerlinResNet(siglip.ARCHS["merlin-tiny"])
    state = {f"visual.model.encode_image.i3_resnet.{k}": v for k, v in merlin.state_dict().items()}
    torch.save({**state, "logit_scale": torch.ones(()), "text.w": torch.ones(2, 2)}, folder / "merlin.bin")
    return folder


@pytest.fixture(autouse=True)
def run_there(folder, monkeypatch):
    """The document's relative paths (./outputs, ./predictions.csv) are inside the data folder."""
    monkeypatch.chdir(folder)
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def words_of(line: str, folder) -> list[str]:
    line = line.replace("/path/to/all_ct_wlabels.csv", str(folder / "all_ct_wlabels.csv"))
    return shlex.split(line.replace("/opt/project/logs/ckpt/pytorch_model.bin", str(folder / "pytorch_model.bin")))


def train_and_check(folder, argv) -> str:
    """Run finetune_siglip.py for one epoch, check the files of the document's list, return the log."""
    argv = [*argv, "--epochs", "1"]
    out = siglip.parse_args(argv).output_dir
    if not (out / siglip.BEST).exists():
        assert siglip.main(argv) == 0
    log = (out / "training.log").read_text()
    assert "Epoch 1 - " in log
    assert [p.name for p in out.glob("checkpoint_epoch_*.pth")] == ["checkpoint_epoch_1.pth"]
    assert siglip.common.load_checkpoint(out / "best_model.pth")["class_names"] == CT_RATE_LABELS
    (record,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert {"epoch", "train_loss", "val_loss", "macro_f1", "micro_f1"} <= record.keys()
    for label in CT_RATE_LABELS:
        assert {f"{label}_{metric}" for metric in ("precision", "recall", "f1", "auroc", "accuracy")} <= record.keys()
    return log


def check_predictions(path, threshold):
    table = pd.read_csv(path)
    assert list(table.columns) == ["id", *(f"{name}_{kind}" for name in CT_RATE_LABELS for kind in ("prob", "pred"))]
    assert table["id"].tolist() == [f"CT{i:03}" for i in range(72, 80)]
    for name in CT_RATE_LABELS:
        assert table[f"{name}_prob"].between(0, 1).all()
        assert (table[f"{name}_pred"] == (table[f"{name}_prob"] >= threshold)).all()


def test_every_line_of_the_document_is_known():
    assert sorted(SCRIPT + SHELL) + FLAGS == sorted(SCRIPT + SHELL) + sorted({*LINES} - {*SCRIPT} - {*SHELL})
    assert len(SCRIPT) == 4 and len(SHELL) == 7 and len(FLAGS) >= 8


def option(line: str, name: str) -> str:
    words = line.split()
    return words[words.index(name) + 1] if name in words else ""


@pytest.mark.parametrize("line", SCRIPT, ids=lambda line: option(line, "--output-dir") or option(line, "--test-only"))
def test_command(line, folder):
    words = words_of(line, folder)[2:]
    if "--test-only" not in words:
        log = train_and_check(folder, words)
        assert ("frozen: the first 50 of" in log) == ("--freeze-up-to" in words)
        return
    trained = next(other for other in SCRIPT if f"{option(other, '--output-dir')}/" in option(line, "--test-only"))
    train_and_check(folder, words_of(trained, folder)[2:])
    assert siglip.main(words) == 0
    check_predictions(folder / option(line, "--test-output"), float(option(line, "--threshold")))


def test_command_with_weights_of_the_documents_model(folder):
    """What the document calls SigLIP weights is Merlin's ResNet under `visual.`, cut here to 6 slices of 32 pixels."""
    words = words_of(SCRIPT[0], folder)[2:]
    words[words.index("--pretrained") + 1] = str(folder / "merlin.bin")
    log = train_and_check(folder, [*words, "--num-slices", "6", "--image-size", "32", "--output-dir", "outputs/merlin"])
    assert "'family': 'merlin'" in log


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, folder):
    base = f"--csv small.csv --pretrained pytorch_model.bin --num-slices 6 --batch-size 4 {flags}"
    log = train_and_check(folder, [*base.split(), "--output-dir", f"outputs/flags_{FLAGS.index(flags)}"])
    assert ("frozen: the first 50 of" in log) == ("--freeze-up-to" in flags)


@pytest.mark.parametrize("flag, words, choices, default", DEFAULTS, ids=[d[0] for d in DEFAULTS])
def test_default(flag, words, choices, default):
    action = next(a for a in siglip.build_parser()._actions if flag in a.option_strings)
    default = default.strip("'")
    if flag == "--wandb-project":  # logging is off unless asked for; then the document's name serves
        assert action.default is None and siglip.WANDB_PROJECT == default
    elif flag == "--threshold":  # a checkpoint may bring its own
        assert action.default is None and default in action.help
    elif flag == "--output-dir":
        assert action.default == action.type(default)
    else:
        assert str(action.default) == default or float(action.default) == float(default)
    if choices:
        assert {*ast.literal_eval(f"[{choices}]")} <= {*action.choices}


def test_every_flag_of_the_document_exists():
    known = {o for action in siglip.build_parser()._actions for o in action.option_strings}
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)} <= known
    assert len(DEFAULTS) >= 20


def test_predictions_file_has_its_documented_name_and_place(folder):
    words = words_of(SCRIPT[0], folder)[2:]
    train_and_check(folder, words)
    checkpoint = f"{option(SCRIPT[0], '--output-dir')}/best_model.pth"
    assert siglip.main(["--test-only", checkpoint, "--threshold", "0.5"]) == 0  # --output-dir is ./outputs
    check_predictions(folder / "outputs" / "test_predictions.csv", 0.5)


def test_shell_script_has_the_documents_settings():
    script = (ROOT / "run_finetune.sh").read_text()
    settings = re.findall(r'^  - `(\w+)="(.*)"`$', TEXT, re.MULTILINE)
    assert len(settings) == 3
    for name, value in settings:
        assert f'{name}="${{{name}:-{value}}}"' in script


@pytest.mark.parametrize("line", sorted(SHELL, key=lambda line: "inference" in line))  # inference needs a trained model
def test_shell_command(line, folder, shell_env):
    mode = line.split()[1]
    base = folder / "shell"
    if mode == "inference" and not list(base.glob("b*/best_model.pth")):
        test_shell_command(next(other for other in SHELL if "basic" in other), folder, shell_env)
    env = shell_env | {
        "CSV_FILE": folder / "all_ct_wlabels.csv",
        "PRETRAINED_PATH": folder / "pytorch_model.bin",
        "OUTPUT_BASE_DIR": base,
    }
    more = [] if mode in ("help", "inference") else ["--epochs", "1"]
    result = subprocess.run([ROOT / line.split()[0], mode, *more], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    if mode == "help":
        assert all(other.split()[1] in result.stdout for other in SHELL)
    elif mode == "inference":
        check_predictions(folder / "predictions.csv", 0.4)
    else:
        (out,) = base.glob(f"{mode}_*")
        assert re.fullmatch(rf"{mode}_\d{{8}}_\d{{6}}", out.name)
        assert {"training.log", "best_model.pth", "results.jsonl"} <= {p.name for p in out.iterdir()}
        assert "torch" in result.stdout and "Disk" in result.stdout  # system information
