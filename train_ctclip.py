"""Train CT-CLIP: chest-CT volumes and their reports in one space, for zero-shot findings, retrieval and features.

Model    CTViT (factorised space / time transformer with a quantised output) and BERT, as in CT-CLIP v2: it loads
         CT-CLIP_v2.pt, CT_VocabFine_v2.pt, CT_LiPro_v2.pt and writes files that the original reads (--export)
Papers   CT-CLIP and CT-RATE arXiv 2403.17834, CLIP arXiv 2103.00020, SigLIP arXiv 2303.15343, gradient cache arXiv
         2101.06983; github.com/ibrahimethemhamamci/CT-CLIP
Data     --train-data and --valid-data: a cache of prepare_ct.py ctclip, or a CT-RATE folder (train, valid_fixed, ...),
         which is then preprocessed while training; reports and labels beside it, as the hub has them
Weights  --pretrained file, or 'none'; --vocab vocab.txt of BiomedVLP-CXR-BERT-specialized for the released weights
CPU      python demo_data.py ct --out demo
         python prepare_ct.py ctclip --data-root demo/dataset/train --size 24 96 96 --out demo/cache/train
         python prepare_ct.py ctclip --data-root demo/dataset/valid --size 24 96 96 --out demo/cache/valid
         python train_ctclip.py --config configs/ctclip.yaml configs/experiments/demo.yaml \\
             --train-data demo/cache/train --valid-data demo/cache/valid --vocab demo/vocab.txt
1 GPU    python train_ctclip.py --config configs/ctclip.yaml --train-data cache/train --valid-data cache/valid \\
             --amp --grad-checkpointing --batch-size 8 --accum-steps 16     # 128 pairs in one loss, by gradient cache
N GPUs   torchrun --nproc_per_node N train_ctclip.py ... (--batch-size is per process; the loss is over all of them)
Resume   the same command with --resume auto, or --resume saves/checkpoint_step_5000.pt: bit for bit as if never stopped
Writes   saves/checkpoint_step_*.pt (the last three), best_step_*.pt (top k), best_model.pt, training.log,
         results.jsonl
"""

import argparse
import hashlib
import math
import os
import sys
import time
from contextlib import nullcontext
from copy import copy, deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import CT_RATE_LABELS, Progress, RunLog, StopSignal, TopK, UserError, save_checkpoint, seed_everything

TASK, MONITOR = "ctclip", "macro_auroc"
METRICS = ("auroc", "auprc", "f1", "precision", "recall")
SHOWN = (*(f"macro_{m}" for m in METRICS), "recall_at_5")  # of an evaluation, on the console: those in --metrics
LOG, RESULTS, LAST = "training.log", "results.jsonl", "checkpoint_step_{step}.pt"
TOP, BEST = "best_step_{step}.pt", "best_model.pt"
TENSORBOARD = "tensorboard"
WANDB_PROJECT = "ctclip"
# A checkpoint can only be continued or evaluated with these as they were.
FIXED_ARGS = ["model_config", "label_columns", "text", "max_text_length", "loss", "weight_decay", "use_ema"]

PROMPTS = ["{} is present.", "{} is not present."]  # of the original's zero_shot.py
UNUSED = (  # parameters that stand in the file and take no part in the loss: frozen, so that DDP need not wait for them
    "text_transformer.pooler.", "to_patch_emb_first_frame.", "to_pixels_first_frame.", "to_pixels.",
    "to_text_latent_extra.", "to_visual_latent_extra.", ".context_norm.", ".null_kv",
)  # fmt: skip
BERT = ("vocab", "hidden", "layers", "heads", "ffn", "positions", "dropout")
# size: voxels (D, H, W) along S, L, P; patch in plane and along S; temperature: log of the scale of the logits at start
CTVIT = ("size", "patch", "temporal_patch", "dim", "codebook", "spatial_depth", "temporal_depth", "heads", "dim_head")
CTVIT += ("latent", "temperature")
PRESETS = {
    "ctclip-v2": (((240, 480, 480), 20, 10, 512, 8192, 4, 4, 8, 32, 512, 1.0), (30522, 768, 12, 12, 3072, 512, 0.25)),
    "small": (((120, 240, 240), 20, 10, 256, 2048, 4, 4, 8, 32, 256, 2.66), (0, 256, 4, 4, 1024, 512, 0.1)),
    "tiny": (((24, 96, 96), 24, 6, 64, 256, 2, 2, 4, 16, 64, 2.66), (0, 64, 2, 4, 256, 512, 0.0)),
}
PRESETS = {  # a vocabulary of 0 words: that of --vocab
    name: {**dict(zip(CTVIT, vit, strict=True)), "bert": dict(zip(BERT, bert, strict=True))}
    for name, (vit, bert) in PRESETS.items()
}


