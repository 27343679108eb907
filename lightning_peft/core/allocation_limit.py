"""Limits the tensors that numbers in a file can request before their shapes are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.core.modules import base_parameters

__all__ = ["AllocationLimit"]

#: Elements that are always allowed: 64 MB in fp32.
_ALWAYS = 1 << 24


class AllocationLimit(TorchDispatchMode):
    """Refuses to create tensors of more elements than the limit, before memory is taken.

    A rank of a billion in a config would otherwise fill the memory of the machine.
    """

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most

    @classmethod
    def for_loading(cls, model: nn.Module, tensors: Iterable[Any]) -> AllocationLimit:
        """Return the limit for an adapter of these tensors on this model."""
        file = sum(t.numel() for t in tensors if isinstance(t, Tensor))
        own = max((p.numel() for p in base_parameters(model).values()), default=0)
        return cls(max(_ALWAYS, 16 * file, 8 * own))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called for every operation; checks the sizes of tensors that it would create."""
        first = args[0] if args else None
        sizes = args[1] if isinstance(first, Tensor) and len(args) > 1 else first
        creates = not isinstance(first, Tensor) or func.overloadpacket.__name__.startswith("new_")
        if creates:
            self._check(sizes)
        return func(*args, **(kwargs or {}))

    def _check(self, sizes: object) -> None:
        given = [sizes] if isinstance(sizes, int) else sizes
        if not isinstance(given, list | tuple) or not all(type(n) is int for n in given):
            return
        if math.prod(given) > self.most:
            raise ValueError(
                f"adapter file: expected numbers that fit the tensors of the file and the model, "
                f"got a tensor of shape {list(given)}; nothing was loaded"
            )
