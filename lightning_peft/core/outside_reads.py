"""What code outside of a layer finds under the layer's ``weight`` and ``bias``.

Some modules read a child's weight themselves, `F.linear(x, self.qkv.weight)`, instead of calling
the child. If the child is adapted or packed, its parameter is not the weight that it computes with.
Such a read gets an `OutsideTensor`, which forms the effective weight W' when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.effective_view import guarded, refuse_lost_writes, write_targets

__all__ = [
    "OutsideTensor",
    "ParameterAccess",
    "in_own_forward",
    "outside_reader",
    "own_forward",
    "reading_held",
]

#: Modules (by id) whose own forward runs in this thread or task.
_RUNNING: ContextVar[frozenset[int]] = ContextVar("running", default=frozenset())
#: Modules (by id) whose parameters are read as they are held, in this thread or task.
_HELD: ContextVar[frozenset[int]] = ContextVar("held", default=frozenset())

#: Modules that take a parameter to hold it elsewhere, not to compute with it: `get_parameter`,
#: pruning, sharding, tying.
_HOLDERS = (
    "torch.nn.modules.module",
    "torch.nn.utils.",
    "torch.distributed.",
    "transformers.modeling_utils",
    "accelerate.",
)

#: Getters that return a value of W' rather than a fact about it.
_VALUES = frozenset(
    [Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__]  # type: ignore[attr-defined]
)
_FACTS = frozenset(
    [
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.stride,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.get_device,
        Tensor.storage_offset,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.is_shared,
        Tensor.is_inference,
        Tensor.register_hook,
        Tensor.__len__,
        Tensor.__hash__,
    ]
)


class ParameterAccess:
    """Descriptor for one parameter of a class that `swap_in` made.

    It is found before `nn.Module.__getattr__`, but after the instance's own attributes, in which
    layers put other tensors for a moment.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: object = None) -> Any:
        if module is None:
            return self
        parameter = module._parameters.get(self.name)
        if parameter is None:
            raise AttributeError(self.name)  # Python then asks nn.Module.__getattr__
        if type(parameter) is not nn.Parameter:  # a shard, which FSDP2 handles itself
            return parameter
        if not torch.compiler.is_compiling():
            reader: str = sys._getframe(1).f_globals.get("__name__", "")
            if reader.startswith(_HOLDERS) or id(module) in _HELD.get():
                return parameter
        return module._read_parameter(self.name, parameter)


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Let the module's own forward read its parameters as they are held."""
    token = _RUNNING.set(_RUNNING.get() | {id(module)})
    try:
        yield
    finally:
        _RUNNING.reset(token)


@contextmanager
def reading_held(module: nn.Module) -> Iterator[None]:
    """Let every reader find the module's parameters as they are held: for saving and loading."""
    token = _HELD.set(_HELD.get() | {id(module)})
    try:
        yield
    finally:
        _HELD.reset(token)


def in_own_forward(module: nn.Module) -> bool:
    """Whether the module's own forward runs in this thread or task.

    While a graph is compiled, the module reads attributes of the instance instead.
    """
    return not torch.compiler.is_compiling() and id(module) in _RUNNING.get()


def outside_reader(module: nn.Module) -> str:
    """Return the class of the nearest caller that is another module; "other code" if none is."""
    frame = sys._getframe(1)
    while frame is not None:
        reader = frame.f_locals.get("self")
        if isinstance(reader, nn.Module) and reader is not module:
            return type(reader).__name__
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "other code"


class OutsideTensor(Tensor):
    """A weight as code outside of the layer sees it.

    Facts (shape, dtype, device) are answered without forming W'. Every other function gets W', with
    its gradient. Writing in place goes to the parameter of a dense layer, and is refused for a
    packed one. A view of W' is read only.
    """

    _form: Callable[[], Tensor]
    _held: Tensor
    _facts: Callable[[], Tensor]
    _label: str
    _is_packed: bool

    @classmethod
    def of(
        cls,
        held: Tensor,
        form: Callable[[], Tensor],
        label: str,
        facts: Callable[[], Tensor] | None = None,
    ) -> OutsideTensor:
        """Make the view.

        Args:
            held: The parameter.
            form: Returns the effective tensor.
            label: Name of the parameter, for errors.
            facts: Returns a tensor of the effective shape, dtype and device; None if `held` is one.
        """
        seen: OutsideTensor = torch.Tensor._make_subclass(cls, held.detach(), False)
        seen._form, seen._held, seen._label = form, held, label
        seen._is_packed = facts is not None
        seen._facts = (lambda: held) if facts is None else facts
        return seen

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every torch function of the tensor."""
        given = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS or (_is_getter(func) and func not in _VALUES):
                return _fact(func, args, given)
            if func == Tensor.__deepcopy__:
                return args[0]._form().detach().clone()
            refuse_lost_writes(func, args, given)
            written = {id(t) for t in write_targets(func, args, given)}
            formed: dict[int, tuple[Tensor, str]] = {}

            def tensor(seen: OutsideTensor) -> Tensor:
                if id(seen) in written:
                    return _writable(seen)
                if id(seen) not in formed:
                    formed[id(seen)] = seen._form(), seen._label
                return formed[id(seen)][0]

            result = func(*_replaced(args, tensor), **_replaced(given, tensor))
            return guarded(result, [*formed.values()])

    def __getattr__(self, name: str) -> Any:
        """Return what the parameter has beside a tensor's own attributes (`quant_state`)."""
        return getattr(vars(self)["_held"], name)


def _fact(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Answer from the parameter; if that is packed, from the stand-in of the effective shape."""
    seen: OutsideTensor = args[0]
    if seen._is_packed and func == Tensor.data.__get__:  # type: ignore[attr-defined]
        return seen
    return func(seen._facts(), *args[1:], **kwargs)


def _is_getter(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _writable(seen: OutsideTensor) -> Tensor:
    if seen._is_packed:
        raise RuntimeError(
            f"{seen._label}: expected the packed weight to be left as it is, got a write in place "
            f"by {outside_reader(nn.Identity())}; keep the layer dense with "
            "Quantization(exclude_modules=[…]), or write before it is quantised"
        )
    return seen._held


def _replaced(value: Any, by: Callable[[OutsideTensor], Tensor]) -> Any:
    if isinstance(value, OutsideTensor):
        return by(value)
    if isinstance(value, tuple | list):
        return type(value)(_replaced(v, by) for v in value)
    if isinstance(value, dict):
        return {k: _replaced(v, by) for k, v in value.items()}
    return value