# ==== Arguments ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", help="YAML or INI files of defaults; the command line wins")
    onoff = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--train-data", type=Path, help="cache of prepare_ct.py ctclip, or CT-RATE folder (train_fixed or train)")
    add("--valid-data", type=Path, help="the same for validation (valid_fixed or valid)")
    add("--ct-rate-root", "--DATA_ROOT", type=Path, help="CT-RATE's `dataset` folder, where both are looked for")
    add("--reports", type=Path, nargs="+", help="CSVs of reports of a CT-RATE folder (those beside it)")
    add("--metadata", type=Path, nargs="+", help="CSVs of its metadata (those beside it)")
    add("--labels", type=Path, nargs="+", help="CSVs of its labels (those beside it)")
    add("--label-columns", nargs="+", default=CT_RATE_LABELS, metavar="NAME", help="columns to predict")
    add("--hu-source", choices=["auto", "csv", "header", "none"], default="auto", help="what makes HU of stored values")
    add("--text", choices=["findings", "impression", "both"], default="both", help="part of the report that is read")
    add("--max-text-length", type=int, default=512, help="tokens of a report that are read")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="what an unreadable sample does")
    add("--max-bad-fraction", type=float, default=0.05, help="share of unreadable samples that ends a run")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), default="ctclip-v2", help="sizes of volume and model")
    add("--pretrained", help="weights to begin with (kinds: see the script's head), or 'none'")
    add("--text-pretrained", help="weights of the text encoder alone: BERT file, Hugging Face folder or hub id")
    add("--weights-root", "--WEIGHTS_ROOT", type=Path, help="folder where weights and vocabulary are looked for")
    add("--vocab", type=Path, help="vocab.txt or tokenizer.json of the text encoder, or its folder")
    add("--allow-partial", action="store_true", help="accept weights that lack part of the backbone")
    add("--text-dropout", type=float, help="dropout in the text encoder (that of the preset)")
    add("--dropout-rate", type=float, default=0.3, help="dropout in the classification head")
    add("--freeze-vq", action="store_true", help="keep the codebook as it is")
    add("--freeze-text", action="store_true", help="freeze the text encoder")
    add("--freeze-vision", action="store_true", help="freeze the image encoder")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", "--loss-type", choices=["clip", "siglip"], default="clip", help="loss")
    add("--max-logit-scale", type=float, default=100.0, help="bound of the logits' scale, exp(temperature)")
    add("--dedup-positives", action="store_true", help="volumes with the same report are positives of each other")
    add("--label-loss-weight", type=float, default=0.0, help="weight of the loss of a head for the labels (0: no head)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", "--max-epochs", type=int, help="passes over the training data")
    add("--max-steps", type=int, default=10000, help="optimizer steps, instead of --epochs (0: by epochs)")
    add("--batch-size", type=int, default=8, help="samples per process and micro-step")
    add("--accum-steps", "--gradient-accumulation-steps", type=int, default=1, help="micro-steps per step")
    add("--lr", "--learning-rate", type=float, default=1.25e-6, help="peak learning rate")
    add("--weight-decay", type=float, default=0.01, help="decay of matrices (not norms, biases, positions)")
    add("--scheduler", choices=["cosine", "plateau", "constant"], default="cosine", help="learning rate after warm-up")
    add("--warmup", "--warmup-steps", type=int, default=1000, help="steps of linear warm-up")
    add("--min-lr-ratio", type=float, default=0.01, help="end of the cosine as a share of --lr")
    add("--plateau-patience", type=int, default=5, help="evaluations without gain before the rate falls")
    add("--plateau-factor", type=float, default=0.5, help="what the rate is multiplied by on a plateau")
    add("--max-grad-norm", type=float, default=0.5, help="gradients are scaled down to this norm")
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
    add("--fsdp", action="store_true", help="split blocks and latent projections over the ranks (FSDP2) to save memory")
    add("--deterministic", action="store_true", help="bit-exact CUDA kernels, at a cost in speed")

    add = parser.add_argument_group("evaluation").add_argument
    names = [*METRICS, *(f"macro_{m}" for m in METRICS), "recall_at_5", "val_loss"]
    add("--monitor", "--best-metric", choices=names, default=MONITOR, help="what best means")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="metrics shown and logged, macro means")
    add("--threshold", type=float, help="probability that counts as present (the checkpoint's, or 0.5)")
    add("--eval-batch-size", type=int, default=0, help="samples per evaluation batch (--batch-size)")
    add("--eval-every", "--eval-every-n-steps", type=int, default=1000, help="steps between evaluations (0: an epoch)")
    add("--eval-samples", type=int, default=200, help="validation cases while training (0: all); at the end all")
    add("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="pairs of prompts: present, absent, with {}")
    add("--zero-shot", action="store_true", help="score by prompts also where the model has a head for the labels")

    add = parser.add_argument_group("checkpoint").add_argument
    add("--output-dir", type=Path, default=Path("saves"), help="folder of the run")
    add("--resume", nargs="?", const="auto", help="checkpoint to continue; bare or 'auto': the run's last, if any")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add(
        "--save-every", "--save-every-n-steps", type=int, default=1000,
        help="steps between saves of the last checkpoint, besides evaluations",
    )  # fmt: skip
    add("--top-k", type=int, default=1, help="best models kept")
    add("--export", type=Path, help="file for the best weights, original key names")
    add("--convert", type=Path, help="write --pretrained as a checkpoint for evaluate.py, and end")

    add = parser.add_argument_group("system").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or N")
    add("--num-workers", type=int, default=4, help="data processes per rank")
    add("--seed", type=int, default=2025, help="seed of weights, order, augmentation and dropout")
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
    args.model_config, args.tokenizer, args.split = None, None, "valid"
    words = sys.argv[1:] if argv is None else argv
    if args.epochs is not None and not any(str(word).startswith("--max-steps") for word in words):
        args.max_steps = 0  # that of a file, or the default
    args.epochs = 1 if args.epochs is None else args.epochs
    common.check_positive(args)
    common.need_writable([args.export])
    for name in ("grad_cache_chunk", "eval_samples", "label_loss_weight"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if args.max_logit_scale <= 1 or args.max_text_length < 3:
        raise UserError("--max-logit-scale must be above 1 and --max-text-length at least 3")
    if args.fsdp and (args.use_ema or args.check_ranks):
        raise UserError("--fsdp goes neither with --use-ema nor with --check-ranks (each rank holds a part)")
    if args.freeze_text and args.freeze_vision:
        raise UserError("--freeze-text and --freeze-vision together leave nothing to train")
    prompt_pairs(args)
    args.monitor = f"macro_{args.monitor}" if args.monitor in METRICS else args.monitor
    root, weights = args.ct_rate_root, args.weights_root
    if not args.convert:
        args.train_data = args.train_data or look_for("--train-data", root, ["train_fixed", "train"])
        args.valid_data = args.valid_data or look_for("--valid-data", root, ["valid_fixed", "valid"])
    bert = "BiomedVLP-CXR-BERT-specialized"
    args.vocab = args.vocab or look_for("--vocab", weights, ["vocab.txt", f"{bert}/vocab.txt", bert])
    if args.pretrained is None:
        args.pretrained = "none"
        if args.preset == "ctclip-v2" and not args.text_pretrained:
            args.pretrained = str(look_for("--pretrained", weights, ["CT-CLIP_v2.pt"]))
    if args.convert and args.pretrained == "none":
        raise UserError("--convert: no --pretrained to convert")
    return args


def look_for(flag: str, root: Path | None, names: list[str]) -> Path:
    """The first of `names` that is in `root`, in place of a flag that was not given."""
    found = next((root / name for name in names if (root / name).exists()), None) if root else None
    if found is None:
        where = f"; there is no {', '.join(str(root / name) for name in names)}" if root else ""
        raise UserError(f"{flag} is missing ({build_parser()._option_string_actions[flag].help}{where})")
    return found


def prompt_pairs(args) -> list[tuple[str, str]]:
    """--prompts -> [(present, absent), ...]."""
    if len(args.prompts) % 2 or not all("{}" in prompt for prompt in args.prompts):
        raise UserError("--prompts: pairs of a prompt for present and one for absent, each with {} for the finding")
    return list(zip(args.prompts[::2], args.prompts[1::2], strict=True))


def args_from_checkpoint(saved: dict, **overrides) -> argparse.Namespace:
    """The arguments a checkpoint was trained with, except for `overrides` that are not None."""
    args = common.saved_args(build_parser(), saved, PRESETS["tiny"])
    args.tokenizer = saved["tokenizer"]
    vars(args).update({k: v for k, v in overrides.items() if v is not None})
    for name in ("train_data", "valid_data", "output_dir"):
        setattr(args, name, Path(getattr(args, name)) if getattr(args, name) else None)
    return args


# ==== Data =====================================================================================================


class CTReports(Dataset):
    """Volumes of one split with their reports. An item is keyed by (epoch, index).

    Item: volume (D, H, W), HU -1000 to 1000, axes toward S, L, P: int16 from a cache, float32 if preprocessed now;
    input_ids (L,) int64; target (K,) float32, NaN = unknown; text_id: equal for equal reports; index; bad = 1 if the
    volume could not be read (--on-bad-sample skip).
    """

    def __init__(self, folder: Path, args, train: bool):
        self.args, self.train, self.class_names = args, train, list(args.label_columns)
        tables = (args.reports, args.metadata, args.labels)
        table, self.file = common.ctclip_cases(folder, *tables, self.class_names, args.hu_source)
        texts = np.array([report_text(row, args.text) for row in table.to_dict("records")], dtype=object)
        self.n_without_text = int((texts == "").sum()) if train else 0
        if train:
            table, texts = table[texts != ""].reset_index(drop=True), texts[texts != ""]
            if not len(table):
                raise UserError(f"{self.file}: no volume of {folder} has a report (--text {args.text})")
        self.table, self.texts = table, texts.tolist()
        self.ids, self.groups, self.paths = (table[c].tolist() for c in ("series_id", "patient_id", "img_path"))
        self.targets = common.label_array(table, self.class_names, self.file)  # (n, K)
        self.text_ids = np.unique(texts.astype(str), return_inverse=True)[1]
        self.size = tuple(settled_config(args)["size"])
        self.tokenizer = tokenizer_of(args)
        self.tokenizer.enable_truncation(args.max_text_length)

    def __len__(self):
        return len(self.ids)

    def subset(self, index) -> "CTReports":
        """The same data set with some of its cases."""
        part = copy(self)
        part.table = self.table.iloc[index].reset_index(drop=True)
        for name in ("texts", "ids", "groups", "paths"):
            setattr(part, name, [getattr(self, name)[i] for i in index])
        part.targets, part.text_ids = self.targets[index], self.text_ids[index]
        return part

    def notes(self) -> str:
        """What reading the first volume found out."""
        try:
            volume = self.load(0)
        except UserError as e:
            return str(e)
        kind = "cached" if str(self.paths[0]).endswith(".npy") else "preprocessed while training"
        n_tokens = len(self.tokenizer.encode(self.texts[0]).ids)
        text = f"{self.ids[0]}, {kind}, {volume.min():.0f} to {volume.max():.0f} HU, {n_tokens} tokens"
        return text + (f"; {self.n_without_text} volumes without a report are left out" if self.n_without_text else "")

    def load(self, index: int) -> np.ndarray:
        """(D, H, W) HU in [-1000, 1000]."""
        options = common.volume_options(self.table.iloc[index])
        return common.ctclip_volume(Path(self.paths[index]), self.size, self.args.hu_source, **options)[0]

    def __getitem__(self, key: tuple[int, int]):
        _, index = key
        bad, source = 0, index
        while True:
            try:
                volume = self.load(source)
                break
            except UserError:
                if self.args.on_bad_sample == "fail":
                    raise
                bad += 1
                if not self.train:  # an unread case stays in its place, marked, and is reported as missing
                    volume = np.full(self.size, -1000, np.int16)
                    break
                if bad > len(self):
                    raise
                source = (source + 1) % len(self)  # the next row, volume and report together
        return {
            "volume": torch.from_numpy(np.array(volume)),
            "input_ids": torch.tensor(self.tokenizer.encode(self.texts[source]).ids),
            "target": torch.from_numpy(self.targets[source]),
            "text_id": torch.tensor(self.text_ids[source]),
            "index": torch.tensor(index),
            "bad": torch.tensor(bad),
        }

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """A batch, with reports padded to its longest and attention_mask (B, L) int64."""
        ids = [item.pop("input_ids") for item in items]
        return default_collate(items) | pad_ids(ids)


def pad_ids(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids of different lengths -> input_ids, attention_mask (B, L) int64."""
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(x) for x in ids], batch_first=True)
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": mask}


def report_text(row: dict, part: str) -> str:
    """Findings, impression, or both on two lines, without quotes and brackets (as the original strips them)."""
    names = {"findings": ["findings"], "impression": ["impression"], "both": ["findings", "impression"]}[part]
    return "\n".join(filter(None, (row[n].translate(str.maketrans("", "", "\"'()")).strip() for n in names)))


def tokenizer_of(args):
    """The tokenizer of --vocab, or the one that a checkpoint carries."""
    return common.Tokenizer.from_str(args.tokenizer) if args.tokenizer else common.load_tokenizer(args.vocab)


def stratified(targets: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows of (N, K) whose shares of positives are nearly those of all; the same for the same seed.

    Row after row, the one that brings the counts closest to their share (herding, Welling 2009), in random order.
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    y = np.nan_to_num(targets[order], nan=0.0)  # (N, K)
    owed, free, chosen = np.zeros(y.shape[1]), np.ones(len(y), bool), []
    for _ in range(min(n, len(y))):
        owed += y.mean(0)
        distance = np.where(free, ((owed - y) ** 2).sum(1), np.inf)
        best = int(distance.argmin())
        owed, free[best] = owed - y[best], False
        chosen.append(best)
    return np.sort(order[chosen])


def data_file(args, split: str | None = None) -> Path:
    """The table of the cases of a split ("train" or "valid")."""
    folder = args.train_data if (split or args.split) == "train" else args.valid_data
    if folder is None or (folder / "volumes.csv").is_file():
        return folder and folder / "volumes.csv"
    return common.ctclip_cases(folder, args.reports, args.metadata, args.labels, args.label_columns)[1]


def build_datasets(args):
    train_set, val_set = CTReports(args.train_data, args, True), CTReports(args.valid_data, args, False)
    shared = set(train_set.groups) & set(val_set.groups)
    if shared:
        raise UserError(f"{val_set.file}: patient {sorted(shared)[0]} is in the training data too ({len(shared)} are)")
    missing = [p for d in (train_set, val_set) for p in d.paths if not os.path.exists(p)]
    if missing and args.on_bad_sample == "fail":
        raise UserError(f"{missing[0]}: no such volume ({len(missing)} of the tables' are missing)")
    both = (val_set.targets == 0).any(0) & (val_set.targets == 1).any(0)
    if args.monitor.startswith("macro_") and not both.any():
        raise UserError(
            f"{val_set.file}: no case with and without any of {', '.join(args.label_columns[:3])} ..., so --monitor "
            f"{args.monitor} is undefined (--labels, --label-columns, or --monitor recall_at_5)"
        )
    if args.label_loss_weight and np.isnan(train_set.targets).all():
        raise UserError(f"{train_set.file}: no labels for --label-loss-weight (--labels, --label-columns)")
    if args.on_bad_sample == "fail":
        train_set.load(0)  # of another size, for example
    return train_set, val_set


def build_eval_dataset(args) -> CTReports:
    if args.split not in ("train", "valid"):
        raise UserError(f"--split {args.split}: there are train and valid (--train-data, --valid-data)")
    folder = args.train_data if args.split == "train" else args.valid_data
    if folder is None:
        raise UserError(f"--{args.split}-data is missing (the checkpoint was made without data)")
    return CTReports(folder, args, False)


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


class GammaNorm(nn.Module):
    """LayerNorm whose offset is a buffer of zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PEG(nn.Module):
    """Position by a depthwise 3 x 3 x 3 convolution over (T, h, w), which looks back in T only.

    x (n, l, E) is *reshaped* to (B, T, h, w, E). For sequences along T this mixes up the places, and the released
    weights were trained that way.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x, shape):
        (B, T), out = shape[:2], 0
        grid = x.reshape(B * T, *shape[2:], -1).permute(0, 3, 1, 2)  # (B * T, E, h, w), channels last
        for lag in range(min(3, T)):  # three 2-D convolutions: the weight gradient of the 3-D one is slow
            bias = None if lag else self.dsconv.bias
            y = F.conv2d(grid, self.dsconv.weight[:, :, 2 - lag], bias, padding=1, groups=grid.shape[1])
            y = y.permute(0, 2, 3, 1).unflatten(0, (B, T))
            out = out + F.pad(y[:, : T - lag], (0, 0, 0, 0, 0, 0, lag, 0)) if lag else y
        return out.reshape(x.shape)


class CosineAttention(nn.Module):
    """Attention of normalised queries and keys, scale 8. Only queries pass the norm: so were the weights trained."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.null_kv = nn.Parameter(torch.zeros(heads, 0, dim_head))
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim_head)), nn.Parameter(torch.ones(dim_head))
        self.norm, self.context_norm = GammaNorm(dim), GammaNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(self.norm(x)), *self.to_kv(x).chunk(2, dim=-1))
        )  # (n, heads, l, dim_head)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), bias, scale=8.0)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (n, l, E)


