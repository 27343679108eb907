"""Dense storage: an ordinary floating parameter, or one that torch.nn.utils.prune masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning_peft_kernels.experts.grouped_linear import Groups, grouped_linear
from lightning_peft_kernels.lora.linear import lora_linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.modules import own_tensor, required_tensor
from lightning_peft.core.protocols import Reason, StoredTensor
from lightning_peft.core.pruning_masks import held, mask_of, show_masked
from lightning_peft.storage.base import BaseStorage
from lightning_peft.storage.dtensor import fill_rows, local
from lightning_peft.storage.linear_forward import plain_forward

__all__ = ["DenseStorage"]


class DenseStorage(BaseStorage):
    """The weight as it is: the storage of every weight that no other one holds."""

    label = "dense"
    is_quantized = False
    lossless_write = True

    def owns(self, m: nn.Module, name: str) -> bool:
        """Any weight; other storages are asked first."""
        return True

    def iter_tensors(self, m: nn.Module, name: str) -> Iterator[StoredTensor]:
        """The parameter."""
        yield StoredTensor(name, "codes", held(m, name))

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """Natural shape."""
        return held(m, name).shape

    def numel(self, m: nn.Module, name: str) -> int:
        """Elements."""
        return held(m, name).numel()

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes."""
        p = held(m, name)
        return p.numel() * p.element_size()

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """The parameter's dtype."""
        return held(m, name).dtype

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """The parameter itself, detached; under torch.nn.utils.prune, masked."""
        W, mask = held(m, name).detach(), mask_of(m, name)
        if part is not None:
            W, mask = W[part], None if mask is None else mask[part]
        W = W if mask is None else W * mask
        return W if dtype is None else W.to(dtype)

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Copy in, one rounding."""
        with torch.no_grad():
            held(m, name).copy_(W)
            show_masked(m, name)

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Rounding to the parameter's dtype, and its mask where it has one."""
        mask = mask_of(m, name)
        W = W if mask is None else W * mask
        return W.to(self.dtype(m, name)).to(W.dtype)

    def snapshot(self, m: nn.Module, name: str) -> Any:
        """A copy on the CPU; of a sharded weight this process's rows."""
        return local(held(m, name)).detach().to("cpu", copy=True)

    def restore(self, m: nn.Module, name: str, bits: Any) -> None:
        """Copy back."""
        with torch.no_grad():
            fill_rows(held(m, name), bits)
            show_masked(m, name)

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """Already dense: write."""
        bits = self.snapshot(m, name)
        self.write(m, name, W)
        return partial(self.restore, m, name, bits)

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the parameter."""
        W = self.read(m, name)
        return F.linear(x, W.mT if base_class(m).__name__ == "Conv1D" else W, bias)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Grouped products with a stack that is held as [E, out, in]."""
        return grouped_linear(X, self.read(m, name), groups)

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """LoRA on a plain Linear in one autograd function."""
        if form - {"low_rank", "dropout"}:
            return Reason(f"dense: no fused kernel for {sorted(form)}")
        forward = base_class(m).forward
        if forward is nn.Linear.forward:
            return _fused
        if plain_forward(m):  # transformers' Conv1D
            return _fused_transposed
        return Reason(f"dense: {base_class(m).__name__} has a forward of its own")


def _fused(
    m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float
) -> Tensor:
    W = required_tensor(m, "weight")
    return lora_linear(x, W, own_tensor(m, "bias"), A, B, scaling, dropout_p=dropout)


def _fused_transposed(
    m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float
) -> Tensor:
    W = required_tensor(m, "weight")
    return lora_linear(x, W.mT, own_tensor(m, "bias"), A, B, scaling, dropout_p=dropout)
