"""Parts of K: how small-batch products cut K, and the kernel that adds the parts.

The parts are fp32 [parts, M, N]. They are added in order, so runs repeat bit for bit; the low-rank
term and the bias follow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["add_parts", "aot_specs", "cut_in_parts"]


def cut_in_parts(
    size: int, step: int, columns: int, *, programs: int, most: int
) -> tuple[int, int]:
    """Return (length of a part, parts) of `size`.

    Args:
        size: What is cut.
        step: Parts are multiples of it.
        columns: Programs per part.
        programs: Programs in all parts together, to be reached if possible.
        most: Largest number of parts.
    """
    steps = -(-size // step)
    parts = max(1, min(most, steps, programs // max(columns, 1)))
    length = -(-steps // parts) * step
    return length, -(-size // length)


@triton.jit
def _epilogue_kernel(
    part_ptr,
    S_ptr,
    B_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    parts,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[m, n] = Σ_p part[p, m, n] + Σ_r S[m, r] B[n, r] + bias[n]; R = 0 without a low rank."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1)
    inside = n < N
    sum = tl.zeros((BLOCK_N,), tl.float32)
    for p in range(parts):
        sum += tl.load(part_ptr + (p * M + m) * N + n, mask=inside, other=0.0)
    for start in tl.static_range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        s = tl.load(S_ptr + m * R + r, mask=r < R, other=0.0).to(tl.float32)
        taken = inside[:, None] & (r < R)[None, :]
        b = tl.load(B_ptr + n[:, None] * R + r[None, :], mask=taken, other=0.0).to(tl.float32)
        sum += tl.sum(b * s[None, :], axis=1)
    if HAS_BIAS:
        sum += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, sum.to(y_ptr.dtype.element_ty), mask=inside)


def add_parts(
    part: Tensor, dtype: torch.dtype, S: Tensor | None, B: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return y [M, N] = Σ part [parts, M, N] + S Bᵀ + bias, the parts in order."""
    parts, M, N = part.shape
    y = torch.empty(M, N, dtype=dtype, device=part.device)
    R = 0 if S is None else S.shape[1]
    # The kernel reads rows without gaps. It does not read `part` in the place of an absent tensor.
    S = part if S is None else S.contiguous()
    B = part if B is None else B.contiguous()
    b = part if bias is None else bias.contiguous()
    launch(
        _epilogue_kernel, (triton.cdiv(N, 128), M),
        part, S, B, b, y, M, N, parts,
        R=R, BLOCK_R=16, HAS_BIAS=bias is not None, BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    return y


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    types = ["*fp32", "*bf16", "*bf16", "*bf16", "*bf16", "i32", "i32", "i32"]
    for R in (16, 256):
        tile = {"R": R, "BLOCK_R": 16, "HAS_BIAS": True, "BLOCK_N": 128}
        specs.append(spec(f"decode epilogue r {R}", _epilogue_kernel, types, tile, fast=R == 16))
    return specs