class GEGLU(nn.Module):
    """Half of the channels times the GELU of the other half (arXiv 2002.05202)."""

    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class CTViTLayer(nn.ModuleList):
    """0: PEG, 1: attention, 3: feed-forward, each beside a skip; the places are those of the key names."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        hidden = int(4 * 2 / 3 * dim)
        mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * hidden, bias=False), GEGLU(), nn.Identity(),
            nn.Linear(hidden, dim, bias=False),
        )  # fmt: skip
        super().__init__([PEG(dim), CosineAttention(dim, heads, dim_head), nn.Identity(), mlp])

    def forward(self, x, shape, bias=None):
        x = x + self[0](x, shape)
        x = x + self[1](x, bias)
        return x + self[3](x)


class CTViTStack(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.layers = nn.ModuleList(CTViTLayer(dim, heads, dim_head) for _ in range(depth))
        self.norm_out, self.grad_checkpointing = GammaNorm(dim), False

    def forward(self, x, shape, bias=None):
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = common.checkpointed(layer, x, shape, bias)
            else:
                x = layer(x, shape, bias)
        return self.norm_out(x)


class PositionBias(nn.Module):
    """Continuous position bias (Swin v2, arXiv 2111.09883): an MLP of the log-distance of two places.

    It runs once for each of the (2h - 1)(2w - 1) distinct distances, not for each of the (h w)^2 pairs.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(n, dim), nn.LeakyReLU(0.1)) for n in (2, dim)]
        self.net = nn.ModuleList([*hidden, nn.Linear(dim, heads)])

    def forward(self, h: int, w: int):
        """-> (heads, h * w, h * w); entry (i, j) is that of place i minus place j."""
        device = self.net[2].weight.device
        rows, columns = torch.arange(1 - h, h, device=device), torch.arange(1 - w, w, device=device)
        d = torch.cartesian_prod(rows, columns).float()  # ((2h - 1)(2w - 1), 2)
        table = d.sign() * (d.abs() + 1).log()
        for layer in self.net:
            table = layer(table)  # ((2h - 1)(2w - 1), heads)
        place = torch.arange(h * w, device=device)
        y, x = place // w, place % w
        index = (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)  # (h * w, h * w)
        return table.T[:, index]


