"""Every command, snippet, key and file name of the user document of train_csi.py, read from the document itself.

Its scripts and modules stand for train_csi.py, its config.ini for configs/csi.ini; image size, batch, epochs and
trials are cut. The networks have one convolution, ImageNet's weights are made up, W&B is a stand-in.
"""

import configparser
import contextlib
import io
import itertools
import json
import math
import re
import shlex
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, SHARED, tensors_equal
from PIL import Image
from torch.utils.data import DataLoader

import common
import train_csi as csi

if not SHARED.is_dir():
    pytest.skip(f"needs {SHARED} (the user documents)", allow_module_level=True)

TEXT = next((SHARED / "seeds").glob("001*.txt")).read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|ini|python)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SNIPPETS = [re.sub(r"\bsrc(\.\w+)+", "train_csi", body) for language, body in BLOCKS if language == "python"]
LINES = [x for language, body in BLOCKS if language == "bash" for x in body.splitlines() if x and x[0] != "#"]
PROGRAMS = {"python main.py": "", "python -m src.cli.main": "", "python -m src.cli.train": ""}
PROGRAMS |= {"python scripts/debug/debug_images.py": "--mode check"}
NAMES = {"config/config.ini": "configs/csi.ini", "<sweep_id>": "abc123"}
COMMANDS = list(dict.fromkeys(line for line in LINES if line.startswith(tuple(PROGRAMS))))
INI = [body for language, body in BLOCKS if language == "ini"]
INI.append("\n".join(line for line in LINES if re.match(r"\w+ = ", line)))  # shown among commands
README = (ROOT / "README.md").read_text()
CUTS = "--image-size 32 --batch-size 2 --epochs 2 --num-workers 0".split()
N = {"train": 4, "val": 3, "test": 1}


def keys_of(text: str) -> dict[str, str]:
    ini = configparser.ConfigParser(inline_comment_prefixes=("#",))
    ini.read_string(text if "[" in text else f"[Logging]\n{text}")
    return {key: value for section in ini.sections() for key, value in ini[section].items()}


def same(value, text: str) -> bool:
    """An argument is what a configuration says."""
    if isinstance(value, float):
        return value == float(text)
    return str(value).lower() == {"reduce_lr_on_plateau": "plateau"}.get(text, text.lower())


class Thin(nn.Module):
    """Stands for a backbone: image (N, 3, h, w) -> map (N, 8, h / 4, w / 4)."""

    recompute = False

    def __init__(self, *_, **__):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, image):
        return (self.features(image),)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """data/ with 8 films of 64 pixels, whose zones are as bright as their scores, and the hub's cache."""
    folder = tmp_path_factory.mktemp("document_001")
    (folder / "data/images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i, split in enumerate(split for split, n in N.items() for _ in range(n)):
        scores = rng.integers(0, 4, 6)
        grey = 40 + 50 * scores.reshape(3, 2).repeat(22, 0)[:64].repeat(32, 1) + rng.normal(0, 8, (64, 64))
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"data/images/{i + 1}.png")
        cells = [str(x) if i % 3 or zone != i % 6 else "" for zone, x in enumerate(scores)]
        rows.append([i + 1, *cells, np.mean([int(x) for x in cells if x]), split])
    table = pd.DataFrame(rows, columns=["FileID", *csi.ZONES, "csi", "split"])
    table.to_csv(folder / "data/Labeled_Data_RAW.csv", sep=";", index=False)
    (folder / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(Thin().state_dict(), folder / "hub/checkpoints" / csi.TORCHVISION["ResNet50"])
    return folder


@pytest.fixture(autouse=True)
def run_there(films, tmp_path, monkeypatch):
    """A folder of its own for each test, with data/ and configs/ where the document's commands look for them."""
    (tmp_path / "data").symlink_to(films / "data")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for name, network in (("Custom_1", "Custom"), ("ResNet50", "ResNet")):
        monkeypatch.setattr(csi, network, Thin)
        monkeypatch.setitem(csi.WIDTHS, name, 8)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(films / "hub"))
    for name in ("PROJECT", "MODE", "API_KEY", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


@pytest.fixture
def wandb(monkeypatch):
    stub = MagicMock()
    stub.login.return_value, stub.sweep.return_value, stub.run = True, "abc123", None
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def words_of(line: str) -> list[str]:
    """A command of the document -> the words after `python train_csi.py`."""
    program = max((p for p in PROGRAMS if line.startswith(p)), key=len)
    words = [*PROGRAMS[program].split(), *shlex.split(line.removeprefix(program))]
    return [NAMES.get(word, word) for word in words]


def call(*words) -> int:
    return common.run_main(lambda: csi.main([*words, *CUTS]))


# ---- commands and files


def test_every_line_of_the_document_is_known():
    others = [x for x in LINES if x not in COMMANDS and not re.match(r"\w+ = ", x)]
    assert [x.split()[0] for x in others] == ["tensorboard", "python"] and "python -c" in others[1]
    assert len(COMMANDS) == 11 and len(SNIPPETS) == 16 and len(INI) == 5
    known = {o for a in csi.build_parser()._actions for o in a.option_strings} | {"--logdir"}
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)} <= known


