"""4-bit block quantisation (NF4, FP4), nested scales included: bytes and values as bitsandbytes'.

A weight is flattened row by row and cut into blocks of `block_size`. Block b holds the codes of w /
absmax_b, two to a byte, the even element in the high nibble. With double quantisation the scales
are quantised in turn, 256 to a block, to 8-bit codes of the signed dynamic map after subtracting
their mean:
    absmax_b = map[code_b] · absmax2_{b // 256} + offset                 (two roundings)
    w        = round_to_dtype(table[nibble] · absmax_b)                  (one rounding, in fp32
    before)
Bytes moved by dequantising n weights to bf16 at block 64: 0.516 n read, 2 n written.

On a CPU the rules for ties and partial blocks are those of bitsandbytes' CPU backend, on CUDA those
of its CUDA backend (true nearest nested codes, ties of a binary search), so bytes are compared
device by device.
Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.dispatch import choose
from lightning_peft_kernels.nf4 import cpu as nf4_cpu
from lightning_peft_kernels.nf4.packed import Packed4bit
from lightning_peft_kernels.nf4.reference import (
    block_scales,
    dequantize_4bit_reference,
    nested,
    quantize_4bit_reference,
    quantize_scales,
)

__all__ = [
    "Packed4bit",
    "block_scales",
    "dequantize_4bit",
    "dequantize_4bit_reference",
    "dequantize_nf4",
    "quantize_4bit",
    "quantize_4bit_reference",
    "quantize_nf4",
    "quantize_scales",
]

# ---- CPU


def _quantize_nf4_cpu(flat: Tensor, block_size: int, double_quant: bool) -> Packed4bit:
    """Whole blocks by cells, a partial last block by the reference."""
    full = flat.numel() // block_size * block_size
    packed, absmax = nf4_cpu.quantize_nf4_blocks(flat[:full], block_size)
    if full < flat.numel():
        rest = quantize_4bit_reference(flat[full:], block_size=block_size, double_quant=False)
        packed, absmax = torch.cat([packed, rest.packed]), torch.cat([absmax, rest.absmax])
    return Packed4bit(packed, *nested(absmax, double_quant))


def _dequantize_cpu(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """`out` is contiguous and has the shape and dtype of the result."""
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1)
    scales = q.absmax.reshape(-1)
    if q.absmax2 is not None and q.offset is not None:
        scales = nf4_cpu.scales(scales, q.absmax2, q.offset)
    out = nf4_cpu.fresh(shape, dtype) if out is None else out
    blocks = n // block_size
    full, flat = blocks * block_size, out.view(-1)
    if full:
        nf4_cpu.dequantize_blocks(
            packed[: full // 2], scales[:blocks], dtype, kind, block_size, flat[:full]
        )
    if full < n:
        rest = Packed4bit(packed[full // 2 :], scales[blocks:], None, None)
        tail = dequantize_4bit_reference(rest, (n - full,), dtype, kind=kind, block_size=block_size)
        flat[full:] = tail
    return out


# ---- ops

_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define(
    "quantize_4bit(Tensor W, str kind, int block_size, bool double_quant) -> (Tensor, Tensor, "
    "Tensor, Tensor)"
)
_library.define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, SymInt[] "
    "shape, ScalarType dtype, str kind, int block_size) -> Tensor"
)


def _quantize_impl(
    W: Tensor, kind: str, block_size: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if W.device.type == "cpu" and kind == "nf4":
        q = _quantize_nf4_cpu(W.detach().reshape(-1), block_size, double_quant)
    elif kind == "nf4" and choose("quantize_4bit", W.device, W.dtype).backend == "triton":
        from lightning_peft_kernels.nf4.quantize_triton import quantize

        q = Packed4bit(*quantize(W, block_size, double_quant))
    else:
        q = quantize_4bit_reference(W, kind=kind, block_size=block_size, double_quant=double_quant)
    empty = W.new_empty(0, dtype=torch.float32)
    return (
        q.packed,
        q.absmax,
        empty if q.absmax2 is None else q.absmax2,
        empty.clone() if q.offset is None else q.offset,
    )


def _quantize_fake(
    W: Tensor, kind: str, block_size: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = W.numel()
    blocks = (n + block_size - 1) // block_size
    return (
        W.new_empty((n + 1) // 2, dtype=torch.uint8),
        W.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        W.new_empty((blocks + 255) // 256 if double_quant else 0, dtype=torch.float32),
        W.new_empty(1 if double_quant else 0, dtype=torch.float32),
    )


def _dequantize_impl(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
) -> Tensor:
    q = Packed4bit(packed, absmax, absmax2, offset)
    return _dequantize(q, shape, dtype, kind, block_size, None)


def _dequantize(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None,
) -> Tensor:
    device = q.packed.device
    if device.type == "cpu":
        return _dequantize_cpu(q, shape, dtype, kind, block_size, out)
    if choose("dequantize_4bit", device, dtype).backend == "triton":
        from lightning_peft_kernels.nf4.dequantize_triton import dequantize

        return dequantize(q, shape, dtype, kind, block_size, out)
    W = dequantize_4bit_reference(q, shape, dtype, kind=kind, block_size=block_size)
    return W if out is None else out.copy_(W)


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


_library.impl("quantize_4bit", _quantize_impl, "CompositeExplicitAutograd")
_library.impl("dequantize_4bit", _dequantize_impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::quantize_4bit", _quantize_fake, lib=_library)
torch.library.register_fake("lightning_peft::dequantize_4bit", _dequantize_fake, lib=_library)


def quantize_4bit(
    W: Tensor, *, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> Packed4bit:
    """Quantise a floating tensor of any shape.

    Args:
        W: fp32, bf16 or fp16; finite.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements a scale, a power of two from 32 to 4096.
        double_quant: Quantise the scales too.

    Raises:
        ValueError: an unknown kind or block size, a tensor that is not floating, NaN or infinity.
    """
    _check(kind, block_size)
    if not W.is_floating_point():
        raise ValueError(
            f"quantize_4bit: expected a floating tensor, got {W.dtype}; it may be packed already"
        )
    if W.device.type != "meta" and not torch.compiler.is_compiling() and not _finite(W):
        raise ValueError(
            "quantize_4bit: expected finite weights, got NaN or infinity; repair the weights or "
            "keep the layer dense"
        )
    packed, absmax, absmax2, offset = torch.ops.lightning_peft.quantize_4bit(
        W, kind, block_size, double_quant
    )
    if not double_quant:
        return Packed4bit(packed, absmax, None, None)
    return Packed4bit(packed, absmax, absmax2, offset)


def dequantize_4bit(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """Weights in `dtype`, shaped.

    Args:
        q: Bytes and scales.
        shape: Of the weight.
        dtype: fp32, bf16, fp16 or fp64 (then the fp32 values).
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
        out: Written and returned instead of a new tensor.

    Raises:
        ValueError: bytes do not fit the shape.
    """
    _check(kind, block_size)
    n = torch.Size(shape).numel()
    if q.packed.numel() != (n + 1) // 2:
        raise ValueError(
            f"dequantize_4bit: expected {(n + 1) // 2} bytes for shape {tuple(shape)}, got "
            f"{q.packed.numel()}"
        )
    if out is not None:
        return _dequantize_into(q, shape, dtype, kind, block_size, out)
    W: Tensor = torch.ops.lightning_peft.dequantize_4bit(
        q.packed, q.absmax, q.absmax2, q.offset, list(shape), dtype, kind, block_size
    )
    return W


def _dequantize_into(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor,
) -> Tensor:
    if out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: expected a contiguous out of shape {tuple(shape)} in {dtype}, got "
            f"{tuple(out.shape)} with strides {out.stride()} in {out.dtype}"
        )
    if torch.compiler.is_compiling():
        W: Tensor = torch.ops.lightning_peft.dequantize_4bit(
            q.packed, q.absmax, q.absmax2, q.offset, list(shape), dtype, kind, block_size
        )
        return out.copy_(W)
    return _dequantize(q, shape, dtype, kind, block_size, out)


def quantize_nf4(W: Tensor, *, block_size: int = 64, double_quant: bool = True) -> Packed4bit:
    """`quantize_4bit` with kind NF4."""
    return quantize_4bit(W, kind="nf4", block_size=block_size, double_quant=double_quant)


def dequantize_nf4(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    block_size: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """`dequantize_4bit` with kind NF4."""
    return dequantize_4bit(q, shape, dtype, kind="nf4", block_size=block_size, out=out)


def _check(kind: str, block_size: int) -> None:
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"4-bit kind: expected 'nf4' or 'fp4', got {kind!r}")
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {block_size}")


def _finite(W: Tensor) -> bool:
    """One reduction without a mask: a sum of magnitudes is finite unless an element is not (or fp32
    overflows).
    """
    flat = W.detach().reshape(-1)
    for start in range(0, flat.numel(), 1 << 22):
        part = flat[start : start + (1 << 22)]
        low, high = part.aminmax()  # NaN propagates
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return False
    return True
