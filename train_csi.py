"""Congestion Score Index: scores of six lung zones of a chest film; train, search hyper-parameters, check the films.

Six zones (the patient's right and left lung; upper, middle, lower third) are scored 0 to 3; a zone that cannot be
graded is unknown. The Congestion Score Index (CSI) is the mean of the graded zones.

Model    ResNet50, CheXNet (DenseNet-121), RadDINO (ViT-B/14) or Custom_1 (5 convolutions); the six zones are pooled
         from one pass of the backbone (--zone-focus masking: one pass a zone, as the original tool does)
Papers   CSI: Int J Cardiol 2020;299:192, PLoS Med e1003419; CheXNet arXiv 1711.05225; RAD-DINO arXiv 2401.10815;
         CORN arXiv 2111.08851, class-distance cross-entropy arXiv 2202.05167, squared EMD arXiv 1611.05916
Data     --csv: FileID and six columns of scores, in the order of ZONES (; , or tab; empty = unknown); if there: csi,
         patient, view, diagnosis, split. --image-dir: FileID.png .jpg .nii.gz .dcm ..., 8 or 16 bits, any aspect.
         --mask-dir: FileID_left_lung_mask.png, FileID_right_lung_mask.png
Weights  --pretrained true (those the model is known for: torchvision's file, or microsoft/rad-dino of the hub; the
         default, but for Custom_1, which has none), a file (torchvision, TorchXRayVision state dict, CheXNet, RAD-DINO,
         the original tool's or one of ours), or 'none'
CPU      python demo_data.py cxr --out demo/cxr --n 400
         python train_csi.py --csv demo/cxr/labels.csv --image-dir demo/cxr/images --model Custom_1 --image-size 128 \\
             --epochs 30 --batch-size 16 --scheduler cosine --output-dir runs/csi
1 GPU    python train_csi.py --mode train --config configs/csi.ini --amp
N GPUs   torchrun --nproc_per_node N -- train_csi.py ... (--batch-size is per process)
Search   python train_csi.py --mode hyperopt --n-trials 100 --journal hyperopt/study.journal, again to go on; then
         python train_csi.py --mode train-optimized --hyperparams models/hyperopt/best_params.json
Resume   the same command with --resume auto: bit for bit an uninterrupted run (same device and thread count)
Writes   below --output-dir: models/ (best_model.pth, last_model.pth, checkpoint_epoch_X.pth of the top k epochs),
         logs/ (training_history.json, validation_history.json, training.log, results.jsonl, TensorBoard events),
         split.csv (which film is in which part); check: check/ (films.csv, films.png)
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import Progress, RunLog, StopSignal, TopK, UserError, save_checkpoint, seed_everything

TASK, MONITOR = "csi", "val_loss"
SHOWN = ("qwk", "f1_macro", "zone_mae", "csi_mae")  # of an epoch, on the console
TENSORBOARD = "logs"
LOG, RESULTS, LAST = "logs/training.log", "logs/results.jsonl", "models/last_model.pth"
TOP = "models/checkpoint_epoch_{epoch}.pth"
BEST = "models/best_model.pth"
WANDB_PROJECT = "csi-predictor"
# A checkpoint can only be continued or evaluated with these as they were.
FIXED_ARGS = ["model", "image_size", "keep_aspect", "clip_percent", "zone_focus", "masking_strategy", "num_classes"]
FIXED_ARGS += ["attention_strength", "masked", "mean", "std", "rectified", "loss", "label_columns", "optimizer"]
FIXED_ARGS += ["weight_decay", "use_ema"]

ZONES = ("right_sup", "left_sup", "right_mid", "left_mid", "right_inf", "left_inf")  # the patient's right is image left
CLASSES = ("Normal", "Mild", "Moderate", "Severe", "Unknown")
UNKNOWN = 4  # as a class; in the CSV an empty cell
EMPTY = ("", "nan", "na")  # cells of a CSV, in any case
AHF_LIMITS = (1.3, 2.2)  # mean score up to which acute heart failure is of low and of medium likelihood
MODELS = {"resnet50": "ResNet50", "chexnet": "CheXNet", "raddino": "RadDINO", "custom_1": "Custom_1"}
MODELS |= {"densenet121": "CheXNet", "custom1": "Custom_1", "rad-dino": "RadDINO"}  # other spellings
WIDTHS = {"ResNet50": 2048, "CheXNet": 1024, "RadDINO": 768, "Custom_1": 1024}
TORCHVISION = {"ResNet50": "resnet50-11ad3fa6.pth", "CheXNet": "densenet121-a639ec97.pth"}  # the original tool's
NORMALIZATIONS = {  # of grey levels in [0, 1]: mean, standard deviation
    "medical": ([0.5], [0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "simple": ([0.0], [1.0]),
    "raddino": ([0.5307], [0.2583]),
    "xrv": ([0.5], [1 / 2048]),  # TorchXRayVision's [-1024, 1024]
}
SCHEDULERS = {
    "reducelronplateau": "plateau",
    "steplr": "step",
    "cosineannealinglr": "cosine",
    "cosineannealing": "cosine",
}
SEARCHED = ("lr", "weight_decay", "dropout_rate", "optimizer", "batch_size", "scheduler", "unknown_weight", "loss")
SUFFIXES = (".png", ".jpg", ".jpeg", ".nii.gz", ".nii", ".dcm", ".dicom")
MAX_PIXELS = 100_000_000  # of one film
PRUNE = None  # set by a search: (evaluation's step, metrics) -> whether the trial is hopeless
logger = logging.getLogger("plainscan.csi")


# ==== Arguments ================================================================================================


def model_name(text: str) -> str:
    """One of the four names in any case, or another spelling of it."""
    if text.lower() not in MODELS:
        raise argparse.ArgumentTypeError(f"'{text}' is no model ({', '.join(WIDTHS)})")
    return MODELS[text.lower()]


def scheduler_name(text: str) -> str:
    short = SCHEDULERS.get(text.lower().replace("_", ""), text.lower())
    if short.removesuffix("_lr") not in ("plateau", "step", "cosine", "constant"):
        raise argparse.ArgumentTypeError(f"'{text}' is no scheduler (ReduceLROnPlateau, StepLR, CosineAnnealingLR)")
    return short.removesuffix("_lr")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", help="YAML or INI files of defaults; the command line wins")
    modes = ["train", "check", "hyperopt", "train-optimized", "sweep", "sweep-agent"]
    parser.add_argument("--mode", choices=modes, default="train", help="what to do")
    onoff = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--csv", type=Path, default=Path("data/Labeled_Data_RAW.csv"), help="table of cases, splits and labels")
    add("--image-dir", type=Path, default=Path("data/images"), help="folder of the films")
    add("--image-column", metavar="NAME", help="column of the film's path, from --image-dir or the CSV (FileID + "
        "suffix, in --image-dir)")  # fmt: skip
    add("--mask-dir", type=Path, help="folder of lung masks, which then bound the zones")
    add("--label-columns", nargs="+", default=list(ZONES), metavar="NAME", help="columns to predict")
    add("--patient-column", metavar="NAME", help="column of the patient (patient or patient_id, if there)")
    add("--split-file", type=Path, help="CSV of FileID and split, made where it is missing (split.csv in --output-dir; "
        "not needed with a column 'split')")  # fmt: skip
    add("--split-share", type=float, nargs=3, default=[0.7, 0.15, 0.15], metavar="F", help="of films for train, val, "
        "test in a new split")  # fmt: skip
    add("--image-size", type=int, help="side of an image in pixels")
    add("--keep-aspect", action=onoff, default=True, help="pad films to a square, in place of stretching them")
    add("--clip-percent", type=float, default=0.5, help="percent of the darkest and of the brightest pixels that are "
        "clipped when a film is scaled (0: none)")  # fmt: skip
    add("--load-to-memory", action=onoff, default=False, help="read every film once, before the training")
    add("--augment", action=onoff, default=True, help="augment training images")
    add("--rotation", type=float, default=10.0, help="largest turn in degrees")
    add("--flip-prob", type=float, default=0.5, help="share of images mirrored left to right")
    add("--shift", type=float, default=0.05, help="largest shift as a share of the side")
    add("--zoom", type=float, default=0.1, help="largest change of scale")
    add("--jitter", type=float, default=0.2, help="largest change of brightness and of contrast")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="what an unreadable sample does")
    add("--max-bad-fraction", type=float, default=0.05, help="share of unreadable samples that ends a run")

    add = parser.add_argument_group("model").add_argument
    add("--model", "--model-arch", type=model_name, default="ResNet50", help="backbone")
    add("--pretrained", help="weights to begin with (kinds: see the script's head), or 'none'")
    add("--allow-partial", action="store_true", help="accept weights that lack part of the backbone")
    add("--normalization", choices=["auto", *NORMALIZATIONS], default="auto", help="scale of the pixels (auto: that of "
        "the weights, else medical)")  # fmt: skip
    add("--num-classes", type=int, choices=[4, 5], default=5, help="4 scores, and unknown as a fifth class (4: unknown "
        "zones are left out)")  # fmt: skip
    add("--zone-focus", choices=["pool", "masking", "none"], default="pool", help="zones of the last feature map, "
        "images with one zone each as in the original tool, or the whole film for every zone")  # fmt: skip
    add("--masking-strategy", choices=["attention", "zero"], default="zero", help="what masking does to the rest of a "
        "film: dimmed, or 0, which is what the original tool computes for both")  # fmt: skip
    add("--attention-strength", type=float, default=0.7, help="weight of the zone; the rest has 1 minus it")
    add("--dropout-rate", type=float, default=0.5, help="dropout in the classification head")
    add("--freeze-backbone", action="store_true", help="train the head alone")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", "--loss-type", choices=["ce", "corn", "cdw", "emd"], default="ce", help="loss")
    add("--unknown-weight", type=float, default=0.3, help="weight of an unknown zone, of a graded one's 1")
    add("--cdw-alpha", type=float, default=2.0, help="power of the distance in the class-distance loss")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", "--max-epochs", "--n-epochs", type=int, default=100, help="passes over the training data")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs (0: by epochs)")
    add("--batch-size", type=int, default=32, help="samples per process and micro-step")
    add("--accum-steps", "--gradient-accumulation-steps", type=int, default=1, help="micro-steps per step")
    add("--lr", "--learning-rate", type=float, default=1e-3, help="peak learning rate")
    add("--optimizer", type=str.lower, choices=["adam", "adamw", "sgd"], default="adam", help="optimizer (sgd: "
        "momentum 0.9)")  # fmt: skip
    add("--weight-decay", type=float, default=1e-4, help="decay of matrices (not norms, biases, positions)")
    add("--scheduler", type=scheduler_name, default="plateau", help="learning rate after warm-up")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="end of the cosine as a share of --lr")
    add("--plateau-patience", "--patience", type=int, default=5, help="evaluations without gain before the rate falls")
    add("--plateau-factor", "--factor", type=float, default=0.5, help="what the rate is multiplied by on a plateau")
    add("--step-size", type=int, default=30, help="epochs between falls of the rate by --plateau-factor with StepLR")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add("--max-bad-steps", type=int, default=20, help="non-finite steps in a row that end the run")
    add("--use-ema", action="store_true", help="judge and keep a moving average of the weights")
    add("--ema-decay", type=float, default=0.999, help="decay of the average, reached after a warm-up")
    add("--early-stopping-patience", type=int, default=10, help="evaluations without gain before the end")
    add("--early-stopping-min-delta", type=float, default=0.0, help="smallest gain that counts for early stopping")
    add("--restore-best-weights", action=onoff, default=True, help="end with the best epoch's weights, not the last's "
        "(of --export and train_model)")  # fmt: skip

    add("--n-trials", type=int, default=50, help="trials of the search, all in all")
    add("--search-params", nargs="+", choices=list(SEARCHED), default=list(SEARCHED)[:5], metavar="NAME",
        help=f"what is searched, of {', '.join(SEARCHED)}")  # fmt: skip
    add("--sampler", choices=["tpe", "random"], default="tpe", help="how the search chooses values")
    add("--pruner", choices=["median", "successive_halving", "none"], default="median", help="how it ends poor trials")
    add("--search-workers", type=int, default=1, help="processes that search, each on a GPU of its own if there are")

    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--amp", "--use-mixed-precision", nargs="?", const="auto", choices=["none", "auto", "fp16", "bf16"],
        default="none", help="autocast type; bare --amp takes the best of the device",
    )  # fmt: skip
    add("--compile", action=onoff, help="torch.compile the model (on CUDA)")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--deterministic", action="store_true", help="bit-exact CUDA kernels, at a cost in speed")

    add = parser.add_argument_group("evaluation").add_argument
    metrics = ["val_loss", "qwk", "f1_macro", "f1_weighted", "csi_correlation"]
    add("--monitor", choices=metrics, help="what best means")
    add("--eval-batch-size", type=int, default=0, help="samples per evaluation batch (--batch-size)")
    add("--eval-every", type=int, default=0, help="steps between evaluations (0: an epoch)")
    add("--split", default="val", help="split that is scored")

    add = parser.add_argument_group("checkpoint").add_argument
    add("--output-dir", type=Path, default=Path("."), help="folder of the run")
    add("--resume", nargs="?", const="auto", help="checkpoint to continue; bare or 'auto': the run's last, if any")
    add("--overwrite", "--force-restart", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=int, default=500, help="steps between saves of the last checkpoint, besides evaluations")
    add("--top-k", type=int, default=3, help="best models kept")
    add("--export", type=Path, help="file for the best weights, original key names")
    add("--journal", type=Path, metavar="FILE", help="record of a search, which goes on from it; its folder takes the "
        "trials (hyperopt/study.journal in --output-dir)")  # fmt: skip
    add("--study-name", default="csi_optimization", metavar="NAME", help="name of the search in --journal")
    add("--hyperparams", type=Path, metavar="FILE", help="best_params.json of a search, for --mode train-optimized")

    add = parser.add_argument_group("system").add_argument
    add("--device", "--gpu-device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    add("--num-workers", type=int, default=4, help="data processes per rank")
    add("--pin-memory", action=onoff, default=True, help="page-locked host memory, for copies to a GPU")
    add("--seed", type=int, default=42, help="seed of weights, order, augmentation and dropout")
    add("--check-ranks", action="store_true", help="compare gradients over the ranks in every step (slow)")
    add("--timeout-minutes", type=float, default=30, help="how long ranks and data workers may keep silent")

    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=int, default=50, help="steps between log lines")
    add("--tensorboard", action=onoff, default=True, help="write TensorBoard events")
    add("--wandb-project", help="Weights & Biases project to log to (asked for without a name: the script's own)")
    add("--wandb-entity", help="Weights & Biases user or team the project belongs to (your own)")
    add("--sweep-name", default="csi_sweep", metavar="NAME", help="name of the W&B sweep to start")
    add("--sweep-id", metavar="ID", help="W&B sweep that a sweep agent works for")
    add("--sweep-count", type=int, default=0, help="runs of a sweep agent (0: no end)")
    add("--wandb-mode", choices=["online", "offline", "disabled"], help="where wandb logs, if asked")
    return parser


class Config(argparse.Namespace):
    """The arguments, also under the names of configs/csi.ini: `config.n_epochs` is `config.epochs`.

    What is set later is read as on the command line: `config.scheduler = "StepLR"`, `config.pretrained = False`.
    """

    names = {"n_epochs": "epochs", "learning_rate": "lr", "model_arch": "model", "patience": "plateau_patience"}
    names |= {"factor": "plateau_factor"}
    read = {"model": model_name, "scheduler": scheduler_name}
    read |= {"pretrained": lambda x: "none" if str(x).lower() in ("false", "no", "off", "0") else str(x)}
    read |= dict.fromkeys(("csv", "image_dir", "mask_dir", "split_file", "output_dir", "export", "journal"), Path)

    def __init__(self, **given):
        super().__init__(**given)
        if "image_size" in given:  # as it is given, whatever the model
            vars(self)["image_size"] = given["image_size"]

    def __getattr__(self, name):
        if name not in Config.names:
            raise AttributeError(name)
        return getattr(self, Config.names[name])

    def __setattr__(self, name, value):
        name = Config.names.get(name, name)
        if name == "model" and getattr(self, "image_size", None) in (224, 518):  # the defaults
            self.image_size = 518 if model_name(value) == "RadDINO" else 224
        super().__setattr__(name, Config.read[name](value) if name in Config.read and value is not None else value)


DOCUMENTED = {"batch_size": (8, 128), "lr": (1e-4, 1e-2), "epochs": (10, 500), "unknown_weight": (0.1, 1.0)}  # ranges


def parse_args(argv=None) -> Config:
    args = Config(**vars(common.parse_with_config(build_parser(), argv)))
    args.pretrained = args.pretrained or ("none" if args.model == "Custom_1" else "true")
    args.image_size = args.image_size or (518 if args.model == "RadDINO" else 224)
    args.monitor = args.monitor or ("qwk" if args.mode in ("hyperopt", "sweep", "sweep-agent") else MONITOR)
    args.masked = args.mask_dir is not None
    args.mean = args.std = args.rectified = None  # as the weights are: scale of the pixels, DenseNet's last ReLU
    common.check_positive(args)
    if not len(set(args.label_columns)) == len(args.label_columns) == len(ZONES):
        raise UserError(f"--label-columns takes six different ones, in the order {', '.join(ZONES)}")
    limits = dict.fromkeys(("unknown_weight", "attention_strength", "flip_prob", "jitter", "shift"), (0, 1))
    limits |= {"zoom": (0, 0.9), "rotation": (0, 180), "clip_percent": (0, 20), "cdw_alpha": (1e-3, 20)}
    limits |= dict.fromkeys(("step_size", "n_trials", "search_workers"), (1, math.inf)) | {"image_size": (32, 4096)}
    limits |= {"early_stopping_min_delta": (0, math.inf), "sweep_count": (0, math.inf), "plateau_factor": (0, 1)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            bound = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise UserError(f"--{name.replace('_', '-')} must be {bound}")
    if min(args.split_share) < 0 or not args.split_share[0] or abs(sum(args.split_share) - 1) > 1e-6:
        raise UserError("--split-share: three shares, together 1, of which the first is above 0")
    if args.model == "RadDINO" and args.image_size % 14:
        raise UserError(f"--image-size {args.image_size}: RadDINO needs a multiple of 14, its patch")
    if args.export and (args.loss, args.num_classes, args.zone_focus == "pool") != ("ce", 5, False):
        raise UserError("--export: the original tool has no such model (only with --loss ce, --num-classes 5 and "
                        "--zone-focus masking or none)")  # fmt: skip
    if args.export and args.normalization not in ("auto", "medical"):
        raise UserError(f"--export: the original tool does not scale pixels by --normalization {args.normalization}")
    for name, (low, high) in DOCUMENTED.items():
        if not low <= getattr(args, name) <= high and int(os.environ.get("RANK", 0)) == 0:
            print(f"warning: {name} {getattr(args, name):g} is outside the recommended {low:g} to {high:g}",
                  file=sys.stderr)  # fmt: skip
    return args


def args_from_checkpoint(saved: dict, **overrides) -> Config:
    """The arguments a checkpoint was trained with, except for `overrides` that are not None.

    Of another CSV than in training all films are taken, if no split is named.
    """
    args = Config(**vars(common.saved_args(build_parser(), saved)))
    given = {k: v for k, v in overrides.items() if v is not None}
    if Path(given.get("csv", args.csv)).resolve() != Path(args.csv).resolve():
        vars(args).update({"split": "all", "split_file": None})
        args.mask_dir = None if "mask_dir" not in given else args.mask_dir
    vars(args).update(given)
    for name in ("csv", "image_dir", "output_dir", "mask_dir", "split_file"):
        value = getattr(args, name)
        setattr(args, name, Path(value) if value is not None else None)
    if args.masked and not args.mask_dir:
        raise UserError("the model was trained with lung masks (--mask-dir names their folder)")
    return args


def __getattr__(name):
    """`cfg`, the documented defaults, for notebooks."""
    if name == "cfg":  # one object, so that what is changed in it stays changed
        return globals().setdefault("cfg", parse_args([]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ==== Data =====================================================================================================


class ChestFilms(Dataset):
    """Films of one split. An item is keyed by (epoch, index), or index: augmentation is a function of the key alone.

    Item: image (1, S, S) float32 in [0, 1]; target (6,) int64, 0-3 or UNKNOWN, in the order of ZONES; index; bad = 1
    if the film could not be read (--on-bad-sample skip); zones (S, S) uint8, 1 + place in ZONES where a zone is:
    thirds of each lung's height with --mask-dir, else thirds and halves of the film.
    """

    def __init__(self, args, split: str, train: bool):
        self.args, self.train, self.class_names, self.memory = args, train, list(ZONES), None
        self.epoch = 0  # of an item that is asked for by its index alone
        table = read_scores(args.csv, args)
        if split != "all":
            table = split_films(table, args)
            there = sorted(set(table["split"]) - {""})
            if split not in there:
                raise UserError(f"{args.csv}: no film in split '{split}' (it has {', '.join(there) or 'none'})")
            table = table[table["split"] == split]
        self.ids, self.groups, self.views = (table[name].tolist() for name in ("FileID", "patient", "view"))
        self.targets = table[list(ZONES)].to_numpy(np.int64)  # (n, 6)
        self.csi = table["csi"].to_numpy(np.float64)  # NaN where the CSV has none
        seconds = [f"{name}_reader2" for name in ZONES]
        self.diagnosis = table["diagnosis"].to_numpy(np.float64) if "diagnosis" in table else None
        self.reader2 = table[seconds].to_numpy(np.int64) if seconds[0] in table else None
        self.paths = find_films(args, table)

    def __len__(self):
        return len(self.ids)

    def notes(self) -> str:
        known = self.targets[self.targets != UNKNOWN]
        share = np.bincount(known, minlength=4) / max(1, len(known))
        found = ", ".join(f"{i}: {p:.0%}" for i, p in enumerate(share))
        unknown = 1 - known.size / self.targets.size
        return f"{self.ids[0]}, {len(set(self.groups))} patients, scores {found}, unknown {unknown:.0%}"

    def read(self, index: int, film: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """-> film (S, S) uint16, its grey levels as 0-65535, and zones (S, S) uint8. Raises UserError."""
        a = self.args
        film = read_film(self.paths[index]) if film is None else film
        levels = fitted(grey_levels(film, a.clip_percent, self.paths[index]), a, Image.Resampling.BILINEAR)
        zones = read_zones(a.mask_dir, self.ids[index], film.shape, a) if a.mask_dir else film_zones(film.shape, a)
        return np.rint(levels.clip(0, 1) * 65535).astype(np.uint16), zones

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(index) if self.memory is None or self.memory[index] is None else self.memory[index]

    def load_to_memory(self, say) -> None:
        """Read every film once; data processes share the memory. What cannot be read is tried again when it is due."""

        def attempt(index):
            try:
                return self.read(index)
            except UserError:
                return None

        with ThreadPoolExecutor(max(1, self.args.num_workers)) as pool:
            self.memory = list(tqdm(pool.map(attempt, range(len(self))), desc=say, total=len(self), disable=None))

    def picture(self, index: int) -> np.ndarray:
        """(S, S) uint8: the film as the model sees it."""
        return (self.load(index)[0] >> 8).astype(np.uint8)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        a, source, bad, found = self.args, index, 0, None
        while found is None:
            try:
                found = self.load(source)
            except UserError:
                bad += 1
                if a.on_bad_sample == "fail" or bad > len(self):
                    raise
                if not self.train:  # in evaluation it stays in its place, marked
                    side = a.image_size
                    found = np.zeros((side, side), np.uint16), np.ones((side, side), np.uint8)
                else:
                    source = (source + 1) % len(self)  # the next film and its scores together
        image, zones = torch.from_numpy(found[0].astype(np.float32))[None] / 65535, torch.from_numpy(found[1])
        target = torch.from_numpy(self.targets[source])
        if self.train and a.augment:
            rng = np.random.default_rng((a.seed, epoch, index))
            image, zones, target = augmented(image, zones, target, rng, a)
        item = {"image": image, "zones": zones, "target": target}
        return item | {"index": torch.tensor(index), "bad": torch.tensor(bad)}


def read_scores(path: Path, args) -> pd.DataFrame:
    """The CSV -> FileID, ZONES (int, UNKNOWN where empty), csi (NaN), patient, view, and what else is there: split,
    diagnosis (0, 1, NaN), {zone}_reader2, --image-column. Raises UserError with the row."""
    table = common.read_table(path, ";,\t")
    table.columns = table.columns.str.strip()
    names = ["FileID", *args.label_columns]
    common.need_columns(table, names, path)
    twice = [name for name in names if (table.columns == name).sum() > 1 or f"{name}.1" in table.columns]
    if twice:
        raise UserError(f"{path}: column '{twice[0]}' is there twice")
    ids = identifiers(table["FileID"])
    for bad, what in ((ids == "", "has no FileID"), (ids.duplicated(), "has a FileID that came before")):
        if bad.any():
            raise UserError(f"{path}: row {bad.idxmax() + 2} {what} ({ids[bad.idxmax()] or 'empty'})")
    out = pd.DataFrame({"FileID": ids})
    for zone, column in zip(ZONES, args.label_columns, strict=True):
        out[zone] = scores(table[column], path)
    for zone in ZONES:
        if all(f"{z}_reader2" in table for z in ZONES):
            out[f"{zone}_reader2"] = scores(table[f"{zone}_reader2"], path)
    names = [args.patient_column] if args.patient_column else ["patient", "patient_id"]
    if args.patient_column:
        common.need_columns(table, names, path)
    patient = next((identifiers(table[name]) for name in names if name in table), ids)
    out["patient"] = patient.mask(patient.str.lower().isin(EMPTY), ids)
    out["view"] = table["view"].str.strip() if "view" in table else ""
    means = table["csi"].str.strip().str.replace(",", ".") if "csi" in table else math.nan
    out["csi"] = pd.to_numeric(means, errors="coerce")
    if "diagnosis" in table:
        out["diagnosis"] = common.label_array(table, ["diagnosis"], path)[:, 0]
    for name in {"split", args.image_column} & set(table.columns):
        out[name] = table[name].str.strip()
    if args.image_column:
        common.need_columns(table, [args.image_column], path)
    return out


def identifiers(cells: pd.Series) -> pd.Series:
    """Names of films or patients; a spreadsheet's 12.0 is 12."""
    return cells.str.strip().str.replace(r"^(\d+)[.,]0+$", r"\1", regex=True)


