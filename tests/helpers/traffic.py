"""Bytes that torch's operations read and write: what a step costs where memory is the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic"]

#: Views that autograd does not know as views, and memory that is not written.
_NO_TRAFFIC = ("_unsafe_view", "unsafe_split_with_sizes", "empty", "new_empty", "empty_like")


class Traffic(TorchDispatchMode):
    """Counts bytes of the operands and results of every operation that is no view.

    Attributes:
        bytes: Bytes read and written so far.
        calls: Calls by name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
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
        if not func.is_view and name not in _NO_TRAFFIC:
            read = {key: value for key, value in options.items() if key != "out"}
            self.bytes += _bytes(args) + _bytes(read) + _bytes(result)
            self.calls[name] += 1
        return result


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
