"""Routers of mixtures of experts that are no `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_peft.layers.opaque import WeightsOps

__all__ = ["RouterOps", "is_router"]


def is_router(module: nn.Module) -> bool:
    """A mixture's router that is no Linear: one matrix [experts, in] and how many to choose."""
    weight = module._parameters.get("weight")
    chooses = hasattr(module, "top_k") and not isinstance(module, nn.Linear)
    return chooses and weight is not None and weight.dim() == 2


class RouterOps(WeightsOps):
    """A router's matrix, where it is named: `"all-linear"` leaves routers alone."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """The matrix; a bias over the experts is not an edit's business."""
        return ("weight",)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """The router's, where it has one."""
        return "bias" if m._parameters.get("bias") is not None else None
