"""VLM3D Task 2: the findings of a chest CT from its slices by a 2-D CNN; train, evaluate, predict, challenge file.

Model    ResNet-50 / 101, EfficientNet-B0 or DenseNet-121 over slices (torchvision's key names); SE or CBAM attention
         on the feature map, fusion of three stages; a volume is the mean, max, top-k or noisy-or of its slices, or
         their gated attention, learned for each label (--aggregate mil)
Papers   SE arXiv 1709.01507, CBAM arXiv 1807.06521, gated attention MIL arXiv 1802.04712, CutMix arXiv 1905.04899,
         MixUp arXiv 1710.09412, CT-RATE arXiv 2403.17834
Data     --slice-dir, by prepare_ct.py slices: splits/{train,valid}_slices.csv (slice_id, volume_name, file_path,
         labels), slices as .npy files or in packed/*.npy; labels first from multi_abnormality_labels.csv, if there
Weights  --pretrained imagenet (downloaded once), a torchvision .pth file, one of our checkpoints, or 'none'
CPU      python demo_data.py ct --out demo --n 60
         python prepare_ct.py slices --data-dir demo/dataset --output-dir demo/slices --image-size 64
         python run_task2.py --slice-dir demo/slices --model efficientnet_b0 --pretrained none --epochs 2
1 GPU    python run_task2.py --mode both --freeze-backbone --epochs 50 --amp
N GPUs   torchrun --nproc_per_node N run_task2.py ... (--batch-size is per process)
Resume   the same command with --resume: bit for bit an uninterrupted run (same device and thread count)
Writes   below --output-dir (here): checkpoints/ (best.ckpt, last.ckpt, the top k by name), results/ and
         logs/multi_abnormality_classification/version_N/ (TensorBoard events, hparams.yaml, training.log,
         results.jsonl); predict: --predict-output, a .csv beside it, and --challenge-output
"""

import argparse
import collections
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import Progress, RunLog, StopSignal, TopK, UserError, save_checkpoint, seed_everything

TASK, MONITOR = "task2", "val_loss"
SHOWN = ("macro_f1", "micro_f1", "macro_auroc", "macro_auprc", "slice_macro_auroc")  # of an epoch, on the console
TENSORBOARD = "logs/multi_abnormality_classification/version_{version}"
LOG, RESULTS, LAST = f"{TENSORBOARD}/training.log", f"{TENSORBOARD}/results.jsonl", "checkpoints/last.ckpt"
TOP = "checkpoints/multi_abnormality-epoch={epoch:02d}-val_loss={val_loss:.3f}.ckpt"
BEST = "checkpoints/best.ckpt"
WANDB_PROJECT = "vlm3d-task2"
# A checkpoint can only be continued or evaluated with these as they were.
FIXED_ARGS = ["version", "model", "label_columns", "use_attention", "use_multiscale", "aggregate", "window_values"]
FIXED_ARGS += ["extraction", "slice_store", "slice_size", "image_size", "optimizer", "weight_decay", "use_ema"]

# The order of the original tool's outputs; the challenge's own is common.CT_RATE_LABELS.
LABELS = [
    "Cardiomegaly", "Hiatal hernia", "Atelectasis", "Pulmonary fibrotic sequela", "Peribronchial thickening",
    "Interlobular septal thickening", "Medical material", "Pericardial effusion", "Lymphadenopathy", "Lung nodule",
    "Pleural effusion", "Consolidation", "Lung opacity", "Mosaic attenuation pattern", "Bronchiectasis", "Emphysema",
    "Arterial wall calcification", "Coronary artery wall calcification",
]  # fmt: skip
RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}  # blocks of the four stages
AGGREGATES = ("mean", "max", "topk", "noisy-or")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = {  # the files of torchvision's IMAGENET1K_V1; the hash in a name is checked on download
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "efficientnet_b0": "efficientnet_b0_rwightman-7f5810bc.pth",
    "densenet121": "densenet121-a639ec97.pth",
}


# ==== Arguments ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", help="YAML or INI files of defaults; the command line wins")
    parser.add_argument("--mode", choices=["train", "evaluate", "both", "predict"], default="both", help="what to do")
    onoff = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, default=Path("./ct_rate_data"), help="CT-RATE folder, for its label CSV")
    add("--slice-dir", type=Path, default=Path("./ct_rate_2d"), help="folder of prepare_ct.py slices")
    add("--label-columns", nargs="+", default=LABELS, metavar="NAME", help="columns to predict")
    add("--image-size", type=int, help="side of an image in pixels")
    add("--windows", nargs="+", metavar="W", help=f"{', '.join(common.WINDOWS)} or centre,width in HU, one a channel")
    add("--augment", action=onoff, default=True, help="augment training images")
    add("--rotation", type=float, default=10.0, help="largest turn in degrees")
    add("--flip-prob", type=float, default=0.5, help="share of images mirrored left to right")
    add("--shift", type=float, default=0.05, help="largest shift as a share of the side")
    add("--zoom", type=float, default=0.05, help="largest change of scale")
    add("--jitter", type=float, default=0.1, help="largest change of brightness and of contrast")
    add("--interpolation", choices=["bilinear", "nearest"], default="bilinear", help="of turned slices")
    add("--augment-on", choices=["auto", "workers", "device"], default="auto", help="where slices are augmented "
        "(the faster: on CUDA the device, else the data workers)")  # fmt: skip
    add("--use-advanced-aug", action="store_true", help="CutMix, or else MixUp, of every training slice")
    add("--cutmix-prob", type=float, default=0.5, help="share of CutMix in --use-advanced-aug")
    add("--mixup-alpha", type=float, default=0.2, help="Beta parameter of MixUp")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="what an unreadable sample does")
    add("--max-bad-fraction", type=float, default=0.05, help="share of unreadable samples that ends a run")

    add = parser.add_argument_group("model").add_argument
    add("--model", "--model-name", choices=list(IMAGENET), default="resnet50", help="backbone")
    add("--pretrained", default="imagenet", help="weights to begin with (kinds: see the script's head), or 'none'")
    add("--allow-partial", action="store_true", help="accept weights that lack part of the backbone")
    add("--use-attention", choices=["none", "se", "cbam"], default="none", help="attention on the last feature map")
    add("--use-multiscale", action="store_true", help="fuse the pooled maps of the last three stages")
    add("--aggregate", choices=[*AGGREGATES, "mil"], help="what makes a volume of its slices (mean)")
    add("--top-slices", type=int, help="slices averaged by --aggregate topk (3)")
    add("--bag-size", type=int, default=12, help="slices of a volume in training with --aggregate mil")
    add("--dropout-rate", type=float, default=0.3, help="dropout in the classification head")
    add("--stochastic-depth", type=float, default=0.2, help="stochastic depth of the last EfficientNet block")
    add("--freeze-backbone", action="store_true", help="train the head alone")
    add("--progressive-unfreeze", action="store_true", help="begin frozen, then free a stage an epoch, last first")
    add("--unfreeze-epoch", type=int, default=10, help="epochs that stay frozen with --progressive-unfreeze")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", "--loss-type", choices=["focal", "bce", "asl"], default="focal", help="loss")
    add("--focal-gamma", type=float, default=4.0, help="focusing exponent of the focal loss")
    add("--focal-alpha", type=float, default=0.85, help="factor of the focal loss (see --focal-form)")
    add(
        "--focal-form", choices=["constant", "balanced"], default="constant",
        help="alpha multiplies every term, or positives by alpha and negatives by 1 - alpha",
    )  # fmt: skip
    add("--class-weights", choices=["auto", "none", "positives", "both"], default="auto", help="negatives / positives "
        "of a label weigh its positives, or both signs as in the original (auto: positives, of bce)")  # fmt: skip
    add("--max-pos-weight", type=float, default=20.0, help="bound of the weights that balance labels")
    add("--asl-gamma-neg", type=float, default=6.0, help="ASL exponent for negatives")
    add("--asl-gamma-pos", type=float, default=1.0, help="ASL exponent for positives")
    add("--asl-clip", type=float, default=0.05, help="ASL probability shift of negatives")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", "--max-epochs", type=int, default=100, help="passes over the training data")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs (0: by epochs)")
    add("--batch-size", type=int, default=32, help="samples per process and micro-step")
    add("--accum-steps", "--gradient-accumulation-steps", type=int, default=1, help="micro-steps per step")
    add("--lr", "--learning-rate", type=float, default=1e-4, help="peak learning rate")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="optimizer (sgd: momentum 0.9)")
    add("--weight-decay", type=float, default=1e-5, help="decay of matrices (not norms, biases, positions)")
    add("--scheduler", choices=["plateau", "cosine", "constant"], default="plateau", help="learning rate after warm-up")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="end of the cosine as a share of --lr")
    add("--plateau-patience", type=int, default=5, help="evaluations without gain before the rate falls")
    add("--plateau-factor", type=float, default=0.5, help="what the rate is multiplied by on a plateau")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add("--max-bad-steps", type=int, default=20, help="non-finite steps in a row that end the run")
    add("--use-ema", action="store_true", help="judge and keep a moving average of the weights")
    add("--ema-decay", type=float, default=0.999, help="decay of the average, reached after a warm-up")
    add("--early-stopping-patience", type=int, default=10, help="evaluations without gain before the end")

    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--amp", "--use-mixed-precision", nargs="?", const="auto", choices=["none", "auto", "fp16", "bf16"],
        default="none", help="autocast type; bare --amp takes the best of the device",
    )  # fmt: skip
    add("--compile", action=onoff, help="torch.compile the model (on CUDA)")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--deterministic", action="store_true", help="bit-exact CUDA kernels, at a cost in speed")

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--monitor",
        choices=["macro_f1", "macro_auroc", "macro_auprc", "val_loss"],
        default=MONITOR,
        help="what best means",
    )
    add("--threshold", type=float, help="probability that counts as present (the checkpoint's, or 0.5)")
    add("--eval-batch-size", type=int, default=0, help="samples per evaluation batch (--batch-size)")
    add("--eval-every", type=int, default=0, help="steps between evaluations (0: an epoch)")
    add("--split", default="valid", help="split that is scored")
    add("--predict-input", nargs="+", type=Path, metavar="FILE", help="slices (.npy) or volumes for --mode predict")
    add("--predict-type", choices=["slices", "volumes"], default="slices", help="what --predict-input holds")
    add("--predict-output", type=Path, help="JSON of the predictions (predictions_TYPE.json in --output-dir)")
    add("--slice-strategy", choices=["multi_slice", "best_slice", "anatomical"], help="slices taken from a volume "
        "(as in training)")  # fmt: skip
    add("--slices-per-volume", type=int, help="slices taken by multi_slice (as in training)")
    add("--metadata", type=Path, help="CSV with VolumeName, RescaleSlope, RescaleIntercept")
    add("--challenge-input", type=Path, metavar="DIR", help="folder of volumes for the challenge file")
    add("--challenge-output", type=Path, default=Path("results.json"), help="challenge file to write")
    add("--fold-thresholds", choices=["none", "f1", "crg"], default="none", help="move each label's validation "
        "threshold to the 0.5 of the challenge's scorer")  # fmt: skip

    add = parser.add_argument_group("checkpoint").add_argument
    add("--checkpoint", type=Path, help="checkpoint to evaluate or predict with (the run's best)")
    add("--output-dir", type=Path, default=Path("."), help="folder of the run")
    add("--resume", nargs="?", const="auto", help="checkpoint to continue; bare or 'auto': the run's last, if any")
    add("--overwrite", "--force-restart", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=int, default=500, help="steps between saves of the last checkpoint, besides evaluations")
    add("--top-k", type=int, default=3, help="best models kept")
    add("--export", type=Path, help="file for the best weights, original key names")

    add = parser.add_argument_group("system").add_argument
    add("--device", "--gpu-device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    add("--num-workers", type=int, default=4, help="data processes per rank")
    add("--seed", type=int, default=42, help="seed of weights, order, augmentation and dropout")
    add("--check-ranks", action="store_true", help="compare gradients over the ranks in every step (slow)")
    add("--timeout-minutes", type=float, default=30, help="how long ranks and data workers may keep silent")

    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=int, default=50, help="steps between log lines")
    add("--tensorboard", action=onoff, default=True, help="write TensorBoard events")
    add("--wandb-project", help="Weights & Biases project to log to (asked for without a name: the script's own)")
    add("--wandb-mode", choices=["online", "offline", "disabled"], help="where wandb logs, if asked")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = common.parse_with_config(build_parser(), argv)
    # what the data, or the checkpoint, decides
    args.version = args.window_values = args.slice_store = args.slice_size = args.extraction = None
    args.attention_place = "map"  # "pooled" in the original tool's checkpoints
    common.check_positive(args)
    if bool(args.predict_input) + bool(args.challenge_input) != (args.mode == "predict"):
        raise UserError("--mode predict, and it alone, takes either --predict-input FILE ... or --challenge-input DIR")
    if args.predict_output and args.predict_output.suffix == ".csv":
        raise UserError("--predict-output names the JSON file (the CSV is written beside it)")
    if args.mode in ("train", "both"):
        args.aggregate, args.top_slices = args.aggregate or "mean", args.top_slices or 3
    if args.use_advanced_aug and args.aggregate == "mil":
        raise UserError("--use-advanced-aug mixes slices, --aggregate mil trains on volumes (leave one of them away)")
    if args.export and (args.use_attention != "none" or args.use_multiscale or args.aggregate == "mil"):
        raise UserError("--export: the original tool has no such model (only with --use-attention none, no "
                        "--use-multiscale, no --aggregate mil)")  # fmt: skip
    limits = dict.fromkeys(("top_slices", "bag_size", "slices_per_volume", "image_size"), (1, math.inf))
    limits |= dict.fromkeys(("flip_prob", "cutmix_prob", "stochastic_depth", "jitter", "shift"), (0, 1))
    limits |= {"zoom": (0, 0.9), "mixup_alpha": (1e-3, math.inf), "rotation": (0, 180), "unfreeze_epoch": (0, math.inf)}
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            bound = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise UserError(f"--{name.replace('_', '-')} must be {bound}")
    return args


