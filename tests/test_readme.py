"""The README is true: its commands run, its outputs and error messages are real, its files and flags exist.

Commands run in a copy of the project, in their order. Only sizes are cut: volumes and epochs.
"""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port

import common
import prepare_retclip

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
CUTS = {"--n 500": "--n 60", "--epochs 20": "--epochs 1", "--epochs 8": "--epochs 1"}
CUTS |= {"--n 1000": "--n 60", "--max-steps 600": "--max-steps 8", "--n 800": "--n 60", "--max-epochs 10": "--epochs 1"}
CUTS |= {"--n 400": "--n 60", "--n-trials 6": "--n-trials 2", "--epochs 30": "--epochs 1", "--epochs 4": "--epochs 1"}
DEMO = {"DEMO_N": "60", "DEMO_EPOCHS": "1"}
FENCE = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
BLOCKS = [m.groupdict() for m in FENCE.finditer(README)]
RUN = [b["body"] for b in BLOCKS if b["language"] == "bash" and not b["mark"]]
MISTAKES = re.findall(r"^\$ (.+)\n(error: .+)$", "".join(b["body"] for b in BLOCKS if b["language"] == "console"), re.M)


@pytest.fixture(scope="module")
def after_all_commands(tmp_path_factory):
    """(folder of the copy, its output block by block) after every command of the README."""
    copy = tmp_path_factory.mktemp("readme") / "project"
    copy.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "configs", copy / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        for name, value in DEMO.items() | {("OMP_NUM_THREADS", "1"), ("PET_MASTER_PORT", str(free_port()))}:
            patch.setenv(name, value)
        for name in ("OUTPUT_BASE_DIR", "SEED", "NUM_GPUS", "WANDB_MODE", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        output = {}
        for block in RUN:
            command = block
            for words, fewer in CUTS.items():
                command = command.replace(words, fewer)
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=copy, capture_output=True, text=True
            )
            output[block] = result.stdout + result.stderr
            assert result.returncode == 0, f"{command}\n{output[block][-3000:]}"
    return copy, output


def test_commands_run_and_print_what_is_shown(after_all_commands):
    """Lines of a text block after a command are compared up to their first number."""
    output = after_all_commands[1]
    for first, second in zip(BLOCKS, BLOCKS[1:], strict=False):
        if first["body"] in output and second["language"] == "text":
            for line in second["body"].splitlines():
                shown = re.split(r"\d|\.\.\.", line)[0].strip()
                assert shown in output[first["body"]], f"'{line}' is not in the output:\n{output[first['body']]}"
    assert all(any(words in block for block in RUN) for words in CUTS)


@pytest.mark.parametrize("command, message", MISTAKES)
def test_mistake_prints_what_is_shown(command, message, after_all_commands, monkeypatch, capsys, shell_env):
    monkeypatch.chdir(after_all_commands[0])
    *before, command = command.split(" && ")
    for shell in before:
        subprocess.run(["bash", "-c", shell], env=shell_env, check=True)
    launcher, script, *argv = shlex.split(command)
    assert launcher == "python"
    main = importlib.import_module(script.removesuffix(".py")).main
    assert common.run_main(lambda: main(argv)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_there_are_commands_and_mistakes():
    assert len(RUN) >= 6 and len(MISTAKES) >= 8
    assert README.count("```") == 2 * len(BLOCKS)
    assert README.count("<!-- not run: ") == sum(bool(b["mark"]) for b in BLOCKS)


def test_flags_exist():
    """Every --flag of the text and of the commands is one of a script of ours, of torchrun, Slurm or TensorBoard."""
    known = {"--all"} | {f"--{name}" for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time")}
    known |= {"--signal", "--requeue", "--open-mode", "--logdir"}
    for path in [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "benchmarks").glob("*.py")]:
        source = path.read_text()
        known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]+", source))
        known |= {f"--no-{f}" for f in re.findall(r'"--([a-z][\w-]+)"', source)}
    known |= {flag for action in prepare_retclip.build_parser()._actions for flag in action.option_strings}
    torchrun = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    known |= set(re.findall(r"--[a-z][\w-]+", torchrun.stdout))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known


def test_file_tree_is_complete():
    """The tree lists the files of the project, each with a comment."""
    tree = next(b["body"] for b in BLOCKS if b["language"] == "text" and "common.py " in b["body"])
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    assert all(len(line.split()) > 1 for line in tree.splitlines())
    there = {
        p.name for p in ROOT.iterdir() if p.suffix in (".py", ".sh", ".txt", ".toml", ".md") or p.name == "LICENSE"
    }
    there |= {name for name in ("tests", "benchmarks", "configs", ".ci") if any((ROOT / name).glob("*[!c_]"))}
    assert listed == there


def test_first_table_lists_the_training_scripts():
    table = README.split("## Install")[0]
    trained = {path.name for path in ROOT.glob("*.py") if "\ndef train(" in path.read_text()}
    assert set(re.findall(r"^\| `(\w+\.py)`", table, re.M)) == trained
    assert set(re.findall(r"`(\w+\.py)`", table)) <= {f"{name}.py" for name in SCRIPTS}


def test_links_lead_to_headings():
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE), re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) > 10 and set(links) <= anchors


def test_requirements_hold_every_import():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[=<>]", line.split()[0])[0].lower() for line in lines if line[0] != "#"}
    names |= {{"scikit-learn": "sklearn", "pillow": "pil", "pyyaml": "yaml"}.get(name, name) for name in names}
    names |= {"datasets", "pyarrow", "fsspec"}  # of prepare_retclip.py --dataset, which says what is missing
    names |= {"pydicom"}  # of train_csi.py, which says so too
    imported = set()
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert {name.lower() for name in imported - set(sys.stdlib_module_names) - set(SCRIPTS)} <= names
