"""Views of an effective weight W', which is computed for one read: nothing may be written there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EffectiveView", "guarded", "refuse_lost_writes", "write_targets"]

#: In-place functions that change no value.
_NO_WRITES = frozenset(["requires_grad_", "detach_", "share_memory_", "retain_grad_", "rename_"])


class EffectiveView(Tensor):
    """A view of W'. It is read like any tensor; a write in place raises, since it would be lost.

    What is a view of it is guarded too; what is computed from it is a plain tensor.
    """

    _label: str

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Called by `nn.Parameter(view)`, which keeps the class: the memory is its own now."""
        if value:
            self.__class__ = nn.Parameter  # type: ignore[assignment]

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
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        refuse_lost_writes(func, args, given)
        if not all(issubclass(t, EffectiveView | nn.Parameter) for t in types):
            return NotImplemented  # another class knows what its tensor stands for
        views = _views([args, given])
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.__reduce_ex__, Tensor.__deepcopy__):  # these keep a class
                return func(_plain(args[0]), *args[1:], **given)
            return guarded(func(*args, **given), [(view, view._label) for view in views])


def refuse_lost_writes(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise RuntimeError if a torch function would write into a view of W'."""
    name = getattr(func, "__name__", str(func))
    if name in _NO_WRITES or name == "__set__":
        return
    for target in write_targets(func, args, kwargs):
        if isinstance(target, EffectiveView):
            raise RuntimeError(
                f"{target._label}: expected a view of the weight to be read only, got a write in "
                f"place by {name}; the layer computes the weight for each read, so the write would "
                "be lost: write through the layer (`layer.weight[0] = …`), or into the tensor from "
                "named_parameters()"
            )


def _plain(view: Tensor) -> Tensor:
    if not view.is_leaf:
        return view.as_subclass(Tensor)
    return view.detach().as_subclass(Tensor).requires_grad_(view.requires_grad)


def _views(value: Any) -> list[EffectiveView]:
    """Return the views among nested arguments."""
    if isinstance(value, EffectiveView):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [v for each in value for v in _views(each)] if isinstance(value, tuple | list) else []


def guarded(result: Any, read: Sequence[tuple[Tensor, str]]) -> Any:
    """Return a result with each view of a tensor that was read as an `EffectiveView`.

    Args:
        result: What a torch function returned.
        read: Tensors that it read, with names for errors.
    """
    if torch.compiler.is_compiling():
        return result
    if type(result) is Tensor:
        for tensor, label in read:
            if _share_memory(result, tensor):
                view = result.as_subclass(EffectiveView)
                view._label = label
                return view
        return result
    if type(result) in (tuple, list):
        return type(result)(guarded(r, read) for r in result)
    flags = getattr(result, "flags", None)
    if type(result).__name__ == "ndarray" and flags is not None:
        flags.writeable = False
    return result


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or other.layout != torch.strided:
        return False
    address = one.untyped_storage().data_ptr()
    return address != 0 and address == other.untyped_storage().data_ptr()


def write_targets(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return the arguments that a torch function writes to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    found = []
    if in_place or name in ("__set__", "__setitem__"):
        found += [args[0] if args else kwargs.get("input")]
    if kwargs.get("out") is not None:
        found.append(kwargs["out"])
    return [t for each in found for t in (each if isinstance(each, tuple | list) else [each])]