class Codebook(nn.Module):
    """Cosine vector quantisation: the nearest of the codebook's rows; the gradient passes through unchanged.

    In training the rows move toward the mean of what they stand for, once a step (`move`), over all chunks and ranks:
    vector-quantize-pytorch 1.1.2, use_cosine_sim, decay 0.8.
    """

    def __init__(self, size: int, dim: int, decay: float = 0.8):
        super().__init__()
        self.decay, self.bins, self.sums = decay, None, None
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(1, size))
        self.register_buffer("embed", F.normalize(torch.randn(1, size, dim), dim=-1))

    def forward(self, x, chunk: int = 4096):
        """(..., E) -> rows of the codebook (..., E) float32. The distances exist `chunk` tokens at a time."""
        # bf16 would choose other rows; the meta device, on which FLOPs are counted, knows no autocast
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            x = x.float()
            f, e = F.normalize(x.detach().flatten(0, -2), dim=-1), F.normalize(self.embed[0], dim=-1)
            index = torch.cat([(part @ e.T).argmax(1) for part in f.split(chunk)])  # (n,)
            if self.training and torch.is_grad_enabled():
                if self.sums is None:
                    self.bins, self.sums = e.new_zeros(len(e)), torch.zeros_like(e)
                self.bins.index_add_(0, index, torch.ones_like(f[:, 0]))
                self.sums.index_add_(0, index, f)
            return self.embed[0][index].view_as(x) + (x - x.detach())

    @torch.no_grad()
    def move(self, ctx):
        """Follow the tokens seen since the last call, on all ranks."""
        if self.sums is None:
            return
        bins, sums = ctx.sum(self.bins), ctx.sum(self.sums)
        e = F.normalize(self.embed[0], dim=-1)
        mean = torch.where(bins[:, None] > 0, F.normalize(sums / bins[:, None].clamp(min=1), dim=-1), e)
        weight = (1 - self.decay) * sums.isfinite().all()  # a step that is not finite moves nothing
        self.cluster_size.lerp_(bins[None], weight)
        self.embed.lerp_(mean.nan_to_num()[None], weight)
        self.bins, self.sums = None, None


