"""Layers over one input (q, k, v; gate, up), packed, with LoRA, on a CPU: alone, and as one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import quantize_4bit
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from torch import Tensor

from benchmarks.lib.side_by_side import interleaved, rows, write

GROUPS = {"q, k, v": (1024, 256, 256), "gate, up": (2816, 2816)}
K, R = 1024, 16


def layers(sizes: Sequence[int]) -> list[Projection]:
    torch.manual_seed(0)
    return [
        Projection(
            quantize_4bit(torch.randn(N, K)), (N, K), None,
            torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True), 1.0,
        )
        for N in sizes
    ]  # fmt: skip


def one_by_one(x: Tensor, group: Sequence[Projection]) -> list[Tensor]:
    return [nf4_lora_linear(x, p.q, p.shape, p.bias, p.A, p.B, p.scaling) for p in group]


def step(run: Callable[..., Any], x: Tensor, group: Sequence[Projection]) -> Callable[[], None]:
    def call() -> None:
        ys = run(x, group)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        for t in (x, *(t for p in group for t in (p.A, p.B))):
            t.grad = None

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = []
    for name, sizes in GROUPS.items():
        group = layers(sizes)
        for tokens in options.tokens:
            x = torch.randn(tokens, K, requires_grad=True)
            times = interleaved(
                {
                    "one by one": step(one_by_one, x, group),
                    "as one": step(nf4_grouped_projections, x, group),
                },
                options.repeats,
            )
            table += rows(times, "one by one", layers=name, tokens=tokens)
    write("grouped_cpu", table)


if __name__ == "__main__":
    main()