def scores(cells: pd.Series, path: Path) -> pd.Series:
    """Text of a column -> 0 to 3, UNKNOWN where empty; anything else is an error."""
    text = cells.str.strip()
    empty = text.str.lower().isin(EMPTY)
    values = pd.to_numeric(text.mask(empty).str.replace(",", "."), errors="coerce")
    bad = ~empty & ~values.isin([0, 1, 2, 3])
    if bad.any():
        row = bad.idxmax()
        raise UserError(f"{path}: row {row + 2}, column '{cells.name}': '{text[row]}' is no score (0 to 3, or empty "
                        "for unknown)")  # fmt: skip
    return values.fillna(UNKNOWN).astype(np.int64)


def split_films(table: pd.DataFrame, args) -> pd.DataFrame:
    """The table with a column split: of the CSV, of --split-file, or a new split, which is written there.

    No patient is in two parts; parts are alike in their mean scores. A film that is not in the file is an error; one
    whose cell is empty is in no part.
    """
    source = path = split_path(table, args)
    if path is None:
        source, split = args.csv, table["split"]
    elif not path.exists():
        made = table.assign(split=new_split(table, args.split_share, args.seed))
        if int(os.environ.get("RANK", 0)) == 0:
            common.make_folder(path.parent)
            common.write_csv(path, made[["FileID", "patient", "split"]])
        return made
    else:
        kept = common.read_table(path, ",;\t")
        common.need_columns(kept, ["FileID", "split"], path)
        films = identifiers(kept["FileID"])
        if films.duplicated().any():
            raise UserError(f"{path}: film {films[films.duplicated().idxmax()]} is there twice")
        of = dict(zip(films, kept["split"], strict=True))
        split = table["FileID"].map(lambda film: of.get(film, of.get(common.safe_cell(film))))  # as write_csv has it
        if split.isna().any():
            first = table["FileID"][split.isna().idxmax()]
            raise UserError(f"{path}: has no row for {split.isna().sum()} films of {args.csv}, first {first} (add "
                            "them, or delete it to split anew)")  # fmt: skip
    split = split.str.strip().str.lower().replace({"valid": "val", "validation": "val", "training": "train"})
    parts = split[split != ""].groupby(table["patient"]).nunique()
    if (parts > 1).any():
        raise UserError(f"{source}: patient {parts.idxmax()} is in several splits ({(parts > 1).sum()} are)")
    return table.assign(split=split)


