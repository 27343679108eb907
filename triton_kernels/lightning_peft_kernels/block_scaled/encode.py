"""Encoding of weights to block-scaled codes: the scale of each block fits its largest magnitude.

A weight that was decoded from the same layout, with scales chosen in this way, is encoded to the
same codes (except int4, whose range is not symmetric).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors

__all__ = ["encode_blocks"]

_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the magnitudes of e2m1
_LARGEST = {"e4m3": 448.0, "e2m1": 6.0, "int4": 7.5, "int8": 127.0}


def encode_blocks(W: Tensor, layout: BlockLayout, outer: Tensor | None = None) -> BlockTensors:
    """Encode W [*, N, K].

    Args:
        W: Floating.
        layout: Target layout.
        outer: fp32 [*] or [*, 2], factor of the scales that stays as it is; None if there is none.

    Returns:
        Codes, scales in the layout's dtype as uint8, and int8 zero points for ``"uint4"``.
    """
    N, K = W.shape[-2:]
    values = _blocks(W.float(), layout, N, K)
    lead = W.shape[:-2]
    factor = None if outer is None else outer.float().reshape(*lead, -1, 1)
    if factor is not None:
        factor = factor.repeat_interleave(layout.grid(N, K)[0] // factor.shape[-2], dim=-2)
    zeros = None
    if layout.element == "uint4":
        low, high = values.amin((-3, -1)).clamp(max=0), values.amax((-3, -1)).clamp(min=0)
        scales = _stored((high - low) / 15, layout)
        zeros = (-low / _positive(scales.float())).round().clamp(0, 15).to(torch.int8)
    else:
        scales = _stored(_wanted(values.abs().amax((-3, -1)), layout, factor), layout)
    used = scales.float() if factor is None else scales.float() * factor
    x = values / _positive(used)[..., :, None, :, None]
    if zeros is not None:
        x = x + zeros[..., :, None, :, None]
    codes = _rows(_codes(x, layout), layout, N, K)
    return BlockTensors(_packed(codes, layout), scales.view(torch.uint8), outer, zeros)


def _blocks(W: Tensor, layout: BlockLayout, N: int, K: int) -> Tensor:
    """[*, N, K] → [*, blocks along N, rows, blocks along K, columns], padded with zeros."""
    rows, columns = layout.block(N, K)
    grid_n, grid_k = layout.grid(N, K)
    half, grid_half = N // layout.halves, grid_n // layout.halves
    parts: list[Tensor] = [
        torch.nn.functional.pad(part, (0, grid_k * columns - K, 0, grid_half * rows - half))
        for part in W.chunk(layout.halves, dim=-2)
    ]
    padded = torch.cat(parts, -2)
    return padded.view(*W.shape[:-2], grid_n, rows, grid_k, columns)


def _rows(blocks: Tensor, layout: BlockLayout, N: int, K: int) -> Tensor:
    """Inverse of `_blocks`."""
    padded = blocks.flatten(-4, -3).flatten(-2, -1)
    parts = padded.chunk(layout.halves, dim=-2)
    return torch.cat([p[..., : N // layout.halves, :K] for p in parts], -2).contiguous()


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _wanted(largest: Tensor, layout: BlockLayout, factor: Tensor | None) -> Tensor:
    """Scale before it is rounded to its dtype."""
    if layout.scale == "e8m0" and layout.element == "e2m1":  # OCP MX: exponents, not a quotient
        exponent = torch.floor(torch.log2(largest.clamp(min=2.0**-126))) - 2
        return torch.where(largest > 0, torch.exp2(exponent.clamp(min=-127)), 2.0**-127)
    scale = largest / _LARGEST[layout.element]
    return scale if factor is None else scale / factor


def _stored(scales: Tensor, layout: BlockLayout) -> Tensor:
    """Scales in the layout's dtype; a power of two is rounded up, so that nothing overflows."""
    if layout.scale == "e8m0":
        positive = _positive(scales).clamp(min=2.0**-126)
        exponent = torch.ceil(torch.log2(positive)).clamp(-127, 127)
        exponent = torch.where(scales <= 2.0**-127, -127.0, exponent)
        return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    if layout.scale == "e4m3":
        return scales.clamp(max=448.0).to(torch.float8_e4m3fn)
    return _positive(scales).to(layout.scale_dtype)


def _codes(x: Tensor, layout: BlockLayout) -> Tensor:
    """uint8 code of each value."""
    if layout.element == "e4m3":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if layout.element == "int8":
        return x.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    if layout.element == "uint4":
        return x.round().clamp(0, 15).to(torch.uint8)
    if layout.element == "int4":
        return (x.round().clamp(-8, 7) + 8).to(torch.uint8)
    middle = _midpoints(str(x.device))
    magnitude = x.abs()
    code = torch.bucketize(magnitude, middle)
    tie = (magnitude.unsqueeze(-1) == middle).any(-1) & (code % 2 == 1)  # to the even code
    return ((code + tie.int()) + 8 * torch.signbit(x).int()).to(torch.uint8)


@cache
def _midpoints(device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_MIDPOINTS, dtype=torch.float32, device=device)


def _packed(codes: Tensor, layout: BlockLayout) -> Tensor:
    if layout.codes_per_byte == 1:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()