@pytest.mark.parametrize("line", [x for x in COMMANDS if not re.search("hyper|sweep", x)])
def test_command(line, tmp_path, capsys, wandb):
    """As it stands, with the default model; the files are where the document has them."""
    words = words_of(line)
    assert call(*words) == 0
    out = capsys.readouterr()
    if words == ["--mode", "check"]:
        assert "8 films" in out.out and len(pd.read_csv("check/films.csv")) == 8
        assert Image.open("check/films.png").width > 240
        return
    assert "loaded" in out.err and "weights from resnet50" in out.err  # as it stands: pretrained
    assert ("CUDA is not available" in out.err) == ("--config" in words and not torch.cuda.is_available())
    epochs = [f"checkpoint_epoch_{x}.pth" for x in (1, 2)]
    assert sorted(p.name for p in (tmp_path / "models").glob("*.pth")) == sorted(
        ["best_model.pth", "last_model.pth", "last_model_previous.pth", *epochs]
    )
    assert "checkpoint_epoch_X.pth" in TEXT
    for name in re.findall(r"^- `((?:models|logs)/[\w.]+)`", TEXT, re.MULTILINE):
        assert (tmp_path / name).exists() or "epoch_X" in name, name
    training, validation = (json.loads((tmp_path / f"logs/{x}_history.json").read_text()) for x in (
        "training", "validation"))  # fmt: skip
    assert training["epochs"] == validation["epochs"] == [1, 2]
    assert all(math.isfinite(x) for x in training["train_loss"] + validation["val_loss"])
    assert {"f1_macro", "f1_weighted", "f1_overall_severe", "precision_macro", "recall_macro"} <= validation.keys()
    assert {"csi_mae", "csi_rmse", "csi_correlation", "ahf_accuracy"} <= validation.keys()
    assert all(len(column) == 2 for column in [*training.values(), *validation.values()])
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1
    assert wandb.init.called == ("--wandb-project" in words)
    if wandb.init.called:
        assert wandb.init.call_args.kwargs["project"] == "my-project"


def test_tensorboard_reads_logs():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "tensorboard --logdir logs/" in LINES
    assert call("--mode", "train") == 0
    tags = EventAccumulator("logs/").Reload().Tags()["scalars"]
    assert {"train/loss", "train/lr", "train/epoch_loss", "val/val_loss", "val/f1_macro", "val/qwk"} <= {*tags}


@pytest.mark.parametrize("line", [x for x in COMMANDS if "--mode hyperopt" in x])
def test_hyperopt(line, tmp_path, wandb):
    """And again: the study goes on, and 2 trials are 2 trials."""
    for _ in range(2):
        assert call(*words_of(line), "--n-trials", "2") == 0
    found = json.loads((tmp_path / "models/hyperopt/best_params.json").read_text())
    assert {*found["params"]} == {*csi.parse_args([]).search_params}
    assert len(pd.read_csv(tmp_path / "models/hyperopt/trials.csv")) == 2
    assert wandb.init.call_count == 2 * ("--wandb-project" in line)


def test_train_optimized(tmp_path):
    line = next(x for x in COMMANDS if "train-optimized" in x)
    path = words_of(line)[-1]
    assert path == "models/hyperopt/best_params.json"
    assert call("--mode", "hyperopt", "--n-trials", "2") == 0
    found = json.loads((tmp_path / path).read_text())["params"]
    assert call(*words_of(line)) == 0
    saved = common.load_checkpoint(tmp_path / csi.BEST)["args"]
    assert {name: saved[name] for name in found} == found | {"batch_size": 2}  # the command line wins


