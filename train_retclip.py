"""Train RET-CLIP: left and right fundus photographs and their reports in one space, for retrieval and zero-shot labels.

Model    one ViT for both eyes and BERT, with three heads (patient, left, right), as in RET-CLIP: it loads ret-clip.pt,
         Chinese-CLIP, OpenAI CLIP and BERT files, with a table of what fitted, and writes what the original reads
Papers   RET-CLIP arXiv 2405.14137, Chinese-CLIP arXiv 2211.01335, FLIP arXiv 2212.00794, gradient cache arXiv
         2101.06983; github.com/sStonemason/RET-CLIP, github.com/OFA-Sys/Chinese-CLIP
Data     --train-data and --val-data: an LMDB of prepare_retclip.py, RET-CLIP or Chinese-CLIP (lmdb/train, with imgs/
         and pairs/), or data/train for data/train_imgs.tsv and data/train_texts.jsonl; nothing in them can run code.
         Classes, if any, from labels.csv in the LMDB's folder (data/train_labels.csv): image_id, patient_id, label, ...
Weights  --pretrained (both towers), --vision-pretrained, --text-pretrained; --vocab: any BERT vocab.txt
CPU      python demo_data.py fundus --out demo/fundus
         python prepare_retclip.py --csv demo/fundus/pairs.csv --split-column split --out demo/data --lmdb demo/lmdb
         python train_retclip.py --train-data demo/lmdb/train --val-data demo/lmdb/val --vision-model tiny \\
             --text-model tiny --vocab demo/fundus/vocab.txt --batch-size 16 --lr 5e-4 --warmup 30
1 GPU    python train_retclip.py --train-data lmdb/train --val-data lmdb/val --vocab vocab.txt --amp \\
             --pretrained ret-clip.pt --batch-size 64 --accum-steps 4         # 256 pairs in one loss, by gradient cache
N GPUs   torchrun --nproc_per_node N -- train_retclip.py ... (--batch-size is per process; the loss is over all of them)
Resume   the same command with --resume auto: bit for bit as if never stopped; --resume .../epoch4.pt goes back to that
Writes   in logs/NAME: checkpoints/epoch_latest.pt, epoch{N}.pt (every --save-epoch-frequency), best_epoch*.pt (top k),
         best_model.pt; out_*.log and params_*.txt (one a start), results.jsonl
"""

import argparse
import base64
import binascii
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import time
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import lmdb
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.csgraph import connected_components
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import Progress, RunLog, StopSignal, TopK, UserError, save_checkpoint, seed_everything

TASK, MONITOR = "retclip", "mean_recall"
SHOWN = ("mean_recall", "class_map")  # of an evaluation, on the console
STARTED = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
LOG, PARAMS, RESULTS = f"out_{STARTED}.log", f"params_{STARTED}.txt", "results.jsonl"
LAST, EPOCH = "checkpoints/epoch_latest.pt", "checkpoints/epoch{epoch}.pt"
TOP, BEST = "checkpoints/best_epoch{epoch}.pt", "checkpoints/best_model.pt"
TENSORBOARD = "tensorboard"
WANDB_PROJECT = "retclip"
# A checkpoint can only be continued or evaluated with these as they were.
FIXED_ARGS = ["model_config", "vision_model", "text_model", "image_size", "monocular", "max_text_length"]
FIXED_ARGS += ["weight_decay", "layer_decay", "official_decay", "use_ema"]

LEVELS = ("patient", "left", "right")  # of the features; one photograph a patient (monocular): the first alone
HEADS = (
    "text_projection",
    "global_feature_mapping",
    "left_feature_mapping",
    "right_feature_mapping",
    "logit_scale",
)  # in no file but RET-CLIP's own
TEMPLATES = ["Both eyes: {}."]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of RGB in [0, 1], as CLIP
GREY = (0.299, 0.587, 0.114)
MAX_PIXELS = 80_000_000  # of one photograph
FORMATS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"]  # Pillow would hand PostScript to a program that runs it
KS = (1, 5, 10)  # of the retrieval
SWAP = {"left": "right", "right": "left", "os": "od", "od": "os", "左": "右", "右": "左"}

VIT = ("embed", "image_size", "layers", "width", "patch", "head_width", "logit_scale")
VISION = {
    "ViT-B-16": (512, 224, 12, 768, 16, 64, 4.5), "ViT-B-32": (512, 224, 12, 768, 32, 64, 4.5),
    "ViT-L-14": (768, 224, 24, 1024, 14, 64, 4.5), "ViT-L-14-336": (768, 336, 24, 1024, 14, 64, 4.5),
    "ViT-H-14": (1024, 224, 32, 1280, 14, 80, 4.5), "ViT-S-8": (512, 224, 12, 384, 8, 64, 4.5),
    "tiny": (256, 32, 2, 192, 16, 32, 2.66),
}  # fmt: skip
BERT = ("hidden", "layers", "heads", "ffn", "positions", "dropout")  # as many words as the weights or --vocab have
TEXT = {
    "RoBERTa-wwm-ext-base-chinese": (768, 12, 12, 3072, 512, 0.1),
    "RoBERTa-wwm-ext-large-chinese": (1024, 24, 16, 4096, 512, 0.1),
    "RBT3-chinese": (768, 3, 12, 3072, 512, 0.1),
    "tiny": (64, 2, 4, 256, 512, 0.0),
}


