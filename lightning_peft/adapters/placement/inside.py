"""The part of a model that a method's targets name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, with_parents
from lightning_peft.methods.base import Targeted
from lightning_peft.models.target_rules import block_rule, name_rule

__all__ = ["inside_targets"]


def inside_targets(method: Targeted, model: nn.Module) -> Callable[[str], bool]:
    """Whether a module is, or lies in, one of the targets; without targets all modules do.

    Raises:
        ValueError: a layer index beyond the model's blocks.
    """
    modules = [(n, m) for n, m in base_modules(model).items() if not in_adapter(n)]
    wanted, excluded = name_rule(method.target_modules), name_rule(method.exclude_modules)
    blocks = block_rule(modules, method.layers_to_transform, method.layers_pattern)

    def inside(name: str) -> bool:
        parents = with_parents(name)
        named = method.target_modules is None or any(map(wanted, parents))
        return named and blocks(name) and not any(map(excluded, parents))

    return inside
