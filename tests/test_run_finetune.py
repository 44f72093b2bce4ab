"""run_finetune.sh and setup.sh: the settings of each mode, the choice of a model, mistakes, set-up without a network.

The scripts run in a copy of the project in which a stand-in prints what finetune_siglip.py would have got.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import finetune_siglip as siglip

# In one write: under torchrun, which unbuffers its processes, the pieces of two prints would mix.
STAND_IN = """import os, sys
sys.stdout.write('|'.join(['ARGS', os.environ.get('WORLD_SIZE', '1'), *sys.argv[1:]]) + '\\n')
"""


@pytest.fixture
def copy(tmp_path):
    """A folder with the shell scripts, stand-ins for the Python scripts, a CSV and a weight file."""
    for name in ("run_finetune.sh", "run_tests.sh", "setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "finetune_siglip.py").write_text(STAND_IN)
    (tmp_path / "all_ct_wlabels.csv").write_text("series_id\n")
    (tmp_path / "weights.bin").write_text("")
    return tmp_path


@pytest.fixture
def call(copy, shell_env):
    def call(*words, script="run_finetune.sh", cwd=copy, **env):
        defaults = {"PRETRAINED_PATH": "weights.bin"}
        return subprocess.run(
            [copy / script, *map(str, words)], cwd=cwd, env=shell_env | defaults | env, capture_output=True, text=True
        )

    return call


def flags_of(result):
    """The arguments that reached finetune_siglip.py, parsed by its own parser."""
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("ARGS|"))
    return siglip.parse_args(line.split("|")[2:])


PRESETS = {
    "basic": {"epochs": 50, "batch_size": 8, "loss": "bce", "amp": "none"},
    "focal": {
        "epochs": 100, "batch_size": 12, "accum_steps": 2, "loss": "focal", "focal_gamma": 2.0, "focal_alpha": 1.0,
        "freeze_up_to": 30, "dropout_rate": 0.15, "amp": "auto", "early_stopping_patience": 15,
    },
    "balanced": {"epochs": 75, "batch_size": 10, "loss": "balanced", "amp": "auto", "early_stopping_patience": 12},
    "advanced": {
        "epochs": 150, "batch_size": 16, "accum_steps": 4, "lr": 2e-4, "weight_decay": 1e-5, "scheduler": "cosine",
        "warmup": 1000, "loss": "focal", "focal_gamma": 2.5, "focal_alpha": 0.8, "freeze_up_to": 50, "amp": "auto",
        "dropout_rate": 0.2, "max_grad_norm": 0.5, "use_ema": True, "early_stopping_patience": 20,
    },
    "debug": {"epochs": 5, "batch_size": 4, "loss": "bce"},
}  # fmt: skip


@pytest.mark.parametrize("mode", PRESETS)
def test_preset(mode, call):
    args = flags_of(call(mode))
    assert PRESETS[mode].items() <= vars(args).items()
    default = siglip.parse_args(["--csv", "x", "--pretrained", "x"])
    own = {"csv", "pretrained", "output_dir"}
    assert {k for k, v in vars(args).items() if v != vars(default)[k]} - own <= PRESETS[mode].keys()
    assert (str(args.csv), args.pretrained) == ("all_ct_wlabels.csv", "weights.bin")
    assert args.output_dir.parent == Path("outputs") and args.output_dir.name.startswith(f"{mode}_")


def test_flags_after_the_mode_win_and_settings_come_from_the_environment(call, copy):
    """Spaces in names survive; two processes are started by torchrun; paths are those of the caller's folder."""
    (copy / "a folder").mkdir()
    (copy / "a folder" / "my table.csv").write_text("series_id\n")
    result = call(
        "basic", "--epochs", 3, "--label-columns", "Lung nodule", "Hiatal hernia", cwd=copy / "a folder",
        CSV_FILE="my table.csv", PRETRAINED_PATH="none", OUTPUT_BASE_DIR="my runs", NUM_GPUS="2", SEED="7",
    )  # fmt: skip
    args = flags_of(result)
    assert (args.epochs, args.seed, str(args.csv), args.pretrained) == (3, 7, "my table.csv", "none")
    assert args.label_columns == ["Lung nodule", "Hiatal hernia"] and args.output_dir.parent == Path("my runs")
    assert result.stdout.count("ARGS|2|") == 2