def test_sweep(tmp_path, capsys, wandb):
    line = next(x for x in COMMANDS if "--mode sweep " in x)
    assert call(*words_of(line)) == 0
    config = wandb.sweep.call_args.args[0]
    assert config["name"] == "my_sweep" and config["parameters"]["lr"]["max"] > config["parameters"]["lr"]["min"]
    assert "abc123" in capsys.readouterr().out
    wandb.login.return_value = False
    assert call(*words_of(line)) == 2
    assert re.search("W&B server.*--mode hyperopt", capsys.readouterr().err)


def test_sweep_agent(wandb):
    line = next(x for x in COMMANDS if "--mode sweep-agent" in x)
    assert "<sweep_id>" in line and call(*words_of(line)) == 0
    assert "abc123" in [*wandb.agent.call_args.args, *wandb.agent.call_args.kwargs.values()]


def test_without_weights_the_error_names_the_way_out(tmp_path, monkeypatch, capsys):
    """`pretrained = true` where the file is neither at hand nor to be had; and of a model that has none."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert call("--mode", "train", "--config", "configs/csi.ini") == 2
    assert re.search(r"\nerror: .*could not be had: .*\(put the file into .*--pretrained FILE or none\)$",
                     capsys.readouterr().err.rstrip())  # fmt: skip
    assert call("--mode", "train", "--config", "configs/csi.ini", "--model", "Custom_1") == 2
    assert capsys.readouterr().err.rstrip().endswith("no published weights (--pretrained none, or a file)")


# ---- snippets


def test_the_snippets_run_in_their_order(tmp_path, monkeypatch, capsys):
    """As the cells of one notebook, after the document's first command; what no snippet defines is given here."""
    assert call("--mode", "train") == 0
    config = csi.parse_args([*CUTS, "--overwrite"])
    monkeypatch.setattr(csi, "cfg", config, raising=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, val_set = csi.build_datasets(config)
    everything = csi.ChestFilms(config, "all", False)
    names = {"config": config, "device": device, "epoch": 0, "f1": 0.5, "torch": torch}
    names |= {"train_loader": DataLoader(train_set, 2, shuffle=True), "val_loader": DataLoader(val_set, 2)}
    names["inputs"] = torch.stack([item["image"] for item in everything]).to(device)
    names["targets"] = torch.stack([item["target"] for item in everything]).to(device)
    names["predictions"] = torch.randn(8, 6, 5, device=device, requires_grad=True)
    names |= {"file_ids": everything.ids, "csv_data": pd.read_csv("data/Labeled_Data_RAW.csv", sep=";")}
    checked = set()
    for body in SNIPPETS:
        before = dict(names)
        if "model" in names:
            before["weights"] = common.to_cpu_copy(names["model"].state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(body, names)
        names["warned"] = " ".join(str(w.message) for w in caught)
        for words, check in CHECKS.items():
            if words in body:
                checked.add(words)
                check(names, before)
    assert checked == set(CHECKS)
    assert "Epoch 0: Loss = " in capsys.readouterr().err  # of the logger


def check_model(names, before):
    assert isinstance(names["model"], csi.ZoneModel) and isinstance(names["backbone"], Thin)


def check_loss(names, before):
    weight = torch.tensor([1, 1, 1, 1, 0.3], device=names["device"])
    expected = F.cross_entropy(names["predictions"].flatten(0, 1), names["targets"].flatten(), weight)
    torch.testing.assert_close(names["loss"], expected)


def check_metrics(names, before):
    f1, mean = names["f1_metrics"], names["csi_metrics"]
    assert {"f1_macro", "f1_weighted_macro", "f1_overall_normal", "f1_zone_6_severe"} <= f1.keys()
    assert mean["csi_avg_n"] == mean["csi_csv_avg_n"] == 8 and mean["csi_csv_avg_mae"] > 0
    assert {"csi_avg_mae", "csi_avg_rmse", "csi_avg_correlation"} <= mean.keys()
    names["compute_precision_recall"](names["predictions"], names["targets"])
    ahf = names["compute_ahf_classification_metrics"](names["predictions"], names["targets"])
    assert np.sum(ahf["ahf_confusion_matrix"]) + sum(ahf["ahf_not_gradable"]) == 8


def check_stopping(names, before):
    early_stopping, model = names["early_stopping"], names["model"]
    first, weight = [], next(model.parameters())
    for value in [1.0, *[0.9995] * 9]:
        first.append(weight.detach().clone())
        assert not early_stopping(value, model)
        with torch.no_grad():
            weight.add_(1)
    assert early_stopping(0.9995, model) and torch.equal(weight, first[0])  # a gain of less than 0.001 is none


def check_tracker(names, before):
    tracker = names["metrics_tracker"]
    for loss in (2.0, 1.0, 3.0):
        tracker.update({"val_loss": loss})
    assert tracker.history == {"val_loss": [2.0, 1.0, 3.0]} and tracker.best("val_loss") == (1.0, 1)


def check_loop(names, before):
    assert {"train_loss", "train_accuracy"} == names["train_metrics"].keys()
    assert {"val_loss", "val_f1_macro", "val_accuracy", "val_csi_avg_mae"} <= names["val_metrics"].keys()
    assert not tensors_equal(before["weights"], common.to_cpu_copy(names["model"].state_dict()))
    assert names["config"].n_epochs == 2 and "lr_scheduler.step()" not in names["warned"]


def check_amp(names, before):
    assert torch.cuda.is_available() or "disabl" in names["warned"].lower()
    assert not tensors_equal(before["weights"], common.to_cpu_copy(names["model"].state_dict()))


def check_loaded(names, before):
    saved = common.load_checkpoint(csi.BEST)
    assert tensors_equal(dict(names["model"].state_dict()), saved["model"])
    assert names["checkpoint"]["metrics"]["val_loss"] == saved["metrics"]["val_loss"]


def check_meter(names, before):
    meter = names["AverageMeter"]()
    meter.update(1.0, 3)
    meter.update(5.0)
    assert meter.avg == 2.0 and names["early_stopping"].patience == 10


def check_trained(names, before):
    assert json.loads(open("logs/training_history.json").read())["epochs"] == [1, 2]
    assert common.load_checkpoint(csi.LAST)["args"]["overwrite"]  # it is this training's, not that of the command
    check_loop(names, before)


def check_names(names, before):
    assert names["train_model"] is csi.train_model and names["WeightedCSILoss"] is csi.WeightedCSILoss


CHECKS = {
    'get_backbone("resnet50")': check_model,
    "loss = criterion(predictions, targets)": check_loss,
    "compute_precision_recall": check_metrics,
    "min_delta=0.001": check_stopping,
    "metrics_tracker = MetricsTracker()": check_tracker,
    "for epoch in range(config.n_epochs)": check_loop,
    "GradScaler": check_amp,
    "load_checkpoint(model": check_loaded,
    "AverageMeter": check_meter,
    "\ntrain_model(config)": check_trained,
    "from train_csi import train_model, WeightedCSILoss": check_names,
}


def test_data_parallel(monkeypatch):
    """The condition of the snippet holds for two GPUs; the wrapped model trains as before."""
    config = csi.parse_args(CUTS)
    names = {"model": csi.build_model(config), "torch": torch}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    exec(next(body for body in SNIPPETS if "DataParallel" in body), names)
    monkeypatch.undo()
    assert isinstance(names["model"], nn.DataParallel)
    loader = [(torch.rand(2, 1, 32, 32), torch.randint(0, 5, (2, 6)))]
    criterion, optimizer = csi.WeightedCSILoss(), csi.create_optimizer(names["model"], config)
    for epoch in range(2):
        loss = csi.train_epoch(names["model"], loader, criterion, optimizer, torch.device("cpu"), epoch)["train_loss"]
        found = csi.validate_epoch(names["model"], loader, criterion, torch.device("cpu"), epoch)
        assert math.isfinite(loss) and math.isfinite(found["val_loss"])


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "StepLR", "CosineAnnealingLR"])
def test_a_loop_of_ones_own_can_save_its_scheduler(name):
    assert f"**{name}**" in TEXT
    config = csi.parse_args(["--scheduler", name])
    scheduler = csi.create_scheduler(csi.create_optimizer(Thin(), config), config)
    torch.save(scheduler.state_dict(), "scheduler.pth")
    scheduler.load_state_dict(torch.load("scheduler.pth"))
    scheduler.step(1.0)


