"""What would corrupt results if two files disagreed: losses, metrics, seeds, process group, files, volumes, run log."""

import argparse
import collections
import configparser
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tokenize
import traceback
import warnings
import weakref
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from isal import igzip, isal_zlib
from scipy.optimize import minimize_scalar
from scipy.special import expit, logsumexp
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

# The 18 findings of CT-RATE in the official order (VLM3D challenge, Task 2).
CT_RATE_LABELS = [
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
]


class UserError(Exception):
    """A mistake of the user or a bad file: printed as one line, exit code 2."""

    def __init__(self, message: str):
        if message.startswith("Caught UserError in "):  # by a data worker, whose traceback ends with the message
            message = message.rstrip().splitlines()[-1].removeprefix("common.UserError: ")
        line = "".join(c if c.isprintable() else " " for c in message)  # what a cell or a file's name may hold
        super().__init__(line if len(line) < 2000 else f"{line[:1500]} ... {line[-400:]}")


def need_file(path: Path, what: str = "file") -> None:
    """Raise UserError unless `path` is a regular file; a named pipe or a device would be read for ever."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: " + ("not a regular file" if os.path.exists(path) else f"no such {what}"))


# ==== Losses ===================================================================================================


def known(targets: torch.Tensor) -> torch.Tensor:
    """Bool mask of the labels that are known: a NaN or negative (-1) target is unknown and never costs anything."""
    return targets >= 0


def bce_loss(logits, targets, weight=None, pos_weight=None, reduction="mean") -> torch.Tensor:
    """Binary cross-entropy. logits, targets: (B, K); targets in [0, 1] or unknown -> scalar.

    weight: (K,) multiplies both signs of a class; pos_weight: (K,) multiplies its positives only.
    reduction: "mean" over the known entries (0 if there are none) or "sum", here and in the losses below.
    """
    logits, targets, mask = _known_float32(logits, targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, weight, pos_weight=pos_weight, reduction="none")
    return _reduce(loss, mask, reduction)


def focal_loss(
    logits, targets, alpha=1.0, gamma=2.0, form="constant", weight=None, pos_weight=None, reduction="mean"
) -> torch.Tensor:
    """alpha * (1 - p_t)^gamma * BCE (Lin et al. 2017, eq. 5). logits, targets: (B, K) -> scalar.

    form: "constant" multiplies both signs by alpha; "balanced" is the paper's alpha_t (and torchvision's), alpha for
    positives and 1 - alpha for negatives (0.25 there), none if alpha < 0. weight, pos_weight: as in `bce_loss`.
    """
    logits, targets, mask = _known_float32(logits, targets)
    bce = F.binary_cross_entropy_with_logits(logits, targets, weight, pos_weight=pos_weight, reduction="none")
    miss = targets * torch.sigmoid(-logits) + (1 - targets) * torch.sigmoid(logits)  # 1 - p_t, without cancellation
    if form == "balanced":
        alpha = alpha * targets + (1 - alpha) * (1 - targets) if alpha >= 0 else 1.0
    elif form != "constant":
        raise ValueError(f"focal_loss: form is 'constant' or 'balanced', not {form!r}")
    return _reduce(alpha * _power(miss, gamma) * bce, mask, reduction)


def asymmetric_loss(
    logits, targets, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_weight=True,
    weight=None, pos_weight=None, reduction="mean",
) -> torch.Tensor:  # fmt: skip
    """ASL (Ridnik et al. 2021): focal loss with its own gamma for each sign. logits, targets: (B, K) -> scalar.

    Negatives with p < clip cost nothing. detach_weight: no gradient through the focusing weight, the default of the
    authors' AsymmetricLoss (their AsymmetricLossOptimized has False). They sum; take reduction="sum" to compare.
    weight, pos_weight: as in `bce_loss`.
    """
    logits, targets, mask = _known_float32(logits, targets)
    p = torch.sigmoid(logits)
    shifted = (p - clip).clamp(min=0)
    # The authors clamp log(p) at 1e-8: no gradient for a positive at logit -20, the one that needs it most.
    log_not = torch.log1p(-shifted) if clip > 0 else F.logsigmoid(-logits)
    weight_pos, weight_neg = _power(torch.sigmoid(-logits), gamma_pos), _power(shifted, gamma_neg)
    if detach_weight:
        weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
    if pos_weight is not None:
        weight_pos = weight_pos * pos_weight
    loss = -targets * weight_pos * F.logsigmoid(logits) - (1 - targets) * weight_neg * log_not
    loss = loss if weight is None else loss * weight
    return _reduce(loss, mask, reduction)


def corn_loss(logits, targets, reduction="mean") -> torch.Tensor:
    """CORN: "above class k, given at least k" for k = 0..K-2 (Shi, Cao and Raschka 2021, arXiv 2111.08851).

    logits: (N, K - 1); targets: (N,) int, 0..K-1 or negative for unknown -> scalar. The loss of a row is the sum over
    the tasks that it takes part in, those with k <= target, so it does not depend on the batch; the authors divide the
    total by the number of tasks instead. reduction, here and in the two losses below: "mean" over the known rows (0 if
    there are none), "sum", or "none" -> (N,), 0 where unknown.
    """
    logits, target = _float32(logits), targets[:, None]
    task = torch.arange(logits.shape[1], device=logits.device)
    bce = F.binary_cross_entropy_with_logits(logits, (target > task).to(logits.dtype), reduction="none")
    return _reduce_rows(torch.where(target >= task, bce, 0).sum(1), targets, reduction)


def corn_probs(logits) -> torch.Tensor:
    """Class probabilities of logits trained with `corn_loss`: (..., K - 1) -> (..., K), at least float32.

    P(y = k) = P(y >= k) * P(y <= k | y >= k): never negative, and the ranks are consistent by construction.
    """
    logits = _float32(logits)
    reached = F.pad(torch.sigmoid(logits).cumprod(-1), (1, 0), value=1.0)  # P(y >= k)
    return reached * F.pad(torch.sigmoid(-logits), (0, 1), value=1.0)


def class_distance_loss(logits, targets, alpha=2.0, reduction="mean") -> torch.Tensor:
    """CDW-CE: -sum_i log(1 - p_i) * |i - target|^alpha (Polat et al. 2022, arXiv 2202.05167), p the softmax.

    logits: (N, K); targets: (N,) int, 0..K-1 or negative for unknown -> scalar. reduction: as in `corn_loss`.
    """
    log_p, classes = F.log_softmax(_float32(logits), 1), torch.arange(logits.shape[1], device=logits.device)
    others = log_p[:, None].masked_fill(classes[:, None] == classes, -math.inf)  # (N, K, K): row i is without class i
    log_not = torch.logsumexp(others, 2)  # log(1 - p_i), also where p_i rounds to 1
    distance = (classes - targets[:, None]).abs().to(log_p.dtype)  # (N, K)
    return _reduce_rows(-(log_not * distance**alpha).sum(1), targets, reduction)


def emd_loss(logits, targets, reduction="mean") -> torch.Tensor:
    """Squared earth mover's distance of the softmax to the target, the sum over the classes of the squared difference
    of the cumulative distributions (Hou, Yu and Samaras 2016, arXiv 1611.05916). Arguments as above.
    """
    probs = F.softmax(_float32(logits), 1)
    up_to = torch.ones(logits.shape[1] - 1, logits.shape[1], device=logits.device).tril()
    cumulative = (probs[:, None] * up_to).sum(2)  # cumsum is not deterministic on CUDA; of the last class it is 1
    classes = torch.arange(cumulative.shape[1], device=logits.device)
    gap = cumulative - (classes >= targets[:, None]).to(cumulative.dtype)  # (N, K - 1)
    return _reduce_rows((gap**2).sum(1), targets, reduction)


def balanced_weights(targets, max_weight: float = 100.0) -> torch.Tensor:
    """`pos_weight` (K,) float32 = negatives / positives among the known labels of the training split, (N, K).

    Clamped to [1 / max_weight, max_weight]; 1 for a class without a positive or without a negative.
    """
    targets = torch.as_tensor(targets)
    positives, negatives = (targets > 0.5).sum(0), (known(targets) & (targets <= 0.5)).sum(0)
    ratio = (negatives / positives).clamp(1 / max_weight, max_weight)
    return torch.where((positives > 0) & (negatives > 0), ratio, 1.0).float()


def gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """(b, E) of every rank -> (world * b, E) in rank order; x itself without a process group. b is the same everywhere.

    The gradient of a row is the sum of what all ranks send back for it. With a plain all_gather the loss would have
    the same value and the wrong gradient.
    """
    return _Gather.apply(x) if _rank_and_world()[1] > 1 else x


def clip_loss(image_features, text_features, logit_scale, ids=None, present=None) -> torch.Tensor:
    """Symmetric InfoNCE over the batch of all ranks (Radford et al. 2021, figure 3) -> scalar.

    image_features, text_features: (b, E) L2-normalised, row i of one belongs to row i of the other; logit_scale: scalar
    tensor, the multiplier itself; ids: (b,) int64, rows of equal id (the same report twice) belong together as well and
    share the target evenly; present: (b,) bool, the other rows are neither queries nor answers. Each rank scores its
    own rows against all columns, memory O(b * world * b): the mean of the ranks' values is the global loss, the mean of
    their gradients (what DDP takes) is its gradient.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text, scale = _float32(image_features), _float32(text_features), _float32(logit_scale)
        match = torch.arange(len(image), device=image.device) + _rank_and_world()[0] * len(image)
        image_logits = scale * image @ gather_with_grad(text).T  # (b, world * b)
        text_logits = scale * text @ gather_with_grad(image).T  # (b, world * b)
        if ids is None and present is None:
            return (F.cross_entropy(image_logits, match) + F.cross_entropy(text_logits, match)) / 2
        ids = match if ids is None else ids
        same = ids[:, None] == gather_with_grad(ids)  # (b, world * b)
        rows = torch.ones_like(ids, dtype=torch.bool) if present is None else present
        columns = gather_with_grad(rows.to(image.dtype)) > 0
        same = (same & columns).to(image.dtype)
        target = same / same.sum(1, keepdim=True).clamp(min=1)
        lowest = torch.finfo(image.dtype).min
        both = [F.cross_entropy(x.masked_fill(~columns, lowest), target, reduction="none")
                for x in (image_logits, text_logits)]  # fmt: skip
        mean = columns.sum().clamp(min=1) / _rank_and_world()[1]  # of the ranks' rows
        return torch.where(rows, both[0] + both[1], 0).sum() / (2 * mean)


def siglip_loss(image_features, text_features, logit_scale, logit_bias, ids=None, block: int = 64) -> torch.Tensor:
    """Sigmoid loss over all pairs of the global batch (Zhai et al. 2023, algorithm 1) -> scalar.

    Arguments and the meaning over ranks as in `clip_loss`, all rows of equal id being positives; logit_bias: scalar
    tensor, added after scaling. The logits exist only `block` rows at a time, in both directions; what is kept for
    backward is the features.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = _float32(image_features), gather_with_grad(_float32(text_features))
        if ids is None:
            ids = torch.arange(len(image), device=image.device) + _rank_and_world()[0] * len(image)
        scale, bias = _float32(logit_scale), _float32(logit_bias)
        return _SigmoidLoss.apply(image, text, scale, bias, ids, gather_with_grad(ids), block)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _known_float32(logits, targets):
    logits, mask = _float32(logits), known(targets)
    return logits, torch.where(mask, targets, 0).to(logits.dtype), mask


def _power(x: torch.Tensor, gamma: float) -> torch.Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny) ** gamma  # at 0 a gamma below 1 has an infinite slope


def _reduce(loss, mask, reduction):
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
    total = torch.where(mask, loss, 0).sum()
    return total / mask.sum().clamp(min=1) if reduction == "mean" else total


def _reduce_rows(loss, targets, reduction):
    rows = torch.where(known(targets), loss, 0)  # (N,)
    return rows if reduction == "none" else _reduce(rows, known(targets), reduction)


def _rank_and_world() -> tuple[int, int]:
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(_rank_and_world()[1] * len(x), *x.shape[1:])
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x.contiguous())  # torch 2.13: new name
        return out

    @staticmethod
    def backward(ctx, grad):
        rank, world = _rank_and_world()
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still use its own
        dist.all_reduce(grad)
        return grad.chunk(world)[rank]


class _SigmoidLoss(torch.autograd.Function):
    """image (b, E), text (N, E), ids (b,), text_ids (N,): equal ids match. Autograd would keep b * N logits."""

    @staticmethod
    def forward(ctx, image, text, scale, bias, ids, text_ids, block):
        ctx.save_for_backward(image, text, scale, bias, ids, text_ids)
        ctx.block = block
        loss = image.new_zeros(())
        for start in range(0, len(image), block):
            logits = scale * (image[start : start + block] @ text.T) + bias  # (block, N)
            match = ids[start : start + block, None] == text_ids
            loss -= F.logsigmoid(torch.where(match, logits, -logits)).sum()  # z = +1 for a match and -1 for others
        return loss / len(image)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        image, text, scale, bias, ids, text_ids = ctx.saved_tensors
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        with torch.autocast(image.device.type, enabled=False):
            for start in range(0, len(image), ctx.block):
                rows = image[start : start + ctx.block]
                similarity = rows @ text.T  # (block, N)
                logits = scale * similarity + bias
                match = ids[start : start + ctx.block, None] == text_ids
                slope = torch.where(match, -torch.sigmoid(-logits), torch.sigmoid(logits))  # d loss / d logits, times b
                slope *= grad / len(image)
                grad_image[start : start + ctx.block] = scale * (slope @ text)
                grad_text += scale * (slope.T @ rows)
                grad_scale += (slope * similarity).sum()
                grad_bias += slope.sum()
        return grad_image, grad_text, grad_scale, grad_bias, None, None, None


# ==== Metrics ==================================================================================================

# An undefined metric is NaN, never 0. A prediction is prob >= threshold. Precision, recall and F1 of 0 / 0 are 0.
# Weights are (n, B): B weightings of the same n rows, such as bootstrap counts, are evaluated in one pass.


def multilabel_metrics(targets, probs, class_names, thresholds=0.5, weights=None) -> dict[str, float]:
    """All metrics of a multi-label classifier under flat names.

    targets: (n, K) of 0, 1 or unknown (NaN or negative: left out); probs: (n, K) in [0, 1]; thresholds: scalar or (K,);
    weights: (n,) or None. `macro_*` is the mean over the labels where the metric is defined (`n_defined_*` of them),
    `weighted_*` that mean with each label's positives as weights; `micro_*` takes all known entries as one label;
    brier, log_loss and ece (15 bins) are means over labels; crg: see `crg_score`; exact_match: share of rows whose
    known labels are all predicted right; hamming: share of known entries predicted wrong; samples_f1: mean over rows
    of the F1 of a row's labels, 0 / 0 = 0.
    Raises ValueError on shapes that differ, targets that are not 0/1, probs that are not finite or outside [0, 1].
    """
    weights = np.ones(len(probs)) if weights is None else np.asarray(weights, np.float64)
    arrays = _metric_arrays(targets, probs, class_names, thresholds, weights[:, None])
    return {name: float(values[0]) for name, values in arrays.items()}


def bootstrap_intervals(
    targets, probs, class_names, thresholds=0.5, groups=None, n_resamples=1000, seed=0, level=0.95, counts=None
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval (low, high) of every metric of `multilabel_metrics`, under the same names.

    groups: (n,) patient of each row: patients are drawn with replacement, not rows; None: rows. counts: (n, B) gives
    the resamples instead. A resample where a metric is undefined is left out of that metric's percentiles (a macro
    mean is undefined only if it is for all labels); an interval is (NaN, NaN) where that leaves nothing.
    """
    if counts is None:
        counts = bootstrap_counts(np.arange(len(probs)) if groups is None else groups, n_resamples, seed)
    intervals = {}
    for name, values in _metric_arrays(targets, probs, class_names, thresholds, counts).items():
        values = values[~np.isnan(values)]
        bounds = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if len(values) else (np.nan, np.nan)
        intervals[name] = (float(bounds[0]), float(bounds[1]))
    return intervals


def bootstrap_counts(groups, n_resamples: int, seed: int) -> np.ndarray:
    """(n, B) float64: how often each row is in each of B resamples of whole groups (patients). groups: (n,)."""
    names, inverse = np.unique(np.asarray(groups), return_inverse=True)
    counts, rng = np.empty((n_resamples, len(inverse))), np.random.default_rng(seed)
    for row in counts:  # one by one: no more memory than the result has
        row[:] = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[inverse]
    return counts.T


def weighted_auroc(y, s, w, rows=None) -> np.ndarray:
    """Area under the ROC curve, ties counting half, for each column of w -> (B,); NaN without both classes.

    y: (n,) 0/1; s: (n,) scores; w: (n, B) weights >= 0. Equal to scikit-learn's with sample_weight. rows: (n,) row of w
    for each entry, where several share one, or one has none.
    """
    return _rank_metrics(np.asarray(y, bool), np.asarray(s, np.float64), _by_resample(w), rows)[0]


def crg_score(targets, predictions) -> float:
    """Clinically relevant gain of binary predictions, (n, K) over all labels together (VLM3D challenge, crg_score.py).

    1 is perfect; 1/3 is what "always no" and "always yes" get. NaN if the known labels are all of one sign.
    """
    targets, predictions = np.asarray(targets, np.float64), np.asarray(predictions, bool)
    y, negative = targets == 1, targets == 0
    tp, fn, fp = (y & predictions).sum(), (y & ~predictions).sum(), (negative & predictions).sum()
    return float(_crg(tp, fn, fp, negative.sum()))


def f1_thresholds(targets, probs) -> np.ndarray:
    """(K,) thresholds with the highest F1, to be fitted on validation data. targets, probs: (n, K).

    Midway between the lowest score called positive and the next lower one (or 0), so that rounding of a score does
    not flip it; the highest of equally good ones; 0.5 for a label without a known positive.
    """
    targets, probs = np.asarray(targets, np.float64), np.asarray(probs, np.float64)
    return _best_thresholds(targets, probs, lambda tp, flagged: 2 * tp / (flagged + tp[-1]))


