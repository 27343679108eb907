"""Weights that torch.nn.utils.prune held in two parts when a checkpoint was written.

A run that resumes has the plain weights at first: pruning starts at its own epoch. The file is read
into the same two parts that it was written from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_peft.core.names import join, strip_compile

__all__ = ["masked_as_stored"]


@contextmanager
def masked_as_stored(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Split the live weights that a state holds as ``<name>_orig`` and ``<name>_mask``.

    Masks start at one. If the block raises, the weights are plain again.
    """
    split: list[tuple[nn.Module, str]] = []
    for path, owner in list(model.named_modules()):
        for name in [n for n, p in owner._parameters.items() if p is not None]:
            key = strip_compile(join(path, name))
            if f"{key}_orig" in state and isinstance(state.get(f"{key}_mask"), Tensor):
                mask = torch.ones_like(owner.get_parameter(name))
                prune.custom_from_mask(owner, name, mask)
                split.append((owner, name))
    try:
        yield
    except BaseException:
        for owner, name in split:
            prune.remove(owner, name)
        raise
