"""Selects how grouped rows meet packed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_peft_kernels.chips import WIDE, tile_rows, why_no_tile
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, fastest, select

__all__ = ["EXPERT_ROWS", "experts_detail", "select_experts"]

# Mean rows per expert up to which the grouped product decodes packed experts on the fly. Not
# measured; arithmetic for an H200 (4.3 TB/s, 790 TFLOP/s). Dequantising moves 4.5 bytes per weight:
# 1.05 ps. Decoding takes 16 instructions per weight and tile of 64 rows, 0.55 ps, and the product
# then runs at half the library's rate. Both cost the same near 128 rows; half of that leaves room
# for effects that the sum omits.
EXPERT_ROWS = 64


def select_experts(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    experts: int,
    shape: Sequence[int],
    backend: Backend | None = None,
) -> Decision:
    """Select ``"fused"`` or ``"dequantize"`` for grouped rows times packed W [experts, N, K].

    The decision uses the mean number of rows per expert: only the device knows how rows spread.
    """
    mean, tile = rows / experts, tile_rows(2 * rows // experts)
    base = select("nf4_grouped_linear", device, dtype, backend, experts_detail(rows, experts))
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if shape[1] % 2 or dtype.itemsize > 2:
        why = f"K = {shape[1]}" if shape[1] % 2 else f"{dtype}: {WIDE}"
        return Decision("dequantize", why)
    why = why_no_tile(device, tile)
    if why:
        return Decision("dequantize", why)
    if (backend or current_backend()) == "auto":
        raced = fastest("experts", device, dtype, shape, -(-rows // experts))
        if raced is not None:
            return raced
    reason = f"{mean:.0f} rows per expert, crossing {EXPERT_ROWS} (by arithmetic, not measured)"
    return Decision("fused" if mean <= EXPERT_ROWS else "dequantize", reason)


def experts_detail(rows: int, experts: int) -> str:
    """Name the kernel that multiplies so many rows by so many experts."""
    return f"tiles of {tile_rows(2 * rows // experts)} rows"
