"""Selects how few or many tokens meet a packed weight, and whether layers are multiplied as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_peft_kernels.chips import CHIPS, WIDE, chip_of, tile_rows, why_no_tile
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, fastest, select
from lightning_peft_kernels.launch import FAILURES
from lightning_peft_kernels.nf4.bf16_cpu import MOST_TOKENS, has_bf16_product
from lightning_peft_kernels.nf4.bitsandbytes_product import MOST_RULED, fused_tokens

__all__ = [
    "FEW_TOKENS",
    "PAIRS",
    "select_group",
    "select_pairs",
    "select_product",
    "small_batch_detail",
]

# Tokens up to which a matrix-vector kernel multiplies, on any chip and in any dtype. Without
# bitsandbytes, whose rule for the chip decides otherwise, these are the only tokens for which
# decoding in the product is known to pay: that rule begins at four on every chip.
FEW_TOKENS = 4
#: Name of the kernel that looks pairs of codes up, of the op ``nf4_small_batch``.
PAIRS = "pairs"
_PAIR_TOKENS = 8
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
    *,
    kind: str = "nf4",
    exact: bool = True,
) -> Decision:
    """Select how x [tokens, K] is multiplied by a packed W [N, K].

    ``"fused"`` decodes W in our product, ``"bitsandbytes"`` in its kernel, ``"dequantize"`` writes
    W first. bitsandbytes' own rule for the chip decides between the last two. Ours runs if it is
    requested, and up to `FEW_TOKENS` without bitsandbytes. ``"bf16"`` is bitsandbytes' kernel for
    CPUs with AVX512-BF16, whose scales are bf16.

    Args:
        device: Device of x.
        dtype: Dtype of x.
        tokens: Rows of x.
        shape: (N, K).
        backend: Requested backend; default `current_backend()`.
        block_size: Elements per scale.
        kind: ``"nf4"`` or ``"fp4"``.
        exact: If False, scales may be rounded to bf16; only where no gradient is needed.
    """
    requested = backend or current_backend()
    chip = None if FAILURES or torch.compiler.is_compiling() else CHIPS.get(device)
    if chip is None:
        return _select_product(
            device, dtype, tokens, shape, requested, block_size, kind=kind, exact=exact
        )
    # Neither kind nor exactness decides anything on a chip.
    question = "product", device, dtype, tokens, tuple(shape), requested, block_size
    known: Decision | None = chip.decisions.get(question)
    if known is None:
        known = _select_product(
            device, dtype, tokens, shape, requested, block_size, kind=kind, exact=exact
        )
        chip.remember(question, known)
    return known


def _select_product(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    requested: Backend,
    block_size: int,
    *,
    kind: str,
    exact: bool,
) -> Decision:
    if requested == "torch":
        return Decision("dequantize", "requested")
    if requested == "auto":
        if chip_of(device) is None:
            return _without_chip(device, dtype, tokens, shape, block_size, kind, exact)
        if tokens > MOST_RULED:  # the usual step of training: no race and no rule goes so far
            return Decision("dequantize", f"{tokens} tokens, decoding pays at most to {MOST_RULED}")
        raced = fastest("product", device, dtype, shape, tokens) if block_size == 64 else None
        if raced is not None and _still_runs(raced, device, dtype, tokens):
            return raced
        most = fused_tokens(device, dtype, shape, block_size)
        if most is not None:
            reason = f"{tokens} tokens, bitsandbytes' rule for this chip and shape ends at {most}"
            return Decision("bitsandbytes" if 1 <= tokens <= most else "dequantize", reason)
        if not _is_decodable(tokens, shape):
            return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}")
    base = select("nf4_small_batch", device, dtype, requested, small_batch_detail(tokens))
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if requested == "triton" and not _is_decodable(tokens, shape):
        return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}")
    if dtype.itemsize > 2 and tokens > FEW_TOKENS:
        return Decision("dequantize", f"{tokens} tokens, {dtype}: {WIDE}")
    if tokens <= FEW_TOKENS:
        return Decision("fused", f"{tokens} tokens")
    if requested != "triton":
        return Decision("dequantize", f"{tokens} tokens, decoding pays up to {FEW_TOKENS}")
    why = why_no_tile(device, tile_rows(tokens))
    return Decision("dequantize", why) if why else Decision("fused", "requested")


def _is_decodable(tokens: int, shape: Sequence[int]) -> bool:
    """Whether our kernels take so many tokens and such rows."""
    return 1 <= tokens <= _MOST_TOKENS and not shape[1] % 8


def select_pairs(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    backend: Backend | None = None,
    block_size: int = 64,
) -> Decision:
    """Select ``"pairs"`` if the kernel with the table of pairs takes x [tokens, K] and W [N, K].

    `select_product` chooses it only where `check --tune` found it fastest.
    """
    base = select("nf4_small_batch", device, dtype, backend, PAIRS)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    chip = chip_of(device)
    if chip is not None and chip.no_matrix:
        return Decision("dequantize", f"{chip.name}: {chip.no_matrix}")
    if not 1 <= tokens <= _PAIR_TOKENS or shape[1] % block_size or dtype.itemsize != 2:
        return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}, {dtype}")
    return Decision("pairs", base.reason)


def _without_chip(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    block_size: int,
    kind: str,
    exact: bool,
) -> Decision:
    """Select on a CPU and on devices without kernels of ours."""
    if (
        not exact
        and device.type == "cpu"
        and dtype == torch.bfloat16
        and has_bf16_product(shape, kind, block_size)
    ):
        raced = fastest("product", device, dtype, shape, tokens) if block_size == 64 else None
        if raced is not None:
            return raced
        if 1 <= tokens <= MOST_TOKENS:
            return Decision("bf16", f"{tokens} tokens, AVX512-BF16: bf16 scales")
    return Decision("dequantize", f"{device.type} tensors")


def _still_runs(raced: Decision, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the winner of a race is not a kernel of ours that failed since."""
    if raced.backend not in ("fused", "pairs"):
        return True
    detail = PAIRS if raced.backend == "pairs" else small_batch_detail(tokens)
    return select("nf4_small_batch", device, dtype, "auto", detail).backend == "triton"


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
    sizes = [*(int(N) for N, _ in shapes), int(shapes[0][1])]
    raced = fastest("group", device, dtype, sizes, tokens or 1 << 20)
    if raced is not None:
        return raced
    alone = [select_product(device, dtype, tokens or 1 << 20, shape) for shape in shapes]
    if any(decision.backend in ("fused", "bitsandbytes") for decision in alone):
        return Decision("apart", f"{tokens} tokens: each product decodes its own weight")
    return Decision("grouped", f"{len(shapes)} layers over one input, one product")
