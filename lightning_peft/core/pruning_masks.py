"""Weights under torch.nn.utils.prune: a parameter ``weight_orig``, a buffer ``weight_mask``, and
their product as the attribute ``weight``, made before each forward.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["held", "mask_of", "show_masked"]


def held(m: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds a weight: ``<name>_orig`` where torch.nn.utils.prune masks it."""
    owner, leaf = _owner(m, name)
    own = owner._parameters.get(leaf)  # read in every forward, so the usual case comes first
    if own is not None:
        return own
    masked = owner._parameters.get(f"{leaf}_orig")
    return masked if masked is not None else m.get_parameter(name)


def mask_of(m: nn.Module, name: str) -> Tensor | None:
    """The mask that torch.nn.utils.prune keeps beside a weight, 1 where it stays; None without."""
    owner, leaf = _owner(m, name)
    return owner._buffers.get(f"{leaf}_mask") if f"{leaf}_orig" in owner._parameters else None


def show_masked(m: nn.Module, name: str) -> None:
    """Compute now what torch.nn.utils.prune computes before each forward."""
    owner, leaf = _owner(m, name)
    mask = mask_of(m, name)
    if mask is not None:
        setattr(owner, leaf, owner._parameters[f"{leaf}_orig"] * mask)  # type: ignore[operator]


def _owner(m: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (m.get_submodule(path) if path else m), leaf
