"""`Adapted`: the mixin of every adapted module.

Adapters live in a child named ``peft``, an `nn.ModuleDict` by adapter name; the module's own keys
never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import Swapped, base_class, swap_in, swap_out
from lightning_peft.core.kernel_backend import backend_scope
from lightning_peft.core.modules import base_modules, first_argument
from lightning_peft.core.outside_reads import own_forward
from lightning_peft.core.per_thread import drop_lock, exclusive
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.registry import leave_registry
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.adapted_state import ActiveAdapters, AdaptedState
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.block import BlockAdapter
from lightning_peft.layers.direct_forward import bind_direct
from lightning_peft.layers.mixed_batch import (
    MixedBatch,
    any_mixed_batch,
    current_mixed_batch,
    without_mixed_batch,
)
from lightning_peft.layers.outside_reads import read_effective
from lightning_peft.layers.prompt.forward import forward_names, forward_with_prompt
from lightning_peft.layers.router_adapter import forward_routed
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = [
    "Adapted",
    "adapt",
    "adapted_modules",
    "adapters_of",
    "first_weight_adapter",
    "is_adapted",
    "refresh",
    "release",
    "unsettled",
    "unsettled_entries",
    "weight_adapters_of",
]


class Adapted(Swapped):
    """Mixin: the forward of the class underneath, with the active adapters around it.

    Attributes:
        peft: The adapters by name.
    """

    _swap_prefix = "Adapted"
    _peft: AdaptedState
    peft: nn.ModuleDict
    training: bool

    def _read_parameter(self, name: str, held: nn.Parameter) -> Any:
        """Return W' or b' for what an acting adapter changes, else as without adapters."""
        found = read_effective(self, self._peft, name, held)
        return super()._read_parameter(name, held) if found is held else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Base forward with every active edit, in the order in which adapters were named."""
        if self._peft.is_exclusive:
            with exclusive(self), backend_scope(self):
                return self._forward_adapted(*args, **kwargs)
        if self._kernel_backend is None:  # spares a context per layer
            return self._forward_adapted(*args, **kwargs)
        with backend_scope(self):
            return self._forward_adapted(*args, **kwargs)

    def _forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        state = self._peft
        state.telemetry.forward_ran = True
        if torch.is_grad_enabled():
            state.telemetry.ran_in_graph = True
        if not (
            state.has_no_direct
            or kwargs
            or len(args) != 1
            or torch.compiler.is_compiling()
            or any_mixed_batch()
        ):
            direct = state.direct
            y = None if direct is None else direct.run(self, state, args[0])
            if y is not None:
                return y
            direct = state.direct = bind_direct(self, state.ops, state.active)
            if direct is not None:
                return direct.run(self, state, args[0])
            state.has_no_direct = True
        active = acting_adapters(self)
        mix = current_mixed_batch()
        if mix is not None:
            mix.note_layer(active.names)
        run = super().forward
        if active.prompts:
            run = partial(_run_with_prompt, self, active, run)
        if active.routers:
            names = forward_names(base_class(self))
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return forward_routed(active.routers[-1], run, given)
        if active.trained_copies:
            return _forward_with_copies(self, active, run, args, kwargs)
        if not active.edits and not active.blocks:
            return run(*args, **kwargs)
        return _forward(self, run, active.edits, active.blocks, args, kwargs)


