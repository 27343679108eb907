"""What one step of an adapted layer costs before any clock runs, on a chip that is not here.

    python -m tests.helpers.layer_budgets --csv benchmarks/results/layer_budgets.csv

counts torch's ops, our launches, the bytes of the tensors that both are given and return, and the
Python calls of our packages, and names the functions that make tensors of Python numbers. All of it
is the same on every machine, so it serves as regression rows.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import quantize_4bit
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from torch import nn

import lightning_peft as lp
from lightning_peft.optim.replace import convert_optimizer
from tests.helpers.created_tensors import CreatedTensors
from tests.helpers.fake_gpu import FakeDriver, use_fake_gpu
from tests.helpers.python_calls import own_calls
from tests.helpers.traffic import Traffic, bytes_of

__all__ = ["FIELDS", "Case", "cases", "run_budgets"]

FIELDS = ("code", "chip", "case", "ops", "launches", "bytes", "calls", "made")
BF16 = torch.bfloat16
K, N, R, M = 256, 512, 8, 2048
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One layer, or one group of layers, in one use.

    Attributes:
        name: Method, storage and use.
        build: Returns a step that can be repeated. It is called before there is a chip.
        fast: Whether `make test` counts it.
    """

    name: str
    build: Callable[[], Step]
    fast: bool = False


def _layer(method: lp.Method, quantization: lp.Quantization | None) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(BF16)
    lp.attach(model, method, quantization=quantization)
    return model.to(BF16)


def _training(method: lp.Method, quantization: lp.Quantization | None) -> Step:
    """Forward and backward of one layer, as ``precision="bf16-true"`` trains it."""
    model = _layer(method, quantization).train()
    x, dY = torch.randn(M, K).to(BF16).requires_grad_(), torch.randn(M, N).to(BF16)

    def step() -> None:
        model(x).backward(dY)
        for t in (x, *model.parameters()):
            t.grad = None

    return step


def _generation(quantization: lp.Quantization | None) -> Step:
    """One token through one layer."""
    model, x = _layer(_lora(), quantization).eval(), torch.randn(1, 1, K).to(BF16)

    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def _projections(widths: tuple[int, ...], *, grouped: bool) -> Step:
    """Forward and backward of layers over one input, as one product or one by one."""
    layers = [
        Projection(
            quantize_4bit(torch.randn(width, K)), (width, K), None,
            *(torch.randn(s).to(BF16).requires_grad_() for s in ((R, K), (width, R))), 2.0,
        )
        for width in widths
    ]  # fmt: skip
    x = torch.randn(M, K).to(BF16).requires_grad_()
    dYs = [torch.randn(M, width).to(BF16) for width in widths]

    def step() -> None:
        if grouped:
            ys = nf4_grouped_projections(x, layers)
        else:
            ys = [nf4_lora_linear(x, p.q, p.shape, None, p.A, p.B, p.scaling) for p in layers]
        torch.autograd.backward(ys, dYs)
        for t in (x, *(t for p in layers for t in (p.A, p.B))):
            t.grad = None

    return step


def _optimizer(name: str) -> Step:
    """One step over the adapters of two layers."""
    shapes = ((R, K), (N, R)) * 2
    parameters = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    convert_optimizer(optimizer, name)
    return optimizer.step


def _lora(dropout: float = 0.0) -> lp.LoRA:
    return lp.LoRA(r=R, alpha=2 * R, dropout=dropout, target_modules="all-linear")


def cases() -> Iterator[Case]:
    """Yield the cases."""
    nf4 = lp.Quantization()
    yield Case("LoRA on NF4, training", lambda: _training(_lora(), nf4), fast=True)
    yield Case("LoRA on NF4, generation", lambda: _generation(nf4), fast=True)
    yield Case("LoRA, training", lambda: _training(_lora(), None), fast=True)
    yield Case("LoRA, generation", lambda: _generation(None), fast=True)
    yield Case("LoRA on NF4 with dropout, training", lambda: _training(_lora(0.1), nf4))
    fp8 = lp.Quantization(compute="fp8")
    yield Case("LoRA on NF4 in fp8, training", lambda: _training(_lora(), fp8))
    dora = lp.DoRA(r=R, alpha=2 * R, target_modules="all-linear")
    yield Case("DoRA on NF4, training", lambda: _training(dora, nf4))
    for name, widths in (("q, k, v", (512, 128, 128)), ("gate, up", (896, 896))):
        for how in ("grouped", "apart"):
            yield Case(
                f"{name} on NF4 {how}, training",
                lambda widths=widths, how=how: _projections(widths, grouped=how == "grouped"),  # type: ignore[misc]
            )
    yield Case("8-bit AdamW, step", lambda: _optimizer("adamw_8bit"))


def run_budgets(chip: str, file: str, fast: bool = False) -> None:
    """Count the cases on a chip in this process and write a table."""
    torch.manual_seed(0)
    steps = {case.name: case.build() for case in cases() if case.fast or not fast}
    driver = use_fake_gpu(chip)
    with Path(file).open("w", newline="") as out:
        table = csv.DictWriter(out, FIELDS)
        table.writeheader()
        for name, step in steps.items():
            table.writerow({"code": "now", "chip": chip, "case": name, **_count(step, driver)})


def _count(step: Step, driver: FakeDriver) -> dict[str, int | str]:
    for _ in range(2):
        step()  # compiles, fills the caches of tables, binds the short way through the layer
    calls = len(own_calls(step))
    driver.launched.clear()
    with Traffic(apart="lightning_peft") as seen:
        step()
    launched = sum(bytes_of(one.arguments) for one in driver.launched)
    launches = len(driver.launched)
    with CreatedTensors() as created:
        step()
    return {
        "ops": sum(seen.calls.values()),
        "launches": launches,
        "bytes": seen.bytes + launched,
        "calls": calls,
        "made": " ".join(sorted(created.made)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", required=True)
    parser.add_argument("--chip", default="sm_90")
    given = parser.parse_args()
    run_budgets(given.chip, given.csv)


if __name__ == "__main__":
    main()
