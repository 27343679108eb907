"""Bytes that torch's operations read and write: what a step costs where memory is the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic", "bytes_of"]

#: Views that autograd does not know as views, and memory that is not written.
_NO_TRAFFIC = ("_unsafe_view", "unsafe_split_with_sizes", "empty", "new_empty", "empty_like")


class Traffic(TorchDispatchMode):
    """Counts bytes of the operands and results of every operation that is no view.

    Args:
        apart: Namespace of operations that are not counted, as their kernels are.

    Attributes:
        bytes: Bytes read and written so far.
        calls: Calls by name of the operation.
    """

    def __init__(self, apart: str = "") -> None:
        super().__init__()
        self.apart, self.bytes = apart, 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        name = func._schema.name.partition("::")[2]
        counts = not func.is_view and name not in _NO_TRAFFIC
        if counts and func.namespace != self.apart:
            read = {key: value for key, value in options.items() if key != "out"}
            self.bytes += bytes_of(args) + bytes_of(read) + bytes_of(result)
            self.calls[name] += 1
        return result


def bytes_of(value: Any) -> int:
    """Return the bytes of all tensors in a structure."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0
