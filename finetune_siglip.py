"""Fine-tune SigLIP or Merlin on chest-CT volumes: several findings per volume, each present, absent or unknown.

Model    a SigLIP / SigLIP 2 / MedSigLIP ViT over slices (2.5-D), pooled for each label by attention that starts as the
         mean; or Merlin's inflated ResNet-152 over the whole volume. Recognised from the weight file.
Papers   SigLIP arXiv 2303.15343, SigLIP 2 arXiv 2502.14786, Merlin arXiv 2406.06512, CT-RATE arXiv 2403.17834
Data     CSV with series_id, split (train / val), img_path and one 0/1 column per label (empty or -1 = unknown);
         volumes .npz (`image`, (C, D, H, W)), .npy (the cache of prepare_ct.py), .nii.gz or .mha
Weights  --pretrained file, Hugging Face folder or hub id; 'none' with --arch for random weights. The size of a slice
         is that of the weights, the windows are lung, mediastinum and bone, unless flags say otherwise
CPU      python demo_data.py ct --out demo --n 60
         python finetune_siglip.py --csv demo/ct/all_ct_wlabels.csv --pretrained none --arch siglip-tiny --epochs 2
1 GPU    python finetune_siglip.py --csv all_ct_wlabels.csv --pretrained medsiglip/ --amp --use-ema --grad-checkpointing
N GPUs   torchrun --nproc_per_node N finetune_siglip.py ... (--batch-size is per process)
Resume   the same command with --resume auto: bit for bit an uninterrupted run (same device and thread count)
Writes   training.log, results.jsonl, last.pth, checkpoint_epoch_*.pth (top k), best_model.pth; with --test-only
         test_predictions.csv
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import CT_RATE_LABELS, Progress, RunLog, StopSignal, TopK, UserError, save_checkpoint, seed_everything

TASK, MONITOR = "siglip", "macro_f1"
SHOWN = ("macro_f1", "micro_f1", "macro_auroc", "macro_auprc")  # of an epoch, on the console
LOG, RESULTS, LAST = "training.log", "results.jsonl", "last.pth"
TOP, BEST = "checkpoint_epoch_{epoch}.pth", "best_model.pth"
TENSORBOARD = "tensorboard"
WANDB_PROJECT = "siglip-ct-classification"
# A checkpoint can only be continued or evaluated with these as they were.
FIXED_ARGS = ["model_config", "label_columns", "num_slices", "image_size", "channels", "windows", "slice_pool"]
FIXED_ARGS += ["feature_norm", "optimizer", "weight_decay", "layer_decay", "use_ema"]

NO_DECAY = ("position_embedding.weight", "probe", "slice_pool.position")  # besides norms and biases
# A SigLIP ViT: width E, layers, heads, MLP width, patch and image side in pixels
VIT = ("width", "layers", "heads", "mlp", "patch", "image")
ARCHS = {
    "siglip-tiny": {"family": "siglip", **dict(zip(VIT, (96, 2, 4, 288, 16, 64), strict=True))},
    "base-224": {"family": "siglip", **dict(zip(VIT, (768, 12, 12, 3072, 16, 224), strict=True))},
    "large-384": {"family": "siglip", **dict(zip(VIT, (1024, 24, 16, 4096, 16, 384), strict=True))},
    "so400m-384": {"family": "siglip", **dict(zip(VIT, (1152, 27, 16, 4304, 14, 384), strict=True))},
    "medsiglip-448": {"family": "siglip", **dict(zip(VIT, (1152, 27, 16, 4304, 14, 448), strict=True))},
    "merlin": {"family": "merlin", "blocks": [3, 8, 36, 3], "image": 224},
    "merlin-tiny": {"family": "merlin", "blocks": [1, 1, 1, 1], "image": 64},
}


# ==== Arguments ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", help="YAML or INI files of defaults; the command line wins")
    onoff = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--csv", type=Path, help="table of cases, splits and labels")
    add("--label-columns", nargs="+", default=CT_RATE_LABELS, metavar="NAME", help="columns to predict")
    add("--data-root", type=Path, help="folder img_path may not leave (the CSV's)")
    add("--layout", choices=["CDHW", "CHWD"], default="CDHW", help="axes of npz volumes (CHWD: depth last)")
    add("--value-range", choices=["auto", "hu", "unit", "stored"], default="auto", help="stored values")
    add("--metadata", type=Path, help="CSV with VolumeName, RescaleSlope, RescaleIntercept")
    add("--num-slices", type=int, default=None, help="slices taken from a volume (32; merlin: 160)")
    add("--slice-spacing", type=float, help="distance of slices in mm (evenly over the whole volume)")
    add("--image-size", type=int, help="side of an image in pixels")
    add("--augment", action=onoff, default=True, help="augment training images")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="what an unreadable sample does")
    add("--max-bad-fraction", type=float, default=0.05, help="share of unreadable samples that ends a run")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained", help="weights to begin with (kinds: see the script's head), or 'none'")
    add("--arch", choices=list(ARCHS), help="model (recognised from the weights)")
    add("--allow-partial", action="store_true", help="accept weights that lack part of the backbone")
    add("--channels", choices=["windows", "neighbours"], default="windows", help="what the 3 inputs hold")
    add("--windows", nargs="+", metavar="W", help=f"{', '.join(common.WINDOWS)} or centre,width in HU, one a channel")
    add("--slice-pool", choices=["attention", "mean"], default="attention", help="pooling over slices")
    add(
        "--feature-norm",
        choices=["none", "batch"],
        default="none",
        help="batch-norm of pooled features (as MAE's probe)",
    )
    add("--freeze-up-to", type=int, default=0, metavar="N", help="backbone layers to freeze")
    add("--dropout-rate", type=float, default=0.1, help="dropout in the classification head")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last ViT block")
    add("--slice-chunk", type=int, default=0, help="slices per call of the ViT (0: all at once)")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", "--loss-type", choices=["bce", "focal", "balanced", "asl"], default="bce", help="loss")
    add("--focal-gamma", type=float, default=2.0, help="focusing exponent of the focal loss")
    add("--focal-alpha", type=float, default=1.0, help="factor of the focal loss (see --focal-form)")
    add(
        "--focal-form", choices=["constant", "balanced"], default="constant",
        help="alpha multiplies every term, or positives by alpha and negatives by 1 - alpha",
    )  # fmt: skip
    add("--max-pos-weight", type=float, default=20.0, help="bound of the weights that balance labels")
    add("--asl-gamma-neg", type=float, default=4.0, help="ASL exponent for negatives")
    add("--asl-gamma-pos", type=float, default=1.0, help="ASL exponent for positives")
    add("--asl-clip", type=float, default=0.05, help="ASL probability shift of negatives")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", "--max-epochs", type=int, default=100, help="passes over the training data")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs (0: by epochs)")
    add("--batch-size", type=int, default=16, help="samples per process and micro-step")
    add("--accum-steps", "--gradient-accumulation-steps", type=int, default=1, help="micro-steps per step")
    add("--lr", "--learning-rate", type=float, default=1e-4, help="peak learning rate")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="optimizer (sgd: momentum 0.9)")
    add("--weight-decay", type=float, default=1e-4, help="decay of matrices (not norms, biases, positions)")
    add("--scheduler", choices=["plateau", "cosine", "constant"], default="plateau", help="learning rate after warm-up")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="end of the cosine as a share of --lr")
    add("--plateau-patience", type=int, default=5, help="evaluations without gain before the rate falls")
    add("--plateau-factor", type=float, default=0.5, help="what the rate is multiplied by on a plateau")
    add("--layer-decay", type=float, default=1.0, help="rate of a layer as a share of the layer above")
    add("--head-only-epochs", type=int, default=0, help="first epochs that train the head alone (LP-FT)")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add("--max-bad-steps", type=int, default=20, help="non-finite steps in a row that end the run")
    add("--use-ema", action="store_true", help="judge and keep a moving average of the weights")
    add("--ema-decay", type=float, default=0.999, help="decay of the average, reached after a warm-up")
    add("--early-stopping-patience", type=int, default=10, help="evaluations without gain before the end")

    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--amp", nargs="?", const="auto", choices=["none", "auto", "fp16", "bf16"], default="none",
        help="autocast type; bare --amp takes the best of the device",
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
    add("--test-only", type=Path, metavar="CKPT", help="score a checkpoint and write --test-output")
    add("--test-output", default="test_predictions.csv", help="predictions; a bare name: in --output-dir")
    add("--split", default="val", help="split that is scored")
    add("--slice-weights", type=Path, help="npz for the slice weights, (n, S, K), of --test-only")

    add = parser.add_argument_group("checkpoint").add_argument
    add("--output-dir", type=Path, default=Path("./outputs"), help="folder of the run")
    add("--resume", nargs="?", const="auto", help="checkpoint to continue; bare or 'auto': the run's last, if any")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=int, default=500, help="steps between saves of the last checkpoint, besides evaluations")
    add("--top-k", type=int, default=3, help="best models kept")
    add("--export", type=Path, help="file for the best weights, original key names")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    add("--num-workers", type=int, default=4, help="data processes per rank")
    add("--seed", type=int, default=42, help="seed of weights, order, augmentation and dropout")
    add("--check-ranks", action="store_true", help="compare gradients over the ranks in every step (slow)")
    add("--timeout-minutes", type=float, default=30, help="how long ranks and data workers may keep silent")

    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=int, default=50, help="steps between log lines")
    add("--tensorboard", action=onoff, default=False, help="write TensorBoard events")
    add("--wandb-project", help="Weights & Biases project to log to (asked for without a name: the script's own)")
    add("--wandb-mode", choices=["online", "offline", "disabled"], help="where wandb logs, if asked")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = common.parse_with_config(build_parser(), argv)
    args.model_config = None
    if args.csv is None and not args.test_only:
        raise UserError("--csv is missing (the table of volumes and labels)")
    common.check_positive(args)
    common.need_writable([args.export, args.slice_weights])
    for name, least in {"num_slices": 1, "image_size": 1, "slice_chunk": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if not args.pretrained and not args.test_only:
        raise UserError("--pretrained is missing (a weight file, or 'none' with --arch for random weights)")
    return args


def args_from_checkpoint(saved: dict, **overrides) -> argparse.Namespace:
    """The arguments a checkpoint was trained with, except for `overrides` that are not None."""
    args = common.saved_args(build_parser(), saved)
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    for name in ("csv", "data_root", "metadata", "output_dir"):
        setattr(args, name, Path(getattr(args, name)) if getattr(args, name) else None)
    return args


# ==== Data =====================================================================================================


class CTVolumes(Dataset):
    """Rows of one split. An item is keyed by (epoch, index): augmentation is a function of the key alone.

    Item: volume (S, h, w) int16 HU, slices from low to high, rows to the back, columns to the patient's left;
    target (K,) float32, NaN = unknown; index; bad = 1 if the volume could not be read (--on-bad-sample skip); when
    training, theta (2, 3) and gain (2,), the augmentation that the model applies on its device.
    """

    def __init__(self, table, args, train: bool):
        self.args, self.train, self.class_names = args, train, list(args.label_columns)
        self.ids = table["series_id"].tolist()
        self.groups = common.patients_of(table, "series_id")
        self.targets = common.label_array(table, self.class_names, args.csv)  # (n, K)
        sources = common.volume_sources(table, args.csv, args.metadata, args.data_root)
        self.paths, self.options = zip(*sources, strict=True)

    def __len__(self):
        return len(self.ids)

    def read(self, index: int) -> common.Volume:
        reading = {"layout": self.args.layout, "value_range": self.args.value_range, **self.options[index]}
        return common.read_volume(self.paths[index], **reading)

    def notes(self) -> str:
        """What reading the first volume found out: orientation, kind of values, anything odd."""
        try:
            volume = self.read(0)
        except UserError as e:
            return str(e)
        a, facts = volume.array, [f"spacing {volume.spacing} mm", *volume.notes]
        return ", ".join([f"{self.ids[0]}, {a.min()} to {a.max()} HU, shape {a.shape}", *facts])

    def load(self, index: int, jitter: float = 0.0) -> np.ndarray:
        """(S, h, w) int16 HU."""
        a, volume = self.args, self.read(index)
        return common.sample_volume(
            volume.array, volume.spacing, a.num_slices, a.image_size, slice_spacing=a.slice_spacing, jitter=jitter
        )

    def __getitem__(self, key: tuple[int, int]):
        (epoch, index), a = key, self.args
        rng = np.random.default_rng((a.seed, epoch, index))
        augment = self.train and a.augment
        jitter = rng.uniform(-0.5, 0.5) if augment else 0.0
        bad, source = 0, index
        while True:
            try:
                volume = self.load(source, jitter)
                break
            except UserError:
                if a.on_bad_sample == "fail":
                    raise
                bad += 1
                if not self.train:  # an unread case stays in its place, marked, and is reported as missing
                    volume = np.full((a.num_slices, a.image_size, a.image_size), -1000, np.int16)
                    break
                if bad > len(self):
                    raise
                source = (source + 1) % len(self)  # the next row, volume and labels together
        item = {
            "volume": torch.from_numpy(np.ascontiguousarray(volume)),
            "target": torch.from_numpy(self.targets[source]),
            "index": torch.tensor(index),
            "bad": torch.tensor(bad),
        }
        if augment:
            item["theta"], item["gain"] = draw_augmentation(rng)
        return item


def draw_augmentation(rng):
    """In-plane turn by up to 5 degrees, zoom by 5 %, shift by 5 %; HU times 1 +- 5 %, plus up to 30 HU."""
    angle, zoom = math.radians(rng.uniform(-5, 5)), rng.uniform(0.95, 1.05)
    shift = rng.uniform(-0.1, 0.1, 2)  # in units of half an image
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    theta = torch.tensor([[cos, -sin, shift[0]], [sin, cos, shift[1]]], dtype=torch.float32)
    return theta, torch.tensor([rng.uniform(0.95, 1.05), rng.uniform(-30, 30)], dtype=torch.float32)


def read_split(args, split: str, train: bool) -> CTVolumes:
    table = common.read_table(args.csv)
    common.need_columns(table, ["series_id", "split", "img_path"], args.csv)
    twice = table["series_id"][table["series_id"].duplicated()]
    if len(twice):
        raise UserError(f"{args.csv}: row {twice.index[0] + 2}: series_id {twice.iloc[0]} comes twice")
    for leak in common.leaks(table):
        raise UserError(f"{args.csv}: {leak}")
    rows = table[table["split"].str.strip() == split]
    if not len(rows):
        raise UserError(f"{args.csv}: no row has split '{split}' (there are {sorted(set(table['split']))[:5]})")
    return CTVolumes(rows, args, train)


def data_file(args, split: str | None = None) -> Path:
    """The table of the cases; it holds all splits."""
    return args.csv


def build_datasets(args):
    train_set, val_set = read_split(args, "train", True), read_split(args, "val", False)
    missing = [p for d in (train_set, val_set) for p in d.paths if not os.path.exists(p)]
    if missing and args.on_bad_sample == "fail":
        raise UserError(f"{missing[0]}: no such volume ({len(missing)} of the CSV's are missing)")
    return train_set, val_set


def build_eval_dataset(args) -> CTVolumes:
    return read_split(args, args.split, False)


# ==== Model ====================================================================================================


class Attention(nn.Module):
    """Multi-head self-attention, key names of Hugging Face's SiglipAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (n, heads, N, E / heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (n, N, E)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # tanh as in big_vision; timm's configs say erf


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth (arXiv 1603.09382)."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm1, self.self_attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, hidden)

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.drop(self.self_attn(self.layer_norm1(x)))
        return x + self.drop(self.mlp(self.layer_norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head: one learned probe attends to all patches, then an MLP with a skip."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, hidden)

    def forward(self, tokens):
        a = self.attention
        wq, wkv = a.in_proj_weight.tensor_split([len(tokens[0, 0])])
        bq, bkv = a.in_proj_bias.tensor_split([len(tokens[0, 0])])
        q = F.linear(self.probe, wq, bq).unflatten(-1, (a.num_heads, -1)).transpose(1, 2)  # (1, heads, 1, E / heads)
        k, v = F.linear(tokens, wkv, bkv).unflatten(-1, (2, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q.expand(len(tokens), -1, -1, -1), k, v)  # (n, heads, 1, E / heads)
        x = a.out_proj(x.transpose(1, 2).flatten(2))  # (n, 1, E)
        return (x + self.mlp(self.layernorm(x)))[:, 0]  # (n, E)


class SiglipVision(nn.Module):
    """SigLIP image tower: image (n, 3, h, w) in [-1, 1] -> (n, E). Key names of Hugging Face's `vision_model.`.

    A size other than the weights' own interpolates the position table as Hugging Face does (bicubic, no antialias).
    """

    def __init__(self, config: dict, drop_path: float = 0.0):
        super().__init__()
        width, patch, self.grid = config["width"], config["patch"], config["image"] // config["patch"]
        self.embeddings = nn.ModuleDict()
        self.embeddings["patch_embedding"] = nn.Conv2d(3, width, patch, patch)
        self.embeddings["position_embedding"] = nn.Embedding(self.grid**2, width)
        rates = [drop_path * i / max(1, config["layers"] - 1) for i in range(config["layers"])]
        blocks = [Block(width, config["heads"], config["mlp"], rate) for rate in rates]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = nn.LayerNorm(width, eps=1e-6)
        self.head = AttentionPool(width, config["heads"], config["mlp"])
        self.out_width, self.grad_checkpointing = width, False
        self.apply(init_weights)
        nn.init.normal_(self.embeddings["position_embedding"].weight)  # strong, or a random tower is slow to see places
        nn.init.normal_(self.head.probe, std=width**-0.5)

    def positions(self, rows: int, columns: int):
        table = self.embeddings["position_embedding"].weight  # (N, E)
        if (rows, columns) == (self.grid, self.grid):
            return table
        square = table.T.unflatten(1, (self.grid, self.grid))[None]  # (1, E, grid, grid)
        return common.resize_bicubic(square, rows, columns)[0].flatten(1).T

    def tokens(self, image):
        """(n, 3, h, w) -> (n, N, E), after the last norm."""
        x = self.embeddings["patch_embedding"](image)  # (n, E, rows, columns); a rest smaller than a patch is cut off
        x = x.flatten(2).transpose(1, 2) + self.positions(*x.shape[-2:])  # (n, N, E)
        for block in self.encoder["layers"]:
            if self.grad_checkpointing and self.training:
                x = common.checkpointed(block, x)
            else:
                x = block(x)
        return self.post_layernorm(x)

    def forward(self, image):
        return self.head(self.tokens(image))  # (n, E)


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Bottleneck3d(nn.Module):
    """ResNet bottleneck inflated to 3-D: 1x1x1, 3x3x3 (strided), 1x1x1 (StanfordMIMI/Merlin, i3res)."""

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(c_in, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2, self.bn2 = nn.Conv3d(width, width, 3, stride, 1, bias=False), nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, 4 * width, 1, bias=False), nn.BatchNorm3d(4 * width)
        self.downsample = None
        if stride != 1 or c_in != 4 * width:
            conv = nn.Conv3d(c_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm3d(4 * width))

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + skip)


class MerlinResNet(nn.Module):
    """Merlin's image tower without its text-side heads: volume (B, 3, D, H, W) -> (B, 2048)."""

    def __init__(self, config: dict):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        c_in = 64
        for stage, n_blocks in enumerate(config["blocks"]):
            width, blocks = 64 * 2**stage, []
            for i in range(n_blocks):
                blocks.append(Bottleneck3d(c_in, width, 2 if stage and i == 0 else 1))
                c_in = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.out_width, self.grad_checkpointing = c_in, False

    def forward(self, volume):
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(volume))), 3, 2, 1)
        for block in [b for i in range(1, 5) for b in getattr(self, f"layer{i}")]:
            if self.grad_checkpointing and self.training:
                x = common.checkpointed(block, x)
            else:
                x = block(x)
        return x.mean((2, 3, 4))  # (B, 2048)


