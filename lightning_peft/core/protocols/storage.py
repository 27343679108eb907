"""The protocol of a storage: how the bits of a frozen weight are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from lightning_peft_kernels.experts.groups import Groups
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward
from lightning_peft.core.protocols.weight_layout import WeightLayout

__all__ = ["Reason", "Storage", "StoredTensor"]


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
