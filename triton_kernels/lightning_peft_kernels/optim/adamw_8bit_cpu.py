"""The pooled 8-bit step on a CPU, in chunks that fit the cache together with their temporaries.

Neighbouring tensors with equal hyper-parameters share a chunk, so 112 LoRA tensors cost as many
passes as one tensor of their total size. A table of pairs decodes two codes at a time; one lookup
by the upper 16 bits encodes (`code_cells`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import BLOCK, TINY, code_cells, code_pairs
from lightning_peft_kernels.optim.step_inputs import PooledStep

__all__ = ["step_cpu"]

_CHUNK = 1 << 18  # elements
Row = tuple[float, ...]


class _Piece(NamedTuple):
    """Elements [first, last) of tensor number `tensor`, at offset `at` of the chunk."""

    tensor: int
    first: int
    last: int
    at: int


class _Scratch:
    """Temporaries of one chunk, allocated once."""

    def __init__(self) -> None:
        self.m, self.v, self.x = (torch.zeros(_CHUNK, dtype=torch.float32) for _ in range(3))
        self.half = torch.empty(_CHUNK // 2, dtype=torch.int32)
        self.index, self.cell = (torch.empty(_CHUNK, dtype=torch.int32) for _ in range(2))


@lru_cache(maxsize=1)
def _scratch() -> _Scratch:
    return _Scratch()


def _chunks(
    numels: Sequence[int], starts: Sequence[int], rows: Sequence[Row]
) -> list[tuple[int, int, Row, list[_Piece]]]:
    """Group neighbours with equal hyper-parameters into runs of at most `_CHUNK` elements."""
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


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, scratch: _Scratch, signed: bool) -> None:
    """Encode `values` to codes and absmax; overwrites `values`."""
    n = values.numel()
    rows, index, cell = values.view(-1, BLOCK), scratch.index[:n], scratch.cell[:n]
    if signed:
        torch.amax(torch.abs(values, out=scratch.x[:n]).view(-1, BLOCK), 1, out=absmax)
    else:
        torch.amax(rows, 1, out=absmax)
    rows.mul_(absmax.clamp_min(TINY).reciprocal_()[:, None])
    bits = values.view(torch.int32)
    if signed:
        torch.bitwise_right_shift(bits, 31, out=index)
        bits.bitwise_xor_(index.bitwise_and_(0x7FFFFFFF))
    torch.bitwise_right_shift(bits, 16, out=index)
    if signed:
        index.add_(32768)
    torch.index_select(code_cells(signed), 0, index, out=cell)
    codes.copy_(cell.add_(bits).bitwise_right_shift_(16))


def step_cpu(work: PooledStep) -> None:
    """Run the step in place, one chunk of the pool at a time."""
    if work.found_inf is not None and float(work.found_inf) != 0.0:
        return
    scratch, scale = _scratch(), -1.0 if work.maximize else 1.0
    if work.grad_scale is not None:
        scale /= float(work.grad_scale)
    code1, absmax1, code2, absmax2 = work.code1, work.absmax1, work.code2, work.absmax2
    flat_p = [p.view(-1) for p in work.params]
    flat_g = [g.reshape(-1) for g in work.grads]
    rows = [tuple(row) for row in work.hyper.tolist()]
    for begin, n, row, pieces in _chunks([p.numel() for p in flat_p], work.starts, rows):
        decay, step, eps, beta1, rest1, beta2, rest2 = row
        here, blocks = slice(begin, begin + n), slice(begin // BLOCK, (begin + n) // BLOCK)
        m, v, x = scratch.m[:n], scratch.v[:n], scratch.x[:n]
        _decode(code1[here], absmax1[blocks], m, scratch.half, True)
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
            _decode(code2[here], absmax2[blocks], v, scratch.half, False)
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
        _encode(m, code1[here], absmax1[blocks], scratch, True)
        if code2 is not None and absmax2 is not None:
            _encode(v, code2[here], absmax2[blocks], scratch, False)
