"""4-bit block quantisation (NF4, FP4) with nested scales, byte for byte as bitsandbytes.

A weight is flattened row by row and cut into blocks of `block_size`. Block b holds the codes of
``w / absmax_b``, two per byte, the even element in the high nibble. Double quantisation subtracts
the mean of the scales and quantises them too, 256 per block, to 8-bit codes of the signed dynamic
map:

    absmax_b = map[code_b] · absmax2_{b // 256} + offset       (two roundings)
    w        = round_to_dtype(table[nibble] · absmax_b)        (one rounding, from fp32)

Dequantising n weights to bf16 at block 64 reads 0.516 n bytes and writes 2 n.

The rules for ties and partial blocks differ between bitsandbytes' backends. CPU tensors follow its
CPU backend; CUDA tensors follow its CUDA backend (true nearest nested codes, ties of a binary
search). Bytes are therefore comparable per device.
Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.dispatch import Backend, current_backend, launches, run
from lightning_peft_kernels.launch import LaunchError, note_refusal
from lightning_peft_kernels.nf4 import cpu as nf4_cpu
from lightning_peft_kernels.nf4.packed import Packed4bit
from lightning_peft_kernels.nf4.reference import (
    block_scales,
    dequantize_4bit_reference,
    nested,
    quantize_4bit_reference,
    quantize_scales,
)
from lightning_peft_kernels.registration import define_op

__all__ = [
    "Packed4bit",
    "block_scales",
    "dequantize_4bit",
    "dequantize_4bit_reference",
    "dequantize_into",
    "quantize_4bit",
    "quantize_4bit_reference",
    "quantize_scales",
]

_QuantizedTensors = tuple[Tensor, Tensor, Tensor, Tensor]

# ---- quantise


def _quantize_nf4_cpu(flat: Tensor, block_size: int, double_quant: bool) -> Packed4bit:
    """Quantise full blocks by table lookup and a partial last block by the reference."""
    full = flat.numel() // block_size * block_size
    packed, absmax = nf4_cpu.quantize_nf4_blocks(flat[:full], block_size)
    if full < flat.numel():
        rest = quantize_4bit_reference(flat[full:], block_size=block_size, double_quant=False)
        packed, absmax = torch.cat([packed, rest.packed]), torch.cat([absmax, rest.absmax])
    return Packed4bit(packed, *nested(absmax, double_quant))


def _four_tensors(W: Tensor, q: Packed4bit) -> _QuantizedTensors:
    """Replace absent parts by empty tensors: an op returns a fixed number of tensors."""
    empty = W.new_empty(0, dtype=torch.float32)
    return (
        q.packed,
        q.absmax,
        empty if q.absmax2 is None else q.absmax2,
        empty.clone() if q.offset is None else q.offset,
    )


def _quantize(
    W: Tensor, kind: str, block_size: int, double_quant: bool, backend: Backend = "auto"
) -> _QuantizedTensors:
    def by_kernel() -> Packed4bit:
        from lightning_peft_kernels.nf4.quantize_triton import quantize

        return Packed4bit(*quantize(W, block_size, double_quant))

    def by_torch() -> Packed4bit:
        return quantize_4bit_reference(
            W, kind=kind, block_size=block_size, double_quant=double_quant
        )

    def by_lookup() -> Packed4bit:
        return _quantize_nf4_cpu(W.detach().reshape(-1), block_size, double_quant)

    if kind != "nf4":
        return _four_tensors(W, by_torch())
    q = run("quantize_4bit", W.device, W.dtype, backend, by_kernel, by_torch, cpu=by_lookup)
    return _four_tensors(W, q)


def _quantize_fake(
    W: Tensor, kind: str, block_size: int, double_quant: bool, backend: Backend = "auto"
) -> _QuantizedTensors:
    n = W.numel()
    blocks = (n + block_size - 1) // block_size
    return (
        W.new_empty((n + 1) // 2, dtype=torch.uint8),
        W.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        W.new_empty((blocks + 255) // 256 if double_quant else 0, dtype=torch.float32),
        W.new_empty(1 if double_quant else 0, dtype=torch.float32),
    )


define_op(
    "quantize_4bit(Tensor W, str kind, int block_size, bool double_quant, str backend='auto') -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_quantize_fake,
    default=_quantize,
)


def quantize_4bit(
    W: Tensor,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    checked: bool = True,
) -> Packed4bit:
    """Quantise a floating tensor of any shape.

    Args:
        W: fp32, bf16 or fp16; finite.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements per scale, a power of two from 32 to 4096.
        double_quant: If True, quantise the scales too.
        checked: If False, only a CPU looks for NaN and infinity: elsewhere the host would wait.

    Raises:
        ValueError: The kind or the block size is unknown, or the tensor is not floating or holds
            NaN or infinity.
    """
    _check(kind, block_size)
    checked = checked or (W.device.type == "cpu" and W.device not in CHIPS)
    if not W.is_floating_point():
        raise ValueError(
            f"quantize_4bit: expected a floating tensor, got {W.dtype}; it may be packed already"
        )
    checked = checked and W.device.type != "meta" and not torch.compiler.is_compiling()
    if checked and not _finite(W):
        raise ValueError(
            "quantize_4bit: expected finite weights, got NaN or infinity; repair the weights or "
            "keep the layer dense"
        )
    packed, absmax, absmax2, offset = torch.ops.lightning_peft.quantize_4bit(
        W, kind, block_size, double_quant, current_backend()
    )
    if not double_quant:
        return Packed4bit(packed, absmax, None, None)
    return Packed4bit(packed, absmax, absmax2, offset)


# ---- dequantise


def _dequantize_cpu_into(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None,
) -> Tensor:
    """Dequantise on the CPU; `out` is contiguous, in the shape and dtype of the result."""
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1)
    scales = q.absmax.reshape(-1)
    if q.absmax2 is not None and q.offset is not None:
        scales = nf4_cpu.block_scales(scales, q.absmax2, q.offset)
    out = nf4_cpu.empty_paged(shape, dtype) if out is None else out
    blocks = n // block_size
    full, flat = blocks * block_size, out.view(-1)
    if full:
        nf4_cpu.dequantize_blocks(
            packed[: full // 2], scales[:blocks], dtype, kind, block_size, flat[:full]
        )
    if full < n:
        rest = Packed4bit(packed[full // 2 :], scales[blocks:], None, None)
        last = dequantize_4bit_reference(rest, (n - full,), dtype, kind=kind, block_size=block_size)
        flat[full:] = last
    return out


def dequantize_into(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    backend: Backend,
    out: Tensor | None,
) -> Tensor:
    """Compute `dequantize_4bit` without its checks and without torch's dispatcher."""
    device = q.packed.device
    if device.type == "cpu" and device not in CHIPS:
        return _dequantize_cpu_into(q, shape, dtype, kind, block_size, out)
    # As `dispatch.run`, without closures: every product of a step comes here twice.
    if launches("dequantize_4bit", device, dtype, backend):
        from lightning_peft_kernels.nf4.dequantize_triton import dequantize

        try:
            return dequantize(q, shape, dtype, kind, block_size, out)
        except LaunchError as error:
            note_refusal("dequantize_4bit", dtype, "", device, backend, error)
    W = dequantize_4bit_reference(q, shape, dtype, kind=kind, block_size=block_size)
    return W if out is None else out.copy_(W)


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    backend: Backend = "auto",
) -> Tensor:
    q = Packed4bit(packed, absmax, absmax2, offset)
    return dequantize_into(q, shape, dtype, kind, block_size, backend, None)


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    backend: Backend = "auto",
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


