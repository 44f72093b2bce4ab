"""Every command of user document 000 (CT-CLIP training) runs as written, script names mapped, data and steps cut."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, report_args

import common
import train_ctclip as ctclip

NAMES = {
    "train.py": "train_ctclip.py",
    "inference.py": "evaluate.py",
    "configs/base_config.yaml": "configs/ctclip.yaml",
}
CUTS = "--preset tiny --batch-size 4 --max-steps 6 --eval-every 3 --save-every 3 --num-workers 0 --warmup 0"


def commands(shared) -> list[str]:
    text = next((shared / "seeds").glob("000_*.txt")).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_reports):
    """A copy of the project with dataset/ and weights/ where configs/ctclip.yaml looks for them."""
    folder = tmp_path_factory.mktemp("document_000")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "weights").mkdir()
    shutil.copy(tiny_reports / "vocab.txt", folder / "weights")
    for split in ("train", "valid"):
        shutil.copytree(tiny_reports / split, folder / "dataset" / f"{split}_fixed")
    return folder


def run(project, command: str, more: str, launcher=(sys.executable,)):
    for theirs, ours in NAMES.items():
        command = command.replace(theirs, ours)
    words = shlex.split(command + " " + more)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    labels = ["--label-columns", "first", "second", "third"] if words[script] == "train_ctclip.py" else []
    result = subprocess.run([*launcher, *words[script:], *labels], cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


def test_the_commands_run(shared, project):
    """In the document's order; accelerate's launcher sets what torchrun sets, so torchrun stands for it."""
    lines = commands(shared)
    assert len(lines) == 7 and sum("accelerate" in line for line in lines) == 3
    train, launch, _, _, resume, infer, intervals = lines
    text = run(project, train, CUTS)
    assert re.search(r"Step 6/6 \(Epoch 1\.5\) \| Loss: ", text)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    cuts = CUTS.replace("--batch-size 4", "--batch-size 2")
    run(project, launch, cuts + " --output-dir two", torchrun)
    assert (project / "two" / "best_model.pt").exists()
    (project / "saves" / "checkpoint_step_3.pt").rename(project / "saves" / "checkpoint_step_5000.pt")
    assert "resumed at step 3" in run(project, resume, CUTS)
    run(project, infer, "")
    results = json.loads((project / "results" / "results.json").read_text())
    assert results["n"] == 9 and results["macro"]["auroc"] is not None
    text = run(project, intervals, "")
    assert "95 %" in text


def test_the_launcher_of_accelerate_runs_it(project):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: its launcher was not tried")
    assert accelerate
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    run(project, "train_ctclip.py --config configs/ctclip.yaml", CUTS + " --output-dir launched", launcher)


def test_the_config_holds_the_documented_keys(shared):
    """Keys and values of the document are those of configs/ctclip.yaml, and each reaches its flag."""
    text = next((shared / "seeds").glob("000_*.txt")).read_text()
    listed = dict(re.findall(r"^- `(\w+): (.+?)`", text.split("## Configuration")[1].split("## Usage")[0], re.M))
    tree = yaml.safe_load((ROOT / "configs" / "ctclip.yaml").read_text())
    flat = {k: v for group in tree.values() for k, v in group.items()}
    assert len(listed) == 12
    for key, value in listed.items():
        assert key in flat
        if not key.endswith("_ROOT"):
            assert flat[key] == yaml.safe_load(value) or float(flat[key]) == float(value), key
    assert flat["seed"] == 2025


def test_each_config_key_acts(tiny_reports, tmp_path):
    """Another value of a key, in an overlay, is another argument; the overlays of configs/experiments all parse."""
    base = [str(ROOT / "configs" / "ctclip.yaml")]
    words = [str(w) for w in report_args(tiny_reports, tmp_path)[1:9]]
    before = vars(ctclip.parse_args(["--config", *base, *words]))
    keys = {k: v for group in yaml.safe_load(open(base[0])).values() for k, v in group.items()}
    other = {"DATA_ROOT": "x", "WEIGHTS_ROOT": "y", "hu_source": "none", "text": "findings", "metrics": ["f1"]}
    other |= {"best_metric": "f1", "output_dir": "z", "tensorboard": True, "wandb_mode": "offline"}
    for key, value in keys.items():
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump({key: other[key] if key in other else 2 * value}))
        after = vars(ctclip.parse_args(["--config", *base, str(overlay), *words]))
        assert len([k for k in after if after[k] != before[k] and k != "config"]) == 1, key
    for overlay in (ROOT / "configs" / "experiments").glob("*.yaml"):
        assert vars(ctclip.parse_args(["--config", *base, str(overlay), *words])) != before
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("warmup_step: 3\n")
    with pytest.raises(common.UserError, match="unknown key 'warmup_step' .did you mean 'warmup_steps'"):
        ctclip.parse_args(["--config", *base, str(wrong), *words])