class SlicePool(nn.Module):
    """Attention over slices for each label (arXiv 1802.04712): softmax over s of w_k . tanh(V f_s + p_s).

    w starts at 0, so that the first pooling is the mean; p_s tells where in the body a slice lies.
    """

    def __init__(self, width: int, num_slices: int, num_labels: int, hidden: int = 128):
        super().__init__()
        self.hidden, self.score = nn.Linear(width, hidden), nn.Linear(hidden, num_labels, bias=False)
        self.position = nn.Parameter(torch.randn(num_slices, hidden))
        nn.init.zeros_(self.score.weight)

    def forward(self, features):
        return self.score(torch.tanh(self.hidden(features) + self.position)).float().softmax(1)  # (B, S, K)


class CTClassifier(nn.Module):
    """volume (B, S, h, w) int16 HU -> logits (B, K). Windowing and augmentation happen here, on the device.

    theta (B, 2, 3), gain (B, 2): augmentation drawn by the data set, or None.
    """

    def __init__(self, args):
        super().__init__()
        config = args.model_config
        self.is_3d, self.channels, self.slice_chunk = config["family"] == "merlin", args.channels, args.slice_chunk
        self.backbone = MerlinResNet(config) if self.is_3d else SiglipVision(config, args.drop_path)
        self.backbone.grad_checkpointing = args.grad_checkpointing
        width = self.backbone.out_width
        n_labels, self.slice_pool = len(args.label_columns), None
        if args.slice_pool == "attention" and not self.is_3d:
            self.slice_pool = SlicePool(width, args.num_slices, n_labels)
        n_pooled = n_labels if self.slice_pool else 1
        self.feature_norm = nn.BatchNorm1d(n_pooled * width, affine=False) if args.feature_norm == "batch" else None
        self.classifier = nn.Sequential(
            nn.Dropout(args.dropout_rate), nn.Linear(width, width // 2), nn.ReLU(),
            nn.Dropout(args.dropout_rate), nn.Linear(width // 2, n_labels),
        )  # fmt: skip
        self.classifier.apply(init_weights)
        centre, size = torch.tensor(windows_of(args)).T
        self.register_buffer("low", (centre - size / 2).view(-1, 1, 1), persistent=False)
        self.register_buffer("width", size.view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True):
        """Frozen parts keep their batch-norm statistics and use no dropout."""
        super().train(mode)
        common.rest_frozen(self)
        return self

    def to_channels(self, volume, theta=None, gain=None):
        """(B, S, h, w) int16 HU -> (B, S, 3, h, w) float32 in [0, 1]."""
        x = volume.float()
        if theta is not None:
            with torch.autocast(x.device.type, enabled=False):  # bf16 coordinates would be off by a pixel
                grid = F.affine_grid(theta, [len(x), 1, *x.shape[-2:]], align_corners=False)
            x = F.grid_sample(x + 1000, grid, align_corners=False) - 1000  # outside is air
            x = (x + 1000) * gain[:, :1, None, None] - 1000 + gain[:, 1:, None, None]
        if self.channels == "neighbours":
            x = F.pad(x[:, None], (0, 0, 0, 0, 1, 1), mode="replicate")[:, 0]  # (B, S + 2, h, w)
            x = torch.stack([x[:, :-2], x[:, 1:-1], x[:, 2:]], 2)  # (B, S, 3, h, w)
        else:
            x = x[:, :, None]
        return ((x - self.low) / self.width).clamp(0, 1)

    def features(self, volume, theta=None, gain=None):
        """-> features (B, K, E) pooled for each label and the weights of the slices (B, S, K); K is 1 if all share."""
        x = self.to_channels(volume, theta, gain)
        B, S = x.shape[:2]
        if self.is_3d:  # Merlin was trained with rows from right to left and columns from back to front
            x = x.transpose(1, 2).flip(-1, -2).transpose(-1, -2)  # (B, 3, S, w, h)
            return self.backbone(x)[:, None], volume.new_full((B, S, 1), 1 / S, dtype=torch.float32)
        x = (2 * x - 1).flatten(0, 1)  # (B * S, 3, h, w)
        chunks = x.split(self.slice_chunk) if self.slice_chunk else [x]
        f = torch.cat([self.backbone(c) for c in chunks]).unflatten(0, (B, S))  # (B, S, E)
        weights = self.slice_pool(f) if self.slice_pool else f.new_full((B, S, 1), 1 / S)
        return torch.einsum("bsk,bse->bke", weights, f.float()), weights

    def classify(self, features):
        """(B, K or 1, E) -> logits (B, K): the k-th output for the features pooled for label k."""
        if self.feature_norm is not None:
            features = self.feature_norm(features.flatten(1)).view_as(features)
        hidden, last = self.classifier[:-1](features), self.classifier[-1]
        return (hidden * last.weight).sum(-1) + last.bias

    def forward(self, volume, theta=None, gain=None):
        return self.classify(self.features(volume, theta, gain)[0])


def windows_of(args) -> list[tuple[float, float]]:
    """--windows -> [(centre, width)] in HU: three for --channels windows, one for neighbours."""
    names = args.windows or (["lung", "mediastinum", "bone"] if args.channels == "windows" else ["wide"])
    wanted = 3 if args.channels == "windows" else 1
    if len(names) != wanted:
        raise UserError(f"--windows: {len(names)} given, --channels {args.channels} takes {wanted}")
    return common.parse_windows(names)


def backbone_weights(state: dict, source: str) -> tuple[str, dict]:
    """State dict in any of the known layouts -> (family, state in the names of SiglipVision or MerlinResNet).

    Layouts: Hugging Face v4 and v5, with or without text tower; timm and open_clip; big_vision npz, plain and scanned;
    Merlin, also inside the `visual.` wrapper of the document's pretraining; our own checkpoints.
    """
    if any(k.endswith("layer4.0.conv1.weight") and v.ndim == 5 for k, v in state.items()):
        prefix = next(k for k in state if k.endswith("layer4.0.conv1.weight")).removesuffix("layer4.0.conv1.weight")
        return "merlin", {
            k.removeprefix(prefix): v
            for k, v in state.items()
            if k.startswith(prefix) and not k.startswith((prefix + "classifier.", prefix + "contrastive_head."))
        }
    if any("MAPHead_0" in k for k in state):
        state = from_big_vision(state)
    elif any(k.endswith("blocks.0.attn.qkv.weight") for k in state):
        state = from_timm(state)
    anchor = "embeddings.patch_embedding.weight"
    prefixes = [k.removesuffix(anchor) for k in state if k.endswith(anchor)]
    if not prefixes:
        raise UserError(f"{source}: neither a SigLIP nor a Merlin image tower (its first key is {next(iter(state))})")
    parts = ("embeddings.", "encoder.", "post_layernorm.", "head.")
    mine = {k.removeprefix(prefixes[0]): v for k, v in state.items() if k.startswith(prefixes[0])}
    return "siglip", {k: v for k, v in mine.items() if k.startswith(parts) and not k.endswith("position_ids")}


def from_timm(state: dict) -> dict:
    """timm `vit_*_siglip_*` names, also inside open_clip's `visual.trunk.`; q, k, v are stacked in this order."""
    prefix = next(k for k in state if k.endswith("blocks.0.attn.qkv.weight")).removesuffix("blocks.0.attn.qkv.weight")
    out = {}
    for key, v in state.items():
        if not key.startswith(prefix):
            continue
        k = key.removeprefix(prefix)
        if k.startswith("attn_pool.q."):
            name = "weight" if k.endswith("weight") else "bias"
            out[f"head.attention.in_proj_{name}"] = torch.cat([v, state[f"{prefix}attn_pool.kv.{name}"]])
        elif ".attn.qkv." in k:
            layer, name = k.split(".")[1], k.rsplit(".", 1)[1]
            for part, piece in zip("qkv", v.chunk(3), strict=True):
                out[f"encoder.layers.{layer}.self_attn.{part}_proj.{name}"] = piece
        elif k == "pos_embed":
            out["embeddings.position_embedding.weight"] = v[0]
        elif not k.startswith("attn_pool.kv."):
            for old, new in (
                ("patch_embed.proj.", "embeddings.patch_embedding."), ("blocks.", "encoder.layers."),
                (".attn.proj.", ".self_attn.out_proj."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
                ("attn_pool.latent", "head.probe"), ("attn_pool.proj.", "head.attention.out_proj."),
                ("attn_pool.norm.", "head.layernorm."), ("attn_pool.mlp.", "head.mlp."),
            ):  # fmt: skip
                k = k.replace(old, new)
            out["post_layernorm." + k.removeprefix("norm.") if k.startswith("norm.") else k] = v
    return out


def from_big_vision(state: dict) -> dict:
    """big_vision npz names (flax): kernels are (in, out), attention kernels (E, heads, head) or (heads, head, E)."""
    flat = {
        k.removeprefix("params/").removeprefix("img/"): v for k, v in state.items() if not k.startswith("params/txt")
    }
    scanned = "Transformer/encoderblock/"
    for k in [k for k in flat if k.startswith(scanned)]:  # one block with a leading depth axis
        stacked = flat.pop(k)
        flat.update({f"Transformer/encoderblock_{i}/{k.removeprefix(scanned)}": v for i, v in enumerate(stacked)})
    width = flat["embedding/bias"].shape[0]

    def linear(name, out):
        kernel, bias = flat[f"{name}/kernel"], flat[f"{name}/bias"].reshape(-1)
        return {f"{out}.weight": kernel.reshape(-1, len(bias)).T.contiguous(), f"{out}.bias": bias}

    def norm(name, out):
        return {f"{out}.weight": flat[f"{name}/scale"], f"{out}.bias": flat[f"{name}/bias"]}

    out = {
        "embeddings.patch_embedding.weight": flat["embedding/kernel"].permute(3, 2, 0, 1).contiguous(),
        "embeddings.patch_embedding.bias": flat["embedding/bias"],
        "embeddings.position_embedding.weight": flat["pos_embedding"].reshape(-1, width),
        **norm("Transformer/encoder_norm", "post_layernorm"),
    }
    for i in range(sum(k.endswith("LayerNorm_0/scale") and "encoderblock_" in k for k in flat)):
        theirs, ours = f"Transformer/encoderblock_{i}", f"encoder.layers.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        out |= norm(f"{theirs}/LayerNorm_0", f"{ours}.layer_norm1") | norm(
            f"{theirs}/LayerNorm_1", f"{ours}.layer_norm2"
        )
        for part in ("query", "key", "value", "out"):
            out |= linear(f"{attention}/{part}", f"{ours}.self_attn.{part[0] if part != 'out' else part}_proj")
        for j in (0, 1):
            out |= linear(f"{theirs}/MlpBlock_0/Dense_{j}", f"{ours}.mlp.fc{j + 1}")
    pool = "MAPHead_0/MultiHeadDotProductAttention_0"
    qkv = [linear(f"{pool}/{part}", "x") for part in ("query", "key", "value")]
    out["head.probe"] = flat["MAPHead_0/probe"].reshape(1, 1, width)
    out["head.attention.in_proj_weight"] = torch.cat([p["x.weight"] for p in qkv])
    out["head.attention.in_proj_bias"] = torch.cat([p["x.bias"] for p in qkv])
    out |= linear(f"{pool}/out", "head.attention.out_proj") | norm("MAPHead_0/LayerNorm_0", "head.layernorm")
    return (
        out
        | linear("MAPHead_0/MlpBlock_0/Dense_0", "head.mlp.fc1")
        | linear("MAPHead_0/MlpBlock_0/Dense_1", "head.mlp.fc2")
    )


def config_of(family: str, state: dict, source: str) -> dict:
    """Architecture from the shapes of a state dict in our names; the number of heads from config.json or by width."""
    if family == "merlin":
        blocks = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
        return {"family": family, "blocks": blocks, "image": 224}
    try:
        patches = state["embeddings.patch_embedding.weight"]
        width, _, patch, _ = patches.shape
        grid = math.isqrt(len(state["embeddings.position_embedding.weight"]))
        mlp = len(state["encoder.layers.0.mlp.fc1.bias"])
    except (KeyError, ValueError) as e:
        raise UserError(f"{source}: not a whole SigLIP image tower ({e}; NaFlex weights are not supported)") from e
    layers = len({k.split(".")[2] for k in state if k.startswith("encoder.layers.")})
    heads = {96: 4, 1152: 16, 1536: 16}.get(width, max(1, width // 64))
    config_file = Path(source) / "config.json" if Path(source).is_dir() else Path(source).parent / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            heads = config.get("vision_config", config).get("num_attention_heads", heads)
            fits = width % heads == 0
        except (ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
            fits = False
        if not fits:
            raise UserError(f"{config_file}: not the config of these weights of width {width} (num_attention_heads)")
    image = 384 if (grid, patch) == (27, 14) else grid * patch  # so400m: 378 of the 384 pixels are used
    return {"family": family, **dict(zip(VIT, (width, layers, heads, mlp, patch, image), strict=True))}


def export_weights(model: CTClassifier) -> dict:
    """The backbone in the names of the file it came from: Hugging Face's `vision_model.`, or Merlin's."""
    prefix = "visual.model.encode_image.i3_resnet." if model.is_3d else "vision_model."
    return {prefix + k: v.contiguous() for k, v in model.backbone.state_dict().items()}


def prepare_config(args, say=print) -> dict | None:
    """Settle args.model_config, num_slices and image_size; return the pretrained backbone's state, if any."""
    state = None
    if args.model_config is None:
        if args.pretrained == "none":
            if not args.arch:
                raise UserError(f"--pretrained none needs --arch (one of {', '.join(ARCHS)})")
            args.model_config = ARCHS[args.arch]
        else:
            family, state = backbone_weights(common.load_weights(args.pretrained), args.pretrained)
            args.model_config = config_of(family, state, args.pretrained)
            if args.arch and args.model_config != ARCHS[args.arch]:
                raise UserError(f"--arch {args.arch} is not what {args.pretrained} holds: {args.model_config}")
        say(f"model: {args.model_config}")
    args.image_size = args.image_size or args.model_config["image"]
    if args.image_size < args.model_config.get("patch", 1):
        raise UserError(f"--image-size {args.image_size}: smaller than a patch, {args.model_config['patch']} pixels")
    args.num_slices = args.num_slices or (160 if args.model_config["family"] == "merlin" else 32)
    return state


def build_model(args, say=print) -> CTClassifier:
    state = prepare_config(args, say)
    model = CTClassifier(args)
    if state is not None:
        common.apply_weights(model.backbone, state, args.pretrained, allow_partial=args.allow_partial, say=say)
    return model


def build_eval_model(saved: dict, args, device) -> CTClassifier:
    """The model of a checkpoint: its averaged weights where it has them."""
    return common.filled(lambda: CTClassifier(args), saved).to(device).eval()


def forward_flops(model, args) -> float:
    """Floating-point operations of one volume's forward pass, counted on the meta device."""
    side = args.image_size
    with FlopCounterMode(display=False) as counter:
        deepcopy(model).to("meta").eval()(torch.empty(1, args.num_slices, side, side, device="meta"))
    return counter.get_total_flops()


def layers_in_order(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that own parameters, in forward order: the layers that --freeze-up-to counts."""
    return [(name, m) for name, m in backbone.named_modules() if next(m.parameters(recurse=False), None) is not None]


def set_trainable(model, args, epoch: int, say=print) -> bool:
    """Freeze and unfreeze for this epoch; True if that changed anything."""
    layers = layers_in_order(model.backbone)
    if not 0 <= args.freeze_up_to <= len(layers):
        raise UserError(f"--freeze-up-to {args.freeze_up_to}: the backbone has {len(layers)} layers")
    n_frozen = len(layers) if epoch < args.head_only_epochs else args.freeze_up_to
    before = [p.requires_grad for p in model.parameters()]
    for i, (_, layer) in enumerate(layers):
        for p in layer.parameters(recurse=False):
            p.requires_grad_(i >= n_frozen)
    changed = before != [p.requires_grad for p in model.parameters()]
    if changed and n_frozen:
        say(f"frozen: the first {n_frozen} of {len(layers)} layers, {layers[0][0]} to {layers[n_frozen - 1][0]}")
    elif changed:
        say("frozen: nothing")
    return changed


def depth_of(name: str, model) -> int:
    """Depth of a parameter for --layer-decay: 0 for the embeddings, 1 ... L for the blocks, L + 1 for the head."""
    blocks = [n for n, m in model.backbone.named_modules() if isinstance(m, (Block, Bottleneck3d))]
    for depth, block in enumerate(blocks, 1):
        if name.startswith(f"backbone.{block}."):
            return depth
    early = ("backbone.embeddings.", "backbone.conv1.", "backbone.bn1.")
    return 0 if name.startswith(early) else len(blocks) + 1


# ==== Loss and optimizer =======================================================================================


class MultiLabelLoss(nn.Module):
    """Mean loss over the known labels: logits, targets (B, K), targets NaN or negative where unknown."""

    def __init__(self, args, targets):
        super().__init__()
        self.args = args
        self.register_buffer("pos_weight", None)
        if args.loss == "balanced":
            self.pos_weight = common.balanced_weights(torch.as_tensor(targets), args.max_pos_weight)

    def forward(self, logits, targets):
        a = self.args
        if a.loss == "focal":
            return common.focal_loss(logits, targets, a.focal_alpha, a.focal_gamma, form=a.focal_form)
        if a.loss == "asl":
            return common.asymmetric_loss(
                logits, targets, a.asl_gamma_neg, a.asl_gamma_pos, a.asl_clip, reduction="mean"
            )
        return common.bce_loss(logits, targets, pos_weight=self.pos_weight)

    def count(self, batch):
        """What the mean is over; sums of it join micro-batches and ranks."""
        return common.known(batch["target"]).sum()


def build_criterion(args, train_set):
    return MultiLabelLoss(args, train_set.targets)


def build_optimizer(model, args):
    """Parameter groups by depth and by decay: none for norms, biases, positions and the probe."""
    groups = {}
    last = max(depth_of(n, model) for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim >= 2 and not name.endswith(NO_DECAY) else 0.0
        scale = args.layer_decay ** (last - depth_of(name, model))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(p)
    if args.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=args.lr, momentum=0.9)
    return torch.optim.AdamW(list(groups.values()), lr=args.lr, fused=True)


def compute_loss(net, batch, criterion):
    logits = net(batch["volume"], batch.get("theta"), batch.get("gain"))  # (B, K)
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


@torch.no_grad()
def predict(model, dataset, ctx, say=None) -> dict:
    """Logits of every case, each exactly once: the same on every rank and, to the last digit, for any number of ranks.

    -> ids, groups, targets, probs (n, K) of the cases; logits (n, K), slice_weights (n, S, K or 1) float32; failed:
    indices of unreadable cases, whose rows are NaN.
    """
    args = dataset.args
    batches = common.eval_batches(len(dataset), args.eval_batch_size or args.batch_size, ctx)
    loader = common.data_loader(dataset, [[(0, i) for i in b] for b in batches], args, ctx)
    rows = []
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        for batch in tqdm(loader, desc=say, leave=False, disable=None if say and ctx.master else True):
            features, weights = model.features(batch["volume"].to(ctx.device, non_blocking=True))
            bad = batch["bad"][:, None].float()
            rows.append(torch.cat([bad, model.classify(features).float().cpu(), weights.float().flatten(1).cpu()], 1))
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)  # (n, 1 + K + S * K)
    failed, rows = rows[:, 0] > 0, rows[:, 1:]
    if not rows[~failed].isfinite().all():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    rows[failed] = math.nan
    logits, weights = rows[:, : len(dataset.class_names)], rows[:, len(dataset.class_names) :]
    return {
        "ids": dataset.ids,
        "groups": dataset.groups,
        "targets": dataset.targets,
        "logits": logits,
        "probs": logits.double().sigmoid().numpy(),
        "slice_weights": weights.unflatten(1, (args.num_slices, -1)),
        "failed": failed.nonzero()[:, 0].tolist(),
    }


def evaluate(model, dataset, criterion, ctx) -> dict[str, float]:
    """Metrics at --threshold over the cases that could be read, with their number; the same on every rank."""
    model.eval()
    out = predict(model, dataset, ctx, "evaluation")
    read = ~out["logits"].isnan().any(1)
    if not read.any():
        raise UserError("no volume of the validation split could be read")
    targets = dataset.targets[read.numpy()]
    loss = criterion(out["logits"][read].to(ctx.device), torch.from_numpy(targets).to(ctx.device))
    threshold = 0.5 if dataset.args.threshold is None else dataset.args.threshold
    metrics = common.multilabel_metrics(targets, out["probs"][read.numpy()], dataset.class_names, threshold)
    return {"val_loss": float(loss), "n_missing": len(out["failed"]), **metrics}


def tune_thresholds(model, dataset, ctx) -> dict[str, list[float]]:
    """The threshold of each label with the best F1 on the validation split, and its temperature."""
    model.eval()
    out = predict(model, dataset, ctx, "thresholds")
    read = ~out["logits"].isnan().any(1).numpy()
    return common.fit_to_validation(np.array(dataset.ids)[read], dataset.targets[read], out["probs"][read])


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
    """Thresholds for the best model, which is still in memory; best_model.pth and the export."""
    if not best.entries:
        raise UserError(f"{args.output_dir}: none of the run's best models is here (resume in the run's own folder)")
    entry, checkpoint = best.entries[0], best.memory[best.entries[0]["path"]]
    model.load_state_dict(checkpoint["model"])
    checkpoint |= tune_thresholds(model, val_set, ctx)
    if ctx.master:
        save_checkpoint(args.output_dir / BEST, checkpoint)
        if args.export:
            common.save_weights(args.export, export_weights(model))
    log.info(f"best: step {entry['step']}, {args.monitor} {abs(entry['score']):.4f} -> {args.output_dir / BEST}")
    log.close()
    return 0


# ==== Main =====================================================================================================


def test(args, ctx) -> int:
    """--test-only: score one split with a checkpoint and write the predictions."""
    saved = common.load_checkpoint(args.test_only)
    own = ("csv", "data_root", "metadata", "threshold", "split", "batch_size", "eval_batch_size", "num_workers", "amp")
    model_args = args_from_checkpoint(saved, **{k: getattr(args, k) for k in own}, on_bad_sample="skip")
    dataset = build_eval_dataset(model_args)
    out = predict(build_eval_model(saved, model_args, ctx.device), dataset, ctx, "prediction")
    code = 3 if out["failed"] else 0
    if not ctx.master:
        ctx.barrier()  # torchrun ends the others once one leaves
        return code
    thresholds, source = common.choose_thresholds(args.threshold, saved)
    path = Path(args.test_output) if "/" in args.test_output else args.output_dir / args.test_output
    common.make_folder(path.parent)
    common.write_csv(path, common.prediction_table(dataset.ids, out["probs"], dataset.class_names, thresholds))
    if args.slice_weights:
        common.write_atomic(args.slice_weights, lambda f: np.savez(f, id=dataset.ids, weights=out["slice_weights"]))
    read = np.isfinite(out["probs"]).all(1)
    metrics = common.multilabel_metrics(dataset.targets[read], out["probs"][read], dataset.class_names, thresholds)
    print(" - ".join(f"{k}: {metrics[k]:.4f}" for k in SHOWN) + f" (threshold {source})")
    print(f"{read.sum()} of {len(read)} cases -> {path}")
    for i in out["failed"]:
        print(f"failed: {dataset.ids[i]}: {dataset.paths[i]}", file=sys.stderr)
    ctx.barrier()
    return code


def main(argv=None) -> int:
    args = parse_args(argv)
    common.set_deterministic(args.deterministic)
    with common.process_group(args.device, args.timeout_minutes) as ctx:
        return test(args, ctx) if args.test_only else train(args, ctx)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
