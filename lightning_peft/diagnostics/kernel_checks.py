"""Every Triton kernel against an independent reference, on the device that will run it.

A check requests the backend ``"triton"``, so that nothing replaces a kernel that is refused, and
compares with torch on the CPU: bit for bit where a value is defined bit for bit, else with fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from lightning_peft_kernels.dispatch import configuration, select
from lightning_peft_kernels.dropout.ops import seeded_dropout, seeded_dropout_reference
from lightning_peft_kernels.fp8.products import select_fp8
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass
from torch import Tensor

from lightning_peft.diagnostics.expert_checks import ExpertChecks
from lightning_peft.diagnostics.optimizer_checks import optimizer_trials
from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close, randn
from lightning_peft.diagnostics.trials import Check, Trial
from lightning_peft.diagnostics.weight_checks import WeightChecks, e4m3_check

__all__ = ["kernel_checks"]

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)


def kernel_checks(device: torch.device, shape: Shape, *, interpreted: bool) -> Iterator[Check]:
    """Yield the checks of a device.

    Args:
        device: Where kernels run.
        shape: Shape class of the products.
        interpreted: Whether Triton's interpreter runs them, which computes bf16 wrongly.
    """
    half = torch.float16 if interpreted or not _has_bf16(device) else torch.bfloat16
    for dtype in _FLOATS:
        if interpreted and dtype == torch.bfloat16:
            continue
        name, short = configuration(dtype), dtype == half
        yield from WeightChecks(device, dtype, shape, short=short).each()
        for op, trials in (
            ("seeded_dropout", _dropout),
            ("pooled_8bit_step", optimizer_trials),
            ("output_scale", _scale),
            ("output_scale_backward", _scale_backward),
        ):
            yield Check(
                op, name, partial(trials, device, dtype, shape), partial(select, op, device, dtype),
                short,
            )  # fmt: skip
        if not interpreted:
            yield Check(
                "quantize_rows_e4m3", name, partial(_quantize_rows, device, dtype, shape),
                partial(select_fp8, (16, 16), device),
            )  # fmt: skip
        for rank in (16, 32):
            decide = partial(select_one_pass, device, dtype, rank)
            yield Check(
                "rank_gradients", configuration(dtype, rank_detail(rank)),
                partial(_rank_gradients, device, dtype, shape, rank), decide, short,
            )  # fmt: skip
        yield from ExpertChecks(device, dtype, shape).each()
    if not interpreted:
        yield e4m3_check(device, shape)


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _dropout(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Trial]:
    x, seed = randn(shape.tokens, shape.K).to(dtype), torch.tensor([1 << 40 | 7])
    there, at = x.to(device), seed.to(device)

    def compare(found: Sequence[Tensor]) -> list[Pair]:
        (y,) = found
        kept = seeded_dropout_reference(x, seed, 0.25) != 0
        return [bits("kept", y != 0, kept), close("y", y, x.double() * (y.cpu() != 0) / 0.75)]

    yield Trial(lambda: (seeded_dropout(there, at, 0.25),), compare)


def _scale(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Trial]:
    u, g, b = (randn(*s).to(dtype) for s in ((shape.tokens, shape.N), (shape.N,), (shape.N,)))
    there = [t.to(device) for t in (u, g, b)]
    yield Trial(
        lambda: (torch.ops.lightning_peft.output_scale(*there, "triton"),),
        lambda found: [close("y", found[0], u.double() * g.double() + b.double())],
    )


def _scale_backward(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Trial]:
    sizes = [(shape.tokens, shape.N)] * 2 + [(shape.N,)]
    d, u, g = (randn(*s, seed=i).to(dtype) for i, s in enumerate(sizes))
    there = [t.to(device) for t in (d, u, g)]

    def compare(found: Sequence[Tensor]) -> list[Pair]:
        wide = d.double()
        want = (wide * g.double(), (wide * u.double()).sum(0), wide.sum(0))
        names = ("du", "dg", "dbias")
        return [close(n, a, b) for n, a, b in zip(names, found, want, strict=True)]

    yield Trial(lambda: torch.ops.lightning_peft.output_scale_backward(*there, "triton"), compare)


def _rank_gradients(
    device: torch.device, dtype: torch.dtype, shape: Shape, rank: int
) -> Iterator[Trial]:
    sizes = [(shape.tokens, shape.N), (shape.tokens, rank), (shape.N, rank)]
    dY, S, B = (randn(*s, seed=i).to(dtype) for i, s in enumerate(sizes))
    dYd, Sd, Bd = (t.to(device) for t in (dY, S, B))

    def compare(found: Sequence[Tensor]) -> list[Pair]:
        dS, dB = found
        return [
            close("dS", dS, 0.5 * dY.double() @ B.double()),
            close("dB", dB, dY.double().T @ S.double()),
        ]

    yield Trial(lambda: rank_gradients(dYd, Sd, Bd, 0.5), compare)


def _quantize_rows(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Trial]:
    x = randn(shape.tokens, shape.K).to(dtype)
    there = x.to(device)

    def compare(found: Sequence[Tensor]) -> list[Pair]:
        x8, scale = found
        peak = x.double().abs().amax(1, keepdim=True)
        back = x8.cpu().double() * scale.cpu().double()
        return [
            close("scale", scale, peak / 448),
            Pair("x", back, x.double(), limit=float(peak.max()) / 28),
        ]

    op = torch.ops.lightning_peft.quantize_rows_e4m3
    yield Trial(lambda: tuple(op(there, "triton")), compare)
