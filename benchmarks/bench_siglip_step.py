"""One training step of a SigLIP image tower: ours beside transformers' SiglipVisionModel, same weights, interleaved.

    python benchmarks/bench_siglip_step.py [--arch base-224] [--batch-size 4] [--rounds 9] [--peer-optimizer default]

A step is forward, backward, clipping and AdamW on (B, 3, side, side) images with a linear head of 18 labels and BCE.
Both get the same weights and images; their losses and gradient norms are compared first. The peer has SDPA attention
and fused AdamW like ours, so that the tower alone is compared, or with --peer-optimizer default AdamW as constructed.
Prints the median of the ratios ours / theirs of CPU and of wall time in fp32 and bf16; below 1 ours is faster.
Required: at most 1.05.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import finetune_siglip as siglip


class Ours(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tower, self.head = siglip.SiglipVision(config), nn.Linear(config["width"], 18)

    def forward(self, image):
        return self.head(self.tower(image))


class Theirs(nn.Module):
    def __init__(self, config):
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config["width"], intermediate_size=config["mlp"], num_hidden_layers=config["layers"],
                num_attention_heads=config["heads"], image_size=config["image"], patch_size=config["patch"],
                attn_implementation="sdpa",
            )
        )  # fmt: skip
        self.head = nn.Linear(config["width"], 18)

    def forward(self, image):
        return self.head(self.tower(pixel_values=image).pooler_output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="base-224", choices=[a for a in siglip.ARCHS if "merlin" not in a])
    parser.add_argument("--batch-size", type=int, default=4, help="images a step")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, after one to warm up")
    parser.add_argument("--peer-optimizer", choices=["fused", "default"], default="fused", help="the peer's AdamW")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device, config = common.pick_device(args.device), siglip.ARCHS[args.arch]
    torch.manual_seed(0)
    ours, theirs = Ours(config), Theirs(config)
    prefix = next(iter(theirs.tower.state_dict())).removesuffix("embeddings.patch_embedding.weight")
    theirs.tower.load_state_dict({prefix + k: v for k, v in ours.tower.state_dict().items()})
    theirs.head.load_state_dict(ours.head.state_dict())
    image = torch.randn(args.batch_size, 3, config["image"], config["image"], device=device)
    target = torch.randint(0, 2, (args.batch_size, 18), device=device).float()
    models = {"ours": ours.to(device), "theirs": theirs.to(device)}
    optimizers = {
        "ours": torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True),
        "theirs": torch.optim.AdamW(theirs.parameters(), lr=1e-6, fused=args.peer_optimizer == "fused" or None),
    }

    def step(name, dtype):
        model, optimizer = models[name].train(), optimizers[name]
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = nn.functional.binary_cross_entropy_with_logits(model(image).float(), target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = loss.item(), norm.item()  # waits for the device
        return time.perf_counter() - wall, time.process_time() - cpu, values

    print(
        f"{args.arch}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    worst = 0.0
    for dtype in ("fp32", "bf16"):
        (_, _, a), (_, _, b) = step("ours", dtype), step("theirs", dtype)
        tolerance = 1e-4 if dtype == "fp32" else 2e-2
        assert abs(a[0] - b[0]) < tolerance and abs(a[1] / b[1] - 1) < tolerance, (a, b)
        times = {name: [] for name in models}
        for i in range(args.rounds):
            for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
                times[name].append(step(name, dtype)[:2])
        wall, cpu = (
            statistics.median(o[k] / t[k] for o, t in zip(times["ours"], times["theirs"], strict=True)) for k in (0, 1)
        )
        seconds = {name: statistics.median(t[1] for t in v) for name, v in times.items()}
        print(
            f"{dtype}: ours / theirs = {cpu:.3f} (CPU seconds), {wall:.3f} (wall); median CPU seconds a step: "
            f"ours {seconds['ours']:.2f}, theirs {seconds['theirs']:.2f}"
        )
        worst = max(worst, cpu if device.type == "cpu" else wall)
    return int(worst > 1.05)


if __name__ == "__main__":
    sys.exit(main())
