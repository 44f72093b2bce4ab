"""CT-CLIP: a literal form of the original beside train_ctclip.py, same weights, in turns.

    python benchmarks/bench_ctclip.py [--parts step zero-shot memory flops cuda] [--rounds 4] [--report-tokens 256]

The literal form is our own writing of what the published code (ibrahimethemhamamci/CT-CLIP) computes, step by step and
as wasteful; tests/test_ctclip_literal.py holds it to that code's numbers. Outputs are compared before anything is
timed, and no dropout is used: with it the two could not be compared. What counts is the best CPU seconds on one thread:
several spend some of them waiting for each other, most of them on a busy machine. Parts:

step       Forward and backward at 1,024 tokens and full width (image 320, 40 frames, codebook 8,192): the image alone,
           then with the report (literal padded to 512 tokens, ours --report-tokens long). The loss is over 8 pairs, all
           but the batch being fixed, so that one pair has a gradient too.
           Required for the image alone at batch 1: literal / ours >= 1.6 (a larger batch shares the literal bias).
zero-shot  18 labels x 2 prompts on volumes of that size: literal encodes the volume again for every label and pads each
           prompt to 512 tokens; ours encodes a volume once, and the prompts once for all volumes.
           Required for one volume that pays for all prompts: >= 15.
memory     What autograd keeps of encode_image at image 480 with 1 and 2 frames of tokens: the difference is the cost of
           a frame, the rest is fixed. Required for the fixed part of ours: < 0.1 GiB.
flops      Of one 480 x 480 x 240 volume, counted by torch on the meta device (2 per multiply-add).
cuda       Ours at 480 x 480 x 240 with bf16: time of a step, peak memory and MFU for batch 1, 2, 4, ... to the largest
           that fits, with and without checkpointing, then by gradient cache.
"""

import argparse
import os
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import train_ctclip as ctclip

# ==== The literal form of the original =========================================================================
# Same key names as the published file; every step as its description says, none of it made lean.


class LayerNorm(nn.Module):
    """Layer norm with a learned scale and a fixed shift of 0 (a buffer)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PositionBias(nn.Module):
    """An MLP on the signed log distance of every pair of positions: (heads, h * w, h * w), new on every forward."""

    def __init__(self, dim, heads):
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(n, dim), nn.LeakyReLU(0.1)) for n in (2, dim)]
        self.net = nn.ModuleList([*hidden, nn.Linear(dim, heads)])

    def forward(self, h, w):
        device = self.net[2].weight.device
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        position = torch.stack([rows.flatten(), columns.flatten()], -1)  # (h w, 2)
        x = (position[:, None] - position[None]).float()  # (h w, h w, 2)
        x = torch.sign(x) * torch.log(x.abs() + 1)
        for layer in self.net:
            x = layer(x)
        return x.permute(2, 0, 1)  # (heads, h w, h w)


class PEG(nn.Module):
    """Depthwise 3 x 3 x 3 convolution, causal in time, on tokens reshaped (not permuted) to (B, T, h, w, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x, video_shape):
        y = x.reshape(*video_shape, -1).permute(0, 4, 1, 2, 3)  # (B, dim, T, h, w)
        y = self.dsconv(F.pad(y, (1, 1, 1, 1, 2, 0)))
        return y.permute(0, 2, 3, 4, 1).reshape(x.shape)


class Attention(nn.Module):
    """Cosine attention, all logits in memory; only the queries see the norm."""

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.null_kv = nn.Parameter(torch.zeros(heads, 0, dim_head))
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim_head)), nn.Parameter(torch.ones(dim_head))
        self.norm, self.context_norm = LayerNorm(dim), LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, bias=None):
        k, v = self.to_kv(x).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(self.norm(x)), k, v))
        null_k, null_v = self.null_kv.expand(len(x), -1, -1, -1).unflatten(2, (0, 2)).unbind(-2)  # no rows, yet joined
        k, v = torch.cat([null_k, k], 2), torch.cat([null_v, v], 2)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * 8
        if bias is not None:
            logits = logits + F.pad(bias, (self.null_kv.shape[1] // 2, 0))
        out = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return F.gelu(gate) * value


def feed_forward(dim):
    inner = int(4 * 2 / 3 * dim)
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, inner * 2, bias=False), GEGLU(), nn.Dropout(0.0),
        nn.Linear(inner, dim, bias=False),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head):
        super().__init__()
        parts = ([PEG(dim), Attention(dim, heads, dim_head), nn.Identity(), feed_forward(dim)] for _ in range(depth))
        self.layers = nn.ModuleList(nn.ModuleList(p) for p in parts)
        self.norm_out = LayerNorm(dim)

    def forward(self, x, video_shape, bias=None):
        for peg, attention, _, ff in self.layers:
            x = peg(x, video_shape) + x
            x = attention(x, bias) + x
            x = ff(x) + x
        return self.norm_out(x)


