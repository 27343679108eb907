"""4-bit storage (NF4, FP4): packed bytes and scales as frozen parameters of the same module.

The class of a Linear (or GPT-2's Conv1D) is swapped in place. ``weight`` becomes uint8 [out, in/2]
([⌈n/2⌉, 1] where `in` is odd), ``weight_absmax`` holds one scale a block, ``weight_absmax2`` and
``weight_offset`` the second level of double quantisation. Everything is kept as uint8, fp32 scales
as their bytes, so that `.half()`, `bf16-true` or an optimizer cannot round them. Bytes are
bitsandbytes' own, for the weight [out, in] flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_kernels.experts.grouped_linear import Groups, nf4_grouped_linear
from lightning_peft_kernels.fp8.linear import choose_fp8, e4m3_scale, fp8_lora_linear
from lightning_peft_kernels.nf4.linear import nf4_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from lightning_peft.core.class_swap import Swapped, swap_in, swap_out
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.linear_forward import plain_forward, require_floating

__all__ = [
    "Packed4bitModule",
    "QuantizedWeightSpec",
    "as_bytes",
    "copy_packed_",
    "dequantize_matrix",
    "pack",
    "packed",
    "quantize_matrix",
    "read_natural",
    "stored",
    "unpack",
]


@dataclass
class QuantizedWeightSpec:
    """What the bytes of one weight mean.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements a scale.
        nested: Whether scales are quantised.
        shape: Canonical [*batch, out, in].
        transposed: Whether the natural weight is [*batch, in, out] (Conv1D).
        dtype: Dtype the weight had, or the compute dtype that was asked for.
        compute: ``"auto"`` or ``"fp8"``.
    """

    kind: str
    block_size: int
    nested: bool
    shape: torch.Size
    transposed: bool
    dtype: torch.dtype
    compute: str = "auto"
    _e4m3: tuple[Any, Tensor] | None = field(default=None, repr=False, compare=False)

    def uses_fp8(self, device: torch.device) -> bool:
        """Whether products with this weight are made in e4m3 on a device."""
        return self.compute == "fp8" and choose_fp8(self.shape, device).backend != "dequantize"

    def e4m3_scale(self, q: Packed4bit) -> Tensor:
        """Scale fp32 [1] of the weight in e4m3; made anew when the bytes are written over."""
        if torch.compiler.is_compiling() or q.absmax.is_inference():
            return e4m3_scale(q)
        key = (q.absmax.data_ptr(), q.absmax._version, q.absmax.device)
        if self._e4m3 is None or self._e4m3[0] != key:
            self._e4m3 = (key, e4m3_scale(q))
        return self._e4m3[1]

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """X [S, in], sorted by expert → [S, out]."""
        shape = (self.shape[-2], self.shape[-1])
        return nf4_grouped_linear(
            X, packed(m, name), shape, groups, kind=self.kind, block_size=self.block_size
        )


class Packed4bitModule(Swapped):
    """Mixin: a linear layer whose weight is packed."""

    _swap_prefix = "NF4"
    _packed: dict[str, QuantizedWeightSpec]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X Wᵀ + b with W dequantised for the product and dropped."""
        module: Any = self
        require_floating(module, x)
        p = module._packed["weight"]
        if plain_forward(module):
            q = packed(module, "weight")
            packing: dict[str, Any] = {"kind": p.kind, "block_size": p.block_size}
            if p.uses_fp8(x.device):
                return fp8_lora_linear(x, q, p.shape, p.e4m3_scale(q), module.bias, **packing)
            return nf4_linear(x, q, p.shape, module.bias, **packing)
        # A subclass with a forward of its own: it reads `weight`, so let it find the dequantised
        # one.
        vars(module)["weight"] = read_natural(module, "weight", x.dtype)
        try:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        finally:
            vars(module).pop("weight", None)


def pack(
    module: nn.Module,
    quantization: Quantization,
    *,
    transposed: bool,
    names: Sequence[str] = ("weight",),
    mixin: type[Swapped] = Packed4bitModule,
) -> None:
    """Quantise weights of a module, one after the other, and swap its class.

    Args:
        module: A module with floating weights.
        quantization: Kind, block size, double quantisation.
        transposed: Whether the weights are [*batch, in, out].
        names: The weights; each [out, in] or, for experts, [E, out, in], quantised expert by
            expert.
        mixin: The class whose forward reads packed weights.

    Raises:
        ValueError: a weight has a NaN or an infinity; nothing is changed.
    """
    done = []
    for name in names:
        W = module.get_parameter(name).detach()
        dtype = (
            W.dtype
            if quantization.compute_dtype is None
            else getattr(torch, quantization.compute_dtype)
        )
        M = W.mT if transposed else W
        packing = QuantizedWeightSpec(
            kind=quantization.kind,
            block_size=quantization.block_size,
            nested=quantization.double_quant,
            shape=M.shape,
            transposed=transposed,
            dtype=dtype,
            compute=quantization.compute,
        )
        done.append((name, packing, quantize_matrix(M, packing)))
    swap_in(module, mixin)
    module._packed = {name: packing for name, packing, _ in done}  # type: ignore[assignment]
    for name, packing, bits in done:
        place(module, name, bits, packing)


