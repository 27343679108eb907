"""4-bit block quantisation in plain torch, on any device and for both kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import coarse_cells, dynamic_map, searched_codes
from lightning_peft_kernels.codebooks.four_bit import code, fp4_order, midpoints
from lightning_peft_kernels.nf4.packed import Packed4bit

__all__ = [
    "block_scales",
    "dequantize_4bit_reference",
    "nested",
    "quantize_4bit_reference",
    "quantize_scales",
]

_NESTED_BLOCK = 256
_TINY = 1e-38


def quantize_4bit_reference(
    W: Tensor, *, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> Packed4bit:
    """Quantise in plain torch by searching the decision points."""
    flat = W.detach().reshape(-1).float()
    n = flat.numel()
    absmax, scaled = _scaled(flat, block_size)
    ranks = torch.bucketize(scaled, midpoints(kind, str(flat.device)))
    codes = ranks.to(torch.uint8) if kind == "nf4" else fp4_order(str(flat.device))[ranks]
    if n % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7 if kind == "nf4" else 0)])
    packed = (codes[0::2] << 4) | codes[1::2]
    return Packed4bit(packed, *nested(absmax, double_quant))


def dequantize_4bit_reference(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """Dequantise in plain torch."""
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]
    scales = block_scales(q).repeat_interleave(block_size)[:n]
    return (code(kind, str(packed.device))[nibbles.long()] * scales).to(dtype).reshape(tuple(shape))


def block_scales(q: Packed4bit) -> Tensor:
    """Return absmax fp32 [blocks]."""
    if q.absmax2 is None or q.offset is None:
        return q.absmax.reshape(-1)
    codes = q.absmax.reshape(-1)
    blocks = codes.numel()
    second = q.absmax2.repeat_interleave(_NESTED_BLOCK)[:blocks]
    return dynamic_map(True, str(codes.device))[codes.long()] * second + q.offset


def _scaled(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (absmax [blocks], w / absmax clamped to ±1).

    Full blocks multiply by the reciprocal; a partial block divides.
    """
    n = flat.numel()
    full = n // block_size * block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1.0, 1.0).view(-1)
    if full == n:
        return absmax, scaled
    rest = flat[full:]
    last = rest.abs().amax().clamp(min=_TINY)
    return torch.cat([absmax, last[None]]), torch.cat([scaled, (rest / last).clamp_(-1.0, 1.0)])


def nested(absmax: Tensor, double_quant: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (absmax, absmax2, offset) of a `Packed4bit` from the fp32 scales of all blocks."""
    if not double_quant:
        return absmax, None, None
    offset = absmax.mean()
    centred = absmax - offset
    blocks = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -blocks % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    absmax2 = padded.abs().amax(dim=1)
    if absmax.device.type == "cpu":
        unit = padded * (1.0 / absmax2)[:, None]
        index = ((unit.clamp_(-1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5).nan_to_num_(0.0).int()
        codes = coarse_cells()[index.view(-1)].view_as(index)
        codes = torch.where(absmax2[:, None] == 0, codes.new_zeros(()), codes)
    else:
        codes = searched_codes(padded * (1.0 / absmax2)[:, None])
    return codes.view(-1)[:blocks].contiguous(), absmax2, offset.reshape(1)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes uint8 [blocks], absmax2 fp32, offset fp32 [1]) of one weight's scales."""
    codes, absmax2, offset = nested(absmax, True)
    assert absmax2 is not None  # double_quant is True
    assert offset is not None
    return codes, absmax2, offset
