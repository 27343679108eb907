"""Detach: removes adapters from a model, in place."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.adoption import release_adopted
from lightning_peft.adapters.plain import is_merged_for_good, make_plain, remove_adapters
from lightning_peft.core.registry import AdapterRegistry, forget, is_part, registries_in
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.projection_group import share_inputs
from lightning_peft.models.saving import restore_saving
from lightning_peft.models.shared_inputs import children_sharing_input

__all__ = ["detach"]


def detach(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all: class, keys and bits of the base as before.

    A base that `attach` or `quantize` quantised stays quantised. Layers that arrived quantised are
    given back to the library that made them. After ``merge(model, keep_base=False)`` the model
    becomes plain, as with `merge_and_unload`; the weights keep the merged change.

    Raises:
        KeyError: no adapter of that name.
        RuntimeError: the adapter is merged and the base is kept; unmerge first.
    """
    for _, root, registry in list(registries_in(model)):
        if adapter_name is not None and adapter_name not in registry.adapters:
            raise KeyError(
                f"detach: expected one of {sorted(registry.adapters)}, got {shown(adapter_name)}"
            )
        names = list(registry.adapters) if adapter_name is None else [adapter_name]
        if is_part(root, registry):
            raise ValueError(
                f"detach: expected the module that the adapters were attached to, got a part of it "
                f"({type(root).__name__}); give that module, or one around it"
            )
        if is_merged_for_good(root) and len(names) == len(registry.adapters):
            make_plain(root, registry)
        else:
            _detach_from(root, registry, names)


def _detach_from(root: nn.Module, registry: AdapterRegistry, names: list[str]) -> None:
    _check_unmerged(root, names)
    activate(root, registry, [n for n in registry.active if n not in names])
    remove_adapters(root, names)
    share_inputs(root, children_sharing_input(root))
    for name in names:
        del registry.adapters[name]
    if not registry.adapters:
        _restore_requires_grad(root, registry)
        release_adopted(root, registry.adopted)
        registry.adopted = []
        registry.history = None
        if registry.quantization is None:
            restore_saving(root)
            forget(root)


def _check_unmerged(root: nn.Module, names: list[str]) -> None:
    for name, module in adapted_modules(root):
        merged = module._peft.active.merged
        if set(merged) & set(names):
            raise RuntimeError(
                f"detach {name!r}: expected unmerged adapters, found {merged} merged; call "
                "unmerge(model) first, or merge_and_unload(model) to keep the change"
            )


def _restore_requires_grad(root: nn.Module, registry: AdapterRegistry) -> None:
    for name, parameter in root.named_parameters():
        if registry.requires_grad.get(name, False) and parameter.is_floating_point():
            parameter.requires_grad_(True)
    registry.requires_grad = {}
