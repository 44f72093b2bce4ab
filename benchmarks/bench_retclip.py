"""RET-CLIP: transformers' encoders and the original's data path beside train_retclip.py, in turns.

    python benchmarks/bench_retclip.py [--parts step data] [--sizes small|full] [--texts prompts reports] [--rounds 7]

Both must compute the same before times count. Printed are medians of CPU seconds, and of the ratios of one round after
the other, above 1 where ours is faster; on one thread, as several spend some of them waiting for each other. Parts:

step  Forward, loss of three levels, backward and AdamW (fused on both sides), with dropout as in training. The peer is
      RET-CLIP out of transformers' CLIPVisionModelWithProjection and BertModel, the same weights, one call of the image
      encoder for each eye, texts padded to the context length. Ours: one call for both eyes, from uint8, texts padded
      to the batch's longest. Each runs with both paddings, so that what padding gains stands alone. --texts: prompts,
      as long as those of retclip_prompts_full.csv (median 103 tokens; from the shares that contexts of 52, 77, 100 and
      150 cut), context 150; reports, as long as those of demo_data.py (median 27), context 100. --sizes full: ViT-B-16
      and RoBERTa-base, 224 pixels, 4 pairs. Required at the same padding: peer / ours >= 0.95.
data  From an LMDB of prepare_retclip.py (JPEG drawings of demo_data.py) to a normalised float batch of 12 pairs. The
      peer is our own writing of what the original does for a pair, with the operations of timm and torchvision as they
      describe them, but without mirroring, which ours leaves out; both have the same tokenizer. What ours leaves to the
      model's device is included. Required when augmenting: peer / ours >= 1.
"""

import argparse
import base64
import contextlib
import io
import itertools
import math
import os
import pickle
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import demo_data
import prepare_retclip
import train_retclip as retclip

CPU = common.Context(0, 1, torch.device("cpu"))


def race(works: dict, rounds: int, after=lambda name, value: None) -> dict[str, np.ndarray]:
    """{name: call}, in turns, each once before -> {name: (rounds, 2) CPU and wall seconds}; `after` is not timed."""
    spent = {name: [] for name in works}
    for i in range(rounds + 1):
        for name in list(works)[:: 1 if i % 2 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            value = works[name]()
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            after(name, value)
    return {name: np.array(s[1:]) for name, s in spent.items()}


def show(what: str, name: str, slow, ours) -> float:
    """Print two results of `race`; -> the ratio of CPU seconds."""
    (cpu, wall), (a, _), (b, _) = (np.median(x, 0) for x in (slow / ours, slow, ours))
    print(f"    {what:36} {name:10} {a:6.3f}  ours {b:6.3f} CPU-s: {cpu:5.2f} x  (wall {wall:5.2f} x)", flush=True)
    return cpu


# ==== The step =================================================================================================

LENGTHS = {  # context; share of the texts that have at most so many tokens
    "prompts": (150, [0, 0.003, 0.132, 0.46, 0.5, 0.9, 1], [40, 52, 77, 100, 103, 150, 200]),
    "reports": (100, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], [7, 8, 17, 27, 31, 34, 43]),
}
SIZES = {  # pairs, retclip.VIT, retclip.BERT and words
    "full": (4, retclip.VISION["ViT-B-16"], (*retclip.TEXT["RoBERTa-wwm-ext-base-chinese"], 21128)),
    "small": (8, (128, 112, 4, 256, 16, 64, 4.5), (256, 4, 4, 1024, 512, 0.1, 2000)),
    "tiny": (3, (16, 32, 2, 32, 16, 16, 4.5), (32, 2, 2, 64, 512, 0.1, 100)),
}


