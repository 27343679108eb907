"""Which adapters act in the forward that runs: the process default, or this thread's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.core.registry import membership_of
from lightning_peft.layers.adapted_state import ActiveAdapters, AdaptedState, state_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.mixed_batch import current_choices

__all__ = ["acting_adapters"]


def acting_adapters(module: nn.Module) -> ActiveAdapters:
    """Return the adapters of a module that act in this thread or task.

    Raises:
        RuntimeError: the choice needs other base weights than the module holds.
    """
    state = state_of(module)
    choices = current_choices()
    if not choices:
        return state.active
    own = membership_of(module)
    for registry, names in choices:
        if registry is own:
            return state.active if state.active.disabled else _chosen(module, state, names)
    return state.active


def _chosen(module: nn.Module, state: AdaptedState, names: Sequence[str]) -> ActiveAdapters:
    key = tuple(names)
    found = state.choices.get(key)
    if found is None:
        found = ActiveAdapters(names=[n for n in names if n in module.peft])  # type: ignore[operator]
        found.replace(a for n in found.names for a in _adapters(module, n))
        state.choices[key] = found
        held: Any = module.peft
        every: list[Any] = [a for name in held for a in _adapters(module, name)]
        state.rewriting = [a for a in every if getattr(a, "rewrite", None) is not None]
    _check_base(state, found)
    return found


def _adapters(module: nn.Module, name: str) -> list[Adapter]:
    held: Any = module.peft
    entry: nn.Module = held[name]
    return [child for child in (entry, *entry.children()) if isinstance(child, Adapter)]


def _check_base(state: AdaptedState, chosen: ActiveAdapters) -> None:
    """Raise if the weight that the module holds belongs to another choice."""
    if state.active.merged and set(state.active.merged) != set(chosen.names):
        raise RuntimeError(
            f"use_adapters: expected unmerged adapters, found {state.active.merged} merged into "
            "the weights that all threads share; call unmerge(model) first"
        )
    for adapter in state.rewriting:
        if adapter.rewrite is not None and (
            adapter.rewrite.active != (adapter.adapter_name in chosen.names)
        ):
            raise RuntimeError(
                f"use_adapters: expected adapters that leave the base alone, got "
                f"{adapter.adapter_name!r} on {adapter.site.label}, whose initialisation changed "
                "it: all threads share one base; save it in plain form and load that, or use "
                "set_adapter"
            )
