"""The mix-and-match adapter: a prefix in attention and a parallel adapter beside the feed-forward
branch, as a list of methods.

Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", section
4.6 (arXiv:2110.04366): the prefix through a network, the parallel adapter with scale 4.
"""

from __future__ import annotations

from typing import Any

from lightning_peft.methods.base import Method
from lightning_peft.methods.bottleneck import BottleneckAdapter
from lightning_peft.methods.prefix_tuning import PrefixTuning

__all__ = ["mam"]


def mam(
    n: int = 30, hidden: int | None = 800, reduction_factor: float = 2, scaling: float = 4.0
) -> list[Method]:
    """``PEFT(mam())``: a hybrid under one adapter name.

    Args:
        n: Virtual tokens of the prefix.
        hidden: Width of the prefix's network; None: no network.
        reduction_factor: Width of the model over the adapter's bottleneck.
        scaling: Of the adapter's output.
    """
    network: dict[str, Any] = {} if hidden is None else {"projection": True, "hidden": hidden}
    return [
        PrefixTuning(n=n, **network),
        BottleneckAdapter("parallel", reduction_factor=reduction_factor, scaling=scaling),
    ]
