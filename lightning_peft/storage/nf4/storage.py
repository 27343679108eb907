"""NF4 and FP4: the storage protocol over bytes that bitsandbytes also reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_peft_kernels.dispatch import select
from lightning_peft_kernels.experts.grouped_linear import Groups, nf4_grouped_linear
from lightning_peft_kernels.fp8.products import select_fp8
from lightning_peft_kernels.nf4.linear import nf4_linear
from lightning_peft_kernels.nf4.ops import Packed4bit
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class, swap_in
from lightning_peft.core.modules import parameter_at
from lightning_peft.core.protocols import Reason, WeightLayout
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.linear_forward import plain_forward
from lightning_peft.storage.nf4.fused import fused, fused_group
from lightning_peft.storage.nf4.packed_layer import (
    FourBitSpec,
    Packed4bitModule,
    assign_packed,
    copy_packed_,
    dequantize_matrix,
    packed_view,
    quantize_matrix,
    read_natural,
    spec_for,
)
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.packed_linear import PackedLinear
from lightning_peft.storage.quantized import QuantizedStorage
from lightning_peft.storage.registry import register_storage, storage_of

__all__ = ["FP4Storage", "FourBitStorage", "NF4Storage"]


class FourBitStorage(QuantizedStorage[FourBitSpec]):
    """What NF4 and FP4 have in common."""

    def accepts(self, config: Quantization) -> bool:
        """A `Quantization` of this kind."""
        return config.kind == self.label

    def bits_per_weight(self, shape: torch.Size, config: Quantization) -> float:
        """4 bits, and the scales of both levels."""
        n = shape[-2:].numel()
        blocks = -(-n // config.block_size)
        second = 4 * -(-blocks // 256) + 4
        nbytes = -(-n // 2) + (blocks + second if config.double_quant else 4 * blocks)
        return 8.0 * nbytes / n

    def dense_reason(self, m: nn.Module, layout: WeightLayout, config: Quantization) -> str:
        """A block must not cross from one expert to the next."""
        for name in layout.names:
            shape = storage_of(m, name).shape(m, name)
            n = shape[1:].numel()
            if len(shape) > 2 and n % config.block_size:
                return f"{n} weights an expert are no multiple of the block of {config.block_size}"
        return ""

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Quantization) -> None:
        """Quantise every weight, then hold the bytes; a linear layer gets the NF4 forward."""
        done = []
        for name in layout.names:
            W = parameter_at(m, name).detach()
            M = W.mT if layout.transposed else W
            spec = spec_for(M, layout.transposed, config)
            done.append((name, spec, quantize_matrix(M, spec)))
        linear = layout.forward is PackedLinear
        swap_in(m, Packed4bitModule if linear else layout.forward)
        vars(m)["_packed"] = {name: spec for name, spec, _ in done}
        for name, spec, bits in done:
            assign_packed(m, name, bits, spec)

    def encode(self, M: Tensor, spec: FourBitSpec) -> dict[str, Tensor]:
        """Bytes and scales by role."""
        bits = quantize_matrix(M.contiguous() if spec.transposed else M, spec)
        return {
            role: t
            for role, t in zip(("codes", "absmax", "absmax2", "offset"), bits, strict=True)
            if t is not None
        }

    def decode(
        self, tensors: Mapping[str, Tensor], spec: FourBitSpec, dtype: torch.dtype
    ) -> Tensor:
        """Dequantised, canonical."""
        get = tensors.get
        bits = Packed4bit(tensors["codes"], tensors["absmax"], get("absmax2"), get("offset"))
        return dequantize_matrix(bits, spec, dtype)

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Decode(encode(W)). A training step may call it, so the host waits for no check."""
        spec: FourBitSpec = specs_of(m)[name]
        M = spec.canonical(W)
        bits = quantize_matrix(M.contiguous() if spec.transposed else M, spec, checked=False)
        return spec.natural(dequantize_matrix(bits, spec, W.dtype))

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised, natural."""
        return read_natural(m, name, dtype, part)

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Quantise and copy in; scales and bytes keep their shapes."""
        spec: FourBitSpec = specs_of(m)[name]
        bits = quantize_matrix(W.mT.contiguous() if spec.transposed else W, spec)
        copy_packed_(packed_tensors(m, name), bits)

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """The kernel that dequantises for the product and again for the gradient."""
        spec: FourBitSpec = specs_of(m)[name]
        how: dict[str, Any] = {"kind": spec.kind, "block_size": spec.block_size}
        return nf4_linear(x, packed_view(m, name), spec.shape, bias, **how)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """The kernel that dequantises the experts that have tokens."""
        spec: FourBitSpec = specs_of(m)[name]
        shape = (spec.shape[-2], spec.shape[-1])
        how: dict[str, Any] = {"kind": spec.kind, "block_size": spec.block_size}
        return nf4_grouped_linear(X, packed_view(m, name), shape, groups, **how)

    def product_kernel(self, m: nn.Module, name: str) -> str:
        """The dispatch decision with its reason."""
        spec: FourBitSpec = specs_of(m)[name]
        weight = m._parameters[name]
        assert weight is not None  # the specification names it
        if len(spec.shape) > 2:
            decision = select("nf4_grouped_linear", weight.device, spec.dtype)
            return f"{decision.backend}: {decision.reason}"
        if spec.compute == "fp8":
            decision = select_fp8(spec.shape, weight.device)
            fits = decision.backend != "dequantize"
            return f"fp8: {decision.reason}" if fits else f"no fp8: {decision.reason}"
        decision = select("dequantize_4bit", weight.device, spec.dtype)
        told = f"{decision.backend}: {decision.reason}"
        few = spec.precision_without_gradients(weight.device)
        return f"{told}; {few}" if few else told

    def fused_group(
        self, modules: Sequence[Any], x: Tensor | None, factors: Sequence[Any] | None
    ) -> list[Tensor] | Reason:
        """One dequantisation and one product for layers over one input."""
        return fused_group(modules, x, factors)

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """4-bit base and LoRA in one autograd function."""
        if form - {"low_rank", "dropout"}:
            return Reason(f"4-bit: no fused kernel for {sorted(form)}")
        if not plain_forward(m):
            return Reason(f"4-bit: {base_class(m).__name__} has a forward of its own")
        return fused


@register_storage(Quantization)
class NF4Storage(FourBitStorage):
    """The normal-float code of QLoRA."""

    label = "nf4"


@register_storage(Quantization)
class FP4Storage(FourBitStorage):
    """The 4-bit floating-point code of bitsandbytes."""

    label = "fp4"
