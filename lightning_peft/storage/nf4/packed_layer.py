"""4-bit storage (NF4, FP4): packed bytes and scales as frozen parameters of the same module.

The class of a Linear (or GPT-2's Conv1D) is swapped in place. ``weight`` becomes uint8 [out, in/2]
([⌈n/2⌉, 1] where `in` is odd), ``weight_absmax`` holds one scale a block, ``weight_absmax2`` and
``weight_offset`` the second level of double quantisation. Everything is kept as uint8, fp32 scales
as their bytes, so that `.half()`, `bf16-true` or an optimizer cannot round them. Bytes are
bitsandbytes' own, for the weight [out, in] flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import e4m3_scale, select_fp8
from lightning_peft_kernels.nf4.linear import nf4_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward
from lightning_peft.core.kernel_backend import backend_scope
from lightning_peft.core.modules import own_tensor
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.linear_forward import (
    plain_forward,
    require_floating,
    weight_in_place,
)
from lightning_peft.storage.outside_reads import PackedReads
from lightning_peft.storage.packed import QuantizedWeightSpec, as_bytes

__all__ = [
    "FourBitSpec",
    "Packed4bitModule",
    "assign_packed",
    "copy_packed_",
    "dequantize_matrix",
    "packed_view",
    "quantize_matrix",
    "read_natural",
    "spec_for",
]


@dataclass
class FourBitSpec(QuantizedWeightSpec):
    """Meaning of the bytes of one NF4 or FP4 weight.

    Attributes:
        block_size: Elements per scale.
        nested: Whether scales are quantised.
        compute: ``"auto"`` or ``"fp8"``.
    """

    block_size: int = 64
    nested: bool = True
    compute: str = "auto"
    _e4m3: tuple[Any, Tensor] | None = field(default=None, repr=False, compare=False)

    def uses_fp8(self, device: torch.device) -> bool:
        """Whether products with this weight run in e4m3 on a device."""
        return self.compute == "fp8" and select_fp8(self.shape, device).backend != "dequantize"

    def e4m3_scale(self, q: Packed4bit) -> Tensor:
        """Scale fp32 [1] of the weight in e4m3; computed again after the bytes change."""
        if torch.compiler.is_compiling() or q.absmax.is_inference():
            return e4m3_scale(q)
        key = (q.absmax.data_ptr(), q.absmax._version, q.absmax.device)
        if self._e4m3 is None or self._e4m3[0] != key:
            self._e4m3 = (key, e4m3_scale(q))
        return self._e4m3[1]


class Packed4bitModule(PackedReads, PackedForward):
    """Mixin: a linear layer whose weight is packed."""

    _swap_prefix = "NF4"
    _packed: dict[str, FourBitSpec]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ``x Wᵀ + b``; W is dequantised for the product and dropped."""
        with backend_scope(self):
            return self._forward_packed(x, *args, **kwargs)

    def _forward_packed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self
        require_floating(module, x)
        p = module._packed["weight"]
        if plain_forward(module):
            q = packed_view(module, "weight")
            bias = own_tensor(module, "bias")
            packing: dict[str, Any] = {"kind": p.kind, "block_size": p.block_size}
            if p.uses_fp8(x.device):
                return fp8_lora_linear(x, q, p.shape, p.e4m3_scale(q), bias, **packing)
            return nf4_linear(x, q, p.shape, bias, **packing)
        # A subclass with a forward of its own reads `weight`.
        with weight_in_place(module, read_natural(module, "weight", x.dtype)):
            y: Tensor = super().forward(x, *args, **kwargs)
        return y


def spec_for(M: Tensor, transposed: bool, config: Quantization) -> FourBitSpec:
    """Specification of a canonical weight under a configuration."""
    dtype = config.compute_dtype
    return FourBitSpec(
        kind=config.kind,
        shape=M.shape,
        transposed=transposed,
        dtype=M.dtype if dtype is None else getattr(torch, dtype),
        block_size=config.block_size,
        nested=config.double_quant,
        compute=config.compute,
    )


def packed_view(module: Any, name: str) -> Packed4bit:
    """Views of the stored bytes in the form that kernels take; experts keep their leading axis."""
    p: FourBitSpec = module._packed[name]
    parameters, buffers = module._parameters, module._buffers
    weight, absmax = as_bytes(parameters[name]), as_bytes(parameters[f"{name}_absmax"])
    lead = tuple(p.shape[:-2])
    if not p.nested:
        return Packed4bit(weight, absmax.reshape(*lead, -1).view(torch.float32), None, None)
    return Packed4bit(
        weight,
        absmax.view(*lead, -1),
        buffers[f"{name}_absmax2"].view(torch.float32),
        buffers[f"{name}_offset"].view(torch.float32),
    )


