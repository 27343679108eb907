"""Finds the placements of a method, by the method's kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from torch import nn

from lightning_peft.adapters.placement.blocks import find_block_placements
from lightning_peft.adapters.placement.copies import find_copy_placements
from lightning_peft.adapters.placement.placement import Placement
from lightning_peft.adapters.placement.prompts import find_prompt_placements
from lightning_peft.adapters.placement.routers import find_router_placements
from lightning_peft.adapters.placement.tokens import find_token_placements
from lightning_peft.adapters.placement.weights import find_weight_placements
from lightning_peft.methods.base import (
    BlockMethod,
    Method,
    RouterMethod,
    SelectMethod,
    SequenceMethod,
    WeightMethod,
)
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.models.target_modules import Selection

__all__ = ["find_placements"]


@singledispatch
def find_placements(
    method: Method, model: nn.Module
) -> tuple[Sequence[Placement], Selection | None]:
    """All placements of a method, and the selection by `target_modules` if it made one.

    Raises:
        ValueError: nothing matches, or the method has no meaning at a site that matched.
    """
    raise TypeError(
        f"{method.label}: expected a WeightMethod, BlockMethod, SequenceMethod or SelectMethod, "
        f"got {type(method).__mro__[1].__name__}; derive from one of the four"
    )


find_placements.register(WeightMethod, find_weight_placements)
find_placements.register(TrainableTokens, find_token_placements)
find_placements.register(BlockMethod, find_block_placements)
find_placements.register(SequenceMethod, find_prompt_placements)
find_placements.register(RouterMethod, find_router_placements)
find_placements.register(SelectMethod, find_copy_placements)