def args_from_checkpoint(saved: dict, **overrides) -> argparse.Namespace:
    """The arguments a checkpoint was trained with, except for `overrides` that are not None."""
    args = common.saved_args(build_parser(), saved)
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    if "mil" in (args.aggregate, saved["args"]["aggregate"]) and args.aggregate != saved["args"]["aggregate"]:
        raise UserError(f"--aggregate {args.aggregate}: the checkpoint was trained with {saved['args']['aggregate']}")
    for name in ("data_dir", "slice_dir", "output_dir"):
        setattr(args, name, Path(getattr(args, name)))
    return args


# ==== Data =====================================================================================================


class CTSlices(Dataset):
    """Slices of one split. An item is keyed by (epoch, index): augmentation is a function of the key alone.

    Item: image (V, C, h, w), uint8 grey levels or int16 HU (then C = 1, windowed by the model); V = 1, or 2 with the
    slice that CutMix or MixUp adds; target (K,) float32, NaN = unknown; index; bad = 1 if the slice could not be read
    (--on-bad-sample skip). When training, theta (V, 2, 3) and gain (V, 2), the augmentation that the model applies on
    its device (unless the workers did it), and mix (5,): share of the second slice outside a box, and the box.

    `volumes`, `groups`, `volume_targets` (n_volumes, K) and `volume_of` (n_slices,) tell what the slices belong to.
    """

    def __init__(self, args, split: str, train: bool):
        self.args, self.train, self.class_names = args, train, list(args.label_columns)
        path = data_file(args, split)
        if not path.exists():
            raise UserError(f"{path}: no such file (python prepare_ct.py slices --data-dir {args.data_dir} "
                            f"--output-dir {args.slice_dir} makes it)")  # fmt: skip
        table = common.read_table(path)
        common.need_columns(table, ["slice_id", "volume_name", "file_path"], path)
        self.ids = table["slice_id"].tolist()
        twice = table["slice_id"].duplicated()
        if twice.any():
            raise UserError(f"{path}: row {twice.idxmax() + 2}: slice_id {table['slice_id'][twice.idxmax()]} twice")
        self.volume_of, names = table["volume_name"].factorize()
        self.volumes = [common.volume_name(name) for name in names]
        first = np.unique(self.volume_of, return_index=True)[1]
        self.groups = common.patients_of(table.iloc[first], "volume_name")
        self.volume_targets = volume_labels(args, table, self.volume_of, self.volumes, path)  # (n_volumes, K)
        self.targets = self.volume_targets[self.volume_of]  # (n_slices, K)
        order, ends = np.argsort(self.volume_of, kind="stable"), np.cumsum(np.bincount(self.volume_of))
        self.slices_of = np.split(order, ends[:-1])  # indices of each volume's slices
        self.pack, self.rows = None, None
        self.files = self.paths = table["file_path"].tolist()  # below --slice-dir
        self.find_pixels(table, path, split)
        settle_pixels(args, self.first_image())

    def find_pixels(self, table, path: Path, split: str):
        """The packed array of the split if there is one, else one file a slice; all are looked for now."""
        pack = self.args.slice_dir / "packed" / f"{split}.npy"
        if "packed_row" in table.columns and pack.exists():
            common.need_file(pack)
            try:
                self.pack = np.load(pack, mmap_mode="r", allow_pickle=False)
                self.rows = table["packed_row"].astype(int).to_numpy()
            except (ValueError, EOFError, OSError, OverflowError, SyntaxError, tokenize.TokenError) as e:
                raise UserError(f"{pack}: damaged, or not that of {path} (run prepare_ct.py slices again)") from e
            good = isinstance(self.pack, np.ndarray) and self.pack.dtype in (np.uint8, np.int16)
            good = good and self.pack.ndim == 3 and min(self.pack.shape) > 0
            if not good or not 0 <= self.rows.min() <= self.rows.max() < len(self.pack):
                raise UserError(f"{pack}: not the slices of {path} (run prepare_ct.py slices again)")
            return
        root = self.args.slice_dir
        folders = {f.rpartition("/")[0] for f in self.files}
        outside = [f for f in folders if not Path(os.path.realpath(root / f)).is_relative_to(root.resolve())]
        if outside:
            raise UserError(f"{path}: file_path leads out of {root}: {outside[0]}")
        there = {f"{f}/{name}" if f else name for f in folders if (root / f).is_dir() for name in os.listdir(root / f)}
        missing = [root / f for f in self.files if f not in there]
        if missing and (self.args.on_bad_sample == "fail" or len(missing) == len(self.files)):
            raise UserError(f"{missing[0]}: no such slice ({len(missing)} of {len(self.files)} of {path} are missing)")

    def __len__(self):
        return len(self.ids)

    def notes(self) -> str:
        where = "packed" if self.pack is not None else "one file each"
        return f"{self.ids[0]}, {len(self.volumes)} volumes, {where}, {self.args.slice_store} {self.args.slice_size}"

    def first_image(self) -> np.ndarray:
        """The first slice, or with --on-bad-sample skip the first that can be read."""
        for index in range(len(self.files)):
            try:
                return self.read(index)
            except UserError:
                if self.args.on_bad_sample == "fail" or index == len(self.files) - 1:
                    raise

    def read(self, index: int) -> np.ndarray:
        """(H, W) uint8 or int16."""
        if self.pack is not None:
            return np.array(self.pack[self.rows[index]])
        return common.read_slice(self.args.slice_dir / self.files[index])

    def load(self, volume: int) -> None:
        """Read all slices of a volume; raises UserError if one cannot be read."""
        for index in self.slices_of[volume]:
            self.image(index)

    def image(self, index: int) -> np.ndarray:
        """(1, h, w) uint8 or int16, of --image-size."""
        image, a = self.read(index), self.args
        if (image.dtype == np.int16) != (a.slice_store == "hu"):
            raise UserError(f"{self.files[index]}: {image.dtype}, but other slices hold {a.slice_store}")
        return common.resize_slices(image[None], a.image_size)

    def readable(self, index: int) -> tuple[np.ndarray | None, int, int]:
        """-> image, index of the slice, how many before it could not be read; when training the next that can be."""
        for bad in range(len(self.files)):
            try:
                return self.image(index), index, bad
            except UserError:
                if self.args.on_bad_sample == "fail" or (self.train and bad + 1 == len(self.files)):
                    raise
                if not self.train:
                    break
                index = (index + 1) % len(self.files)
        return None, index, 1

    def augmented(self, images, theta, gain) -> dict:
        """image (V, C, h, w), augmented here, or with what the device needs to do it."""
        image, item = torch.from_numpy(np.stack(images)), {}
        if theta is not None and self.args.augment_on == "workers":
            image = to_levels(image, self.args)
            if self.args.interpolation == "nearest":
                image = warp_nearest(image, theta, gain)
            else:
                image = warp(image.float(), theta, gain, "bilinear").round_().to(torch.uint8)
        elif theta is not None:
            item = {"theta": theta, "gain": gain}
        return {"image": image, **item}

    def __getitem__(self, key: tuple[int, int]):
        (epoch, index), a = key, self.args
        rng = np.random.default_rng((a.seed, epoch, index)) if self.train else None
        mixing = self.train and a.use_advanced_aug
        theta, gain = draw_augmentation(rng, a, 2 if mixing else 1) if self.train and a.augment else (None, None)
        image, source, bad = self.readable(index)
        if image is None:  # in evaluation it stays in its place, marked, and is left out of its volume
            image = np.zeros((1, a.image_size, a.image_size), np.int16 if a.slice_store == "hu" else np.uint8)
        images, target = [image], self.targets[source]
        item = {"index": torch.tensor(index), "bad": torch.tensor(bad)}
        if mixing:
            partner, item["mix"], share = draw_mix(rng, a, len(self))
            other, partner, _ = self.readable(partner)
            images, target = [image, other], (1 - share) * target + share * self.targets[partner]
        return item | self.augmented(images, theta, gain) | {"target": torch.from_numpy(np.float32(target))}


