"""Buffers that a block's forward changes, which a second forward must not change again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Restored", "buffer_versions", "check_unchanged", "running_statistics"]


def buffer_versions(block: nn.Module) -> list[tuple[Tensor, int]]:
    """Return each buffer of a block with its version."""
    return [(buffer, buffer._version) for buffer in block.buffers()]


def running_statistics(block: nn.Module) -> list[Tensor]:
    """Return the statistics that normalisations update in train mode.

    They do not enter the output of the same forward, so that a second one may run with any values.
    """
    return [
        buffer
        for module in block.modules()
        if isinstance(module, _NormBase) and module.training
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def check_unchanged(block: nn.Module, before: list[tuple[Tensor, int]], name: str) -> None:
    """Raise RuntimeError if a forward changed buffers that are no running statistics.

    Its output may depend on them, and a second forward would change them again.
    """
    changed = {id(buffer) for buffer, version in before if buffer._version != version}
    if not changed:
        return
    changed -= {id(buffer) for buffer in running_statistics(block)}
    others = [f"{name}.{key}" for key, buffer in block.named_buffers() if id(buffer) in changed]
    if others:
        raise RuntimeError(
            f"activations='checkpoint' on {name!r}: expected a block whose forward changes no "
            f"buffers but running statistics of a normalisation, found that it changed {others}, "
            "and the second run in backward would change them again; name other blocks in "
            "Activations(blocks=[...]), or use 'offload'"
        )


class Restored:
    """A context, entered any number of times, that gives buffers their values back at its end."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._kept: list[list[Tensor]] = []

    def __enter__(self) -> None:
        self._kept.append([buffer.clone() for buffer in self._buffers])

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._kept.pop(), strict=True):
                buffer.copy_(value)
