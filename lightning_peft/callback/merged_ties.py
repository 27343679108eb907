"""Tied weights in checkpoints of merged weights.

A fresh module of the user's class ties its weights, so it reads one tensor for all places of a
group. A file of merged weights is right for it only if the adapters leave the group equal.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.modules import tied_parameters
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["refuse_untying"]


def refuse_untying(model: nn.Module) -> None:
    """Check that every adapter of a tied weight acts on all its places with the same tensors.

    Raises:
        ValueError: merged weights would differ between the places.
    """
    acting = _tensors_by_weight(model)
    for group in tied_parameters(model):
        each = [acting.get((id(place.module), place.key), frozenset()) for place in group]
        if len(set(each)) > 1:
            names = ", ".join(place.name for place in group)
            raise ValueError(
                f"PEFT checkpoint='merged': expected tied weights to stay equal, got adapters that "
                f"change {names} apart; a fresh {type(model).__name__} ties them and would read "
                "one for all. Leave these layers out, give modules_to_save all of them, or use "
                "checkpoint='full'; merge_and_unload() and save_pretrained write both"
            )


def _tensors_by_weight(model: nn.Module) -> dict[tuple[int, str], frozenset[int]]:
    """Ids of the trained tensors that act on a parameter, by its module's id and its key."""
    found: dict[tuple[int, str], frozenset[int]] = {}
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            trained = {path: frozenset([id(copy)]) for path, copy in adapter.substitutes().items()}
            if isinstance(adapter, WeightAdapter):
                tensors = adapter.tensors().values()
                trained[adapter.site.parameter] = frozenset(
                    id(t) for t in tensors if isinstance(t, nn.Parameter)
                )
            for path, ids in trained.items():
                owner, _, key = path.rpartition(".")
                place = (id(module.get_submodule(owner)), key)
                found[place] = found.get(place, frozenset()) | ids
    return found