class CTBags(CTSlices):
    """Training volumes for --aggregate mil: as CTSlices, but an item holds V = --bag-size slices of one volume.

    Slices are spread over the volume, at other places in every epoch; a volume with fewer is filled up with its last,
    and mask (V,) is 0 there. All slices of a bag are augmented alike.
    """

    def __init__(self, args, split: str, train: bool):
        super().__init__(args, split, train)
        self.ids, self.targets = self.volumes, self.volume_targets
        self.paths = [self.files[slices[0]] for slices in self.slices_of]

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, key: tuple[int, int]):
        (epoch, index), a = key, self.args
        rng = np.random.default_rng((a.seed, epoch, index))
        n, places = a.bag_size, rng.random(a.bag_size)
        theta, gain = draw_augmentation(rng, a, 1) if a.augment else (None, None)
        if theta is not None:
            theta, gain = theta.expand(n, -1, -1).contiguous(), gain.expand(n, -1).contiguous()
        bad, source = 0, index
        while True:
            slices = self.slices_of[source]
            if len(slices) > n:
                slices = slices[np.floor((np.arange(n) + places) * len(slices) / n).astype(int)]
            try:
                images = [self.image(i) for i in slices]
                break
            except UserError:
                bad += 1
                if a.on_bad_sample == "fail" or bad > len(self):
                    raise
                source = (source + 1) % len(self)  # the next volume, slices and labels together
        item = self.augmented([*images, *[images[-1]] * (n - len(images))], theta, gain)
        item |= {"mask": torch.arange(n) < len(slices), "target": torch.from_numpy(self.targets[source])}
        return item | {"index": torch.tensor(index), "bad": torch.tensor(bad)}


def data_file(args, split: str | None = None) -> Path:
    """The table of the slices that are scored, or of another split."""
    return args.slice_dir / "splits" / f"{split or args.split}_slices.csv"


def volume_labels(args, table, volume_of, volumes, path: Path) -> np.ndarray:
    """(n_volumes, K) float32 from multi_abnormality_labels.csv in either folder, else from the table of slices."""
    files = [folder / "multi_abnormality_labels.csv" for folder in (args.slice_dir, args.data_dir)]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        if not set(args.label_columns) & set(table.columns):
            raise UserError(f"{files[0]}: no such file, nor is {files[1]}, and {path} has no labels either")
        values = common.label_array(table, args.label_columns, path)
        first = np.unique(volume_of, return_index=True)[1]
        same = np.isclose(values, values[first][volume_of], equal_nan=True).all(1)
        if not same.all():
            raise UserError(f"{path}: row {np.argmin(same) + 2}: other labels than the volume's first slice")
        return values[first]
    labels = common.read_table(file)
    common.need_columns(labels, ["VolumeName", *args.label_columns], file)
    names = labels["VolumeName"].map(common.volume_name)
    if names.duplicated().any():
        raise UserError(f"{file}: {names[names.duplicated()].iloc[0]} has two rows (delete one)")
    row_of = dict(zip(names, range(len(names)), strict=True))
    absent = [v for v in volumes if v not in row_of]
    if absent:
        raise UserError(f"{file}: no row for {len(absent)} of {len(volumes)} volumes, first {', '.join(absent[:3])}")
    return common.label_array(labels, args.label_columns, file)[[row_of[v] for v in volumes]]


def settle_pixels(args, image: np.ndarray) -> None:
    """What the stored slices are: size, levels or HU, windows, how they were extracted; errors where these clash."""
    store, settings = "hu" if image.dtype == np.int16 else "uint8", {}
    notes = args.slice_dir / "slice_extraction_stats.json"
    stored = list(common.WINDOWS["chest"])
    if notes.exists():
        common.need_file(notes)
        try:
            settings = dict(json.loads(notes.read_text(encoding="utf-8")).get("settings", {}))
            stored = [float(x) for x in settings.get("window", stored)]
            common.parse_windows([f"{stored[0]},{stored[1]}"])
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError, UserError) as e:
            raise UserError(f"{notes}: not the notes of prepare_ct.py slices (run it again)") from e
    windows = common.parse_windows(args.windows) if args.windows else None
    if store == "uint8":
        if windows and windows != [tuple(map(float, stored))]:
            raise UserError(f"--windows {' '.join(args.windows)}: the slices hold the window {stored} alone "
                            "(prepare_ct.py slices --store hu keeps all)")  # fmt: skip
        windows = [tuple(map(float, stored))]
    windows = [list(w) for w in windows or common.parse_windows(["chest"])]
    if len(windows) not in (1, 3):
        raise UserError(f"--windows: {len(windows)} given, one or three are taken")
    for name, value in (("window_values", windows), ("slice_store", store), ("slice_size", max(image.shape))):
        if getattr(args, name) not in (None, value):
            raise UserError(f"{args.slice_dir}: {name} is {value}, but {getattr(args, name)} in training")
        setattr(args, name, value)
    args.extraction = args.extraction or {k: settings[k] for k in ("strategy", "slices_per_volume") if k in settings}
    args.image_size = args.image_size or args.slice_size


def to_levels(image: torch.Tensor, args) -> torch.Tensor:
    """(..., 1, h, w) uint8 levels, or int16 HU -> (..., C, h, w) uint8, a channel for each window."""
    if image.dtype == torch.uint8:
        return image
    centre, width = torch.tensor(args.window_values).view(-1, 2, 1, 1).unbind(1)
    return common.window_levels(image, centre - width / 2, width).to(torch.uint8)