def split_path(table: pd.DataFrame, args) -> Path | None:
    """The file that says which film is in which part; None if the CSV does."""
    return None if "split" in table and args.split_file is None else args.split_file or args.output_dir / "split.csv"


def new_split(table: pd.DataFrame, shares, seed: int) -> pd.Series:
    """train, val or test for each film: patients, in the order of their mean score and else at random, go one by one
    to the part that lacks most films."""
    mean = pd.Series(true_csi(table[list(ZONES)].to_numpy()), table.index).groupby(table["patient"]).mean()
    films = table["patient"].value_counts()
    luck = {name: hashlib.sha256(f"{seed} {name}".encode()).digest() for name in films.index}
    halves = (2 * mean.round(6)).round().fillna(-1)  # 6 digits: a sum's last ones depend on the order of the rows
    order = sorted(films.index, key=lambda name: (halves[name], luck[name]))
    names, have, part = ("train", "val", "test"), np.zeros(3), {}
    for name in order:
        lacking = int(np.argmax(np.array(shares) * (have.sum() + films[name]) - have))
        part[name], have[lacking] = names[lacking], have[lacking] + films[name]
    return table["patient"].map(part)


def find_films(args, table: pd.DataFrame) -> list[Path]:
    """The file of every film; UserError if one is missing, if two would fit, or if a path leads out of its folder."""
    root, found = args.image_dir, {}
    if args.image_column:
        folders = [Path(os.path.abspath(folder)) for folder in (root, args.csv.parent)]
        for film, text in zip(table["FileID"], table[args.image_column], strict=True):
            near = [Path(os.path.normpath(f / text)) for f in (root, args.csv.parent) if os.path.isfile(f / text)][:1]
            # A link in the folder is its owner's will and is followed; a path in a table is not.
            if near and not any(Path(os.path.abspath(near[0])).is_relative_to(folder) for folder in folders):
                raise UserError(f"{args.csv}: film {film}: {text} leads out of {root} (--image-dir)")
            found[film] = near
    else:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder (--image-dir)")
        for file in sorted(root.iterdir()):
            suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), None)
            if suffix:
                found.setdefault(file.name[: -len(suffix)], []).append(file)
    paths = [found.get(film, []) for film in table["FileID"]]
    several = [p for p in paths if len(p) > 1]
    if several:
        raise UserError(f"{several[0][0]}: there is {several[0][1].name} too (--image-column says which film is meant)")
    missing = [film for film, path in zip(table["FileID"], paths, strict=True) if not path]
    if missing and (args.on_bad_sample == "fail" or len(missing) == len(paths)):
        how = f"in column '{args.image_column}'" if args.image_column else f"for FileID with {' '.join(SUFFIXES)}"
        raise UserError(f"{root}: no film for {len(missing)} of {len(paths)} rows of {args.csv}, first "
                        f"{', '.join(missing[:3])} (looked {how})")  # fmt: skip
    masks = {film: mask_files(args.mask_dir, film) for film in table["FileID"]} if args.mask_dir else {}
    without = [film for film, files in masks.items() if not all(map(os.path.isfile, files))]
    if without and (args.on_bad_sample == "fail" or len(without) == len(masks)):
        raise UserError(f"{args.mask_dir}: no two lung masks for {len(without)} of {len(masks)} films, first "
                        f"{masks[without[0]][0].name} and {masks[without[0]][1].name}")  # fmt: skip
    return [path[0] if path else root / f"{film}.*" for film, path in zip(table["FileID"], paths, strict=True)]


def read_film(path: Path) -> np.ndarray:
    """(H, W) float32 grey levels as stored, 8 or 16 bits (of colour: 8), upright; bright is dense. Raises UserError.

    PNG and JPEG, turned as their EXIF entry says and every viewer does; 2-D NIfTI, turned as the original tool turns it
    (np.rot90 by -1); DICOM (needs pydicom), rescaled, MONOCHROME1 inverted, its display window not applied.
    """
    common.need_file(path)
    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # what it says of a header is judged here, or refused
    name = path.name.lower()
    try:
        with warnings.catch_warnings(action="ignore"):  # of three libraries, at what is judged here or refused
            if name.endswith((".nii", ".nii.gz")):
                image = nibabel.load(path)
                check_size(path, *[n for n in image.shape if n != 1])
                film = np.rot90(np.squeeze(np.asarray(image.dataobj, np.float32)), -1)
            elif name.endswith((".dcm", ".dicom")):
                film = read_dicom(path)
            else:
                with Image.open(path, formats=["PNG", "JPEG"]) as image:
                    check_size(path, image.height, image.width)
                    ImageOps.exif_transpose(image, in_place=True)
                    if not image.mode.startswith(("L", "I", "F")) or image.mode == "LA":
                        image = image.convert("L")
                    film = np.asarray(image, np.float32)
    except UserError:
        raise
    except Exception as e:  # three libraries, and what they raise at damaged files
        raise UserError(f"{path}: damaged or not what its name says: {' '.join(str(e).split())[:200]}") from e
    if not np.isfinite(film).all():
        raise UserError(f"{path}: has pixels that are not numbers")
    return film


def check_size(path: Path, *shape: int) -> None:
    if len(shape) != 2 or not 0 < math.prod(shape) <= MAX_PIXELS:
        raise UserError(f"{path}: shape {shape}: one film of at most {MAX_PIXELS:,} pixels was expected")


def read_dicom(path: Path) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ImportError as e:
        raise UserError(f"{path}: DICOM needs pydicom (pip install pydicom)") from e
    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == "1.2.840.10008.1.2.1.99":
        raise UserError(f"{path}: deflated DICOM is not read, it may inflate to any size (dcmconv +te makes it plain)")
    data = pydicom.dcmread(path)
    kind = data.get("PhotometricInterpretation")
    grey = "PixelData" in data and kind in ("MONOCHROME1", "MONOCHROME2") and data.get("SamplesPerPixel", 1) == 1
    if not grey or int(data.get("NumberOfFrames") or 1) != 1:
        raise UserError(f"{path}: not one grey image (colour, several frames, or no pixels at all)")
    check_size(path, data.Rows, data.Columns)
    try:
        stored = data.pixel_array
        film = np.asarray(apply_modality_lut(stored, data), np.float32)
    except RuntimeError as e:
        if "missing dependencies" not in str(e):
            raise
        name = data.file_meta.TransferSyntaxUID.name
        raise UserError(f"{path}: no decoder of {name} is installed (pip install 'pylibjpeg[all]')") from e
    real = stored != data.get("PixelPaddingValue")  # padding may be brighter than any bone
    if not np.any(real):
        raise UserError(f"{path}: nothing but padding")
    film = film[real].max() + film[real].min() - film if kind == "MONOCHROME1" else film
    film = np.where(real, film, film[real].min())
    rows = data.get("PatientOrientation") or [""]
    return film[:, ::-1] if rows[0].startswith("R") else film  # the patient's right is image left everywhere