class Peer(retclip.RETCLIP):
    """RET-CLIP with transformers' encoders and the heads of ours; key names that retclip_weights() reads."""

    def __init__(self, config: dict):
        from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__(config)
        self.visual = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=config["width"], intermediate_size=4 * config["width"], num_hidden_layers=config["layers"],
            num_attention_heads=config["width"] // config["head_width"], image_size=config["image_size"],
            patch_size=config["patch"], projection_dim=config["embed"], attn_implementation="sdpa",
        ))  # fmt: skip
        bert = config["bert"]
        self.bert = BertModel(BertConfig(
            vocab_size=bert["vocab"], hidden_size=bert["hidden"], num_hidden_layers=bert["layers"],
            num_attention_heads=bert["heads"], intermediate_size=bert["ffn"], max_position_embeddings=bert["positions"],
            hidden_dropout_prob=bert["dropout"], attention_probs_dropout_prob=bert["dropout"],
            attn_implementation="sdpa",
        ), add_pooling_layer=False)  # fmt: skip

    def forward(self, left, right, input_ids):
        """left, right (B, 3, R, R) normalised, input_ids (B, L) -> the sum of the three losses."""
        left, right = (self.visual(pixel_values=x).image_embeds for x in (left, right))
        cls = self.bert(input_ids, attention_mask=(input_ids != 0).long()).last_hidden_state[:, 0]
        both = self.global_feature_mapping(torch.cat([left, right], 1))
        eyes, loss = (both, self.left_feature_mapping(left), self.right_feature_mapping(right)), 0.0
        match = torch.arange(len(cls))
        for image, end in zip(eyes, ("", "_left", "_right"), strict=True):
            text = getattr(self, f"text_projection{end}")(cls)
            image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
            scores = getattr(self, f"logit_scale{end}").exp() * image @ text.T
            loss = loss + (F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)) / 2
        return loss


class Steps:
    """Both models, their optimizers, and one batch in the form that each of them takes."""

    def __init__(self, size: str):
        self.n, vit, bert = SIZES[size]
        config = dict(zip(retclip.VIT, vit, strict=True))
        config["bert"] = dict(zip((*retclip.BERT, "vocab"), bert, strict=True))
        flags = "--train-data none --val-data none --vocab none --no-monocular --lr 1e-6 --batch-size"
        args = retclip.parse_args([*flags.split(), str(self.n)])
        args.model_config = config
        torch.manual_seed(0)
        self.models = {"peer": Peer(config), "ours": retclip.RETCLIP(config)}
        self.models["ours"].max_logit_scale, self.criterion = 100.0, retclip.build_criterion(args, None)
        self.optimizers = {name: retclip.build_optimizer(model, args) for name, model in self.models.items()}
        side, colour = config["image_size"], torch.from_numpy(retclip.plain_colour())
        images = torch.randint(0, 256, (self.n, 2, 3, side, side), dtype=torch.uint8)
        self.batch = {"images": images, "colour": colour.repeat(self.n, 2, 1, 1), "text_id": torch.arange(self.n)}
        self.batch["present"] = torch.ones(self.n, 2, dtype=torch.bool)
        self.eyes = (images.float() * colour.diag()[:, None, None] + colour[:, 3:, None]).unbind(1)
        self.words = torch.randint(1, bert[-1], (self.n, 200))

    def step(self, name: str, texts: dict, amp: str, update: bool = True) -> float:
        """Forward, backward and AdamW -> the loss."""
        autocast, scaler = retclip.autocast_of(SimpleNamespace(amp=amp), CPU.device)
        model, batch = self.models[name], self.batch | texts
        if name == "ours":
            loss = retclip.forward_backward(model, [batch], self.criterion, scaler, autocast, CPU)["loss"]
        else:
            with autocast:
                loss = model(*self.eyes, texts["input_ids"])
            loss.backward()
        if update:
            self.optimizers[name].step()
            model.zero_grad()
        return loss.item()

    def compare(self, forms: dict) -> None:
        """forms: {(name, padding): texts}. Same weights: loss and gradient norms in fp32 without dropout."""
        losses, norms = [], []
        self.models["ours"].load_state_dict(retclip.retclip_weights(self.models["peer"].state_dict(), "the peer"))
        for (name, _), texts in forms.items():
            model = self.models[name].eval()
            losses.append(self.step(name, texts, "none", update=False))
            grads = retclip.retclip_weights({k: p.grad for k, p in model.named_parameters()}, "the peer")
            norms.append(torch.stack([grads[k].norm() for k in sorted(grads)]))
            model.train().zero_grad()
        norms, loss = torch.stack(norms), max(losses) - min(losses)  # (forms, tensors)
        worst = ((norms - norms[0]).abs() / norms[0].clamp(min=1e-3 * norms[0].norm())).max().item()
        print(f"    differences without dropout: loss {loss:.1e} of {losses[0]:.4f}, gradient norms {worst:.1e}")
        assert loss < 1e-4 and worst < 1e-3, (losses, worst)


