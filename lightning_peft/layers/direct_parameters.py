"""Matrices that a module of no known kind holds as parameters of its own, named one by one.

Its own forward reads them, so each is shadowed by W' around it. `"all-linear"` and module names
never choose them: what such a module does with a matrix is known to who names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.layers.opaque import WeightsOps

__all__ = ["DirectParametersOps", "direct_matrices"]


def direct_matrices(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own floating-point parameters with two or three axes."""
    return tuple(
        name
        for name, p in module._parameters.items()
        if p is not None and p.ndim in (2, 3) and p.is_floating_point()
    )


class DirectParametersOps(WeightsOps):
    """A parameter [out, in], or a stack [experts, out, in].

    A module whose attribute `is_transposed` is true has stacks [experts, in, out].
    """

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """The matrices."""
        return direct_matrices(m)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """None: which vector belongs to a matrix is not known."""
        return None

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """The canonical shape."""
        swapped = torch.Size((natural[0], natural[2], natural[1])) if len(natural) == 3 else natural
        return swapped if _is_transposed(m) else natural

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """The parameter, or a transposed view."""
        return W.mT if W.ndim == 3 and _is_transposed(m) else W

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """The matrix, or a transposed view."""
        return M.mT if M.ndim == 3 and _is_transposed(m) else M


def _is_transposed(m: nn.Module) -> bool:
    return bool(getattr(m, "is_transposed", False))