def grey_levels(film: np.ndarray, clip_percent: float, path) -> np.ndarray:
    """(H, W) -> the same from 0 to 1, linear between two percentiles: bit depth and exposure do not count."""
    # A quarter of a million pixels tell the percentiles, but not the extremes.
    step = max(1, math.isqrt(film.size // 250_000)) if clip_percent else 1
    low, high = np.percentile(film[::step, ::step], (clip_percent, 100 - clip_percent))
    if not high > low:
        raise UserError(f"{path}: the film is of one grey level")
    levels = film - np.float32(low)
    levels /= np.float32(high - low)
    return np.clip(levels, 0, 1, out=levels)


def box_of(shape, args) -> tuple[slice, slice]:
    """Where a film (H, W) lies in the square: its longer side fills it, or, with --no-keep-aspect, both do."""
    side, longest = args.image_size, max(shape)
    size = [max(1, round(n * side / longest)) if args.keep_aspect else side for n in shape]
    return tuple(slice((side - n) // 2, (side - n) // 2 + n) for n in size)


def fitted(image: np.ndarray, args, how) -> np.ndarray:
    """(H, W) -> (S, S): the film in its box, and 0 around it."""
    out, (rows, columns) = np.zeros((args.image_size,) * 2, image.dtype), box_of(image.shape, args)
    size = columns.stop - columns.start, rows.stop - rows.start
    out[rows, columns] = np.asarray(Image.fromarray(image).resize(size, how))
    return out


def film_zones(shape, args) -> np.ndarray:
    """(S, S) uint8: 1 + place in ZONES, thirds of the film's height and halves of its width; 0 around the film."""
    out, (rows, columns) = np.zeros((args.image_size,) * 2, np.uint8), box_of(shape, args)
    out[rows, columns] = thirds_and_halves(rows.stop - rows.start, columns.stop - columns.start)
    return out


def thirds_and_halves(h: int, w: int) -> np.ndarray:
    """(h, w) uint8: 1 + place in ZONES; rows of h // 3, columns of w // 2, the last ones take what is left."""
    third, half = (np.arange(n) // max(1, n // k) for n, k in ((h, 3), (w, 2)))
    return (1 + 2 * third.clip(max=2)[:, None] + half.clip(max=1)).astype(np.uint8)


def read_zones(folder: Path, film: str, shape, args) -> np.ndarray:
    """Two lung masks of a film -> (S, S) uint8: 1 + place in ZONES, 0 outside; a zone is a third of its lung's height.

    The lung on the image's left is the patient's right one, whatever the files call it: the masks of the original tool
    may be named by the side of the image. Raises UserError.
    """
    masks = []
    for path in mask_files(folder, film):
        mask = read_film(path)
        if abs(mask.shape[0] * shape[1] / (mask.shape[1] * shape[0]) - 1) > 0.02:
            raise UserError(f"{path}: {mask.shape} pixels do not fit the film's {tuple(shape)}")
        mask = fitted((mask > mask.max() / 2).astype(np.uint8), args, Image.Resampling.NEAREST) > 0
        if mask.sum(1).astype(bool).sum() < 3:
            raise UserError(f"{path}: the mask is empty")
        masks.append(mask)
    masks.sort(key=lambda mask: np.nonzero(mask)[1].mean())
    zones = np.zeros_like(masks[0], np.uint8)
    for column, mask in enumerate(masks):
        rows = np.flatnonzero(mask.any(1))
        third = (np.arange(len(mask)) - rows[0]) * 3 // (rows[-1] - rows[0] + 1)  # 0, 1, 2 within the lung
        zones[mask] = (1 + 2 * third.clip(0, 2) + column)[:, None].repeat(mask.shape[1], 1)[mask]
    empty = np.flatnonzero(np.bincount(zones.ravel(), minlength=7)[1:] == 0)
    if len(empty):
        raise UserError(f"{path}: with the other lung's mask it leaves no pixel for {ZONES[empty[0]]}")
    return zones


def mask_files(folder: Path, film: str) -> list[Path]:
    if Path(film).name != film:
        raise UserError(f"film {film}: a FileID with a path in it leads out of {folder} (--mask-dir)")
    return [folder / f"{film}_{side}_lung_mask.png" for side in ("left", "right")]


def augmented(image, zones, target, rng, args):
    """Turned, shifted, scaled, perhaps mirrored film, with its zones and its scores; then contrast and brightness."""
    u = 2 * rng.random(6) - 1
    mirror = rng.random() < args.flip_prob
    angle, zoom = math.radians(u[0] * args.rotation), 1 + u[1] * args.zoom
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    side = -1 if mirror else 1
    theta = torch.tensor([[[cos * side, -sin, 2 * u[2] * args.shift], [sin * side, cos, 2 * u[3] * args.shift]]])
    grid = F.affine_grid(theta.float(), (1, 1, *image.shape[-2:]), align_corners=False)
    image = F.grid_sample(image[None], grid, "bilinear", align_corners=False)[0]
    zones = F.grid_sample(zones[None, None].float(), grid, "nearest", align_corners=False)[0, 0].to(torch.uint8)
    if mirror:
        target, zones = mirrored(target, zones)
    mean = image.mean()
    image = ((image - mean) * (1 + u[4] * args.jitter) + mean + u[5] * args.jitter / 2).clamp(0, 1)
    return image, zones, target


def mirrored(target, zones):
    """Scores (..., 6) and zones of a film that is mirrored: left and right change places."""
    target = target.unflatten(-1, (3, 2)).flip(-1).flatten(-2)
    return target, torch.where(zones > 0, (zones - 1 ^ 1) + 1, zones)


def data_file(args, split: str | None = None) -> Path:
    """The table of the films, of every split."""
    return args.csv


def build_datasets(args):
    train_set, val_set = ChestFilms(args, "train", True), ChestFilms(args, args.split, False)
    if args.load_to_memory:
        for dataset, name in ((train_set, "training films"), (val_set, f"{args.split} films")):
            dataset.load_to_memory(name)
    return train_set, val_set


def build_eval_dataset(args) -> ChestFilms:
    path = None if args.split == "all" else split_path(read_scores(args.csv, args), args)
    if path and not path.exists():  # a new one would mix what the model has learned from with what it is judged by
        raise UserError(f"{path}: the split of the training is not here (--split-file, or --split all for every film)")
    return ChestFilms(args, args.split, False)


# ==== Model ====================================================================================================


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions and a skip; key names of torchvision."""

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or c_in != 4 * width:
            conv = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + skip, inplace=True)


class ResNet(nn.Module):
    """ResNet (arXiv 1512.03385): image (N, 3, h, w) -> maps of strides 8, 16, 32; key names of torchvision."""

    widths, recompute = (512, 1024, 2048), False

    def __init__(self, blocks: tuple[int, int, int, int]):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        c_in = 64
        for stage, n_blocks in enumerate(blocks):
            width, layer = 64 * 2**stage, []
            for i in range(n_blocks):
                layer.append(Bottleneck(c_in, width, 2 if stage and i == 0 else 1))
                c_in = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.apply(init_convolution)

    def stages(self) -> list[list[nn.Module]]:
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def forward(self, image):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image)), inplace=True), 3, 2, 1)
        x = run_blocks([*self.layer1, *self.layer2], x, self.recompute)  # (N, 512, h / 8, w / 8)
        y = run_blocks(self.layer3, x, self.recompute)  # (N, 1024, h / 16, w / 16)
        return x, y, run_blocks(self.layer4, y, self.recompute)  # (N, 2048, h / 32, w / 32)


class DenseLayer(nn.Module):
    """Norm, 1x1, norm, 3x3 convolution: 32 more channels, behind those that come in."""

    def __init__(self, c_in: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 128, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x):
        new = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new), inplace=True))], 1)


class DenseNet(nn.Module):
    """DenseNet-121 (arXiv 1608.06993): image (N, 3, h, w) -> maps of strides 8, 16, 32; key names of torchvision."""

    widths, recompute, rectified = (512, 1024, 1024), False, True  # the CSI tool leaves the last ReLU out

    def __init__(self):
        super().__init__()
        f, channels = nn.Module(), 64
        self.features = f
        f.conv0, f.norm0 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for i, n_layers in enumerate((6, 12, 24, 16), 1):
            layers = [(f"denselayer{j + 1}", DenseLayer(channels + 32 * j)) for j in range(n_layers)]
            setattr(f, f"denseblock{i}", nn.Sequential(collections.OrderedDict(layers)))
            channels += 32 * n_layers
            if i < 4:
                parts = {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU(inplace=True)}
                parts |= {"conv": nn.Conv2d(channels, channels // 2, 1, bias=False), "pool": nn.AvgPool2d(2)}
                setattr(f, f"transition{i}", nn.Sequential(collections.OrderedDict(parts)))
                channels //= 2
        f.norm5 = nn.BatchNorm2d(channels)
        self.apply(init_convolution)

    def stages(self) -> list[list[nn.Module]]:
        f = self.features
        blocks = [[getattr(f, f"denseblock{i}"), getattr(f, f"transition{i}")] for i in (1, 2, 3)]
        return [[f.conv0, f.norm0], *blocks, [f.denseblock4, f.norm5]]

    def forward(self, image):
        f = self.features
        x = F.max_pool2d(F.relu(f.norm0(f.conv0(image)), inplace=True), 3, 2, 1)
        x = run_blocks([*f.denseblock1, f.transition1, *f.denseblock2], x, self.recompute)  # (N, 512, h / 8, w / 8)
        y = run_blocks([f.transition2, *f.denseblock3], x, self.recompute)  # (N, 1024, h / 16, w / 16)
        z = run_blocks([f.transition3, *f.denseblock4], y, self.recompute)
        z = f.norm5(z)
        return x, y, F.relu(z, inplace=True) if self.rectified else z  # (N, 1024, h / 32, w / 32)


def run_blocks(blocks, x, recompute: bool):
    """The blocks one after the other; `recompute`: keep only what goes between them for the backward pass."""
    for block in blocks:
        x = common.checkpointed(block, x) if recompute and block.training and torch.is_grad_enabled() else block(x)
    return x


def init_convolution(module):
    """By fan-in: unit variance, where batch norm's running variance begins; fan-out makes depthwise ones tiny."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Custom(nn.Module):
    """Custom_1 of the original tool: five convolutions; image (N, 3, h, w) -> map (N, 1024, ...); its key names.

    Its last map has a 128th of the film's side, two pixels of 224: too few for six zones. `fine`: the last two
    convolutions take every pixel, for a 32nd, with the same weights.
    """

    channels, recompute = (64, 128, 256, 512, 1024), False

    def __init__(self, fine: bool):
        super().__init__()
        layers, c_in = [], 3
        for i, (c_out, kernel) in enumerate(zip(self.channels, (7, 5, 3, 3, 3), strict=True)):
            conv = nn.Conv2d(c_in, c_out, kernel, 1 if fine and i > 2 else 2, kernel // 2)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(3, 2, 1)] * (i < 2)
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.apply(init_convolution)

    def forward(self, image):
        return (run_blocks([self.features], image, self.recompute),)


class DinoLayer(nn.Module):
    """Pre-norm transformer block, each half scaled by a learned vector; key names of transformers' Dinov2 on disk."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        project = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        output = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": nn.ModuleDict(project), "output": output})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        for name in ("layer_scale1", "layer_scale2"):
            setattr(self, name, nn.ParameterDict({"lambda1": nn.Parameter(torch.ones(width))}))

    def forward(self, x):
        own, y = self.attention["attention"], self.norm1(x)
        q, k, v = (own[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (N, L, E)
        x = x + self.attention["output"]["dense"](y) * self.layer_scale1["lambda1"]
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + y * self.layer_scale2["lambda1"]


class Dino(nn.Module):
    """RAD-DINO, a DINOv2 ViT (arXiv 2304.07193): image (N, 3, h, w) -> map of patch tokens (N, E, h / 14, w / 14).

    `cls`: the class token (N, E) in place of the map, what the original tool takes. Key names of transformers on disk.
    """

    recompute = False

    def __init__(self, cls: bool = False, width: int = 768, depth: int = 12, heads: int = 12, grid: int = 37):
        super().__init__()
        self.cls, e = cls, nn.Module()
        self.embeddings = e
        e.cls_token, e.mask_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, width))
        e.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        e.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, 14, 14)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(DinoLayer(width, heads) for _ in range(depth))})
        self.layernorm = nn.LayerNorm(width, 1e-6)
        for parameter in (e.cls_token, e.position_embeddings):
            nn.init.trunc_normal_(parameter, std=0.02)
        e.mask_token.requires_grad_(False)  # of DINOv2's own training

    def positions(self, h: int, w: int):
        """(1, 1 + h w, E): resampled where the grid is another than in training."""
        known, n = self.embeddings.position_embeddings, math.isqrt(self.embeddings.position_embeddings.shape[1] - 1)
        if (h, w) == (n, n):
            return known
        grid = common.resize_bicubic(known[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2), h, w).to(known.dtype)
        return torch.cat([known[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, image):
        x = self.embeddings.patch_embeddings["projection"](image)  # (N, E, h, w)
        h, w = x.shape[-2:]
        x = torch.cat([self.embeddings.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = run_blocks(self.encoder["layer"], x + self.positions(h, w), self.recompute)
        x = self.layernorm(x)
        return (x[:, 0] if self.cls else x[:, 1:].transpose(1, 2).unflatten(2, (h, w)),)


def get_backbone(name: str, zone_focus: str = "none") -> nn.Module:
    """An untrained backbone by its name, any case: image (N, 3, h, w) -> tuple of maps, the last (N, D, h', w').

    RadDINO gives its class token (N, D), unless zone_focus is "pool"; Custom_1 then gives a finer map.
    """
    name = model_name(name)
    if name == "ResNet50":
        return ResNet((3, 4, 6, 3))
    if name == "CheXNet":
        return DenseNet()
    return Dino(cls=zone_focus != "pool") if name == "RadDINO" else Custom(fine=zone_focus == "pool")


class ZoneHead(nn.Module):
    """Features (B, 6, D), one row a zone -> logits (B, 6, C), each zone by its own linear layer; original key names."""

    def __init__(self, width: int, n_out: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.zone_classifiers = nn.ModuleList(nn.Linear(width, n_out) for _ in ZONES)

    def forward(self, features):
        x = self.dropout(features)
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.zone_classifiers)], 1)


class ZoneModel(nn.Module):
    """image (B, 1 or 3, S, S) in [0, 1], zones (B, S, S) uint8 or None -> logits (B, 6, C) float32.

    C: with --loss ce the scores, and unknown where it is a class; else what the ordinal loss takes, and whether the
    zone can be graded (see `zone_probs`).
    """

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = get_backbone(args.model, args.zone_focus)
        self.backbone.recompute = args.grad_checkpointing
        n_out = (3 if args.loss == "corn" else 4) + (args.num_classes == 5)
        self.head = ZoneHead(WIDTHS[args.model], n_out, args.dropout_rate)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.full((1, 1, 1), 0.5), persistent=False)
        self.adopt_args()

    def adopt_args(self):
        """Take over what no weight holds: the scale of the pixels, and whether DenseNet ends in a ReLU."""
        for name in ("mean", "std"):
            if getattr(self.args, name):
                value = torch.tensor(getattr(self.args, name), device=self.mean.device)
                setattr(self, name, value.view(-1, 1, 1))
        self.backbone.rectified = self.args.rectified is not False

    def train(self, mode: bool = True):
        """Frozen parts keep their batch-norm statistics and use no dropout."""
        super().train(mode)
        common.rest_frozen(self)
        return self

    def features(self, image, zones=None):
        """-> features (B, 6, D), and the last map (B, D, h, w) they are of, or a list of the zones' six."""
        x = ((image - self.mean) / self.std).expand(-1, 3, -1, -1)
        if self.args.zone_focus == "none":
            last = self.last_map(x)
            return pooled(last)[:, None].expand(-1, len(ZONES), -1), last
        masks = zone_masks(zones, x)  # (B, 6, S, S) of 0 and 1
        if self.args.zone_focus == "pool":
            last = self.last_map(x)
            return pool_zones(last, masks), last
        strength = self.args.attention_strength if self.args.masking_strategy == "attention" else 1.0
        weights = masks * strength + (1 - masks) * (1 - strength)
        maps = [self.last_map(x * weights[:, i : i + 1]) for i in range(len(ZONES))]
        return torch.stack([pooled(m) for m in maps], 1), maps

    def last_map(self, x):
        return self.backbone(x.contiguous(memory_format=torch.channels_last))[-1]

    def forward(self, image, zones=None):
        return self.head(self.features(image, zones)[0]).float()


def pooled(x):
    """(B, D, h, w) -> mean (B, D); a class token (B, D) is itself."""
    return x if x.ndim == 2 else x.mean((2, 3))


def zone_masks(zones, x):
    """zones (B, S, S), or None: thirds and halves of the image -> (B, 6, S, S) of 0 and 1, as x is."""
    if zones is None:
        zones = torch.from_numpy(thirds_and_halves(*x.shape[-2:])).to(x.device)[None]
    index = torch.arange(1, len(ZONES) + 1, device=x.device)
    return (zones[:, None] == index[:, None, None]).to(x.dtype).expand(len(x), -1, -1, -1)


def pool_zones(x, masks):
    """Map (B, D, h, w), masks (B, 6, S, S) -> (B, 6, D): the mean over each zone; a cell counts by its share in it."""
    weights = F.adaptive_avg_pool2d(masks, x.shape[-2:])  # not of x: its backward pass is not deterministic on CUDA
    weights = weights / weights.sum((2, 3), keepdim=True).clamp(min=1e-6)
    return torch.einsum("bzhw,bdhw->bzd", weights, x)


PLACES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # in an nn.Sequential
IN_MEMORY = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


def model_weights(state: dict, args) -> tuple[dict, str]:
    """Weights in any known layout -> names of `ZoneModel` (head included, if it is of this kind), and what they are:
    torchvision (old DenseNet keys too), CheXNet, TorchXRayVision, RAD-DINO, the original tool, or our own."""
    prefix = next((k.partition("head.zone_classifiers.")[0] for k in state if "head.zone_classifiers." in k), None)
    if prefix is not None:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        original = any(k.startswith("backbone.backbone.") for k in state)
        return (from_original(state, args.model), "original") if original else (state, "own")
    kind = "xrv" if any(k.endswith("op_threshs") for k in state) else "imagenet"
    state = {re.sub(r"^(?:model\.|densenet121\.|dinov2\.)+", "", k): v for k, v in state.items()}
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()}
    new = r"(layer\.\d+\.attention)\.([qkvo]_proj)"  # transformers 5 in memory
    state = {re.sub(new, lambda m: f"{m[1]}.{IN_MEMORY[m[2]]}", k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "op_threshs"))}
    for key in ("features.conv0.weight", "conv1.weight"):
        if key in state and state[key].shape[1] == 1:  # a grey film in three equal channels: their weights add up
            state[key], kind = state[key].expand(-1, 3, -1, -1) / 3, "xrv"
    kind = "raddino" if "embeddings.cls_token" in state else kind
    return {f"backbone.{k}": v for k, v in state.items()}, kind


def from_original(state: dict, name: str) -> dict:
    """State dict of the original tool, which holds its backbone twice (`backbone.backbone.` and, but for RadDINO,
    `backbone.features.`) -> our names."""
    out = {}
    for key, value in state.items():
        if key.startswith("backbone.backbone."):
            if name == "RadDINO":
                out[key.replace("backbone.backbone.model.", "backbone.")] = value
        elif name == "ResNet50" and key.startswith("backbone.features."):
            place, rest = key.removeprefix("backbone.features.").split(".", 1)
            out[f"backbone.{PLACES.get(place, place)}.{rest}"] = value
        else:
            out[key] = value
    return out


def known_weights(name: str) -> tuple[dict, str]:
    """The weights a model is known for, and where they were: the cache of torch.hub or a download, or the hub."""
    if name == "Custom_1":
        raise UserError("--pretrained true: Custom_1 has no published weights (--pretrained none, or a file)")
    if name == "RadDINO":
        source = "microsoft/rad-dino"
        return common.load_weights(source), source
    file = TORCHVISION[name]
    try:
        url = f"https://download.pytorch.org/models/{file}"
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True), file
    except Exception as e:  # no network, no disk, a wrong hash, a cut file in the cache
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"--pretrained true: {file} could not be had: {reason} (put the file into "
            f"{torch.hub.get_dir()}/checkpoints, or give --pretrained FILE or none)"
        ) from e


def pretrained_weights(args) -> tuple[dict, str, dict]:
    """-> weights in the names of `ZoneModel`, where they are from, and the mean, std and rectified they expect."""
    source = args.pretrained
    if source.lower() in ("true", "yes", "on", "imagenet"):
        state, source = known_weights(args.model)
    else:
        own = own_checkpoint(source)
        if own:
            state, then = own["ema"] or own["model"], own["args"]
            if (then["loss"], then["num_classes"]) != (args.loss, args.num_classes):  # other outputs, in the same shape
                state = {k: v for k, v in state.items() if not k.startswith("head.")}
            return state, source, {name: then[name] for name in ("mean", "std", "rectified")}
        state = common.load_weights(source)
    state, kind = model_weights(state, args)
    mean, std = NORMALIZATIONS.get(kind, NORMALIZATIONS["medical"])
    return state, source, {"mean": mean, "std": std, "rectified": kind != "original"}


def own_checkpoint(path) -> dict | None:
    """A checkpoint of this script; None if the file is another one."""
    try:
        saved = common.load_checkpoint(path)
    except UserError:
        return None
    return saved if saved["task"] == TASK else None


def build_model(args, say=print) -> ZoneModel:
    """The model with its pretrained weights, on the CPU; `args.mean`, `std` and `rectified` become what those expect.

    Of a run that goes on, which has them from its checkpoint, they stay, and no weights are read.
    """
    resumed = bool(args.resume) and args.mean is not None
    loading = not resumed and (args.pretrained or "none") != "none"
    state, source, facts = pretrained_weights(args) if loading else ({}, "", {})
    if not resumed:
        mean, std = NORMALIZATIONS["medical" if args.normalization == "auto" else args.normalization]
        vars(args).update({"mean": mean, "std": std, "rectified": True} | facts)
        if args.normalization != "auto" or args.export:  # an export is for the original tool, which has one form
            vars(args).update(mean=list(mean), std=list(std))
        args.rectified = args.rectified and not args.export
    model = ZoneModel(args)
    if loading:
        own = model.state_dict()
        state = {k: v for k, v in state.items() if not k.startswith("head.") or k in own and own[k].shape == v.shape}
        common.apply_weights(model, state, source, ("head.",), args.allow_partial, say)
        say(f"grey levels 0 to 1 are scaled by mean {args.mean} and standard deviation {args.std}")
    return model.to(memory_format=torch.channels_last)


def export_weights(model: ZoneModel) -> dict:
    """The model in the names of the original tool; the reverse of `from_original`."""
    back, out = {v: k for k, v in PLACES.items()}, {}
    for key, value in model.state_dict().items():
        value, rest = value.contiguous(), key.removeprefix("backbone.")
        if key.startswith("head."):
            out[key] = value
        elif model.args.model == "RadDINO":
            out[f"backbone.backbone.model.{rest}"] = value
        else:
            out[f"backbone.backbone.{rest}"] = value
            place, inner = rest.split(".", 1)
            out[f"backbone.features.{back[place]}.{inner}" if place in back else key] = value
    return out


def load_checkpoint(model: nn.Module, path) -> dict:
    """Load the weights of a checkpoint (the averaged ones, if any), or bare weights, into `model` -> the checkpoint, or
    {"model": ...} of bare weights. The model then scales pixels as those weights expect. Raises UserError."""
    try:
        saved = common.load_checkpoint(path)
    except UserError as e:
        if "not a checkpoint of this toolkit" not in str(e):  # missing, damaged, or refused
            raise
        given = Config(**vars(model.args) | {"pretrained": str(path)})
        state, _, facts = pretrained_weights(given)
        saved = {"model": state, "ema": None, "args": vars(model.args) | facts}
    for name in ("model", "zone_focus", "masking_strategy", "attention_strength", "loss", "num_classes"):
        then = saved["args"].get(name)
        if then != getattr(model.args, name):
            raise UserError(f"{path}: {name} is {then} there and {getattr(model.args, name)} in this model")
    common.apply_weights(model, saved["ema"] or saved["model"], str(path), say=logger.debug)
    vars(model.args).update({name: saved["args"][name] for name in ("mean", "std", "rectified")})
    model.adopt_args()
    return saved


def build_eval_model(saved: dict, args, device) -> ZoneModel:
    """The model of a checkpoint: its averaged weights where it has them."""
    model = common.filled(lambda: ZoneModel(args), saved)
    return model.to(device, memory_format=torch.channels_last).eval()


def forward_flops(model, args) -> float:
    """Floating-point operations of one sample's forward pass, counted on the meta device."""
    side = args.image_size
    with FlopCounterMode(display=False) as counter:
        deepcopy(model).to("meta").eval()(torch.empty(1, 1, side, side, device="meta"))
    return counter.get_total_flops()


def set_trainable(model, args, epoch: int, say=print) -> bool:
    """Freeze and unfreeze for this epoch; True if that changed anything."""
    parameters = [p for k, p in model.backbone.named_parameters() if not k.endswith("mask_token")]
    before = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(not args.freeze_backbone)
    return before != [p.requires_grad for p in parameters]


# ==== Loss and optimizer =======================================================================================


class WeightedCSILoss(nn.Module):
    """Cross-entropy of five classes in which an unknown zone weighs `unknown_weight`, a graded one 1.

    predictions: (B, 6, 5) logits; targets: (B, 6) int64, 0-3 or UNKNOWN -> scalar: weighted sum over all zones of the
    batch, divided by the sum of the weights (the original tool's, which divides by its own batch on every rank and
    micro-step; here `count` joins them). With four logits unknown zones are left out.
    """

    def __init__(self, unknown_weight: float = 0.3):
        super().__init__()
        self.unknown_weight = unknown_weight

    def weights(self, targets):
        """(B, 6) int64 -> (B, 6) float32."""
        return torch.where(targets == UNKNOWN, self.unknown_weight, 1.0)

    def count(self, batch):
        """What the mean is over; sums of it join micro-batches and ranks."""
        return self.weights(batch["target"]).sum()

    def each(self, logits, targets):
        """(B, 6, C), (B, 6) -> the loss of every zone, (B, 6)."""
        flat = logits.flatten(0, 1), targets.flatten()
        ignored = UNKNOWN if logits.shape[-1] == UNKNOWN else -100
        return F.cross_entropy(*flat, reduction="none", ignore_index=ignored).view_as(targets)

    def forward(self, predictions, targets):
        weights = self.weights(targets)
        if predictions.shape[-1] == UNKNOWN:
            weights = weights * (targets != UNKNOWN)
        return self.mean(self.each(predictions, targets), weights)

    def mean(self, each, weights):
        return (weights * each).sum() / weights.sum().clamp(min=1e-8)


class OrdinalLoss(WeightedCSILoss):
    """An ordinal loss of the score of graded zones, plus the cross-entropy of whether a zone is graded.

    predictions: (B, 6, C) logits: 3 of CORN or 4 of the others, and behind them with five classes that of "gradable".
    Weights, denominator and shapes as in WeightedCSILoss.
    """

    def __init__(self, kind: str, unknown_weight: float, cdw_alpha: float, gradable: bool):
        super().__init__(unknown_weight)
        self.kind, self.cdw_alpha, self.gradable = kind, cdw_alpha, gradable

    def forward(self, predictions, targets):
        return self.mean(self.each(predictions, targets), self.weights(targets))

    def each(self, logits, targets):
        graded, n_scores = targets != UNKNOWN, 3 if self.kind == "corn" else 4
        flat = logits[..., :n_scores].flatten(0, 1), torch.where(graded, targets, -1).flatten()
        more = {"alpha": self.cdw_alpha} if self.kind == "cdw" else {}
        loss = {"corn": common.corn_loss, "cdw": common.class_distance_loss, "emd": common.emd_loss}[self.kind]
        each = loss(*flat, reduction="none", **more).view_as(targets)
        if not self.gradable:
            return each
        return each + F.binary_cross_entropy_with_logits(logits[..., -1], graded.to(logits), reduction="none")


def build_criterion(args, train_set):
    weight = args.unknown_weight if args.num_classes == 5 else 0.0
    if args.loss == "ce":
        return WeightedCSILoss(weight)
    return OrdinalLoss(args.loss, weight, args.cdw_alpha, args.num_classes == 5)


def build_optimizer(model, args):
    """Two parameter groups: matrices and convolutions decay; norms, biases, tokens and positions do not."""
    still = [p for k, p in model.named_parameters() if p.ndim < 2 or k.endswith(("_token", "position_embeddings"))]
    decaying = [p for p in model.parameters() if not any(p is other for other in still)]
    parts = [(args.weight_decay, decaying), (0.0, still)]
    groups = [{"params": params, "weight_decay": decay, "lr_scale": 1.0} for decay, params in parts]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return (torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW)(groups, lr=args.lr, fused=True)


def compute_loss(net, batch, criterion):
    return criterion(net(batch["image"], batch.get("zones")), batch["target"]), {}


# ==== Loop parts (the same text in every training script; tests/test_skeleton.py) ==============================


class EMA:
    """Exponential moving average of a model's weights, warmed up so that early steps do not weigh too long."""

    def __init__(self, model, decay):
        self.module, self.decay = deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model, updates):
        decay = min(self.decay, (1 + updates) / (10 + updates))
        mine, theirs = self.module.state_dict(), model.state_dict()
        floating = [k for k, v in mine.items() if v.is_floating_point()]
        torch._foreach_lerp_([mine[k] for k in floating], [theirs[k] for k in floating], 1 - decay)
        for k in mine.keys() - set(floating):
            mine[k].copy_(theirs[k])


class StepSampler:
    """Endless micro-batches of (epoch, index); the order is a function of (seed, epoch): a resumed run starts anywhere.

    One step takes the next `batch_size * accum_steps * world` samples of the epoch's order, in the same order however
    they are split over micro-steps and ranks; what does not fill a step at the end of an epoch waits for another one.
    """

    def __init__(self, n, args, ctx, step):
        self.n, self.size, self.accum, self.seed, self.step = n, args.batch_size, args.accum_steps, args.seed, step
        self.rank, self.global_batch = ctx.rank, args.batch_size * args.accum_steps * ctx.world
        self.per_epoch = n // self.global_batch
        if not self.per_epoch:
            raise UserError(f"{n} training samples do not fill one step of {self.global_batch} (lower --batch-size)")

    def __iter__(self):
        while True:
            epoch, offset = divmod(self.step, self.per_epoch)
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            for step in range(offset, self.per_epoch):
                first = step * self.global_batch + self.rank * self.size * self.accum
                for part in order[first : first + self.size * self.accum].split(self.size):
                    yield [(epoch, i) for i in part.tolist()]
            self.step = (epoch + 1) * self.per_epoch


def lr_at(update, max_steps, args):
    """Linear warm-up, then half a cosine to min_lr_ratio, or level (a plateau scheduler lowers it from outside)."""
    if update < args.warmup:
        return args.lr * (update + 1) / args.warmup
    if args.scheduler != "cosine":
        return args.lr
    progress = min(1.0, (update - args.warmup) / max(1, max_steps - args.warmup))
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def forward_backward(net, micro_batches, criterion, scaler, autocast, ctx):
    """Gradient of the mean loss over the global batch; ranks synchronise in the last micro-step only.

    A micro-batch weighs by what its mean is over (`criterion.count`: known labels), so that no split of the batch over
    ranks and micro-steps changes the result. Returns logs, averaged over micro-steps and ranks.
    """
    counts = torch.stack([criterion.count(b) for b in micro_batches]).to(ctx.device, torch.float32)
    total = ctx.sum(counts.sum()).clamp(min=1e-8) / ctx.world  # DDP divides the sum of gradients by the world size
    summed = {}
    for i, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
        batch = {k: v.to(ctx.device, non_blocking=True) for k, v in batch.items()}
        last = i == len(micro_batches) - 1
        with nullcontext() if last or ctx.world == 1 else net.no_sync():  # opened before the forward, or ranks diverge
            with autocast:
                loss, logs = compute_loss(net, batch, criterion)
            scaler.scale(loss * (count / total)).backward()
        for k, v in {"loss": loss, **logs}.items():
            summed[k] = summed.get(k, 0) + v.detach() * (count / total)
    return {k: ctx.sum(v) / ctx.world for k, v in summed.items()}


# ==== Evaluation ===============================================================================================


def zone_probs(logits, args) -> np.ndarray:
    """Logits (n, 6, C) -> probabilities (n, 6, 5) float64 of the scores 0-3 and of unknown, which together are 1."""
    x = torch.as_tensor(logits).double()
    if args.loss == "ce":
        return F.pad(x.softmax(-1), (0, 5 - x.shape[-1])).numpy()
    gradable = x[..., -1:].sigmoid() if args.num_classes == 5 else torch.ones_like(x[..., :1])
    given = common.corn_probs(x[..., :3]) if args.loss == "corn" else x[..., :4].softmax(-1)
    return torch.cat([gradable * given, 1 - gradable], -1).numpy()


def decide(probs: np.ndarray, args) -> dict[str, np.ndarray]:
    """Probabilities (n, 6, 5) -> expected (n, 6): mean score if the zone can be graded; severity (n, 6) int 0-3, the
    score if it can be graded; classes (n, 6) int, severity or UNKNOWN; csi (n,): mean of `expected` over the zones that
    are not UNKNOWN, NaN = the film is not gradable. Of a film that was not read (NaN): NaN, and -1.

    --loss ce takes the most probable class, as the original tool does; an ordinal loss the score next to the expected
    one, and UNKNOWN where that is more probable than not.
    """
    given = probs[..., :4] / np.maximum(probs[..., :4].sum(-1, keepdims=True), 1e-12)
    expected = given @ np.arange(4.0)
    read = ~np.isnan(expected)
    if args.loss == "ce":
        severity, unknown = given.argmax(-1), probs.argmax(-1) == UNKNOWN
    else:
        severity, unknown = np.rint(np.where(read, expected, 0)).astype(np.int64), probs[..., UNKNOWN] > 0.5
    classes = np.where(unknown, UNKNOWN, severity)
    out = {"severity": np.where(read, severity, -1), "classes": np.where(read, classes, -1)}
    counted = read & ~unknown
    n = counted.sum(-1)
    csi = np.where(n > 0, np.where(counted, expected, 0).sum(-1) / np.maximum(n, 1), np.nan)
    return out | {"expected": expected, "csi": csi}


def true_csi(targets) -> np.ndarray:
    """Scores (n, 6), UNKNOWN or out of range where there is none -> mean of the others (n,), NaN without any."""
    targets = np.asarray(targets)
    graded = (targets >= 0) & (targets < UNKNOWN)
    n = graded.sum(-1)
    return np.where(n > 0, np.where(graded, targets, 0).sum(-1) / np.maximum(n, 1), np.nan)


def ahf_class(csi) -> np.ndarray:
    """Mean scores (n,) -> likelihood of acute heart failure: 0 low, 1 medium, 2 high, -1 not gradable (NaN)."""
    csi = np.asarray(csi, np.float64)
    return np.where(np.isnan(csi), -1, (csi > AHF_LIMITS[0]).astype(int) + (csi > AHF_LIMITS[1]))


@torch.no_grad()
def predict(model, dataset, ctx, say=None) -> dict:
    """Every film exactly once; to the last digit the same on every rank, for any number of ranks.

    -> ids, groups, targets (n, 6), probs (n, 6, 5) float64, logits (n, 6, C) float32; failed: indices of films that
    were not read, whose rows are NaN.
    """
    args = dataset.args
    batches = common.eval_batches(len(dataset), args.eval_batch_size or args.batch_size, ctx)
    loader = common.data_loader(dataset, [[(0, i) for i in b] for b in batches], args, ctx)
    rows = []
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        for batch in tqdm(loader, desc=say, leave=False, disable=None if say and ctx.master else True):
            inputs = (batch[k].to(ctx.device, non_blocking=True) for k in ("image", "zones") if k in batch)
            features = model.features(*inputs)[0]
            # Row by row: the digits of a small matrix product depend on the place in the batch.
            out = torch.cat([model.head(row) for row in features.split(1)]).float().cpu()
            rows.append(torch.cat([batch["bad"][:, None].float(), out.flatten(1)], 1))
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)
    failed, logits = (rows[:, 0] > 0).numpy(), rows[:, 1:].unflatten(1, (len(ZONES), -1)).numpy()
    if not np.isfinite(logits[~failed]).all():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    logits[failed] = np.nan
    return {
        "ids": dataset.ids,
        "groups": dataset.groups,
        "targets": dataset.targets,
        "probs": zone_probs(logits, args),
        "logits": logits,
        "failed": np.flatnonzero(failed).tolist(),
    }


