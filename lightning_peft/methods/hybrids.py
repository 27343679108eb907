"""Hybrids: lists of methods that act together under one adapter name.

`mam` is the mix-and-match adapter: a prefix in attention and a parallel adapter on the feed-forward
branch. Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning",
section 4.6 (arXiv:2110.04366): the prefix through a network, the parallel adapter with scale 4.

`unipelt` is UniPELT: prefix, adapter and LoRA, each with a learned gate. Source: Mao et al. 2022,
"UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", section 3.2
(arXiv:2110.07577): a gate is σ(Linear(what the layer reads)), averaged over tokens; the prefix's
keys and values of a layer share one. With gates nothing has a merged form.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft.methods.base import Method
from lightning_peft.methods.bottleneck_adapter import BottleneckAdapter
from lightning_peft.methods.gated_lora import GatedLoRA
from lightning_peft.methods.prefix_tuning import PrefixTuning

__all__ = ["mam", "unipelt"]


def mam(
    n: int = 30, hidden: int | None = 800, reduction_factor: float = 2, scaling: float = 4.0
) -> list[Method]:
    """``PEFT(mam())``: a hybrid under one adapter name.

    Args:
        n: Virtual tokens of the prefix.
        hidden: Width of the prefix's network; None: no network.
        reduction_factor: Width of the model over the adapter's bottleneck.
        scaling: Factor of the adapter's output.
    """
    network: dict[str, Any] = {} if hidden is None else {"projection": True, "hidden": hidden}
    return [
        PrefixTuning(n=n, **network),
        BottleneckAdapter("parallel", reduction_factor=reduction_factor, scaling=scaling),
    ]


def unipelt(
    n: int = 10,
    hidden: int = 800,
    r: int = 8,
    alpha: float = 2.0,
    reduction_factor: float = 16,
    target_modules: str | list[str] | None = None,
    gate: Literal["sequence", "token"] = "sequence",
) -> list[Method]:
    """``PEFT(unipelt())``: a hybrid under one adapter name.

    Args:
        n: Virtual tokens of the prefix.
        hidden: Width of the prefix's network.
        r: Rank of LoRA.
        alpha: LoRA's alpha.
        reduction_factor: Width of the model over the adapter's bottleneck.
        target_modules: LoRA's layers; None means the architecture's usual choice, query and value.
        gate: ``"sequence"``: one value for a text, as in the paper. ``"token"``: for decoders that
            generate: each token its own, and none on the prefix, so that a cached forward equals a
            full one.
    """
    whole = gate == "sequence"
    return [
        PrefixTuning(n=n, projection=True, hidden=hidden, gating=whole),
        GatedLoRA(r=r, alpha=alpha, target_modules=target_modules, gate=gate),
        BottleneckAdapter(
            "pfeiffer", reduction_factor=reduction_factor, gating=True if whole else "token"
        ),
    ]