def _forward(
    module: Adapted,
    run: Callable[..., Any],
    edits: Sequence[WeightAdapter],
    blocks: Sequence[BlockAdapter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    x = first_argument(args, kwargs)
    ops = module._peft.ops
    y = ops.forward(module, run, edits, args, kwargs) if edits else run(*args, **kwargs)
    for adapter in blocks:
        x, y = adapter.join(x, y, partial(_run_again, module, run, edits), kwargs)
    return y


def _run_with_prompt(
    module: Adapted, active: ActiveAdapters, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return forward_with_prompt(module, active.prompts, run, args, kwargs)


def _run_again(
    module: Adapted, run: Callable[..., Any], edits: Sequence[WeightAdapter], x: Tensor
) -> Any:
    return module._peft.ops.forward(module, run, edits, (x,), {}) if edits else run(x)


def _forward_with_copies(
    module: Adapted,
    active: ActiveAdapters,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Forward in which the module reads trained copies instead of its own parameters."""
    mix = current_mixed_batch()
    if mix is not None:
        return _forward_copies_by_row(module, active, run, mix, args, kwargs)
    state = module._peft
    copies = {path: copy for a in active.trained_copies for path, copy in a.substitutes().items()}
    with state.ops.substituted(module, copies):
        return _forward(module, run, active.edits, active.blocks, args, kwargs)


def _forward_copies_by_row(
    module: Adapted,
    active: ActiveAdapters,
    run: Callable[..., Any],
    mix: MixedBatch,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """One run per adapter name on its own rows: copies cannot share a base call."""
    state = module._peft
    x: Tensor = args[0]
    y: Tensor | None = None
    for name in dict.fromkeys(mix.names):
        rows = mix.index(name, x.shape[0], x.device)
        copies = {
            path: copy
            for a in active.trained_copies
            if a.adapter_name == name
            for path, copy in a.substitutes().items()
        }
        edits = [a for a in active.edits if a.adapter_name == name]
        blocks = [a for a in active.blocks if a.adapter_name == name]
        with state.ops.substituted(module, copies), without_mixed_batch(), own_forward(module):
            part = _forward(module, run, edits, blocks, (x[rows], *args[1:]), kwargs)
        y = part.new_zeros((x.shape[0], *part.shape[1:])) if y is None else y
        y = y.index_copy(0, rows, part.to(y.dtype))
    if y is None:
        raise ValueError("adapter_names: expected at least one name, got an empty list")
    return y


def is_adapted(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether the module's class has the mixin."""
    return isinstance(module, Adapted)


def adapt(module: nn.Module, ops: LayerOps) -> Adapted:
    """Swap `Adapted` in with an empty container; an adapted module keeps its adapters."""
    if not is_adapted(module):
        swap_in(module, Adapted)
        assert is_adapted(module)
        module._peft = AdaptedState(ops)
        module.peft = nn.ModuleDict()
        module.peft.train(module.training)
    return module


def release(module: Adapted) -> None:
    """Undo `adapt`: class, attributes and children as before."""
    swap_out(module, Adapted)
    if module._peft.fast_path_guard is not None:
        module._peft.fast_path_guard.remove()
    del module.peft
    del module._peft
    leave_registry(module)
    drop_lock(module)


def adapters_of(module: Adapted, name: str | None = None) -> list[Adapter]:
    """Adapters of one module, in order of attaching; only those of `name` if it is given."""
    held_by_name = module.peft._modules  # one lookup, however many adapters there are
    entries = held_by_name.values() if name is None else [held_by_name.get(name)]
    return list(_adapters_in(entries))


def _adapters_in(entries: Iterable[nn.Module | None]) -> Iterator[Adapter]:
    """Adapters in entries of `peft`; each entry is an adapter or holds several."""
    for entry in entries:
        if isinstance(entry, Adapter):
            yield entry
        # Trained biases lie inside the adapter they go with.
        for child in () if entry is None else entry._modules.values():
            if isinstance(child, Adapter):
                yield child


def weight_adapters_of(module: Adapted, name: str | None = None) -> list[WeightAdapter]:
    """Adapters of one module that change weights, in order of attaching."""
    return [a for a in adapters_of(module, name) if isinstance(a, WeightAdapter)]


def first_weight_adapter(module: Adapted) -> WeightAdapter | None:
    """The first adapter that changes a weight of the module; the others are not visited."""
    held = _adapters_in(module.peft._modules.values())
    return next((a for a in held if isinstance(a, WeightAdapter)), None)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """(fully qualified name, module) of every adapted module."""
    for name, module in base_modules(model).items():
        if is_adapted(module):
            yield name, module


def refresh(module: Adapted) -> None:
    """Recompute which adapters act, after names, merged or disabled changed."""
    state = module._peft
    active = state.active
    active.replace(a for name in active.acting_names() for a in adapters_of(module, name))
    state.choices.clear()
    state.direct, state.has_no_direct = None, False
    entries, known = module.peft._modules, state.known
    if entries == known:
        return
    new = _new_entries(entries, known)
    if state.is_exclusive and len(entries) - len(new) < len(known):  # others are gone
        state.is_exclusive, new = state.ops.is_opaque, list(entries)
    state.known = dict(entries)
    state.is_exclusive |= state.ops.is_opaque or any(
        a.copies() for n in new for a in adapters_of(module, n)
    )


def unsettled(module: Adapted, names: Sequence[str]) -> list[Adapter]:
    """Adapters whose state may change if `names` act: those, those that act now, and new ones."""
    visited = dict.fromkeys([*unsettled_entries(module), *names])
    module._peft.settled = dict(module.peft._modules)
    return [a for n in visited for a in adapters_of(module, n)]


def unsettled_entries(module: Adapted) -> list[str]:
    """Names of adapters that act now, and of those that were never activated or left idle."""
    held, state = module.peft._modules, module._peft
    new = [] if held == state.settled else _new_entries(held, state.settled)
    return list(dict.fromkeys([*new, *(n for n in state.active.names if n in held)]))


def _new_entries(
    held: Mapping[str, nn.Module | None], known: Mapping[str, nn.Module | None]
) -> list[str]:
    """Names of the entries that are not known, or that are another adapter than the known one."""
    new = dict(held.items() - known.items())
    return [name for name in held if name in new]