class CTViT(nn.Module):
    """image (B, 1, D, H, W) in [-1, 1] -> tokens (B, T, h, w, E) from the codebook. D, H, W: toward S, L, P."""

    def __init__(self, config: dict):
        super().__init__()
        dim, heads, dim_head = config["dim"], config["heads"], config["dim_head"]
        self.patch, self.temporal_patch = config["patch"], config["temporal_patch"]
        self.spatial_rel_pos_bias = PositionBias(dim, heads)
        flat, cube = self.patch**2, self.patch**2 * self.temporal_patch
        embed = [
            nn.Sequential(nn.Identity(), nn.LayerNorm(n), nn.Linear(n, dim), nn.LayerNorm(dim)) for n in (flat, cube)
        ]
        self.to_patch_emb_first_frame, self.to_patch_emb = embed
        self.enc_spatial_transformer = CTViTStack(dim, config["spatial_depth"], heads, dim_head)
        self.enc_temporal_transformer = CTViTStack(dim, config["temporal_depth"], heads, dim_head)
        self.vq = nn.ModuleDict({"_codebook": Codebook(config["codebook"], dim)})
        self.to_pixels_first_frame, self.to_pixels = (nn.Sequential(nn.Linear(dim, n)) for n in (flat, cube))

    def encode(self, image):
        """-> (B, T, h, w, E), before quantisation."""
        p, t = self.patch, self.temporal_patch
        x = image[:, 0].unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, t))  # (B, T, t, h, p, w, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # (B, T, h, w, t * p * p)
        _, norm, linear, norm_out = self.to_patch_emb
        weight, bias = linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias  # no second copy of x
        x = norm_out(F.linear(F.layer_norm(x, norm.normalized_shape), weight, bias))  # (B, T, h, w, E)
        shape = x.shape[:-1]
        B, T, h, w = shape
        x = self.enc_spatial_transformer(x.reshape(B * T, h * w, -1), shape, self.spatial_rel_pos_bias(h, w))
        x = x.view(B, T, h * w, -1).transpose(1, 2).reshape(B * h * w, T, -1)
        x = self.enc_temporal_transformer(x, shape)
        return x.view(B, h, w, T, -1).permute(0, 3, 1, 2, 4)

    def forward(self, image):
        return self.vq["_codebook"](self.encode(image))


