"""XLoRA: a classifier of hidden states mixes trained LoRA adapters. Buehler and Buehler 2024,
arXiv:2402.07148.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.mixtures import only_largest
from lightning_peft.core.site import RouterSite
from lightning_peft.methods.base import HFFormat, RouterMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.xlora import FORMAT
from lightning_peft.methods.limits import COUNT, FACTOR, FRACTION, above, at_least
from lightning_peft.methods.registry import register

__all__ = ["XLoRA"]


class _Classifier(nn.Module):
    """Linear layers with ReLU and dropout between them."""

    layers: nn.Sequential


@register
@dataclass(frozen=True)
class XLoRA(RouterMethod):
    """Σ_e g_e ΔW_e, the factors g per token from the last hidden state without adapters.

    Every forward runs the model twice. Load the adapters first; activating the router alone trains
    the classifier and keeps them frozen, and naming them in `set_adapter` too trains them as well:

        load_adapter(model, "math", adapter_name="math")
        load_adapter(model, "code", adapter_name="code")
        attach(model, XLoRA(adapters=["math", "code"]), adapter_name="router")

    Generation needs ``use_cache=False``. `save_adapter` writes the classifier under the names that
    peft reads. peft itself writes none, and such a file is refused.

    Attributes:
        adapters: Names of the adapters that are mixed.
        depth: Linear layers of the classifier.
        hidden: Width between them.
        dropout: Probability of dropping a hidden element of the classifier, in training.
        layerwise: Whether every layer has factors of its own.
        softmax: Whether the factors are a softmax over the adapters.
        temperature: Divides the logits before it.
        top_k: Number of adapters per token; None for all.
        softmax_top_k: Whether the factors of these are a softmax among themselves.
        weight: Factor on all of them.

    Raises:
        ValueError: no adapters or one twice, depth, hidden or top_k below 1, temperature ≤ 0,
            dropout outside [0, 1), softmax_top_k without top_k.
    """

    adapters: list[str] = field(default_factory=list)
    depth: int = 1
    hidden: int = 2048
    dropout: float = 0.2
    layerwise: bool = False
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    weight: float = 1.0

    limits = {
        "weight": FACTOR,
        "depth": at_least(1),
        "hidden": COUNT,
        "top_k": at_least(1),
        "temperature": above(0),
        "dropout": FRACTION,
    }
    hf: ClassVar[HFFormat | None] = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            bool(self.adapters) and len(set(self.adapters)) == len(self.adapters),
            f"{self.label}: expected names of adapters that differ, got {self.adapters}",
        )
        require(
            self.top_k is not None or not self.softmax_top_k,
            f"{self.label}: expected top_k with softmax_top_k, got None",
        )

    def experts(self) -> Sequence[str]:
        """The adapters that are mixed."""
        return self.adapters

    def module(self, site: RouterSite) -> nn.Module:
        """The classifier, from width to adapters (times layers)."""
        made, parts, width = _Classifier(), list[nn.Module](), site.width
        for _ in range(self.depth - 1):
            parts += [nn.Linear(width, self.hidden), nn.ReLU()]
            parts += [nn.Dropout(self.dropout)] if self.dropout else []
            width = self.hidden
        out = len(self.adapters) * (len(site.layers) if self.layerwise else 1)
        made.layers = nn.Sequential(*parts, nn.Linear(width, out))
        return made

    def gates(self, module: nn.Module, hidden: Tensor, site: RouterSite) -> Tensor:
        """[..., layers or 1, adapters]."""
        logits: Tensor = cast(_Classifier, module).layers(hidden)
        g: Tensor = logits.unflatten(-1, (-1, len(self.adapters)))
        if self.softmax:
            g = (g / self.temperature).softmax(-1)
        if self.top_k is not None:
            g = only_largest(g, self.top_k, -torch.inf if self.softmax_top_k else 0.0)
        return self.weight * (g.softmax(-1) if self.softmax_top_k else g)
