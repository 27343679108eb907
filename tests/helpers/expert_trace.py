"""A record of every tensor that an operation produces, and of the operations' names."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Trace(TorchDispatchMode):
    """Operations within it, in forward and in backward.

    Attributes:
        ops: Names as ``aten::mm``, in order.
        produced: (name, numel, shape) of every tensor that an operation returned.
    """

    def __init__(self, held: Any) -> None:
        """`held`: tensors whose views are no new memory (the model's weights)."""
        super().__init__()
        self.ops: list[str] = []
        self.produced: list[tuple[str, int, tuple[int, ...]]] = []
        self._held = {t.untyped_storage().data_ptr() for t in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append(func.name())
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self._held:
                # A view's memory is that of what it looks at, not what it shows of it.
                self.produced.append((func.name(), t.numel(), tuple(t.shape)))
        return result

    def largest(self) -> tuple[str, int, tuple[int, ...]]:
        return max(self.produced, key=lambda entry: entry[1])