def crg_thresholds(targets, probs) -> np.ndarray:
    """(K,) thresholds with the highest `crg_score` over all labels together; else as `f1_thresholds`.

    With all labels' negatives / positives as the worth of a hit in false alarms, the score grows with worth * TP - FP,
    a sum over labels: each label can choose alone.
    """
    targets = np.asarray(targets, np.float64)
    worth = _ratio((targets == 0).sum(), (targets == 1).sum(), 1.0)
    return _best_thresholds(targets, probs, lambda tp, flagged: worth * tp - (flagged - tp), at_least=0)


def fold_thresholds(probs, thresholds) -> np.ndarray:
    """Probabilities (n, K) moved so that each label's threshold (K,) becomes 0.5, for a scorer with that fixed cut.

    Piecewise linear and rising on [0, 1]: no ranking changes, so no AUROC does.
    """
    p, t, tiny = np.asarray(probs, np.float64), np.asarray(thresholds, np.float64), np.finfo(np.float64).tiny
    return np.where(p < t, 0.5 * p / np.maximum(t, tiny), 1 - 0.5 * (1 - p) / np.maximum(1 - t, tiny))


def fit_temperature(logits, targets) -> float:
    """T that minimises the log-loss of softmax(logits / T), to be fitted on validation data (Guo et al., ICML 2017).

    logits: (n, C); targets: (n,) class of each row. NaN without a row, where the rows are of one class, and where the
    minimum is not between 0.01 and 100: the scores separate the classes, or rank them the wrong way.
    """
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets, int)
    if len(set(targets.tolist())) < 2:
        return math.nan
    gaps = logits - np.take_along_axis(logits, targets[:, None], 1)  # to the true class
    gaps = gaps[np.lexsort(gaps.T)]  # the same digits in any order of the rows
    loss = lambda log_t: logsumexp(gaps / math.exp(log_t), axis=1).mean()  # noqa: E731
    found = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), options={"xatol": 1e-9})
    return math.exp(found.x) if 0.011 < math.exp(found.x) < 99 else math.nan


def fit_temperatures(targets, probs) -> np.ndarray:
    """(K,) temperatures of independent labels, for `tempered`; NaN without a known positive and negative case.

    targets: (n, K) of 0, 1 or unknown (NaN or negative); probs: (n, K).
    """
    targets, found = np.asarray(targets, np.float64), []
    for y, z in zip(targets.T, _logits(probs).T, strict=True):
        mask = y >= 0
        found.append(fit_temperature(np.stack([np.zeros(mask.sum()), z[mask]], 1), y[mask]))
    return np.array(found)


def tempered(probs, temperatures) -> np.ndarray:
    """Probabilities (n, K) with their logits divided by the labels' temperatures (K,), or as they are where NaN."""
    return expit(_logits(probs) / np.nan_to_num(temperatures, nan=1.0))


def fit_to_validation(ids, targets, probs) -> dict[str, list]:
    """What a checkpoint keeps of its validation cases, for later evaluations: thresholds, temperatures, who they were.

    ids: n names; targets, probs: (n, K); see `f1_thresholds`, `fit_temperatures`, `case_hashes`.
    """
    return {
        "thresholds": f1_thresholds(targets, probs).tolist(),
        "temperatures": fit_temperatures(targets, probs).tolist(),
        "validated_on": case_hashes(ids, targets),
    }


def case_hashes(ids, targets) -> list[str]:
    """A number of each case, made of its id and its labels (n, K): tells later whether a case is one of these."""
    rows = np.nan_to_num(np.asarray(targets, np.float64), nan=-1).astype(int).tolist()
    return [hashlib.sha256(f"{name} {row}".encode()).hexdigest()[:16] for name, row in zip(ids, rows, strict=True)]


def _logits(probs) -> np.ndarray:
    p = np.clip(np.asarray(probs, np.float64), 1e-7, 1 - 1e-7)  # a float32 probability rounds to 1
    return np.log(p) - np.log1p(-p)


def _best_thresholds(targets, probs, gain, at_least=-math.inf) -> np.ndarray:
    """gain(tp, flagged): what is to be highest, from the true positives and all cases at or above each score.

    Where it never exceeds `at_least`, the worth of flagging nothing, the threshold is above all scores (of 1, at 1).
    """
    targets, probs = np.asarray(targets, np.float64), np.asarray(probs, np.float64)
    best = np.full(probs.shape[1], 0.5)
    for k in range(len(best)):
        mask = targets[:, k] >= 0
        scores, group = np.unique(-probs[mask, k], return_inverse=True)  # negated: falling scores
        positives = np.cumsum(np.bincount(group, targets[mask, k]))
        if len(scores) and positives[-1] > 0:
            value = gain(positives, np.cumsum(np.bincount(group)))
            best[k] = -(scores + np.append(scores[1:], 0))[np.argmax(value)] / 2
            if value.max() <= at_least:
                best[k] = (1 - scores[0]) / 2
    return best


def calibration_bins(targets, probs, n_bins: int = 15, closed: str = "right") -> dict[str, np.ndarray]:
    """Reliability table of the known entries: `count`, `mean_prob`, `frequency` of positives, each (n_bins,).

    Equal-width bins (i / n_bins, (i + 1) / n_bins], 0 in the first; closed="left": [i / n_bins, (i + 1) / n_bins), 1 in
    the last, as torchmetrics has them. Means of an empty bin are NaN.
    """
    targets, probs = np.asarray(targets, np.float64).ravel(), np.asarray(probs, np.float64).ravel()
    mask = targets >= 0
    index = _bin_index(probs[mask], n_bins, closed)
    count, prob, positive = (np.bincount(index, x, n_bins) for x in (None, probs[mask], targets[mask]))
    return {"count": count, "mean_prob": _ratio(prob, count), "frequency": _ratio(positive, count)}


def expected_calibration_error(targets, probs, n_bins: int = 15, closed: str = "right") -> float:
    """Mean distance of probability and frequency over the bins of `calibration_bins`, weighted by their counts."""
    bins = calibration_bins(targets, probs, n_bins, closed)
    return float(_ratio(np.nansum(bins["count"] * abs(bins["mean_prob"] - bins["frequency"])), bins["count"].sum()))


def brier_score(targets, probs) -> float:
    """Mean squared difference of probability and label over the known entries; NaN if there are none."""
    targets, probs = np.asarray(targets, np.float64), np.asarray(probs, np.float64)
    mask = targets >= 0
    return float(_ratio(_squared_error(mask, targets == 1, probs).sum(), mask.sum()))


def log_loss(targets, probs) -> float:
    """Mean negative log-likelihood (nats) of the known entries, probabilities kept 2e-16 away from 0 and 1."""
    targets, probs = np.asarray(targets, np.float64), np.asarray(probs, np.float64)
    mask = targets >= 0
    return float(_ratio(_negative_log(mask, targets == 1, probs).sum(), mask.sum()))


def _metric_arrays(targets, probs, class_names, thresholds, w, n_bins=15, micro_areas=True) -> dict[str, np.ndarray]:
    """Every metric for every column of w (n, B): {name: (B,)}. Sums over rows are matrix products, (K, n) @ (n, B).

    micro_areas: also micro_auroc and micro_auprc, which take half of the time.
    """
    targets, probs, thresholds = (np.asarray(x, np.float64) for x in (targets, probs, thresholds))
    mask, y = targets >= 0, targets == 1
    if targets.shape != probs.shape or targets.ndim != 2 or targets.shape[1] != len(class_names):
        raise ValueError(f"targets {targets.shape} and probs {probs.shape} must be (n, {len(class_names)})")
    if not (y | (targets == 0))[mask].all():
        raise ValueError("known targets must be 0 or 1")
    if not ((probs >= 0) & (probs <= 1)).all():
        raise ValueError("probs must be finite and in [0, 1] (leave out rows without a score; logits need a sigmoid)")
    predicted = probs >= thresholds

    def total(x):
        return x.T.astype(np.float64) @ w  # (K, B)

    negative = mask & ~y
    tp, fn, fp, tn = map(total, (y & predicted, y & ~predicted, negative & predicted, negative & ~predicted))
    count = tp + fn + fp + tn
    gap, index = np.where(mask, probs - y, 0), _bin_index(probs, n_bins)
    bin_gaps = sum(abs(total(np.where(index == i, gap, 0))) for i in range(n_bins))
    rows = [np.flatnonzero(column) for column in mask.T]
    by_resample = _by_resample(w)
    ranked = [_rank_metrics(y[r, k], probs[r, k], by_resample, r) for k, r in enumerate(rows)]
    per_label = {
        "auroc": np.stack([auroc for auroc, _ in ranked]),
        "auprc": np.stack([auprc for _, auprc in ranked]),
        **_decision_metrics(tp, fn, fp, tn),
        "brier": _ratio(total(_squared_error(mask, y, probs)), count),
        "log_loss": _ratio(total(_negative_log(mask, y, probs)), count),
        "ece": _ratio(bin_gaps, count),
    }

    out = {}
    for name, values in per_label.items():
        defined = ~np.isnan(values)
        prefix = "" if name in ("brier", "log_loss", "ece") else "macro_"
        out[prefix + name] = _ratio(np.where(defined, values, 0).sum(0), defined.sum(0))
        if name in ("auroc", "auprc"):
            out["n_defined_" + name] = defined.sum(0)
        if name in ("auroc", "auprc", "f1", "precision", "recall"):
            weight = np.where(defined, tp + fn, 0)
            out["weighted_" + name] = _ratio((weight * np.where(defined, values, 0)).sum(0), weight.sum(0))
    if micro_areas:
        out["micro_auroc"], out["micro_auprc"] = _rank_metrics(y[mask], probs[mask], by_resample, np.nonzero(mask)[0])
    micro = _decision_metrics(tp.sum(0), fn.sum(0), fp.sum(0), tn.sum(0))
    out |= {"micro_" + name: micro[name] for name in ("f1", "precision", "recall", "specificity", "npv")}
    out["crg"] = _crg(tp.sum(0), fn.sum(0), fp.sum(0), (fp + tn).sum(0))
    some, right = mask.any(1), ((predicted == y) | ~mask).all(1)
    out["exact_match"] = _ratio((some & right) @ w, some @ w)
    out["hamming"] = 1 - micro["accuracy"]
    said_or_true = (mask & predicted).sum(1) + y.sum(1)
    out["samples_f1"] = _ratio(_ratio(2 * (y & predicted).sum(1), said_or_true, 0.0) @ w, some @ w)
    per_label |= {"n": count, "positives": tp + fn}
    for k, label in enumerate(class_names):
        out |= {f"{label}_{name}": values[k] for name, values in per_label.items()}
    return out


def _rank_metrics(y, s, w, rows=None, chunk_bytes=5e5):
    """Weighted AUROC and average precision, (B,) each. y, s: (m,); w: `_by_resample`; rows: (m,) row of each entry.

    One sort serves all B. In falling order of score, with P and N the weights of positives and negatives so far, a
    group of equal scores adds dP * (N below it + dN / 2) to the one and dP * P / (P + N) to the other; only groups
    with a positive matter.
    """
    order = np.argsort(-s, kind="stable")
    y, s, rows = y[order], s[order], order if rows is None else rows[order]
    stops = np.flatnonzero(np.append(s[1:] != s[:-1], True)[: len(s)]) + 1  # end of each group of equal scores
    starts = np.append(0, stops)[: len(stops)]
    seen = np.append(0, np.cumsum(y))  # positives among the first i entries
    held = seen[stops] > seen[starts]
    starts, stops = starts[held], stops[held]

    entries, positives = np.append(0, rows + 1), np.append(0, rows[y] + 1)  # led by the column of zeros
    step = max(1, min(len(w), int(chunk_bytes / 8 / len(entries))))  # weightings at a time, to stay in the cache
    buffers = np.empty((step, len(entries))), np.empty((step, len(positives)))
    auroc, auprc = np.full((2, len(w)), np.nan)
    for some in (slice(i, i + step) for i in range(0, len(w), step)):
        both, positive = _running_sum(w[some], entries, buffers[0]), _running_sum(w[some], positives, buffers[1])
        p, n = positive[:, -1], both[:, -1] - positive[:, -1]
        p_stop, both_stop, both_start = _take(positive, seen[stops]), _take(both, stops), _take(both, starts)
        gain = np.diff(p_stop, prepend=0)
        twice_above = both_stop + both_start - (2 * p_stop - gain)  # negatives before the group, and up to its end
        auroc[some] = _ratio(np.einsum("bg,bg->b", gain, n[:, None] - twice_above / 2), p * n)
        precision = p_stop / np.maximum(both_stop, np.finfo(float).tiny)
        auprc[some] = _ratio(np.einsum("bg,bg->b", gain, precision), p)
    return auroc, auprc


def _by_resample(w):
    """(n, B) weights -> (B, 1 + n), each resample contiguous, led by a zero for the start of running sums."""
    w = np.asarray(w)
    out = np.zeros((w.shape[1], 1 + len(w)))
    out[:, 1:] = w.T
    return out


def _running_sum(w, columns, buffer):
    """Running sums along the given columns of w, in the buffer: new memory would take longer than the sums."""
    out = buffer[: len(w)]
    return np.cumsum(_take(w, columns, out), axis=1, out=out)


def _take(x, columns, out=None):
    return x.take(columns, axis=1, mode="clip", out=out)  # twice as fast as x[:, columns]


