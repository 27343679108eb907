"""Triton kernels of an output scale per column: one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "backward", "forward"]

_ROWS, _COLUMNS = 8, 256  # 16 bytes per lane and step of bf16 at 4 warps
_STEPS = 16  # steps of rows per program of backward: one partial sum per 128 rows


@triton.jit
def _forward_kernel(
    u_ptr,
    g_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = u ∘ g + bias in fp32, rounded once; u, y [M, N] contiguous."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = n < N
    inside = (m < M)[:, None] & here[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    g = tl.load(g_ptr + n, mask=here, other=0.0).to(tl.float32)
    y = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32) * g[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=here, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dY_ptr,
    u_ptr,
    g_ptr,
    du_ptr,
    dg_ptr,
    dbias_ptr,
    M,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """du = dY ∘ g; dg, dbias [row blocks, N] fp32 partial sums of dY ∘ u and dY."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = n < N
    g = tl.load(g_ptr + n, mask=here, other=0.0).to(tl.float32)
    dg = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        m = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (m < M)[:, None] & here[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        d = tl.load(dY_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(du_ptr + at, (d * g[None, :]).to(du_ptr.dtype.element_ty), mask=inside)
        dg += tl.sum(d * u, axis=0)
        dbias += tl.sum(d, axis=0)
    row = tl.program_id(1).to(tl.int64) * N
    tl.store(dg_ptr + row + n, dg, mask=here)
    tl.store(dbias_ptr + row + n, dbias, mask=here)


def forward(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``u ∘ g + bias`` of a contiguous u [M, N]."""
    M, N = u.shape
    y = torch.empty_like(u)
    grid = (triton.cdiv(N, _COLUMNS), triton.cdiv(M, _ROWS))
    if y.numel():
        launch(
            _forward_kernel, grid, u, g, g if bias is None else bias, y, M, N,
            HAS_BIAS=bias is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return y


def backward(dY: Tensor, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (du, dg, dbias) of contiguous dY and u [M, N]; sums in fp32, in a fixed order."""
    M, N = u.shape
    du = torch.empty_like(u)
    blocks = max(triton.cdiv(M, _ROWS * _STEPS), 1)
    sums = torch.empty(2, blocks, N, dtype=torch.float32, device=u.device)
    if N:
        launch(
            _backward_kernel, (triton.cdiv(N, _COLUMNS), blocks),
            dY, u, g, du, sums[0], sums[1], M, N,
            ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=4,
        )  # fmt: skip
    dg, dbias = sums.sum(1).unbind(0)
    return du, dg.clone(), dbias.clone()


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    for dtype in ("bf16", "fp16"):
        t, fast = f"*{dtype}", dtype == "bf16"
        constexprs: dict[str, Any] = {"HAS_BIAS": True, **tile}
        name = f"output scale {dtype}"
        types = [t, t, t, t, "i32", "i32"]
        specs.append(spec(name, _forward_kernel, types, constexprs, fast=fast))
        types = [t, t, t, t, "*fp32", "*fp32", "i32", "i32"]
        name = f"output scale backward {dtype}"
        specs.append(spec(name, _backward_kernel, types, {**tile, "STEPS": _STEPS}, fast=fast))
    return specs
