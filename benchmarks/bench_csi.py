"""Six zones from one pass of the backbone against one pass a zone, as in the original CSI tool (--zone-focus masking).

    python benchmarks/bench_csi.py [--models ResNet50 CheXNet RadDINO] [--image-size 224] [--batch-size 2]

Training steps (forward, backward, optimizer) of the same model in both forms, interleaved in one process on one thread;
printed are CPU seconds a step, their ratio, and the ratio of counted floating-point operations. The masking form gives
the original tool's outputs (tests/test_csi_model.py), so it stands for it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_csi as csi


def prepare(name: str, size: int, focus: str):
    words = ["--model", name, "--image-size", str(size), "--zone-focus", focus, "--pretrained", "none"]
    args = csi.parse_args(words)
    torch.manual_seed(0)
    model = csi.build_model(args).train()
    return args, model, csi.build_optimizer(model, args), csi.build_criterion(args, None)


def step(form, batch) -> float:
    _, model, optimizer, criterion = form
    start = time.process_time()
    loss, _ = csi.compute_loss(model, batch, criterion)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ResNet50", "CheXNet", "RadDINO", "Custom_1"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.image_size} pixels, batch {args.batch_size}, torch {torch.__version__}, one thread")
    for name in args.models:
        forms = {focus: prepare(name, args.image_size, focus) for focus in ("pool", "masking")}
        batch = {"image": torch.rand(args.batch_size, 1, args.image_size, args.image_size)}
        batch["target"] = torch.randint(0, 5, (args.batch_size, 6))
        seconds = {focus: [] for focus in forms}
        for i in range(args.steps + 1):
            for focus, form in forms.items():
                spent = step(form, batch)
                if i:  # the first one warms up
                    seconds[focus].append(spent)
        one, six = (np.median(seconds[focus]) for focus in ("pool", "masking"))
        flops = [csi.forward_flops(form[1], form[0]) for form in forms.values()]
        print(f"{name:9s} one pass {one:.3f} s, six passes {six:.3f} s: {six / one:.2f} x; operations "
              f"{flops[1] / flops[0]:.2f} x", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
