"""Selects how the two gradients of a low rank are computed."""

from __future__ import annotations

import torch

from lightning_peft_kernels.chips import CHIPS, WIDE, chip_of
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, fastest, select
from lightning_peft_kernels.launch import FAILURES

__all__ = ["rank_detail", "select_one_pass"]


def select_one_pass(
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    backend: Backend | None = None,
    op: str = "rank_gradients",
) -> Decision:
    """Select whether one pass over dY computes both gradients of a low rank.

    Args:
        device: Device of dY.
        dtype: Dtype of dY.
        rank: The rank.
        backend: Requested backend; default `current_backend()`.
        op: The op whose kernels run: of one layer, or of experts.
    """
    requested = backend or current_backend()
    chip = None if FAILURES or torch.compiler.is_compiling() else CHIPS.get(device)
    if chip is None:
        return _select_one_pass(device, dtype, rank, requested, op)
    question = op, device, dtype, rank, requested
    known: Decision | None = chip.decisions.get(question)
    if known is None:
        known = _select_one_pass(device, dtype, rank, requested, op)
        chip.remember(question, known)
    return known


def _select_one_pass(
    device: torch.device, dtype: torch.dtype, rank: int, backend: Backend, op: str
) -> Decision:
    base = select(op, device, dtype, backend, rank_detail(rank))
    chip = chip_of(device)
    if base.backend == "torch" or chip is None:
        return base
    if dtype.itemsize > 2:
        return Decision("torch", f"{dtype}: {WIDE}")
    if chip.no_matrix:
        return Decision("torch", f"{chip.name}: {chip.no_matrix}")
    if rank <= chip.one_pass_rank and backend == "auto":
        raced = fastest("rank_gradients", device, dtype, (16 if rank <= 16 else 32,), 0)
        if raced is not None and op == "rank_gradients":
            return raced
    if rank > chip.one_pass_rank:  # registers spill, or no time is saved
        return Decision("torch", f"rank {rank}, one pass up to {chip.one_pass_rank}")
    return base


def rank_detail(rank: int) -> str:
    """Name the kernel that computes the gradients of a low rank."""
    return f"rank up to {16 if rank <= 16 else 32}"