def draw_augmentation(rng, args, n: int):
    """theta (n, 2, 3): turn, zoom, shift, mirror, from output to input; gain (n, 2): contrast, brightness."""
    theta, gain = [], []
    for u in (2 * rng.random((n, 7)) - 1).tolist():  # plain numbers: arrays of one cost five times as much
        angle, zoom = math.radians(u[0] * args.rotation), 1 + u[1] * args.zoom
        mirror = -1 if (u[2] + 1) / 2 < args.flip_prob else 1
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        theta.append([[cos * mirror, -sin, 2 * u[3] * args.shift], [sin * mirror, cos, 2 * u[4] * args.shift]])
        gain.append([1 + u[5] * args.jitter, 1 + u[6] * args.jitter])
    return torch.tensor(theta), torch.tensor(gain)


def draw_mix(rng, args, n: int):
    """Partner of a slice; mix (5,): its share outside the box y0, y1, x0, x1 (inside: 1); its share of the pixels."""
    partner, size = int(rng.integers(n)), args.image_size
    if rng.random() >= args.cutmix_prob:
        share = float(rng.beta(args.mixup_alpha, args.mixup_alpha))
        return partner, torch.tensor([share, 0, 0, 0, 0], dtype=torch.float32), share
    side = size * math.sqrt(rng.random())  # the box's area is uniform in [0, 1] until it is cut at the border
    middle = rng.random(2) * size
    (y0, x0), (y1, x1) = (np.rint((middle + d * side / 2).clip(0, size)) for d in (-1, 1))
    share = (y1 - y0) * (x1 - x0) / size**2
    return partner, torch.tensor([0, y0, y1, x0, x1], dtype=torch.float32), float(share)


def sampling_grid(theta: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(N, 2, 3) -> (N, h, w, 2), F.affine_grid(align_corners=False) without its matrix product, which is slow on CPUs
    and, under autocast, off by a pixel."""
    y, x = ((2 * torch.arange(n, device=theta.device) + 1) / n - 1 for n in (h, w))
    along_x, along_y, shift = theta[..., None].unbind(2)  # (N, 2, 1) each
    rows, columns, grid = along_y * y + shift, along_x * x, theta.new_empty(len(theta), h, w, 2)
    for i in (0, 1):  # in place: stacking costs more than all the rest
        grid[..., i] = rows[:, i, :, None] + columns[:, i, None]
    return grid


def warp(levels: torch.Tensor, theta, gain, interpolation: str) -> torch.Tensor:
    """(N, C, h, w) float32 0 to 255 -> the same, turned by theta (N, 2, 3); gain (N, 2): contrast about the mean,
    brightness. Outside is air, level 0."""
    x = F.grid_sample(levels, sampling_grid(theta, *levels.shape[-2:]), interpolation, align_corners=False)
    contrast, brightness = gain[:, :, None, None, None].unbind(1)  # (N, 1, 1, 1)
    offset = x.mean((1, 2, 3), keepdim=True) * (1 - contrast) * brightness
    return torch.addcmul(offset, x, contrast * brightness).clamp_(0, 255)


def warp_nearest(levels: torch.Tensor, theta, gain) -> torch.Tensor:
    """`warp` of uint8 levels with nearest neighbours, by Pillow and a table of 256: on a CPU a third of its time."""
    out, (h, w) = np.empty(levels.shape, np.uint8), levels.shape[-2:]
    draws = zip(levels.numpy(), theta.tolist(), gain.tolist(), strict=True)
    for i, (image, ((a, b, c), (d, e, f)), (contrast, brightness)) in enumerate(draws):
        matrix = a, b * w / h, (1 + c - a - b) * w / 2, d * h / w, e, (1 + f - d - e) * h / 2  # of pixels
        turned = [np.asarray(Image.fromarray(x).transform((w, h), Image.Transform.AFFINE, matrix)) for x in image]
        mean = sum(int(x.sum(dtype=np.uint32)) for x in turned) / image.size
        table = ((np.arange(256) - mean) * (contrast * brightness) + mean * brightness).clip(0, 255).round()
        for channel, x in enumerate(turned):
            np.take(table.astype(np.uint8), x, out=out[i, channel], mode="clip")
    return torch.from_numpy(out)


def build_datasets(args):
    train_set = (CTBags if args.aggregate == "mil" else CTSlices)(args, "train", True)
    val_set = CTSlices(args, args.split, False)
    shared = set(train_set.groups) & set(val_set.groups)
    if shared:
        first = sorted(shared)[0]
        raise UserError(f"{args.slice_dir}: patient {first} is in train and in {args.split} ({len(shared)} are)")
    return train_set, val_set


def build_eval_dataset(args) -> CTSlices:
    return CTSlices(args, args.split, False)


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


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *[nn.SiLU(inplace=True)] * act)


class Squeeze(nn.Module):
    """EfficientNet's own squeeze and excitation."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """Inverted bottleneck; dropped as a whole for a sample with probability `drop` (stochastic depth)."""

    def __init__(self, expand: int, kernel: int, stride: int, c_in: int, c_out: int, drop: float):
        super().__init__()
        wide = c_in * expand
        self.block = nn.Sequential(
            *([conv_norm(c_in, wide, 1)] if expand != 1 else []),
            conv_norm(wide, wide, kernel, stride, groups=wide),
            Squeeze(wide, c_in // 4),
            conv_norm(wide, c_out, 1, act=False),
        )
        self.skip, self.drop = stride == 1 and c_in == c_out, drop

    def forward(self, x):
        y = self.block(x)
        if self.skip and self.training and self.drop:
            y = y * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop) / (1 - self.drop)
        return x + y if self.skip else y


class EfficientNet(nn.Module):
    """EfficientNet-B0 (arXiv 1905.11946): image (N, 3, h, w) -> maps of strides 8, 16, 32; names of torchvision."""

    widths, recompute = (40, 112, 1280), False
    layout = (  # expansion, kernel, stride, channels in and out, blocks
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
    )  # fmt: skip

    def __init__(self, stochastic_depth: float = 0.2):
        super().__init__()
        stages, total, done = [conv_norm(3, 32, 3, 2)], sum(row[-1] for row in self.layout), 0
        for expand, kernel, stride, c_in, c_out, n_blocks in self.layout:
            stage = []
            for i in range(n_blocks):
                sizes = (stride, c_in, c_out) if i == 0 else (1, c_out, c_out)
                stage.append(MBConv(expand, kernel, *sizes, stochastic_depth * done / total))
                done += 1
            stages.append(nn.Sequential(*stage))
        self.features = nn.Sequential(*stages, conv_norm(320, 1280, 1))
        self.apply(init_convolution)

    def stages(self) -> list[list[nn.Module]]:
        return [[stage] for stage in self.features]

    def forward(self, image):
        f = self.features
        x = run_blocks([f[0], *f[1], *f[2], *f[3]], image, self.recompute)  # (N, 40, h / 8, w / 8)
        y = run_blocks([*f[4], *f[5]], x, self.recompute)  # (N, 112, h / 16, w / 16)
        return x, y, run_blocks([*f[6], *f[7], f[8]], y, self.recompute)  # (N, 1280, h / 32, w / 32)


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


def build_backbone(args) -> nn.Module:
    if args.model in RESNETS:
        return ResNet(RESNETS[args.model])
    return DenseNet() if args.model == "densenet121" else EfficientNet(args.stochastic_depth)


class SE(nn.Module):
    """Squeeze and excitation of a map (N, C, h, w): channels weighted by an MLP of their means (arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        down, up = nn.Linear(channels, channels // 16, bias=False), nn.Linear(channels // 16, channels, bias=False)
        self.excitation = nn.Sequential(down, nn.ReLU(), up)

    def forward(self, x):
        return x * self.excitation(x.mean((2, 3))).sigmoid()[:, :, None, None]


class CBAM(nn.Module):
    """Channel, then spatial attention of a map (N, C, h, w) (arXiv 1807.06521).

    The paper puts mean and maximum through the MLP and adds the results; `summed`, the original tool's, adds first.
    """

    def __init__(self, channels: int, summed: bool = False):
        super().__init__()
        down, up = (nn.Conv2d(a, b, 1, bias=False) for a, b in ((channels, channels // 16), (channels // 16, channels)))
        self.channel_attention = nn.Sequential(down, nn.ReLU(), up)
        self.spatial_attention = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.summed = summed

    def forward(self, x):
        mean, top, mlp = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True), self.channel_attention
        x = x * (mlp(mean + top) if self.summed else mlp(mean) + mlp(top)).sigmoid()
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (N, 2, h, w)
        return x * self.spatial_attention(both).sigmoid()


class GatedAttention(nn.Module):
    """Score of a slice for each label, w_k . (tanh(V h) * sigmoid(U h)) (arXiv 1802.04712, eq. 9)."""

    def __init__(self, width: int, n_labels: int, hidden: int = 128):
        super().__init__()
        self.tanh, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, n_labels, bias=False)

    def forward(self, x):
        return self.score(torch.tanh(self.tanh(x)) * torch.sigmoid(self.gate(x)))  # (N, K)


class SliceClassifier(nn.Module):
    """image (B, V, C, h, w), uint8 levels or int16 HU -> logits (B, K); windowing, augmentation, mixing on the device.

    theta (B, V, 2, 3), gain (B, V, 2), mix (B, 5): as drawn by the data set; mask (B, V): slices that are there.
    With --aggregate mil, logits of slices are averaged by their gated attention: for a last layer that is linear, this
    equals pooling the features. Otherwise V = 1, or 2 where `mix` is given.
    """

    def __init__(self, args):
        super().__init__()
        self.args, n_labels = args, len(args.label_columns)
        self.backbone = build_backbone(args)
        self.backbone.recompute = args.grad_checkpointing
        width = self.backbone.widths[-1]
        pooled = args.attention_place == "pooled"
        kinds = {"none": nn.Identity, "se": SE, "cbam": CBAM}
        self.attention = CBAM(width, pooled) if args.use_attention == "cbam" else kinds[args.use_attention](width)
        width = sum(self.backbone.widths) if args.use_multiscale else width
        self.classifier = nn.Sequential(
            nn.Dropout(args.dropout_rate), nn.Linear(width, 512), nn.ReLU(),
            nn.Dropout(args.dropout_rate / 2), nn.Linear(512, n_labels),
        )  # fmt: skip
        self.mil = GatedAttention(512, n_labels) if args.aggregate == "mil" else None
        centre, size = torch.tensor(args.window_values).view(-1, 2, 1, 1).unbind(1)
        buffers = {"low": centre - size / 2, "width": size}
        buffers |= {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
        for name, value in buffers.items():
            self.register_buffer(name, value.reshape(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True):
        """Frozen parts keep their batch-norm statistics and use no dropout."""
        super().train(mode)
        common.rest_frozen(self)
        return self

    def to_input(self, image, theta=None, gain=None):
        """(N, C, h, w) uint8 or int16 -> (N, 3, h, w) float32, normalised as for ImageNet."""
        x = common.window_levels(image, self.low, self.width) if image.dtype == torch.int16 else image.float()
        if theta is not None:
            x = warp(x, theta, gain, self.args.interpolation)
        return torch.addcmul(-self.mean / self.std, x.expand(-1, 3, -1, -1), 1 / (255 * self.std))

    def mix_pairs(self, x, mix):
        """(2 B, 3, h, w) pairs -> (B, 3, h, w): the second where its box is, and by its share elsewhere."""
        first, second = x.unflatten(0, (-1, 2)).unbind(1)
        share, y0, y1, x0, x1 = mix[:, :, None, None].unbind(1)  # (B, 1, 1)
        y, x = (torch.arange(n, device=mix.device) for n in first.shape[-2:])
        box = (y[:, None] >= y0) & (y[:, None] < y1) & (x >= x0) & (x < x1)  # (B, h, w)
        return torch.lerp(first, second, torch.maximum(share, box)[:, None])

    def features(self, x):
        """(N, 3, h, w) normalised -> (N, F)."""
        maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
        last = maps[-1]
        if self.args.attention_place == "pooled":
            last = last.mean((2, 3), keepdim=True)
        maps = (*maps[:-1], self.attention(last))
        return torch.cat([m.mean((2, 3)) for m in (maps if self.args.use_multiscale else maps[-1:])], 1)

    def head(self, features):
        """(N, F) -> logits (N, K), and behind them with --aggregate mil attention scores (N, K)."""
        hidden = self.classifier[:-1](features)
        logits = self.classifier[-1](hidden)
        return logits if self.mil is None else torch.cat([logits, self.mil(hidden)], 1)

    def slice_rows(self, image):
        """(N, C, h, w) -> logits (N, K) or, with --aggregate mil, logits and attention scores (N, 2 K), float32."""
        return self.head(self.features(self.to_input(image))).float()

    def forward(self, image, theta=None, gain=None, mix=None, mask=None):
        n = image.shape[1]
        theta, gain = (None, None) if theta is None else (theta.flatten(0, 1), gain.flatten(0, 1))
        x = self.to_input(image.flatten(0, 1), theta, gain)
        rows = self.head(self.features(x if mix is None else self.mix_pairs(x, mix)))
        if self.mil is None:
            return rows
        logits, scores = rows.float().unflatten(0, (-1, n)).chunk(2, 2)  # (B, V, K) each
        return (scores.masked_fill(~mask[..., None], -math.inf).softmax(1) * logits).sum(1)


def backbone_weights(state: dict, args) -> dict:
    """Weights in any known layout -> the names of the backbone: torchvision (old DenseNet keys too), CheXNet, the
    original tool, and our own checkpoints. Heads are left out."""
    if any(k.startswith(("visual_transformer.", "text_transformer.")) for k in state):
        raise UserError(
            f"{args.pretrained}: a CT-CLIP file. Its image tower is a 3-D transformer: no weight of it fits "
            f"{args.model}, whatever the old instructions say (--pretrained imagenet, or train_ctclip.py for CT-CLIP)"
        )
    state = {re.sub(r"^(?:model\.|densenet121\.)+", "", k): v for k, v in state.items()}
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()}
    if is_original(state):
        state = from_original(state)
    if any(k.startswith("backbone.") for k in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}


def is_original(state: dict) -> bool:
    heads = {"classifier.3.weight", "classifier.6.weight", "classifier.6.bias"}
    return heads <= state.keys() and any(k.startswith("backbone.0.") for k in state)


# Places of the original tool's nn.Sequential -> torchvision's names
PLACES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def from_original(state: dict) -> dict:
    """State dict of the original tool (`backbone.4.0.conv1.weight`, `classifier.3.weight`) -> our names."""
    resnet, out = "backbone.0.weight" in state, {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "backbone" and resnet:
            parts[1] = PLACES[parts[1]]
        elif parts[0] == "backbone":
            parts[1] = "features"
        elif parts[0] == "classifier":
            parts[1] = {"3": "1", "6": "4"}[parts[1]]
        out[".".join(parts)] = value
    return out


def export_weights(model: SliceClassifier) -> dict:
    """The model in the names of the original tool; the reverse of `from_original`."""
    back, out = {v: k for k, v in PLACES.items()} | {"features": "0"}, {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        parts[1] = back[parts[1]] if parts[0] == "backbone" else {"1": "3", "4": "6"}[parts[1]]
        out[".".join(parts)] = value.contiguous()
    return out


def imagenet_weights(name: str) -> dict:
    """torchvision's ImageNet weights: from the cache of torch.hub, else downloaded there, whole or not at all."""
    url = f"https://download.pytorch.org/models/{IMAGENET[name]}"
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except Exception as e:  # no network, no disk, a wrong hash, a cut file in the cache
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"--pretrained imagenet: {IMAGENET[name]} could not be had: {reason} (put the file into "
            f"{torch.hub.get_dir()}/checkpoints, or give --pretrained FILE or none)"
        ) from e


