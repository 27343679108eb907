"""Bytes of the tensor storages that live during a run, by label."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_peft.models.modules import head_names

__all__ = ["ACTIVATIONS", "BACKWARD", "GRADIENTS", "LOGITS", "Meter", "labelled"]

ACTIVATIONS, LOGITS = "activations", "logits and loss"
BACKWARD, GRADIENTS = "backward", "gradients"


class Meter(TorchDispatchMode):
    """Sums the storages made under it while they live, by the label in force when they were made.

    Args:
        uncounted: Labels that do not decide which moment is the fullest, and are left out of it.
    """

    def __init__(self, uncounted: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase = "forward"
        self._known: dict[int, tuple[object, str, int]] = {}
        self._uncounted = set(uncounted)
        self._total = 0
        self._highest: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the op and count what it made."""
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._count(t)
        return out

    def know(self, tensor: Tensor) -> None:
        """Leave a tensor made before out of the count."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (storage, "", 0)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage under `label` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known and self._known[key][1]:
            ref, old, n = self._known[key]
            self._add(old, -n)
            self._known[key] = (ref, label, n)
            self._add(label, n)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            entry = self._known.pop(key, None)
            if entry is not None:
                self._add(entry[1], -entry[2])

        self._known[key] = (weakref.ref(storage, gone), self.label, storage.nbytes())
        self._add(self.label, storage.nbytes())

    def _add(self, label: str, n: int) -> None:
        self.live[label] += n
        if label in self._uncounted:
            return
        self._total += n
        if self._total > self._highest[self.phase]:
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = Counter(
                {k: v for k, v in self.live.items() if k not in self._uncounted}
            )


@contextmanager
def labelled(net: nn.Module, meter: Meter) -> Iterator[None]:
    """Labels change where the output head begins, and where its gradient has come through."""
    heads = head_names(net)
    first = next((m for n, m in net.named_modules() if n in heads), None)

    def backward(_: Tensor) -> None:
        meter.label = BACKWARD

    def enter(_: nn.Module, args: tuple[object, ...]) -> None:
        meter.label = LOGITS
        for t in args:
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(backward)

    handle = None if first is None else first.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
