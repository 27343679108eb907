"""Optimizer step over 112 LoRA tensors: ours, bitsandbytes, torch, interleaved in a process."""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from pathlib import Path

import bitsandbytes
import torch

from lightning_peft.optim import convert_optimizer

# Rank 16 over 56 layers of 4096, every fourth layer wide: 10.5 M elements.
SHAPES = [shape for i in range(56) for shape in ((16, 4096), (11264 if i % 4 == 0 else 6912, 16))]


def parameters(device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(s, device=device)) for s in SHAPES]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def optimizers(device: str) -> dict[str, torch.optim.Optimizer]:
    ours = {}
    for name in ("adamw_8bit", "lion_8bit"):
        ours[name] = torch.optim.AdamW(parameters(device), lr=1e-4)
        convert_optimizer(ours[name], name)
    return {
        "lightning_peft adamw_8bit": ours["adamw_8bit"],
        "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit(parameters(device), lr=1e-4),
        "lightning_peft lion_8bit": ours["lion_8bit"],
        "bitsandbytes Lion8bit": bitsandbytes.optim.Lion8bit(parameters(device), lr=1e-4),
        "torch AdamW foreach": torch.optim.AdamW(parameters(device), lr=1e-4, foreach=True),
        "torch AdamW fused": torch.optim.AdamW(parameters(device), lr=1e-4, fused=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = optimizers(options.device)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.repeats + 2):
        for name, optimizer in made.items():
            start = time.perf_counter()
            optimizer.step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    path = Path(__file__).parents[1] / "results" / f"{options.device}_optimizer.csv"
    path.parent.mkdir(exist_ok=True)
    base = statistics.median(times["bitsandbytes AdamW8bit"])
    elements = sum(p.numel() for p in parameters("cpu"))
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "optimizer",
                "tensors",
                "elements",
                "threads",
                "median_ms",
                "min_ms",
                "ratio_to_bnb_adamw8bit",
                "device",
                "torch",
                "bitsandbytes",
                "date",
                "command",
            ]
        )
        for name, values in times.items():
            row = [name, len(SHAPES), elements, options.threads]
            median = statistics.median(values)
            row += [f"{median:.1f}", f"{min(values):.1f}", f"{median / base:.3f}"]
            row += [options.device if options.device == "cpu" else torch.cuda.get_device_name()]
            row += [torch.__version__, bitsandbytes.__version__, datetime.date.today()]
            out.writerow([*row, " ".join(sys.argv)])
            print(*row)


if __name__ == "__main__":
    main()
