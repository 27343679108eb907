"""What one optimizer step over a pool of 8-bit state works on; `adamw_8bit` gives the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["PooledStep"]


class PooledStep(NamedTuple):
    """Tensors of one step, all on one device, in the order of the op's arguments."""

    #: Contiguous, of one dtype. None is empty.
    params: Sequence[Tensor]
    #: In the shapes of `params`, of one dtype.
    grads: Sequence[Tensor]
    #: First element of each tensor in the pool, a multiple of 256.
    starts: Sequence[int]
    #: fp32 [T, 7], a row for each tensor.
    hyper: Tensor
    #: uint8 [pool] and fp32 [pool / 256], the first moment.
    code1: Tensor
    absmax1: Tensor
    #: The second moment likewise; None for Lion.
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    #: fp32 scalar that gradients are divided by.
    grad_scale: Tensor | None = None
    #: fp32 scalar; nothing changes where it is not 0.
    found_inf: Tensor | None = None
    #: Ascend.
    maximize: bool = False
