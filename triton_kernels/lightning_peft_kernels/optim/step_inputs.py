"""Inputs of one optimizer step over a pool of 8-bit state; see `adamw_8bit` for the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PooledStep", "rows_on"]


def rows_on(
    device: torch.device, rows: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype
) -> Tensor:
    """Return rows of numbers as a tensor on the device; the host does not wait for the copy.

    A copy from pinned memory runs on the stream; torch keeps that memory until then.
    """
    on_host = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class PooledStep(NamedTuple):
    """Tensors of one step, all on one device, in the order of the op's arguments.

    Attributes:
        params: Contiguous, of one dtype, none of them empty.
        grads: In the shapes of `params`, of one dtype.
        starts: First element of each tensor in the pool, a multiple of 256.
        hyper: fp32 [T, 7], one row per tensor.
        code1: Codes of the first moment, uint8 [pool].
        absmax1: Scales of the first moment, fp32 [pool / 256].
        code2: Codes of the second moment; None for Lion.
        absmax2: Scales of the second moment; None for Lion.
        grad_scale: fp32 scalar that divides the gradients; None for 1.
        found_inf: fp32 scalar; if it is not 0, the step changes nothing.
        maximize: If True, ascend.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    starts: Sequence[int]
    hyper: Tensor
    code1: Tensor
    absmax1: Tensor
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    maximize: bool = False