def unpack(module: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
    """Hold the natural weight W densely; the class goes back when nothing is packed any more.

    Returns:
        How to pack the same bytes again.
    """
    holder: Any = module
    packing: QuantizedWeightSpec = holder._packed[name]
    kept = dict(stored(holder, name))
    mixin = vars(type(module))["_swap_mixin"]
    del holder._packed[name]
    emptied = not holder._packed
    if emptied:
        swap_out(module, mixin)
        del holder._packed
    del module._parameters[f"{name}_absmax"]
    for part in ("absmax2", "offset"):
        module._buffers.pop(f"{name}_{part}", None)
    module._parameters[name] = nn.Parameter(W.to(packing.dtype).contiguous(), requires_grad=False)

    def pack_again() -> None:
        if emptied:
            swap_in(module, mixin)
            holder._packed = {}
        holder._packed[name] = packing
        module._parameters[name] = kept[name]  # type: ignore[assignment]
        module._parameters[f"{name}_absmax"] = kept["absmax"]  # type: ignore[assignment]
        for part in ("absmax2", "offset"):
            if part in kept:
                module.register_buffer(f"{name}_{part}", kept[part])

    return pack_again


def as_bytes(t: Any) -> Tensor:
    """Packed bytes as uint8: a strategy may hold them as a floating parameter."""
    held: Tensor = t
    return held if held.dtype == torch.uint8 else held.view(torch.uint8)


def packed(module: Any, name: str) -> Packed4bit:
    """Views of the stored bytes in the form that kernels take; experts keep their leading axis."""
    p: QuantizedWeightSpec = module._packed[name]
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


def quantize_matrix(M: Tensor, p: QuantizedWeightSpec) -> Packed4bit:
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


def dequantize_matrix(q: Packed4bit, p: QuantizedWeightSpec, dtype: torch.dtype) -> Tensor:
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


def _meta(p: QuantizedWeightSpec) -> Packed4bit:
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


def place(module: nn.Module, name: str, bits: Packed4bit, p: QuantizedWeightSpec) -> None:
    """Hold these bytes as the module's parameters and buffers, by rows where rows and blocks
    agree.
    """
    lead, rows, width = tuple(p.shape[:-2]), tuple(p.shape[:-1]), p.shape[-1]
    by_row = width % 2 == 0
    weight = bits.packed.reshape(*rows, width // 2) if by_row else bits.packed.reshape(*lead, -1, 1)
    absmax = bits.absmax.contiguous().view(torch.uint8)
    by_block = width % p.block_size == 0
    absmax = absmax.reshape(*rows, -1) if by_block else absmax.reshape(*lead, -1, 1)
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    module._parameters[f"{name}_absmax"] = nn.Parameter(absmax, requires_grad=False)
    if bits.absmax2 is not None and bits.offset is not None:
        module.register_buffer(f"{name}_absmax2", bits.absmax2.contiguous().view(torch.uint8))
        offset = bits.offset.reshape(*lead, 1).contiguous()
        module.register_buffer(f"{name}_offset", offset.view(torch.uint8))


def read_natural(
    module: Any, name: str, dtype: torch.dtype | None, part: slice | None = None
) -> Tensor:
    """The natural weight, dequantised; with `part` these of its leading axis."""
    p: QuantizedWeightSpec = module._packed[name]
    q, by_expert = packed(module, name), len(p.shape) > 2
    if part is not None and by_expert:
        q = Packed4bit(*(None if t is None else t[part] for t in q))  # type: ignore[arg-type]
    M = dequantize_matrix(q, p, dtype or p.dtype)
    W = M.mT if p.transposed else M
    return W if part is None or by_expert else W[part]


def stored(m: Any, name: str) -> dict[str, Tensor]:
    """Parameters and buffers that hold one weight."""
    stored = {name: as_bytes(m._parameters[name])}
    stored["absmax"] = as_bytes(m._parameters[f"{name}_absmax"])
    for k in ("absmax2", "offset"):
        if m._buffers.get(f"{name}_{k}") is not None:
            stored[k] = m._buffers[f"{name}_{k}"]
    return stored


def copy_packed_(m: Any, name: str, bits: Packed4bit) -> None:
    """Copy new bytes over the old ones, bit for bit."""
    fresh = {
        name: bits.packed,
        "absmax": bits.absmax,
        "absmax2": bits.absmax2,
        "offset": bits.offset,
    }
    with torch.no_grad():
        for k, t in stored(m, name).items():
            value = fresh[k]
            assert value is not None  # same packing, so the same parts
            t.copy_(value.reshape(-1).view(torch.uint8).reshape(t.shape))
