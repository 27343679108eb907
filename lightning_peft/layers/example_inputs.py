"""Random inputs on which a layer's output is compared before and after a merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["random_inputs"]


def random_inputs(
    m: nn.Module, dtype: torch.dtype, *shapes: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """Return normal values of these shapes on the module's device; None on meta or in shards.

    They come from a generator of their own, so that no other draw changes.
    """
    weight = next(m.parameters(), None)
    if weight is None or weight.device.type == "meta" or hasattr(weight, "to_local"):
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for shape in shapes]
    return tuple(x.to(weight.device, dtype) for x in drawn)