class CTCLIP(nn.Module):
    """volume (B, D, H, W) HU in [-1000, 1000], reports (B, L) -> features of both in one space, and their scale."""

    def __init__(self, config: dict):
        super().__init__()
        D, H, W = config["size"]
        grid = H // config["patch"] * (W // config["patch"])
        self.temperature = nn.Parameter(torch.tensor(float(config["temperature"])))
        self.text_transformer, self.visual_transformer = Bert(config["bert"]), CTViT(config)
        width, latent = config["bert"]["hidden"], config["latent"]
        for name in ("", "_extra"):
            setattr(self, f"to_text_latent{name}", nn.Linear(width, latent, bias=False))
            setattr(self, f"to_visual_latent{name}", nn.Linear(grid * config["dim"], latent, bias=False))
        self.classifier = nn.Linear(latent, config["num_labels"]) if config.get("num_labels") else None
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.get("logit_bias") else None
        self.max_logit_scale, self.dropout_rate, self.freeze_vq, self.tokenizer = math.inf, 0.3, False, None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not is_unused(name))

    def train(self, mode: bool = True):
        """Frozen parts use no dropout, and their codebook rests."""
        super().train(mode)
        common.rest_frozen(self)
        if self.freeze_vq:
            self.visual_transformer.vq.eval()
        return self

    def encode_image(self, image):
        """(B, 1, D, H, W) in [-1, 1] -> (B, latent) L2-normalised float32."""
        tokens = self.visual_transformer(image).mean(1)  # (B, h, w, E)
        return F.normalize(self.to_visual_latent(tokens.flatten(1)).float(), dim=-1)

    def encode_text(self, input_ids, attention_mask):
        """(B, L) -> (B, latent) L2-normalised float32."""
        hidden = self.text_transformer(input_ids, attention_mask)[:, 0]  # (B, E), of [CLS]
        return F.normalize(self.to_text_latent(hidden).float(), dim=-1)

    def classify(self, image_features):
        """Logits (B, K) of the label head (CT-LiPro: ReLU, dropout, linear)."""
        return self.classifier(F.dropout(image_features.relu(), self.dropout_rate, self.training)).float()

    def forward(self, volume, input_ids, attention_mask):
        image_features = self.encode_image(volume[:, None].float() / 1000)
        out = {"image": image_features, "text": self.encode_text(input_ids, attention_mask)}
        out["logit_scale"] = self.temperature.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias.clone()
        if self.classifier is not None and self.classifier.weight.requires_grad:
            out["logits"] = self.classify(image_features)
        return out

    @torch.no_grad()
    def begin_step(self):
        self.temperature.clamp_(max=math.log(self.max_logit_scale))

    @torch.no_grad()
    def end_step(self, ctx):
        """Once a step, after the backward pass: what no other part of the loop moves or sums over the ranks."""
        self.visual_transformer.vq["_codebook"].move(ctx)
        if common.is_split(self):  # FSDP leaves the gradients of what is not split to us
            for p in self.parameters():
                if p.grad is not None and not isinstance(p, DTensor):
                    ctx.sum(p.grad).div_(ctx.world)


def is_unused(name: str) -> bool:
    return any(part in name for part in UNUSED)


def clip_weights(state: dict, source: str) -> dict:
    """A weight file in the names of CTCLIP. Files of CT-CLIP v1 and of other programs are refused."""
    state = {k.removeprefix("trained_model."): v for k, v in state.items()}  # CT_LiPro_v2.pt
    state = {k.removeprefix("module."): v for k, v in state.items() if not k.endswith("embeddings.position_ids")}
    if "visual_transformer.vq._codebook.embed" not in state:
        raise UserError(f"{source}: not a CT-CLIP file (its first key is {next(iter(state))})")
    first, latent = state.get("visual_transformer.to_patch_emb.1.weight"), state.get("to_visual_latent.weight")
    if (first is not None and len(first) == 13500) or (latent is not None and latent.shape[1] == 2097152):
        raise UserError(f"{source}: weights of CT-CLIP v1, of another architecture (v2 is read: CT-CLIP_v2.pt)")
    return state


def export_weights(model: CTCLIP) -> dict:
    """The state dict as the original code reads it: same keys, no prefix."""
    own = ("classifier.", "logit_bias")
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(own)}


def settled_config(args) -> dict:
    """The sizes of the model: of the run that is continued, or by --preset, --vocab and the loss."""
    tokenizer = tokenizer_of(args)
    n_words, vocab_hash = tokenizer.get_vocab_size(), hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    config = deepcopy(args.model_config or PRESETS[args.preset])
    bert = config["bert"]
    bert["dropout"] = bert["dropout"] if args.text_dropout is None else args.text_dropout
    if args.model_config is None:
        bert["vocab"], config["vocab_hash"] = bert["vocab"] or n_words, vocab_hash
        config["size"] = list(config["size"])  # as it comes back from a checkpoint
        config["num_labels"] = len(args.label_columns) if args.label_loss_weight else 0
        config["logit_bias"] = args.loss == "siglip"
    if config["vocab_hash"] != vocab_hash:
        raise UserError(f"{args.vocab}: not the vocabulary of the run that is continued")
    given = args.pretrained != "none" or args.text_pretrained  # weights know what a number means
    if n_words > bert["vocab"] or (given and n_words < 0.9 * bert["vocab"]):
        raise UserError(f"{args.vocab}: has {n_words} words, the text encoder {bert['vocab']} (--vocab of the weights)")
    if args.max_text_length > bert["positions"]:
        raise UserError(f"--max-text-length {args.max_text_length}: the text encoder reads {bert['positions']} tokens")
    if args.label_loss_weight and not config["num_labels"]:
        raise UserError("--label-loss-weight: the run that is continued has no head for the labels")
    return config


def build_model(args, say=print) -> CTCLIP:
    state, fresh, args.model_config = None, args.model_config is None, settled_config(args)
    if fresh and args.pretrained != "none":
        with common.of_checkpoint(args.pretrained):
            state = clip_weights(common.load_weights(args.pretrained), args.pretrained)
        head = state.get("classifier.weight")
        if head is not None and len(head) == len(CT_RATE_LABELS) and args.label_columns == CT_RATE_LABELS:
            args.model_config["num_labels"] = len(head)
    model = CTCLIP(args.model_config)
    model.max_logit_scale, model.dropout_rate = args.max_logit_scale, args.dropout_rate
    model.freeze_vq, model.tokenizer = args.freeze_vq, tokenizer_of(args).to_str()
    for part in model.modules():
        if hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = args.grad_checkpointing
    if state is not None:
        new = ("classifier.", "logit_bias")
        common.apply_weights(model, state, args.pretrained, new, args.allow_partial, say)
    elif fresh:
        say(f"model: {args.preset}, random weights, {args.model_config}")
    if fresh and args.text_pretrained:
        state = {k.removeprefix("bert."): v for k, v in common.load_weights(args.text_pretrained).items()}
        common.apply_weights(model.text_transformer, state, args.text_pretrained, ("pooler.",), args.allow_partial, say)
    return model


