"""LastLayers: the last blocks of the model are trained whole.

Source: Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.methods.base import SelectMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register

__all__ = ["LastLayers"]


@register
@dataclass(frozen=True)
class LastLayers(SelectMethod):
    """The last `n` entries of the longest `nn.ModuleList` (or `nn.Sequential`) of the model.

    Of two equally long ones (encoder and decoder) the later counts. A head behind it is trained
    with ``modules_to_save``.

    Attributes:
        n: Number of blocks.
    """

    n: int = 1
    limits = {"n": at_least(1)}

    def choice(self, model: nn.Module) -> Callable[[str, nn.Parameter, nn.Module], bool]:
        """Whether a parameter lies in one of the blocks."""
        lists = _outermost(model, nn.ModuleList) or _outermost(model, nn.Sequential)
        require(
            bool(lists),
            f"{self.label}: expected a model with an nn.ModuleList of blocks, found none in "
            f"{type(model).__name__}; name the modules in modules_to_save instead",
        )
        longest = max(length for _, length in lists)
        require(
            self.n <= longest,
            f"{self.label}: expected n <= {longest}, the number of blocks, got n = {self.n}",
        )
        name = next(n for n, length in reversed(lists) if length == longest)
        prefix = f"{name}." if name else ""
        heads = tuple(f"{prefix}{i}." for i in range(longest - self.n, longest))
        return lambda name, parameter, owner: name.startswith(heads)


def _outermost(
    model: nn.Module, kind: type[nn.ModuleList] | type[nn.Sequential]
) -> list[tuple[str, int]]:
    """(name, length) of the lists that lie in no other: a block's own list of parts does not
    count.
    """
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{n}." if n else "") for n, _ in found)
        if isinstance(module, kind) and not inside and not in_adapter(name):
            found.append((name, len(module)))
    return found