def _decision_metrics(tp, fn, fp, tn) -> dict[str, np.ndarray]:
    count, both = tp + fn + fp + tn, (tp + fn > 0) & (fp + tn > 0)
    sides, gain = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn), tp * tn - fp * fn
    by_chance = (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn)
    values = {
        "f1": _ratio(2 * tp, 2 * tp + fp + fn, 0.0),
        "precision": _ratio(tp, tp + fp, 0.0),
        "recall": _ratio(tp, tp + fn, 0.0),
        "specificity": _ratio(tn, tn + fp),
        "npv": _ratio(tn, tn + fn),
        "accuracy": _ratio(tp + tn, count),
        "balanced_accuracy": (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
        "mcc": np.where(both, _ratio(gain, np.sqrt(sides), 0.0), np.nan),
        "kappa": np.where(both, _ratio(2 * gain, by_chance), np.nan),
    }
    return {name: np.where(count > 0, value, np.nan) for name, value in values.items()}


def _crg(tp, fn, fp, negatives):
    positives = tp + fn
    gain = _ratio(negatives, 2 * positives) * (tp - fn) - fp
    return _ratio(negatives / 2, negatives - gain)


def _squared_error(mask, y, probs):
    return np.where(mask, (probs - y) ** 2, 0)


def _negative_log(mask, y, probs):
    eps = np.finfo(np.float64).eps
    return np.where(mask, -np.log(np.clip(np.where(y, probs, 1 - probs), eps, 1 - eps)), 0)


def _bin_index(probs, n_bins, closed="right"):
    above = np.searchsorted(np.arange(n_bins + 1) / n_bins, probs, side="left" if closed == "right" else "right")
    return np.clip(above - 1, 0, n_bins - 1)


def _ratio(a, b, empty=np.nan):
    """a / b, and `empty` where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(b) == 0, empty, np.divide(a, b))


def bootstrap_weights(groups, n_resamples: int, seed: int) -> np.ndarray:
    """(n, 1 + B): ones, for the value itself, and `bootstrap_counts`."""
    ones = np.ones((len(groups), 1))
    return np.append(ones, bootstrap_counts(groups, n_resamples, seed), axis=1) if n_resamples else ones


def with_interval(columns: dict[str, np.ndarray], level=0.95) -> dict[str, float]:
    """{metric: (1 + B,)}, the value and that of B resamples -> metric, metric_low, metric_high of each, as
    `bootstrap_intervals` has them; metric alone where B is 0.
    """
    found = {}
    for name, values in columns.items():
        found[name], rest = float(values[0]), values[1:][~np.isnan(values[1:])]
        if len(values) > 1:
            bounds = np.quantile(rest, [(1 - level) / 2, (1 + level) / 2]) if len(rest) else (np.nan, np.nan)
            found[f"{name}_low"], found[f"{name}_high"] = map(float, bounds)
    return found


def top_1_metrics(targets, probs, weights) -> dict[str, np.ndarray]:
    """accuracy and balanced_accuracy (mean recall of the classes there are) of naming the most probable class: (B,).

    targets: (n, K), of each row one is 1; probs: (n, K), equal ones share the vote; weights: (n, B).
    """
    is_class, best = np.asarray(targets) == 1, probs == np.max(probs, 1, keepdims=True)
    hit = (is_class & best).sum(1) / best.sum(1)
    n = is_class.T.astype(float) @ weights  # (K, B)
    recalls = (is_class.T * hit) @ weights / np.maximum(n, 1)
    return {"accuracy": hit @ weights / n.sum(0), "balanced_accuracy": recalls.sum(0) / (n > 0).sum(0)}


def class_metrics(counts) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of confusion counts (B, K, K) or (B, K, K + 1), rows are the truth; a last column more is "no class", an error.

    -> {accuracy, precision, recall, f1_macro, f1_weighted}: (B,), and by class {precision, recall, f1}: (B, K), NaN for
    a class neither there nor predicted, where 0 / 0 = 0 for the others. Means are over the classes that are not NaN,
    f1_weighted by how many cases there are, as in scikit-learn.
    """
    counts = np.asarray(counts, np.float64)
    there, named = counts.sum(2), counts.sum(1)[:, : counts.shape[1]]
    hit = np.diagonal(counts, axis1=1, axis2=2)
    found = {"precision": _ratio(hit, named, 0.0), "recall": _ratio(hit, there, 0.0)}
    found["f1"] = _ratio(2 * hit, there + named)
    found = {name: np.where(there + named > 0, values, np.nan) for name, values in found.items()}
    means = {"accuracy": _ratio(hit.sum(1), there.sum(1))}
    means |= {name: mean_defined(found[name]) for name in ("precision", "recall")}
    means |= {"f1_macro": mean_defined(found["f1"])}
    means |= {"f1_weighted": _ratio(np.nansum(there * found["f1"], 1), there.sum(1))}
    return means, found


def mean_defined(values, axis=-1) -> np.ndarray:
    """Mean over an axis of what is not NaN; NaN where nothing is."""
    values = np.asarray(values, np.float64)
    return _ratio(np.nansum(values, axis), (~np.isnan(values)).sum(axis))


# Ordinal scores.


def confusion_counts(truth, predicted, n_classes: int, weights=None) -> np.ndarray:
    """Counts of (true class, predicted class) for each column of the weights: (B, K, K) float64, rows are the truth.

    truth, predicted: (n,) int; an entry where one of them is not in 0..K-1 is left out. weights: (n, B); None: B = 1.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    inside = (truth >= 0) & (truth < n_classes) & (predicted >= 0) & (predicted < n_classes)
    weights = np.ones((len(truth), 1)) if weights is None else np.asarray(weights, np.float64)
    cells = truth[inside] * n_classes + predicted[inside]
    hit = (np.arange(n_classes**2)[:, None] == cells).astype(np.float64)  # (K * K, m)
    return (hit @ weights[inside]).T.reshape(-1, n_classes, n_classes)


def quadratic_kappa(counts) -> np.ndarray:
    """Cohen's kappa with quadratic weights (Cohen 1968) of confusion counts: (..., K, K) -> (...).

    1 - observed / expected squared distance. NaN without a case, and where truth and prediction are of one class.
    """
    counts = np.asarray(counts, np.float64)
    classes = np.arange(counts.shape[-1])
    distance = (classes[:, None] - classes) ** 2.0
    by_chance = counts.sum(-1)[..., :, None] * counts.sum(-2)[..., None, :]  # times the number of cases
    observed, expected = ((x * distance).sum((-2, -1)) for x in (counts, by_chance))
    return 1 - _ratio(observed * counts.sum((-2, -1)), expected)


def ordinal_metrics(counts) -> dict[str, np.ndarray]:
    """Of confusion counts (B, K, K): qwk, mae_class (mean distance), exact, off_2 (shares 0, and 2 or more apart)."""
    counts, classes = np.asarray(counts, np.float64), np.arange(np.shape(counts)[-1])
    apart = abs(classes[:, None] - classes)
    weights = {"mae_class": apart, "exact": apart == 0, "off_2": apart >= 2}
    shares = {name: _ratio((counts * weight).sum((1, 2)), counts.sum((1, 2))) for name, weight in weights.items()}
    return {"qwk": quadratic_kappa(counts)} | shares


def agreement(a, b, weights=None) -> dict[str, np.ndarray]:
    """How far two scores of the same cases agree, for each column of the weights: {name: (B,) float64}.

    a, b: (n,); a case with NaN in one of them is left out. weights: (n, B), how often each case counts; None: B = 1.
    n, mean_a, mean_b, mae, rmse, pearson; icc: ICC(2,1), two-way random effects, absolute agreement, single measure
    (McGraw and Wong 1996, their ICC(A,1)); bias: mean of a - b, sd: its standard deviation (ddof 1), loa_low and
    loa_high: bias -/+ 1.96 sd (Bland and Altman 1986). NaN where undefined: fewer than two cases, or no spread.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = ~np.isnan(a) & ~np.isnan(b)
    w = np.ones((len(a), 1)) if weights is None else np.asarray(weights, np.float64)
    a, b, w = a[both], b[both], w[both]
    n = w.sum(0)

    def mean(x):
        return _ratio(x @ w, n)

    def covariance(x, y):
        x, y = x - x[:1], y - y[:1]  # a constant becomes exactly 0, and sums of squares lose few digits
        sums = (x * y) @ w
        about_mean = sums - _ratio((x @ w) * (y @ w), n)
        return _ratio(np.where(abs(about_mean) < 1e-12 * abs(sums), 0, about_mean), np.maximum(n - 1, 0))

    var_a, var_b, both, var_gap = covariance(a, a), covariance(b, b), covariance(a, b), covariance(a - b, a - b)
    bias, sd = mean(a - b), np.sqrt(var_gap)
    found = {"n": n, "mean_a": mean(a), "mean_b": mean(b), "mae": mean(abs(a - b)), "rmse": np.sqrt(mean((a - b) ** 2))}
    found["pearson"] = _ratio(both, np.sqrt(var_a * var_b))
    # mean squares of two raters: rows - error = 2 cov, rows + error = var_a + var_b, (columns - error) / n as below
    found["icc"] = _ratio(2 * both, var_a + var_b + bias**2 - _ratio(var_gap, n))
    return found | {"bias": bias, "sd": sd, "loa_low": bias - 1.96 * sd, "loa_high": bias + 1.96 * sd}


# Retrieval. Features are L2-normalised, a score is their cosine. Scores within SAME_SCORE, the noise of float32, are
# equal, and equal ones count as if in random order: features that are all the same get the chance level, not 0 or 1.
SAME_SCORE = 1e-6


def retrieval_ranks(
    queries, gallery, query_ids=None, gallery_ids=None, right=None, chunk: int = 512
) -> dict[str, np.ndarray]:
    """Rank, from 1, of the best right answer to each query.

    queries: (n, E), gallery: (m, E); what has the id of the query is right (default: the row number), or what `right`,
    (n, m) bool, says, so several may be. -> arrays (n,) float64: `rank`, its mean over the orders of equal scores;
    `best` and `worst`, the first and the last it can be (for the best right answer; another right one with the same
    score is no obstacle); `tied`, the right answers of that score; `right`, all right ones. All NaN but the last where
    there is none. Memory: O(chunk * m).
    """
    counts = np.empty((4, len(queries)))
    for some, scores, hit in _scored(queries, gallery, query_ids, gallery_ids, right, chunk):
        top = scores.max(axis=1, initial=-np.inf, where=hit)[:, None]
        above = scores > top + SAME_SCORE
        tied = (scores >= top - SAME_SCORE) & ~above
        counts[:, some] = above.sum(1), (tied & ~hit).sum(1), (tied & hit).sum(1), hit.sum(1)
    above, wrong, tied, right = counts
    above[right == 0] = np.nan
    ranks = {"rank": above + 1 + wrong / (tied + 1), "best": above + 1, "worst": above + 1 + wrong}
    return ranks | {"tied": np.where(right, tied, np.nan), "right": right}


def average_precision(queries, gallery, query_ids=None, gallery_ids=None, right=None, chunk: int = 128) -> np.ndarray:
    """(n,): mean over the right answers to a query of the share of right ones up to there; NaN where there is none.

    Arguments as in `retrieval_ranks`; the mean over queries is the (true) mean average precision. Equal scores, which
    here are those closer than SAME_SCORE to the next one, count as the mean over all their orders, in closed form.
    """
    values = np.empty(len(queries))
    for some, scores, hit in _scored(queries, gallery, query_ids, gallery_ids, right, chunk):
        order = np.argsort(-scores, axis=1)
        scores, hit = np.take_along_axis(scores, order, 1), np.take_along_axis(hit, order, 1)
        start = np.flatnonzero(np.diff(scores, axis=1, prepend=np.inf) < -SAME_SCORE)  # of each group, over all rows
        row, above = np.divmod(start, len(gallery))
        held = np.add.reduceat(hit.ravel(), start, dtype=np.int64)
        before = (np.cumsum(hit, 1) - hit)[row, above]
        gain = _group_precision(above, before, np.diff(start, append=hit.size), held)
        values[some] = _ratio(np.bincount(row, gain), hit.sum(1))
    return values


def average_precision_chance(right, total) -> np.ndarray:
    """Mean of the average precision over all orders of `total` things of which `right` are right; NaN if none is."""
    right, total = np.broadcast_arrays(np.asarray(right, np.int64), np.asarray(total, np.int64))
    return _ratio(_group_precision(np.zeros_like(total), 0, total, right), right)


def _group_precision(above, before, size, right):
    """Sum of the precisions at the right ones of a group in random order; above: things before it, `before` of them
    right. The s-th is right with chance right / size; then (s - 1) (right - 1) / (size - 1) of those before it are too.
    """
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, 1 + (above + size).max(initial=0))))
    part = harmonic[above + size] - harmonic[above]  # sum of 1 / place
    return right / size * ((before + 1) * part + (right - 1) / np.maximum(size - 1, 1) * (size - (above + 1) * part))


def _scored(queries, gallery, query_ids, gallery_ids, right, chunk):
    """(slice of the queries, scores (c, m), right (c, m) bool), chunk by chunk."""
    queries, gallery = np.asarray(queries), np.asarray(gallery, np.float64)
    wanted, held = _codes(
        np.arange(len(queries)) if query_ids is None else query_ids,
        np.arange(len(gallery)) if gallery_ids is None else gallery_ids,
    )
    for some in (slice(i, i + chunk) for i in range(0, len(queries), chunk)):
        scores = queries[some].astype(np.float64) @ gallery.T
        yield some, scores, wanted[some, None] == held if right is None else right[some]


def recall_at_k(ranks: dict[str, np.ndarray], ks) -> np.ndarray:
    """(n, len(ks)): chance that a right answer is among the first k: 0 or 1, or between where equal scores decide.

    ranks: of `retrieval_ranks`. The mean over the queries is R@k.
    """
    total = ranks["worst"] - ranks["best"] + ranks["tied"]  # right and wrong answers of the same score
    return np.stack([hit_chance(ranks["tied"], total, k + 1 - ranks["best"]) for k in ks], 1)


def hit_chance(right, total, k) -> np.ndarray:
    """Probability that k of `total` things, drawn without return, hold at least one of `right`; arrays or numbers."""
    right, total, k = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (right, total, k)))
    k, wrong = np.clip(k, 0, total), total - right
    log = [torch.lgamma(torch.as_tensor(np.maximum(x, 0) + 1)).numpy() for x in (wrong, total - k, wrong - k, total)]
    return np.where(k > wrong, 1.0, np.maximum(0, 1 - np.exp(log[0] + log[1] - log[2] - log[3])))


def same_words(text: str) -> str:
    """A report without what makes no difference between two: case and spaces."""
    return " ".join(text.casefold().split())


def report_matches(pairs, texts: list[str], n_images: int) -> np.ndarray:
    """(n, m) bool: whether report j is one of image i's, or word for word the same but for case and spaces.

    pairs: (p, 2) int, row of an image and row of its report, many to many; texts: the m reports.
    """
    codes = pd.factorize(np.array([same_words(text) for text in texts], object))[0]
    has = np.zeros((n_images, codes.max(initial=-1) + 1), bool)
    has[pairs[:, 0], codes[pairs[:, 1]]] = True
    return has[:, codes]


def class_matches(pairs, classes: list[str], n_texts: int) -> np.ndarray:
    """(n, m) bool: whether report j is of the class of image i. '' is no class.

    pairs: as in `report_matches`; classes: of the n images. A report has the class of its images, if they agree.
    """
    codes, names = pd.factorize(np.array(classes, object))
    votes = np.zeros((n_texts, len(names)), bool)
    votes[pairs[:, 1], codes[pairs[:, 0]]] = True
    held = np.where(votes.sum(1) == 1, votes.argmax(1), -1)
    return (codes[:, None] == held) & (np.array(classes, object) != "")[:, None]