def evaluate(model, dataset, criterion, ctx) -> dict[str, float]:
    """The loss over all films, and `zone_metrics`."""
    model.eval()
    out, args = predict(model, dataset, ctx, "evaluation"), dataset.args
    read = np.setdiff1d(np.arange(len(dataset)), out["failed"])
    if not len(read):
        raise UserError(f"no film of split '{args.split}' could be read")
    targets, probs = out["targets"][read], out["probs"][read]
    logits = torch.from_numpy(out["logits"][read]).to(ctx.device)
    loss = criterion(logits, torch.from_numpy(targets).to(ctx.device))
    return {"val_loss": float(loss), "n_missing": len(out["failed"]), **zone_metrics(targets, probs, args)}


def zone_metrics(targets: np.ndarray, probs: np.ndarray, args) -> dict[str, float]:
    """targets (n, 6), probs (n, 6, 5) -> flat names; NaN where undefined. Of zones graded by the reader: qwk (quadratic
    weighted kappa, all zones together), zone_mae (of the expected score), f1_*, precision_*, recall_*, accuracy; of
    films: csi_mae, csi_rmse, csi_correlation, ahf_accuracy; gradable_auroc, of P(unknown)."""
    found = decide(probs, args)
    graded = targets != UNKNOWN
    counts = common.confusion_counts(targets[graded], found["severity"][graded], 4)
    mean, truth = common.agreement(found["csi"], true_csi(targets)), ahf_class(true_csi(targets))
    ranks = common.weighted_auroc(graded.ravel(), 1 - probs[..., UNKNOWN].ravel(), np.ones((graded.size, 1)))
    f1 = compute_f1_metrics(found["classes"], targets)
    ratios = compute_precision_recall(found["classes"], targets, ignore_index=UNKNOWN)
    return {
        "qwk": float(common.quadratic_kappa(counts)[0]),
        "zone_mae": float(np.abs(found["expected"] - targets)[graded].mean()) if graded.any() else math.nan,
        "accuracy": float((found["classes"] == targets)[graded].mean()) if graded.any() else math.nan,
        "f1_weighted": f1["f1_weighted_overall"],
        **f1,
        **{k: v for k, v in ratios.items() if k.endswith(("_macro", "_overall"))},
        **{f"csi_{name}": float(mean[key][0]) for name, key in (("mae", "mae"), ("rmse", "rmse"),
                                                                ("correlation", "pearson"), ("icc", "icc"))},
        "ahf_accuracy": mean_of((ahf_class(found["csi"]) == truth)[truth >= 0]),
        "gradable_auroc": float(ranks[0]),
    }  # fmt: skip