def build_eval_model(saved: dict, args, device) -> CTCLIP:
    """The model of a checkpoint: its averaged weights where it has them."""
    model = common.filled(lambda: CTCLIP(args.model_config), saved)
    model.tokenizer = saved["tokenizer"]
    return model.to(device).eval()


def forward_flops(model, args) -> float:
    """Floating-point operations of one volume and one report of half the length, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ids = torch.ones(1, args.max_text_length // 2, dtype=torch.long)
        CTCLIP(args.model_config).eval()(torch.empty(1, *args.model_config["size"]), ids, ids)
    return counter.get_total_flops()


def set_trainable(model, args, epoch: int, say=print) -> bool:
    """Freeze what the flags name; True if that changed anything."""
    frozen = ["text_transformer.", "to_text_latent."] * args.freeze_text
    frozen += ["visual_transformer.", "to_visual_latent."] * args.freeze_vision
    if not args.label_loss_weight:
        frozen += ["classifier."]
    before = [p.requires_grad for p in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_unused(name) and not name.startswith(tuple(frozen)))
    changed = before != [p.requires_grad for p in model.parameters()]
    if changed:
        say(f"frozen: {', '.join(frozen)}")
    return changed


# ==== Loss and optimizer =======================================================================================


class ContrastiveLoss(nn.Module):
    """CLIP or SigLIP loss over the global batch, plus, with --label-loss-weight, BCE of a head for the labels."""

    columns = ("text_id", "target")  # of a batch that the loss needs

    def __init__(self, args):
        super().__init__()
        self.args, self.chunk = args, args.grad_cache_chunk or args.batch_size

    def forward(self, out: dict, batch: dict):
        """out: what the model returns for all pairs of this rank; batch: their columns -> loss, logs."""
        ids = batch["text_id"] if self.args.dedup_positives else None
        if "logit_bias" in out:
            loss = common.siglip_loss(out["image"], out["text"], out["logit_scale"], out["logit_bias"], ids)
        else:
            loss = common.clip_loss(out["image"], out["text"], out["logit_scale"], ids)
        logs = {"contrastive_loss": loss, "logit_scale": out["logit_scale"]}
        if "logits" in out:
            logs["label_loss"] = common.bce_loss(out["logits"], batch["target"], reduction="sum")
            known = common.known(batch["target"]).sum().float()
            known = common.gather_with_grad(known[None])  # the mean is over the known labels of all ranks
            logs["label_loss"] = logs["label_loss"] / known.mean().clamp(min=1)
            loss = loss + self.args.label_loss_weight * logs["label_loss"]
        return loss, logs


def build_criterion(args, train_set):
    return ContrastiveLoss(args)


def build_optimizer(model, args):
    """AdamW with the original's betas, over what is trained; no decay for norms, biases, scales and positions."""
    if args.fsdp:
        split_over_ranks(model, args)
    groups = {}
    for name, p in model.named_parameters():
        if not is_unused(name):
            decay = args.weight_decay if p.ndim >= 2 and not name.endswith("position_embeddings.weight") else 0.0
            group = {"params": [], "weight_decay": decay, "lr_scale": 1.0}
            groups.setdefault((decay, can_be_split(name)), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=args.lr, betas=(0.9, 0.99), fused=True)


def can_be_split(name: str) -> bool:
    """Parameters of blocks and of the latent projections. In groups of their own: a fused step takes one kind."""
    return ".layer" in name or name.startswith("to_visual_latent")


def split_over_ranks(model, args) -> None:
    """FSDP2: each rank keeps a part of every block and of the latent projections; the small rest stays whole."""
    if not dist.is_initialized():
        raise UserError("--fsdp splits the model over ranks, and there is one (start with torchrun)")
    if autocast_of(args, model.temperature.device)[1].is_enabled():
        raise UserError("--fsdp goes with --amp bf16 or none (the scaler of fp16 takes whole gradients only)")
    mesh = init_device_mesh(model.temperature.device.type, (dist.get_world_size(),))
    layers = [*model.text_transformer.encoder["layer"], *model.visual_transformer.enc_spatial_transformer.layers]
    layers += [*model.visual_transformer.enc_temporal_transformer.layers]
    for part in [*layers, model.to_visual_latent, model.to_visual_latent_extra]:
        empty = {p for p in part.parameters() if not p.numel()}
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=empty)


def whole_model(model, args) -> CTCLIP:
    """A copy of a model that --fsdp has split, with all of it on this rank, to judge; any other model itself."""
    if not common.is_split(model):
        return model
    copied = CTCLIP(args.model_config).to(model.temperature.device)
    copied.load_state_dict(common.whole(model.state_dict()))
    copied.tokenizer = model.tokenizer
    return copied


def encode(net, batch) -> dict:
    """Features of a batch: (B, ...) each, and scalars."""
    return net(batch["volume"], batch["input_ids"], batch["attention_mask"])


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
def prompt_features(model, args, device) -> torch.Tensor:
    """(K, 2, E) L2-normalised: each finding present and absent, the mean over the pairs of --prompts."""
    tokenizer, found = tokenizer_of(args), []
    for pair in prompt_pairs(args):
        texts = [prompt.replace("{}", name) for name in args.label_columns for prompt in pair]
        batch = pad_ids([torch.tensor(tokenizer.encode(text).ids) for text in texts])
        found.append(model.encode_text(**to_device(batch, device)).unflatten(0, (-1, 2)))
    return F.normalize(torch.stack(found).mean(0), dim=-1)