def build_model(args, say=print) -> SliceClassifier:
    model = SliceClassifier(args)
    if args.pretrained != "none":
        state = imagenet_weights(args.model) if args.pretrained == "imagenet" else common.load_weights(args.pretrained)
        state = backbone_weights(state, args)
        common.apply_weights(model.backbone, state, args.pretrained, allow_partial=args.allow_partial, say=say)
    return model.to(memory_format=torch.channels_last)


def read_checkpoint(path: Path) -> dict:
    """One of our checkpoints, or one of the original tool (Lightning, attention after pooling) in the same form."""
    try:
        saved = common.load_checkpoint(path)
    except UserError as e:
        if "not a checkpoint of this toolkit" not in str(e):  # missing, damaged, or refused
            raise
        state = common.load_weights(str(path))
        if not is_original(state):
            raise
        return checkpoint_of_original(state, path)
    if saved["task"] != TASK:
        raise UserError(f"{path}: a checkpoint of the task '{saved['task']}', not of {TASK}")
    return saved


def checkpoint_of_original(state: dict, path: Path) -> dict:
    args = parse_args(["--mode", "train"])
    depth = len({k.split(".")[2] for k in state if k.startswith("backbone.6.")})
    args.model = {6: "resnet50", 23: "resnet101"}.get(depth, "efficientnet_b0")
    kinds = {"se": "attention.excitation.0.weight", "cbam": "attention.spatial_attention.0.weight"}
    args.use_attention = next((name for name, key in kinds.items() if key in state), "none")
    args.attention_place, args.window_values = "pooled", [list(common.WINDOWS["chest"])]
    args.slice_store, args.slice_size, args.image_size = "uint8", 224, 224
    if len(state["classifier.6.bias"]) != len(LABELS):
        raise UserError(f"{path}: {len(state['classifier.6.bias'])} outputs, the original tool has {len(LABELS)}")
    model = SliceClassifier(args)
    common.apply_weights(model, from_original(state), str(path))
    return common.model_checkpoint(TASK, args, model, {})


def build_eval_model(saved: dict, args, device) -> SliceClassifier:
    """The model of a checkpoint: its averaged weights where it has them."""
    model = common.filled(lambda: SliceClassifier(args), saved)
    return model.to(device, memory_format=torch.channels_last).eval()


