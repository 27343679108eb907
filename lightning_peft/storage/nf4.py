"""4-bit storage (NF4, FP4): packed bytes and scales as frozen parameters of the same module.

The class of a Linear (or GPT-2's Conv1D) is swapped in place. ``weight`` becomes uint8 [out, in/2]
([⌈n/2⌉, 1] where `in` is odd), ``weight_absmax`` holds one scale a block, ``weight_absmax2`` and ``weight_offset`` the
second level of double quantisation. Everything is kept as uint8, fp32 scales as their bytes, so that `.half()`,
`bf16-true` or an optimizer cannot round them. Bytes are bitsandbytes' own, for the weight [out, in] flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_kernels.nf4 import Packed4bit, dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4_lora_linear import nf4_linear, nf4_lora_linear
from torch import Tensor, nn

from lightning_peft.site import Reason, Site
from lightning_peft.storage.config import Quantization
from lightning_peft.swap import Swapped, base_class, swap_in, swap_out

__all__ = ["NF4Storage", "Packing", "Quantized4bit", "pack", "packed", "unpack"]


@dataclass
class Packing:
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


class Quantized4bit(Swapped):
    """Mixin: a linear layer whose weight is packed."""

    _swap_prefix = "NF4"
    _packed: dict[str, Packing]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X Wᵀ + b with W dequantised for the product and dropped."""
        module: Any = self
        _require_floating(module, x)
        p = module._packed["weight"]
        if _plain_forward(module):
            return nf4_linear(
                x,
                packed(module, "weight"),
                p.shape,
                module.bias,
                kind=p.kind,
                block_size=p.block_size,
            )
        # A subclass with a forward of its own: it reads `weight`, so let it find the dequantised one.
        vars(module)["weight"] = _read(module, "weight", x.dtype)
        try:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        finally:
            vars(module).pop("weight", None)


def _plain_forward(module: nn.Module) -> bool:
    cls = base_class(module)
    return cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"


def _require_floating(module: nn.Module, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"{type(module).__name__} with 4-bit weight: expected a floating input, got {x.dtype}; the model casts "
            "activations to the weight's dtype: keep this layer dense with Quantization(exclude_modules=[…])"
        )


def pack(module: nn.Module, quantization: Quantization, *, transposed: bool) -> None:
    """Quantise `module.weight` and swap the class.

    Args:
        module: A linear layer with a floating weight.
        quantization: Kind, block size, double quantisation.
        transposed: Whether the weight is [in, out].

    Raises:
        ValueError: the weight has a NaN or an infinity; nothing is changed.
    """
    W = module.get_parameter("weight").detach()
    dtype = (
        W.dtype
        if quantization.compute_dtype is None
        else getattr(torch, quantization.compute_dtype)
    )
    M = W.mT if transposed else W
    packing = Packing(
        kind=quantization.kind,
        block_size=quantization.block_size,
        nested=quantization.double_quant,
        shape=M.shape,
        transposed=transposed,
        dtype=dtype,
        compute=quantization.compute,
    )
    bits = _quantize(M, packing)
    swap_in(module, Quantized4bit)
    module._packed = {"weight": packing}  # type: ignore[assignment]
    place(module, "weight", bits, packing)


def unpack(module: nn.Module, W: Tensor) -> Callable[[], None]:
    """Back to a dense layer that holds the natural weight W; returns how to pack the same bytes again."""
    holder: Any = module
    packing = holder._packed["weight"]
    kept = {k: t for k, t in _stored(holder, "weight").items()}
    swap_out(module, Quantized4bit)
    del module._parameters["weight_absmax"]
    for name in ("weight_absmax2", "weight_offset"):
        module._buffers.pop(name, None)
    del holder._packed
    module._parameters["weight"] = nn.Parameter(
        W.to(packing.dtype).contiguous(), requires_grad=False
    )

    def pack_again() -> None:
        swap_in(module, Quantized4bit)
        holder._packed = {"weight": packing}
        module._parameters["weight"] = kept["weight"]  # type: ignore[assignment]
        module._parameters["weight_absmax"] = kept["absmax"]  # type: ignore[assignment]
        for key in ("absmax2", "offset"):
            if key in kept:
                module.register_buffer(f"weight_{key}", kept[key])

    return pack_again


def packed(module: Any, name: str) -> Packed4bit:
    """Views of the stored bytes in the form that kernels take."""
    p: Packing = module._packed[name]
    parameters, buffers = module._parameters, module._buffers
    absmax = parameters[f"{name}_absmax"]
    if not p.nested:
        return Packed4bit(parameters[name], absmax.view(torch.float32).view(-1), None, None)
    return Packed4bit(
        parameters[name],
        absmax.view(-1),
        buffers[f"{name}_absmax2"].view(torch.float32),
        buffers[f"{name}_offset"].view(torch.float32),
    )


def _quantize(M: Tensor, p: Packing) -> Packed4bit:
    if M.device.type == "meta":
        return _meta(p)
    return quantize_4bit(M, kind=p.kind, block_size=p.block_size, double_quant=p.nested)


