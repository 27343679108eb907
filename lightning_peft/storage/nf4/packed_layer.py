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
from lightning_peft_kernels.nf4.bf16_cpu import MOST_TOKENS
from lightning_peft_kernels.nf4.linear import nf4_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.selection import select_product
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


class _Views:
    """The stored bytes of one weight as kernels take them, until a tensor is replaced.

    Copies and pickles of a layer form their own.
    """

    def __init__(self, held: Sequence[Tensor], q: Packed4bit) -> None:
        self._held, self._addresses = held, [t.data_ptr() for t in held]
        self.q = q

    def fits(self, held: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors in the same memory."""
        for t, former, address in zip(held, self._held, self._addresses, strict=True):
            if t is not former or t.data_ptr() != address:
                return False
        return True

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


@dataclass
class FourBitSpec(QuantizedWeightSpec):
    """Meaning of the bytes of one NF4 or FP4 weight.

    Attributes:
        block_size: Elements per scale.
        nested: Whether scales are quantised.
        compute: ``"auto"``, ``"fp8"`` or ``"bf16"``.
    """

    block_size: int = 64
    nested: bool = True
    compute: str = "auto"
    _e4m3: tuple[Any, Tensor] | None = field(default=None, repr=False, compare=False)
    _views: _Views | None = field(default=None, repr=False, compare=False)

    def uses_fp8(self, device: torch.device) -> bool:
        """Whether products with this weight run in e4m3 on a device."""
        return self.compute == "fp8" and select_fp8(self.shape, device).backend != "dequantize"

    def rounded(self, x: Tensor) -> Tensor:
        """Return the input of a product: in bf16 if no gradient is needed and it is requested."""
        if self.compute != "bf16" or torch.is_grad_enabled() or x.dtype == torch.bfloat16:
            return x
        return x.to(torch.bfloat16)

    def precision_without_gradients(self, device: torch.device) -> str:
        """Return in what precision products without gradients differ from others; "" if in none."""
        dtype = torch.bfloat16 if self.compute == "bf16" else self.dtype
        how = select_product(
            device, dtype, 1, self.shape, None, self.block_size, kind=self.kind, exact=False
        )
        if how.backend == "bf16":
            return f"without gradients up to {MOST_TOKENS} tokens by AVX512-BF16, scales in bf16"
        return "bf16 without gradients" if self.compute == "bf16" else ""

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
        if self._kernel_backend is None:  # spares a context per layer
            return self._forward_packed(x, *args, **kwargs)
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
            if p.compute == "fp8" and p.uses_fp8(x.device):
                return fp8_lora_linear(x, q, p.shape, p.e4m3_scale(q), bias, **packing)
            z = p.rounded(x)
            y = nf4_linear(z, q, p.shape, bias, **packing)
            return y if z is x else y.to(x.dtype)
        # A subclass with a forward of its own reads `weight`.
        with weight_in_place(module, read_natural(module, "weight", x.dtype)):
            own: Tensor = super().forward(x, *args, **kwargs)
        return own


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
    held = [parameters[name], parameters[f"{name}_absmax"]]
    if p.nested:
        held += [buffers[f"{name}_absmax2"], buffers[f"{name}_offset"]]
    if torch.compiler.is_compiling() or type(held[0]) is not nn.Parameter:
        return _view(held, p)
    views = p._views
    if views is None or not views.fits(held):
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward
            views = p._views = _Views(held, _view(held, p))
    return views.q


def _view(held: Sequence[Tensor], p: FourBitSpec) -> Packed4bit:
    lead = tuple(p.shape[:-2])
    weight, absmax = as_bytes(held[0]), as_bytes(held[1])
    if not p.nested:
        return Packed4bit(weight, absmax.reshape(*lead, -1).view(torch.float32), None, None)
    second, offset = (t.view(torch.float32) for t in held[2:])
    return Packed4bit(weight, absmax.view(*lead, -1), second, offset)


def quantize_matrix(M: Tensor, p: FourBitSpec, *, checked: bool = True) -> Packed4bit:
    """Bytes of a canonical weight [*batch, out, in]; without values on the meta device."""
    if M.device.type == "meta":
        return _meta(p)
    if M.ndim == 2:
        return quantize_4bit(
            M, kind=p.kind, block_size=p.block_size, double_quant=p.nested, checked=checked
        )
    return _stack([quantize_matrix(expert, p, checked=checked) for expert in M])


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