def part_step(args) -> bool:
    steps, ratios = Steps(args.sizes), []
    print(f"step: {args.sizes}, {steps.n} pairs, {args.threads} threads")
    for kind in args.texts:
        context, shares, tokens = LENGTHS[kind]
        lengths, many = (np.interp((np.arange(n) + 0.5) / n, shares, tokens).round().astype(int) for n in (steps.n, 64))
        forms, lengths = {}, torch.from_numpy(lengths.clip(max=context))
        width = {"context": context, "batch": lengths.max().item()}
        print(f"  {kind} of {lengths.tolist()} tokens: padded to the context, {context}, or to the batch, "
              f"{width['batch']} (of 64 texts: {min(context, many.max())})")  # fmt: skip
        for name, pad in itertools.product(steps.models, width):
            mask = (torch.arange(width[pad]) < lengths[:, None]).long()  # (B, L)
            forms[name, pad] = {"input_ids": steps.words[:, : width[pad]] * mask, "attention_mask": mask}
        steps.compare(forms)
        for dtype, amp in (("fp32", "none"), ("bf16", "bf16")):
            spent = race({k: partial(steps.step, k[0], texts, amp) for k, texts in forms.items()}, args.rounds)
            ours, peer = ({pad: spent[name, pad] for pad in width} for name in ("ours", "peer"))
            for pad in width:
                ratios.append(show(f"{dtype}, both padded to the {pad}", "peer", peer[pad], ours[pad]))
            show(f"{dtype}, gain of padding to the batch", "to context", ours["context"], ours["batch"])
            show(f"{dtype}, both gains together", "peer", peer["context"], ours["batch"])
    return min(ratios) >= 0.95


# ==== The data =================================================================================================


class Literal:
    """The original's data set: a pickled pair and two pickled base64 texts, each image through timm's transforms."""

    def __init__(self, source: Path, dataset):
        self.tokenizer, self.args, self.size = dataset.tokenizer, dataset.args, (dataset.size, dataset.size)
        envs = [retclip.open_lmdb(source / name) for name in ("pairs", "imgs")]  # LMDB opens a file once a process
        self.pairs, self.images = (env.begin(buffers=True) for env in envs)
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (retclip.MEAN, retclip.STD))

    def __getitem__(self, index):
        patient, _, text = pickle.loads(self.pairs.get(str(index).encode()).tobytes())
        found = pickle.loads(self.images.get(str(patient).encode()).tobytes())
        left, right = (self.transform(Image.open(io.BytesIO(base64.urlsafe_b64decode(x)))) for x in found)
        tokens = self.tokenizer.encode(text.lower().replace("“", '"').replace("”", '"')).ids
        return left, right, F.pad(torch.tensor(tokens), (0, self.args.max_text_length - len(tokens)))

    def transform(self, image):
        """RandomResizedCrop of 90 to 100 %, ColorJitter 0.2, ToTensor, Normalize, RandomErasing once in ten times."""
        if self.args.augment:
            left, top, w, h = rectangle(*image.size, (0.9, 1), 3 / 4)
            image = image.crop((left, top, left + w, top + h))
        image = image.resize(self.size, Image.Resampling.BICUBIC).convert("RGB")
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for i in torch.randperm(3) if self.args.augment else ():
            image = enhancers[i](image).enhance(random.uniform(0.8, 1.2))
        x = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        x = x.to(torch.float32).div(255).clone().sub_(self.mean).div_(self.std)
        if self.args.augment and random.random() < 0.1:
            left, top, w, h = rectangle(*self.size, (0.02, 1 / 3), 0.3)
            x[:, top : top + h, left : left + w] = 0
        return x