class Codebook(nn.Module):
    """Cosine codebook of vector-quantize-pytorch 1.1.2: all distances, one-hot int64 -> float, EMA in the forward."""

    def __init__(self, dim, size, decay=0.8):
        super().__init__()
        self.decay = decay
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(1, size))
        self.register_buffer("embed", F.normalize(torch.randn(1, size, dim), dim=-1))

    def forward(self, x):  # (B, N, dim)
        f = F.normalize(x.float().reshape(1, -1, x.shape[-1]), dim=-1)
        e = F.normalize(self.embed, dim=-1)
        index = torch.einsum("hnd,hcd->hnc", f, e).argmax(-1)  # (1, B N)
        onehot = F.one_hot(index, e.shape[1]).type(f.dtype)
        quantised = self.embed[0][index[0]].view(x.shape)
        if self.training:
            bins = onehot.sum(1)
            self.cluster_size.data.lerp_(bins, 1 - self.decay)
            empty = bins == 0
            total = torch.einsum("hnd,hnc->hcd", f, onehot)
            new = F.normalize(total / bins.masked_fill(empty, 1.0)[..., None], dim=-1)
            self.embed.data.lerp_(torch.where(empty[..., None], e, new), 1 - self.decay)
        return quantised, index.view(x.shape[:-1])


