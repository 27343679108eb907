"""BottleneckAdapter: y + s · g · up(f(down(x))) behind, or beside, a layer.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2; Pfeiffer
et al. 2021, "AdapterFusion"; parallel and scaled: He et al. 2022, "Towards a Unified View of
Parameter-Efficient Transfer Learning", section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from lightning_peft.core.site import BlockSite
from lightning_peft.methods.base import BlockMethod
from lightning_peft.methods.bottleneck_layers import NON_LINEARITIES, Bottleneck
from lightning_peft.methods.checks import require
from lightning_peft.methods.limits import FACTOR, FRACTION, at_least, one_of
from lightning_peft.methods.registry import register

__all__ = ["BottleneckAdapter"]

# style → (reduction factor, non-linearity, scaling): as in the library `adapters` 1.3
_DEFAULTS: dict[str, tuple[float, str, float]] = {
    "houlsby": (16, "swish", 1.0),
    "pfeiffer": (16, "relu", 1.0),
    "parallel": (2, "relu", 4.0),
}
_WHERE: dict[str, Literal["branches", "residual", "parallel"]] = {
    "houlsby": "branches",
    "pfeiffer": "residual",
    "parallel": "parallel",
}


@register
@dataclass(frozen=True)
class BottleneckAdapter(BlockMethod):
    """A bottleneck of two linear layers in every transformer block.

    houlsby: a + u(a) on the attention branch and o + u(o) on the feed-forward branch, before the
    residual. pfeiffer: r + u(r) on the sum r of feed-forward branch and residual; in a post-norm
    model LN(u(LN(r)) + r). parallel: o + u(x), x the stream that enters the feed-forward branch.

    With `target_modules` it stands behind each module that is named (parallel: beside it). It has
    no merged form.

    Attributes:
        style: ``"houlsby"``, ``"pfeiffer"`` or ``"parallel"``.
        reduction_factor: Width over bottleneck; None: 16, parallel 2.
        non_linearity: relu, gelu, swish, tanh, sigmoid, leakyrelu; None: swish for houlsby, else
            relu.
        scaling: A factor, ``"learned"`` (a scalar) or ``"channel"`` (one a feature); None: 1,
            parallel 4.
        init: ``"zero"``: `up` starts at 0, so that the model starts as it is. ``"bert"``: weights
            normal with std 0.02, as `adapters` does for houlsby and pfeiffer.
        ln_before: A LayerNorm before `down`.
        ln_after: A LayerNorm behind `up`.
        gating: A factor σ(Linear(x)): True: averaged over tokens, one for a text. ``"token"``: each
            token its own, so that generating with a cache equals a full forward.
        dropout: On the bottleneck's output.
    """

    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction_factor: float | None = None
    non_linearity: str | None = None
    scaling: float | str | None = None
    init: Literal["zero", "bert"] = "zero"
    ln_before: bool = False
    ln_after: bool = False
    gating: bool | Literal["token"] = False
    dropout: float = 0.0

    limits = {
        "scaling": FACTOR,
        "non_linearity": one_of(NON_LINEARITIES),
        "reduction_factor": at_least(1 / 64),
        "dropout": FRACTION,
    }

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not isinstance(self.scaling, str) or self.scaling in ("learned", "channel"),
            f"{self.label}: expected scaling a number, 'learned' or 'channel', got "
            f"{self.scaling!r}",
        )

    @property
    def where(self) -> Literal["branches", "residual", "parallel"]:
        """Places in a transformer block that ``target_modules=None`` means."""
        return _WHERE[self.style]

    def module(self, site: BlockSite) -> nn.Module:
        """The bottleneck, initialised."""
        factor, non_linearity, scaling = _DEFAULTS[self.style]
        chosen = scaling if self.scaling is None else self.scaling
        return Bottleneck(
            (site.width_in, site.width_out),
            max(1, math.floor(site.width_in / (self.reduction_factor or factor))),
            self.non_linearity or non_linearity,
            chosen if isinstance(chosen, str) else None,
            norms=(self.ln_before, self.ln_after),
            gated=bool(self.gating),
            init=self.init,
        )

    def change(self, module: nn.Module, x: Tensor, site: BlockSite) -> Tensor:
        """s · g · up(f(down(x)))."""
        block = cast(Bottleneck, module)
        z = block.change(x, self.dropout)
        if self.gating:
            z = z * block.gate_of(x, per_token=self.gating == "token")
        s = _DEFAULTS[self.style][2] if self.scaling is None else self.scaling
        out: Tensor = z * (block.scaling if isinstance(s, str) else s)
        return out