# ==== Arguments ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", help="YAML or INI files of defaults; the command line wins")
    onoff = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--train-data", type=Path, help="training data (kinds: see the script's head)")
    add("--valid-data", "--val-data", type=Path, help="the same for validation")
    add("--max-text-length", "--context-length", type=int, default=100, help="tokens of a report that are read")
    add("--augment", "--use-augment", action=onoff, default=True, help="augment training images")
    add("--flip", action="store_true", help="mirror half of the pairs: sides change places, in the report as well")
    add("--monocular", action=onoff, help="one photograph a patient (as the data are); --no-: it stands for both eyes")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="what an unreadable sample does")
    add("--max-bad-fraction", type=float, default=0.05, help="share of unreadable samples that ends a run")

    add = parser.add_argument_group("model").add_argument
    add("--vision-model", choices=list(VISION), default="ViT-B-16", help="sizes of the image encoder")
    add("--text-model", choices=list(TEXT), default="RoBERTa-wwm-ext-base-chinese", help="sizes of the text encoder")
    add("--image-size", type=int, help="side of an image in pixels")
    add("--pretrained", default="none", help="weights to begin with (kinds: see the script's head), or 'none'")
    add("--vision-pretrained", "--clip-weight-path", help="weights of the image encoder alone: CLIP file or folder")
    add(
        "--text-pretrained", "--bert-weight-path",
        help="weights of the text encoder alone: BERT file, Hugging Face folder or hub id",
    )  # fmt: skip
    add("--vocab", type=Path, help="vocab.txt or tokenizer.json of the text encoder, or its folder")
    add("--allow-partial", action="store_true", help="accept weights that lack part of the backbone")
    add("--text-dropout", type=float, help="dropout in the text encoder (that of the preset)")
    add("--mask-ratio", type=float, default=0.0, help="share of the patches that training leaves out (FLIP)")
    add("--freeze-text", action="store_true", help="freeze the text encoder")
    add("--freeze-vision", action="store_true", help="freeze the image encoder")
    add("--freeze-layers", type=int, default=0, metavar="N", help="first blocks of both encoders that rest")

    add = parser.add_argument_group("loss").add_argument
    add("--level-weights", type=float, nargs=3, default=[1, 1, 1], metavar="W", help="of patient, left and right")
    add("--max-logit-scale", type=float, default=100.0, help="bound of the logits' scale, exp(temperature)")
    add(
        "--same-text", type=float, default=1.0, metavar="SHARE",
        help="common share of word pairs from which reports are the same, and positives of each other (0: never)",
    )  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", "--max-epochs", type=int, default=10, help="passes over the training data")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs (0: by epochs)")
    add("--batch-size", type=int, default=64, help="samples per process and micro-step")
    add(
        "--accum-steps", "--gradient-accumulation-steps", "--accum-freq", type=int, default=1,
        help="micro-steps per step",
    )  # fmt: skip
    add("--lr", "--learning-rate", type=float, default=3e-5, help="peak learning rate")
    add("--weight-decay", "--wd", type=float, default=0.001, help="decay of matrices (not norms, biases, positions)")
    add("--official-decay", action="store_true", help="decay BERT's norms and all embeddings, as the original does")
    add("--layer-decay", type=float, default=1.0, help="rate of a layer as a share of the layer above")
    add("--scheduler", choices=["cosine", "plateau", "constant"], default="cosine", help="learning rate after warm-up")
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="end of the cosine as a share of --lr")
    add("--plateau-patience", type=int, default=5, help="evaluations without gain before the rate falls")
    add("--plateau-factor", type=float, default=0.5, help="what the rate is multiplied by on a plateau")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add("--max-bad-steps", type=int, default=20, help="non-finite steps in a row that end the run")
    add("--use-ema", action="store_true", help="judge and keep a moving average of the weights")
    add("--ema-decay", type=float, default=0.999, help="decay of the average, reached after a warm-up")
    add("--early-stopping-patience", type=int, default=100, help="evaluations without gain before the end")

    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--amp", nargs="?", const="auto", choices=["none", "auto", "fp16", "bf16"], default="none",
        help="autocast type; bare --amp takes the best of the device",
    )  # fmt: skip
    add("--grad-cache-chunk", type=int, default=0, help="pairs in memory at a time (--batch-size): gradient cache")
    add("--compile", action=onoff, help="torch.compile the model (on CUDA)")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--use-flash-attention", action="store_true", help="take no slow attention kernel on CUDA: an error instead")
    add("--deterministic", action="store_true", help="bit-exact CUDA kernels, at a cost in speed")

    add = parser.add_argument_group("evaluation").add_argument
    names = ["mean_recall", "class_map", "class_recall_at_1", "val_loss"]
    add("--monitor", choices=names, default=MONITOR, help="what best means")
    add("--templates", type=Path, help="file of prompts with {} for the class, one a line (" + TEMPLATES[0] + ")")
    add(
        "--eval-batch-size", "--valid-batch-size", type=int, default=0,
        help="samples per evaluation batch (--batch-size)",
    )  # fmt: skip
    add("--eval-every", "--valid-step-interval", type=int, default=0, help="steps between evaluations (0: an epoch)")

    add = parser.add_argument_group("checkpoint").add_argument
    add("--logs", type=Path, default=Path("logs"), help="folder of the runs")
    add("--name", default="retclip_training", help="name of the run's folder in it")
    add("--output-dir", type=Path, help="folder of the run")
    add("--resume", nargs="?", const="auto", help="checkpoint to continue; bare or 'auto': the run's last, if any")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=int, default=500, help="steps between saves of the last checkpoint, besides evaluations")
    add("--save-epoch-frequency", type=int, default=2, metavar="N", help="epochs between checkpoints that stay")
    add("--top-k", type=int, default=1, help="best models kept")
    add("--export", type=Path, help="file for the best weights, original key names")
    add("--convert", type=Path, help="write --pretrained as a checkpoint for evaluate.py, and end")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    add("--num-workers", type=int, default=4, help="data processes per rank")
    add("--seed", type=int, default=123, help="seed of weights, order, augmentation and dropout")
    add("--check-ranks", action="store_true", help="compare gradients over the ranks in every step (slow)")
    add("--timeout-minutes", type=float, default=30, help="how long ranks and data workers may keep silent")

    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=int, default=10, help="steps between log lines")
    add("--tensorboard", action=onoff, default=False, help="write TensorBoard events")
    add("--wandb-project", help="Weights & Biases project to log to (asked for without a name: the script's own)")
    add("--wandb-mode", choices=["online", "offline", "disabled"], help="where wandb logs, if asked")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = common.parse_with_config(build_parser(), argv)
    args.model_config, args.tokenizer, args.split = None, None, "valid"
    args.output_dir = args.output_dir or args.logs / args.name
    args.templates = read_templates(args.templates)
    common.check_positive(args)
    common.need_writable([args.export])
    for name in ("grad_cache_chunk", "freeze_layers"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if args.save_epoch_frequency < 1 or args.max_text_length < 3 or not args.max_logit_scale > 1:
        raise UserError("--save-epoch-frequency must be at least 1, --max-text-length 3, --max-logit-scale above 1")
    if not (0 <= args.mask_ratio < 1 and 0 <= args.same_text <= 1 and 0 < args.layer_decay <= 1):
        raise UserError("--mask-ratio is below 1, --same-text at most 1, --layer-decay above 0 and at most 1")
    if not all(w >= 0 for w in args.level_weights) or not args.level_weights[0]:
        raise UserError("--level-weights must not be negative, and that of the patient level above 0")
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size {args.image_size}: must be at least 1 pixel")
    for name in ["vocab"] + ([] if args.convert else ["train_data", "valid_data"]):
        if getattr(args, name) is None:
            flag = {"vocab": "--vocab", "train_data": "--train-data", "valid_data": "--val-data"}[name]
            raise UserError(f"{flag} is missing ({build_parser()._option_string_actions[flag].help})")
    return args


def read_templates(given) -> list[str]:
    """Prompts from a file, one a line, each with {}; TEMPLATES for None; a list as it is."""
    if given is None or isinstance(given, list):
        return given or TEMPLATES
    try:
        lines = [line.strip() for line in Path(given).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{given}: not a readable file of prompts ({getattr(e, 'strerror', '') or 'not UTF-8'})") from e
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or not all("{}" in line for line in lines):
        raise UserError(f"{given}: a prompt with {{}} for the class on each line was expected")
    return lines


def args_from_checkpoint(saved: dict, **overrides) -> argparse.Namespace:
    """The arguments a checkpoint was trained with, except for `overrides` that are not None."""
    args = common.saved_args(build_parser(), saved)
    args.tokenizer = saved["tokenizer"]
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    args.templates = read_templates(args.templates)
    for name in ("train_data", "valid_data", "output_dir"):
        setattr(args, name, Path(getattr(args, name)) if getattr(args, name) else None)
    return args


# ==== Data =====================================================================================================


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text and tuples of them; a pickle that names any class or function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"names {module}.{name}")


def plain_pickle(value: bytes, kinds: tuple, where: str) -> tuple:
    """A pickled tuple of these types."""
    try:
        found = PlainUnpickler(io.BytesIO(value)).load()
    except Exception as e:  # a crafted pickle can raise anything
        raise UserError(f"{where}: refused, not plain data ({e})") from e
    if type(found) is not tuple or len(found) != len(kinds) or not all(map(isinstance, found, kinds)):
        raise UserError(f"{where}: not what RET-CLIP or Chinese-CLIP writes there")
    return found


def from_base64(text: str | bytes, where: str) -> bytes:
    """Both alphabets are read: RET-CLIP's files have the URL-safe one, Chinese-CLIP's guide the other."""
    try:
        return base64.urlsafe_b64decode(text)
    except (binascii.Error, ValueError) as e:
        raise UserError(f"{where}: not base64 ({e})") from e


class LMDBImages:
    """Photographs of an LMDB folder: imgs/, where RET-CLIP pickles two base64 texts an id, Chinese-CLIP stores one."""

    def __init__(self, folder: Path):
        self.path = folder / "imgs"

    def get(self, name) -> list[bytes] | None:
        """Image files of an id, left and right (b'' = missing), or of the one photograph; None: no such id."""
        where, value = f"{self.path}: image {name}", lmdb_value(self.path, name)
        if value is None:
            return None
        parts = plain_pickle(value, (str, str), where) if value[:1] == b"\x80" else (value,)
        return [from_base64(part, where) for part in parts]

    def names(self) -> set[str]:
        """Ids of all images; read without their values."""
        try:
            with open_lmdb(self.path).begin(buffers=True) as txn:
                found = {bytes(key).decode(errors="replace") for key in txn.cursor().iternext(values=False)}
        except lmdb.Error as e:
            raise UserError(f"{self.path}: not a whole LMDB ({e}; copy or build it again)") from e
        return found - {"num_images"}


class TSVImages:
    """Photographs of {split}_imgs.tsv: an id and one or two base64 texts a line; found by an index of their places."""

    def __init__(self, path: Path):
        self.path, self.places, self.file, self.pid, position = path, {}, None, None, 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                start = 3 if line.startswith(b"\xef\xbb\xbf") else 0  # the mark of some editors
                name = line[start : line.find(b"\t")].decode(errors="replace") if b"\t" in line else ""
                if not name or name in self.places:
                    raise UserError(
                        f"{path}: line {number}: " + (f"id {name} comes twice" if name else "no id and tab")
                    )
                self.places[name] = position, len(line)
                position += len(line)

    def get(self, name) -> list[bytes] | None:
        """As LMDBImages.get."""
        if str(name) not in self.places:
            return None
        if self.pid != os.getpid():
            self.file, self.pid = self.path.open("rb"), os.getpid()
        position, size = self.places[str(name)]
        fields = os.pread(self.file.fileno(), size, position).rstrip(b"\r\n").split(b"\t")[1:]
        if len(fields) > 2:
            raise UserError(f"{self.path}: image {name}: {len(fields)} images (one, or left and right, was expected)")
        return [from_base64(field, f"{self.path}: image {name}") for field in fields]

    def names(self) -> set[str]:
        return set(self.places)

    def __getstate__(self):
        return {**vars(self), "file": None, "pid": None}


CHECKED = set()  # LMDB folders whose pages were checked, by this process or the one that it was forked from
OPEN = {}  # path -> (process, environment): LMDB wants one a process, and none that has passed a fork


def check_pages(file, size: int, root: int, last: int) -> None:
    """Raise ValueError if a page of LMDB (format 1) points out of the file: the library would follow, and crash."""
    waiting, seen = [root] if root < 2**64 - 1 else [], 0
    while waiting:
        number, seen = waiting.pop(), seen + 1
        if number > last or seen > last:
            raise ValueError(f"page {number} of {last}")
        page = os.pread(file.fileno(), size, number * size)
        flags, lower = struct.unpack_from("<HH", page, 10)
        for at in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
            low, high, kind, end = struct.unpack_from("<4H", page, at)
            if flags & 1:  # a branch: the node is a page's number and a key
                waiting.append(low | high << 16 | kind << 32)
                length = 0
            else:
                length = low | high << 16
                if kind & 1:  # the value has pages of its own
                    first = struct.unpack_from("<Q", page, at + 8 + end)[0]
                    inside, length = first * size + 16 + length <= (last + 1) * size, 8
                    kind = 0 if inside else 2
            if at + 8 + end + length > size or (kind > 1 and not flags & 1):
                raise ValueError(f"page {number} points out of the file")


def open_lmdb(folder: Path):
    """A read-only environment. A cut or damaged file, which would end the process (SIGBUS), is refused before."""
    path, key = folder / "data.mdb", folder.resolve()
    common.need_file(path, "file (an LMDB folder has imgs/ and pairs/)")
    process, env = OPEN.get(key, (0, None))
    if process == os.getpid():
        return env
    try:
        with path.open("rb") as file:
            head = file.read(2 * 65536)
        size = struct.unpack_from("<I", head.ljust(44), 40)[0] % 65537  # bytes of a page
        metas = [struct.unpack_from("<16xI108xQQQ", head.ljust(2 * 65536 + 152), page) for page in (0, size)]
        root, last = max(metas, key=lambda meta: meta[3])[1:3]  # of magic, root page, last page, transaction
        if {meta[0] for meta in metas} != {0xBEEFC0DE} or path.stat().st_size < (last + 1) * size:
            raise UserError(f"{path}: not a whole LMDB file (copy or build it again)")
        if key not in CHECKED:
            with path.open("rb") as file:
                check_pages(file, size, root, last)
            CHECKED.add(key)
        if env:
            env.close()
        env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except (OSError, ValueError, struct.error, lmdb.Error) as e:
        raise UserError(f"{path}: not a readable LMDB ({e})") from e
    OPEN[key] = os.getpid(), env
    return env


def lmdb_value(folder: Path, key) -> bytes | None:
    try:
        with open_lmdb(folder).begin() as txn:
            return txn.get(str(key).encode())
    except lmdb.Error as e:
        raise UserError(f"{folder}: {key}: not readable ({e})") from e


def lmdb_pairs(folder: Path) -> list[tuple]:
    """[(image id, text id, report)] of pairs/, in the order of their numbers."""
    path, found = folder / "pairs", []
    count = (lmdb_value(path, "num_samples") or b"").decode(errors="replace")
    if not re.fullmatch("[0-9]{1,12}", count):
        raise UserError(f"{path}: has no num_samples (an unfinished LMDB? build it again)")
    for i in range(int(count)):
        value = lmdb_value(path, i)
        if value is None:
            raise UserError(f"{path}: pair {i} of {count} is missing (build it again)")
        found.append(plain_pickle(value, ((int, str), (int, str), str), f"{path}: pair {i}"))
    return found


def jsonl_pairs(path: Path) -> list[tuple]:
    """[(image id, text id, report)] of {split}_texts.jsonl, one for each id of a line."""
    found, number = [], 0
    common.need_file(path)
    try:
        for line in path.read_bytes().split(b"\n"):  # U+2028 ends no line here
            number += 1
            if line.strip():
                row = json.loads(line)
                ids = [row["text_id"], *row["image_ids"]]
                if (
                    not isinstance(row["image_ids"], list)
                    or not isinstance(row["text"], str)
                    or not all(isinstance(i, (int, str)) for i in ids)
                ):
                    raise TypeError("ids are numbers or text, the text is text")
                found += [(i, row["text_id"], row["text"]) for i in row["image_ids"]]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: line {number}: not a text with text_id, text and image_ids ({e})") from e
    return found


def files_of(source: Path) -> tuple[Path, Path, Path]:
    """(images, pairs, labels) of an LMDB folder, or of the TSV and JSONL that begin with `source`."""
    if (source / "pairs").is_dir():
        return source / "imgs", source / "pairs" / "data.mdb", source / "labels.csv"
    stem = Path(str(source).removesuffix("_imgs.tsv"))
    images = stem.with_name(stem.name + "_imgs.tsv")
    if not images.is_file():
        raise UserError(f"{source}: neither an LMDB folder (imgs/ and pairs/) nor the beginning of {images.name}")
    return images, stem.with_name(stem.name + "_texts.jsonl"), stem.with_name(stem.name + "_labels.csv")


class FundusPairs(Dataset):
    """Photographs and reports of one split. A training item is a pair, an evaluation item an image; key (epoch, index).

    Item: images (eyes, 3, R, R) uint8, left and right or one; colour (eyes, 3, 4) float32, what turns their values into
    the model's (jitter and normalisation in one); present (eyes,) bool; index; bad = 1 if it could not be read
    (--on-bad-sample skip); in training also input_ids (L,) int64 and text_id, equal for reports that are the same.
    """

    def __init__(self, source: Path, args, train: bool):
        self.args, self.train, self.source, self.warnings = args, train, source, []
        images, self.file, self.labels_file = files_of(source)
        self.images = TSVImages(images) if images.suffix == ".tsv" else LMDBImages(source)
        rows = jsonl_pairs(self.file) if self.file.suffix == ".jsonl" else lmdb_pairs(source)
        if not rows:
            raise UserError(f"{source}: holds no pair of an image and a report")
        broken = [number for _, number, text in rows if not text.isascii() and re.search("[\ud800-\udfff]", text)]
        if broken:
            raise UserError(f"{self.file}: text {broken[0]} has half a character (a surrogate; write it as UTF-8)")
        image_row = {name: i for i, name in enumerate(dict.fromkeys(image for image, _, _ in rows))}
        text_row = {key: i for i, key in enumerate(dict.fromkeys((number, text) for _, number, text in rows))}
        self.image_ids, self.text_ids = list(image_row), [number for number, _ in text_row]
        self.texts = [normal_text(text) for _, text in text_row]  # an id may stand for two texts
        pairs = dict.fromkeys((image_row[image], text_row[number, text]) for image, number, text in rows)
        self.pairs = np.array(list(pairs), np.int64)  # (p, 2) image row, text row
        self.find_missing()
        self.read_labels()
        self.size = settled_size(args)
        self.tokenizer = tokenizer_of(args)
        self.tokenizer.enable_truncation(args.max_text_length)
        if train:
            texts = self.texts + [mirrored_text(text) for text in self.texts if args.flip]
            self.same = same_texts([e.ids for e in self.tokenizer.encode_batch(texts)], args.same_text)
        at = self.pairs[:, 0] if train else range(len(self.image_ids))
        self.ids, self.paths = [str(self.image_ids[i]) for i in at], [images] * len(at)

    def find_missing(self) -> None:
        """Every image of a pair must be there; the first says how many photographs each has."""
        there = self.images.names()
        missing = [name for name in self.image_ids if str(name) not in there]
        if missing:
            first = ", ".join(map(str, missing[:3]))
            raise UserError(f"{self.source}: {len(missing)} images of the reports are missing, first {first}")
        self.eyes = len(self.images.get(self.image_ids[0]) or ())
        if self.args.monocular is None:
            self.args.monocular = self.eyes == 1
        if self.args.monocular and self.eyes == 2:
            raise UserError(f"{self.source}: has two photographs a patient, but the model is for one (--no-monocular)")

    def read_labels(self) -> None:
        """Classes and patients of labels.csv, if there is one."""
        names, table, self.has_patients = [str(name) for name in self.image_ids], {}, False
        if self.labels_file.exists():
            rows = common.read_table(self.labels_file)
            common.need_columns(rows, ["image_id"], self.labels_file)
            twice = rows["image_id"][rows["image_id"].duplicated()]
            if len(twice):
                raise UserError(f"{self.labels_file}: row {twice.index[0] + 2}: {twice.iloc[0]} comes twice")
            table = {row["image_id"]: row for row in rows.to_dict("records")}
            self.has_patients = "patient_id" in rows
            if not table.keys() & set(names):
                raise UserError(f"{self.labels_file}: has none of the images, the first of which is {names[0]}")
        column = lambda key, default="": [table.get(n, {}).get(key) or default for n in names]  # noqa: E731
        whole = column("label")
        self.classes = {
            "patient": whole,
            **{s: [e or w for e, w in zip(column(f"{s}_label"), whole, strict=True)] for s in ("left", "right")},
        }
        self.eye_labels = [list(e) for e in zip(column("left_label"), column("right_label"), strict=True)]
        self.groups = [g or n for g, n in zip(column("patient_id"), names, strict=True)]
        self.class_names = sorted({c for w in whole for c in w.split(" / ")} - {""})  # "one / other": of the two eyes

    @property
    def targets(self) -> np.ndarray:
        """(n, K) float32: 1 for the class of an image, or both of "one / other", 0 for the rest; NaN: no class."""
        parts = [w.split(" / ") if w else [] for w in self.classes["patient"]]
        rows = [[float(c in p) if p else np.nan for c in self.class_names] for p in parts]
        return np.array(rows, np.float32).reshape(len(parts), len(self.class_names))

    def __len__(self):
        return len(self.ids)

    def notes(self) -> str:
        """What is read: of the first pair, and how many reports are cut or unknown to the vocabulary."""
        self.tokenizer.no_truncation()
        ids = [e.ids for e in self.tokenizer.encode_batch(self.texts)]
        self.tokenizer.enable_truncation(self.args.max_text_length)
        unknown = 100 * np.mean(np.concatenate(ids) == self.tokenizer.token_to_id("[UNK]"))
        lengths, limit = [len(i) for i in ids], self.args.max_text_length
        cut = 100 * np.mean(np.array(lengths) > limit)
        shown = "one photograph a patient" + (", shown as both eyes" if not self.args.monocular else "")
        shown = "two eyes a patient" if self.eyes == 2 else shown
        text = (
            f"{self.ids[0]}, {shown}, {lengths[0]} tokens; "
            f"{sum(map(bool, self.classes['patient']))} of {len(self.image_ids)} images have a label; "
            f"{cut:.1f} % of the reports are cut at {limit} tokens (median {np.median(lengths):.0f}), "
            f"{unknown:.1f} % of their words are unknown to the vocabulary"
        )
        if self.train and self.args.same_text:
            text += f"; {len(set(self.same[: len(self.texts)].tolist()))} different reports of {len(self.texts)}"
        return "\nwarning: ".join([text, *self.warnings])

    def photographs(self, index: int) -> list[Image.Image | None]:
        """Left and right photograph (None: missing), or the one, of an item, undecoded."""
        row = self.pairs[index, 0] if self.train else index
        name = self.image_ids[row]
        files = self.images.get(name) or ()
        if len(files) != self.eyes or not any(files):
            raise UserError(
                f"{self.source}: image {name}: has {sum(map(bool, files))} photographs, the first {self.eyes}"
            )
        return [open_photograph(f, f"{self.source}: image {name}") if f else None for f in files]

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """images (eyes, 3, R, R) uint8 as evaluated, present (eyes,) bool; eyes: those of the model."""
        return self.tensors([photograph and resized(photograph, self.size) for photograph in self.photographs(index)])

    pictures = photographs  # for the report's gallery

    def tensors(self, found: list[np.ndarray | None]):
        if len(found) < (1 if self.args.monocular else 2):
            found = found * 2  # one photograph stands for both eyes
        present = torch.tensor([f is not None for f in found])
        empty = np.zeros((self.size, self.size, 3), np.uint8)
        stack = np.stack([empty if f is None else f for f in found])
        return torch.from_numpy(stack).permute(0, 3, 1, 2), present

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        bad, source, rng = 0, index, np.random.default_rng((self.args.seed, epoch, index))
        while True:
            try:
                mirror = self.train and self.args.flip and rng.random() < 0.5
                if self.train and self.args.augment:
                    found = [
                        photograph and augmented(photograph, self.size, rng) for photograph in self.photographs(source)
                    ]
                    images, present = self.tensors([f and f[0] for f in found])
                    matrices = [f[1] if f else plain_colour() for f in found]
                    colour = np.stack((matrices * 2)[: len(images)])
                else:
                    images, present = self.load(source)
                    colour = np.stack([plain_colour()] * len(images))
                break
            except UserError:
                if self.args.on_bad_sample == "fail":
                    raise
                bad += 1
                if not self.train:  # an unread case stays in its place, marked, and is reported as missing
                    eyes = 1 if self.args.monocular else 2
                    images = torch.zeros(eyes, 3, self.size, self.size, dtype=torch.uint8)
                    present, colour = torch.zeros(eyes, dtype=torch.bool), np.stack([plain_colour()] * eyes)
                    break
                if bad > len(self):
                    raise
                source = (source + 1) % len(self)  # the next pair, photographs and report together
        item = {"images": images, "colour": torch.from_numpy(colour), "present": present}
        if mirror:  # a mirrored left eye is a right eye
            item = {k: v.flip(0) for k, v in item.items()} | {"images": images.flip(0, -1)}
        if self.train:
            text = self.pairs[source, 1]
            words = self.texts[text]
            ids = self.tokenizer.encode(mirrored_text(words) if mirror else words).ids
            item |= {
                "input_ids": torch.tensor(ids),
                "text_id": torch.tensor(self.same[text + mirror * len(self.texts)]),
            }
        return item | {"index": torch.tensor(index), "bad": torch.tensor(bad)}

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """A batch, with reports padded to its longest and attention_mask (B, L) int64."""
        if "input_ids" not in items[0]:
            return default_collate(items)
        ids = [item.pop("input_ids") for item in items]
        return default_collate(items) | pad_ids(ids)


def pad_ids(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids of different lengths -> input_ids, attention_mask (B, L) int64."""
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(x) for x in ids], batch_first=True)
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": mask}


def normal_text(text: str) -> str:
    """Straight quotes, as the original reads them (the tokenizer lowers the case)."""
    return text.replace("\u201c", '"').replace("\u201d", '"')


def mirrored_text(text: str) -> str:
    """A report with the words for left and right exchanged."""
    return re.sub(r"\b(left|right|o[sd])\b|[左右]", lambda m: SWAP[m[0].lower()], text, flags=re.I | re.A)


def same_texts(ids: list[list[int]], share: float, chunk: int = 512) -> np.ndarray:
    """Token ids of m reports -> (m,) a number each, equal for reports that count as the same.

    The same are those with the same words in the same order and, for a share below 1, those that have this share of
    their word pairs in common (Jaccard of the sets of neighbouring tokens), also by way of a third one; 0: none.
    """
    if not share:
        return np.arange(len(ids))
    unique, number = {}, []
    for tokens in ids:
        number.append(unique.setdefault(tuple(tokens), len(unique)))
    if share == 1:
        return np.array(number)
    columns, cells = {}, []
    for i, tokens in enumerate(unique):
        cells += [(i, columns.setdefault(pair, len(columns))) for pair in set(zip(tokens, tokens[1:], strict=False))]
    has = csr_matrix((np.ones(len(cells)), np.array(cells).T), (len(unique), len(columns)))
    size, near = np.diff(has.indptr), []
    for first in range(0, len(unique), chunk):
        both = (has[first : first + chunk] @ has.T).toarray()
        near.append(csr_matrix(both >= share * (size[first : first + chunk, None] + size - both)))
    return connected_components(vstack(near), directed=False)[1][number]


def open_photograph(data: bytes, where: str) -> Image.Image:
    """An image file, its header read and its size checked."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of its size, which is judged below
            photograph = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as e:  # Pillow raises nearly anything on a crafted file
        raise UserError(f"{where}: not a readable image ({type(e).__name__})") from e
    if photograph.width * photograph.height > MAX_PIXELS:
        raise UserError(f"{where}: {photograph.width} x {photograph.height} pixels (at most {MAX_PIXELS:,} are read)")
    photograph.where = where
    return photograph


def resized(photograph: Image.Image, size: int, box=None) -> np.ndarray:
    """(size, size, 3) uint8: bicubic, squashed to a square on the image's own mode, as the original does it."""
    try:
        if photograph.mode in ("P", "1"):
            photograph = photograph.convert("RGB")
        elif photograph.mode.startswith("I"):  # 16 bits
            photograph = Image.fromarray((np.asarray(photograph).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        return np.asarray(photograph.resize((size, size), Image.Resampling.BICUBIC, box).convert("RGB"))
    except Exception as e:
        raise UserError(f"{getattr(photograph, 'where', 'image')}: not a readable image ({e})") from e


def augmented(photograph: Image.Image, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """The original's training transform -> (size, size, 3) uint8, colour (3, 4).

    A crop of 90 to 100 % of the area, brightness, contrast and saturation 0.8 to 1.2, and once in ten times a rectangle
    of the mean colour. Never mirrored: that would make a left eye a right one.
    """
    photograph.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, no smaller than this
    w, h = photograph.size
    for _ in range(10):
        area, ratio = w * h * rng.uniform(0.9, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_w, crop_h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_w <= w and crop_h <= h:
            break
    else:
        crop_w, crop_h = min(w, h * 4 / 3), min(h, w * 4 / 3)
    left, top = rng.uniform(0, w - crop_w), rng.uniform(0, h - crop_h)
    image = resized(photograph, size, (left, top, left + crop_w, top + crop_h))
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    grey = image.mean(0).mean(0) @ GREY / 255
    colour = plain_colour() * [[brightness * contrast] * 3 + [1]]
    tint = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), GREY)
    colour[:, :3] = colour[:, :3] @ tint
    colour[:, 3] += brightness * (1 - contrast) * grey / STD
    if rng.random() < 0.1:
        image = erased(image, rng)
    return image, colour.astype(np.float32)


def erased(image: np.ndarray, rng) -> np.ndarray:
    """A rectangle of 2 to 33 % of the area in the mean colour (random erasing, arXiv 1708.04896)."""
    size, image = len(image), image.copy()
    for _ in range(10):
        area, ratio = size**2 * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < size and w < size:
            top, left = rng.integers(size - h + 1), rng.integers(size - w + 1)
            image[top : top + h, left : left + w] = np.round(255 * np.array(MEAN))
            break
    return image


def plain_colour() -> np.ndarray:
    """(3, 4): RGB 0 to 255 and 1 -> the model's values."""
    return np.column_stack([np.diag(1 / (255 * np.array(STD))), -np.array(MEAN) / STD]).astype(np.float32)


def tokenizer_of(args):
    """The tokenizer of --vocab, or the one that a checkpoint carries."""
    return common.Tokenizer.from_str(args.tokenizer) if args.tokenizer else common.load_tokenizer(args.vocab)


def settled_size(args) -> int:
    """Side of a photograph in pixels."""
    return (args.model_config or {}).get("image_size") or args.image_size or VISION[args.vision_model][1]


def data_file(args, split: str | None = None) -> Path:
    """The pairs of a split ("train" or "valid")."""
    folder = args.train_data if (split or args.split) == "train" else args.valid_data
    return folder and files_of(folder)[1]


def build_datasets(args):
    train_set, val_set = FundusPairs(args.train_data, args, True), FundusPairs(args.valid_data, args, False)
    args.label_columns = val_set.class_names
    shared = sorted(set(train_set.groups) & set(val_set.groups))
    if not (train_set.has_patients and val_set.has_patients):  # each split may count its images from 0
        shared = [name for name in shared if train_set.images.get(name) == val_set.images.get(name)]
    same = args.train_data.resolve() == args.valid_data.resolve()
    if shared and not same:
        raise UserError(f"{val_set.source}: patient {shared[0]} is in the training data too ({len(shared)} are)")
    if re.search(r"(?<![a-z])test", args.valid_data.name.lower()):
        train_set.warnings.append(
            f"the validation data ({args.valid_data}) look like a test set: a model that they choose is judged too "
            "well on them (keep patients aside that no choice has seen)"
        )
    if same:
        train_set.warnings.append(
            "validation and training data are the same: the numbers say nothing about new patients"
        )
    steps = args.epochs * (
        len(train_set) // (args.batch_size * args.accum_steps * int(os.environ.get("WORLD_SIZE", 1)))
    )
    if args.warmup >= (args.max_steps or steps) > 0:
        train_set.warnings.append(
            f"--warmup {args.warmup} is as long as the whole run of {args.max_steps or steps} steps"
        )
    if args.monitor.startswith("class") and not args.label_columns:
        raise UserError(
            f"{val_set.labels_file}: no labels, so --monitor {args.monitor} is undefined (see the script's head)"
        )
    if args.on_bad_sample == "fail":
        train_set.load(0), val_set.load(0)
    return train_set, val_set


def build_eval_dataset(args) -> FundusPairs:
    if args.split not in ("train", "valid"):
        raise UserError(f"--split {args.split}: there are train and valid (--train-data, --val-data)")
    folder = args.train_data if args.split == "train" else args.valid_data
    if folder is None:
        raise UserError(
            f"--{'train' if args.split == 'train' else 'val'}-data is missing (the checkpoint was made without data)"
        )
    return FundusPairs(folder, args, False)


# ==== Model ====================================================================================================


class BertLayer(nn.Module):
    """One post-norm layer; key names of Hugging Face's BertLayer."""

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        projections = {name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}
        output = {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=1e-12)}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": nn.ModuleDict(output)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, ffn)})
        output = {"dense": nn.Linear(ffn, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=1e-12)}
        self.output = nn.ModuleDict(output)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x, mask):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in self.attention["self"].values()
        )  # (B, heads, L, E / heads)
        a = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.attention["output"]
        x = out["LayerNorm"](x + self.drop(out["dense"](a.transpose(1, 2).flatten(2))))  # (B, L, E)
        a = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + self.drop(a))


