"""NF4 and FP4 storage: the protocol over layers whose weight is packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.protocols import Reason
from lightning_peft.storage.dtensor import fill_rows, local
from lightning_peft.storage.linear_forward import plain_forward
from lightning_peft.storage.nf4.fused import fused, together
from lightning_peft.storage.nf4.packed_layer import (
    QuantizedWeightSpec,
    copy_packed_,
    dequantize_matrix,
    quantize_matrix,
    read_natural,
    stored,
    unpack,
)

__all__ = ["FourBitStorage"]


class FourBitStorage:
    """Storage protocol over `Packed4bitModule` modules."""

    def __init__(self, label: str) -> None:
        self.label = label

    def shape(self, m: Any, name: str) -> torch.Size:
        """Natural shape."""
        p: QuantizedWeightSpec = m._packed[name]
        return torch.Size((*p.shape[:-2], p.shape[-1], p.shape[-2])) if p.transposed else p.shape

    def numel(self, m: Any, name: str) -> int:
        """Logical elements."""
        n: int = m._packed[name].shape.numel()
        return n

    def nbytes(self, m: Any, name: str) -> int:
        """Packed bytes and scales."""
        parts = [m._parameters[name], m._parameters[f"{name}_absmax"]]
        parts += [
            b for k in ("absmax2", "offset") if (b := m._buffers.get(f"{name}_{k}")) is not None
        ]
        return sum(t.numel() * t.element_size() for t in parts)

    def dtype(self, m: Any, name: str) -> torch.dtype:
        """The dtype recorded at quantisation."""
        dtype: torch.dtype = m._packed[name].dtype
        return dtype

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised, natural."""
        return read_natural(m, name, dtype, part)

    def write(self, m: Any, name: str, W: Tensor) -> None:
        """Quantise and copy in; scales and bytes keep their shapes."""
        p: QuantizedWeightSpec = m._packed[name]
        bits = quantize_matrix(W.mT.contiguous() if p.transposed else W, p)
        copy_packed_(m, name, bits)

    def quantization_roundtrip(self, m: Any, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        p: QuantizedWeightSpec = m._packed[name]
        M = W.mT.contiguous() if p.transposed else W
        out = dequantize_matrix(quantize_matrix(M, p), p, W.dtype)
        return out.mT if p.transposed else out

    def snapshot(self, m: Any, name: str) -> Any:
        """Packed bytes and scales on the CPU; of a sharded weight this process's rows."""
        return {k: local(t).detach().to("cpu", copy=True) for k, t in stored(m, name).items()}

    def restore(self, m: Any, name: str, bits: Any) -> None:
        """Copy the bytes back."""
        with torch.no_grad():
            for k, t in stored(m, name).items():
                fill_rows(t, bits[k])

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """An ordinary layer again."""
        return unpack(m, name, W)

    def together(
        self, modules: Sequence[Any], x: Tensor | None, factors: Sequence[Any]
    ) -> list[Tensor] | Reason:
        """One dequantisation and one product for layers over one input."""
        return together(modules, x, factors)

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """NF4 + LoRA in one autograd function."""
        if form - {"low_rank", "dropout"}:
            return Reason(f"4-bit: no fused kernel for {sorted(form)}")
        if not plain_forward(m):
            return Reason(f"4-bit: {base_class(m).__name__} has a forward of its own")
        return fused