def overlap_at_k(
    queries, gallery, query_labels, gallery_labels, ks, query_groups=None, gallery_groups=None, chunk: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Mean label overlap of each query with the k nearest of the gallery: (n, len(ks)); with all of it: (n,).

    The overlap of two cases: labels that both have / labels that one or both have, of those known in both; 0 where
    there are none. labels: (n, K) and (m, K) of 0, 1, NaN; groups: what is of the query's own group (patient) is not
    in its gallery; a query without a gallery is NaN. Of equal scores at the k-th place, the mean counts. The second
    array is what random order gives, for any k. Memory: O(chunk * m).
    The mean over queries is what CT-CLIP calls MAP@k (its scripts/volume_to_volume*.py; no average precision).
    """
    queries, gallery = np.asarray(queries), np.asarray(gallery, np.float64)
    (has, known), (its, its_known) = (
        ((y == 1).astype(np.float64), (y >= 0).astype(np.float64))
        for y in (np.asarray(query_labels, np.float64), np.asarray(gallery_labels, np.float64))
    )
    groups = None if query_groups is None else _codes(query_groups, gallery_groups)
    values, chance = np.full((len(queries), len(ks)), np.nan), np.full(len(queries), np.nan)
    deepest = min(max(ks), len(gallery))
    for some in (np.arange(i, min(i + chunk, len(queries))) for i in range(0, len(queries), chunk)):
        scores = queries[some].astype(np.float64) @ gallery.T  # (c, m)
        both = has[some] @ its.T
        overlap = both / np.maximum(has[some] @ its_known.T + known[some] @ its.T - both, 1)
        n = np.full(len(some), len(gallery))
        if groups is not None:
            own = groups[0][some, None] == groups[1]
            scores[own], overlap[own] = -np.inf, 0
            n -= own.sum(1)
        chance[some] = _ratio(overlap.sum(1), n)
        top = np.sort(np.partition(scores, len(gallery) - deepest, axis=1)[:, -deepest:], axis=1)[:, ::-1]
        for j, k in enumerate(ks):
            k = np.minimum(k, n)  # (c,)
            last = top[np.arange(len(some)), np.maximum(k, 1) - 1][:, None]
            above = scores > last + SAME_SCORE
            tied = (scores >= last - SAME_SCORE) & ~above
            found = (overlap * above).sum(1) + (k - above.sum(1)) * (overlap * tied).sum(1) / tied.sum(1)
            values[some, j] = _ratio(found, k)
    return values, chance


def _codes(a, b) -> tuple[np.ndarray, np.ndarray]:
    """Two lists of names as numbers: equal names, equal numbers."""
    codes = pd.factorize(np.array([*a, *b], object))[0]
    return codes[: len(a)], codes[len(a) :]


# ==== Seeding ==================================================================================================


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch from parts such as (seed, rank, step): no generator state need be saved."""
    value = int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """State of the generators that dropout draws from, for `set_rng_state`: the same pass again, bit for bit."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


# ==== Frozen and recomputed parts ==============================================================================


def rest_frozen(model: nn.Module) -> None:
    """Put the parts of a model whose parameters are all frozen in evaluation mode."""
    for module in model.children():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
        else:
            rest_frozen(module)


def copy_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the buffers that a forward pass may move: batch-norm's statistics, a codebook; for `put_back`."""
    moving = [b for b in model.buffers() if b.is_floating_point()]
    return torch._foreach_clone(moving) if moving else []


def put_back(model: nn.Module, copies: list[torch.Tensor]) -> None:
    """Undo what the forward passes of a step have moved; one NaN in a running mean would stay for ever."""
    for buffer, copy in zip([b for b in model.buffers() if b.is_floating_point()], copies, strict=True):
        buffer.copy_(copy)


def checkpointed(module: nn.Module, *inputs) -> torch.Tensor:
    """module(*inputs), recomputed in the backward pass to save memory; batch-norm statistics move once, not twice.

    Not in the reentrant form, which would give no gradient above a frozen stem.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        return checkpoint(module, *inputs, use_reentrant=False)
    return _checkpointed_with_statistics(module, *inputs)


@torch.compiler.disable  # torch.compile cannot trace a context_fn
def _checkpointed_with_statistics(module: nn.Module, *inputs) -> torch.Tensor:
    contexts = lambda: (contextlib.nullcontext(), _still_statistics(module))  # noqa: E731
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _still_statistics(module: nn.Module):
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.sub_(1)


def resize_bicubic(grid: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(B, E, n, m) -> (B, E, h, w), as F.interpolate(mode="bicubic"), whose gradient is not deterministic on CUDA."""

    def weights(old, new):  # (old, new)
        eye = torch.eye(old, dtype=grid.dtype, device=grid.device)[None, :, :, None]
        return F.interpolate(eye, (new, 1), mode="bicubic")[0, :, :, 0]

    grid = _float32(grid)
    with torch.autocast(grid.device.type, enabled=False):
        return weights(grid.shape[2], h).T @ grid @ weights(grid.shape[3], w)


# ==== Process group ============================================================================================

EVAL_THREADS = 2  # the last digits of a CPU matrix product depend on the thread count; torchrun would change it


@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about this process; `device` is where its tensors live, `cpu_group` carries small host messages."""

    rank: int
    world: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None

    @property
    def master(self) -> bool:
        return self.rank == 0

    def __str__(self):
        return f"{self.device}" + (f", rank {self.rank} of {self.world}" if self.world > 1 else "")

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one. A host message: it does not wait for the accelerator."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(value)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed over the ranks, in place, without gradient."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        self.any(False)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, such as batch-norm statistics, so that all judge the same model."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def pick_device(requested: str = "auto", local_rank: int | None = None) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or a bare GPU index -> device; `local_rank` is set under torchrun.

    Without CUDA a request for it runs on the CPU with one warning; with CUDA, an index that does not exist, or any
    explicit index under torchrun (which assigns one GPU to each process), raises UserError.
    """
    requested = f"cuda:{requested}" if requested.isdigit() else requested
    if requested not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", requested):
        raise UserError(f"device '{requested}' is not known (use auto, cpu, cuda, cuda:N or N)")
    if requested == "cpu" or not torch.cuda.is_available():
        if requested.startswith("cuda") and local_rank in (None, 0):
            print(
                f"warning: '{requested}' was asked for but CUDA is not available: running on the CPU", file=sys.stderr
            )
        return torch.device("cpu")
    if local_rank is not None and ":" in requested:
        raise UserError(f"device '{requested}' cannot be chosen under torchrun (each process takes its own GPU)")
    index = int(requested.split(":")[1]) if ":" in requested else local_rank or 0
    if index >= torch.cuda.device_count():
        names = ", ".join(f"{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
        raise UserError(f"GPU {index} does not exist (there are {names})")
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: str = "auto", timeout_minutes: float = 30):
    """Join the group that torchrun describes in the environment (or run alone), and leave it, but not after an error:
    NCCL would wait for ranks that never leave. `run_main` then ends the process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None)
    cpu_group = None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        timeout = timedelta(minutes=timeout_minutes)
        how = {"store": _own_store(world, timeout), "rank": rank, "world_size": world} if _is_restart() else {}
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout, **how)
        cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    yield Context(rank, world, chosen, cpu_group)
    if world > 1:
        dist.destroy_process_group()


def _is_restart() -> bool:
    """Whether torchrun has restarted this, on one machine. With --max-restarts but without --rdzv-backend it keeps its
    store, and in that the addresses of the ranks that died: the new ones would wait for them for --timeout-minutes."""
    environ = os.environ
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and environ.get("GROUP_WORLD_SIZE") == "1"


def _own_store(world: int, timeout: timedelta) -> dist.Store:
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, timeout)
    return dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def is_split(model: nn.Module) -> bool:
    """Whether each rank holds a part of some parameters (FSDP2)."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(value):
    """Nested values, with what is split over the ranks put together, in CPU memory; then all ranks must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu() if value.ndim else value.full_tensor()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return type(value)(map(whole, value)) if isinstance(value, (list, tuple)) else value


def load_state(part, state: dict) -> None:
    """Load what `whole` made of the state of a model, optimizer or scaler; a rank takes its part of what is split."""

    def like(value, own):
        if not isinstance(own, DTensor) or not value.ndim:
            return value
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)

    if isinstance(part, nn.Module) and is_split(part):
        own = part.state_dict()
        state = {k: like(v, own[k]) for k, v in state.items()}
    elif isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        moments = {i: {k: like(v, parameters[i]) for k, v in s.items()} for i, s in state["state"].items()}
        state = {**state, "state": moments}
    part.load_state_dict(state)


def load_parts(parts: dict, saved: dict) -> None:
    """Give the parts of a run, {name: model, optimizer ... or None}, their states of what `find_resume` found."""
    for name, part in parts.items():
        if part is not None and (saved[name] or name != "scaler"):
            try:
                load_state(part, saved[name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                reason = " ".join(str(e).split())[:300] or type(e).__name__
                raise UserError(f"{saved['file']}: its {name} does not fit this run ({reason})") from e


def clip_grad_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """torch's clip_grad_norm_, also of a model of which a part is split over the ranks -> the norm before."""
    if not is_split(model):
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    moved = [p for p in model.parameters() if p.grad is not None]
    kinds = [[p for p in moved if isinstance(p, DTensor) == split] for split in (True, False)]
    norm = torch.stack([whole(nn.utils.get_total_norm([p.grad for p in some])) for some in kinds]).norm()
    for some in kinds:
        nn.utils.clip_grads_with_norm_(some, max_norm, norm)
    return norm


def gather_rows(rows: torch.Tensor, index: torch.Tensor, ctx: Context) -> torch.Tensor:
    """Rows of every rank in the order of their sample index; the same tensor, on the CPU, on every rank.

    rows: (n_local, ...), index: (n_local,) int64. Ranks may hold different numbers of rows; an index that comes
    twice (padding of a last batch) is kept once.
    """
    rows, index = rows.cpu(), index.cpu()
    if ctx.world > 1:
        parts = [None] * ctx.world
        dist.all_gather_object(parts, (index, rows), group=ctx.cpu_group)
        index, rows = (torch.cat(x) for x in zip(*parts, strict=True))
    order = np.unique(index.numpy(), return_index=True)[1]
    return rows[torch.from_numpy(order)]


def eval_batches(n: int, size: int, ctx: Context) -> list[list[int]]:
    """This rank's batches of the indices 0 to n - 1, the last one filled up with its last index.

    Whole batches go round the ranks, so that each holds the same cases in the same places for any number of ranks: the
    last digits of a matrix product depend on both. A rank without a batch takes the first.
    """
    batches = [list(range(b, min(b + size, n))) for b in range(0, n, size)]
    return [b + b[-1:] * (size - len(b)) for b in batches[ctx.rank :: ctx.world] or batches[:1]]


@contextlib.contextmanager
def eval_threads(device: torch.device):
    """On the CPU, evaluate with a fixed number of threads, so that 1, 2 or 3 ranks give the same digits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(EVAL_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_ranks(model: nn.Module, ctx: Context) -> None:
    """Raise UserError with the first parameter whose gradient differs between ranks (--check-ranks).

    DDP silently skips the all-reduce of a bucket in which one parameter got no gradient.
    """

    def sums(g):  # the norm does not see a sign
        return ("none",) if g is None else (repr(g.norm().item()), repr(g.sum(dtype=torch.float64).item()))

    found = {n: sums(p.grad) for n, p in model.named_parameters()}
    everyone = [None] * ctx.world
    if ctx.world > 1:
        dist.all_gather_object(everyone, found, group=ctx.cpu_group)
        for name in found:
            values = [" ".join(other[name]) for other in everyone]
            if len(set(values)) > 1:
                raise UserError(f"--check-ranks: the gradient of {name} differs between ranks: norm and sum {values}")


def set_deterministic(on: bool) -> None:
    """Bit-exact kernels on CUDA. Call before the first use of the device."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not on


class StopSignal:
    """True once SIGTERM, SIGUSR1 or SIGINT has come. The handler only sets a flag: a collective inside it would hang.

    A second one, over two seconds later, acts at once, as if nobody listened; sooner, it is torchrun's copy.
    """

    def __init__(self):
        self.name, self.time = None, math.inf
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if time.monotonic() > self.time + 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name, self.time = signal.Signals(number).name, min(self.time, time.monotonic())

    def __bool__(self):
        return self.name is not None


def outlive_signals(worker_id: int = 0) -> None:
    """For data workers (`worker_init_fn`): a signal to the whole job must not kill them while the run saves.

    SIGTERM is also how a parent ends its workers, so it takes effect after half a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


# ==== Checkpoints and weight files =============================================================================

CHECKPOINT_FORMAT = 1


def write_atomic(path: Path, content, keep: Path | None = None) -> None:
    """Write text, bytes, or whatever `content(file)` writes; a reader finds the old file or the new one, never half.

    Temporary file in the same folder, fsync, rename, fsync of the folder. Raises UserError if the disk is full or the
    folder is not writable; the old file is then intact and the temporary one gone. A kill leaves the temporary one,
    which is locked while it is written: `remove_stale` can tell. keep: a name that the old file stays under.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            with contextlib.suppress(OSError):  # where the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link_file(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save makes of a full disk "unexpected pos"
        if not isinstance(cause, OSError):
            raise
        raise not_written(path, cause, "; the old file is untouched") from e


def not_written(path: Path, e: OSError, state: str = "") -> UserError:
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
    reason = e.strerror or f"the disk may be full: {e}"  # NumPy has its own words
    return UserError(f"{path}: could not be written: {reason} ({free:.0f} MiB free{state})")


def remove_stale(folders) -> None:
    """Delete what `write_atomic` was writing in these folders when it was killed."""
    for path in [p for folder in folders for p in folder.glob(".*.tmp*") if re.search(r"\.tmp\d+$", p.name)]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails while another program still writes it
            path.unlink()


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Write a dict of tensors and plain Python values, which `weights_only=True` always loads."""
    write_atomic(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file), keep)


def model_checkpoint(task: str, args, model: nn.Module, metrics: dict) -> dict:
    """A model to evaluate, and what evaluation needs to know. Averaged weights stand in the place of raw ones."""
    return {
        "task": task,
        "args": plain_args(args),
        "model": model.state_dict(),
        "ema": None,
        "class_names": list(args.label_columns),
        "thresholds": None,
        "temperatures": None,
        "validated_on": None,
        "metrics": {k: float(v) for k, v in metrics.items()},
        "tokenizer": getattr(model, "tokenizer", None),  # of a model that reads reports, as JSON
        "versions": versions(),
    }


CHECKPOINT_PARTS = {"task": str, "args": dict, "model": dict, "ema": dict | None, "class_names": list | None}
CHECKPOINT_PARTS |= {"thresholds": list | None, "temperatures": list | None, "versions": dict | None}
CHECKPOINT_PARTS |= {"tokenizer": str | None, "validated_on": list | None}


def load_checkpoint(path: Path) -> dict:
    """Read one of our checkpoints to the CPU.

    Raises UserError if it is missing, damaged, of another program, or holds anything but data (it is never unpickled
    freely). torch.load does not notice a flipped byte; the CRC of the zip entries does.
    """
    path = Path(path)
    need_file(path, "checkpoint")
    try:
        damaged = zip_damage(path)
        if damaged:
            raise UserError(f"{path}: damaged at entry {damaged} (use an older checkpoint)")
        with warnings.catch_warnings(action="ignore"):  # of what is refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: refused, it holds more than data: {unsafe_globals(path)}") from e
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as e:
        raise UserError(f"{path}: not a whole checkpoint (use an older one)") from e
    whole = isinstance(checkpoint, dict) and {"task", "args", "model"} <= checkpoint.keys()
    if not whole or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: not a checkpoint of this toolkit (bare weights are given with --pretrained)")
    wrong = [k for k, kinds in CHECKPOINT_PARTS.items() if not isinstance(checkpoint.setdefault(k), kinds)]
    if not wrong:
        pairs = [(k, pair) for k in ("model", "ema") for pair in (checkpoint[k] or {}).items()]
        wrong += [k for k, (name, v) in pairs if not (isinstance(name, str) and isinstance(v, torch.Tensor))]
        names = checkpoint["class_names"] or []
        wrong += ["class_names"] * (not all(isinstance(name, str) for name in names))
        config = checkpoint["args"].get("model_config") or {}
        wrong += ["args.model_config"] * (not (isinstance(config, dict) and _is_config(config)))
        given = [(k, checkpoint[k]) for k in ("thresholds", "temperatures") if checkpoint[k] is not None]
        wrong += [k for k, v in given if len(v) != len(names) or not all(isinstance(x, float | int) for x in v)]
    if wrong:
        raise UserError(f"{path}: its {wrong[0]} is not what this toolkit writes there (use another checkpoint)")
    return checkpoint


def _is_config(config, largest: int = 10**6) -> bool:
    """Sizes of a model as they can be: none so large that a loop over it never ends."""
    if isinstance(config, dict):
        return all(_is_config(v, largest) for v in config.values() if isinstance(v, dict | int))
    return isinstance(config, int) and abs(config) <= largest


def saved_args(parser: argparse.ArgumentParser, saved: dict, config: dict | None = None) -> argparse.Namespace:
    """The arguments of a checkpoint, over its script's defaults. Raises UserError for one that its flag would refuse.

    config: has the keys that `args.model_config` must have.
    """
    args, then = parser.parse_args([]), saved["args"]
    for action in parser._actions:
        value = then.get(action.dest)
        words = value if isinstance(value, list) else [value]
        plain = all(isinstance(word, str if action.type in (None, Path) else str | int | float) for word in words)
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            good = isinstance(value, bool)
        elif isinstance(value, list) and (action.nargs is None or not value):
            good = value and all(isinstance(word, str) for word in value)  # what the script has made of a file
        else:
            try:
                for word in words if plain else ():
                    parser._check_value(action, parser._get_value(action, str(word)))
                size = action.dest.endswith("_size") or action.dest == "num_slices"
                good = plain and not (size and min(map(float, words)) < 0)
            except argparse.ArgumentError:
                good = False
        if value is not None and not good:
            raise UserError(f"its argument {action.dest} is {str(value)[:100]!r} (of another version, or damaged)")
    lacking = (config or {}).keys() - (then.get("model_config") or {}).keys()
    if lacking:
        raise UserError(f"its argument model_config has no '{min(lacking)}' (of another version, or damaged)")
    vars(args).update(then)
    return args


def zip_damage(path: Path) -> str | None:
    """The first entry of a zip that fails its CRC; UserError for a bomb, a small file that would unpack to much."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > 20 * os.path.getsize(path) + 2**26:
            raise UserError(f"{path}: refused, it would unpack to {size / 2**30:.1f} GiB (weights hardly compress)")
        return archive.testzip()


@contextlib.contextmanager
def of_checkpoint(path: Path):
    """Where a checkpoint's own arguments make options or a model: what goes wrong is the file's fault."""
    try:
        yield
    except UserError as e:
        if str(path) in str(e):
            raise
        raise UserError(f"{path}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
        raise UserError(f"{path}: its arguments or weights are not those of a model of this version ({reason})") from e


def filled(build, saved: dict) -> nn.Module:
    """The model that `build()` makes, with the weights of a checkpoint: the averaged ones where it has them.

    Raises UserError if they do not fit, which is seen before memory is taken for what a crafted file claims.
    """
    state, count = saved["ema"] or saved["model"], itertools.count()

    def at_most(*_):
        if next(count) > 2 * len(state) + 1000:
            raise UserError(f"the checkpoint has {len(state)} tensors, its arguments make a model of more layers")

    hook = nn.modules.module.register_module_parameter_registration_hook(at_most)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            own = build().state_dict()
    finally:
        hook.remove()
    fits = lambda a, b: a.shape == b.shape and a.is_complex() == b.is_complex()  # noqa: E731
    other = [k for k in [*own, *state] if k not in own or k not in state or not fits(own[k], state[k])]
    if other:
        k, none = other[0], "missing"
        shapes = [tuple(some[k].shape) if k in some else none for some in (state, own)]
        raise UserError(
            f"{len(other)} tensors do not fit, first {k}: {shapes[0]} in the file, {shapes[1]} in the model"
        )
    model = build()
    model.load_state_dict(state)
    return model


def unsafe_globals(path: Path) -> str:
    """What a refused torch file would have called on loading, and the way out, as one line."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a legacy or crafted file: the refusal stands, only its list is not to be had
        names = []
    return f"{', '.join(names) or 'objects'} (resave it as a plain state dict or .safetensors where you trust it)"


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one atomic step (a hard link, or a copy where links are missing)."""
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # where both were the same file already, rename does nothing


KEPT = 3  # numbered checkpoints of a run
RUN_STATE = {"step": int, "updates": int, "global_batch": int, "stale": int, "best": list, "bad_samples": list}


def save_last(path: Path, checkpoint: dict) -> None:
    """Save the checkpoint a run continues from.

    A name with {step} makes one file a save, of which the newest three stay; else the one before stays as `*_previous`.
    Raises UserError, and writes nothing, if the weights are not finite.
    """
    broken = next((k for k, v in checkpoint["model"].items() if not v.isfinite().all()), None)
    if broken:
        raise UserError(f"{broken} is no longer finite: not saved, the last checkpoint stays (lower --lr)")
    if "{step}" in path.name:
        save_checkpoint(path.with_name(path.name.format(step=checkpoint["state"]["step"])), checkpoint)
        for old in last_files(path)[KEPT:]:
            old.unlink(missing_ok=True)
        return
    newest = last_files(path)[:1]
    save_checkpoint(path, checkpoint, keep=previous_of(path) if newest == [path] else None)  # else the run came from it


def last_files(path: Path) -> list[Path]:
    """What a run could continue from, the newest first."""
    if "{step}" in path.name:
        name = re.compile(r"\d+".join(map(re.escape, path.name.split("{step}"))))
        found = [p for p in path.parent.glob("*") if name.fullmatch(p.name)]
        step = lambda p: int(re.findall(r"\d+", p.name)[-1])  # noqa: E731
        return sorted(found, key=lambda p: (p.stat().st_mtime_ns, step(p)), reverse=True)
    both = [p for p in (path, previous_of(path)) if p.exists()]
    return sorted(both, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def need_writable(files) -> None:
    """Raise UserError unless each file (or None) can be written, or its folder made; before hours of work are lost."""
    for path in filter(None, files):
        folder = next(p for p in Path(path).resolve().parents if p.exists())
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise UserError(f"{folder}: is not a folder that can be written to (for {path})")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: could not be made: {e.strerror} (choose another folder)") from e


def forget_run(last: Path, ctx: Context) -> None:
    """At a fresh start, with the folder locked: a run that was here before must not be what `--resume auto` finds."""
    if ctx.master:
        for path in last_files(last):
            path.unlink(missing_ok=True)
    ctx.barrier()


def previous_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def find_resume(args, last: str, fixed=(), world: int = 1) -> dict | None:
    """The checkpoint that `--resume` means, or None for a fresh start; `args` then takes over what it fixes.

    `auto` is the newest of OUTPUT_DIR/last, or the one before if that is damaged. Raises UserError for a path that
    does not exist, for a damaged file without predecessor, for a fresh start in a folder that holds a run, and if an
    argument in `fixed` or the global batch is not what the run began with.
    """
    path = args.output_dir / last
    here = last_files(path)
    if not args.resume:
        if here and not args.overwrite:
            raise UserError(f"{args.output_dir}: holds a run (--resume auto continues it, --overwrite starts anew)")
        return None
    file = args.resume
    if args.resume != "auto":
        saved = load_checkpoint(args.resume)
        if here and Path(args.resume).resolve().parent != path.resolve().parent and not args.overwrite:
            raise UserError(
                f"{args.output_dir}: holds another run than {args.resume} (continue that in another --output-dir; "
                "--overwrite gives this one up)"
            )
    elif not here:
        return None
    else:
        for file, older in zip(here, [*here[1:], None], strict=True):
            try:
                saved = load_checkpoint(file)
                break
            except UserError as e:
                if older is None:
                    raise
                print(f"warning: {e}; continuing from {older}", file=sys.stderr)
    if here and Path(file).resolve() != here[0].resolve():
        with contextlib.suppress(OSError):
            os.utime(file)  # from here the run goes on: `auto` must not go back to a later one, given up or damaged
    if "state" not in saved:
        raise UserError(f"{args.resume}: holds a model but no run to continue (resume from {last})")
    now, then, state = plain_args(args), saved["args"], saved["state"]
    missing = [f"args.{k}" for k in fixed if k not in then] + [k for k in ("optimizer", "scaler") if k not in saved]
    if not isinstance(state, dict):
        missing.append("state")
    else:
        missing += [f"state.{k}" for k in RUN_STATE if not isinstance(state.get(k), RUN_STATE[k])]
        missing += ["state.step"] * (not missing and state["step"] < 0)
    if missing:
        raise UserError(f"{file}: has no {missing[0]} as this script writes it (a run of another script or version?)")
    saved["file"] = str(file)
    for name in fixed:
        if now[name] is not None and now[name] != then[name]:
            raise UserError(f"--{name.replace('_', '-')} is {now[name]} but the run has {then[name]} (use another run)")
        setattr(args, name, then[name])
    batch, batch_then = args.batch_size * args.accum_steps * world, saved["state"]["global_batch"]
    if batch != batch_then:
        raise UserError(f"the global batch is {batch} but the run has {batch_then} (change --accum-steps to match)")
    free = {"resume", "output_dir", "batch_size", "accum_steps", "num_workers", "overwrite", "pretrained", "config"}
    for name in now.keys() & then.keys() - free - set(fixed):
        if now[name] != then[name]:
            print(f"warning: --{name.replace('_', '-')} was {then[name]} and is now {now[name]}", file=sys.stderr)
    return saved


class TopK:
    """The k best models of a run: {score, step, path} in `entries`, weights in CPU memory and in a file each.

    A new entry is written the moment it enters; files that drop out are deleted by `prune`, which is called only after
    the run's own checkpoint has forgotten them, so that a kill in between loses nothing.
    """

    def __init__(self, folder: Path, name: str, k: int, entries: list):
        """name: file name with {fields}, relative to `folder`."""
        self.folder, self.pattern, self.k, self.entries = folder, re.sub(r"\{.*?\}", "*", name), k, entries
        self.memory = {}
        for entry in list(entries):
            try:
                self.memory[entry["path"]] = load_checkpoint(folder / entry["path"])
            except UserError as e:  # after falling back to an older checkpoint, whose files may be gone
                print(f"warning: {e}; it leaves the list of best models", file=sys.stderr)
                entries.remove(entry)

    def add(self, score: float, step: int, name: str, checkpoint: dict, master: bool) -> bool:
        """Enter a model; an undefined (NaN) score ranks below every number. Returns whether it is the new best."""
        entry = {"score": score, "step": step, "path": name}
        if any(e["path"] == name and (e["score"] > score or math.isnan(score)) for e in self.entries):
            return False  # of two evaluations in one epoch, where the name has the epoch alone
        ranked = [e for e in self.entries if e["path"] != name] + [entry]
        ranked.sort(key=lambda e: (-math.inf if math.isnan(e["score"]) else e["score"], -e["step"]), reverse=True)
        self.entries[:] = ranked[: self.k]
        if entry in self.entries:
            self.memory[name] = {k: to_cpu_copy(v) for k, v in checkpoint.items()}
            if master:
                save_checkpoint(self.folder / name, self.memory[name])
        self.memory = {e["path"]: self.memory[e["path"]] for e in self.entries}
        return self.entries[0] is entry

    def prune(self) -> None:
        for path in self.folder.glob(self.pattern):
            if str(path.relative_to(self.folder)) not in self.memory:
                path.unlink(missing_ok=True)


def to_cpu_copy(value):
    """Tensors anywhere in nested dicts, lists and tuples -> detached CPU copies."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu_copy(v) for k, v in value.items()}
    return type(value)(map(to_cpu_copy, value)) if isinstance(value, (list, tuple)) else value


def load_weights(source: str) -> dict[str, torch.Tensor]:
    """State dict of a weight file: .safetensors, torch (.bin .pt .pth .ckpt), .npz, a Hugging Face folder, or a hub id.

    Wrappers (`state_dict`, `model_state_dict`, `model`) and the prefixes `module.` and `_orig_mod.` are taken off.
    Never runs code: torch files load with weights_only, npz without pickles. Raises UserError on anything else.
    """
    path = Path(source)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.suffix:
            return _load_folder(_download(source))
        raise UserError(f"{source}: no such weight file (nor a hub id of the form owner/name)")
    need_file(path)
    try:
        if path.suffix == ".npz" or zipfile.is_zipfile(path):
            damaged = zip_damage(path)
            if damaged:
                raise UserError(f"{path}: damaged at entry {damaged} (fetch it again)")
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                state = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
        else:
            with warnings.catch_warnings(action="ignore"):  # of what is refused
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: refused, it holds more than weights: {unsafe_globals(path)}") from e
    except RuntimeError as e:
        if "TorchScript" not in str(e):
            raise UserError(f"{path}: not a readable weight file ({type(e).__name__})") from e
        way = f"torch.save(torch.jit.load('{path.name}', map_location='cpu').state_dict(), 'weights.pt')"
        raise UserError(f"{path}: refused, a TorchScript archive is code (where you trust it: {way})") from e
    except Exception as e:  # torch.load of a text or a cut file raises nearly anything
        raise UserError(f"{path}: not a readable weight file ({type(e).__name__})") from e
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    pairs = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors (a state dict was expected)")
    return {re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", k): v for k, v in tensors.items()}


def _load_folder(folder: Path) -> dict[str, torch.Tensor]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # one file, or the shards of one
        files = sorted(folder.glob(pattern))
        for index in folder.glob(f"{pattern}.index.json"):
            try:
                named = set(map(str, json.loads(index.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{index}: not the index of a weight folder ({type(e).__name__})") from e
            absent = named - {file.name for file in files}
            if absent:
                raise UserError(
                    f"{folder}: {min(absent)} is missing, which {index.name} names (fetch the folder again)"
                )
        if files:
            return {k: v for file in files for k, v in load_weights(str(file)).items()}
    raise UserError(f"{folder}: holds neither model*.safetensors nor pytorch_model*.bin")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed only here

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]))
    except Exception as e:  # whatever the hub client raises: no network, gated, no such id
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{hub_id}: could not be fetched from the hub: {reason} (give a local file instead)") from e


def apply_weights(model: nn.Module, state: dict, source: str, optional=(), allow_partial=False, say=print) -> None:
    """Copy `state` into `model` by name and print what happened to every tensor.

    `optional`: prefixes of `model` that a weight file need not have (heads). Raises UserError if nothing matches, or if
    a required tensor is missing or has another shape and `allow_partial` is not set.
    """
    own = model.state_dict()
    loaded = [k for k in own if k in state and state[k].shape == own[k].shape]
    reshaped = [k for k in own if k in state and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    required = [k for k in missing + reshaped if not k.startswith(tuple(optional))]
    rows = {
        "loaded": loaded,
        "missing": missing,
        "unexpected": [k for k in state if k not in own],
        "reshaped": reshaped,
    }
    say(f"weights from {source}")
    for name, keys in rows.items():
        examples = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
        say(f"  {name:10s} {len(keys):5d}  {examples if name != 'loaded' else ''}".rstrip())
    if not loaded:
        raise UserError(f"{source}: no tensor fits this model (is it a file of another architecture?)")
    broken = [k for k in loaded if not torch.isfinite(state[k]).all()]
    if broken:
        raise UserError(
            f"{source}: {len(broken)} tensors hold NaN or infinite values, first {broken[0]} (fetch it again)"
        )
    if required and not allow_partial:
        k = required[0]
        found = f"has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}" if k in state else "is missing"
        raise UserError(
            f"{source}: {len(required)} tensors do not fit, first {k} {found} (--allow-partial loads the rest)"
        )
    model.load_state_dict({k: state[k] for k in loaded}, strict=False)


def save_weights(path: Path, state: dict) -> None:
    """A bare state dict as .safetensors or a torch file, by the name."""
    if Path(path).suffix == ".safetensors":
        write_atomic(path, safetensors.torch.save({k: v.cpu().contiguous() for k, v in state.items()}))
    else:
        write_atomic(path, lambda file: torch.save(to_cpu_copy(state), file))


def load_tokenizer(source: Path) -> Tokenizer:
    """BERT's WordPiece tokenizer from a vocab.txt, a tokenizer.json, or a folder with one of them.

    Lower case unless the folder's tokenizer_config.json says otherwise, as in transformers. Raises UserError.
    """
    source = Path(source)
    files = [source / "vocab.txt", source / "tokenizer.json"] if source.is_dir() else [source]
    path = next((f for f in files if f.is_file()), None)
    if path is None:
        raise UserError(f"{source}: no vocabulary (a vocab.txt, a tokenizer.json, or a folder that holds one)")
    try:
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        words = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # U+2028 ends no line
        settings = path.with_name("tokenizer_config.json")
        lower = json.loads(settings.read_text()).get("do_lower_case", True) if settings.is_file() else True
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a vocabulary ({str(e).splitlines()[0]})") from e
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words)}
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in vocab]
    if missing:
        raise UserError(f"{path}: has no {missing[0]} (a BERT vocabulary, one word a line, was expected)")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer


def choose_thresholds(given: float | None, checkpoint: dict):
    """(threshold or thresholds, where they come from): the flag, else the checkpoint's own, else 0.5."""
    if given is not None:
        return given, f"{given} (--threshold)"
    if checkpoint.get("thresholds") is not None:
        return np.array(checkpoint["thresholds"]), "per label, from the checkpoint (tuned on the validation split)"
    return 0.5, "0.5 (default)"


def prediction_table(ids, probs, class_names, thresholds) -> pd.DataFrame:
    """id, then {label}_prob and {label}_pred of each label; both empty for a case that could not be read (NaN).

    probs (n, K); thresholds a number or (K,); present means prob >= threshold.
    """
    present = pd.DataFrame(np.where(np.isnan(probs), 0, probs >= thresholds).astype(int)).astype("Int64")
    columns = {"id": list(ids)}
    for k, name in enumerate(class_names):
        columns[f"{name}_prob"] = probs[:, k]
        columns[f"{name}_pred"] = present[k].mask(np.isnan(probs[:, k]))
    return pd.DataFrame(columns)


def read_table(path: Path, separators: str = ",") -> pd.DataFrame:
    """A CSV as text, one row a line; empty cells are ''. Of several separators, the one its first line has most often.

    Raises UserError if it is missing, not UTF-8, or empty, if a column is there twice, or if a row has more or fewer
    cells than the first line has names, as in a file that was cut.
    """
    need_file(path)
    try:
        data = Path(path).read_bytes()
        first = re.split(rb"[\r\n]", data[:100_000], maxsplit=1)[0].decode(errors="replace")
        separator = max(separators, key=first.count)
        lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
        rows = [row for row in csv.reader(lines, delimiter=separator, strict=True) if row]  # blank lines are none
    except (OSError, ValueError, csv.Error) as e:
        hint = " (save it as UTF-8)" if isinstance(e, UnicodeDecodeError) else ""
        raise UserError(f"{path}: not a readable CSV: {e}{hint}") from e
    if b"\0" in data:
        raise UserError(f"{path}: not a readable CSV: it holds NUL characters (save it as UTF-8)")
    if len(rows) < 2:
        raise UserError(f"{path}: " + ("has no rows" if rows else "not a readable CSV: it is empty"))
    names = rows[0]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: column '{twice}' is there twice (delete one)")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise UserError(f"{path}: row {number} has {len(row)} cells, the first line has {len(names)} (a cut file?)")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    return pd.DataFrame(rows[1:], columns=names, dtype=str)


def need_columns(table: pd.DataFrame, columns, path: Path) -> None:
    """Raise UserError that names the first missing column and the nearest one there is."""
    for column in columns:
        if column not in table.columns:
            near = difflib.get_close_matches(column, list(table.columns), 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(map(str, table.columns[:6]))} ..."
            raise UserError(f"{path}: column '{column}' is missing ({hint})")


def label_array(table: pd.DataFrame, columns, path: Path) -> np.ndarray:
    """Label columns -> (n, K) float32 of 0, 1 and NaN for unknown (empty or -1); else UserError with the row."""
    need_columns(table, columns, path)
    text = table[list(columns)].apply(lambda c: c.str.strip())
    values = text.apply(pd.to_numeric, errors="coerce").to_numpy(np.float32)
    empty = text.isin(["", "nan", "NaN"]).to_numpy()
    bad = ~(empty | np.isin(values, (0, 1, -1)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{path}: row {table.index[row] + 2}, column '{columns[column]}': '{text.iat[row, column]}' is no label "
            "(0, 1, or empty for unknown)"
        )
    return np.where(values < 0, np.nan, values)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV atomically; text cells that a spreadsheet would run as a formula get a leading quote."""
    text = table.copy()
    for column in text.columns:
        if not pd.api.types.is_numeric_dtype(text[column]):
            text[column] = [safe_cell(v) if isinstance(v, str) else v for v in text[column]]
    text.columns = [safe_cell(str(c)) for c in text.columns]
    write_atomic(path, text.to_csv(index=False))


def safe_cell(text: str) -> str:
    """Text that begins with = + - @ tab or CR, and is no number, gets a leading quote (CSV injection, OWASP)."""
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") and not number else text


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


# ==== CT volumes ===============================================================================================

# Voxels that a file may hold, all channels counted. Headers are believed only up to here: a 1 MB file can claim 1 TB.
MAX_VOXELS = int(float(os.environ.get("PLAINSCAN_MAX_VOXELS", 1e9)))
MAX_CHANNELS = 16  # more than that in front is a volume stored in another axis order
SCAN_SUFFIXES = (".nii.gz", ".nii", ".mha")  # with an affine
VOLUME_SUFFIXES = (*SCAN_SUFFIXES, ".npz", ".npy")
SPACING_COLUMNS = ("spacing_z", "spacing_y", "spacing_x")  # mm
RESCALE_COLUMNS = ("RescaleSlope", "RescaleIntercept")
AIR = -1000  # HU
WINDOWS = {  # HU: centre, width
    "lung": (-600, 1000),
    "mediastinum": (40, 400),
    "bone": (700, 1500),
    "wide": (0, 2000),
    "chest": (-300, 1400),  # -1000 to 400, of the VLM3D slices
}
BODY_AXIS = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}  # where a direction stands in the order S, P, L


@dataclasses.dataclass(frozen=True)
class Volume:
    """A CT in Hounsfield units.

    array: (D, H, W) int16, by default increasing toward superior, posterior and left: slice 0 is the lowest, row 0 the
    front, column 0 the patient's right (the order of a DICOM series or an ITK array); a memory map for a cached .npy.
    spacing: millimetres along the same axes, None if the file does not say.
    notes: what was found and decided on reading; those that need a look begin with 'warning: '.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    notes: tuple[str, ...]


def read_volume(
    path: Path,
    *,
    layout: str = "CDHW",
    value_range: str = "auto",
    rescale: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    orientation: str = "SPL",
    header_scaling: bool = True,
    max_voxels: int | None = None,
) -> Volume:
    """Read a CT volume; every format gives the same array for the same scan, bit for bit.

    Formats: NIfTI-1 (.nii, .nii.gz) and MetaImage (.mha), turned by their affine; .npz with key `image` (and
    `spacing`); .npy, memory-mapped if it is the int16 of a cache. Of several channels the first is read.

    layout: axes of .npz and .npy, with or without C. "CDHW": increasing toward S, P, L. "CHWD": depth last, increasing
        toward R, A, S, as the preprocessing of the original SigLIP tool writes them (MONAI "RAS", (1, 256, 256, 192)).
    value_range: "auto"; "unit" for 0-1, where HU = 2500 v - 1000; "hu" for HU already, `rescale` is then not applied;
        "stored" for scanner values, `rescale` is then applied without question.
    rescale: (RescaleSlope, RescaleIntercept) of the metadata. With "auto" it is applied once: not after a scaling in
        the file's own header, nor if the values are HU already (CT-RATE v2 files beside v1 metadata: CT-CLIP issue 50).
    spacing: (dz, dy, dx) mm, along S, P, L; instead of the file's.
    orientation: directions of the axes of the result.
    header_scaling: whether a NIfTI header's scl_slope and scl_inter are applied.
    max_voxels: cap on what the header may claim, by default MAX_VOXELS; checked before memory is allocated.

    Raises UserError, in one line, on a missing, damaged or foreign file, a shape or type that is no volume, NaN, or
    values that are neither HU nor 0-1.
    """
    path, cap = Path(path), MAX_VOXELS if max_voxels is None else max_voxels
    kind = next((s for s in VOLUME_SUFFIXES if path.name.lower().endswith(s)), None)
    if kind is None:
        raise UserError(f"{path}: not a volume by its name ({', '.join(VOLUME_SUFFIXES)} are read)")
    need_file(path)
    scaling, notes = (1.0, 0.0), []
    try:
        if kind == ".mha":
            array, axes, found = _read_mha(path, cap, notes)
        elif kind.startswith(".nii"):
            array, axes, found, scaling = _read_nifti(path, cap, notes)
            scaling = scaling if header_scaling else (1.0, 0.0)
        else:
            array, found = _read_npz(path, cap) if kind == ".npz" else (_map_npy(path, cap), None)
            array, axes = _first_channel(array, layout, notes)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except (
        OSError, EOFError, ValueError, TypeError, SyntaxError, KeyError, RuntimeError, OverflowError, zlib.error,
        zipfile.BadZipFile, tokenize.TokenError, isal_zlib.error, nib.spatialimages.HeaderDataError,
    ) as e:  # fmt: skip
        raise UserError(f"{path}: damaged or not what its name says: {' '.join(str(e).split())[:200]}") from e
    if spacing and found and not np.allclose(spacing, found, rtol=0.01):
        notes.append("warning: the file states another spacing than the metadata, which is used")
    spacing = spacing or found
    if spacing is not None:
        if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
            raise UserError(f"{path}: spacing {tuple(spacing)} is not three millimetres above 0 in the order z, y, x")
        spacing = tuple(round(float(spacing[BODY_AXIS[d]]), 6) for d in orientation)  # float32 and CSV: the same
    array = _reorient(array, axes, orientation)
    if not (kind == ".npy" and array.dtype == np.int16 and value_range != "unit" and rescale in (None, (1, 0))):
        slope, intercept = _hu_scaling(path, array, value_range, rescale, scaling, notes)
        array = _to_int16(array, slope, intercept)
    return Volume(array, spacing, tuple(notes))


def volume_options(row: dict) -> dict:
    """What a CSV row knows about its volume -> the arguments `spacing` and `rescale` of `read_volume`, if it does."""
    options = {}
    for name, columns in (("spacing", SPACING_COLUMNS), ("rescale", RESCALE_COLUMNS)):
        cells = [str(row.get(c, "")).strip() for c in columns]
        if any(cells):
            try:
                options[name] = tuple(map(float, cells))
            except ValueError as e:
                raise UserError(f"{', '.join(columns)}: {cells} are not all numbers") from e
            lowest = min(options[name]) if name == "spacing" else 1
            if not all(map(math.isfinite, options[name])) or lowest <= 0:
                raise UserError(f"{', '.join(columns)}: {cells} (finite numbers, spacings above 0, were expected)")
    return options


def is_scan(path: Path) -> bool:
    """A file with an affine by its name: .nii.gz, .nii or .mha."""
    return path.name.lower().endswith(SCAN_SUFFIXES) and path.is_file()


def volume_name(name: str) -> str:
    """'train/train_1_a_1.nii.gz' -> 'train_1_a_1'."""
    name = name.rsplit("/", 1)[-1].strip()
    suffix = next((s for s in VOLUME_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def rows_by_name(path: Path | None, columns=()) -> dict[str, dict]:
    """Rows of a CSV with a column VolumeName, by that name without its extension."""
    if path is None:
        return {}
    table = read_table(path)
    need_columns(table, ["VolumeName", *columns], path)
    names = table["VolumeName"].map(volume_name)
    if names.duplicated().any():
        raise UserError(f"{path}: {names[names.duplicated()].iloc[0]} has two rows (delete one)")
    return dict(zip(names, table.to_dict("records"), strict=True))


def metadata_options(metadata: dict, name: str, path: Path) -> dict:
    """`rescale` and `spacing` for `read_volume` from the volume's row of the metadata CSV (CT-RATE's columns)."""
    if name not in metadata:
        raise UserError(f"{path}: no row for {name} (add it, or leave --metadata away if the files hold HU)")
    row = dict(metadata[name])
    in_plane = re.findall(r"[\d.eE+-]+", row.get("XYSpacing", ""))  # the text "[0.68, 0.68]"
    if in_plane and row.get("ZSpacing", "").strip():
        row |= dict(zip(SPACING_COLUMNS, [row["ZSpacing"], in_plane[-1], in_plane[0]], strict=True))
    try:
        return volume_options(row)
    except UserError as e:
        raise UserError(f"{path}: {name}: {e}") from e


def volume_sources(table: pd.DataFrame, csv: Path, metadata: Path | None = None, root: Path | None = None) -> list:
    """(path, arguments of `read_volume`) of each row of a training CSV, read by `read_table` from `csv`.

    Paths are relative to the CSV's folder, or to `root`, which they may then not leave.
    """
    known, sources = rows_by_name(metadata, RESCALE_COLUMNS), []
    for number, row in zip(table.index + 2, table.to_dict("records"), strict=True):
        text = row["img_path"].strip()
        if not text or max(map(len, text.encode().split(b"/"))) > 255:
            raise UserError(f"{csv}: row {number}: img_path is " + ("too long for a file" if text else "empty"))
        path = (root or Path(csv).parent) / text
        if root and not Path(os.path.realpath(path)).is_relative_to(root.resolve()):
            raise UserError(f"{csv}: row {number}: {text} leads out of --data-root {root}")
        try:
            options = volume_options(row)
        except UserError as e:
            raise UserError(f"{csv}: row {number}: {e}") from e
        if metadata:
            name = volume_name(text)
            options |= metadata_options(known, name if name in known else row["series_id"], metadata)
        sources.append((path, options))
    return sources


def group_of(series_id: str) -> str:
    """The patient: 'train_1_a_2' (patient, scan, reconstruction; CT-RATE) -> 'train_1'; any other id is its own."""
    match = re.fullmatch(r"([A-Za-z]+_\d+)_[a-z]_\d+", volume_name(series_id))
    return match[1] if match else series_id


def patients_of(table: pd.DataFrame, names: str) -> list[str]:
    """The patient of each row: its patient_id; where that is missing or empty, `group_of` the column `names`."""
    given = table["patient_id"].str.strip() if "patient_id" in table else [""] * len(table)
    return [patient or group_of(name) for patient, name in zip(given, table[names], strict=True)]


def leaks(table: pd.DataFrame) -> list[str]:
    """Patients of a training CSV who are in more than one of train, val and test: a phrase for each."""
    splits, patients = table["split"].str.strip(), pd.Series(patients_of(table, "series_id"), table.index)
    of = splits[splits.isin(["train", "val", "test"])].groupby(patients).unique()
    return [f"patient {who} is in {' and '.join(sorted(x))} (results leak)" for who, x in of.items() if len(x) > 1]


def sample_volume(
    array: np.ndarray,
    spacing: tuple[float, float, float] | None,
    num_slices: int,
    image_size: int | tuple[int, int],
    slice_spacing: float | None = None,
    jitter: float = 0.0,
) -> np.ndarray:
    """(D, H, W) int16 HU -> (S, h, w) int16 HU; the identity if that is the size already. Reads only those slices.

    Slices are the nearest ones to the middles of S equal parts of the depth, or to positions `slice_spacing` mm apart
    around the middle, with air outside. `jitter` in [-0.5, 0.5) moves all of them by that part of a step.
    In plane, air is padded to the aspect ratio of (h, w), then an antialiased bilinear resize.
    """
    depth, height, width = array.shape
    h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
    step = np.arange(num_slices) + 0.5 + jitter
    if slice_spacing is None:
        index = np.floor(step * depth / num_slices).astype(int)  # jitter never leaves the part
    elif spacing is None:
        raise UserError(
            "slices a number of mm apart need the volume's spacing (columns spacing_z, spacing_y, spacing_x)"
        )
    else:
        index = np.floor(depth / 2 + (step - num_slices / 2) * (slice_spacing / spacing[0])).astype(int)
    slices = np.asarray(array[index.clip(0, depth - 1)])
    slices[(index < 0) | (index >= depth)] = AIR
    return resize_slices(slices, (h, w))


def resize_slices(slices: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
    """(S, H, W) int16 HU or uint8 levels -> (S, h, w) of the same type; the identity if that is the size already.

    The darkest value (air, or 0) is padded to the aspect ratio of (h, w), then an antialiased bilinear resize.
    """
    height, width = slices.shape[1:]
    h, w = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (height, width) == (h, w):
        return slices
    tall, wide = max(height, math.ceil(width * h / w)), max(width, math.ceil(height * w / h))
    top, left = (tall - height) // 2, (wide - width) // 2
    image = torch.from_numpy(slices)[:, None].float()  # (S, 1, H, W)
    dark = AIR if slices.dtype == np.int16 else 0
    image = F.pad(image, (left, wide - width - left, top, tall - height - top), value=dark)
    image = F.interpolate(image, (h, w), mode="bilinear", antialias=True)
    return image[:, 0].round().numpy().astype(slices.dtype)


def parse_windows(names) -> list[tuple[float, float]]:
    """Names of WINDOWS, or 'centre,width' in HU -> [(centre, width)]; raises UserError."""
    windows = []
    for name in names:
        try:
            centre, width = WINDOWS[name] if name in WINDOWS else map(float, name.split(","))
        except ValueError as e:
            raise UserError(f"--windows: '{name}' is neither of {', '.join(WINDOWS)} nor centre,width in HU") from e
        if not width > 0 or not math.isfinite(centre + width):
            raise UserError(f"--windows: '{name}': the width must be positive")
        windows.append((float(centre), float(width)))
    return windows


def window_levels(hu: torch.Tensor, low: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """(..., 1, h, w) HU -> (..., C, h, w) float32 of whole grey levels 0 to 255, a channel for each window.

    low, width: (C, 1, 1) in HU. Whole levels, so that a slice stored as uint8 and one windowed in training are equal.
    """
    return ((hu.float() - low) * (255 / width)).clamp(0, 255).round()


def chest_range(array: np.ndarray) -> tuple[int, int]:
    """First and last slice (inclusive) of the chest in (D, H, W) int16 HU: the longest run of slices with structure.

    A slice scores its standard deviation times its pixels above the 10th percentile; the upper 70 % count, and gaps of
    up to 5 slices are bridged (mehreen019/vlm3d-task-2, 2d_slice_extractor.py). On about 128 x 128 pixels of a slice.
    """
    thin = np.clip(array[:, :: max(1, array.shape[1] // 128), :: max(1, array.shape[2] // 128)], AIR, 400)
    thin = thin.reshape(len(thin), -1).astype(np.float32)  # (D, P)
    rank = max(0, thin.shape[1] // 10 - 1)
    lowest_tenth = np.partition(thin, rank, axis=1)[:, rank, None]
    score = thin.std(1) * (thin > lowest_tenth).sum(1)
    index = np.flatnonzero((score >= np.quantile(score, 0.3)) & ((score > 0) | (score.max() == 0)))
    runs = np.split(index, np.flatnonzero(np.diff(index) > 5) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1])


def pick_slices(array: np.ndarray, strategy: str = "multi_slice", n: int = 12) -> list[int]:
    """Indices of the slices of (D, H, W) int16 HU that stand for the volume, rising, each once.

    multi_slice: n over the chest, denser in the middle; anatomical: at six levels of it; best_slice: the one with most
    structure and sharpest edges. Positions as in mehreen019/vlm3d-task-2, 2d_slice_extractor.py.
    """
    first, last = chest_range(array)
    if strategy == "best_slice":
        thin = np.clip(array[first : last + 1, ::2, ::2], AIR, 400).astype(np.float32)  # (d, h, w)
        rows, columns = np.diff(thin, 2, axis=1)[:, :, 1:-1], np.diff(thin, 2, axis=2)[:, 1:-1]
        edges = rows + columns  # Laplacian
        parts = thin.std((1, 2)), edges.std((1, 2)), (thin > -900).mean((1, 2))
        score = sum(weight * x / max(x.max(), 1e-6) for weight, x in zip((0.4, 0.3, 0.3), parts, strict=True))
        return [first + int(score.argmax())]
    if strategy == "anatomical":
        levels = np.array([0.1, 0.25, 0.4, 0.55, 0.7, 0.85])
    elif strategy == "multi_slice":
        low, middle = int(0.2 * n), int(0.6 * n)
        parts = np.linspace(0, 0.3, low), np.linspace(0.25, 0.75, middle), np.linspace(0.7, 1, n - low - middle)
        levels = np.concatenate(parts)
    else:
        raise UserError(f"slice strategy '{strategy}' is not known (multi_slice, best_slice or anatomical)")
    return sorted({first + round(float(level) * (last - first)) for level in levels})


def stored_slices(array: np.ndarray, index, size: int, store: str, window: tuple[float, float]) -> np.ndarray:
    """Slices of (D, H, W) int16 HU as prepare_ct.py stores them for a 2-D model -> (S, size, size).

    store: "hu", int16, or "uint8", grey levels of the window (centre, width). Extraction, training and prediction see
    the same pixels because all come through here.
    """
    hu = resize_slices(np.asarray(array[list(index)]), size)
    if store == "hu":
        return hu
    (centre, width), whole = window, torch.from_numpy(hu)[:, None]
    low = torch.tensor([centre - width / 2]).view(1, 1, 1)
    return window_levels(whole, low, torch.tensor([float(width)]).view(1, 1, 1))[:, 0].to(torch.uint8).numpy()


def read_slice(path: Path) -> np.ndarray:
    """One slice of a .npy file -> (H, W) uint8 grey levels (0-1 floats and uint8) or int16 HU. Raises UserError."""
    need_file(path, "slice")
    try:
        array = np.asarray(_map_npy(Path(path), MAX_VOXELS, "(H, W)", (2, 3)))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such slice") from e
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, tokenize.TokenError) as e:
        raise UserError(f"{path}: damaged or not a .npy: {' '.join(str(e).split())[:200]}") from e
    if array.ndim == 3 and 1 not in (array.shape[0], array.shape[2]):
        raise UserError(f"{path}: shape {array.shape}: one slice was expected, (H, W)")
    array = array if array.ndim == 2 else array[0] if array.shape[0] == 1 else array[..., 0]
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < -0.01 or array.max() > 1.01:
            raise UserError(f"{path}: values outside 0 to 1 (HU are stored as int16)")
        return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    if array.dtype not in (np.uint8, np.int16):
        raise UserError(f"{path}: type {array.dtype} (float 0-1, uint8 levels, or int16 HU)")
    return np.array(array)


def _read_nifti(path: Path, cap: int, notes: list):
    """-> array (X, Y, Z), the directions of its axes, spacing (S, P, L), (slope, intercept) of the header."""
    with igzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        header = nib.Nifti1Header(_read_exactly(file, 348).tobytes(), check=False)
        shape = header.get_data_shape()
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        dtype, offset = header.get_data_dtype(), int(header["vox_offset"]) or 352
        _check_claim(shape, dtype, cap, "(X, Y, Z)", (3,))
        if header["magic"] != b"n+1" or not 348 <= offset <= 2**24:
            raise ValueError("not a one-file NIfTI-1")
        _read_exactly(file, offset - 348)
        data = _read_exactly(file, math.prod(shape) * dtype.itemsize, last=True)
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        notes.append("warning: the header gives no orientation, so left and right are a guess")
    axes, spacing = _axes_of(header.get_best_affine(), notes)
    slope, intercept = header.get_slope_inter()
    scaling = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    return np.ndarray(shape, dtype, data, order="F"), axes, spacing, scaling


def _axes_of(affine: np.ndarray, notes: list):
    """(4, 4) voxel -> RAS mm -> directions of the axes, such as 'LPS', and mm along S, P, L."""
    axes = "".join(map(str, nib.aff2axcodes(affine))) if np.isfinite(affine).all() else ""
    if len(axes) != 3 or "None" in axes:
        raise ValueError("the affine of the header is singular")
    notes.append(f"stored axes {axes}")
    sizes = dict(zip((BODY_AXIS[a] for a in axes), nib.affines.voxel_sizes(affine).tolist(), strict=True))
    return axes, (sizes[0], sizes[1], sizes[2])


MHA_TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2"}
MHA_TYPES |= {"MET_INT": "i4", "MET_UINT": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}


def _read_mha(path: Path, cap: int, notes: list):
    """MetaImage with its data in the same file -> array (X, Y, Z), directions of its axes, spacing (S, P, L).

    Row i of TransformMatrix is the direction of axis i in LPS, which is a column in ITK.
    """
    with path.open("rb") as file:
        fields, size = {}, 0
        while "ElementDataFile" not in fields:
            line = file.readline(4096).decode("latin-1")
            size += len(line)
            if "=" not in line or size > 2**16:
                raise ValueError("not a MetaImage header")
            key, _, value = line.partition("=")
            fields[key.strip()] = value.strip()

        def numbers(names, default):
            text = next((fields[n] for n in names if n in fields), default)
            return [float(x) for x in text.split()]

        shape = tuple(int(n) for n in numbers(["DimSize"], ""))
        if fields["ElementDataFile"] != "LOCAL":
            raise ValueError("its data are in another file (.mha holds header and data)")
        if fields.get("ElementNumberOfChannels", "1") != "1" or fields.get("ElementType") not in MHA_TYPES:
            raise ValueError(f"elements of type {fields.get('ElementType')}: one number a voxel was expected")
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
        dtype = np.dtype((">" if big else "<") + MHA_TYPES[fields["ElementType"]])
        _check_claim(shape, dtype, cap, "(X, Y, Z)", (3,))
        size = math.prod(shape) * dtype.itemsize
        if fields.get("CompressedData", "False").lower() == "true":
            raw = isal_zlib.decompressobj().decompress(file.read(), size + 1)  # never more than the header claims
            if len(raw) != size:
                raise EOFError(f"it holds {len(raw)} of {size} bytes")
            data = np.frombuffer(raw, np.uint8)
        else:
            data = _read_exactly(file, size)
    spacing = numbers(["ElementSpacing", "ElementSize"], "1 1 1")[:3]
    matrix = numbers(["TransformMatrix", "Rotation", "Orientation"], "1 0 0 0 1 0 0 0 1")
    n_axes = math.isqrt(len(matrix))
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(matrix, (n_axes, n_axes))[:3, :3].T * spacing  # LPS to RAS
    return np.ndarray(shape, dtype, data, order="F"), *_axes_of(affine, notes)


def _read_npz(path: Path, cap: int):
    """-> array, spacing or None."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "image.npy" not in names:
            keys = ", ".join(n.removesuffix(".npy") for n in names[:5])
            raise ValueError(f"key 'image' was expected, it has {keys or 'nothing'}")
        arrays = []
        for name in ("image.npy", "spacing.npy"):
            if name in names:
                with archive.open(name) as file:
                    shape, fortran, dtype = _npy_header(file)
                    if name == "image.npy":
                        _check_claim(shape, dtype, cap, "(C, D, H, W) or (D, H, W)", (3, 4))
                    elif shape != (3,) or dtype.kind not in "iuf":
                        raise ValueError(f"'spacing' of shape {shape} and type {dtype}: three numbers were expected")
                    data = _read_exactly(file, math.prod(shape) * dtype.itemsize, last=True)
                    arrays.append(np.ndarray(shape, dtype, data, order="F" if fortran else "C"))
    return arrays[0], tuple(arrays[1].tolist()) if len(arrays) > 1 else None


def _map_npy(path: Path, cap: int, wanted: str = "(D, H, W) or (C, D, H, W)", dimensions=(3, 4)) -> np.ndarray:
    with path.open("rb") as file:
        shape, fortran, dtype = _npy_header(file)
        _check_claim(shape, dtype, cap, wanted, dimensions)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _npy_header(file):
    """-> shape, Fortran order, dtype, of an array in NumPy's own format; nothing else is read, nothing unpickled."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _check_claim(shape, dtype, cap: int, wanted: str, dimensions) -> None:
    if dtype.kind not in "iuf":
        raise ValueError(f"values of type {dtype}: plain integers or floats were expected")
    if len(shape) not in dimensions or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)}: {wanted} was expected")
    if math.prod(shape) > cap:
        raise ValueError(
            f"shape {tuple(shape)} has {math.prod(shape):.3g} voxels, over the cap of {cap:.3g} "
            "(raise it by --max-voxels or PLAINSCAN_MAX_VOXELS)"
        )


def _read_exactly(file, size: int, last: bool = False) -> np.ndarray:
    """`size` bytes of a stream, in pieces, so that a file cut short costs no more memory than it holds."""
    data, position = np.empty(size, np.uint8), 0
    while position < size:
        piece = file.read(min(size - position, 2**22))
        if not piece:
            raise EOFError(f"it ends after {position} of {size} bytes")
        data[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
        position += len(piece)
    if last:
        file.read(1)  # gzip and zip compare their checksum only on reaching the end
    return data


def _first_channel(array: np.ndarray, layout: str, notes: list):
    """-> (array of three axes, their directions)."""
    if layout not in ("CDHW", "CHWD"):
        raise UserError(f"layout '{layout}' is not known (CDHW or CHWD)")
    if array.ndim == 4:
        if array.shape[0] > MAX_CHANNELS:
            raise ValueError(f"shape {array.shape}: (C, D, H, W) with C <= {MAX_CHANNELS} was expected: channel first")
        if array.shape[0] > 1:
            notes.append(f"channel 0 of {array.shape[0]}")
        array = array[0]
    if layout == "CDHW" and array.shape[0] == array.shape[1] != array.shape[2]:
        notes.append("warning: the shape looks like depth last (--layout CHWD)")
    return array, "SPL" if layout == "CDHW" else "RAS"


def _reorient(array: np.ndarray, axes: str, target: str) -> np.ndarray:
    """A view of `array` whose axes point along `target` instead of `axes` (three letters of S I, P A, L R each)."""
    places = [BODY_AXIS[a] for a in axes]
    order = [places.index(BODY_AXIS[t]) for t in target]
    flips = tuple(slice(None, None, 1 if axes[i] == t else -1) for i, t in zip(order, target, strict=True))
    return array.transpose(order)[flips]


def _hu_scaling(path, array, value_range, rescale, scaling, notes) -> tuple[float, float]:
    """Slope and intercept that make HU of what is stored; see `read_volume` for the rules."""
    if value_range not in ("auto", "hu", "unit", "stored"):
        raise UserError(f"value range '{value_range}' is not known (auto, hu, unit or stored)")
    slope, intercept = scaling
    if scaling != (1.0, 0.0):
        notes.append(f"scaled by its header: slope {slope:g}, intercept {intercept:g}")
    if array.dtype.kind == "f" or slope != round(slope):
        ends = np.array([array.min(), array.max()], np.float64) * slope + intercept
        if not np.isfinite(ends).all():
            raise UserError(f"{path}: holds NaN or infinite values (the file is not usable)")
        if value_range == "auto" and -0.01 <= ends[0] and ends[1] <= 1.01:
            value_range = "unit"
        if value_range == "auto" and abs(ends).max() < 10:
            raise UserError(
                f"{path}: values from {ends[0]:.3g} to {ends[1]:.3g} are neither HU nor 0-1 "
                "(convert them, or insist with --value-range hu or unit)"
            )
    if value_range == "unit":
        notes.append("values 0-1, HU = 2500 v - 1000")
        return 2500 * slope, 2500 * intercept - 1000
    sample = array[tuple(slice(None, None, max(1, n // 32)) for n in array.shape)] * slope + intercept
    if rescale not in (None, (1, 0)):
        if value_range == "hu":
            notes.append("RescaleSlope and RescaleIntercept not applied: the values are said to be HU")
        elif value_range == "auto" and scaling != (1.0, 0.0):
            notes.append("RescaleSlope and RescaleIntercept not applied after the header's scaling")
        elif value_range == "auto" and _is_hu(sample) and not _is_ct(sample * rescale[0] + rescale[1]):
            notes.append(f"warning: RescaleIntercept {rescale[1]:g} not applied, the values are HU already")
        else:
            notes.append(f"rescaled by slope {rescale[0]:g}, intercept {rescale[1]:g}")
            slope, intercept = slope * rescale[0], intercept * rescale[0] + rescale[1]
            sample = sample * rescale[0] + rescale[1]
    values = _without_padding(sample)
    low, high = np.percentile(values, (1, 99))
    if low >= -100 and high > 600:
        notes.append("warning: looks like stored values, not HU (give RescaleSlope and RescaleIntercept)")
    elif not _is_ct(sample):
        notes.append("warning: hardly anything is denser than air, or the zero is shifted")
    return slope, intercept


def _without_padding(sample: np.ndarray) -> np.ndarray:
    """The sample without the constant that scanners put around a round field of view (-2000, -3024, -8192 HU)."""
    low, rest = sample.min(), sample[sample > sample.min()]
    padded = low < -1100 and rest.size > 0.55 * sample.size and np.percentile(rest, 5) - low > 500
    return rest if padded else sample.ravel()


def _is_ct(sample: np.ndarray) -> bool:
    """Could these be the HU of a chest: no great part far below air, and some tissue."""
    low, high = np.percentile(_without_padding(sample), (30, 95))
    return low > -1500 and high > -300


def _is_hu(sample: np.ndarray) -> bool:
    """A chest with values well below 0: stored values begin near 0 (air), padding aside."""
    return _is_ct(sample) and np.percentile(_without_padding(sample), 1) < -100


def _to_int16(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """round(array * slope + intercept) as contiguous int16, clipped to its range; slice by slice to save memory."""
    if array.dtype == np.int16 and (slope, intercept) == (1, 0):
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, np.int16)
    for target, source in zip(result, array, strict=True):
        np.clip(np.rint(source * np.float64(slope) + intercept), -32768, 32767, out=target, casting="unsafe")
    return result


# ---- CT-CLIP: the input of its image tower, and the tables of CT-RATE

CTCLIP_SIZE, CTCLIP_SPACING = (240, 480, 480), (1.5, 0.75, 0.75)  # voxels, mm, along S, L, P: the input of CT-CLIP v2
HUB_FOLDERS = {"reports": "radiology_text_reports", "metadata": "metadata", "labels": "multi_abnormality_labels"}


def ctclip_volume(
    path: Path,
    size: tuple[int, int, int] = CTCLIP_SIZE,
    hu_source: str = "auto",
    rescale: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    max_voxels: int | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """A CT as CT-CLIP v2 sees it: (D, H, W) = `size` float32 HU in [-1000, 1000], toward S, L, P; and reading notes.

    A cached volume of that size stays the int16 memory map that it is.

    The steps of CT-CLIP's data_inference_nii.py in its order: clip to [-1000, 1000], trilinear resize
    (align_corners=False) to int(n * spacing / target) voxels, centre crop or air around it. Its array axes x, y are
    L, P in CT-RATE; here the affine says so. HU are whole numbers on reading (`read_volume`), as they are in CT-RATE.
    A .npy is taken as a volume of `prepare_ct.py ctclip`, in which all this is done.

    size: CTCLIP_SIZE or less by whole factors: means of the blocks of voxels that the factors make.
    hu_source: "auto": `rescale` is applied unless the values are HU already; "csv": it is applied without question;
        "header": only the file's own scaling; "none": the values are HU as stored.
    rescale, spacing, max_voxels: as in `read_volume`. `spacing` is needed if the file has none.

    Raises UserError as `read_volume` does, and for a volume without tissue: CT-RATE v2 holds HU, and with an
    intercept of -8192 (850 volumes of its metadata) it becomes constant air (CT-CLIP issue 50).
    """
    path, cached = Path(path), Path(path).suffix == ".npy"
    if hu_source not in ("auto", "csv", "header", "none"):
        raise UserError(f"--hu-source '{hu_source}' is not known (auto, csv, header or none)")
    if hu_source == "csv" and rescale is None and not cached:
        raise UserError(f"{path}: no RescaleSlope and RescaleIntercept for --hu-source csv (give them by --metadata)")
    volume = read_volume(
        path, value_range={"auto": "auto", "csv": "stored"}.get(hu_source, "hu"), header_scaling=hu_source != "none",
        rescale=rescale if hu_source in ("auto", "csv") else None, spacing=spacing, max_voxels=max_voxels,
    )  # fmt: skip
    grid = volume.array.shape if cached else CTCLIP_SIZE
    if len(size) != 3 or any(n < 1 or whole % n for n, whole in zip(size, grid, strict=True)):
        hint = "another --preset, or prepare_ct.py ctclip --size" if cached else "another --size"
        raise UserError(f"{path}: size {tuple(size)} does not divide {grid} by whole numbers ({hint})")
    if cached:
        if grid == tuple(size):
            return volume.array, volume.notes
        blocks = [k for n, n_grid in zip(size, grid, strict=True) for k in (n, n_grid // n)]
        return volume.array.reshape(blocks).mean((1, 3, 5), dtype=np.float32), volume.notes
    if volume.spacing is None:
        raise UserError(f"{path}: no spacing known (give XYSpacing and ZSpacing by --metadata)")
    _refuse_no_tissue(path, volume, rescale)
    array = np.clip(volume.array, AIR, -AIR) - np.int16(AIR)  # air is 0, so that what lies outside adds nothing
    z, y, x = (
        _resize_taps(array.shape[a], (spacing or volume.spacing)[a], CTCLIP_SPACING[b], grid[b], size[b], not spacing)
        for a, b in ((0, 0), (1, 2), (2, 1))
    )
    result = np.zeros(size, np.float32)
    for target, rows, weights in zip(result, *z, strict=True):
        if weights.any():
            plane = sum(array[i] * w for i, w in zip(rows, weights, strict=True) if w)  # (P, L)
            target[:] = _blend(_blend(plane, *y).T, *x)  # (L, P)
    result.clip(0, -2 * AIR, out=result)  # the weights sum to 1 but for rounding
    result += AIR
    return result, volume.notes


def _resize_taps(n: int, spacing: float, target: float, grid: int, size: int, rounded: bool):
    """Resize, crop or pad, and block mean along one axis -> source rows (size, K) int and weights (size, K) float32.

    Positions are those of F.interpolate(mode="linear", align_corners=False); outside of the scan all weights are 0.
    rounded: the spacing is right to 1e-6 mm only, which must not cost a voxel.
    """
    resized = max(1, int(n * (spacing / target) + (1e-3 if rounded else 0)))
    place = np.arange(grid) + ((resized - grid) // 2 if resized >= grid else -((grid - resized) // 2))
    source = ((place + 0.5) * (n / resized) - 0.5).clip(0, n - 1)
    low = np.floor(source).astype(int)
    weight = np.stack([1 - (source - low), source - low], -1) * ((place >= 0) & (place < resized))[:, None]
    rows = np.stack([low, np.minimum(low + 1, n - 1)], -1)
    return rows.reshape(size, -1), (weight.reshape(size, -1) * (size / grid)).astype(np.float32)


def _blend(plane: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, m) -> (size, m): weighted sums of K rows each; `rows` and `weights` are (size, K)."""
    return sum(plane[i] * w[:, None] for i, w in zip(rows.T, weights.T, strict=True))


def _refuse_no_tissue(path: Path, volume: Volume, rescale) -> None:
    sample = volume.array[:, ::4, ::4]
    if np.mean((sample > -950) & (sample < 950)) < 0.01:
        what = "air" if np.median(sample) < 0 else "bone"
        raise UserError(
            f"{path}: constant {what}: hardly a voxel lies between -950 and 950 HU; RescaleSlope and RescaleIntercept "
            f"of the metadata: {rescale} (CT-RATE v2 holds HU already, v1 needs them: see --hu-source)"
        )


def find_volumes(folder: Path) -> dict[str, Path]:
    """NIfTI and MetaImage files below `folder` by name without extension, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if is_scan(p))
    found = {}
    for path in files:
        other = found.setdefault(volume_name(path.name), path)
        if other != path:
            raise UserError(f"{path}: the same volume name as {other} (names must differ)")
    if not found:
        raise UserError(f"{folder}: no {', '.join(SCAN_SUFFIXES)} in it or below it")
    return found


def ctclip_cases(
    folder: Path, reports=None, metadata=None, labels=None, label_columns=CT_RATE_LABELS, hu_source: str = "auto"
) -> tuple[pd.DataFrame, Path]:
    """The volumes of a folder with their texts and labels, sorted by name; and the CSV that they come from.

    folder: what `prepare_ct.py ctclip` wrote (it holds volumes.csv), or a CT-RATE tree with scans at any depth.
    reports (VolumeName, Findings_EN, Impressions_EN), metadata (VolumeName, RescaleSlope, RescaleIntercept[, XYSpacing,
        ZSpacing]), labels (VolumeName and `label_columns`): CSV files of a tree, also by their names in the folders of
        the hub. None: those found there (`folder`/../radiology_text_reports/*reports*.csv ...), or in `folder` itself
        (reports.csv, metadata.csv, labels.csv). Metadata and labels may be absent.

    -> columns, all text: series_id, patient_id, img_path (absolute), findings, impression ('' if there is none),
    `label_columns` ('0', '1', '' for unknown), and what `volume_options` reads: RescaleSlope, RescaleIntercept,
    spacing_z, spacing_y, spacing_x ('' if there is no metadata).
    Raises UserError if there are no volumes or no reports, a table lacks a column or has nothing on these volumes, a
    name stands twice, or a volume has no slope and intercept with `hu_source` "csv".
    """
    folder, columns = Path(folder), list(label_columns)
    csv = folder if folder.suffix == ".csv" else folder / "volumes.csv"
    if csv.is_file():
        return _cached_cases(csv, columns, [*(reports or ()), *(metadata or ()), *(labels or ())]), csv
    try:
        found = find_volumes(folder)
    except UserError as e:
        raise UserError(f"0 volumes: {csv}: no such file; {e}") from e
    files = {k: _hub_files(folder, g, k) for k, g in zip(HUB_FOLDERS, (reports, metadata, labels), strict=True)}
    if not files["reports"]:
        hub = f"{HUB_FOLDERS['reports']}/*reports*.csv"
        raise UserError(
            f"{folder}: no reports: no {folder / 'reports.csv'}, {folder / hub}, {folder.parent / hub} "
            "(name the CSV with --reports)"
        )
    of_reports = _rows_of(files["reports"], ["Findings_EN", "Impressions_EN"], found)
    of_metadata = _rows_of(files["metadata"], RESCALE_COLUMNS, found)
    of_labels = _rows_of(files["labels"] if columns else [], columns, found, is_labels=True)
    rows = []
    for name, path in found.items():
        report, scan, truth = (of.get(name, {}) for of in (of_reports, of_metadata, of_labels))
        texts = [report.get(c, "").strip() for c in ("Findings_EN", "Impressions_EN")]
        findings, impression = ("" if t == "Not given." else t for t in texts)
        options = metadata_options(of_metadata, name, files["metadata"][0]) if scan else {}
        if hu_source == "csv" and "rescale" not in options:
            raise UserError(f"{path}: --hu-source csv, and no metadata has its RescaleSlope and RescaleIntercept")
        given = [row["patient_id"].strip() for row in (report, scan, truth) if row.get("patient_id", "").strip()]
        numbers = [*options.get("rescale", [""] * 2), *options.get("spacing", [""] * 3)]
        rows.append({
            "series_id": name, "patient_id": (given or [group_of(name)])[0], "img_path": str(path.absolute()),
            "findings": findings, "impression": impression, **{c: truth.get(c, "") for c in columns},
            **dict(zip((*RESCALE_COLUMNS, *SPACING_COLUMNS), map(str, numbers), strict=True)),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("series_id", ignore_index=True), files["reports"][0]


def _cached_cases(csv: Path, columns: list[str], tables: list) -> pd.DataFrame:
    """The table of `prepare_ct.py ctclip`, with absolute paths and the texts as they were before `write_csv`."""
    if tables:
        raise UserError(f"{tables[0]}: not used, {csv} has the texts and labels of its volumes already (leave it away)")
    table = read_table(csv)
    need_columns(table, ["series_id", "img_path", "findings", "impression"], csv)
    twice = table["series_id"][table["series_id"].duplicated()]
    if len(twice):
        raise UserError(f"{csv}: {twice.iloc[0]} has two rows (delete one)")
    table["patient_id"] = patients_of(table, "series_id")
    table["img_path"] = [str((csv.parent / path).absolute()) for path in table["img_path"]]
    for column in ("findings", "impression"):
        table[column] = table[column].str.replace(r"^'(?=[=+\-@\t\r])", "", regex=True)
    if set(columns) & set(table.columns):
        table[columns] = _label_text(table, columns, csv)
    else:
        table[columns] = ""
    return table.sort_values("series_id", ignore_index=True)


def _label_text(table: pd.DataFrame, columns: list[str], path: Path) -> np.ndarray:
    """Label cells in any spelling -> (n, K) '0', '1', or '' for unknown."""
    values = label_array(table, columns, path)
    return np.where(np.isnan(values), "", np.where(values == 1, "1", "0"))


def _hub_files(folder: Path, given, kind: str) -> list[Path]:
    """CSV files of one kind: those given, as paths or by their names in the hub's folders, or those that are there."""
    places = [folder, folder / HUB_FOLDERS[kind], folder.parent / HUB_FOLDERS[kind]]
    if given is None:
        patterns = [f"{kind}.csv", f"*{kind}*.csv", f"*{kind}*.csv"]
        found = (sorted(place.glob(pattern)) for place, pattern in zip(places, patterns, strict=True))
        return next((files for files in found if files), [])
    files = []
    for path in given:
        tried = [Path(path), *(place / path for place in places)]
        files += [p for p in tried if p.is_file()][:1]
        if not any(p.is_file() for p in tried):
            raise UserError(f"--{kind}: no such file as {', '.join(map(str, tried))}")
    return files


def _rows_of(files: list[Path], columns, found: dict[str, Path], is_labels: bool = False) -> dict[str, dict]:
    """Rows of several CSV files by volume; a UserError if a volume has two, or none of `found` has one."""
    rows = {}
    for file in files:
        more = rows_by_name(file, columns)
        if more.keys() & rows.keys():
            raise UserError(f"{file}: {min(more.keys() & rows.keys())} has a row in another file too (delete one)")
        if is_labels:
            for row, values in zip(more.values(), _label_text(pd.DataFrame(more.values()), columns, file), strict=True):
                row |= dict(zip(columns, values, strict=True))
        rows |= more
    if files and not rows.keys() & found.keys():
        raise UserError(f"{files[0]}: has no row for any of {len(found)} volumes, such as {next(iter(found))}")
    return rows


# ==== Run log ==================================================================================================


def lock_folder(folder: Path):
    """Keep other runs out of a folder until the returned file is closed, or the process ends; else UserError."""
    try:
        lock = (folder / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            gc.collect()  # the frames of a run that failed in this process may hold it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{folder}: another run is writing here (choose another --output-dir)") from e
    except OSError as e:
        raise not_written(folder / ".lock", e) from e
    held = weakref.ref(lock)  # by whoever called, not by the line below
    os.register_at_fork(after_in_child=lambda: held() and held().close())  # data workers outlive a kill -9 for seconds
    return lock


class RunLog:
    """Text, JSON lines, TensorBoard and wandb of a run, on rank 0; silent on the others, so calls need no `if`.

    The JSON-lines file gets one record an evaluation and nothing that depends on the clock: after a resume, records
    later than `step` are cut (`begin`), and the file of a killed run ends equal to that of an uninterrupted one.
    """

    def __init__(self, folder: Path, ctx: Context, text_name: str, jsonl_name: str, step: int = 0):
        self.master, self.writers, self.closers, self.step = ctx.master, [], [], step
        self.jsonl, self.folders = folder / jsonl_name, {folder, (folder / text_name).parent}
        self.logger = logging.getLogger(str(folder))
        self.logger.handlers.clear()
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO if ctx.master else logging.CRITICAL)
        if not ctx.master:
            return
        self.lock = lock_folder(folder)
        make_folder((folder / text_name).parent)
        formatter = logging.Formatter("%(asctime)s - %(levelname)s - %(message)s")
        try:
            handlers = [logging.FileHandler(folder / text_name), _TqdmHandler()]
        except OSError as e:
            raise not_written(folder / text_name, e) from e
        for handler in handlers:
            handler.setFormatter(formatter)
            handler.handleError = lambda record: None  # of a full disk, which the next save tells of
            self.logger.addHandler(handler)

    def begin(self, last: Path) -> None:
        """Once a mistake of the user can no longer cost an earlier run: cut its records after `step`, clear what a
        killed one left half written beside its results and its checkpoint `last`, and see that these can be written."""
        if self.master:
            folders = {*self.folders, self.jsonl.parent, last.parent}
            remove_stale(folders)
            for folder in folders:
                try:
                    tempfile.TemporaryFile(dir=folder).close()
                except OSError as e:
                    raise not_written(folder, e) from e
            if self.jsonl.exists():
                lines = self.jsonl.read_text().splitlines(keepends=True)
                write_atomic(self.jsonl, "".join(line for line in lines if _step_of(line) <= self.step))

    def info(self, message: str) -> None:
        self.logger.info(message)

    def warning(self, message: str) -> None:
        self.logger.warning(message)

    def results(self, record: dict) -> None:
        """Append one JSON line; NaN becomes null. `record` holds `step` and plain numbers."""
        if self.master:
            try:
                with self.jsonl.open("a") as file:
                    file.write(json.dumps(json_safe(record)) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as e:
                raise not_written(self.jsonl, e) from e

    def add_tensorboard(self, folder: Path, args, purge_step: int = 0) -> None:
        """Events of the run, and hparams.yaml, its arguments, beside them."""
        if self.master:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "hparams.yaml", yaml.safe_dump(plain_args(args), sort_keys=True))
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            writer = SummaryWriter(str(folder), purge_step=purge_step)
            self.writers.append(lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()])
            self.closers.append(writer.close)

    def add_wandb(self, args, default_project: str) -> None:
        """Log to Weights & Biases if `--wandb-project`, `--wandb-mode` or a WANDB_ variable asks for it.

        Uploaded are numbers and choices of `args` and the scalars, no path, no id, no host or program name. Without a
        key or a network the run is logged offline (`wandb sync` sends it later); training never waits for wandb.
        """
        mode = args.wandb_mode or os.environ.get("WANDB_MODE")
        asked = args.wandb_project or mode or any(os.environ.get(f"WANDB_{k}") for k in ("PROJECT", "API_KEY"))
        if not self.master or not asked or mode == "disabled":
            return
        try:
            import wandb

            if mode != "offline" and not wandb.api.api_key:
                mode = "offline"
                self.warning("wandb: no API key (WANDB_API_KEY), logging offline")
            config = {k: v for k, v in vars(args).items() if isinstance(v, (bool, int, float)) or k in WANDB_CHOICES}
            run = wandb.init(
                project=args.wandb_project or os.environ.get("WANDB_PROJECT") or default_project,
                entity=getattr(args, "wandb_entity", None),
                config=config,
                mode=mode or "online",
                id=hashlib.sha256(str(args.output_dir.resolve()).encode()).hexdigest()[:12],  # a resumed run goes on
                resume="allow",
                dir=str(args.output_dir),
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
                    host="", program="", silent=True, init_timeout=30,
                ),
            )  # fmt: skip
            self.writers.append(lambda step, values: run.log(values, step=step))
            self.closers.append(run.finish)
        except Exception as e:  # whatever wandb raises must not end a training
            self.warning(f"wandb: not logging ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")

    def scalars(self, step: int, values: dict) -> None:
        """Numbers for the plots: {'train/loss': 0.1, ...}; undefined ones are left out."""
        values = {k: float(v) for k, v in values.items() if math.isfinite(v)}
        for write in self.writers:
            write(step, values)

    def close(self) -> None:
        """Finish what is written to, and let another run have the folder."""
        for close in self.closers:
            close()
        for handler in self.logger.handlers:
            handler.close()
        if self.master:
            self.lock.close()


# text that is no path
WANDB_CHOICES = {"arch", "model", "loss", "optimizer", "scheduler", "amp", "monitor", "channels", "aggregate"}


class _TqdmHandler(logging.Handler):
    """Console lines that do not tear the progress bar."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # half a line of a killed run
        return math.inf


def json_safe(value):
    """Nested plain values with NaN and infinities as None, NumPy and torch scalars as numbers, paths as text."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor, np.ndarray)):
        return json_safe(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


class Progress:
    """Time per step (moving average over 100 steps), the share of it spent waiting for data, and the log lines."""

    def __init__(self, max_steps: int, steps_per_epoch: int, device: torch.device, flops_per_step: float = 0.0):
        self.max_steps, self.steps_per_epoch, self.device = max_steps, steps_per_epoch, device
        self.flops, self.start = flops_per_step, time.perf_counter()
        self.last, self.times, self.waits = self.start, collections.deque(maxlen=100), collections.deque(maxlen=100)

    def tick(self, wait: float) -> None:
        """End of a step; `wait`: seconds spent waiting for its data."""
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.waits.append(wait)
        self.last = now

    def skip(self) -> None:
        """What happened since the last tick (evaluation, saving) is no part of a step."""
        self.last = time.perf_counter()

    def lines(self, step: int, loss: float, lr: float) -> list[str]:
        """Two lines: where the run stands, and how well it uses the machine."""
        per_step = sum(self.times) / max(1, len(self.times))
        left, spent = per_step * (self.max_steps - step), time.perf_counter() - self.start
        short = f"{lr:.1e}".replace("e-0", "e-")
        line = (
            f"Step {step}/{self.max_steps} (Epoch {step / self.steps_per_epoch:.1f}) | Loss: {loss:.4f} | LR: {short}"
            f" | Time/Step: {per_step:.2f}s | ETA: {clock(left)} | Elapsed: {clock(spent)}"
        )
        waited = 100 * sum(self.waits) / max(1e-9, sum(self.times))
        usage = f"Data wait: {waited:.0f}% | Peak memory: {peak_memory(self.device):.2f} GiB"
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak and self.flops:
            usage += f" | MFU: {100 * self.flops / per_step / peak:.1f}%"
        return [line, usage]


PEAK_FLOPS = {  # dense bf16 FLOP/s of one card, from the vendors' data sheets
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
}


def peak_memory(device: torch.device) -> float:
    """Highest memory so far in GiB: of the GPU, if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds: float) -> str:
    """5732 -> '1h 35m 32s'."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h {m}m {s}s" if h else f"{m}m {s}s" if m else f"{s}s"


def parse_with_config(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Parse `argv`, with defaults from the YAML or INI files of `--config`: later ones win, the command line over all.

    Keys are flag names, with - or _; sections of an INI file and nested YAML maps only group them. An unknown key, or a
    value the flag would refuse, raises UserError.
    """
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--config", nargs="+")
    paths = probe.parse_known_args(argv)[0].config
    if paths is None:
        return parser.parse_args(argv)
    flags = {o.lstrip("-").replace("-", "_"): action for action in parser._actions for o in action.option_strings}
    words, seen = {}, set()
    for path, key, value in [(file, *leaf) for file in paths for leaf in _read_config(Path(file))]:
        action = flags.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key.replace("-", "_"), flags, 1, 0.5)
            raise UserError(f"{path}: unknown key '{key}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        if (path, action.dest) in seen:
            raise UserError(f"{path}: key '{key}' comes twice")
        if action.dest == "help" or (action.dest == "config" and value is not None):
            raise UserError(f"{path}: key '{key}' belongs on the command line")
        seen.add((path, action.dest))
        words[action.dest] = _as_words(action, value, f"{path}: key '{key}'")
    given = sys.argv[1:] if argv is None else argv

    def refuse(message):
        raise UserError(f"{', '.join(paths)}: {message} (there or on the command line)")

    parser.error = refuse
    return parser.parse_args([*(word for some in words.values() for word in some), *given])


def _read_config(path: Path) -> list[tuple[str, object]]:
    """Leaves of a YAML or INI file in order."""
    need_file(path)
    try:
        if path.stat().st_size > 2**20:
            raise UserError(f"{path}: {path.stat().st_size} bytes (a config has at most 1 MiB)")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".ini":
            # no section is special
            ini = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#",), default_section="")
            ini.read_string(f"[keys before any section]\n{text}")
            return [(k, v) for section in ini.sections() for k, v in ini[section].items()]
        tree = yaml.load(text, _UniqueKeys) or {}
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    except (yaml.YAMLError, configparser.Error, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a readable config ({str(e).splitlines()[0]})") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a map of keys and values was expected")
    found, maps = [], [tree]
    for node in maps:
        for key, value in node.items():
            if isinstance(value, dict):
                maps.append(value)
            else:
                found.append((str(key), value))
            if len(found) + len(maps) > 1000:  # aliases make endless ones of a small file
                raise UserError(f"{path}: more than 1000 keys")
    return found


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, as safe_load; a key that comes twice in a map is an error."""

    def construct_mapping(self, node, deep=False):
        keys = collections.Counter(k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode))
        if keys and keys.most_common(1)[0][1] > 1:
            raise yaml.YAMLError(f"key '{keys.most_common(1)[0][0]}' comes twice")
        return super().construct_mapping(node, deep)


def _as_words(action: argparse.Action, value, where: str) -> list[str]:
    """A config value as the command-line words of its flag; `where` names it in errors."""
    flag, word = action.option_strings[0], "" if isinstance(value, (list, dict)) else str(value).strip().lower()
    many = action.nargs not in (None, 0, "?")
    if isinstance(value, dict) or (
        isinstance(value, list) and (not many or any(isinstance(v, (list, dict)) for v in value))
    ):
        raise UserError(f"{where}: {'a list of plain values' if many else 'one value'} was expected")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        on, off = word in ("true", "yes", "on", "1"), "--no-" + flag.lstrip("-")
        if not on and word not in ("false", "no", "off", "0", "none", ""):
            raise UserError(f"{where}: '{value}' is neither true nor false")
        return [flag] if on else [off] if off in action.option_strings else []
    if value is None or (word == "" and not isinstance(value, list)):
        return []
    if action.nargs == "?" and word in ("true", "yes", "on", "false", "no", "off"):
        return [flag] if word in ("true", "yes", "on") else []
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def note_bad_samples(args, state: dict, micro_batches, dataset, ctx: Context) -> None:
    """With --on-bad-sample skip: list unreadable training samples in bad_samples.csv; too many end the run."""
    found = [int(i) for b in micro_batches for i in b["index"][b["bad"] > 0]]
    everyone = [found] * ctx.world
    if ctx.world > 1:
        dist.all_gather_object(everyone, found, group=ctx.cpu_group)
    new = {i for part in everyone for i in part} - set(state["bad_samples"])
    if not new:
        return
    state["bad_samples"] = sorted(new.union(state["bad_samples"]))
    if ctx.master:
        rows = [(dataset.ids[i], str(dataset.paths[i])) for i in state["bad_samples"]]
        write_csv(args.output_dir / "bad_samples.csv", pd.DataFrame(rows, columns=["id", "path"]))
    if len(state["bad_samples"]) > args.max_bad_fraction * len(dataset):
        raise UserError(
            f"{len(state['bad_samples'])} of {len(dataset)} training samples are unreadable, see bad_samples.csv "
            "(--max-bad-fraction)"
        )


def data_loader(dataset, batches, args, ctx: Context) -> DataLoader:
    """A loader whose workers outlive the job's signals, and which gives up on one that keeps silent."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.num_workers,
        worker_init_fn=outlive_signals,
        timeout=60 * args.timeout_minutes if args.num_workers else 0,
        collate_fn=getattr(dataset, "collate", None),
        pin_memory=ctx.device.type == "cuda" and getattr(args, "pin_memory", True),
    )


def check_positive(args) -> None:
    """Raise UserError for a flag whose zero would be a division by it, an endless run, or no training at all."""
    names = ["epochs", "batch_size", "accum_steps", "top_k", "save_every", "log_interval"]
    for name in [*names, "early_stopping_patience", "max_bad_steps"]:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("num_workers", "eval_batch_size", "eval_every", "warmup", "max_steps", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    for name in {"dropout_rate", "text_dropout", "drop_path"} & vars(args).keys():
        if not 0 <= (getattr(args, name) or 0) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0 and below 1")
    for name in ("lr", "weight_decay", "min_lr_ratio"):
        if not getattr(args, name) >= 0:  # nor NaN
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if getattr(args, "max_pos_weight", 1) < 1:
        raise UserError("--max-pos-weight must be at least 1 (1: no weights)")
    if args.max_grad_norm <= 0:
        raise UserError("--max-grad-norm must be positive (inf: no clipping)")


def plain_args(args: argparse.Namespace) -> dict:
    """`args` as plain values for a checkpoint; paths become text."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {k: plain(v) for k, v in vars(args).items()}


def known_trouble(e: Exception) -> str | None:
    """One line for what a traceback explains badly, and what to do: memory that ran out, a data worker or a rank that
    died or is silent. None for anything else."""
    text, frames = str(e).strip(), [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    found = [frame.f_locals.get("args") for frame in frames]
    args = next((vars(a) for a in found if isinstance(a, argparse.Namespace)), {})  # names what the script can change
    first = text.partition("\n")[0][:300] or type(e).__name__
    worker, full = "DataLoader worker" in first, re.search("out of memory|can't allocate memory", first)
    if worker and "MemoryError in" in first:
        return f"{first} {text.splitlines()[-1]} (lower --num-workers)"
    if worker:
        return (f"{first} If nobody killed it, memory ran out, or the shared memory that workers hand batches over in "
                "(lower --num-workers; 0: no workers)")  # fmt: skip
    if "DataLoader timed out" in first:
        return f"{first}: a data worker hangs, at a slow disk perhaps (--timeout-minutes, or --num-workers 0)"
    if full or isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        size, what = args.get("batch_size") or 1, "GPU memory" if "CUDA" in text else "memory"
        ways = [f"--batch-size {size // 2}"] if size > 1 else []
        if ways and "accum_steps" in args:
            ways = [f"--batch-size {size // 2} --accum-steps {2 * args['accum_steps']}, the same effective batch"]
        if "eval_batch_size" in args and any(frame.f_code.co_name == "evaluate" for frame in frames):
            ways = [f"--eval-batch-size {max(1, (args['eval_batch_size'] or size) // 2)}"]
        elif not args.get("grad_checkpointing", True):
            ways.append("--grad-checkpointing")
        ways += ["a lower --num-workers"] if args.get("num_workers") and what == "memory" else []
        return f"out of {what}: {first} ({'; or '.join(ways) or 'a machine with more of it'})"
    if isinstance(e, dist.DistError) or "gloo" in text or "NCCL" in text:
        return (f"rank {os.environ.get('RANK', 0)}: another rank ended, see its own message, or was silent for "
                f"--timeout-minutes: {first} (--resume auto continues)")  # fmt: skip
    return None


def run_main(main) -> int:
    """Run `main()` and return its exit code: 0 done, 1 internal error, 2 user's mistake (one line on stderr), 3 and 143
    as it returns."""
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more workers than cores: said at every evaluation
    try:
        if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
            raise UserError(f"torch {torch.__version__}: crafted weights can run code in it (2.10 or newer is needed)")
        return main() or 0
    except (Exception, KeyboardInterrupt) as e:
        line, code = (str(e), 2) if isinstance(e, UserError) else (known_trouble(e), 1)
        in_group = dist.is_available() and dist.is_initialized()
        if line is None and not in_group:
            raise
        print(f"error: {line}" if line else traceback.format_exc(), file=sys.stderr)
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
        for child in multiprocessing.active_children():  # data workers that the failed run's frames still hold
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, before)
        if in_group:  # at once: to free DDP while a reduction is under way can wait for ever, and so can its group
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