def test_inference_takes_the_newest_model_of_a_training_mode(call, copy):
    result = call("inference")
    assert result.returncode == 2 and "no best_model.pth of basic, focal or balanced in ./outputs" in result.stderr
    for age, name in enumerate(["focal_20260102_000000", "basic_20260101_000000", "debug_20260103_000000", "demo"]):
        (copy / "outputs" / name).mkdir(parents=True)
        (copy / "outputs" / name / "best_model.pth").write_text("")
        os.utime(copy / "outputs" / name / "best_model.pth", (age, age))
    args = flags_of(call("inference", PRETRAINED_PATH="/not/there"))  # a checkpoint needs no weights
    assert args.test_only == Path("outputs/basic_20260101_000000/best_model.pth")
    assert (args.threshold, args.test_output) == (0.4, "./predictions.csv")


MISTAKES = {
    "unknown mode": (["basics"], {}, "mode 'basics' is not known"),
    "no table": (["basic"], {"CSV_FILE": "absent.csv"}, "CSV_FILE 'absent.csv' does not exist"),
    "no weights": (["basic"], {"PRETRAINED_PATH": "/absent/w.bin"}, "PRETRAINED_PATH '/absent/w.bin' does not exist"),
    "processes": (["basic"], {"NUM_GPUS": "two"}, "NUM_GPUS 'two' is not a number above 0"),
    "seed": (["basic"], {"SEED": "x"}, "SEED 'x' is not a whole number"),
    "output": (
        ["basic"],
        {"OUTPUT_BASE_DIR": "weights.bin/out"},
        "OUTPUT_BASE_DIR 'weights.bin/out' cannot be written",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(mistake, call):
    words, env, message = MISTAKES[mistake]
    result = call(*words, **env)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_help(call):
    result = call("help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in (*PRESETS, "inference", "demo", "CSV_FILE", "NUM_GPUS"))
    nothing = call()
    assert nothing.returncode == 2 and nothing.stderr == result.stdout


def test_exit_code_of_the_training_is_passed_on(call, copy):
    (copy / "finetune_siglip.py").write_text("import sys; sys.exit(143)")
    assert call("debug").returncode == 143


def shell(copy, text, env):
    text = f"set -euo pipefail; HERE={copy}; source {copy}/setup.sh; {text}"
    return subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)


def test_missing_packages_are_found_by_name(copy, shell_env):
    requirements = copy / "some.txt"
    requirements.write_text("-r more.txt\nnot-a-package>=2  # why\n# a comment\nPyYAML\n\n")
    (copy / "more.txt").write_text("numpy\nAlso-Not-There==1.0\n")
    result = shell(
        copy, f"missing {sys.executable} {requirements}; missing /no/python {requirements} || echo unusable", shell_env
    )
    assert result.stdout == "Also-Not-There not-a-package\nunusable\n"


def test_nothing_is_installed_where_all_packages_are(copy, shell_env):
    result = shell(copy, f"set_up {copy}/requirements.txt; echo $PYTHON", shell_env)
    assert result.stdout == "python3\n" and not (copy / ".venv").exists()


def test_packages_are_installed_into_the_venv(copy, shell_env):
    """A stand-in for the venv's Python notes what pip is asked for, and has all packages afterwards."""
    (copy / "some.txt").write_text("not-a-package\n")
    fake = copy / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        f'#!/bin/bash\nif [[ $* == "-m pip install"* ]]; then echo "PIP $*"; exit "${{PIP_CODE:-0}}"; fi\n'
        f'if [[ $* == "-m pip"* ]]; then exit 0; fi\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    result = shell(copy, f"set_up {copy}/some.txt; echo $PYTHON", shell_env)
    assert f"installing into {copy}/.venv: not-a-package" in result.stdout
    assert "PIP -m pip install" in result.stdout and result.stdout.endswith(f"{fake}\n")
    result = shell(copy, f"set_up {copy}/some.txt", shell_env | {"PIP_CODE": "1"})
    assert result.returncode == 2 and "could not be installed" in result.stderr


def test_modes_other_than_demo_install_nothing(call, copy):
    with (copy / "requirements.txt").open("a") as file:
        file.write("not-a-package\n")
    result = call("basic")
    assert result.returncode == 2 and result.stderr.startswith("error: packages of requirements.txt are missing")