class VectorQuantize(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self._codebook = Codebook(dim, size)

    def forward(self, x):
        quantised, index = self._codebook(x)
        if self.training:
            quantised = x + (quantised - x).detach()
            F.mse_loss(quantised.detach(), x)  # the commitment loss: computed, then thrown away by CT-CLIP
        return quantised, index


class CTViT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch, self.temporal_patch, dim = c["patch"], c["temporal_patch"], c["dim"]
        self.spatial_rel_pos_bias = PositionBias(dim, c["heads"])

        def embed(n):
            return nn.Sequential(nn.Identity(), nn.LayerNorm(n), nn.Linear(n, dim), nn.LayerNorm(dim))

        flat, voxels = self.patch**2, self.patch**2 * self.temporal_patch
        self.to_patch_emb_first_frame, self.to_patch_emb = embed(flat), embed(voxels)
        self.enc_spatial_transformer = Transformer(dim, c["spatial_depth"], c["heads"], c["dim_head"])
        self.enc_temporal_transformer = Transformer(dim, c["temporal_depth"], c["heads"], c["dim_head"])
        self.vq = VectorQuantize(dim, c["codebook"])
        self.to_pixels_first_frame, self.to_pixels = (nn.Sequential(nn.Linear(dim, n)) for n in (flat, voxels))

    def forward(self, image, trace=None):
        """image: (B, 1, D, H, W) -> quantised tokens (B, T, h, w, dim); trace: a dict that takes the steps between."""
        (b, _, d, height, width), p, pt = image.shape, self.patch, self.temporal_patch
        t, h, w = shape = d // pt, height // p, width // p
        x = image.reshape(b, 1, t, pt, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, *shape, -1)
        patches = self.to_patch_emb(x)
        bias = self.spatial_rel_pos_bias(h, w)
        spatial = self.enc_spatial_transformer(patches.reshape(b * t, h * w, -1), (b, *shape), bias)
        x = spatial.reshape(b, t, h * w, -1).transpose(1, 2).reshape(b * h * w, t, -1)
        temporal = self.enc_temporal_transformer(x, (b, *shape))
        x = temporal.reshape(b, h * w, t, -1).transpose(1, 2).reshape(b, t * h * w, -1)
        out, index = self.vq(x)
        if trace is not None:
            trace |= {"patch_tokens": patches, "spatial_bias": bias, "spatial_out": spatial, "temporal_out": temporal}
            trace |= {"vq_in": x, "vq_idx": index, "vq_out": out}
        return out.reshape(b, *shape, -1)


class Bert(nn.Module):
    """BERT as Hugging Face's eager form computes it: post-norm, all attention logits in memory, pooler run for nothing.

    Without dropout (the text encoder of CT-CLIP has 0.25): two forms can only be compared without it.
    """

    def __init__(self, c):
        super().__init__()
        hidden, self.heads = c["hidden"], c["heads"]

        def norm():
            return nn.LayerNorm(hidden, eps=1e-12)

        def layer():
            qkv = nn.ModuleDict({k: nn.Linear(hidden, hidden) for k in ("query", "key", "value")})
            done = nn.ModuleDict({"dense": nn.Linear(hidden, hidden), "LayerNorm": norm()})
            return nn.ModuleDict({
                "attention": nn.ModuleDict({"self": qkv, "output": done}),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(hidden, c["ffn"])}),
                "output": nn.ModuleDict({"dense": nn.Linear(c["ffn"], hidden), "LayerNorm": norm()}),
            })  # fmt: skip

        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(c["vocab"], hidden, padding_idx=0),
            "position_embeddings": nn.Embedding(c["positions"], hidden),
            "token_type_embeddings": nn.Embedding(2, hidden),
            "LayerNorm": norm(),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer() for _ in range(c["layers"]))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})

    def forward(self, input_ids, attention_mask):
        e, places = self.embeddings, torch.arange(input_ids.shape[1], device=input_ids.device)
        x = e["word_embeddings"](input_ids) + e["token_type_embeddings"](torch.zeros_like(input_ids))
        x = e["LayerNorm"](x + e["position_embeddings"](places))
        mask = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min  # (B, 1, 1, L)
        for layer in self.encoder["layer"]:
            own, done = layer["attention"]["self"], layer["attention"]["output"]
            q, k, v = (own[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
            x = done["LayerNorm"](done["dense"]((attention @ v).transpose(1, 2).flatten(2)) + x)
            out = layer["output"]
            x = out["LayerNorm"](out["dense"](F.gelu(layer["intermediate"]["dense"](x))) + x)
        torch.tanh(self.pooler["dense"](x[:, 0]))
        return x


class LiteralCTCLIP(nn.Module):
    """The original's CTCLIP, loss and scores included; c: a preset of train_ctclip.py."""

    def __init__(self, c):
        super().__init__()
        image_dim = c["size"][1] // c["patch"] * (c["size"][2] // c["patch"]) * c["dim"]
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.text_transformer, self.visual_transformer = Bert(c["bert"]), CTViT(c)
        for name, n in (("text", c["bert"]["hidden"]), ("visual", image_dim)):
            for extra in ("", "_extra"):
                setattr(self, f"to_{name}_latent{extra}", nn.Linear(n, c["latent"], bias=False))

    def encode_text(self, input_ids, attention_mask):
        cls = self.text_transformer(input_ids, attention_mask)[:, 0]
        return F.normalize(self.to_text_latent(cls), dim=-1)

    def encode_image(self, image):
        tokens = self.visual_transformer(image)  # (B, T, h, w, dim)
        return F.normalize(self.to_visual_latent(tokens.mean(1).flatten(1)), dim=-1)

    def forward(self, input_ids, attention_mask, image, return_loss=False):
        text, image = self.encode_text(input_ids, attention_mask), self.encode_image(image)
        if not return_loss:
            return torch.einsum("bd,bd->b", text, image.expand_as(text)) * self.temperature.exp()
        return literal_loss(text, image, self.temperature)


def literal_loss(text, image, temperature):
    """exp and log of the scores as they stand, no maximum taken off."""
    scores = torch.exp(text @ image.T * temperature.exp())
    losses = [-torch.log(s.diagonal() + 1e-20) + torch.log(s.sum(-1) + 1e-20) for s in (scores, scores.T)]
    return sum(x.mean() for x in losses) / 2


# ==== Ours beside it ==========================================================================================

CPU = common.Context(0, 1, torch.device("cpu"))


def config_of(size, **changes) -> dict:
    """The preset of the published weights at another size of the volume, without dropout."""
    base = ctclip.PRESETS["ctclip-v2"]
    return base | {"size": size, "bert": base["bert"] | {"dropout": 0.0}} | changes


def build_pair(config) -> dict[str, nn.Module]:
    """Both models with the same weights; the scales of the cosine attention around 2, so that it is not flat."""
    torch.manual_seed(0)
    literal, ours = LiteralCTCLIP(config), ctclip.CTCLIP(config)
    with torch.no_grad():
        for key, x in literal.named_parameters():
            if key.endswith("_scale"):
                x.uniform_(1.5, 2.5)
    ours.load_state_dict(literal.state_dict())
    return {"literal": literal, "ours": ours}


def token_rows(lengths, width):
    """Random rows of so many tokens, padded to `width` -> input_ids, attention_mask (rows, width)."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 30000, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    ids[:, 0] = 2
    return ids, mask


def race(works: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: call}, in turns -> {name: (CPU seconds, wall seconds)}, the best of `rounds`."""
    best = {name: (float("inf"), float("inf")) for name in works}
    for i in range(rounds):
        for name in list(works)[:: 1 if i % 2 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            works[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = min(best[name][0], cpu), min(best[name][1], wall)
    return best


def show(what: str, literal, ours) -> float:
    """Print two results of `race`; -> the ratio of CPU seconds."""
    ratios = [a / b for a, b in zip(literal, ours, strict=True)]
    print(
        f"  {what:38} literal {literal[0]:6.2f}  ours {ours[0]:5.2f} CPU-s: {ratios[0]:5.2f} x  "
        f"(wall {literal[1]:6.2f}, {ours[1]:5.2f} s: {ratios[1]:5.2f} x)",
        flush=True,
    )
    return ratios[0]


def one_step(name, model, image, text, others) -> float:
    """Forward and backward of the loss over the batch and `others`, fixed features (n, 2, latent) of further pairs.

    Ours moves its codebook at the end, as its loop does; the literal form did so in the forward.
    """
    model.zero_grad(set_to_none=True)
    image = torch.cat([model.encode_image(image), others[:, 0]])
    text = torch.cat([model.encode_text(*text) if text else others[: len(image) - len(others), 1], others[:, 1]])
    if name == "literal":
        loss = literal_loss(text, image, model.temperature)
    else:
        loss = common.clip_loss(image, text, model.temperature.exp())
    loss.backward()
    if name == "ours":
        model.end_step(CPU)
    return loss.item()


def compare_steps(works) -> None:
    """works: {name: (model, call)}, both fresh. Loss, gradient norms and the codebook of one step."""
    losses, norms, books = [], [], []
    for model, work in works.values():
        losses.append(work())
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.numel()}
        norms.append({k: x.norm().item() for k, x in grads.items()})
        books.append(model.state_dict()["visual_transformer.vq._codebook.embed"])
    assert norms[0].keys() == norms[1].keys(), norms[0].keys() ^ norms[1].keys()
    loss, book = abs(losses[0] - losses[1]), (books[0] - books[1]).abs().max().item()
    worst, key = max((abs(norms[1][k] / v - 1), k) for k, v in norms[0].items() if v > 1e-6)
    print(f"  loss {losses[0]:.6f}; differences: loss {loss:.1e}, codebook after the step {book:.1e}, "
          f"gradient norms {worst:.1e} ({key})")  # fmt: skip
    assert loss < 1e-5 and book < 1e-5 and worst < 1e-3


def part_step(args) -> bool:
    config, n = config_of((40, 320, 320)), args.batch_size
    print(f"step: 1,024 tokens a volume, batch {n}, reports of {args.report_tokens} tokens")
    models = {name: model.train() for name, model in build_pair(config).items()}
    image = torch.rand(n, 1, *config["size"]) * 2 - 1
    others = F.normalize(torch.randn(8 - n, 2, config["latent"]), dim=-1)
    texts = {"literal": token_rows([args.report_tokens] * n, 512)}
    texts["ours"] = [x[:, : args.report_tokens] for x in texts["literal"]]

    def work(name, with_text):
        return lambda: one_step(name, models[name], image, texts[name] if with_text else None, others)

    compare_steps({name: (models[name], work(name, True)) for name in models})
    ratios = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for with_text in (False, True):
            what = f"image {'and report' if with_text else 'alone'}, {threads} thread{'s' * (threads > 1)}"
            ratios.append(show(what, **race({name: work(name, with_text) for name in models}, args.rounds)))
    torch.set_num_threads(1)
    return ratios[0] >= 1.6 or n > 1


def prompt_lengths() -> list[int]:
    """Tokens of the 36 prompts, a word of a label counted as two."""
    pairs = [(label, prompt.format(label)) for label in common.CT_RATE_LABELS for prompt in ctclip.PROMPTS]
    return [3 + len(label.split()) + len(prompt.split()) for label, prompt in pairs]  # 3: [CLS], the dot, [SEP]


@torch.no_grad()
def literal_zero_shot(model, image, ids, mask):
    """(18,) probabilities of one volume: for every label its two prompts and the volume through the whole model."""
    scores = [model(ids[i : i + 2], mask[i : i + 2], image).softmax(0)[0] for i in range(0, len(ids), 2)]
    return torch.stack(scores)


@torch.no_grad()
def our_zero_shot(model, images, ids, mask):
    """(n, 18) probabilities as predict() of train_ctclip.py takes them: the prompts once, every volume once."""
    text = model.encode_text(ids, mask)
    cosine = torch.cat([model.encode_image(image[None]) for image in images]) @ text.T
    return (cosine * model.temperature.exp()).unflatten(1, (-1, 2)).softmax(-1)[..., 0]


def part_zero_shot(args) -> bool:
    config, n = config_of((40, 320, 320)), args.volumes
    lengths = prompt_lengths()
    print(f"zero-shot: 1,024 tokens a volume, 18 labels x 2 prompts of up to {max(lengths)} tokens")
    models = {name: model.eval() for name, model in build_pair(config).items()}
    images, probs = torch.rand(n, 1, *config["size"]) * 2 - 1, {}
    padded = token_rows(lengths, 512)
    short = [x[:, : max(lengths)] for x in padded]

    def ours(key, count):
        probs[key] = our_zero_shot(models["ours"], images[:count], *short)

    def literal():
        probs["literal"] = literal_zero_shot(models["literal"], images[:1], *padded)

    slow = race({"literal": literal}, 1)["literal"]
    fast = race({"one": lambda: ours("one", 1), "all": lambda: ours("all", n)}, args.rounds)
    difference = max((probs["literal"] - probs[key][0]).abs().max().item() for key in ("one", "all"))
    print(f"  difference of the probabilities: {difference:.1e}")
    ratio = show("1 volume with all prompts", slow, fast["one"])
    show(f"a volume of {n} that share the prompts", slow, [x / n for x in fast["all"]])
    report = token_rows([args.report_tokens], args.report_tokens)
    with torch.no_grad():
        image = race({k: lambda m=m: m.encode_image(images[:1]) for k, m in models.items()}, args.rounds)
        report = race({"ours": lambda: models["ours"].encode_text(*report)}, args.rounds)["ours"]
    show("the same and its report, for retrieval", slow, [x / n + y for x, y in zip(fast["all"], report, strict=True)])
    show("images alone (literal: 1 timed, x 18)", [18 * x for x in image["literal"]], image["ours"])
    return ratio >= 15 and difference < 1e-5


class Held:
    """A tensor that autograd keeps; gone as soon as its graph is."""

    def __init__(self, x):
        self.x = x


def kept_mib(model, image) -> float:
    """MiB that autograd keeps for the backward pass of encode_image, each storage once, weights left out."""
    own, held = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}, weakref.WeakSet()

    def pack(x):
        held.add(keep := Held(x))
        return keep

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda keep: keep.x):
        features = model.encode_image(image)
    storages = {h.x.untyped_storage().data_ptr(): h.x.untyped_storage().nbytes() for h in held}
    del features  # the graph lived until here
    return sum(n for pointer, n in storages.items() if pointer not in own) / 2**20


def part_memory(args) -> bool:
    print("memory kept for backward at image 480 (576 places), fp32, MiB")
    text = config_of((1, 1, 1))["bert"] | {"vocab": 100, "layers": 1}
    models, fixed = build_pair(config_of((20, 480, 480), latent=8, bert=text)), {}
    for name, model in models.items():
        model.train()
        one, two = (kept_mib(model, torch.zeros(1, 1, frames, 480, 480)) for frames in (10, 20))
        fixed[name] = 2 * one - two
        print(f"  {name:8} 1 frame {one:7.1f}  2 frames {two:7.1f}: a frame {two - one:6.1f}, fixed {fixed[name]:7.1f}")
    return fixed["ours"] < 0.1 * 1024


def part_flops(args) -> bool:
    print("flops: 480 x 480 x 240, GFLOP of a forward pass")

    def count(call, *inputs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(*inputs)
        return counter.get_total_flops() / 1e9

    zero_shot = {}
    with torch.device("meta"):
        image = torch.empty(1, 1, 240, 480, 480)
        for name, model in build_pair(config_of((240, 480, 480))).items():
            literal = name == "literal"
            widths = (512, 512) if literal else (args.report_tokens, max(prompt_lengths()))
            report, prompt = (torch.ones(1, n, dtype=torch.long) for n in widths)
            volume = count(model.eval().encode_image, image)
            report, prompt = (count(model.encode_text, x, x) for x in (report, prompt))
            zero_shot[name] = (18 if literal else 1) * volume, 36 * prompt
            train = f" (in training {count(model.train().encode_image, image):.1f})" if literal else ""
            print(f"  {name:8} volume {volume:6.1f}{train}, report of {widths[0]} tokens {report:5.1f}; "
                  f"zero-shot {zero_shot[name][0]:7.1f} + prompts {zero_shot[name][1]:6.1f}")  # fmt: skip
    total = sum(zero_shot["literal"])
    print(f"  zero-shot, literal / ours: {total / sum(zero_shot['ours']):.1f} x for 1 volume with all prompts, "
          f"{total / zero_shot['ours'][0]:.1f} x where many share them")  # fmt: skip
    return True


def our_step_on(device, config, tokens, batch_size, chunk, checkpointing, compiled, rounds=3):
    """Seconds and peak GiB of a whole bf16 step of ours: gradient as its loop takes it, clipping, AdamW."""
    args = SimpleNamespace(
        dedup_positives=False, label_loss_weight=0.0, batch_size=batch_size, grad_cache_chunk=chunk, fsdp=False,
        weight_decay=0.01, lr=1e-6, amp="bf16",
    )  # fmt: skip
    ctx = common.Context(0, 1, device)
    ids, mask = (x.to(device) for x in token_rows([tokens] * batch_size, tokens))
    with device:
        model = ctclip.CTCLIP(config).train()
        batch = {"volume": torch.randint(-1000, 1000, (batch_size, *config["size"]), dtype=torch.int16)}
        batch |= {"input_ids": ids, "attention_mask": mask, "index": torch.arange(batch_size)}
        batch |= {"text_id": torch.arange(batch_size), "target": torch.zeros(batch_size, 18)}
    for part in model.modules():
        if hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = checkpointing
    if compiled:
        model.compile()
    optimizer, criterion = ctclip.build_optimizer(model, args), ctclip.build_criterion(args, None)
    autocast, scaler = ctclip.autocast_of(args, device)
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        ctclip.forward_backward(model, [batch], criterion, scaler, autocast, ctx)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert norm.isfinite()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), common.peak_memory(device)


def part_cuda(args) -> bool:
    if not torch.cuda.is_available():
        print("cuda: no CUDA device here, skipped")
        return True
    device, config = torch.device("cuda"), ctclip.PRESETS["ctclip-v2"]
    name, tokens = torch.cuda.get_device_name(), args.report_tokens
    peak = common.PEAK_FLOPS.get(name)
    settings = SimpleNamespace(model_config=config, max_text_length=2 * tokens)
    flops = 3 * ctclip.forward_flops(None, settings)  # a volume and its report; backward is twice the forward
    print(f"cuda: {name}, 480 x 480 x 240, bf16, reports of {tokens} tokens, {flops / 1e12:.2f} TFLOP a pair and step")

    def measure(batch_size, chunk, checkpointing) -> bool:
        what = f"batch {batch_size:3}" + f" in chunks of {chunk}" * (chunk > 0) + ", checkpointing" * checkpointing
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds, memory = our_step_on(device, config, tokens, batch_size, chunk, checkpointing, args.compile)
        except torch.cuda.OutOfMemoryError:
            print(f"  {what}: out of memory")
            return False
        use = f", MFU {100 * flops * batch_size / seconds / peak:.1f} %" if peak else ""
        print(f"  {what}: {seconds:.3f} s a step, {seconds / batch_size:.3f} s a pair, {memory:.1f} GiB{use}")
        return True

    largest = {}
    for checkpointing in (False, True):
        batch_size = 1
        while measure(batch_size, 0, checkpointing):
            largest[checkpointing], batch_size = batch_size, 2 * batch_size
    for checkpointing, fits in largest.items():
        measure(4 * fits, fits, checkpointing)
    return True


def main() -> int:
    parts = {"step": part_step, "zero-shot": part_zero_shot, "memory": part_memory, "flops": part_flops}
    parts["cuda"] = part_cuda
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure")
    parser.add_argument("--rounds", type=int, default=4, help="timed calls of each form, of which the best counts")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of the step: the first are judged")
    parser.add_argument("--batch-size", type=int, default=1, help="volumes in the step on the CPU, at most 7")
    parser.add_argument("--report-tokens", type=int, default=256, help="tokens of a batch's longest report")
    parser.add_argument("--volumes", type=int, default=3, help="volumes that share the prompts in zero-shot")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours on CUDA")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    missed = [name for name in args.parts if not parts[name](args)]
    print(f"requirement missed: {', '.join(missed)}" if missed else "requirements met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