def quantize_matrix(M: Tensor, p: FourBitSpec) -> Packed4bit:
    """Bytes of a canonical weight [*batch, out, in]; without values on the meta device."""
    if M.device.type == "meta":
        return _meta(p)
    if M.ndim == 2:
        return quantize_4bit(M, kind=p.kind, block_size=p.block_size, double_quant=p.nested)
    return _stack([quantize_matrix(expert, p) for expert in M])


def _stack(experts: Sequence[Packed4bit]) -> Packed4bit:
    """Experts one after the other: blocks, and blocks of scales, never cross from one to the
    next.
    """
    nested = experts[0].absmax2 is not None
    return Packed4bit(
        torch.stack([q.packed.reshape(-1) for q in experts]),
        torch.stack([q.absmax.reshape(-1) for q in experts]),
        torch.stack([_present(q.absmax2) for q in experts]) if nested else None,
        torch.stack([_present(q.offset).reshape(1) for q in experts]) if nested else None,
    )


def _present(t: Tensor | None) -> Tensor:
    assert t is not None  # nested: both levels are there
    return t


def dequantize_matrix(q: Packed4bit, p: FourBitSpec, dtype: torch.dtype) -> Tensor:
    """The canonical weight; of as many experts as there are bytes of."""
    if len(p.shape) == 2:
        return dequantize_4bit(q, p.shape, dtype, kind=p.kind, block_size=p.block_size)
    one = p.shape[1:]
    parts = [
        Packed4bit(
            q.packed[e],
            q.absmax[e],
            None if q.absmax2 is None else q.absmax2[e],
            None if q.offset is None else q.offset[e].reshape(1),
        )
        for e in range(q.packed.shape[0])
    ]
    return torch.stack(
        [dequantize_4bit(x, one, dtype, kind=p.kind, block_size=p.block_size) for x in parts]
    )


def _meta(p: FourBitSpec) -> Packed4bit:
    lead, n = tuple(p.shape[:-2]), p.shape[-2:].numel()
    blocks = -(-n // p.block_size)

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*lead, size, dtype=dtype, device="meta")

    return Packed4bit(
        empty(-(-n // 2), torch.uint8),
        empty(blocks, torch.uint8 if p.nested else torch.float32),
        empty(-(-blocks // 256), torch.float32) if p.nested else None,
        empty(1, torch.float32) if p.nested else None,
    )


def assign_packed(module: nn.Module, name: str, bits: Packed4bit, p: FourBitSpec) -> None:
    """Hold these bytes as parameters and buffers, by rows if blocks do not cross rows."""
    lead, rows, width = tuple(p.shape[:-2]), tuple(p.shape[:-1]), p.shape[-1]
    by_row = width % 2 == 0
    weight = bits.packed.reshape(*rows, width // 2) if by_row else bits.packed.reshape(*lead, -1, 1)
    absmax = bits.absmax.contiguous().view(torch.uint8)
    by_block = width % p.block_size == 0
    absmax = absmax.reshape(*rows, -1) if by_block else absmax.reshape(*lead, -1, 1)
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    module._parameters[f"{name}_absmax"] = nn.Parameter(absmax, requires_grad=False)
    p.keys = {"codes": name, "absmax": f"{name}_absmax"}
    if bits.absmax2 is not None and bits.offset is not None:
        module.register_buffer(f"{name}_absmax2", bits.absmax2.contiguous().view(torch.uint8))
        offset = bits.offset.reshape(*lead, 1).contiguous()
        module.register_buffer(f"{name}_offset", offset.view(torch.uint8))
        p.keys |= {"absmax2": f"{name}_absmax2", "offset": f"{name}_offset"}


def read_natural(
    module: Any, name: str, dtype: torch.dtype | None, part: slice | None = None
) -> Tensor:
    """The natural weight, dequantised; with `part` these of its leading axis."""
    p: FourBitSpec = module._packed[name]
    q, by_expert = packed_view(module, name), len(p.shape) > 2
    if part is not None and by_expert:
        q = Packed4bit(*(None if t is None else t[part] for t in q))  # type: ignore[arg-type]
    M = dequantize_matrix(q, p, dtype or p.dtype)
    W = M.mT if p.transposed else M
    return W if part is None or by_expert else W[part]


def copy_packed_(held: dict[str, Tensor], bits: Packed4bit) -> None:
    """Copy new bytes over the held ones, by role, bit for bit."""
    fresh = {
        "codes": bits.packed,
        "absmax": bits.absmax,
        "absmax2": bits.absmax2,
        "offset": bits.offset,
    }
    with torch.no_grad():
        for role, t in held.items():
            value = fresh[role]
            assert value is not None  # same specification, so the same parts
            t.copy_(value.reshape(-1).view(torch.uint8).reshape(t.shape))
