"""Facts about modules that every room needs: shared tensors, buffers, inputs and Conv1D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_peft.core.names import ADAPTER_CHILD, join
from lightning_peft.core.value_types import shown

__all__ = [
    "ParameterPlace",
    "base_modules",
    "base_parameters",
    "first_argument",
    "is_adapter_child",
    "is_conv1d",
    "modules_by_name",
    "own_tensor",
    "parameter_at",
    "persistent_buffers",
    "require_module",
    "required_tensor",
    "tied_ids",
    "tied_modules",
    "tied_parameters",
    "unchanged_modules",
]

#: Trees walked inside `unchanged_modules`, by root; None outside.
_WALKED: ContextVar[dict[nn.Module, dict[str, nn.Module]] | None] = ContextVar(
    "walked", default=None
)


class ParameterPlace(NamedTuple):
    """One place that holds a parameter.

    Attributes:
        name: The parameter's name in the model.
        module: The module that holds it.
        key: Its key in that module.
    """

    name: str
    module: nn.Module
    key: str


def modules_by_name(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a tree by name, `root` itself as "".

    Same names and order as `nn.Module.named_modules`, whose nested generators pass each module
    through one frame per level.
    """
    require_module(root)
    found: dict[str, nn.Module] = {"": root}
    _collect(root, "", {root}, found, with_adapters=True)
    return found


def require_module(model: object) -> None:
    """Raise TypeError for what is no module: a class, a path, None."""
    if not isinstance(model, nn.Module):
        if isinstance(model, type) and issubclass(model, nn.Module):
            got, remedy = f"the class {model.__name__}", f"build one: {model.__name__}(...)"
        else:
            got, remedy = shown(model), "give the model itself"
        raise TypeError(f"model: expected an nn.Module, got {got}; {remedy}")


def base_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a tree by name, without adapters.

    The walk does not enter the child `peft` of adapted modules, so that its time does not grow with
    the number of adapters; `attach` walks the tree some thirty times.
    """
    require_module(root)
    known = _WALKED.get()
    if known is not None and root in known:
        return dict(known[root])
    found: dict[str, nn.Module] = {"": root}
    _collect(root, "", {root}, found, with_adapters=False)
    if known is not None:
        known[root] = dict(found)
    return found


@contextmanager
def unchanged_modules() -> Iterator[None]:
    """Walk each tree once inside: no module of it is added, removed or replaced meanwhile."""
    if _WALKED.get() is not None:
        yield
        return
    token = _WALKED.set({})
    try:
        yield
    finally:
        _WALKED.reset(token)


def is_adapter_child(module: nn.Module, key: str) -> bool:
    """Whether the child `key` of a module holds the module's adapters."""
    return key == ADAPTER_CHILD and "_peft" in vars(module)


def _collect(
    parent: nn.Module,
    prefix: str,
    seen: set[nn.Module],
    found: dict[str, nn.Module],
    *,
    with_adapters: bool,
) -> None:
    """Add the modules below one module. Leaves cost no call: most modules are leaves."""
    for key, child in parent._modules.items():
        if child is None or child in seen:
            continue
        if key == ADAPTER_CHILD and not with_adapters and is_adapter_child(parent, key):
            continue
        seen.add(child)
        name = prefix + key
        found[name] = child
        if child._modules:
            _collect(child, f"{name}.", seen, found, with_adapters=with_adapters)


def base_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a tree, each under its first name, without those of adapters."""
    found: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for name, module in base_modules(root).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                found[join(name, key)] = parameter
    return found


def tied_parameters(model: nn.Module) -> list[list[ParameterPlace]]:
    """Return the groups of places that hold one tensor, without places in adapters.

    A module under two names is one place.
    """
    places: dict[int, list[ParameterPlace]] = {}
    for name, module in base_modules(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                place = ParameterPlace(join(name, key), module, key)
                places.setdefault(id(parameter), []).append(place)
    return [group for group in places.values() if len(group) > 1]


def tied_ids(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several places hold."""
    groups = tied_parameters(model)
    return {id(first.module._parameters[first.key]) for first, *_ in groups}


def tied_modules(model: nn.Module, key: str = "weight") -> list[list[str]]:
    """Return the groups of module names whose `key` is one tensor."""
    groups = [[place for place in group if place.key == key] for group in tied_parameters(model)]
    names = [[place.name.rpartition(".")[0] for place in group] for group in groups]
    return [group for group in names if len(group) > 1]


def persistent_buffers(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    """Return the buffers that `state_dict` writes, by name, without those of adapters.

    Args:
        module: The module.
        recurse: If False, only the module's own buffers.
    """
    modules = base_modules(module) if recurse else {"": module}
    return {
        join(name, key): buffer
        for name, inner in modules.items()
        for key, buffer in inner._buffers.items()
        if buffer is not None and key not in inner._non_persistent_buffers_set
    }


def parameter_at(m: nn.Module, path: str) -> nn.Parameter:
    """Return the parameter that is held at a path, whatever code outside of the layer would read.

    Raises:
        AttributeError: no parameter there.
    """
    owner, _, leaf = path.rpartition(".")
    found = (m.get_submodule(owner) if owner else m)._parameters.get(leaf)
    if found is None:
        raise AttributeError(f"{type(m).__name__}: expected a parameter {path!r}, found none")
    return found


def own_tensor(m: nn.Module, name: str) -> Tensor | None:
    """Return a parameter as the module's own forward reads it, None if there is none.

    It is an attribute of the instance if a layer put one there for a moment, or if
    torch.nn.utils.prune keeps the masked weight there; else the parameter.
    """
    found = vars(m).get(name)
    if found is None:
        found = m._parameters.get(name)
    return found if isinstance(found, Tensor) else None


def required_tensor(m: nn.Module, name: str) -> Tensor:
    """Return a parameter as the module's own forward reads it."""
    found = own_tensor(m, name)
    return getattr(m, name) if found is None else found  # a kind whose weight lies elsewhere


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D`, by class name, so that transformers is not imported."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, whether passed by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))
