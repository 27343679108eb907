"""Keys and values of a complete sequence, gathered from the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft.layers.mixed_batch import hooks_in_force

__all__ = ["gather_sequence", "saving_parts"]

# torch 2.13 renamed the two.
_Collective = Callable[..., object]
_all_gather: _Collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: _Collective = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class _GatherContext(FunctionCtx):
    """Context of `_Gather`: the values that forward saves for backward."""

    group: dist.ProcessGroup
    shape: torch.Size


class _Gather(torch.autograd.Function):
    """[B, H, S/c, D] of every rank → [c, B, H, S/c, D]; backward sums the ranks' gradients."""

    @staticmethod
    def forward(ctx: _GatherContext, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        size = dist.get_world_size(group)
        out = x.new_empty((size * x.shape[0], *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=group)
        return out.view(size, *x.shape)

    @staticmethod
    def backward(ctx: _GatherContext, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].flatten(0, 1).contiguous()
        out = grad.new_empty(ctx.shape)
        _reduce_scatter(out, grad, group=ctx.group)
        return out, None


def gather_sequence(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, H, S/c, D] of every rank → [B, H, S, D] on each."""
    gather: Callable[..., Tensor] = _Gather.apply
    parts = gather(part, group)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Complete:
    """The complete tensors of one layer, formed again in backward.

    All ranks gather them in the order given here, whichever autograd asks for first.
    """

    def __init__(self, forms: Sequence[Callable[[], Tensor]]) -> None:
        self._forms = forms
        self._formed: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        """Return one of the tensors, and hold the others until they are taken."""
        if index not in self._formed:
            with torch.no_grad():
                self._formed = {i: form() for i, form in enumerate(self._forms)}
        return self._formed.pop(index)


class _View(NamedTuple):
    """A saved tensor that is a view of a complete one."""

    complete: _Complete
    place: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def saving_parts(formed: Sequence[tuple[Tensor, Callable[[], Tensor]]]) -> Iterator[None]:
    """Context in which autograd saves no complete sequence; backward gathers it once more.

    Without it, every layer would keep keys and values of all tokens. Inside checkpointed or
    offloaded blocks nothing changes: they save no such tensors, or move them.

    Args:
        formed: Complete tensors, and how each is formed again.
    """
    if hooks_in_force() is not None:
        yield
        return
    complete = _Complete([form for _, form in formed])
    known = {t.untyped_storage()._cdata: i for i, (t, _) in enumerate(formed)}

    def pack(t: Tensor) -> object:
        index = known.get(t.untyped_storage()._cdata)
        if index is None:  # a tensor that holds its own node would keep the graph alive
            return t if t.is_leaf else t.detach()
        stride = tuple(int(n) for n in t.stride())
        return _View(complete, index, t.shape, stride, int(t.storage_offset()))

    with saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(saved: object) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    assert isinstance(saved, _View)  # made by `pack`
    return saved.complete.take(saved.place).as_strided(saved.shape, saved.stride, saved.offset)
