"""ModulesToSave: whole modules (a classification head) trained beside an adapter, on a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.methods.base import SelectMethod
from lightning_peft.methods.registry import register

__all__ = ["ModulesToSave"]


@register
@dataclass(frozen=True)
class ModulesToSave(SelectMethod):
    """Every parameter of the named modules.

    Attributes:
        modules: Fully qualified names, relative to the model that attach was given.
        tied: Whether modules that share a tensor share its copy. If False, each module gets a copy
            of its own, as in peft without ``ensure_weight_tying``.
    """

    copies_statistics: ClassVar[bool] = True

    modules: tuple[str, ...] | list[str] = ()
    tied: bool = True

    def group(self, name: str) -> str:
        """The modules whose copies are tied with those of this module; "" for all of them."""
        if self.tied:
            return ""
        return next(m for m in self.modules if name == m or name.startswith(f"{m}."))

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether the parameter lies in one of the modules."""
        return any(name.startswith(f"{m}.") for m in self.modules)


@register
@dataclass(frozen=True)
class TrainedBias(SelectMethod):
    """Biases trained beside an edit (LoRA's ``bias``).

    A model without biases has none to train, which is no error: the edit is there all the same.

    Attributes:
        modules: Names of the modules whose bias is trained; None for all.
    """

    may_be_empty = True

    modules: tuple[str, ...] | list[str] | None = None

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether the parameter is a bias in question."""
        leaf = name.rpartition(".")[2]
        if leaf != "bias" and not leaf.startswith("bias_") and not leaf.endswith("_bias"):
            return False
        return self.modules is None or any(name.startswith(f"{m}.") for m in self.modules)
