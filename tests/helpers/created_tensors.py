"""Which functions make tensors of Python numbers: on a GPU, a copy for which the host waits.

``torch.tensor(3.0, device="cuda")`` makes the tensor on the host and copies it; a scalar operand or
``torch.full`` needs no copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CreatedTensors"]

#: What `torch.tensor` and `as_tensor` call at their end, and what reads a number back.
_MADE, _READ = "aten::lift_fresh", "aten::_local_scalar_dense"
_PACKAGES = ("lightning_peft", "lightning_peft_kernels")


class CreatedTensors(TorchDispatchMode):
    """Records the functions of our packages that make a tensor of numbers, or read one back.

    Attributes:
        made: Names of the innermost functions that made one, as ``module.function``.
        read: Names of those that read one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: set[str] = set()
        self.read: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in (_MADE, _READ):
            ours = next(_of_our_packages(sys._getframe(1)), "")
            if ours:
                (self.made if name == _MADE else self.read).add(ours)
        return func(*args, **(kwargs or {}))


def _of_our_packages(frame: FrameType | None) -> Iterator[str]:
    """Yield the functions of our packages on the stack, innermost first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _PACKAGES:
            yield f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
