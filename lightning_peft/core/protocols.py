"""Protocols of a site: how a layer kind applies an Edit, and where a weight is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from lightning_peft_kernels.experts.groups import Groups
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward

__all__ = ["LayerOps", "Reason", "Storage", "StoredTensor", "WeightLayout"]


@dataclass(frozen=True)
class Reason:
    """Why something was not done; printed in the report."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StoredTensor:
    """One of the tensors that hold a weight.

    Attributes:
        key: Name of the parameter or buffer in the module; None for a tensor that the module does
            not register.
        role: ``"codes"`` for the weight itself, else the name of a companion (``"scales"``).
        tensor: The tensor as it is held.
    """

    key: str | None
    role: str
    tensor: Tensor


@dataclass(frozen=True)
class WeightLayout:
    """The weights of a layer that a storage may quantise, described by its kind of layer.

    Attributes:
        names: Names of the weights, each [out, in] or a stack of experts [E, out, in].
        transposed: Whether the weights are [*batch, in, out].
        forward: Mixin that computes the layer from weights that a storage holds.
        foreign_forward: Mixin for a layer of another library, whose own forward is replaced.
    """

    names: tuple[str, ...]
    transposed: bool
    forward: type[PackedForward]
    foreign_forward: type[PackedForward]


class Storage(Protocol):
    """How the bits of a frozen weight are held: read, written, counted and multiplied with.

    `storage.quantized.QuantizedStorage` implements all members but a few for a new format.
    """

    @property
    def label(self) -> str:
        """Name of the format in reports and plans: "dense", "nf4", "int8"."""
        ...

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is held in anything but one ordinary floating parameter."""
        ...

    @property
    def lossless_write(self) -> bool:
        """Whether `read` returns what `write` was given, up to the rounding of the dtype."""
        ...

    # ---- which weights

    def weights(self, m: nn.Module) -> Sequence[str]:
        """Names of the weights of `m` that this storage holds."""
        ...

    def owns(self, m: nn.Module, name: str) -> bool:
        """Whether this storage holds the weight `name` of `m`."""
        ...

    def iter_tensors(self, m: nn.Module, name: str) -> Iterator[StoredTensor]:
        """Yield every tensor that holds the weight: codes first, then its companions."""
        ...

    # ---- making it from dense weights

    def accepts(self, config: Any) -> bool:
        """Whether `quantize` takes this configuration; False for formats that only arrive."""
        ...

    def require_available(self) -> None:
        """Raise ModuleNotFoundError if a package that `quantize` needs is missing."""
        ...

    @property
    def quantizes_meta(self) -> bool:
        """Whether `quantize` works on the meta device, so that the planner can trace the result."""
        ...

    def bits_per_weight(self, shape: torch.Size, config: Any) -> float:
        """Bits per weight of a canonical shape [*batch, out, in] under `config`, with scales."""
        ...

    def dense_reason(self, m: nn.Module, layout: WeightLayout, config: Any) -> str:
        """Why `quantize` leaves this layer dense; "" if it takes it.

        Raises:
            ValueError: the layer must be excluded by the user.
        """
        ...

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Any) -> None:
        """Quantise the weights of a layer in place and swap its forward."""
        ...

    # ---- taking over layers that arrive quantised

    def matches(self, m: nn.Module) -> bool:
        """Whether `m` is of another library's class whose weights `adopt` takes over."""
        ...

    def adopt(self, m: nn.Module) -> None:
        """Hold the weights of a matching layer; the caller swaps its forward.

        Raises:
            ValueError: tensors that the format does not allow; the layer is as before.
        """
        ...

    def foreign_forward(self, m: nn.Module) -> type[PackedForward] | None:
        """The forward of an adopted layer; None for that of its kind of layer."""
        ...

    def set_compute_dtype(self, m: nn.Module, dtype: torch.dtype) -> None:
        """Tell an adopted layer which dtype its model computes in; codes do not say."""
        ...

    def release(self, m: nn.Module) -> None:
        """Undo `adopt`: tensors as the other library made them."""
        ...

    @property
    def exports(self) -> bool:
        """Whether files of the format may be written from `export`."""
        ...

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of `m` under the names and dtypes of the format's files."""
        ...

    # ---- one weight

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """Natural shape of the weight, never the packed one."""
        ...

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical number of elements, never of packed ones."""
        ...

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes held, companions included."""
        ...

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """Floating dtype that `read` returns by default."""
        ...

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Return the weight in its natural shape, detached; dense storage does not copy it.

        Args:
            m: The module.
            name: The weight.
            dtype: Dtype of the result; None means the storage's own.
            part: Entries of the leading axis to read: some experts of a stack.
        """
        ...

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Replace the weight, quantising it if the storage is quantised."""
        ...

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Return what `read` would give after `write(W)`, without writing."""
        ...

    def snapshot(self, m: nn.Module, name: str) -> Any:
        """Return the stored bits, on the CPU."""
        ...

    def restore(self, m: nn.Module, name: str, bits: Any) -> None:
        """Put back what `snapshot` returned, bit for bit."""
        ...

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """Make the weight an ordinary dense parameter with this value; returns the undo."""
        ...

    # ---- products

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + bias` with the canonical weight [out, in]; keeps no dense copy for backward."""
        ...

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Multiply tokens [S, in], sorted by expert, with their experts' weights → [S, out]."""
        ...

    def product_kernel(self, m: nn.Module, name: str) -> str:
        """Kernel that `linear` or `grouped_linear` runs, with its reason, for the report."""
        ...

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """A kernel that runs base and edit of this form in one call, or why there is none."""
        ...

    # ---- strategies

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        """True if FSDP2 may cut the tensors of `m` by rows, or why not."""
        ...


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
