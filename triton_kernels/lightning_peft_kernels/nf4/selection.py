"""Selects how few or many tokens meet a packed weight, and whether layers are multiplied as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_peft_kernels.chips import WIDE, chip_of, tile_rows, why_no_tile
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, select
from lightning_peft_kernels.nf4.bitsandbytes_product import fused_tokens

__all__ = ["FEW_TOKENS", "select_group", "select_product", "small_batch_detail"]

# Tokens up to which a matrix-vector kernel multiplies, on any chip and in any dtype. Without
# bitsandbytes, whose rule for the chip decides otherwise, these are the only tokens for which
# decoding in the product is known to pay: that rule begins at four on every chip.
FEW_TOKENS = 4
# Tokens up to which our kernels decode in the product at all.
_MOST_TOKENS = 64
# q, k, v and gate, up of a Llama block of width 1024, 16 to 1,024 tokens, forward and backward: as
# one product 0.94 to 1.16 of the time (benchmarks/cpu/projections.py, 2026-11-21).
GROUPED_ON_CPU = "no faster as one product"


def small_batch_detail(tokens: int) -> str:
    """Name the kernel that decodes a weight for so many tokens."""
    return f"{tile_rows(tokens)} rows" if tokens > FEW_TOKENS else "few rows"


def select_product(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    backend: Backend | None = None,
    block_size: int = 64,
) -> Decision:
    """Select how x [tokens, K] is multiplied by a packed W [N, K].

    ``"fused"`` decodes W in our product, ``"bitsandbytes"`` in its kernel, ``"dequantize"`` writes
    W first. bitsandbytes' own rule for the chip decides between the last two. Ours runs if it is
    requested, and up to `FEW_TOKENS` without bitsandbytes.
    """
    requested = backend or current_backend()
    base = select("nf4_small_batch", device, dtype, requested, small_batch_detail(tokens))
    if requested == "torch":
        return Decision("dequantize", base.reason)
    most = fused_tokens(device, dtype, shape, block_size) if requested == "auto" else None
    if most is not None:
        reason = f"{tokens} tokens, bitsandbytes' rule for this chip and shape ends at {most}"
        return Decision("bitsandbytes" if 1 <= tokens <= most else "dequantize", reason)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if not 1 <= tokens <= _MOST_TOKENS or shape[1] % 8:
        return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}")
    if dtype.itemsize > 2 and tokens > FEW_TOKENS:
        return Decision("dequantize", f"{tokens} tokens, {dtype}: {WIDE}")
    if tokens <= FEW_TOKENS:
        return Decision("fused", f"{tokens} tokens")
    if requested != "triton":
        return Decision("dequantize", f"{tokens} tokens, decoding pays up to {FEW_TOKENS}")
    why = why_no_tile(device, tile_rows(tokens))
    return Decision("dequantize", why) if why else Decision("fused", "requested")


def select_group(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int | None,
    shapes: Sequence[Sequence[int]],
) -> Decision:
    """Select ``"grouped"`` or ``"apart"`` for packed layers [N_i, K] that share x [tokens, K].

    Args:
        device: Device of x.
        dtype: Dtype of x.
        tokens: Rows of x; None before a call.
        shapes: (N_i, K) of each layer.
    """
    if chip_of(device) is None:
        return Decision("apart", f"{device.type}: {GROUPED_ON_CPU}")
    alone = [select_product(device, dtype, tokens or 1 << 20, shape) for shape in shapes]
    if any(decision.backend in ("fused", "bitsandbytes") for decision in alone):
        return Decision("apart", f"{tokens} tokens: each product decodes its own weight")
    return Decision("grouped", f"{len(shapes)} layers over one input, one product")