def class_array(x) -> np.ndarray:
    """Classes (n, 6), or logits or probabilities (n, 6, C), tensor or array -> classes (n, 6)."""
    x = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    return x.argmax(-1) if x.ndim == 3 else x


def class_ratios(predictions, targets, ignore_index) -> tuple[list[str], dict, dict, list[str]]:
    """Names of the six zones and "overall"; `common.class_metrics` of each: means (7,), by class (7, C); the classes.

    Zones whose target is `ignore_index` are left out, and that class is none: to predict it is an error.
    """
    predictions, targets = class_array(predictions), class_array(targets)
    classes = [c for c in range(5) if c != ignore_index]
    cells = np.ix_(classes, classes if ignore_index is None else [*classes, ignore_index])
    pairs = [*zip(targets.T, predictions.T, strict=True), (targets.ravel(), predictions.ravel())]
    counts = np.stack([common.confusion_counts(*pair, 5)[0][cells] for pair in pairs])
    zones = [*(f"zone_{i}" for i in range(1, 7)), "overall"]
    return zones, *common.class_metrics(counts), [CLASSES[c].lower() for c in classes]


def mean_of(values) -> float:
    """Mean of what is defined; NaN if nothing is."""
    return float(common.mean_defined(np.asarray(values, float)))


def compute_f1_metrics(predictions, targets, ignore_index: int | None = UNKNOWN) -> dict[str, float]:
    """F1 of each zone and over all: f1_macro and f1_weighted_macro (means of the zones), f1_overall and
    f1_weighted_overall (all zones as one), f1_zone_1 ..., f1_weighted_zone_1 ..., f1_zone_1_normal ...

    predictions: (n, 6) classes or (n, 6, C) logits; targets: (n, 6). A macro mean is over the classes that are there
    or predicted, so that a perfect model has 1.0 (in the original tool 0.8: it counts the ignored class as 0).
    """
    zones, means, by_class, names = class_ratios(predictions, targets, ignore_index)
    out = {"f1_macro": mean_of(means["f1_macro"][:6]), "f1_weighted_macro": mean_of(means["f1_weighted"][:6])}
    for i, zone in enumerate(zones):
        out[f"f1_{zone}"], out[f"f1_weighted_{zone}"] = float(means["f1_macro"][i]), float(means["f1_weighted"][i])
        out |= {f"f1_{zone}_{c}": float(v) for c, v in zip(names, by_class["f1"][i], strict=True)}
    return out


def compute_precision_recall(predictions, targets, ignore_index: int | None = None) -> dict[str, float]:
    """precision_ and recall_ of zone_1 ... zone_6 and overall, of each class (zone_1_normal, overall_normal ...), and
    macro, the mean of the zones; arguments as in `compute_f1_metrics`, by default with unknown as a class."""
    zones, means, by_class, names = class_ratios(predictions, targets, ignore_index)
    out = {}
    for kind in ("precision", "recall"):
        out[f"{kind}_macro"] = mean_of(means[kind][:6])
        for i, zone in enumerate(zones):
            out[f"{kind}_{zone}"] = float(means[kind][i])
            out |= {f"{kind}_{zone}_{c}": float(v) for c, v in zip(names, by_class[kind][i], strict=True)}
    return out


PARTS = {"right": (0, 2, 4), "left": (1, 3, 5), "upper": (0, 1), "mid": (2, 3), "lower": (4, 5)}  # of ZONES


def compute_csi_average_metrics(predictions, targets, file_ids=None, csv_data=None) -> dict[str, float]:
    """The mean score of films, predicted against true: csi_avg_{mae, rmse, correlation, pred_mean, target_mean}.

    The same of each of PARTS (csi_right_mae ...) and, with file_ids (n,) and csv_data, a table with FileID and csi,
    against that column (csi_csv_avg_*). csi_avg_n: films that both can grade; without a graded zone there is no mean.

    predictions: (n, 6) classes or (n, 6, C) logits; targets: (n, 6). Unknown zones count on neither side.
    """
    predictions, targets = class_array(predictions), class_array(targets)

    def compared(name: str, found, truth) -> dict:
        both = ~np.isnan(found) & ~np.isnan(truth)
        row = {k: float(v[0]) for k, v in common.agreement(found, truth).items()}
        means = {"pred_mean": mean_of(found[both]), "target_mean": mean_of(truth[both])}
        row = {"mae": row["mae"], "rmse": row["rmse"], "correlation": row["pearson"], **means, "n": int(both.sum())}
        return {f"{name}_{k}": v for k, v in row.items()}

    mean = true_csi(predictions)
    out = compared("csi_avg", mean, true_csi(targets))
    for part, columns in PARTS.items():
        out |= compared(f"csi_{part}", true_csi(predictions[:, columns]), true_csi(targets[:, columns]))
    if file_ids is not None and csv_data is not None:
        csi = pd.to_numeric(csv_data["csi"], errors="coerce")
        of = dict(zip(identifiers(csv_data["FileID"].astype(str)), csi, strict=True))
        truth = identifiers(pd.Series(list(file_ids)).astype(str)).map(of)
        out |= compared("csi_csv_avg", mean, truth.to_numpy(float))
    return out


def compute_ahf_classification_metrics(predictions, targets) -> dict:
    """Classes of acute heart failure (see `ahf_class`) by the mean score: ahf_accuracy, ahf_macro_{precision, recall,
    f1}, ahf_class_{0, 1, 2}_{...}, ahf_confusion_matrix 3 x 3 (rows true), ahf_not_gradable: films of each true class
    whose zones are all predicted unknown. Those are errors, never low risk; films without a true class are left out.
    """
    found, truth = (ahf_class(true_csi(class_array(x))) for x in (predictions, targets))
    found, truth = found[truth >= 0], truth[truth >= 0]
    counts = common.confusion_counts(truth, np.where(found < 0, 3, found), 4)[0][:3]  # (3, 4)
    means, by_class = common.class_metrics(counts[None])
    out = {"ahf_accuracy": float(means["accuracy"][0])}
    out |= {f"ahf_macro_{k}": mean_of(v[0]) for k, v in by_class.items()}
    out |= {f"ahf_class_{c}_{k}": float(v[0, c]) for c in range(3) for k, v in by_class.items()}
    out["ahf_confusion_matrix"] = counts[:, :3].astype(int).tolist()
    return out | {"ahf_not_gradable": counts[:, 3].astype(int).tolist()}