@torch.no_grad()
def predict(model, dataset, ctx, say=None) -> dict:
    """Features and probabilities of every case, each exactly once: the same for any number of ranks, to the last digit.

    A volume is encoded once, a prompt once. -> ids, groups, targets, texts; image_features, text_features (n, E)
    float32, L2-normalised (NaN where there is no report); probs (n, K): of the label head, or, without one or with
    --zero-shot, softmax over the prompts of a finding present and absent; logit_scale; failed: indices of unreadable
    cases, whose rows are NaN.
    """
    args = dataset.args
    batches = common.eval_batches(len(dataset), args.eval_batch_size or args.batch_size, ctx)
    loader = common.data_loader(dataset, [[(0, i) for i in b] for b in batches], args, ctx)
    by_head, rows = model.classifier is not None and not args.zero_shot, []
    with common.eval_threads(ctx.device), autocast_of(args, ctx.device)[0]:
        prompts = prompt_features(model, args, ctx.device).float()
        scale = model.temperature.exp().float()
        for batch in tqdm(loader, desc=say, leave=False, disable=None if say and ctx.master else True):
            out = encode(model, to_device(batch, ctx.device))
            with torch.autocast(ctx.device.type, enabled=False):  # the difference of two cosines is small
                cosine = torch.einsum("be,kpe->bkp", out["image"], prompts)
                logits = (
                    model.classify(out["image"]) if by_head else scale * (cosine[..., 0] - cosine[..., 1])
                )  # (B, K)
            parts = [batch["bad"][:, None].float(), logits.float().cpu(), out["image"].cpu(), out["text"].cpu()]
            rows.append(torch.cat(parts, 1))
    rows = common.gather_rows(torch.cat(rows), torch.tensor(batches).flatten(), ctx)  # (n, 1 + K + 2 E)
    failed, rows = rows[:, 0] > 0, rows[:, 1:]
    if not rows[~failed].isfinite().all():
        raise UserError("the model's outputs are not finite (--amp bf16 or none)")
    rows[failed] = math.nan
    width = out["image"].shape[1]
    logits, image, text = rows.split([len(dataset.class_names), width, width], 1)
    text = text.numpy()
    text[[not t for t in dataset.texts]] = np.nan
    return {
        "ids": dataset.ids,
        "groups": dataset.groups,
        "targets": dataset.targets,
        "texts": dataset.texts,
        "probs": logits.double().sigmoid().numpy(),
        "image_features": image.numpy(),
        "text_features": text,
        "logit_scale": float(scale),
        "failed": failed.nonzero()[:, 0].tolist(),
    }


def evaluate(model, dataset, criterion, ctx) -> dict[str, float]:
    """`metrics_of` the --eval-samples cases; the same on every rank."""
    model.eval()
    args = dataset.args
    if 0 < args.eval_samples < len(dataset):
        dataset = dataset.subset(stratified(dataset.targets, args.eval_samples, args.seed))
    return metrics_of(predict(model, dataset, ctx, "evaluation"), dataset)


def metrics_of(out: dict, dataset) -> dict[str, float]:
    """Metrics of findings and of retrieval of what `predict` returned.

    val_loss: softmax loss of the pairs as one batch, whatever the training loss; recall_at_k: of a report's own volume
    (or one with the same report) among all of them.
    """
    args = dataset.args
    read = np.isfinite(out["probs"]).all(1)
    if not read.any():
        raise UserError("no volume of the validation data could be read")
    threshold = 0.5 if args.threshold is None else args.threshold
    metrics = common.multilabel_metrics(dataset.targets[read], out["probs"][read], dataset.class_names, threshold)
    metrics = {"n": int(read.sum()), "n_missing": len(out["failed"]), **metrics}
    pairs = read & np.isfinite(out["text_features"]).all(1)
    image, text = out["image_features"][pairs], out["text_features"][pairs]
    logits = out["logit_scale"] * torch.from_numpy(image @ text.T).double()
    match, ids = torch.arange(len(logits)), dataset.text_ids[pairs]
    metrics["val_loss"] = float(F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
    recall = common.recall_at_k(common.retrieval_ranks(text, image, ids, ids), (1, 5, 10)).mean(0)
    metrics |= {f"recall_at_{k}": float(r) for k, r in zip((1, 5, 10), recall, strict=True)}
    left_out = [f"_{m}" for m in METRICS if m not in args.metrics and f"macro_{m}" != args.monitor]
    return {k: v for k, v in metrics.items() if not k.endswith(tuple(left_out))}


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
            judged = whole_model(judged, args)  # task
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
    """The best model over all validation cases: its metrics and thresholds; best_model.pt and the export."""
    if not best.entries:
        raise UserError(f"{args.output_dir}: none of the run's best models is here (resume in the run's own folder)")
    entry, checkpoint = best.entries[0], best.memory[best.entries[0]["path"]]
    model = build_eval_model({**checkpoint, "ema": None}, args, ctx.device)
    out = predict(model, val_set, ctx, "evaluation")
    metrics = metrics_of(out, val_set)
    checkpoint["metrics"] = {k: float(v) for k, v in metrics.items()}
    read = np.isfinite(out["probs"]).all(1)
    checkpoint |= common.fit_to_validation(np.array(out["ids"])[read], val_set.targets[read], out["probs"][read])
    if ctx.master:
        save_checkpoint(args.output_dir / BEST, checkpoint)
        if args.export:
            common.save_weights(args.export, export_weights(model))
    shown = " - ".join(f"{k}: {metrics[k]:.4f}" for k in ("val_loss", *SHOWN) if k in metrics)
    log.info(f"best: step {entry['step']}, on all {metrics['n']} validation cases: {shown} -> {args.output_dir / BEST}")
    log.close()
    return 0


# ==== Main =====================================================================================================


def convert(args) -> int:
    """--convert: the weights of --pretrained as a checkpoint, with the tokenizer, for evaluate.py."""
    model = build_model(args)
    save_checkpoint(args.convert, common.model_checkpoint(TASK, args, model, {}))
    print(f"{args.pretrained} -> {args.convert} (evaluate.py --checkpoint {args.convert} --valid-data ...)")
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.convert:
        return convert(args)
    common.set_deterministic(args.deterministic)
    with common.process_group(args.device, args.timeout_minutes) as ctx:
        return train(args, ctx)


if __name__ == "__main__":
    sys.exit(common.run_main(main))
