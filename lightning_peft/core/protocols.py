"""Protocols that serve a site: how a layer kind applies an Edit, and where a weight is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass

__all__ = ["LayerOps", "Reason", "Storage"]


@dataclass(frozen=True)
class Reason:
    """Why something was not done; printed in the report."""

    text: str

    def __str__(self) -> str:
        return self.text


class Storage(Protocol):
    """Where the frozen weight lives: read, written, counted and fused, a layer at a time."""

    label: str  # "dense", "nf4", "int8" …: the word the report prints

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """Natural shape of the weight, never the packed one."""
        ...

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical number of parameters, never of packed elements."""
        ...

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes held, scales included."""
        ...

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """Floating dtype that `read` returns when none is asked for."""
        ...

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """The weight in its natural shape, detached; dense storage returns it without a copy. With
        `part` these of its leading axis alone: some experts of a stack.
        """
        ...

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Replace the weight (quantising it where the storage is quantised)."""
        ...

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """What `read` would give after `write(W)`, without writing."""
        ...

    def snapshot(self, m: nn.Module, name: str) -> Any:
        """The stored bits, on the CPU."""
        ...

    def restore(self, m: nn.Module, name: str, bits: Any) -> None:
        """Put back what `snapshot` returned, bit for bit."""
        ...

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """Make the weight an ordinary dense parameter with this value; returns how to undo it."""
        ...

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """A kernel that runs base and edit of this form in one call, or why there is none."""
        ...


class LayerOps(Protocol):
    """How an Edit acts on one kind of layer. Canonical weight: M [*batch, out, in]."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Paths of the weights of `m` that may be edited."""
        ...

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical shape [*batch, out, in]."""
        ...

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Length of an `in_scale`: input features, or channels of a convolution."""
        ...

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Natural → canonical, a view where possible."""
        ...

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Canonical → natural, a view where possible."""
        ...

    def bias(self, m: nn.Module, name: str) -> str | None:
        """Path of the bias that goes with this weight, None where there is none."""
        ...

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's function with another (natural) weight and bias."""
        ...

    def low_rank(self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: Any) -> Tensor:
        """scaling · B A acting on x, without forming B A."""
        ...

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale), `scale` per channel."""
        ...

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The adapted forward; `run` is the forward of the class underneath."""
        ...

    def substituted(
        self, m: nn.Module, tensors: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Within it, the module reads these tensors by path instead of its own parameters."""
        ...

    @property
    def is_embedding(self) -> bool:
        """Whether the input is ids rather than features."""
        ...

    @property
    def features_last(self) -> bool:
        """Whether inputs are [..., in_features], so that a rotation can act on them."""
        ...

    # ---- exchange with Hugging Face peft; see layers/hf_layout.py
    def hf_refusal(self, m: nn.Module, name: str) -> str:
        """Why an adapter of this weight cannot be exchanged; "" where it can."""
        ...

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """Weight → path below the module under which its tensors stand in a file."""
        ...

    def hf_found(self, m: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Place → weight, from what a file holds below this module."""
        ...

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Whether a config names this weight under ``target_parameters``."""
        ...

    def hf_swaps(self, m: nn.Module, name: str) -> bool:
        """Whether peft takes the weight for its transpose."""
        ...

    def hf_rank(self, m: nn.Module, name: str, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        ...

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Canonical → peft's shape."""
        ...

    def hf_unpack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """peft's shape → canonical."""
        ...
