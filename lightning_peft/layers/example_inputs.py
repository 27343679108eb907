"""Random inputs on which a layer's output is compared before and after a merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.pruning_masks import held
from lightning_peft.storage.nf4.packed_layer import Packed4bitModule

__all__ = ["has_own_forward", "is_comparable", "random_inputs"]

_DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def has_own_forward(m: nn.Module) -> bool:
    """Whether the class underneath computes by code of its own, such as a mask on the weight."""
    cls = base_class(m)
    return cls.__name__ != "Conv1D" and not cls.forward.__module__.startswith("torch.nn.")


def is_comparable(m: nn.Module) -> bool:
    """Whether the layer computes from the values of its weight, by whatever code.

    Layers of other libraries' formats also round their input, so that a dense weight computes
    something else.
    """
    if not has_own_forward(m):
        return True
    if isinstance(m, Packed4bitModule):
        return not base_class(m).__module__.startswith("bitsandbytes.")
    return held(m, "weight").dtype in _DENSE


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
