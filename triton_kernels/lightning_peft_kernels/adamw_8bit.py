"""Pooled blockwise 8-bit optimizer step: AdamW and Lion over many tensors at once.

All tensors share one pool of state. Each begins at a multiple of 256, so its 256-blocks are those
of bitsandbytes. A state element is map[code] · absmax[block], with the signed dynamic map for the
first moment m and the unsigned one for the second, v. One step, in fp32:
    AdamW   p ← p·decay;  m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  p ← p − step·m / (√v + eps)
    Lion    p ← p·decay;  p ← p − step·sign(β1·m + (1−β1)·g);  m ← β2·m + (1−β2)·g
then absmax of the new moments and their nearest codes (the lower one on a tie). A row of `hyper`
fp32 [T, 7] is (decay, step, eps, β1, 1−β1, β2, 1−β2) for one tensor: decay = 1 − lr·weight_decay,
and for AdamW step = lr·√(1−β2ᵗ)/(1−β1ᵗ), eps scaled by √(1−β2ᵗ), which is torch.optim.AdamW's
update. The decay comes before the update, as in torch; bitsandbytes' CUDA kernel does it after (a
difference of lr²·wd). Bytes moved per element, AdamW on fp32: 12 for p and g, 4.06 for the state.
Source: Dettmers et al. 2021, arXiv:2110.02861; Chen et al. 2023, arXiv:2302.06675 (Lion).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.backend import choose
from lightning_peft_kernels.dynamic_map import (
    code_cells,
    code_pairs,
    dynamic_map,
    nearest_codes,
)

__all__ = [
    "BLOCK",
    "aot_specs",
    "dequantize_blocks",
    "pooled_8bit_step",
    "pooled_8bit_step_reference",
    "quantize_blocks",
]

BLOCK = 256
_CHUNK = 1 << 18  # elements; a chunk and its temporaries stay in the cache
_TINY = 2e-38
Row = tuple[float, ...]


def quantize_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and absmax fp32 [⌈n/256⌉] of flat `values` [n]."""
    n = values.numel()
    blocks = -(-n // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[:n] = values.detach().reshape(-1)
    rows = padded.view(blocks, BLOCK)
    absmax = rows.abs().amax(1) if blocks else rows.new_empty(0)
    scaled = rows * absmax.clamp_min(_TINY).reciprocal()[:, None]
    return nearest_codes(scaled.view(-1), signed)[:n], absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Values fp32 [n] of codes [n] and absmax [⌈n/256⌉]."""
    n = codes.numel()
    scale = absmax.repeat_interleave(BLOCK)[:n]
    return dynamic_map(signed, str(codes.device))[codes.reshape(-1).int()] * scale


# ---- reference


def pooled_8bit_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """The formulas, a tensor at a time. Arguments as for `pooled_8bit_step`."""
    if found_inf is not None and float(found_inf) != 0.0:
        return
    for p, grad, start, row in zip(params, grads, starts, hyper.tolist(), strict=True):
        decay, step, eps, beta1, rest1, beta2, rest2 = row
        n = p.numel()
        here, blocks = slice(start, start + n), slice(start // BLOCK, (start + n - 1) // BLOCK + 1)
        g = grad.reshape(-1).float()
        g = g if grad_scale is None else g / grad_scale
        g = -g if maximize else g
        m = dequantize_blocks(code1[here], absmax1[blocks], signed=True)
        value = p.reshape(-1).float() * decay
        if code2 is None or absmax2 is None:
            value = value - step * torch.sign(m * beta1 + g * rest1)
            m = m * beta2 + g * rest2
        else:
            v = dequantize_blocks(code2[here], absmax2[blocks], signed=False)
            m = m * beta1 + g * rest1
            v = v * beta2 + g * g * rest2
            value = value - step * (m / (v.sqrt() + eps))
            code2[here], absmax2[blocks] = quantize_blocks(v, signed=False)
        code1[here], absmax1[blocks] = quantize_blocks(m, signed=True)
        p.copy_(value.view_as(p))


# ---- CPU


class _Piece(NamedTuple):
    """Elements [first, last) of tensor `tensor`, at `at` within the chunk."""

    tensor: int
    first: int
    last: int
    at: int


class _Work:
    """Temporaries of one chunk, made once."""

    def __init__(self) -> None:
        self.m, self.v, self.x = (torch.zeros(_CHUNK, dtype=torch.float32) for _ in range(3))
        self.half = torch.empty(_CHUNK // 2, dtype=torch.int32)
        self.index, self.cell = (torch.empty(_CHUNK, dtype=torch.int32) for _ in range(2))


@lru_cache(maxsize=1)
def _work() -> _Work:
    return _Work()


def _chunks(
    numels: Sequence[int], starts: Sequence[int], rows: Sequence[Row]
) -> list[tuple[int, int, Row, list[_Piece]]]:
    """Runs of at most `_CHUNK` elements of neighbours with equal hyper-parameters."""
    chunks: list[tuple[int, int, Row, list[_Piece]]] = []
    for i, (n, start, row) in enumerate(zip(numels, starts, rows, strict=True)):
        first = 0
        while first < n:
            begin = start + first
            open_chunk = bool(chunks) and chunks[-1][2] == row and sum(chunks[-1][:2]) == begin
            room = _CHUNK - chunks[-1][1] if open_chunk else 0
            if room <= 0:
                chunks.append((begin, 0, row, []))
                room = _CHUNK
            last = min(n, first + room)
            origin, length, _, pieces = chunks[-1]
            pieces.append(_Piece(i, first, last, length))
            chunks[-1] = (origin, length + -(-(last - first) // BLOCK) * BLOCK, row, pieces)
            first = last
    return chunks


def _decode(codes: Tensor, absmax: Tensor, out: Tensor, half: Tensor, signed: bool) -> None:
    half = half[: codes.numel() // 2]
    half.copy_(codes.view(torch.uint16))
    torch.index_select(code_pairs(signed), 0, half, out=out.view(torch.int64))
    out.view(-1, BLOCK).mul_(absmax[:, None])


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, work: _Work, signed: bool) -> None:
    """Overwrites `values`."""
    n = values.numel()
    rows, index, cell = values.view(-1, BLOCK), work.index[:n], work.cell[:n]
    if signed:
        torch.amax(torch.abs(values, out=work.x[:n]).view(-1, BLOCK), 1, out=absmax)
    else:
        torch.amax(rows, 1, out=absmax)
    rows.mul_(absmax.clamp_min(_TINY).reciprocal_()[:, None])
    bits = values.view(torch.int32)
    if signed:
        torch.bitwise_right_shift(bits, 31, out=index)
        bits.bitwise_xor_(index.bitwise_and_(0x7FFFFFFF))
    torch.bitwise_right_shift(bits, 16, out=index)
    if signed:
        index.add_(32768)
    torch.index_select(code_cells(signed), 0, index, out=cell)
    codes.copy_(cell.add_(bits).bitwise_right_shift_(16))


def _step_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None,
    maximize: bool,
) -> None:
    work = _work()
    scale = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    flat_p = [p.view(-1) for p in params]
    flat_g = [g.reshape(-1) for g in grads]
    rows = [tuple(row) for row in hyper.tolist()]
    for begin, n, row, pieces in _chunks([p.numel() for p in flat_p], starts, rows):
        decay, step, eps, beta1, rest1, beta2, rest2 = row
        here, blocks = slice(begin, begin + n), slice(begin // BLOCK, (begin + n) // BLOCK)
        m, v, x = work.m[:n], work.v[:n], work.x[:n]
        _decode(code1[here], absmax1[blocks], m, work.half, True)
        ps = [flat_p[i][a:b] for i, a, b, _ in pieces]
        gs = [flat_g[i][a:b] for i, a, b, _ in pieces]
        gs = [g if g.dtype == torch.float32 else g.float() for g in gs]
        spans = [slice(at, at + b - a) for _, a, b, at in pieces]
        if code2 is None or absmax2 is None:
            torch.mul(m, beta1, out=x)
            for g, span in zip(gs, spans, strict=True):
                x[span].add_(g, alpha=rest1 * scale)
            x.sign_()
            m.mul_(beta2)
            for g, span in zip(gs, spans, strict=True):
                m[span].add_(g, alpha=rest2 * scale)
        else:
            _decode(code2[here], absmax2[blocks], v, work.half, False)
            m.mul_(beta1)
            v.mul_(beta2)
            for g, span in zip(gs, spans, strict=True):
                m[span].add_(g, alpha=rest1 * scale)
                v[span].addcmul_(g, g, value=rest2 * scale * scale)
            torch.sqrt(v, out=x).add_(eps)
            torch.div(m, x, out=x)
        for p, span in zip(ps, spans, strict=True):
            if p.dtype == torch.float32:
                p.mul_(decay).add_(x[span], alpha=-step)
            else:
                p.copy_(p.float().mul_(decay).add_(x[span], alpha=-step))
        _encode(m, code1[here], absmax1[blocks], work, True)
        if code2 is not None and absmax2 is not None:
            _encode(v, code2[here], absmax2[blocks], work, False)


# ---- Triton


@lru_cache(maxsize=8)
def _blocks(numels: tuple[int, ...], device: str) -> Tensor:
    """(tensor, block within it) of every program, int32 [programs, 2]."""
    counts = torch.tensor([-(-n // BLOCK) for n in numels], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, within], 1).to(torch.int32).to(device)


def _step_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
) -> None:
    import triton.language as tl

    from lightning_peft_kernels._adamw_8bit_triton import NUM_WARPS, pooled_8bit_step_kernel

    types: dict[torch.dtype, Any] = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }
    device = str(code1.device)
    grads = [g.contiguous() for g in grads]
    numels = tuple(p.numel() for p in params)
    table = torch.tensor(
        [
            (p.data_ptr(), g.data_ptr(), n, s // BLOCK)
            for p, g, n, s in zip(params, grads, numels, starts, strict=True)
        ],
        dtype=torch.int64,
    )
    blocks = _blocks(numels, device)
    lion = code2 is None or absmax2 is None
    pooled_8bit_step_kernel[(blocks.shape[0],)](
        table.to(device, non_blocking=True),
        blocks,
        hyper,
        code1,
        absmax1,
        code1 if code2 is None else code2,
        absmax1 if absmax2 is None else absmax2,
        dynamic_map(True, device),
        dynamic_map(False, device),
        code_cells(True, device),
        code_cells(False, device),
        hyper if grad_scale is None else grad_scale,
        hyper if found_inf is None else found_inf,
        P_TYPE=types[params[0].dtype],
        G_TYPE=types[grads[0].dtype],
        LION=lion,
        MAXIMIZE=maximize,
        SCALED=grad_scale is not None,
        CHECKED=found_inf is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


# ---- op

_library = torch.library.Library("lightning_peft", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "pooled_8bit_step(Tensor(a!)[] params, Tensor[] grads, int[] starts, Tensor hyper, Tensor(b!) "
    "code1, Tensor(c!) absmax1, Tensor(d!)? code2, Tensor(e!)? absmax2, Tensor? grad_scale, "
    "Tensor? found_inf, bool maximize) -> ()"
)


def _implementation(
    params: list[Tensor],
    grads: list[Tensor],
    starts: list[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
) -> None:
    if choose("pooled_8bit_step", code1.device, params[0].dtype).backend == "triton":
        _step_triton(
            params,
            grads,
            starts,
            hyper,
            code1,
            absmax1,
            code2,
            absmax2,
            grad_scale,
            found_inf,
            maximize,
        )
    elif code1.device.type == "cpu":
        if found_inf is None or float(found_inf) == 0.0:
            _step_cpu(
                params, grads, starts, hyper, code1, absmax1, code2, absmax2, grad_scale, maximize
            )
    else:
        pooled_8bit_step_reference(
            params,
            grads,
            starts,
            hyper,
            code1,
            absmax1,
            code2,
            absmax2,
            grad_scale,
            found_inf,
            maximize,
        )


_library.impl(  # type: ignore[no-untyped-call]
    "pooled_8bit_step", _implementation, "CompositeExplicitAutograd"
)
torch.library.register_fake("lightning_peft::pooled_8bit_step", lambda *a, **k: None, lib=_library)


@torch.no_grad()
def pooled_8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None = None,
    absmax2: Tensor | None = None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """One step of AdamW, or of Lion without second moments, in place; one launch on CUDA.

    Args:
        params: contiguous, of one dtype; all tensors on one device. None may be empty.
        grads: the shapes of `params`, of one dtype.
        starts: first element of each tensor in the pool, a multiple of 256.
        hyper: fp32 [T, 7], see the module.
        code1: uint8 [pool], `absmax1` fp32 [pool / 256]; likewise `code2`, `absmax2`.
        absmax1: see `code1`.
        code2: None for Lion.
        absmax2: None for Lion.
        grad_scale: fp32 scalar that gradients are divided by.
        found_inf: fp32 scalar; nothing changes where it is not 0.
        maximize: ascend.

    Raises:
        ValueError: mixed dtypes, a start that is no multiple of 256, a parameter that is not
            contiguous.
    """
    if not params:
        return
    kinds = {(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"pooled_8bit_step: expected one dtype, got {kinds}; call once a dtype")
    if any(start % BLOCK for start in starts):
        raise ValueError(
            f"pooled_8bit_step: expected starts % {BLOCK} = 0, got {list(starts)}; pad"
        )
    if not all(p.is_contiguous() for p in params):
        raise ValueError(
            "pooled_8bit_step: expected contiguous parameters, got a strided one; copy it"
        )
    torch.ops.lightning_peft.pooled_8bit_step(
        list(params), list(grads), list(starts), hyper, code1, absmax1, code2, absmax2,
        grad_scale, found_inf, maximize,
    )  # fmt: skip


def aot_specs() -> list[dict[str, Any]]:
    """What to compile ahead of time: AdamW and Lion, fp32 and bf16."""
    import triton.language as tl

    from lightning_peft_kernels._adamw_8bit_triton import NUM_WARPS, pooled_8bit_step_kernel

    pointers = (
        "i64",
        "i32",
        "fp32",
        "u8",
        "fp32",
        "u8",
        "fp32",
        "fp32",
        "fp32",
        "i32",
        "i32",
        "fp32",
        "fp32",
    )
    names = pooled_8bit_step_kernel.arg_names
    signature = {name: f"*{kind}" for name, kind in zip(names, pointers, strict=False)}
    signature.update(dict.fromkeys(names[len(pointers) :], "constexpr"))
    return [
        {
            "name": f"pooled_8bit_step_{'lion' if lion else 'adamw'}_{suffix}",
            "fn": pooled_8bit_step_kernel,
            "signature": signature,
            "constexprs": {
                "P_TYPE": kind, "G_TYPE": kind, "LION": lion, "MAXIMIZE": False, "SCALED": False,
                "CHECKED": True, "BLOCK": BLOCK,
            },
            "attrs": {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
            "num_warps": NUM_WARPS,
            "num_stages": 2,
            "fast": suffix == "fp32",
        }
        for lion in (False, True)
        for suffix, kind in (("fp32", tl.float32), ("bf16", tl.bfloat16))
    ]  # fmt: skip
