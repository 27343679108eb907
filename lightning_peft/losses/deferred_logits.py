"""Logits that are computed when they are needed, and never if only a loss is.

An output head that defers returns hidden states with the head to run. What models do between head
and loss (slices, views, casts, scales, soft caps) is recorded. `torch.nn.functional.cross_entropy`
computes the loss chunk by chunk. Everything else computes the logits and goes on with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.losses.chunk_pass import Step
from lightning_peft.losses.token_loss import TokenLoss

__all__ = ["DeferredLogits", "LossHead"]

_Number = float  # the class has a method of that name


class LossHead(Protocol):
    """An output head that computes logits, or their loss.

    Attributes:
        vocabulary: Number of classes.
    """

    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [*, vocabulary] of hidden states [*, features]."""
        ...

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss: TokenLoss,
        reduction: str,
        steps: Sequence[Step],
    ) -> Tensor:
        """Return the loss of labels [*]."""
        ...


class DeferredLogits:
    """Logits [*, vocabulary] of hidden states [*, features], not computed yet.

    It takes part in torch functions and has the methods of a tensor. It is no `torch.Tensor`.

    Args:
        head: Computes logits and losses.
        hidden: Hidden states, with the axes that they had at the head.
        dtype: Dtype of the logits at this point.
        steps: What happened to the logits so far, row by row.
        shape: Leading axes at this point; None if they are those of `hidden`.
        class_axis: Axis of the classes: the last one, or 1 after a transposition.
    """

    def __init__(
        self,
        head: LossHead,
        hidden: Tensor,
        dtype: torch.dtype,
        steps: tuple[Step, ...] = (),
        shape: tuple[int, ...] | None = None,
        class_axis: int = -1,
    ) -> None:
        self._head, self._hidden, self._dtype, self._steps = head, hidden, dtype, steps
        self._lead = tuple(hidden.shape[:-1]) if shape is None else shape
        self._class_axis = class_axis
        self._real: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the logits as a tensor, computed once."""
        if self._real is None:
            real = self._head.logits(self._hidden)
            for step in self._steps:
                real = step(real)
            real = real.view(*self._lead, real.shape[-1])
            self._real = real if self._class_axis == -1 else real.movedim(-1, 1)
        return self._real

    # ---- what a tensor would say

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits."""
        vocabulary = self._head.vocabulary
        if self._class_axis == 1:
            return torch.Size((self._lead[0], vocabulary, *self._lead[1:]))
        return torch.Size((*self._lead, vocabulary))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self._hidden.device

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._lead) + 1

    def dim(self) -> int:
        """Return the number of axes."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one axis of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of logits."""
        return self.shape.numel()

    # ---- what is recorded

    def _with(self, step: Step, dtype: torch.dtype | None = None) -> DeferredLogits:
        return DeferredLogits(
            self._head,
            self._hidden,
            self._dtype if dtype is None else dtype,
            (*self._steps, step),
            self._lead,
            self._class_axis,
        )

    def _reshaped(self, lead: tuple[int, ...], class_axis: int = -1) -> DeferredLogits:
        return DeferredLogits(self._head, self._hidden, self._dtype, self._steps, lead, class_axis)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Cast, or compute the logits to move them to another device."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        others = [a for a in (*args, *kwargs.values()) if a is not dtype and a != self.device]
        if dtype is None or others:
            return self if not others else self.tensor().to(*args, **kwargs)
        return self._with(lambda z: z.to(dtype), dtype)

    def float(self) -> DeferredLogits | Tensor:
        """Cast to float32."""
        return self._with(lambda z: z.to(torch.float32), torch.float32)

    def contiguous(self) -> DeferredLogits:
        """Return the logits themselves."""
        return self

    def view(self, *shape: Any) -> DeferredLogits | Tensor:
        """Change the leading axes, or compute the logits for another view."""
        found = self._regrouped(shape)
        return self.tensor().reshape(*shape) if found is None else found

    def reshape(self, *shape: Any) -> DeferredLogits | Tensor:
        """Change the leading axes, or compute the logits for another shape."""
        found = self._regrouped(shape)
        return self.tensor().reshape(*shape) if found is None else found

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits | Tensor:
        """Join leading axes, or compute the logits to join others."""
        start, end = start_dim % self.ndim, end_dim % self.ndim
        if self._class_axis != -1 or end == self.ndim - 1:
            return self.tensor().flatten(start_dim, end_dim)
        joined = torch.Size(self._lead[start : end + 1]).numel()
        return self._reshaped((*self._lead[:start], joined, *self._lead[end + 1 :]))

    def transpose(self, dim0: int, dim1: int) -> DeferredLogits | Tensor:
        """Move the classes of [batch, tokens, classes] to axis 1, or compute the logits."""
        if self._class_axis == -1 and {dim0 % self.ndim, dim1 % self.ndim} == {1, 2} == {
            1,
            self.ndim - 1,
        }:
            return self._reshaped(self._lead, 1)
        return self.tensor().transpose(dim0, dim1)

    def permute(self, *dims: Any) -> DeferredLogits | Tensor:
        """Move the classes of [batch, tokens, classes] to axis 1, or compute the logits."""
        order = _sizes(dims)
        if self.ndim == 3 and order is not None and [d % 3 for d in order] == [0, 2, 1]:
            return self.transpose(1, 2)
        return self.tensor().permute(*dims)

    def _regrouped(self, shape: tuple[int | Sequence[int], ...]) -> DeferredLogits | None:
        """Return the logits with other leading axes; None if the classes are regrouped too."""
        sizes = _sizes(shape)
        if sizes is None or self._class_axis != -1:
            return None
        if not sizes or sizes[-1] not in (-1, self._head.vocabulary):
            return None
        tokens = torch.Size(self._lead).numel()
        lead = list(sizes[:-1])
        if -1 in lead:
            known = torch.Size([n for n in lead if n != -1]).numel()
            if sizes[-1] == -1 or not known or tokens % known:
                return None
            lead[lead.index(-1)] = tokens // known
        return self._reshaped(tuple(lead)) if torch.Size(lead).numel() == tokens else None

    def __getitem__(self, index: Any) -> Any:
        """Slice the leading axes, or compute the logits for another index."""
        whole = self._lead == tuple(self._hidden.shape[:-1]) and self._class_axis == -1
        parts = index if isinstance(index, tuple) else (index,)
        full = slice(None)
        if parts and parts[0] is Ellipsis and len(parts) <= self.ndim:
            parts = (*[full] * (self.ndim - len(parts) + 1), *parts[1:])
        rest = (*parts, *[full] * (self.ndim - len(parts)))
        if not whole or not all(isinstance(p, slice) for p in rest) or rest[-1] != full:
            return self.tensor()[index]
        if rest[0] != full and current_mixed_batch() is not None:
            return self.tensor()[index]  # adapters by row need every row
        hidden = self._hidden[rest[:-1]]
        return DeferredLogits(self._head, hidden, self._dtype, self._steps)

    # ---- everything else

    __hash__ = object.__hash__

    def __mul__(self, other: Tensor | _Number) -> Any:
        return self.__torch_function__(torch.mul, (), (self, other))

    __rmul__ = __mul__

    def __add__(self, other: Tensor | _Number) -> Any:
        return self.__torch_function__(torch.add, (), (self, other))

    __radd__ = __add__

    def __truediv__(self, other: Tensor | _Number) -> Any:
        return self.__torch_function__(torch.div, (), (self, other))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"DeferredLogits has no attribute {name!r}")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch functions: record, compute the loss, or compute the logits."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, DeferredLogits):
            if (
                func in (torch.mul, torch.div)
                and len(args) == 2
                and not kwargs
                and _is_number(args[1])
            ):
                other = args[1]
                return first._with(lambda z: func(z, other))
            if func is torch.add and len(args) == 2 and not kwargs:
                other = first._per_class(args[1])
                if other is not None:
                    return first._with(lambda z: z + other)
            if func is torch.tanh and not kwargs:
                return first._with(torch.tanh)
            if func is F.cross_entropy:
                found = first._cross_entropy(
                    *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
                )
                if found is not None:
                    return found
        return func(*_tensors(args), **_tensors(kwargs))

    def _per_class(self, value: object) -> Any:
        """Return a number, or a tensor as [vocabulary]; None if it differs between tokens."""
        if _is_number(value):
            return value
        if isinstance(value, Tensor) and value.numel() == self._head.vocabulary == value.shape[-1]:
            return value.reshape(-1)
        return None

    def _cross_entropy(
        self,
        target: object = None,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: _Number = 0.0,
    ) -> Tensor | None:
        """Return the loss; None for targets that are no class indices, or older arguments."""
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            return None
        flat = len(self._lead) == 1 or self._class_axis == 1
        if not flat or tuple(target.shape) != self._lead or (size_average, reduce) != (None, None):
            return None
        loss = TokenLoss(ignore_index, label_smoothing, None if weight is None else weight.float())
        labels = target.reshape(self._hidden.shape[:-1])
        found = self._head.loss(self._hidden, labels, loss, reduction, self._steps)
        return found.view(self._lead) if reduction == "none" else found


#: Operators that compute the logits. Python looks them up on the class.
_OPERATORS = (
    *("sub", "rsub", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul"),
    *("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert"),
    *("len", "iter", "bool", "int", "float", "contains", "array"),
)


def _operator(name: str) -> Callable[..., Any]:
    def run(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor(), name)(*_tensors(args), **kwargs)

    return run


for _name in _OPERATORS:
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


def _sizes(given: tuple[int | Sequence[int], ...]) -> tuple[int, ...] | None:
    """Return integers that are given one by one or as one sequence; None for anything else."""
    if len(given) == 1 and not isinstance(given[0], int):
        given = tuple(given[0])
    sizes = tuple(n for n in given if isinstance(n, int))
    return sizes if len(sizes) == len(given) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and not value.dim())


def _tensors(tree: Any) -> Any:
    """Compute the logits inside the arguments of a call."""
    if isinstance(tree, DeferredLogits):
        return tree.tensor()
    if isinstance(tree, dict):
        return {k: _tensors(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_tensors(v) for v in tree)
    return tree