def forward_flops(model, args) -> float:
    """Floating-point operations of one sample's forward pass, counted on the meta device."""
    n, side = args.bag_size if args.aggregate == "mil" else 1, args.image_size
    inputs = torch.empty(1, n, 1, side, side, device="meta"), torch.ones(1, n, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        deepcopy(model).to("meta").eval()(inputs[0], mask=inputs[1])
    return counter.get_total_flops()


def set_trainable(model, args, epoch: int, say=print) -> bool:
    """Freeze and unfreeze for this epoch; True if that changed anything."""
    stages = model.backbone.stages()
    free = 0 if args.freeze_backbone else len(stages)
    if args.progressive_unfreeze:
        free = max(0, min(len(stages), epoch - args.unfreeze_epoch + 1))
    before = [p.requires_grad for p in model.parameters()]
    for i, stage in enumerate(reversed(stages)):
        for module in stage:
            module.requires_grad_(i < free)
    changed = before != [p.requires_grad for p in model.parameters()]
    if changed:
        say(f"epoch {epoch + 1}: {free} of {len(stages)} stages of the backbone are trained")
    return changed


# ==== Loss and optimizer =======================================================================================


class MultiLabelLoss(nn.Module):
    """Mean loss over the known labels: logits, targets (B, K), targets in [0, 1], NaN or negative where unknown."""

    def __init__(self, args, targets):
        super().__init__()
        self.args, kind = args, args.class_weights
        kind = ("positives" if args.loss == "bce" else "none") if kind == "auto" else kind
        weights = common.balanced_weights(torch.as_tensor(targets), args.max_pos_weight)  # (K,)
        self.register_buffer("pos_weight", weights if kind == "positives" else None)
        self.register_buffer("weight", weights if kind == "both" else None)

    def forward(self, logits, targets):
        a, weights = self.args, {"weight": self.weight, "pos_weight": self.pos_weight}
        if a.loss == "focal":
            return common.focal_loss(logits, targets, a.focal_alpha, a.focal_gamma, form=a.focal_form, **weights)
        if a.loss == "asl":
            return common.asymmetric_loss(logits, targets, a.asl_gamma_neg, a.asl_gamma_pos, a.asl_clip, **weights)
        return common.bce_loss(logits, targets, **weights)

    def count(self, batch):
        """What the mean is over; sums of it join micro-batches and ranks."""
        return common.known(batch["target"]).sum()


def build_criterion(args, train_set):
    return MultiLabelLoss(args, train_set.targets)


def build_optimizer(model, args):
    """Two parameter groups: matrices and convolutions decay, norms and biases do not."""
    parts = [(args.weight_decay, [p for p in model.parameters() if p.ndim >= 2])]
    parts += [(0.0, [p for p in model.parameters() if p.ndim < 2])]
    groups = [{"params": params, "weight_decay": decay, "lr_scale": 1.0} for decay, params in parts]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def compute_loss(net, batch, criterion):
    logits = net(batch["image"], batch.get("theta"), batch.get("gain"), batch.get("mix"), batch.get("mask"))  # (B, K)
    return criterion(logits, batch["target"]), {}


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


def volume_probs(logits: np.ndarray, args, how: str | None = None) -> np.ndarray:
    """Rows of `slice_rows` of one volume (s, K or 2 K) -> probabilities (K,) float64; NaN rows (unread slices) are left
    out, and a volume without any other is NaN."""
    rows, k = logits[~np.isnan(logits).any(1)].astype(np.float64), len(args.label_columns)
    how = how or args.aggregate
    if not len(rows):
        return np.full(k, np.nan)
    with np.errstate(over="ignore"):  # exp of 1000 is infinite and its sigmoid 0, as it should be
        if how == "mil":
            weights = np.exp(rows[:, k:] - rows[:, k:].max(0))
            return 1 / (1 + np.exp(-(weights * rows[:, :k]).sum(0) / weights.sum(0)))
        probs = 1 / (1 + np.exp(-rows[:, :k]))  # (s, K)
    if how == "noisy-or":
        return 1 - np.prod(1 - probs, axis=0)
    highest = np.sort(probs, axis=0)[::-1]
    return highest[: {"max": 1, "topk": args.top_slices}.get(how)].mean(0)


@torch.no_grad()
def predict(model, dataset, ctx, say=None) -> dict:
    """Every slice exactly once, then the volumes: to the last digit the same on every rank, for any number of ranks.

    -> ids, groups, targets, probs (n_volumes, K) of the volumes; rows (n_slices, K or 2 K) float32 of the slices;
    failed: indices of volumes without a readable slice, whose probs are NaN; unread: indices of slices.
    """
    args = dataset.args
    batches = common.eval_batches(len(dataset), args.eval_batch_size or args.batch_size, ctx)
    loader = common.data_loader(dataset, [[(0, i) for i in b] for b in batches], args, ctx)
    rows = []
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        for batch in tqdm(loader, desc=say, leave=False, disable=None if say and ctx.master else True):
            out = model.slice_rows(batch["image"][:, 0].to(ctx.device, non_blocking=True)).cpu()
            rows.append(torch.cat([batch["bad"][:, None].float(), out], 1))
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)
    failed, rows = (rows[:, 0] > 0).numpy(), rows[:, 1:].numpy()
    if not np.isfinite(rows[~failed]).all():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    rows[failed] = np.nan
    probs = np.stack([volume_probs(rows[slices], args) for slices in dataset.slices_of])
    return {
        "ids": dataset.volumes,
        "groups": dataset.groups,
        "targets": dataset.volume_targets,
        "probs": probs,
        "rows": rows,
        "failed": np.flatnonzero(np.isnan(probs).any(1)).tolist(),
        "unread": np.flatnonzero(failed).tolist(),
    }


def evaluate(model, dataset, criterion, ctx) -> dict[str, float]:
    """Metrics of the volumes at --threshold, `slice_` metrics, and the loss: of slices, or with mil of volumes."""
    model.eval()
    out, args = predict(model, dataset, ctx, "evaluation"), dataset.args
    threshold, n_labels = 0.5 if args.threshold is None else args.threshold, len(args.label_columns)
    slices, volumes = ~np.isnan(out["rows"]).any(1), ~np.isnan(out["probs"]).any(1)
    if not volumes.any():
        raise UserError("no volume of the validation split could be read")
    logits, targets = out["rows"][slices, :n_labels], dataset.volume_targets[dataset.volume_of][slices]
    of_slices = common.multilabel_metrics(targets, sigmoid(logits), dataset.class_names, threshold)
    probs, of_volumes = out["probs"][volumes], dataset.volume_targets[volumes]
    if args.aggregate == "mil":
        eps = np.finfo(np.float64).eps
        logits, targets = np.log(probs.clip(eps, 1 - eps)) - np.log1p(-probs.clip(eps, 1 - eps)), of_volumes
    loss = criterion(*(torch.from_numpy(np.float32(x)).to(ctx.device) for x in (logits, targets)))
    metrics = common.multilabel_metrics(of_volumes, probs, dataset.class_names, threshold)
    metrics |= {f"slice_{k}": of_slices[k] for k in ("macro_auroc", "macro_auprc", "macro_f1", "micro_f1")}
    return {"val_loss": float(loss), "n_missing": len(out["failed"]), **metrics}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.float64(logits)).sigmoid().numpy()


def tune_thresholds(model, dataset, ctx) -> dict[str, list[float]]:
    """Of each label on the validation split: temperature, thresholds by F1 (of volumes, of slices) and by CRG."""
    model.eval()
    out, n_labels = predict(model, dataset, ctx, "thresholds"), len(dataset.class_names)
    slices, volumes = ~np.isnan(out["rows"]).any(1), ~np.isnan(out["probs"]).any(1)
    of_slices = dataset.volume_targets[dataset.volume_of][slices], sigmoid(out["rows"][slices, :n_labels])
    of_volumes = dataset.volume_targets[volumes], out["probs"][volumes]
    return {
        **common.fit_to_validation(np.array(dataset.volumes)[volumes], *of_volumes),
        "slice_thresholds": common.f1_thresholds(*of_slices).tolist(),
        "crg_thresholds": common.crg_thresholds(*of_volumes).tolist(),
    }


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
            state.update(stale=stale, plateau=plateau, loss_sum=0.0, loss_steps=0)
            record = {"epoch": epoch_done, "step": step, "train_loss": train_loss, **metrics}
            log.results(record)
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


def finish(args, ctx, model, val_set, best, log) -> int:
    """Thresholds for the best model, which is still in memory, into best.ckpt and the file of its epoch; the export."""
    if not best.entries:
        raise UserError(f"{args.output_dir}: none of the run's best models is here (resume in the run's own folder)")
    entry, saved = best.entries[0], best.memory[best.entries[0]["path"]]
    model.load_state_dict(saved["model"])
    saved |= tune_thresholds(model, val_set, ctx)
    if ctx.master:
        save_checkpoint(args.output_dir / entry["path"], saved)
        common.link_file(args.output_dir / entry["path"], args.output_dir / BEST)
        if args.export:
            common.save_weights(args.export, export_weights(model))
    log.info(f"best: step {entry['step']}, {args.monitor} {abs(entry['score']):.4f} -> {args.output_dir / BEST}")
    log.close()
    ctx.barrier()
    return 0


# ==== Main =====================================================================================================


def check_environment(args, ctx) -> None:
    """Say what this runs on, and refuse before anything starts what would fail later."""
    if args.tensorboard and args.mode in ("train", "both") and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed (pip install tensorboard, or --no-tensorboard)")
    outputs = [args.output_dir / "x"] if args.mode != "predict" else []
    outputs += [args.challenge_output] if args.challenge_input else []
    outputs += [args.predict_output or args.output_dir / "x"] if args.predict_input else []
    common.need_writable([*outputs, args.export])
    if ctx.master:
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"environment: {versions}, on {ctx}; GPUs: {', '.join(gpus) or 'none'}")