class Bert(nn.Module):
    """BERT encoder (arXiv 1810.04805): input_ids, attention_mask (B, L) -> (B, L, E). Key names of HF's BertModel."""

    def __init__(self, config: dict):
        super().__init__()
        width, self.dropout, self.grad_checkpointing = config["hidden"], config["dropout"], False
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config["vocab"], width),
            "position_embeddings": nn.Embedding(config["positions"], width),
            "token_type_embeddings": nn.Embedding(2, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12),
        })  # fmt: skip
        layers = [BertLayer(width, config["heads"], config["ffn"], self.dropout) for _ in range(config["layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})  # in the file, not used
        self.apply(init_bert)

    def forward(self, input_ids, attention_mask):
        e = self.embeddings
        x = e["word_embeddings"](input_ids) + e["position_embeddings"].weight[: input_ids.shape[1]]
        x = F.dropout(e["LayerNorm"](x + e["token_type_embeddings"].weight[0]), self.dropout, self.training)
        mask = attention_mask[:, None, None].bool()  # (B, 1, 1, L)
        for layer in self.encoder["layer"]:
            if self.grad_checkpointing and self.training:
                x = common.checkpointed(layer, x, mask)
            else:
                x = layer(x, mask)
        return x


def init_bert(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class VisionAttention(nn.Module):
    """Self-attention; key names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 E)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, E / heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    """One pre-norm block; key names of OpenAI's CLIP."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = VisionAttention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        for last in (self.attn.out_proj, self.mlp.c_proj):
            nn.init.normal_(last.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT: (B, 3, R, R) normalised -> (B, embed). Training leaves out `mask_ratio` of the patches (FLIP)."""

    def __init__(self, config: dict):
        super().__init__()
        width, patch, layers = config["width"], config["patch"], config["layers"]
        n_patches, self.mask_ratio, self.grad_checkpointing = (config["image_size"] // patch) ** 2, 0.0, False
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(n_patches + 1, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = [VisionBlock(width, width // config["head_width"], layers) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.proj = nn.Parameter(torch.randn(width, config["embed"]) * width**-0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, E)
        position = self.positional_embedding
        x = x + position[1:]
        if self.training and self.mask_ratio:
            keep = int(x.shape[1] * (1 - self.mask_ratio))
            chosen = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, :keep, None]  # (B, keep, 1)
            x = x.gather(1, chosen.expand(-1, -1, x.shape[2]))
        first = (self.class_embedding + position[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1))  # (B, 1 + N, E)
        for block in self.transformer["resblocks"]:
            x = common.checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class RETCLIP(nn.Module):
    """Photographs of both eyes, or of one, and reports -> features in one space for each level, and their scales."""

    def __init__(self, config: dict):
        super().__init__()
        width, embed, self.monocular = config["bert"]["hidden"], config["embed"], False
        self.visual, self.bert = VisionTransformer(config), Bert(config["bert"])
        del self.bert.pooler  # in no RET-CLIP file
        with torch.no_grad():  # BERT's 0.02 is for a width of 768; a narrow one would begin with all texts alike
            for layer in self.bert.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_((768 / width) ** 0.5)
        for level in LEVELS:
            end = "" if level == "patient" else f"_{level}"
            text = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embed))
            for layer in (text[0], text[2]):
                nn.init.normal_(layer.weight, std=width**-0.5)
            setattr(self, f"text_projection{end}", text)
            setattr(self, f"logit_scale{end}", nn.Parameter(torch.tensor(float(config["logit_scale"]))))
        self.global_feature_mapping = nn.Linear(2 * embed, embed, bias=False)
        self.left_feature_mapping = nn.Linear(embed, embed, bias=False)
        self.right_feature_mapping = nn.Linear(embed, embed, bias=False)
        self.max_logit_scale, self.tokenizer = math.inf, None

    @property
    def levels(self) -> tuple[str, ...]:
        return LEVELS[:1] if self.monocular else LEVELS

    def train(self, mode: bool = True):
        """Frozen parts use no dropout."""
        super().train(mode)
        common.rest_frozen(self)
        return self

    def encode_eyes(self, images, colour):
        """images (B, eyes, 3, R, R) of 0 to 255, colour (B, eyes, 3, 4) -> (B, eyes, embed), what `visual` gives."""
        flat, colour = images.flatten(0, 1).float(), colour.flatten(0, 1)
        # bf16 would shift the colours; the meta device, on which FLOPs are counted, knows no autocast
        with nullcontext() if flat.is_meta else torch.autocast(flat.device.type, enabled=False):
            x = torch.baddbmm(colour[..., 3:], colour[..., :3], flat.flatten(2)).view_as(flat)
        return self.visual(x).unflatten(0, images.shape[:2])

    def encode_image(self, eyes, present) -> dict[str, torch.Tensor]:
        """eyes (B, eyes, embed), present (B, eyes) -> features of each level, not normalised.

        At the patient's level the eye that is there stands for one that is missing.
        """
        if self.monocular:
            return {"patient": eyes[:, 0]}
        both = torch.where(present[..., None], eyes, eyes.flip(1))
        return {
            "patient": self.global_feature_mapping(both.flatten(1)),
            "left": self.left_feature_mapping(eyes[:, 0]),
            "right": self.right_feature_mapping(eyes[:, 1]),
        }

    def encode_text(self, input_ids, attention_mask) -> dict[str, torch.Tensor]:
        """(B, L) -> (B, embed) of each level, not normalised."""
        hidden = self.bert(input_ids, attention_mask)[:, 0]  # (B, E), of [CLS]
        heads = {"patient": self.text_projection}
        heads |= {level: getattr(self, f"text_projection_{level}") for level in self.levels[1:]}
        return {level: head(hidden) for level, head in heads.items()}

    def scale(self, level: str):
        return self.logit_scale if level == "patient" else getattr(self, f"logit_scale_{level}")

    def forward(self, images, colour, present, input_ids, attention_mask):
        image = self.encode_image(self.encode_eyes(images, colour), present)
        text, out = self.encode_text(input_ids, attention_mask), {}
        for level in self.levels:
            out[f"image_{level}"] = F.normalize(image[level].float(), dim=-1)
            out[f"text_{level}"] = F.normalize(text[level].float(), dim=-1)
            out[f"scale_{level}"] = self.scale(level).exp()
        return out

    @torch.no_grad()
    def begin_step(self):
        for level in LEVELS:
            self.scale(level).clamp_(0, math.log(self.max_logit_scale))

    def end_step(self, ctx):
        """Nothing here moves outside of the optimizer."""


def retclip_weights(state: dict, source: str, say=print) -> dict:
    """A weight file in the names of RETCLIP, whatever it was written by.

    RET-CLIP's own (also an early one, whose side heads have other numbers), Chinese-CLIP's, OpenAI's CLIP, and both as
    transformers names them; BERT with or without `bert.`, with gamma and beta for weight and bias.
    """
    for anchor in (
        "visual.conv1.weight",
        "vision_model.embeddings.class_embedding",
        "embeddings.word_embeddings.weight",
    ):
        prefix = next((k.removesuffix(anchor) for k in state if k.endswith(anchor)), "")
        state = {k.removeprefix(prefix): v for k, v in state.items()}  # of any wrapper
    state = {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
             for k, v in state.items()}  # fmt: skip
    if "vision_model.embeddings.class_embedding" in state:
        state = openai_names(state)
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^(?=embeddings\.|encoder\.layer\.)", "bert.", key)
        if not re.search(r"(?:^|\.)pooler\.|position_ids$|^cls\.", key):
            renamed[key] = value
    for side in ("left", "right"):
        head = f"text_projection_{side}"
        if f"{head}.4.weight" in renamed:
            say(f"{source}: {head}.2 and .4 are read as .0 and .2 (a file of before July 2024)")
            for old, new in ((f"{head}.2.", f"{head}.0."), (f"{head}.4.", f"{head}.2.")):
                renamed = {k.replace(old, new): v for k, v in renamed.items()}
    return renamed


def openai_names(state: dict) -> dict:
    """transformers' CLIPModel and ChineseCLIPModel -> OpenAI's names of the image encoder; the rest as it is."""
    found = {k: v for k, v in state.items() if not k.startswith(("vision_model.", "visual_projection"))}
    first = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "self_attn.out_proj": "attn.out_proj", "mlp.fc2": "mlp.c_proj", "encoder.layers": "transformer.resblocks",
    }  # fmt: skip
    for key, value in state.items():
        if not key.startswith("vision_model.") or key.endswith("position_ids"):
            continue
        name = key.removeprefix("vision_model.")
        for old, new in first.items():
            name = name.replace(old, new)
        if ".self_attn.q_proj." in key:
            parts = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found["visual." + re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)] = torch.cat(parts)
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            found[f"visual.{name}"] = value
    if "visual_projection.weight" in state:
        found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    return found


def fit_positions(state: dict, n: int) -> dict:
    """Position embeddings (1 + side^2, E) of another image size: bicubic with aligned corners, as the original."""
    key = "visual.positional_embedding"
    if (
        key not in state
        or len(state[key]) == n
        or state[key].ndim != 2
        or not math.sqrt(len(state[key]) - 1).is_integer()
    ):
        return state
    old, new = (math.isqrt(m - 1) for m in (len(state[key]), n))
    grid = state[key][1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=True).flatten(2)[0].T
    return {**state, key: torch.cat([state[key][:1].float(), grid])}


def export_weights(model: RETCLIP) -> dict:
    """The state dict as the original code reads it: same keys, with the prefix that its --resume wants."""
    return {f"module.{k}": v.contiguous() for k, v in model.state_dict().items()}


def settled_config(args, embedding=None) -> dict:
    """The sizes of the model: of the run that is continued, or by the flags, the weights and the vocabulary.

    embedding: the word embeddings (V, E) of the weight file, if there is one.
    """
    tokenizer = tokenizer_of(args)
    n_words, vocab_hash = tokenizer.get_vocab_size(), hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    config = deepcopy(args.model_config)
    if config is None:
        config = dict(zip(VIT, VISION[args.vision_model], strict=True))
        config["bert"] = dict(zip(BERT, TEXT[args.text_model], strict=True))
        config["bert"]["vocab"] = n_words if embedding is None else len(embedding)
        config["image_size"], config["vocab_hash"] = args.image_size or config["image_size"], vocab_hash
    bert = config["bert"]
    bert["dropout"] = bert["dropout"] if args.text_dropout is None else args.text_dropout
    if config["vocab_hash"] != vocab_hash:
        raise UserError(f"{args.vocab}: not the vocabulary of the run that is continued")
    if n_words > bert["vocab"] or n_words < 0.9 * bert["vocab"]:
        raise UserError(f"{args.vocab}: has {n_words} words, the text encoder {bert['vocab']} (--vocab of the weights)")
    if args.max_text_length > bert["positions"]:
        raise UserError(f"--max-text-length {args.max_text_length}: the text encoder reads {bert['positions']} tokens")
    if config["image_size"] % config["patch"]:
        raise UserError(f"--image-size {config['image_size']}: not a multiple of the patch, {config['patch']} pixels")
    if int((config["image_size"] // config["patch"]) ** 2 * (1 - args.mask_ratio)) < 1:
        raise UserError(f"--mask-ratio {args.mask_ratio}: leaves no patch of {config['image_size']} pixels")
    if args.freeze_layers > min(config["layers"], bert["layers"]):
        raise UserError(
            f"--freeze-layers {args.freeze_layers}: the encoders have {config['layers']} and {bert['layers']} blocks"
        )
    return config


def build_model(args, say=print) -> RETCLIP:
    fresh, found = args.model_config is None, {}
    if fresh:
        sources = {"": args.pretrained, "visual.": args.vision_pretrained, "bert.": args.text_pretrained}
        for tower, source in sources.items():
            if source and source != "none":
                with common.of_checkpoint(source):
                    found[tower] = retclip_weights(common.load_weights(source), source, say)
                if tower and not any(k.startswith(tower) for k in found[tower]):
                    what = "an image encoder of CLIP" if tower == "visual." else "a BERT"
                    raise UserError(
                        f"{source}: holds no tensor of {what} (first key {next(iter(found[tower]), 'none')})"
                    )
    words = "bert.embeddings.word_embeddings.weight"
    words = found.get("bert.", {}).get(words, found.get("", {}).get(words))
    if words is not None and words.ndim != 2:
        raise UserError(f"{sources['bert.'] or sources['']}: its word embeddings have the shape {tuple(words.shape)}")
    args.model_config = settled_config(args, words)
    model = RETCLIP(args.model_config)
    model.monocular, model.max_logit_scale = args.monocular, args.max_logit_scale
    model.visual.mask_ratio, model.tokenizer = args.mask_ratio, tokenizer_of(args).to_str()
    for part in (model.visual, model.bert):
        part.grad_checkpointing = args.grad_checkpointing
    for tower, state in found.items():
        state = fit_positions(state, len(model.visual.positional_embedding))
        part = {"": model, "visual.": model.visual, "bert.": model.bert}[tower]
        state = {k.removeprefix(tower): v for k, v in state.items() if k.startswith(tower)}
        common.apply_weights(part, state, sources[tower], HEADS, args.allow_partial, say)
    if fresh and not found:
        say(f"model: {args.vision_model} and {args.text_model}, random weights, {args.model_config}")
    return model


def build_eval_model(saved: dict, args, device) -> RETCLIP:
    """The model of a checkpoint: its averaged weights where it has them."""
    model = common.filled(lambda: RETCLIP(args.model_config), saved)
    model.monocular, model.tokenizer = args.monocular, saved["tokenizer"]
    return model.to(device).eval()


def forward_flops(model, args) -> float:
    """Floating-point operations of one pair and one report of half the length, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config, eyes = args.model_config, 1 if args.monocular else 2
        counted = RETCLIP(config).eval()
        counted.monocular, ids = args.monocular, torch.ones(1, args.max_text_length // 2, dtype=torch.long)
        images = torch.empty(1, eyes, 3, config["image_size"], config["image_size"])
        counted(images, torch.empty(1, eyes, 3, 4), torch.ones(1, eyes, dtype=torch.bool), ids, ids)
    return (1 - args.mask_ratio) * counter.get_total_flops()


def set_trainable(model, args, epoch: int, say=print) -> bool:
    """Freeze what the flags name, and what one photograph a patient has no use for; True if that changed anything."""
    frozen = ["visual."] * args.freeze_vision + ["bert."] * args.freeze_text
    if args.freeze_layers:
        frozen += ["visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre"]
        frozen += ["bert.embeddings."]
        for i in range(args.freeze_layers):
            frozen += [f"visual.transformer.resblocks.{i}.", f"bert.encoder.layer.{i}."]
    if args.monocular:
        frozen += ["global_", "left_", "right_", "text_projection_", "logit_scale_"]
    before = [p.requires_grad for p in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    changed = before != [p.requires_grad for p in model.parameters()]
    if changed:
        say(f"frozen: {', '.join(frozen)}")
    return changed


# ==== Loss and optimizer =======================================================================================


class TripartiteLoss(nn.Module):
    """CLIP loss over the global batch at each level, added up (RET-CLIP, section 2): patient, left and right eye.

    A missing eye is no row and no column of its level. Reports that are the same are positives of each other.
    """

    columns = ("text_id", "present")  # of a batch that the loss needs

    def __init__(self, args):
        super().__init__()
        self.args, self.chunk = args, args.grad_cache_chunk or args.batch_size
        self.levels = dict(zip(LEVELS[: 1 if args.monocular else 3], args.level_weights, strict=False))

    def forward(self, out: dict, batch: dict):
        """out: what the model returns for all pairs of this rank; batch: their columns -> loss, logs."""
        logs, ids = {}, batch["text_id"] if self.args.same_text else None
        for level in self.levels:
            present = batch["present"][:, LEVELS.index(level) - 1] if level != "patient" else None
            image, text, scale = (out[f"{kind}_{level}"] for kind in ("image", "text", "scale"))
            logs[f"loss_{level}"] = common.clip_loss(image, text, scale, ids, present)
            logs[f"scale_{level}"] = scale
        return sum(weight * logs[f"loss_{level}"] for level, weight in self.levels.items()), logs

    def chance(self, n: int) -> float:
        """The loss of features that tell nothing apart, over n pairs: 3 ln n."""
        return sum(self.levels.values()) * math.log(n)


def build_criterion(args, train_set):
    return TripartiteLoss(args)


def build_optimizer(model, args):
    """AdamW with the original's betas; no decay for norms, biases, scales, positions and the class embedding.

    --official-decay: the original's rule by name, which decays BERT's norms and the image encoder's embeddings.
    """
    groups = {}
    for name, p in model.named_parameters():
        plain = p.ndim < 2 or "position" in name or "token_type" in name
        if args.official_decay:
            plain = any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        decay, scale = 0.0 if plain else args.weight_decay, args.layer_decay ** layers_above(name, args.model_config)
        group = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((decay, scale), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def layers_above(name: str, config: dict) -> int:
    """Blocks between a parameter and the heads: 0 for heads and last norms, for --layer-decay."""
    if not name.startswith(("visual.", "bert.")) or name.startswith(("visual.ln_post", "visual.proj")):
        return 0
    n = config["layers"] if name.startswith("visual.") else config["bert"]["layers"]
    block = re.search(r"(?:resblocks|layer)\.(\d+)\.", name)
    return n - int(block[1]) if block else n + 1


def encode(net, batch) -> dict:
    """Features of a batch: (B, ...) each, and scalars."""
    return net(*(batch[k] for k in ("images", "colour", "present", "input_ids", "attention_mask")))


def compute_loss(net, batch, criterion):
    return criterion(encode(net, batch), batch)


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
    """Gradient of a loss over the pairs of all micro-batches and ranks, by gradient caching (arXiv 2101.06983).

    The loss needs the features of all pairs at once, but not what the backward pass keeps of each. So: features chunk
    by chunk without gradient; the loss and its gradient for the features; then each chunk again, with the same random
    numbers, and backward from those gradients. With one chunk it is the plain loss. Returns logs, averaged over ranks.
    """
    core = getattr(net, "module", net)
    core.begin_step()
    chunks = [split_batch(b, criterion.chunk) for b in micro_batches]
    chunks = [chunk for parts in chunks for chunk in parts]
    if len(chunks) == 1:
        batch = to_device(chunks[0], ctx.device)
        with autocast:
            loss, logs = compute_loss(net, batch, criterion)
        scaler.scale(loss).backward()
    else:
        states, found = [], []
        with torch.no_grad(), autocast:
            for chunk in chunks:
                states.append(common.rng_state(ctx.device))
                found.append(encode(core, to_device(chunk, ctx.device)))
        scalars = {k: v for k, v in found[0].items() if v.ndim == 0}
        features = {k: torch.cat([out[k] for out in found]) for k in found[0].keys() - scalars.keys()}
        leaves = {k: v.detach().requires_grad_() for k, v in {**features, **scalars}.items()}
        batch = {k: torch.cat([b[k] for b in micro_batches]).to(ctx.device) for k in criterion.columns}
        loss, logs = criterion(leaves, batch)
        scaler.scale(loss).backward()
        first = 0
        for chunk, state in zip(chunks, states, strict=True):
            common.set_rng_state(state, ctx.device)
            rows = slice(first, first + len(chunk["index"]))
            first, last = rows.stop, chunk is chunks[-1]
            slopes = {k: leaves[k].grad[rows] for k in features}
            slopes |= {k: leaves[k].grad for k in scalars if last}  # the same in each chunk: once is enough
            with nullcontext() if last or ctx.world == 1 else getattr(net, "no_sync", nullcontext)():
                with autocast:
                    out = encode(net, to_device(chunk, ctx.device))
                sum((out[k] * slope).sum() for k, slope in slopes.items()).backward()
    core.end_step(ctx)
    return {k: ctx.sum(v.detach().clone()) / ctx.world for k, v in {"loss": loss, **logs}.items()}


def split_batch(batch: dict, size: int) -> list[dict]:
    """A batch in chunks of `size` samples."""
    parts = zip(*(v.split(size) for v in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def to_device(batch: dict, device) -> dict:
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


# ==== Evaluation ===============================================================================================


@torch.no_grad()
def text_features(model, texts: list[str], args, ctx) -> dict[str, torch.Tensor]:
    """(m, embed) of each level, L2-normalised float32; each text once, with texts of its own length."""
    tokenizer, size = tokenizer_of(args), args.eval_batch_size or args.batch_size
    tokenizer.enable_truncation(args.max_text_length)
    ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch(texts)]
    order, rows = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
    batches = common.eval_batches(len(ids), size, ctx)
    for batch in batches:
        found = model.encode_text(**to_device(pad_ids([ids[order[i]] for i in batch]), ctx.device))
        rows.append(torch.stack([F.normalize(found[level].float(), dim=-1) for level in model.levels], 1).cpu())
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)  # (m, levels, embed)
    rows = rows[torch.tensor(order).argsort()]
    return dict(zip(model.levels, rows.unbind(1), strict=True))


def class_features(model, names: list[str], args, ctx) -> torch.Tensor:
    """(K, embed) L2-normalised: each class, the mean over --templates."""
    texts = [template.replace("{}", name) for name in names for template in args.templates]
    found = text_features(model, texts, args, ctx)["patient"].unflatten(0, (-1, len(args.templates)))
    return F.normalize(found.mean(1), dim=-1)


@torch.no_grad()
def predict(model, dataset, ctx, say=None) -> dict:
    """Features of every image and every report, each once: the same for any number of ranks, to the last digit.

    -> ids, groups, classes {level: [n]}, eye_labels, targets (n, K), failed: of the n images; image_features {level:
    (n, embed)} L2-normalised (NaN: unreadable, or that eye is missing), eye_features (n, eyes, embed), what `visual`
    gives; text_ids, texts, text_features {level: (m, embed)}; pairs (p, 2): row of the image, row of the report;
    probs (n, K): softmax over the classes of --templates; logit_scale {level: float}.
    """
    args = dataset.args
    batches = common.eval_batches(len(dataset), args.eval_batch_size or args.batch_size, ctx)
    loader = common.data_loader(dataset, [[(0, i) for i in b] for b in batches], args, ctx)
    rows = []
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        for batch in tqdm(loader, desc=say, leave=False, disable=None if say and ctx.master else True):
            batch = to_device(batch, ctx.device)
            eyes = model.encode_eyes(batch["images"], batch["colour"])  # (B, eyes, embed)
            found = model.encode_image(eyes, batch["present"])
            parts = [F.normalize(found[level].float(), dim=-1) for level in model.levels]
            parts = torch.cat([torch.stack(parts, 1), eyes.float()], 1)  # (B, levels + eyes, embed)
            present = [batch["present"]] * (1 if model.monocular else 2)  # for left and right, and for the eyes
            seen = torch.cat([batch["bad"][:, None] == 0, *present], 1)  # (B, levels + eyes)
            lost = (seen & ~parts.isfinite().all(2)).any(1)  # (B,)
            rows.append(torch.cat([parts.masked_fill(~seen[..., None], math.nan).flatten(1), lost[:, None]], 1).cpu())
        texts = text_features(model, dataset.texts, args, ctx)
        names = dataset.class_names
        classes = class_features(model, names, args, ctx) if names else torch.zeros(0, 1)
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)
    if rows[:, -1].any():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    rows = rows[:, :-1].unflatten(1, parts.shape[1:])
    image, eyes = rows.split([len(model.levels), rows.shape[1] - len(model.levels)], 1)
    probs = np.zeros((len(rows), 0))
    if len(classes):
        probs = (model.scale("patient").exp().cpu() * image[:, 0] @ classes.T).double().softmax(1).numpy()
    return {
        "ids": dataset.ids,
        "groups": dataset.groups,
        "classes": dataset.classes if not model.monocular else {"patient": dataset.classes["patient"]},
        "eye_labels": dataset.eye_labels,
        "targets": dataset.targets,
        "probs": probs,
        "failed": image[:, 0].isnan().any(1).nonzero()[:, 0].tolist(),
        "image_features": dict(zip(model.levels, image.numpy().swapaxes(0, 1), strict=True)),
        "eye_features": eyes.numpy(),
        "text_ids": dataset.text_ids,
        "texts": dataset.texts,
        "text_features": {level: x.numpy() for level, x in texts.items()},
        "pairs": dataset.pairs,
        "logit_scale": {level: float(model.scale(level).exp()) for level in model.levels},
    }


def evaluate(model, dataset, criterion, ctx) -> dict[str, float]:
    """`metrics_of` all validation images and reports; the same on every rank."""
    model.eval()
    return metrics_of(predict(model, dataset, ctx, "evaluation"), dataset)


def metrics_of(out: dict, dataset) -> dict[str, float]:
    """Loss and retrieval of what `predict` returned, of the images that were read.

    {level}_{i2t,t2i}_recall_at_k: of the distinct reports an image finds, of the images a report finds; a report is
    right if it is the image's or word for word the same. mean_recall: the mean of the six of the patient's level.
    class_recall_at_1, class_map: images find distinct reports of their class (undefined without labels). val_loss and
    batch_recall_at_k: see `in_batches`.
    """
    args, features, texts = dataset.args, out["image_features"], out["text_features"]
    read = np.isfinite(features["patient"]).all(1)
    if not read.any():
        raise UserError(f"{dataset.source}: no image of the validation data could be read")
    pairs = out["pairs"][read[out["pairs"][:, 0]]]
    metrics = {"n": int(read.sum()), "n_missing": len(out["failed"]), "n_reports": len(out["texts"])}
    metrics |= in_batches(out, pairs, args)
    words = [common.same_words(text) for text in out["texts"]]
    _, first, code = np.unique(words, return_index=True, return_inverse=True)  # (D,), (m,)
    right = common.report_matches(pairs, out["texts"], len(read))  # (n, m)

    def recall(queries, gallery, hits, ks) -> np.ndarray:
        asked = hits.any(1)
        ranks = common.retrieval_ranks(queries[asked], gallery, right=hits[asked])
        return common.recall_at_k(ranks, ks).mean(0) if asked.any() else np.full(len(ks), np.nan)

    for level, image in features.items():
        seen = np.isfinite(image).all(1)
        found = {"i2t": recall(image[seen], texts[level][first], right[seen][:, first], KS)}
        found["t2i"] = recall(texts[level], image[seen], right[seen].T, KS)
        metrics |= {f"{level}_{w}_recall_at_{k}": float(v[i]) for w, v in found.items() for i, k in enumerate(KS)}
    metrics["mean_recall"] = float(np.mean([metrics[f"patient_{w}_recall_at_{k}"] for w in found for k in KS]))
    distinct = np.stack([pairs[:, 0], code[pairs[:, 1]]], 1)
    hits = common.class_matches(distinct, out["classes"]["patient"], len(first))[read]
    image, text, hits = features["patient"][read], texts["patient"][first][hits.any(0)], hits[:, hits.any(0)]
    metrics["class_recall_at_1"] = float(recall(image, text, hits, (1,))[0])
    metrics["class_map"] = (
        float(np.nanmean(common.average_precision(image, text, right=hits))) if hits.any() else np.nan
    )
    return metrics


def in_batches(out: dict, pairs: np.ndarray, args) -> dict[str, float]:
    """val_loss, that of training, and {level}_{i2t,t2i}_batch_recall_at_k, over batches of pairs of nearly equal size.

    The same report, word for word, is right as well (for the loss unless --same-text 0).
    """
    size, weights = args.eval_batch_size or args.batch_size, dict(zip(LEVELS, args.level_weights, strict=True))
    metrics = {"val_loss": 0.0}
    for some in np.array_split(pairs, math.ceil(len(pairs) / size)):
        texts = [out["texts"][j] for j in some[:, 1]]
        same = common.report_matches(np.arange(len(some))[:, None].repeat(2, 1), texts, len(some))
        for level, features in out["image_features"].items():
            image, text = features[some[:, 0]], out["text_features"][level][some[:, 1]]
            image, text = torch.from_numpy(image).double(), torch.from_numpy(text).double()
            seen = image.isfinite().all(1)
            if not seen.any():
                continue
            image, text, right = image[seen], text[seen], same[np.ix_(seen, seen)]
            target = torch.from_numpy(right if args.same_text else np.eye(len(right))).double()
            target, logits = target / target.sum(1, keepdim=True), out["logit_scale"][level] * image @ text.T
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            metrics["val_loss"] += weights[level] * float(loss) * len(some) / len(pairs)
            for way, queries, gallery in (("i2t", image, text), ("t2i", text, image)):
                found = common.recall_at_k(common.retrieval_ranks(queries, gallery, right=right), KS).mean(0)
                for k, recall in zip(KS, found, strict=True):
                    key = f"{level}_{way}_batch_recall_at_{k}"
                    metrics[key] = metrics.get(key, 0.0) + float(recall) * len(some) / len(pairs)
    return metrics


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
    begin_files(args, ctx, saved)  # task
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
            keep_epoch(args, whole, sampler.per_epoch)  # task
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
            warn_of_chance(args, train_loss, state, criterion, log)  # task
            log.scalars(step, {f"val/{k}": v for k, v in metrics.items()} | {"train/epoch_loss": train_loss})
            shown = " - ".join(f"{k}: {v:.4f}" for k, v in record.items() if k in ("train_loss", "val_loss", *SHOWN))
            log.info(f"Epoch {epoch_done} - {shown}" + (" - best" if improved else ""))
        # not while steps fail: the weights may have burst, and the checkpoints of before are few
        if evaluating or stopping or (good and step % args.save_every == 0):  # rank 0 writes
            save()
            progress.skip()
        elif good and step % (sampler.per_epoch * args.save_epoch_frequency) == 0:  # task
            save()  # task
        if stopping:
            ctx.barrier()  # torchrun ends the others once one leaves: rank 0 must have saved
            log.info(f"{stop.name or 'a signal on another rank'}: saved at step {step} (--resume auto continues)")
            log.close()
            return 143
    bar.close()

    # ---- 6. the best model, its thresholds
    return finish(args, ctx, model, val_set, best, log)


def begin_files(args, ctx, saved: dict | None) -> None:
    """The arguments of this start, as the original lists them; what an earlier run left in the folder, put right."""
    left, last = list(args.output_dir.glob(EPOCH.format(epoch="[0-9]*"))), args.output_dir / LAST
    if left and not saved and not args.overwrite:
        raise UserError(f"{left[0]}: of another run (--resume FILE continues from it, --overwrite forgets it)")
    ctx.barrier()  # all have looked
    if ctx.master:
        lines = [f"{name}: {value}" for name, value in sorted(common.plain_args(args).items())]
        common.write_atomic(args.output_dir / PARAMS, "\n".join(lines) + "\n")
        for old in [] if saved else left:
            old.unlink()
        if saved and args.resume != "auto" and Path(args.resume).resolve() != last.resolve():
            if last.exists() and Path(args.resume).resolve() != common.previous_of(last).resolve():
                common.link_file(last, common.previous_of(last))
            common.link_file(Path(args.resume), last)  # `auto` must not go back to what is given up now


def keep_epoch(args, whole: dict, per_epoch: int) -> None:
    """After every --save-epoch-frequency epochs the checkpoint also stays as epoch{N}.pt."""
    epoch, rest = divmod(whole["state"]["step"], per_epoch)
    if epoch and not rest and epoch % args.save_epoch_frequency == 0:
        save_checkpoint(args.output_dir / EPOCH.format(epoch=epoch), whole)


def warn_of_chance(args, train_loss: float, state: dict, criterion, log) -> None:
    """The alarm for features that have collapsed: the loss stays at what it is when all pairs look alike."""
    chance = criterion.chance(state["global_batch"])
    if state["updates"] > args.warmup and abs(train_loss - chance) < 0.01 * chance:
        log.warning(
            f"the loss is {train_loss:.3f}, that of guessing ({chance:.3f} for {state['global_batch']} pairs), after "
            "the warm-up: the features tell no pairs apart (lower --lr, a longer --warmup, or weights to begin with)"
        )


def finish(args, ctx, model, val_set, best, log) -> int:
    """best_model.pt, the export, and what the best model reached."""
    if not best.entries:
        raise UserError(f"{args.output_dir}: none of the run's best models is here (resume in the run's own folder)")
    entry, checkpoint = best.entries[0], best.memory[best.entries[0]["path"]]
    metrics = checkpoint["metrics"]
    if ctx.master:
        save_checkpoint(args.output_dir / BEST, checkpoint)
        if args.export:
            common.save_weights(args.export, export_weights(build_eval_model(checkpoint, args, torch.device("cpu"))))
    names = [f"patient_{way}_recall_at_1" for way in ("i2t", "t2i")]
    shown = " - ".join(f"{k}: {metrics[k]:.4f}" for k in ("val_loss", *SHOWN, *names) if k in metrics)
    log.info(f"best: step {entry['step']}, {metrics['n']:.0f} validation images: {shown} -> {args.output_dir / BEST}")
    log.close()
    return 0


# ==== Main =====================================================================================================


def convert(args) -> int:
    """--convert: the weights of --pretrained (or none) as a checkpoint, with the tokenizer, for evaluate.py."""
    args.monocular, args.label_columns = bool(args.monocular), []
    seed_everything(args.seed)
    model = build_model(args)
    save_checkpoint(args.convert, common.model_checkpoint(TASK, args, model, {}))
    print(f"{args.pretrained} -> {args.convert} (evaluate.py --test-only {args.convert} --val-data ...)")
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.convert:
        return convert(args)
    common.set_deterministic(args.deterministic)
    if args.use_flash_attention:
        torch.backends.cuda.enable_math_sdp(False)
    with common.process_group(args.device, args.timeout_minutes) as ctx:
        return train(args, ctx)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