def test_the_one_line_that_prints_the_model(capsys):
    line = next(x for x in LINES if x.startswith("python -c"))
    code = re.sub(r"\bsrc(\.\w+)+", "train_csi", shlex.split(line)[2])
    exec(code, {"config": csi.parse_args(CUTS)})
    assert "ZoneModel(" in capsys.readouterr().out and "zone_classifiers" in TEXT + repr(csi.ZoneHead(8, 5, 0.5))


def test_cfg_is_the_default_configuration():
    from train_csi import cfg

    assert vars(cfg) == vars(csi.parse_args([])) and cfg is csi.cfg
    for key, value in (pair for text in INI for pair in keys_of(text).items()):
        if key not in ("device", "patience", "early_stopping_min_delta", "wandb_project", "wandb_entity"):
            assert same(getattr(cfg, key), value), key


def test_the_loop_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(csi, "cfg", csi.parse_args([]), raising=False)
    (tmp_path / "demo/cxr").mkdir(parents=True)
    (tmp_path / "demo/cxr/images").symlink_to("../../data/images")
    (tmp_path / "demo/cxr/labels.csv").symlink_to("../../data/Labeled_Data_RAW.csv")
    (code,) = [x for x in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if "train_csi" in x]
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_table_of_the_readme_has_every_module_of_the_document():
    rows = dict(re.findall(r"^\| (`(?:src|main)\.[^|]+) \| ([^|]+) \|$", README, re.MULTILINE))
    listed = {module for names in rows for module in re.findall(r"src(?:\.\w+)+", names)}
    imported = {name for name in re.findall(r"(?:from|-m) (src(?:\.\w+)+)", TEXT)}
    assert imported <= listed
    for theirs in re.findall(r"from (src(?:\.\w+)+) import (?:\(([^)]+)\)|(.+))", TEXT):
        ours = next(here for names, here in rows.items() if f"`{theirs[0]}`" in names)
        for name in re.findall(r"\w+", (theirs[1] or theirs[2]).split(";")[0]):
            assert f"`{name}`" in ours and hasattr(csi, name), name