def begin_run(args, ctx) -> None:
    """Look at the data, then number a new run; the checkpoints of one that was here before move to
    checkpoints/version_N: only --overwrite loses them."""
    last, n, old = args.output_dir / LAST, 0, 0
    if args.augment_on == "auto":
        args.augment_on = "device" if ctx.device.type == "cuda" else "workers"
    if args.resume and (args.resume != "auto" or last.exists() or common.previous_of(last).exists()):
        return
    build_datasets(deepcopy(args))  # a mistake in it must not cost an earlier run its place
    if args.pretrained not in ("imagenet", "none") and not Path(args.pretrained).exists():
        raise UserError(f"{args.pretrained}: no such weight file")
    while (args.output_dir / TENSORBOARD.format(version=n)).exists():
        n += 1
    while (last.parent / f"version_{old}").exists() or old < n - 1:
        old += 1
    args.version, target = n, last.parent / f"version_{old}"
    files = [] if args.overwrite else sorted(last.parent.glob("*.ckpt"))
    moved = {str(p.resolve()): target / p.name for p in files}
    args.pretrained = str(moved.get(str(Path(args.pretrained).resolve()), args.pretrained))
    if args.checkpoint:
        args.checkpoint = moved.get(str(args.checkpoint.resolve()), args.checkpoint)
    ctx.barrier()  # all have looked before the first one writes
    if ctx.master and files:
        with common.lock_folder(args.output_dir):
            target.mkdir()
            for path in files:
                path.rename(target / path.name)
        print(f"{len(files)} checkpoints of an earlier run are now in {target}", file=sys.stderr)
    ctx.barrier()


def best_checkpoint(args) -> Path:
    """--checkpoint, else the run's best, else the one whose name tells the lowest validation loss; never the newest."""
    folder = (args.output_dir / BEST).parent
    if args.checkpoint or (args.output_dir / BEST).exists():
        return args.checkpoint or args.output_dir / BEST
    named = {p: re.search(r"val_loss=(\d+\.\d+)", p.name) for p in folder.glob("*.ckpt")}
    named = {p: float(found[1]) for p, found in named.items() if found}
    if not named:
        raise UserError(f"{folder}: holds no checkpoint to take (--mode train makes one, --checkpoint names one)")
    return min(sorted(named), key=named.get)


def load_model(args, ctx):
    """-> the checkpoint, its arguments with what this command line may change, its model."""
    path = best_checkpoint(args)
    saved, parser = read_checkpoint(path), build_parser()
    for name in ("model", "label_columns", "image_size", "windows", "use_attention", "use_multiscale"):
        given, then = getattr(args, name), saved["args"][name]
        if given not in (parser.get_default(name), then):
            raise UserError(f"--{name.replace('_', '-')} is {given}, but {then} in {path}")
    own = ("data_dir", "slice_dir", "output_dir", "threshold", "split", "batch_size", "eval_batch_size", "num_workers")
    own += ("amp", "on_bad_sample", "aggregate", "top_slices")
    model_args = args_from_checkpoint(saved, **{k: getattr(args, k) for k in own})
    if any(getattr(model_args, k) != saved["args"][k] for k in ("aggregate", "top_slices")):
        # those were fitted to other probabilities
        saved |= {"thresholds": None, "temperatures": None, "crg_thresholds": None}
    if ctx.master:
        print(f"checkpoint: {path} ({model_args.model}, {len(saved['class_names'])} labels), on {ctx}")
    return path, saved, model_args, build_eval_model(saved, model_args, ctx.device)


def document_metrics(targets, probs, class_names, thresholds) -> dict:
    """Metrics under the original tool's names: `_05` at 0.5, `_opt` at `thresholds` (it fitted one on these cases)."""
    out, known = {}, ~np.isnan(targets)
    for suffix, cut in (("_05", 0.5), ("_opt", thresholds)):
        m = common.multilabel_metrics(targets, probs, class_names, cut)
        right = ((probs >= cut) == (targets == 1)) & known
        out |= {"auroc_macro": m["macro_auroc"], "auroc_micro": m["micro_auroc"]}
        out[f"hamming_accuracy{suffix}"] = right.sum() / max(1, known.sum())
        out[f"sample_accuracy{suffix}"] = float(np.mean((right.sum(1) / known.sum(1).clip(1))[known.any(1)]))
        out[f"exact_match_accuracy{suffix}"] = m["exact_match"]
        out |= {f"{name}_macro{suffix}": m[f"macro_{name}"] for name in ("f1", "precision", "recall")}
        out[f"f1_micro{suffix}"], out[f"crg{suffix}"] = m["micro_f1"], m["crg"]
    return out | {"accuracy": out["exact_match_accuracy_opt"]}


def test(args, ctx) -> int:
    """--mode evaluate: results/evaluation_results.json and predictions of the volumes and slices of one split."""
    path, saved, a, model = load_model(args, ctx)
    dataset = build_eval_dataset(a)
    out = predict(model, dataset, ctx, "prediction")
    code = 3 if out["unread"] else 0
    if not ctx.master:
        ctx.barrier()  # torchrun ends the others once one leaves
        return code
    names, folder = dataset.class_names, args.output_dir / "results"
    folder.mkdir(parents=True, exist_ok=True)
    cut, source = common.choose_thresholds(args.threshold, saved)
    slice_cut, _ = common.choose_thresholds(args.threshold, {"thresholds": saved.get("slice_thresholds")})
    probs = {how: np.stack([volume_probs(out["rows"][s], a, how) for s in dataset.slices_of]) for how in AGGREGATES}
    probs |= {a.aggregate: out["probs"]}
    slice_probs = sigmoid(out["rows"][:, : len(names)])
    read, read_slices = ~np.isnan(out["probs"]).any(1), ~np.isnan(slice_probs).any(1)
    if not read.any():
        raise UserError(f"{a.slice_dir}: no volume of split '{a.split}' could be read")
    targets, of_slices = out["targets"][read], dataset.volume_targets[dataset.volume_of][read_slices]
    metrics = common.multilabel_metrics(targets, probs[a.aggregate][read], names, cut)
    groups = np.array(out["groups"])[read]
    spread = common.bootstrap_intervals(targets, probs[a.aggregate][read], names, cut, groups)
    trained_here = data_file(args_from_checkpoint(saved), a.split).resolve() == data_file(a).resolve()
    notes = {
        saved["args"]["split"]: "These volumes chose the model and its thresholds: the numbers are too good to be "
        "expected of new patients",
        "train": "The model was trained on these volumes: the numbers say nothing about new patients",
    }
    results = {
        "checkpoint": str(path),
        "split": a.split,
        "n_volumes": len(dataset.volumes),
        "n_patients": len(set(out["groups"])),
        "n_slices": len(dataset),
        "aggregate": a.aggregate,
        "thresholds": dict(zip(names, np.broadcast_to(cut, len(names)).tolist(), strict=True)),
        "thresholds_source": source,
        "notes": [notes[a.split]] if trained_here and a.split in notes else [],
        **document_metrics(targets, probs[a.aggregate][read], names, cut),
        "metrics": {k: {"value": v, "interval": spread[k]} for k, v in metrics.items()},
        "volumes_by_aggregate": {how: document_metrics(targets, p[read], names, cut) for how, p in probs.items()},
        "slices": document_metrics(of_slices, slice_probs[read_slices], names, slice_cut),
        "failed": [out["ids"][i] for i in out["failed"]],
        "unread_slices": [dataset.ids[i] for i in out["unread"]],
    }
    common.write_csv(folder / "volume_predictions.csv", common.prediction_table(out["ids"], out["probs"], names, cut))
    table = common.prediction_table(dataset.ids, slice_probs, names, slice_cut)
    common.write_csv(folder / "slice_predictions.csv", table)
    write_json(folder / "evaluation_results.json", results)
    low, high = spread["macro_auroc"]
    print(f"{read.sum()} of {len(read)} volumes, {a.aggregate} of slices: macro AUROC {metrics['macro_auroc']:.4f} "
          f"[{low:.4f}, {high:.4f}], macro F1 {metrics['macro_f1']:.4f} (threshold {source}); slices: macro AUROC "
          f"{results['slices']['auroc_macro']:.4f}")  # fmt: skip
    print("\n".join([*results["notes"], f"Results: {folder / 'evaluation_results.json'}"]))
    for i in out["unread"]:
        print(f"failed: slice {dataset.ids[i]}", file=sys.stderr)
    for i in out["failed"]:
        print(f"failed: {out['ids'][i]}", file=sys.stderr)
    ctx.barrier()
    return code