def rectangle(width: int, height: int, share: tuple, ratio: float):
    """A random part of an area, its sides within `ratio` -> left, top, w, h; the middle if ten draws do not fit."""
    for _ in range(10):
        area, aspect = random.uniform(*share) * width * height, math.exp(math.log(ratio) * random.uniform(-1, 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height / ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def part_data(args) -> bool:
    ratios = []
    for side in args.sides:
        print(f"data: 12 pairs of {side} x {side} pixels to 224 x 224")
        with tempfile.TemporaryDirectory() as f:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                demo_data.main(f"fundus --out {f} --n 12 --size {side} --num-workers 1".split())
                prepare_retclip.main(f"--csv {f}/pairs.csv --out {f}/data --lmdb {f}/lmdb".split())
            for flag in ("--no-augment", "--augment"):
                words = f"--train-data {f}/lmdb/train --val-data {f}/lmdb/train --vocab {f}/vocab.txt {flag}".split()
                ratios.append(data_row(retclip.parse_args(words), 2 * args.rounds))
    return min(ratios[1::2]) >= 1  # of the augmented


def data_row(args, rounds: int) -> float:
    """Batches of both in turns; as is they must be equal, augmented alike in mean and spread of the colours."""
    dataset, epochs = retclip.FundusPairs(args.train_data, args, True), itertools.count()
    literal, n, as_is = Literal(args.train_data, dataset), len(dataset), SimpleNamespace(visual=lambda x: x)
    last, moments = {}, {"ours": [], "peer": []}
    random.seed(0), torch.manual_seed(0)

    def ours():
        epoch = next(epochs)
        batch = dataset.collate([dataset[epoch, i] for i in range(n)])
        return *retclip.RETCLIP.encode_eyes(as_is, batch["images"], batch["colour"]).unbind(1), batch["input_ids"]

    def compare(name, batch):
        *eyes, ids = batch
        last[name] = torch.stack(eyes, 1), F.pad(ids, (0, args.max_text_length - ids.shape[1]))
        moments[name].append(torch.cat(torch.std_mean(last[name][0], (0, 1, 3, 4))))

    spent = race({"peer": lambda: default_collate([literal[i] for i in range(n)]), "ours": ours}, rounds, compare)
    (x, ids), (peer_x, peer_ids) = last["ours"], last["peer"]
    far = (sum(moments["ours"]) - sum(moments["peer"])).abs().max().item() / (rounds + 1) / peer_x.std().item()
    near = 0.02 + 1.3 / math.sqrt(2 * n * (rounds + 1))  # ours does not clip what the jitter makes too bright; chance
    assert torch.equal(ids, peer_ids) and (far < near if args.augment else (x - peer_x).abs().max() < 1e-5), (far, near)
    print("    images per CPU-second:", *(f"{k} {2 * n / np.median(s, 0)[0]:.0f}" for k, s in spent.items()), sep="  ")
    return show(f"augmented (differ by {far:.1%})" if args.augment else "as is", "peer", spent["peer"], spent["ours"])


def main() -> int:
    parts = {"step": part_step, "data": part_data}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each form; of a data set twice as many")
    parser.add_argument("--threads", type=int, default=1, help="of torch: more are for an idle machine")
    parser.add_argument("--sizes", choices=SIZES, default="small", help="of the models in the step")
    parser.add_argument("--texts", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="how long the texts are")
    parser.add_argument("--sides", nargs="+", type=int, default=[224, 512, 1536], help="pixels of the photographs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    missed = [name for name in args.parts if not parts[name](args)]
    print(f"requirement missed: {', '.join(missed)}" if missed else "requirements met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