def _meta(p: Packing) -> Packed4bit:
    n = p.shape.numel()
    blocks = -(-n // p.block_size)
    scale = torch.uint8 if p.nested else torch.float32
    return Packed4bit(
        torch.empty(-(-n // 2), dtype=torch.uint8, device="meta"),
        torch.empty(blocks, dtype=scale, device="meta"),
        torch.empty(-(-blocks // 256), dtype=torch.float32, device="meta") if p.nested else None,
        torch.empty(1, dtype=torch.float32, device="meta") if p.nested else None,
    )


def place(module: nn.Module, name: str, bits: Packed4bit, p: Packing) -> None:
    """Hold these bytes as the module's parameters and buffers, by rows where rows and blocks agree."""
    rows, width = p.shape[:-1], p.shape[-1]
    by_row = width % 2 == 0
    weight = bits.packed.reshape(*rows, width // 2) if by_row else bits.packed.reshape(-1, 1)
    absmax = bits.absmax.view(torch.uint8) if bits.absmax.dtype != torch.uint8 else bits.absmax
    absmax = absmax.reshape(*rows, -1) if width % p.block_size == 0 else absmax.reshape(-1, 1)
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    module._parameters[f"{name}_absmax"] = nn.Parameter(absmax, requires_grad=False)
    if bits.absmax2 is not None and bits.offset is not None:
        module.register_buffer(f"{name}_absmax2", bits.absmax2.view(torch.uint8))
        module.register_buffer(f"{name}_offset", bits.offset.reshape(1).view(torch.uint8))


def _read(module: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    p: Packing = module._packed[name]
    M = dequantize_4bit(
        packed(module, name), p.shape, dtype or p.dtype, kind=p.kind, block_size=p.block_size
    )
    return M.mT if p.transposed else M


class NF4Storage:
    """Storage protocol over `Quantized4bit` modules."""

    def __init__(self, label: str) -> None:
        self.label = label

    def shape(self, m: Any, name: str) -> torch.Size:
        """Natural shape."""
        p: Packing = m._packed[name]
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
        return sum(t.numel() for t in parts)

    def dtype(self, m: Any, name: str) -> torch.dtype:
        """The dtype recorded at quantisation."""
        dtype: torch.dtype = m._packed[name].dtype
        return dtype

    def read(self, m: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantised, natural."""
        return _read(m, name, dtype)

    def write(self, m: Any, name: str, W: Tensor) -> None:
        """Quantise and copy in; scales and bytes keep their shapes."""
        p: Packing = m._packed[name]
        bits = _quantize(W.mT.contiguous() if p.transposed else W, p)
        place_values(m, name, bits)

    def roundtrip(self, m: Any, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        p: Packing = m._packed[name]
        M = W.mT.contiguous() if p.transposed else W
        out = dequantize_4bit(
            _quantize(M, p), p.shape, W.dtype, kind=p.kind, block_size=p.block_size
        )
        return out.mT if p.transposed else out

    def snapshot(self, m: Any, name: str) -> Any:
        """Packed bytes and scales on the CPU."""
        return {k: t.detach().to("cpu", copy=True) for k, t in _stored(m, name).items()}

    def restore(self, m: Any, name: str, bits: Any) -> None:
        """Copy the bytes back."""
        with torch.no_grad():
            for k, t in _stored(m, name).items():
                t.copy_(bits[k])

    def densify(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """An ordinary layer again."""
        return unpack(m, W)

    def fused(self, form: frozenset[str], site: Site) -> Callable[..., Tensor] | Reason:
        """NF4 + LoRA in one autograd function."""
        if form - {"low_rank", "dropout"}:
            return Reason(f"4-bit: no fused kernel for {sorted(form)}")
        if not _plain_forward(site.module):
            return Reason(f"4-bit: {base_class(site.module).__name__} has a forward of its own")
        return _fused


def _fused(m: Any, x: Tensor, A: Tensor, B: Tensor, scaling: Any, dropout: float) -> Tensor:
    p: Packing = m._packed["weight"]
    _require_floating(m, x)
    return nf4_lora_linear(
        x, packed(m, "weight"), p.shape, m.bias, A, B, scaling,
        kind=p.kind, block_size=p.block_size, dropout_p=dropout, training=True,
    )  # fmt: skip


def _stored(m: Any, name: str) -> dict[str, Tensor]:
    stored = {name: m._parameters[name], "absmax": m._parameters[f"{name}_absmax"]}
    for k in ("absmax2", "offset"):
        if m._buffers.get(f"{name}_{k}") is not None:
            stored[k] = m._buffers[f"{name}_{k}"]
    return stored


def place_values(m: Any, name: str, bits: Packed4bit) -> None:
    """Copy new bytes over the old ones, bit for bit."""
    fresh = {
        name: bits.packed,
        "absmax": bits.absmax,
        "absmax2": bits.absmax2,
        "offset": bits.offset,
    }
    with torch.no_grad():
        for k, t in _stored(m, name).items():
            value = fresh[k]
            assert value is not None  # same packing, so the same parts
            t.copy_(value.reshape(-1).view(torch.uint8).reshape(t.shape))
