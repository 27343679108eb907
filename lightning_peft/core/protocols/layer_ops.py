"""The base of layer kinds: how an Edit acts on one kind of layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.protocols.weight_layout import WeightLayout

__all__ = ["LayerOps"]


class LayerOps(ABC):
    """Base of the layer kinds: how an Edit acts on one kind of layer.

    The canonical weight is M [*batch, out, in]. A kind implements the eight abstract members; the
    others have defaults that suit a layer known by its weight alone. A layer with one weight and
    one input derives from `lightning_peft.layers.base.MatrixOps`, which implements all of them.
    """

    #: Whether forward puts tensors on the module for a moment, so only one thread may run it.
    is_opaque: ClassVar[bool] = False

    # ---- required
    @abstractmethod
    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Paths of the weights of `m` that may be edited."""

    @abstractmethod
    def bias(self, m: nn.Module, name: str) -> str | None:
        """Path of the bias that goes with this weight, None if there is none."""

    @abstractmethod
    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical shape [*batch, out, in]."""

    @abstractmethod
    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Natural → canonical, a view if possible."""

    @abstractmethod
    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Canonical → natural, a view if possible."""

    @abstractmethod
    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's function with another (natural) weight and bias."""

    @abstractmethod
    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The adapted forward; `run` is the forward of the class underneath."""

    @abstractmethod
    def substituted(
        self, m: nn.Module, tensors: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Context in which the module reads these tensors, by path, as its parameters."""

    # ---- with defaults
    def weight_layout(self, m: nn.Module) -> WeightLayout | None:
        """The weights that a storage may quantise; None if this kind of layer stays dense."""
        return None

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """Small random inputs of the layer's forward, on its device; None if they are not known."""
        return None

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Length of an `in_scale`: input features, or channels of a convolution."""
        return self.shape(m, name, natural)[-1]

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """Apply scaling · B A to x. The default forms B A; override it with a cheaper way."""
        name = self.parameters(m)[0]
        return self.functional(m, x, self.from_canonical(m, name, scaling * (B @ A)), None)

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale), `scale` per channel."""
        return M * scale

    @property
    def is_embedding(self) -> bool:
        """True if the input is ids rather than features."""
        return False

    @property
    def features_last(self) -> bool:
        """True if inputs are [..., in_features], so that a rotation can act on them."""
        return False

    @property
    def is_linear(self) -> bool:
        """True if ``target_modules="all-linear"`` selects layers of this kind."""
        return False

    @property
    def is_one_product(self) -> bool:
        """True if a low rank and a fused kernel of the storage are all that `forward` does."""
        return False