@torch.enable_grad()
def zone_maps(model, dataset, index: int, device) -> np.ndarray | None:
    """Where a film (by its index) shows the severity of each zone: (6, S, S) float32, the highest of the film 1.

    Gradient of the zone's expected score times activation, over the channels of the last map, what raises the score
    alone (HiResCAM, arXiv 2011.08891: Grad-CAM without its average over places, which would point outside the zone);
    of a ViT its patch tokens. None where nothing can be shown: no map (a class token), or not finite, or 0 everywhere.
    """
    item = dataset[(0, index)]
    if item.get("bad"):
        return None
    zones = item["zones"][None].to(device) if "zones" in item else None
    features, maps = model.features(item["image"][None].to(device).requires_grad_(), zones)
    of_zone = maps if isinstance(maps, list) else [maps] * len(ZONES)
    if of_zone[0].ndim != 4:
        return None
    logits, out = model.head(features).float()[0], []
    at = logits.detach().double().requires_grad_()
    slope = torch.autograd.grad(expected_scores(at, model.args).sum(), at)[0]  # (6, C)
    slope = slope / slope.abs().sum(1, keepdim=True)  # flat where the model is sure: only the direction counts
    scores = (slope.to(logits.dtype) * logits).sum(1)
    for score, x in zip(scores, of_zone, strict=True):
        gradient = torch.autograd.grad(score, x, retain_graph=True)[0]
        out.append((gradient * x).sum(1, keepdim=True).relu())  # (1, 1, h, w)
    side = item["image"].shape[-1]
    found = F.interpolate(torch.cat(out), (side, side), mode="bilinear", align_corners=False)[:, 0].detach()
    return (found / found.max()).cpu().numpy() if found.isfinite().all() and found.max() > 0 else None


def expected_scores(logits, args) -> torch.Tensor:
    """Logits (6, C) -> (6,), differentiable: the mean score if the zone can be graded."""
    given = common.corn_probs(logits[:, :3]) if args.loss == "corn" else logits[:, :4].softmax(-1)
    return given @ torch.arange(4.0, device=logits.device, dtype=logits.dtype)


# ==== Train ====================================================================================================


def autocast_of(args, device):
    """(autocast, gradient scaler): both do nothing unless the precision asks for it."""
    best = "bf16" if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"none": None, "auto": best, "fp16": "fp16", "bf16": "bf16"}[args.amp]
    torch_dtype = torch.float16 if dtype == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, torch_dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def train(args, ctx):
    # ---- 1. run folder, precision, the checkpoint to continue
    common.make_folder((args.output_dir / LAST).parent)
    saved = common.find_resume(args, LAST, FIXED_ARGS, ctx.world)
    state = {
        "step": 0, "updates": 0, "best": [], "stale": 0, "plateau": 0, "lr_factor": 1.0, "bad_steps": 0,
        "bad_samples": [], "loss_sum": 0.0, "loss_steps": 0,
        "global_batch": args.batch_size * args.accum_steps * ctx.world,
    }  # fmt: skip
    state = saved["state"] if saved else state
    log = RunLog(args.output_dir, ctx, LOG.format(**vars(args)), RESULTS.format(**vars(args)), state["step"])
    autocast, scaler = autocast_of(args, ctx.device)

    # ---- 2. data, model, loss, optimizer
    seed_everything(args.seed)  # the same weights on every rank
    train_set, val_set = build_datasets(args)
    model = build_model(args, log.info).to(ctx.device)
    criterion = build_criterion(args, train_set).to(ctx.device)
    optimizer = build_optimizer(model, args)
    ema = EMA(model, args.ema_decay) if args.use_ema else None
    log.info(f"{len(train_set)} training and {len(val_set)} validation cases, on {ctx}; first: {train_set.notes()}")

    # ---- 3. resume: whatever the loop changes is in `state` or has a state_dict
    parts = {"model": model, "ema": ema and ema.module, "optimizer": optimizer, "scaler": scaler}
    if not saved:  # only now: a mistake in the data or the model has cost nothing
        common.forget_run(args.output_dir / LAST, ctx)
    else:
        common.load_parts(parts, saved)
        log.info(f"resumed at step {state['step']}")
    log.begin(args.output_dir / LAST)
    best = TopK(args.output_dir, TOP, args.top_k, state["best"])
    sampler = StepSampler(len(train_set), args, ctx, state["step"])
    max_steps = args.max_steps or args.epochs * sampler.per_epoch
    stop = StopSignal()
    if args.tensorboard:
        log.add_tensorboard(args.output_dir / TENSORBOARD.format(**vars(args)), args, state["step"])
    log.add_wandb(args, WANDB_PROJECT)

    # ---- 4. compile in place (keeps key names); `net` runs, `model` is saved
    compiling = ctx.device.type == "cuda" if args.compile is None else args.compile
    if compiling:
        model.compile(options={"fallback_random": True})  # dropout as without: the same in both passes of a chunk
    net, epoch = None, -1
    batches = iter(common.data_loader(train_set, sampler, args, ctx))
    flops = 3 * forward_flops(model, args) * args.batch_size * args.accum_steps if ctx.device.type == "cuda" else 0
    progress = Progress(max_steps, sampler.per_epoch, ctx.device, flops)
    bar = tqdm(total=max_steps, initial=state["step"], disable=None if ctx.master else True, desc=TASK)

    def save():
        states = {k: common.whole(v.state_dict()) if v is not None else None for k, v in parts.items()}
        if ctx.master:
            whole = {**common.model_checkpoint(TASK, args, model, {}), "state": state, **states}
            common.save_last(args.output_dir / LAST, whole)
            best.prune()  # only now does no checkpoint on disk need the files that dropped out

    # ---- 5. one iteration is one optimizer step
    while state["step"] < max_steps and state["stale"] < args.early_stopping_patience:
        seed_everything(args.seed, ctx.rank, state["step"])  # dropout is a function of the step, not of what ran before
        if epoch != state["step"] // sampler.per_epoch:
            epoch = state["step"] // sampler.per_epoch
            state["lr_factor"] = step_factor(args, state, epoch)  # task
            if set_trainable(model, args, epoch, log.info) or net is None:
                net = DistributedDataParallel(model) if ctx.world > 1 and not common.is_split(model) else model
                if compiling:
                    torch.compiler.reset()  # other parts frozen is another graph, and the number of graphs is limited
        for group in optimizer.param_groups:
            group["lr"] = lr_at(state["updates"], max_steps, args) * state["lr_factor"] * group["lr_scale"]

        # -------- single training step --------
        net.train()
        statistics = common.copy_statistics(model)
        waiting = time.perf_counter()
        micro_batches = [next(batches) for _ in range(args.accum_steps)]
        waiting = time.perf_counter() - waiting
        logs = forward_backward(net, micro_batches, criterion, scaler, autocast, ctx)
        scaler.unscale_(optimizer)
        if args.check_ranks:
            common.check_ranks(model, ctx)
        grad_norm = common.clip_grad_norm(model, args.max_grad_norm)
        # waits for the device; a disabled scaler would step on NaN
        good = bool(grad_norm.isfinite()) and bool(logs["loss"].isfinite())
        if good:
            scaler.step(optimizer)
            state["updates"] += 1
            if ema:
                ema.update(model, state["updates"])
        else:
            common.put_back(model, statistics)
        searching = scaler.is_enabled() and scaler.get_scale() > 1 and bool(logs["loss"].isfinite())
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        # --------------------------------------

        step = state["step"]
        final = step == max_steps
        if good:
            state["loss_sum"] += float(logs["loss"])
            state["loss_steps"] += 1
        state["bad_steps"] = 0 if good else state["bad_steps"] + (not searching)
        if not good:
            log.warning(f"step {step}: gradient norm {float(grad_norm)}, loss {float(logs['loss'])}: step skipped")
        if state["bad_steps"] >= args.max_bad_steps:
            raise UserError(f"{args.max_bad_steps} steps in a row were not finite (lower --lr, or --amp bf16 or none)")
        if args.on_bad_sample == "skip":
            common.note_bad_samples(args, state, micro_batches, train_set, ctx)
        progress.tick(waiting)
        bar.update()
        if final or step % args.log_interval == 0:  # rank 0 writes
            lr = optimizer.param_groups[0]["lr"]
            bar.set_postfix(loss=f"{float(logs['loss']):.4f}")
            for line in progress.lines(step, float(logs["loss"]), lr):
                log.info(line)
            values = {f"train/{k}": float(v) for k, v in logs.items()}
            log.scalars(step, {**values, "train/lr": lr, "train/grad_norm": float(grad_norm)})

        stopping = ctx.any(bool(stop))
        evaluating = final or step % (args.eval_every or sampler.per_epoch) == 0
        if evaluating:  # all ranks, the same numbers on each
            judged = ema.module if ema else model
            ctx.share_buffers(judged)
            metrics = evaluate(judged, val_set, criterion, ctx)
            epoch_done = math.ceil(step / sampler.per_epoch)
            train_loss = state["loss_sum"] / max(1, state["loss_steps"])
            score = -metrics["val_loss"] if args.monitor == "val_loss" else metrics[args.monitor]
            name = TOP.format(epoch=epoch_done, step=step, **metrics)
            entry = common.model_checkpoint(TASK, args, judged, metrics)
            improved = best.add(score, step, name, entry, ctx.master)
            if ctx.master:
                common.link_file(args.output_dir / best.entries[0]["path"], args.output_dir / BEST)
            stale, plateau = (0, 0) if improved else (state["stale"] + 1, state["plateau"] + 1)
            if args.scheduler == "plateau" and plateau > args.plateau_patience:
                plateau, state["lr_factor"] = 0, state["lr_factor"] * args.plateau_factor
            stale = stale_after(args, state, score, step, metrics)  # task
            state.update(stale=stale, plateau=plateau, loss_sum=0.0, loss_steps=0)
            record = {"epoch": epoch_done, "step": step, "train_loss": train_loss, **metrics}
            log.results(record)
            write_histories(args, ctx)  # task
            log.scalars(step, {f"val/{k}": v for k, v in metrics.items()} | {"train/epoch_loss": train_loss})
            shown = " - ".join(f"{k}: {v:.4f}" for k, v in record.items() if k in ("train_loss", "val_loss", *SHOWN))
            log.info(f"Epoch {epoch_done} - {shown}" + (" - best" if improved else ""))
        # not while steps fail: the weights may have burst, and the checkpoints of before are few
        if evaluating or stopping or (good and step % args.save_every == 0):  # rank 0 writes
            save()
            progress.skip()
        if stopping:
            ctx.barrier()  # torchrun ends the others once one leaves: rank 0 must have saved
            log.info(f"{stop.name or 'a signal on another rank'}: saved at step {step} (--resume auto continues)")
            log.close()
            return 143
    bar.close()

    # ---- 6. the best model, its thresholds
    return finish(args, ctx, model, val_set, best, log)


