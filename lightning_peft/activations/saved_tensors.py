"""Hooks that move the tensors which autograd saves in a block to host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_peft.activations.host_memory import HostCopy, HostMemory
from lightning_peft.layers.mixed_batch import Hooks, hooks_in_force, saves_for_recomputation

__all__ = ["moving_saved_tensors"]


class _Moved(NamedTuple):
    """A saved tensor in host memory.

    Attributes:
        copy: The tensor.
        memory: Who holds it.
        outer: What the hooks around the block made of the tensor in host memory.
        unpack: Their second half; None without such hooks.
    """

    copy: HostCopy
    memory: HostMemory
    outer: object
    unpack: Callable[[object], Tensor] | None


class _Stays(NamedTuple):
    """A saved tensor that stays where it is.

    Attributes:
        value: The tensor, or what the hooks around the block made of it.
        unpack: Their second half; None without such hooks.
    """

    value: object
    unpack: Callable[[object], Tensor] | None


@contextmanager
def moving_saved_tensors(
    memory: HostMemory, block: nn.Module, shared: Iterable[Tensor], min_bytes: int
) -> Iterator[None]:
    """Context in which saved tensors of at least `min_bytes` are moved to host memory.

    Parameters and buffers of the block stay, and so do tensors that overlap themselves. A tensor
    that several operations save is moved once. Hooks around the context get the tensor in host
    memory.

    Args:
        memory: Where tensors go.
        block: The block that runs inside the context.
        shared: Inputs that all blocks read, such as masks. They stay.
        min_bytes: Size of the smallest tensor that is moved.
    """
    pack = _Pack(memory, block, shared, min_bytes)
    try:
        with saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        pack.close()  # autograd holds the hook as long as the graph


class _Pack:
    """The hook of one call of a block."""

    def __init__(
        self, memory: HostMemory, block: nn.Module, shared: Iterable[Tensor], min_bytes: int
    ) -> None:
        self._memory = memory
        self._min_bytes = min_bytes
        self._outer: Hooks | None = hooks_in_force()
        self._group = memory.begin()
        # Under FSDP2 these are the gathered parameters: the block's forward runs inside its hooks.
        stay = [*block.parameters(), *block.buffers(), *shared]
        self._stay = {_storage(t) for t in stay if _is_plain(t)}
        #: Copies by storage, offset, shape and version. The tensors are held while the block runs.
        self._copies: dict[tuple[object, ...], tuple[Tensor, HostCopy]] = {}

    def close(self) -> None:
        """Let go of the tensors."""
        self._copies.clear()
        self._stay.clear()
        self._memory.end()

    def __call__(self, tensor: Tensor) -> object:
        pack, unpack = self._outer or (None, None)
        if not self._moves(tensor):
            # A tensor that holds its own node would keep the graph alive.
            kept = tensor if tensor.is_leaf else tensor.detach()
            return _Stays(kept if pack is None else pack(kept), unpack)
        key = (
            *(_storage(tensor), tensor.storage_offset(), tensor._version),
            *(tuple(tensor.shape), tensor.stride(), tensor.dtype),
        )
        if key not in self._copies:
            self._copies[key] = tensor.detach(), self._memory.put(tensor, self._group)
        copy = self._copies[key][1]
        copy.uses += 1
        copy.left += 1
        if pack is None:
            return _Moved(copy, self._memory, None, None)
        if saves_for_recomputation(self._outer) and tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)  # these hooks may read the values at once
        return _Moved(copy, self._memory, pack(copy.host), unpack)

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.nbytes < self._min_bytes or not _is_plain(tensor):
            return False
        if isinstance(tensor, nn.Parameter) or _storage(tensor) in self._stay:
            return False
        return tensor.nbytes <= tensor.untyped_storage().nbytes()  # else it is expanded


def _unpack(saved: object) -> Tensor:
    assert isinstance(saved, _Moved | _Stays)  # made by `_Pack`
    if isinstance(saved, _Stays):
        found = saved.value if saved.unpack is None else saved.unpack(saved.value)
        assert isinstance(found, Tensor)
        return found
    if saved.unpack is not None:
        saved.unpack(saved.outer)
    return saved.memory.get(saved.copy)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def _storage(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found
