"""Every Triton kernel against an independent reference, on the device that will run it.

A check requests the backend ``"triton"``, so that nothing replaces a kernel that is refused, and
compares with torch on the CPU: bit for bit where a value is defined bit for bit, else with fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from lightning_peft_kernels.codebooks.eight_bit import ZERO_CODE
from lightning_peft_kernels.dispatch import Decision, configuration, select, use_backend
from lightning_peft_kernels.dropout.ops import seeded_dropout, seeded_dropout_reference
from lightning_peft_kernels.fp8.products import e4m3_scale, select_fp8
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.reference import dequantize_4bit_reference, quantize_4bit_reference
from lightning_peft_kernels.nf4.selection import (
    PAIRS,
    select_pairs,
    select_product,
    small_batch_detail,
)
from lightning_peft_kernels.nf4.small_batch import multiply_few, nf4_small_batch
from lightning_peft_kernels.optim.adamw_8bit import pooled_8bit_step, pooled_8bit_step_reference
from lightning_peft_kernels.optim.step_inputs import PooledStep
from torch import Tensor

from lightning_peft.diagnostics.expert_checks import ExpertChecks
from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close, packed_on, randn, to_device

__all__ = ["Check", "kernel_checks"]

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)
_DECODED = ("triton", "fused", "pairs", "scaled_mm", "scaled_rows")


@dataclass(frozen=True)
class Check:
    """One kernel and its reference.

    Attributes:
        op: Name of the op, as its failures are remembered.
        configuration: Which of its kernels.
        run: Runs the kernel on the device; returns its results beside the reference's.
        decide: Returns what the dispatch selects.
        short: Whether the check at the start of fit includes it.
    """

    op: str
    configuration: str
    run: Callable[[], list[Pair]]
    decide: Callable[[], Decision]
    short: bool = False

    @property
    def applies(self) -> bool:
        """Whether this device would run the kernel at all."""
        with use_backend("triton"):
            return self.decide().backend in _DECODED

    def error(self) -> str:
        """Run and return the largest violation; "" if every result is within its limit."""
        with use_backend("triton"):
            found = self.run()
        return "; ".join(filter(None, (pair.violation() for pair in found)))


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
        plain = partial(select, device=device, dtype=dtype)
        for op, run in (
            ("quantize_4bit", _quantize),
            ("dequantize_4bit", _dequantize),
            ("seeded_dropout", _dropout),
            ("pooled_8bit_step", _step),
            ("output_scale", _scale),
            ("output_scale_backward", _scale_backward),
        ):
            yield Check(op, name, partial(run, device, dtype, shape), partial(plain, op), short)
        if not interpreted:
            yield Check(
                "quantize_rows_e4m3", name, partial(_quantize_rows, device, dtype, shape),
                partial(select_fp8, (16, 16), device),
            )  # fmt: skip
        for tokens in (1, 16, 32, 64):
            decide = partial(select_product, device, dtype, tokens, (shape.N, shape.K))
            yield Check(
                "nf4_small_batch", configuration(dtype, small_batch_detail(tokens)),
                partial(_small_batch, device, dtype, shape, tokens), decide, short and tokens == 1,
            )  # fmt: skip
        yield Check(
            "nf4_small_batch", configuration(dtype, PAIRS),
            partial(_pairs, device, dtype, shape),
            partial(select_pairs, device, dtype, 1, (shape.N, shape.K)), short,
        )  # fmt: skip
        for rank in (16, 32):
            decide = partial(select_one_pass, device, dtype, rank)
            yield Check(
                "rank_gradients", configuration(dtype, rank_detail(rank)),
                partial(_rank_gradients, device, dtype, shape, rank), decide, short,
            )  # fmt: skip
        for op, detail, check, chosen in ExpertChecks(device, dtype, shape).each():
            yield Check(op, configuration(dtype, detail), check, chosen)
    if not interpreted:
        yield Check(
            "dequantize_e4m3", configuration(torch.bfloat16),
            partial(_dequantize_e4m3, device, shape), partial(select_fp8, (16, 16), device),
        )  # fmt: skip


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _quantize(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    """Scales are exact; a decoded value is the nearest code, up to the last bits of w / absmax."""
    W = randn(shape.N, shape.K).to(dtype)
    q = quantize_4bit(W.to(device), double_quant=False)
    back = to_device(q, torch.device("cpu"))
    values = dequantize_4bit_reference(back, W.shape, torch.float64)
    best = dequantize_4bit_reference(
        quantize_4bit_reference(W, double_quant=False), W.shape, torch.float64
    )
    exact = W.double()
    limit = 1e-5 * back.absmax.double().amax()
    return [
        bits("absmax", back.absmax, W.float().view(-1, 64).abs().amax(1)),
        Pair("distance", (values - exact).abs(), (best - exact).abs(), limit=float(limit)),
    ]


def _dequantize(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    found = []
    for nested in (True, False):
        q, there = packed_on(device, shape.N, shape.K, nested)
        W = dequantize_4bit(there, (shape.N, shape.K), dtype)
        found.append(bits("W", W, dequantize_4bit_reference(q, (shape.N, shape.K), dtype)))
    return found


def _dropout(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    x, seed = randn(shape.tokens, shape.K).to(dtype), torch.tensor([1 << 40 | 7])
    y = seeded_dropout(x.to(device), seed.to(device), 0.25)
    return [bits("kept", y != 0, seeded_dropout_reference(x, seed, 0.25) != 0),
            close("y", y, x.double() * (y.cpu() != 0) / 0.75)]  # fmt: skip


def _step(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    """Parameters follow the reference; rounding may move a code by one."""
    p, g = randn(shape.N, shape.K).to(dtype), randn(shape.N, shape.K, seed=1).to(dtype)
    hyper = torch.tensor([[0.99, 1e-3, 1e-8, 0.9, 0.1, 0.999, 1e-3]])
    n = -(-p.numel() // 256) * 256
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (2, n), generator=draw).to(torch.uint8)
    for signed, row in zip((True, False), codes, strict=True):
        row[p.numel() :] = ZERO_CODE[signed]  # what a pool holds between tensors
    scales = torch.rand(2, n // 256, generator=draw)
    state = [codes[0], scales[0], codes[1], scales[1]]
    results = []
    for where in (torch.device("cpu"), device):
        tensors = [t.clone().to(where) for t in (p, g, hyper, *state)]
        p1, g1, rows, code1, absmax1, code2, absmax2 = tensors
        work = PooledStep([p1], [g1], [0], rows, code1, absmax1, code2, absmax2)
        pooled_8bit_step_reference(work) if where is not device else pooled_8bit_step(work)
        results.append([tensors[0], *tensors[3:]])
    want, got = results
    return [close("p", got[0], want[0].double()),
            close("absmax1", got[2], want[2].double()),
            Pair("code1", got[1].cpu().double(), want[1].double(), limit=1.0),
            Pair("code2", got[3].cpu().double(), want[3].double(), limit=1.0)]  # fmt: skip


def _scale(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    u, g, b = (randn(*s).to(dtype) for s in ((shape.tokens, shape.N), (shape.N,), (shape.N,)))
    y = torch.ops.lightning_peft.output_scale(u.to(device), g.to(device), b.to(device), "triton")
    return [close("y", y, u.double() * g.double() + b.double())]


def _scale_backward(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    d, u, g = (
        randn(*s, seed=i).to(dtype)
        for i, s in enumerate([(shape.tokens, shape.N)] * 2 + [(shape.N,)])
    )
    found = torch.ops.lightning_peft.output_scale_backward(
        d.to(device), u.to(device), g.to(device), "triton"
    )
    wide = d.double()
    want = (wide * g.double(), (wide * u.double()).sum(0), wide.sum(0))
    return [close(n, a, b) for n, a, b in zip(("du", "dg", "dbias"), found, want, strict=True)]


def _small_batch(device: torch.device, dtype: torch.dtype, shape: Shape, tokens: int) -> list[Pair]:
    q, there = packed_on(device, shape.N, shape.K, True)
    x, S, B, bias = (
        randn(*s).to(dtype) for s in ((tokens, shape.K), (tokens, 8), (shape.N, 8), (shape.N,))
    )
    y = nf4_small_batch(
        x.to(device), there, (shape.N, shape.K), *(t.to(device) for t in (S, B, bias))
    )
    W = dequantize_4bit_reference(q, (shape.N, shape.K), torch.float64)
    want = x.double() @ W.T + S.double() @ B.double().T + bias.double()
    return [close("y", y, want)]


def _pairs(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    """All rows up to eight; blocks as long as K allows, so that one holds several steps too."""
    found = []
    for block_size in (32, 64, 128):
        if shape.K % block_size:
            continue
        W = randn(shape.N, shape.K) / shape.K**0.5
        q = quantize_4bit_reference(W, block_size=block_size, double_quant=block_size != 64)
        there, exact = to_device(q, device), (shape.N, shape.K)
        Wd = dequantize_4bit_reference(q, exact, torch.float64, block_size=block_size)
        for tokens in (1, 3, 8):
            x, S, B, bias = (
                randn(*s).to(dtype)
                for s in ((tokens, shape.K), (tokens, 8), (shape.N, 8), (shape.N,))
            )
            s, b, c = (t.to(device) for t in (S, B, bias))
            packing, how = Packing(exact, "nf4", block_size), Decision("pairs", "checked")
            y = multiply_few(x.to(device), there, packing, s, b, c, "triton", how)
            want = x.double() @ Wd.T + S.double() @ B.double().T + bias.double()
            found.append(close(f"y of {tokens} rows, blocks of {block_size}", y, want))
    return found


def _rank_gradients(
    device: torch.device, dtype: torch.dtype, shape: Shape, rank: int
) -> list[Pair]:
    dY, S, B = (
        randn(*s, seed=i).to(dtype)
        for i, s in enumerate([(shape.tokens, shape.N), (shape.tokens, rank), (shape.N, rank)])
    )
    dS, dB = rank_gradients(dY.to(device), S.to(device), B.to(device), 0.5)
    return [close("dS", dS, 0.5 * dY.double() @ B.double()),
            close("dB", dB, dY.double().T @ S.double())]  # fmt: skip


def _dequantize_e4m3(device: torch.device, shape: Shape) -> list[Pair]:
    q, there = packed_on(device, shape.N, shape.K, True)
    scale, size, found = e4m3_scale(q), (shape.N, shape.K), []
    W = dequantize_4bit_reference(q, size, torch.float32) * (1.0 / scale)
    want = W.to(torch.float8_e4m3fn)
    for turned in (False, True):
        W8: Tensor = torch.ops.lightning_peft.dequantize_e4m3(
            *there, scale.to(device), list(size), turned, "nf4", 64, "triton"
        )
        found.append(bits("W8", W8.view(torch.uint8), (want.T if turned else want).contiguous()
                          .view(torch.uint8)))  # fmt: skip
    return found


def _quantize_rows(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Pair]:
    x = randn(shape.tokens, shape.K).to(dtype)
    x8, scale = torch.ops.lightning_peft.quantize_rows_e4m3(x.to(device), "triton")
    peak = x.double().abs().amax(1, keepdim=True)
    back = x8.cpu().double() * scale.cpu().double()
    return [close("scale", scale, peak / 448),
            Pair("x", back, x.double(), limit=float(peak.max()) / 28)]  # fmt: skip