# ---- configuration


@pytest.mark.parametrize("text", INI)
def test_a_block_is_a_configuration_as_it_stands(text, tmp_path):
    path = tmp_path / "block.ini"
    path.write_text(text)
    args = csi.parse_args(["--config", str(path)])
    for key, value in keys_of(text).items():
        assert same(getattr(args, key), value), key


def test_csi_ini_holds_the_documents_keys_and_values():
    text = (ROOT / "configs/csi.ini").read_text()
    documented = {key: value for block in INI for key, value in keys_of(block).items()}
    assert keys_of(re.sub(r"(?m)^# (\[Logging\]|wandb_\w+ = )", r"\1", text)) == documented | {
        "csv": "data/Labeled_Data_RAW.csv",
        "image_dir": "data/images",
    }
    sections = {line for block in INI for line in re.findall(r"^\[\w+\]$", block, re.MULTILINE)}
    assert {*re.findall(r"^\[\w+\]$", text, re.MULTILINE)} == sections | {"[Data]"}
    for key, low, high in RANGES:
        if re.match("[0-9]", low):
            assert re.search(rf"^{key} = .*# .*\b{low}-{high}\b", text, re.MULTILINE), key


RANGES = re.findall(r"^\| `(\w+)` \|.*\| ([\w.]+?)(?:-|, )([\w.]+) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("key, low, high", RANGES)
def test_a_value_outside_of_its_range_is_warned_of(key, low, high, capsys):
    flag = f"--{key.replace('_', '-')}"
    for value in (low, high):
        csi.parse_args([flag, value])
    assert capsys.readouterr().err == ""
    if key == "device":
        return
    for value in (float(low) / 2, float(high) + (0 if key == "unknown_weight" else float(high))):
        csi.parse_args([flag, f"{value:g}"])
        warned = capsys.readouterr().err
        assert bool(warned) == (not float(low) <= value <= float(high))
        assert not warned or re.fullmatch(rf"warning: \w+ {value:g} is outside .* {low} to {float(high):g}\n", warned)


def test_an_unknown_key_is_an_error_with_the_nearest_name(tmp_path):
    path = tmp_path / "wrong.ini"
    for wrong, right in (("learning_rte", "learning_rate"), ("unknown_wieght", "unknown_weight"),
                         ("early_stoping_patience", "early_stopping_patience"), ("n_epoch", "n_epochs")):  # fmt: skip
        path.write_text(f"[Training]\n{wrong} = 1\n")
        with pytest.raises(common.UserError, match=f"wrong.ini: unknown key '{wrong}' .did you mean '{right}'"):
            csi.parse_args(["--config", str(path)])


BASE = {"batch_size": 4, "n_epochs": 4, "model_arch": "Custom_1", "pretrained": "false", "num_workers": 0}
BASE |= {"image_size": 32, "tensorboard": "false", "augment": "false", "log_interval": 1, "step_size": 1, "patience": 0}


def config_of(**keys):
    """The configuration of an INI file with these keys; the training of a step an epoch."""
    with open("keys.ini", "w") as file:
        file.write("[Keys]\n" + "".join(f"{key} = {value}\n" for key, value in (BASE | keys).items()))
    return csi.parse_args(["--config", "keys.ini"])


def fit(config, losses=(), train=None) -> list[float]:
    """The rate of each step of a training whose validation losses are these (1, if there are none)."""
    rates, losses = [], itertools.chain(losses, itertools.repeat(1.0))

    def scalars(self, step, values):
        rates.extend(value for name, value in values.items() if name == "train/lr")

    with pytest.MonkeyPatch.context() as patch, common.process_group("cpu") as ctx:
        patch.setattr(csi, "evaluate", lambda *_: {"val_loss": next(losses)})
        patch.setattr(common.RunLog, "scalars", scalars)
        train(config) if train else csi.train(config, ctx)
    return rates


def loader_of(config):
    ctx = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    return common.data_loader(csi.build_datasets(config)[0], [[(0, 0)]], config, ctx)


def device_of(config) -> tuple[str, int]:
    """What it runs on, and how many lines it says about that."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return common.pick_device(config.device).type, said.getvalue().count("\n")


def steps(config) -> int:
    return csi.StepSampler(100, config, common.Context(0, 1, torch.device("cpu"), None), 0).per_epoch


def films_of(config) -> list[str]:
    """The training films, of data/, or of a table with the first three rows, or of a folder beside it."""
    with open("few.csv", "w") as file:
        file.writelines(open("data/Labeled_Data_RAW.csv").readlines()[:4])
    Path("other").symlink_to("data/images")
    found = [str(path) for path in csi.ChestFilms(config, "train", True).paths]
    Path("other").unlink()
    return found


def kind_of(config) -> str:
    with torch.device("meta"):
        return type(csi.build_model(config).backbone).__name__


def begins_with_imagenet(config) -> bool:
    config.model = "ResNet50"
    file = torch.load(f"{torch.hub.get_dir()}/checkpoints/{csi.TORCHVISION['ResNet50']}")
    return tensors_equal(dict(csi.build_model(config).backbone.state_dict()), dict(file))


def optimizer_of(config):
    return csi.create_optimizer(Thin(), config)


def n_logits(config) -> int:
    return csi.build_model(config)(torch.rand(1, 1, 32, 32)).shape[-1]


def loss_of_unknown(config) -> float:
    """All but one zone unknown; a graded one costs log(2), the others log(5)."""
    logits, targets = torch.full((1, 6, 5), -100.0), torch.full((1, 6), csi.UNKNOWN)
    logits[:, 1:], logits[0, 0, :2], targets[0, 0] = 0, 0, 0
    weight = 5 * float(config.unknown_weight)
    loss = float(csi.build_criterion(config, None)(logits, targets))
    assert loss == pytest.approx((math.log(2) + weight * math.log(5)) / (1 + weight))
    return round(loss, 3)


def which_weights(config) -> str:
    """Those that train_model returns, and --export writes, if the first epoch is the best."""
    config.zone_focus, config.export, returned = "none", "weights.pth", []
    fit(config, (1.0, 2.0, 3.0, 4.0), lambda config: returned.append(csi.train_model(config)))
    found = csi.export_weights(returned[0])
    assert tensors_equal(found, torch.load("weights.pth")) and not returned[0].training
    files = (csi.TOP.format(epoch=1), csi.LAST)
    best, last = (common.load_checkpoint(config.output_dir / file)["model"] for file in files)
    assert not tensors_equal(best, last)
    return "best" if tensors_equal(dict(returned[0].state_dict()), best) else "last"


def logged_to(config, name: str):
    with pytest.MonkeyPatch.context() as patch:
        stub = MagicMock()
        patch.setitem(sys.modules, "wandb", stub)
        config.wandb_project = config.wandb_project or "x"
        fit(config)
    return stub.init.call_args.kwargs[name]


COSINE = [0.0005 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
LOWERED = [0.001, 0.001, 0.0005, 0.00025]
ACTS = {  # key: (what it acts on, {value: what that is then})
    "csv": (lambda c: len(films_of(c)), {"data/Labeled_Data_RAW.csv": 4, "few.csv": 3}),
    "image_dir": (lambda c: films_of(c)[0], {"data/images": "data/images/1.png", "other": "other/1.png"}),
    "device": (device_of, {"cpu": ("cpu", 0), "cuda": ("cuda", 0) if torch.cuda.is_available() else ("cpu", 1)}),
    "batch_size": (steps, {"32": 3, "8": 12}),
    "learning_rate": (lambda c: fit(c)[0], {"0.001": 0.001, "0.01": 0.01}),
    "n_epochs": (lambda c: len(fit(c)), {"10": 10, "3": 3}),
    "num_workers": (lambda c: loader_of(c).num_workers, {"4": 4, "0": 0}),
    "pin_memory": (lambda c: loader_of(c).pin_memory, {"true": True, "false": False}),
    "model_arch": (kind_of, {"CheXNet": "DenseNet", "RadDINO": "Dino", "Custom_1": "Thin", "ResNet50": "Thin"}),
    "pretrained": (begins_with_imagenet, {"true": True, "false": False, "none": False}),
    "num_classes": (n_logits, {"5": 5, "4": 4}),
    "optimizer": (lambda c: type(optimizer_of(c)).__name__, {"adam": "Adam", "SGD": "SGD", "AdamW": "AdamW"}),
    "weight_decay": (lambda c: optimizer_of(c).param_groups[0]["weight_decay"], {"0.0001": 1e-4, "0": 0}),
    "scheduler": (fit, dict.fromkeys(("reduce_lr_on_plateau", "ReduceLROnPlateau"), LOWERED)
                  | dict.fromkeys(("step_lr", "StepLR"), [0.001, 0.0005, 0.00025, 0.000125])
                  | dict.fromkeys(("cosine_annealing_lr", "CosineAnnealingLR"), COSINE)),
    "patience": (fit, {"10": [0.001] * 4, "0": LOWERED, "1": [0.001] * 3 + [0.0005]}),
    "factor": (fit, {"0.5": LOWERED, "0.1": [0.001, 0.001, 0.0001, 0.00001]}),
    "unknown_weight": (loss_of_unknown, {"0.3": 1.243, "1.0": 1.457}),
    "early_stopping_patience": (lambda c: len(fit(c)), {"10": 4, "2": 3}),
    "early_stopping_min_delta": (
        lambda c: len(fit(c, [1 - 0.0004 * i for i in range(4)])), {"0.001": 3, "0": 4}),
    "restore_best_weights": (which_weights, {"true": "best", "false": "last"}),
    "wandb_project": (lambda c: logged_to(c, "project"), {"my-project": "my-project", "another": "another"}),
    "wandb_entity": (lambda c: logged_to(c, "entity"), {"my-username": "my-username", "another": "another"}),
}  # fmt: skip
MORE = {"early_stopping_min_delta": {"early_stopping_patience": 2}, "model_arch": {"image_size": 224}}  # other keys


def test_every_key_of_the_document_is_tried():
    assert set(ACTS) == {"csv", "image_dir"}.union(*map(keys_of, INI))


@pytest.mark.parametrize("key", ACTS)
def test_the_key_acts(key, tmp_path):
    effect, values = ACTS[key]
    for i, (value, expected) in enumerate(values.items()):
        config = config_of(**MORE.get(key, {}), **{key: value})
        config.output_dir = tmp_path / str(i)
        found = effect(config)
        assert found == (pytest.approx(expected) if isinstance(expected, (list, float)) else expected), value