def step_factor(args, state: dict, epoch: int) -> float:
    """What the rate is multiplied by: with StepLR by the epoch, else what the plateau has left."""
    return args.plateau_factor ** (epoch // args.step_size) if args.scheduler == "step" else state["lr_factor"]


def stale_after(args, state: dict, score: float, step: int, metrics: dict) -> int:
    """Evaluations without a gain of --early-stopping-min-delta over the best; enough to stop if a search wants it."""
    best = state.get("stop_score")
    gained = best is None or math.isnan(best) or score > best + args.early_stopping_min_delta
    state["stop_score"] = score if gained else best
    hopeless = PRUNE is not None and PRUNE(step, metrics)
    return args.early_stopping_patience if hopeless else 0 if gained else state["stale"] + 1


def write_histories(args, ctx) -> None:
    """logs/training_history.json and validation_history.json from results.jsonl: {name: one number an evaluation}."""
    if not ctx.master:
        return
    records = [json.loads(line) for line in (args.output_dir / RESULTS).read_text().splitlines()]
    own = ("epoch", "step", "train_loss")
    columns = {k: [r.get(k) for r in records] for k in (records[0] if records else {})}
    for name, keys in (("training", own), ("validation", ("epoch", "step", *(k for k in columns if k not in own)))):
        content = {("epochs" if k == "epoch" else k): columns[k] for k in keys}
        common.write_atomic(args.output_dir / f"logs/{name}_history.json", json.dumps(content, indent=1) + "\n")


def name_hash(film: str) -> str:
    """What a checkpoint keeps of a training film, so that an evaluation can tell it from others."""
    return hashlib.sha256(film.encode()).hexdigest()[:16]


def finish(args, ctx, model, val_set, best, log) -> int:
    """Put the best weights back into the model, which are still in memory, and write best_model.pth; the export."""
    if not best.entries:
        raise UserError(f"{args.output_dir}: none of the run's best models is here (resume in the run's own folder)")
    entry, saved = best.entries[0], best.memory[best.entries[0]["path"]]
    ctx.barrier()  # rank 0 may still be writing the last one
    last = {} if args.restore_best_weights else common.load_checkpoint(args.output_dir / LAST)
    model.load_state_dict(last["ema"] or last["model"] if last else saved["model"])
    table = split_films(read_scores(args.csv, args), args)
    train = table[table["split"] == "train"]
    medians = train[list(ZONES)].where(train[list(ZONES)] != UNKNOWN).median().fillna(0)
    saved["zone_medians"], saved["trained_on"] = [int(x) for x in medians], [name_hash(x) for x in train["FileID"]]
    if ctx.master:
        save_checkpoint(args.output_dir / entry["path"], saved)
        common.link_file(args.output_dir / entry["path"], args.output_dir / BEST)
        if args.export:
            common.save_weights(args.export, export_weights(model))
    score = -entry["score"] if args.monitor == "val_loss" else entry["score"]
    log.info(f"best: step {entry['step']}, {args.monitor} {score:.4f} -> {args.output_dir / BEST}")
    log.close()
    ctx.barrier()
    return 0


# ---- for notebooks and own loops, by the documented names and signatures

console = common._TqdmHandler()  # shows `logger.info`, which Python else drops, and tears no progress bar
console.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
logger.handlers, logger.propagate = [console], False
logger.setLevel(logging.INFO)


def train_model(config) -> ZoneModel:
    """Train with `config` (of `parse_args`, or `cfg`) as the command line does, files included.

    -> the model in evaluation mode: the best epoch's weights, or with restore_best_weights = false the last one's.
    Raises UserError; KeyboardInterrupt if a signal ended the run, which `config.resume = "auto"` continues.
    """
    common.set_deterministic(config.deterministic)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        with common.process_group(config.device, config.timeout_minutes) as ctx:
            check_environment(config, ctx)
            if train(config, ctx):
                raise KeyboardInterrupt("stopped by a signal, saved")
            saved = common.load_checkpoint(config.output_dir / (BEST if config.restore_best_weights else LAST))
            return build_eval_model(saved, args_from_checkpoint(saved), ctx.device)
    finally:
        for number, handler in handlers.items():  # or the next Ctrl-C of the notebook would only be noted
            signal.signal(number, handler)


def on_device(batch, device) -> dict:
    """A batch of `ChestFilms`, or a pair (images, targets), as a dict of tensors on the device."""
    batch = batch if isinstance(batch, dict) else dict(zip(("image", "target"), batch, strict=True))
    return {k: v.to(device) for k, v in batch.items()}


def classes_of(model, logits) -> np.ndarray:
    """Logits (B, 6, C) -> classes (B, 6) as the model's loss reads them; of a model of another make, the highest."""
    args = getattr(getattr(model, "module", model), "args", None)
    return decide(zone_probs(logits.detach().cpu(), args), args)["classes"] if args else class_array(logits)


def train_epoch(model, train_loader, criterion, optimizer, device, epoch) -> dict[str, float]:
    """One pass over a loader of batches ({"image", "target"} or pairs) -> train_loss, train_accuracy (graded zones)."""
    model.to(device).train()
    if isinstance(getattr(train_loader, "dataset", None), ChestFilms):
        train_loader.dataset.epoch = epoch  # another augmentation
    loss_sum, right = AverageMeter(), AverageMeter()
    for batch in tqdm(train_loader, desc=f"epoch {epoch}", leave=False, disable=None):
        batch = on_device(batch, device)
        logits = model(batch["image"], batch.get("zones"))
        loss = criterion(logits, batch["target"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        weight = float(criterion.count(batch)) if hasattr(criterion, "count") else len(logits)
        loss_sum.update(float(loss.detach()), weight)
        graded = batch["target"] != UNKNOWN
        hits = (classes_of(model, logits) == class_array(batch["target"]))[graded.cpu().numpy()]
        right.update(float(hits.mean()) if len(hits) else 0.0, len(hits))
    return {"train_loss": loss_sum.avg, "train_accuracy": right.avg}


@torch.no_grad()
def validate_epoch(model, val_loader, criterion, device, epoch) -> dict[str, float]:
    """-> val_loss over the whole loader (not a mean of batches), val_accuracy, and val_ before the names of
    `compute_f1_metrics`, `compute_precision_recall` and `compute_csi_average_metrics`."""
    model.to(device).eval()
    logits, targets = [], []
    for batch in tqdm(val_loader, desc=f"epoch {epoch}, validation", leave=False, disable=None):
        batch = on_device(batch, device)
        read = batch["bad"] == 0 if "bad" in batch else slice(None)
        logits.append(model(batch["image"], batch.get("zones"))[read])
        targets.append(batch["target"][read])
    logits, targets = torch.cat(logits), torch.cat(targets)
    found, truth = classes_of(model, logits), class_array(targets)
    metrics = compute_f1_metrics(found, truth) | compute_precision_recall(found, truth)
    metrics |= compute_csi_average_metrics(found, truth)
    graded = truth != UNKNOWN
    metrics["accuracy"] = float((found == truth)[graded].mean()) if graded.any() else math.nan
    return {"val_loss": float(criterion(logits, targets))} | {f"val_{k}": v for k, v in metrics.items()}


def create_optimizer(model, config):
    """config: optimizer (adam, adamw, sgd), lr, weight_decay."""
    return build_optimizer(model, config)


def create_scheduler(optimizer, config):
    """ReduceLROnPlateau, StepLR or cosine annealing of torch, by config.scheduler; call `step(val_loss)` once an epoch,
    whichever it is."""
    kinds = torch.optim.lr_scheduler
    if config.scheduler == "plateau":
        return kinds.ReduceLROnPlateau(optimizer, factor=config.plateau_factor, patience=config.plateau_patience)
    kind, values = {
        "step": (kinds.StepLR, (config.step_size, config.plateau_factor)),
        "cosine": (kinds.CosineAnnealingLR, (config.epochs, config.lr * config.min_lr_ratio)),
        "constant": (kinds.ConstantLR, (1.0,)),
    }[config.scheduler]

    def step(self, metric=None):  # torch would take a loss for an epoch number
        kind.step(self)

    return type(kind.__name__, (kind,), {"step": step})(optimizer, *values)


class EarlyStopping:
    """`stop = early_stopping(value, model)` once an epoch; True after `patience` values without a gain.

    min_delta: smallest gain that counts; mode: "min" or "max"; restore_best_weights: when it stops, the model gets a
    true copy of the weights of the best value (at any time: `restore(model)`).
    """

    def __init__(
        self, patience: int = 10, min_delta: float = 0.0, restore_best_weights: bool = True, mode: str = "min"
    ):
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.restore_best_weights, self.best_weights = restore_best_weights, None
        self.best, self.counter, self.early_stop = None, 0, False

    def __call__(self, value: float, model: nn.Module | None = None) -> bool:
        first = self.best is None or math.isnan(self.best)
        gain = math.inf if first else (self.best - value) * (1 if self.mode == "min" else -1)
        if gain > self.min_delta:
            self.best, self.counter = value, 0
            if model is not None and self.restore_best_weights:
                self.best_weights = common.to_cpu_copy(model.state_dict())
        else:
            self.counter += 1
        self.early_stop = self.counter >= self.patience
        if self.early_stop and model is not None:
            self.restore(model)
        return self.early_stop

    def restore(self, model: nn.Module) -> None:
        if self.best_weights is not None:
            model.load_state_dict(self.best_weights)


class MetricsTracker:
    """Metrics over the epochs: `update({...}, {...})` once an epoch, then `history`, `latest(name)`, `best(name)`."""

    def __init__(self):
        self.history = {}

    def update(self, *metrics: dict) -> None:
        for name, value in (item for some in metrics for item in some.items()):
            self.history.setdefault(name, []).append(value)

    def latest(self, name: str):
        return self.history[name][-1]

    def best(self, name: str, mode: str = "min") -> tuple[float, int]:
        """-> (value, epoch from 0)."""
        values = np.array(self.history[name], float)
        epoch = int(np.nanargmin(values) if mode == "min" else np.nanargmax(values))
        return float(values[epoch]), epoch

    def save(self, path) -> None:
        common.write_atomic(Path(path), json.dumps(common.json_safe(self.history), indent=1) + "\n")


class AverageMeter:
    """Weighted running mean: `update(value, n)`; val, sum, count, avg."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.val = self.sum = self.count = self.avg = 0.0

    def update(self, val: float, n: float = 1) -> None:
        self.val, self.sum, self.count = val, self.sum + val * n, self.count + n
        self.avg = self.sum / self.count if self.count else 0.0


# ==== Main =====================================================================================================


def check_environment(args, ctx) -> None:
    """Say what this runs on, and refuse before anything starts what would fail later."""
    if args.tensorboard and args.mode != "check" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed (pip install tensorboard, or --no-tensorboard)")
    common.need_writable([args.output_dir / "x", args.export])
    if args.scheduler == "plateau" and args.plateau_patience >= args.early_stopping_patience and ctx.master:
        print(f"warning: the rate falls after {args.plateau_patience + 1} evaluations without gain, but the run ends "
              f"after {args.early_stopping_patience} (--plateau-patience)", file=sys.stderr)  # fmt: skip
    if args.zone_focus == "pool" and args.model != "RadDINO" and args.image_size < 96 and ctx.master:
        rows = -(-args.image_size // 32)
        print(f"warning: the zones share the {rows} rows of the last map (--image-size 96 or more)", file=sys.stderr)
    if ctx.master:
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"environment: {versions}, on {ctx}; GPUs: {', '.join(gpus) or 'none'}")


def check_films(args) -> int:
    """--mode check: read every film of the CSV; check/films.csv lists them, check/films.png shows some with their
    scores. Problems: films that cannot be read (exit code 3), that are there twice, whose csi is not the mean of their
    scores; a split that parts the films of a patient."""
    args.split, args.on_bad_sample, args.augment = "all", "skip", False
    table, folder, rows, tiles, problems, seen = read_scores(args.csv, args), args.output_dir / "check", [], [], [], {}
    dataset, path = ChestFilms(args, "all", False), split_path(table, args)
    common.make_folder(folder)
    if path is None or path.exists():
        try:
            parts = split_films(table, args)["split"].value_counts()
            print("split: " + ", ".join(f"{name or 'none'}: {n}" for name, n in parts.items()))
        except UserError as e:
            problems.append(str(e))
    with ThreadPoolExecutor(max(1, args.num_workers)) as pool:
        found = pool.map(lambda i: film_numbers(dataset, i), range(len(dataset)))
        for i, (row, level, zones) in enumerate(tqdm(found, desc="films", total=len(dataset), disable=None)):
            rows.append(row)
            if level is None:
                problems.append(row["error"])
                continue
            name, scores = dataset.ids[i], dataset.targets[i]
            if len(tiles) < 24 and i % max(1, len(dataset) // 24) == 0:
                tiles.append(film_tile((level >> 8).astype(np.uint8), zones, name, scores))
            twin, mean = seen.setdefault(hashlib.sha256(level).digest(), name), true_csi(scores[None])[0]
            if twin != name:
                problems.append(f"{name}: the same film as {twin}")
            if abs(dataset.csi[i] - mean) > 0.05:
                problems.append(f"{name}: csi is {dataset.csi[i]:g}, the mean of its zones {mean:.2f}")
    common.write_csv(folder / "films.csv", pd.DataFrame(rows))
    if tiles:
        width, height = tiles[0].width + 4, tiles[0].height + 4
        sheet = Image.new("RGB", (min(6, len(tiles)) * width, -(-len(tiles) // 6) * height))
        for n, tile in enumerate(tiles):
            sheet.paste(tile, (n % 6 * width, n // 6 * height))
        common.write_atomic(folder / "films.png", lambda file: sheet.save(file, "PNG"))
    print(f"{len(dataset)} films; {dataset.notes()}")
    for zone, column in zip(ZONES, dataset.targets.T, strict=True):
        counts = np.bincount(column, minlength=5)
        print(f"  {zone:10s} " + "  ".join(f"{c}: {n}" for c, n in zip(CLASSES, counts, strict=True)))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    failed = sum("error" in row for row in rows)
    print(f"{failed} films could not be read, {len(problems) - failed} other problems -> {folder}")
    return 3 if failed else 0


def film_numbers(dataset: ChestFilms, index: int) -> tuple[dict, np.ndarray | None, np.ndarray | None]:
    """-> row of films.csv; film and zones of `ChestFilms.read`, None if it cannot be read."""
    row = {"FileID": dataset.ids[index], "patient": dataset.groups[index], "file": str(dataset.paths[index])}
    try:
        film = read_film(dataset.paths[index])
        level, zones = dataset.read(index, film)
    except UserError as e:
        return row | {"error": str(e)}, None, None
    row |= {"height": film.shape[0], "width": film.shape[1], "lowest": film.min(), "highest": film.max()}
    row |= {"levels": len(np.unique(film)), "mean": level.mean() / 65535, "std": level.std() / 65535}
    return row, level, zones


def film_tile(film: np.ndarray, zones, name: str, target) -> Image.Image:
    """(H, W) uint8 -> picture of a film with the borders of its zones and a score in each; above it the sides of the
    patient, as they are for the model, and the name."""
    side, head = 240, 18
    middles = [[int(v.mean() * side / len(zones)) for v in np.nonzero(zones == i + 1)] for i in range(len(ZONES))]
    zones = np.asarray(Image.fromarray(zones).resize((side, side), Image.Resampling.NEAREST))
    picture = np.array(Image.fromarray(film).resize((side, side)).convert("RGB"))
    border = (zones != np.roll(zones, 1, 0)) | (zones != np.roll(zones, 1, 1))
    border[0], border[:, 0] = False, False
    picture[border] = (130, 130, 0)
    tile = Image.new("RGB", (side, side + head))
    tile.paste(Image.fromarray(picture), (0, head))
    draw = ImageDraw.Draw(tile)
    for (y, x), score in zip(middles, target, strict=True):
        draw.text((x, y + head), "?" if score == UNKNOWN else str(score), fill=(255, 200, 0), font_size=22, anchor="mm",
                  stroke_width=2, stroke_fill=(0, 0, 0))  # fmt: skip
    for x, text in ((8, "R"), (side // 2, name[:30]), (side - 8, "L")):
        draw.text((x, head // 2), text, fill=(0, 220, 255), font_size=12, anchor="mm")
    return tile


def main(argv=None) -> int:
    args = parse_args(argv)
    common.set_deterministic(args.deterministic)
    if args.mode == "check":
        return check_films(args)
    if args.mode == "train" and "WANDB_SWEEP_PARAM_PATH" not in os.environ:  # else a sweep agent started it
        with common.process_group(args.device, args.timeout_minutes) as ctx:
            check_environment(args, ctx)
            return train(args, ctx)
    import search  # only here: training needs nothing but common.py

    return search.main(args, argv, sys.modules[__name__])


if __name__ == "__main__":
    sys.exit(common.run_main(main))