def write_json(path: Path, value) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path.parent}: could not be made: {e.strerror}") from e
    common.write_atomic(path, json.dumps(common.json_safe(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def slices_of_volume(path: Path, args, options: dict) -> tuple[list[int], np.ndarray]:
    """Indices and pixels (s, 1, h, w) of the slices that stand for a volume, by the path of the training data."""
    volume = common.read_volume(path, **options)
    how = {"strategy": "multi_slice", "slices_per_volume": 12} | args.extraction
    index = common.pick_slices(volume.array, how["strategy"], how["slices_per_volume"])
    stored = common.stored_slices(volume.array, index, args.slice_size, args.slice_store, args.window_values[0])
    return index, common.resize_slices(stored, args.image_size)[:, None]


@torch.no_grad()
def rows_of(model, image: np.ndarray, args, ctx) -> np.ndarray:
    """(s, C, h, w) -> `slice_rows` (s, K or 2 K), in batches of the size that evaluation uses."""
    size = args.eval_batch_size or args.batch_size
    padded = np.concatenate([image, np.repeat(image[-1:], -len(image) % size, 0)])
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        parts = torch.from_numpy(padded).split(size)
        rows = torch.cat([model.slice_rows(p.to(ctx.device)).cpu() for p in parts]).numpy()
    if not np.isfinite(rows).all():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    return rows[: len(image)]


def in_threads(work, items: list, n: int):
    """(item, result or UserError) in order, computed up to n ahead; threads, because inflating a file frees the
    interpreter and processes would need shared memory, of which a challenge container has 128 MB."""

    def attempt(item):
        try:
            return work(item)
        except UserError as e:
            return e

    waiting = collections.deque()
    with ThreadPoolExecutor(max(1, n)) as pool:
        for item in items:
            waiting.append((item, pool.submit(attempt, item)))
            if len(waiting) > n:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def named(names, values) -> dict:
    return dict(zip(names, np.asarray(values).tolist(), strict=True))


def findings(names, probs, cut) -> tuple[dict, list]:
    """Present or not, and the five most probable labels above 0.1, as the original tool lists them."""
    order = [k for k in np.argsort(-probs, kind="stable")[:5] if probs[k] > 0.1]
    top = [{"abnormality": names[k], "probability": float(probs[k])} for k in order]
    return named(names, (probs >= cut).astype(int)), top


def predict_slice(path: Path, rows: np.ndarray, names, cut) -> dict:
    probs = sigmoid(rows[0, : len(names)])
    present, top = findings(names, probs, cut)
    values = {"probabilities": named(names, probs), "predictions": present, "top_abnormalities": top}
    return {"file_path": str(path), "slice_id": path.name.removesuffix(".npy"), **values}


def predict_volume(path: Path, index, rows: np.ndarray, names, cut, slice_cut, args) -> dict:
    whole = volume_probs(rows, args)
    out = {"file_path": str(path), "volume_id": common.volume_name(path.name), "probabilities": named(names, whole)}
    out["predictions"], out["top_abnormalities"] = findings(names, whole, cut)
    for how in ("max", "mean"):
        probs = volume_probs(rows, args, how)
        present, top = findings(names, probs, cut)
        out |= {f"{how}_probabilities": named(names, probs), f"{how}_predictions": present}
        out[f"top_abnormalities_{how}"] = top
    slices = [
        {"slice_index": i, "probabilities": named(names, p), "predictions": findings(names, p, slice_cut)[0]}
        for i, p in zip(index, sigmoid(rows[:, : len(names)]), strict=True)
    ]
    return out | {"slice_predictions": slices, "num_slices_processed": len(index)}


def run_predict(args, ctx) -> int:
    """--mode predict: JSON and CSV of slices or volumes, or the challenge's file; what fails is named, exit code 3."""
    if ctx.world > 1:
        raise UserError("--mode predict runs as one process (several can share the files)")
    path, saved, a, model = load_model(args, ctx)
    given = {"strategy": args.slice_strategy, "slices_per_volume": args.slices_per_volume}
    a.extraction = (a.extraction or {}) | {k: v for k, v in given.items() if v}
    names, volumes = saved["class_names"], bool(args.challenge_input) or args.predict_type == "volumes"
    cut, source = common.choose_thresholds(args.threshold, saved)
    slice_cut, _ = common.choose_thresholds(args.threshold, {"thresholds": saved.get("slice_thresholds")})
    metadata = common.rows_by_name(args.metadata, common.RESCALE_COLUMNS)
    files = args.predict_input or sorted(p for p in args.challenge_input.glob("*") if common.is_scan(p))
    if not files:
        raise UserError(f"{args.challenge_input}: no {', '.join(common.SCAN_SUFFIXES)} in it")
    fold = saved.get({"f1": "thresholds", "crg": "crg_thresholds"}.get(args.fold_thresholds))
    if args.fold_thresholds != "none" and (fold is None or not args.challenge_input):
        raise UserError(f"--fold-thresholds {args.fold_thresholds}: goes with --challenge-input and a checkpoint that "
                        "holds thresholds from validation (best.ckpt of a finished run)")  # fmt: skip

    def read(file):
        if not volumes:
            image = common.resize_slices(common.read_slice(file)[None], a.image_size)[None]
            levels = to_levels(torch.from_numpy(image), a).numpy()
            if levels.shape[1] != len(a.window_values):
                raise UserError(f"{file}: one window, but the model takes {len(a.window_values)} (int16 HU slices)")
            return [0], levels
        options = {}
        if metadata:
            options = common.metadata_options(metadata, common.volume_name(file.name), args.metadata)
        return slices_of_volume(file, a, options)

    done, failed, waiting = [], [], []

    def score_waiting():
        """Slices of several files fill a batch together."""
        if not waiting:
            return
        rows = rows_of(model, np.concatenate([image for _, _, image in waiting]), a, ctx)
        for file, index, image in waiting:
            mine, rows = rows[: len(image)], rows[len(image) :]
            one = (predict_volume(file, index, mine, names, cut, slice_cut, a) if volumes
                   else predict_slice(file, mine, names, slice_cut))  # fmt: skip
            done.append((one["volume_id" if volumes else "slice_id"], one))
        waiting.clear()

    bar = tqdm(total=len(files), desc="prediction", unit="volume" if volumes else "slice", disable=None)
    for file, result in in_threads(read, files, args.num_workers):
        if isinstance(result, UserError):
            score_waiting()  # results stay in the order of the files
            failed.append({"file_path": str(file), "reason": str(result)})
            done.append((common.volume_name(file.name), None))
        else:
            waiting.append((file, *result))
        if sum(len(image) for _, _, image in waiting) >= (a.eval_batch_size or a.batch_size):
            score_waiting()
        bar.update()
    score_waiting()
    bar.close()
    for case in failed:
        print(f"failed: {case['reason']}", file=sys.stderr)
    if len(failed) == len(files):
        raise UserError(f"none of {len(files)} files could be read, first: {failed[0]['reason']}")
    if args.challenge_input:
        write_challenge(args.challenge_output, [one for _, one in done if one], fold, failed)
        print(f"{len(files) - len(failed)} of {len(files)} volumes -> {args.challenge_output}")
        return 3 if failed else 0
    table = np.stack([list(one["probabilities"].values()) if one else np.full(len(names), np.nan) for _, one in done])
    good = [one for _, one in done if one]
    counts = {n: sum(one["predictions"][n] for one in good) for n in names}
    used = named(names, np.broadcast_to(cut if volumes else slice_cut, len(names)))
    output = args.predict_output or args.output_dir / f"predictions_{args.predict_type}.json"
    results = {
        "predictions": good,
        "summary": {"num_files": len(files), "num_failed": len(failed), "failed": failed, "num_predicted": counts},
        "metadata": {
            "checkpoint": str(path), "model": a.model, "class_names": names, "predict_type": args.predict_type,
            "aggregate": a.aggregate, "thresholds": used, "thresholds_source": source, "windows_hu": a.window_values,
            "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"), "versions": common.versions(),
        },
    }  # fmt: skip
    write_json(output, results)
    ids = [name for name, _ in done]
    table = common.prediction_table(ids, table, names, cut if volumes else slice_cut)
    common.write_csv(output.with_suffix(".csv"), table)
    print(f"{len(good)} of {len(files)} {args.predict_type} -> {output} and {output.with_suffix('.csv').name}")
    return 3 if failed else 0


def write_challenge(path: Path, volumes: list[dict], thresholds, failed: list[dict]) -> None:
    """The challenge's JSON (forithmus/VLM3D-Dockers, abnclass); its scorer calls a label present from 0.5 on."""
    predictions = []
    for volume in volumes:
        probs = volume["probabilities"]
        if thresholds is not None:
            probs = named(probs, common.fold_thresholds(list(probs.values()), thresholds))
        in_order = {name: probs[name] for name in (*common.CT_RATE_LABELS, *probs) if name in probs}
        predictions.append({"input_image_name": volume["volume_id"], "probabilities": in_order})
    kind = {"name": "Generated probabilities", "type": "Abnormality Classification"}
    result = {**kind, "version": {"major": 1, "minor": 0}, "predictions": predictions}
    write_json(path, result | ({"failed": failed} if failed else {}))


def main(argv=None) -> int:
    args = parse_args(argv)
    common.set_deterministic(args.deterministic)
    with common.process_group(args.device, args.timeout_minutes) as ctx:
        check_environment(args, ctx)
        if args.mode == "predict":
            return run_predict(args, ctx)
        code = 0
        if args.mode in ("train", "both"):
            begin_run(args, ctx)
            code = train(args, ctx)
        return code or (test(args, ctx) if args.mode in ("evaluate", "both") else 0)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
