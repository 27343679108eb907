"""Which layers of a model are new, given the methods that will be attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_peft.core.registry import registries_in, registry_of
from lightning_peft.methods.base import Method
from lightning_peft.models.pretrained import NewLayers, find_new_layers
from lightning_peft.models.target_rules import name_rule

__all__ = ["new_layers_of", "new_parameters"]


def new_layers_of(model: nn.Module, method: Method | Sequence[Method]) -> NewLayers:
    """Find the layers to train fully; a layer that a method names itself is left to the method."""
    methods = [method] if isinstance(method, Method) else list(method)
    rules = [rule for m in methods if (rule := _rule(m)) is not None]
    registry = registry_of(model)
    before = {} if registry is None else registry.requires_grad  # an adapter froze the base

    def requires_grad(name: str, parameter: nn.Parameter) -> bool:
        return before.get(name, parameter.requires_grad)

    return find_new_layers(
        model,
        requires_grad=requires_grad,
        targeted=lambda name: any(rule(name) for rule in rules),
    )


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the new parameters that are trained in place."""
    return [
        root.get_parameter(name)
        for _, root, registry in registries_in(model)
        for name in registry.loose
    ]


def _rule(method: Method) -> Callable[[str], bool] | None:
    """The rule of names that the user gave; "all-linear" and the usual choice name no layer."""
    given = getattr(method, "target_modules", None)
    return None if given is None or given == "all-linear" else name_rule(given)
