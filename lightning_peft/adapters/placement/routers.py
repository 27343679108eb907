"""The placement of a router: the stack of a Hugging Face model, with the layers of its experts."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.batch import stack_of
from lightning_peft.adapters.placement.placement import RouterPlacement
from lightning_peft.core.modules import base_modules
from lightning_peft.core.registry import registries_in
from lightning_peft.core.site import RouterSite
from lightning_peft.layers import PLAIN
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import RouterMethod
from lightning_peft.storage import storage_of

__all__ = ["find_router_placements"]


def find_router_placements(
    method: RouterMethod, model: nn.Module
) -> tuple[list[RouterPlacement], None]:
    """The one placement.

    Raises:
        ValueError: an expert that is not attached, or that is no low-rank change; or no one
            Hugging Face model without a decoder of its own.
    """
    known = {n for _, _, registry in registries_in(model) for n in registry.adapters}
    missing = [n for n in method.experts() if n not in known]
    if missing:
        raise ValueError(
            f"{method.label}: expected adapters that are attached before, got {missing}, attached "
            f"are {sorted(known)}; load them first with load_adapter"
        )
    layers = []
    for _, module in adapted_modules(model):
        found = [a for n in method.experts() for a in adapters_of(module, n)]
        for adapter in found:
            if not (
                isinstance(adapter, WeightAdapter)
                and adapter.rewrite is None
                and adapter.edit().only_low_rank
            ):
                raise ValueError(
                    f"{method.label}: expected low-rank changes that leave the base alone, got "
                    f"{adapter.method.label} as {adapter.adapter_name!r} at "
                    f"{adapter.site.quoted}; merge it, or leave it out"
                )
        if found:
            layers.append(module)
    stack = stack_of(model, method)
    name = next(n for n, m in base_modules(model).items() if m is stack)
    weight = next(n for n, _ in stack.named_parameters())
    width = int(stack.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
    site = RouterSite(
        stack,
        weight,
        name,
        PLAIN,
        storage_of(stack, weight),
        width=width,
        layers=tuple(layers),
    )
    return [RouterPlacement(site)], None