define_op(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, SymInt[] "
    "shape, ScalarType dtype, str kind, int block_size, str backend='auto') -> Tensor",
    fake=_dequantize_fake,
    default=_dequantize,
)


def dequantize_4bit(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Dequantise a packed weight.

    Args:
        q: Bytes and scales.
        shape: Shape of the weight.
        dtype: fp32, bf16, fp16 or fp64 (fp32 values).
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
        out: Written and returned instead of a new tensor; contiguous, of this shape and dtype.
        backend: Requested backend; default `current_backend()`.

    Raises:
        ValueError: The bytes do not fit the shape, or `out` does not.
    """
    _check(kind, block_size)
    n = torch.Size(shape).numel()
    if q.packed.numel() != (n + 1) // 2:
        raise ValueError(
            f"dequantize_4bit: expected {(n + 1) // 2} bytes for shape {tuple(shape)}, got "
            f"{q.packed.numel()}; give the shape that was quantised"
        )
    if out is not None:
        _check_out(shape, dtype, out)
    requested = backend or current_backend()
    if out is not None and not torch.compiler.is_compiling():
        return dequantize_into(q, shape, dtype, kind, block_size, requested, out)
    W: Tensor = torch.ops.lightning_peft.dequantize_4bit(
        q.packed, q.absmax, q.absmax2, q.offset, list(shape), dtype, kind, block_size, requested
    )
    return W if out is None else out.copy_(W)


# ---- checks


def _check_out(shape: Sequence[int], dtype: torch.dtype, out: Tensor) -> None:
    if out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: expected a contiguous out of shape {tuple(shape)} in {dtype}, got "
            f"{tuple(out.shape)} with strides {out.stride()} in {out.dtype}"
        )


def _check(kind: str, block_size: int) -> None:
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"4-bit kind: expected 'nf4' or 'fp4', got {kind!r}")
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {block_size}")


def _finite(W: Tensor) -> bool:
    """Whether all elements are finite; one reduction without a mask, in chunks."""
    flat = W.detach().reshape(-1)
    for start in range(0, flat.numel(), 1 << 22):
        part = flat[start : start + (1 << 22)]
        low, high = part.aminmax()  # NaN propagates
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return False
    return True
