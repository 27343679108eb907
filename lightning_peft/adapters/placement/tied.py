"""Placements at modules whose weight is an adapted embedding's: a tied head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_peft.adapters.placement.placement import WeightPlacement
from lightning_peft.core.modules import tied_modules
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.storage import storage_of

__all__ = ["with_tied"]


def with_tied(
    placements: Sequence[WeightPlacement],
    model: nn.Module,
    ops_of: Callable[[nn.Module], LayerOps | None],
    keep: Callable[[str, str], bool] = lambda name, leader: False,
) -> list[WeightPlacement]:
    """Tie the modules that share an embedding's weight to the placement of that embedding.

    Modules that are not among the placements are added. Tied ones come last, because they read the
    embedding's tensors.

    Args:
        placements: The placements by `target_modules`.
        model: The model.
        ops_of: Ops of a module that can be edited, else None.
        keep: Whether a placement (name, name of the embedding) stays on its own.
    """
    by_name = {p.name: p for p in placements}
    tied: dict[str, WeightPlacement] = {}
    for group in tied_modules(model):
        first = next((n for n in group if n in by_name and by_name[n].site.is_embedding), None)
        if first is None:
            continue
        leader = by_name[first].site
        for name in group:
            module = model.get_submodule(name)
            ops = ops_of(module)
            if name in by_name and name != first and keep(name, first):
                continue
            if name != first and ops is not None:
                storage = storage_of(module, "weight")
                site = Site(module, "weight", name, ops, storage, tied_to=leader)
                tied[name] = WeightPlacement(site)
    return [*(p for p in placements if p.name not in tied), *tied.values()]
