"""A 4-bit weight quantised row by row: each rank reads its own rows only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning_peft_kernels.nf4.ops import Packed4bit, quantize_4bit, quantize_scales
from torch import Tensor, nn

from lightning_peft.storage.base_files import stored_tensor
from lightning_peft.storage.dtensor import local, local_rows, shard_group
from lightning_peft.storage.nf4.packed_layer import FourBitSpec, copy_packed_
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.tensor_files import RowSource

__all__ = ["stream_packed"]


def stream_packed(module: nn.Module, name: str, source: RowSource, chunk: int) -> None:
    """Quantise this rank's rows of a weight, `chunk` elements at a time, and write them.

    The bytes are those of quantising the complete weight.
    """
    p: FourBitSpec = specs_of(module)[name]
    weight = stored_tensor(module, name)
    width = p.shape[-1]
    if len(p.shape) > 2 or width % p.block_size or width % 2:
        _stream_whole(module, name, p, source)
        return
    first, rows = local_rows(weight)
    own = local(weight.detach())
    scales = torch.empty(rows * width // p.block_size, dtype=torch.float32, device=own.device)
    step = max(1, chunk // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        if p.transposed:
            W = source[:, first + start : first + stop].T.contiguous()
        else:
            W = source[first + start : first + stop]
        bits = quantize_4bit(
            W.to(own.device, p.dtype), kind=p.kind, block_size=p.block_size, double_quant=False
        )
        own[start:stop].copy_(bits.packed.view(stop - start, -1))
        blocks = slice(start * width // p.block_size, stop * width // p.block_size)
        scales[blocks] = bits.absmax
    _place_scales(module, name, p, scales, weight)


def _place_scales(
    module: nn.Module, name: str, p: FourBitSpec, scales: Tensor, weight: Tensor
) -> None:
    """Scales of these rows; those of double quantisation need the scales of all rows."""
    own = local(stored_tensor(module, f"{name}_absmax").detach())
    if not p.nested:
        own.copy_(scales.view(torch.uint8).view(own.shape))
        return
    whole = _all_scales(scales, weight, p)
    codes, absmax2, offset = quantize_scales(whole)
    first, rows = local_rows(weight)
    per_row = p.shape[-1] // p.block_size
    own.copy_(codes[first * per_row : (first + rows) * per_row].view(own.shape))
    for part, value in (("absmax2", absmax2), ("offset", offset)):
        stored_tensor(module, f"{name}_{part}").copy_(value.view(torch.uint8))


def _all_scales(scales: Tensor, weight: Tensor, p: FourBitSpec) -> Tensor:
    ranks = shard_group(weight)
    if ranks is None:
        return scales
    total = p.shape.numel() // p.block_size
    largest = -(-p.shape[0] // ranks.size) * (p.shape[-1] // p.block_size)
    padded = torch.nn.functional.pad(scales, (0, largest - scales.numel()))
    parts = [torch.empty_like(padded) for _ in range(ranks.size)]
    dist.all_gather(parts, padded, group=ranks.group)
    return torch.cat(parts)[:total]  # only the last parts are short


def _stream_whole(module: nn.Module, name: str, p: FourBitSpec, source: RowSource) -> None:
    """Quantise a complete weight: its blocks cross rows, or it is a stack of experts."""
    weight = stored_tensor(module, name)
    device = local(weight).device
    experts = len(p.shape) > 2
    first, rows = local_rows(weight) if experts else (0, p.shape[0])
    parts = []
    for i in range(first, first + rows) if experts else (None,):
        M = (source[...] if i is None else source[i]).to(device, p.dtype)
        M = M.mT.contiguous() if p.transposed else M
        parts.append(quantize_4bit(M, kind=p.kind, block_size=p.block_size, double_quant=p.nested))
    if experts:
        _place_experts(module, name, parts, first)
        return
    if not hasattr(weight, "to_local"):
        copy_packed_(packed_tensors(module, name), parts[0])
        return
    bits = parts[0]
    for key, value in ((name, bits.packed), (f"{name}_absmax", bits.absmax)):
        t = stored_tensor(module, key)
        start, count = local_rows(t)
        flat = value.reshape(-1).view(torch.uint8).view(t.shape)
        local(t.detach()).copy_(flat[start : start + count])
    _place_second(module, name, bits, slice(None))


def _place_experts(module: nn.Module, name: str, parts: list[Packed4bit], first: int) -> None:
    for i, bits in enumerate(parts):
        for key, value in ((name, bits.packed), (f"{name}_absmax", bits.absmax)):
            own = local(stored_tensor(module, key).detach())
            own[i].copy_(value.reshape(-1).view(torch.uint8).view(own.shape[1:]))
    for i, bits in enumerate(parts):
        _place_second(module, name, bits, slice(first + i, first + i + 1))
    _gather_second(module, name, first, len(parts))


def _gather_second(module: nn.Module, name: str, first: int, count: int) -> None:
    """Second-level scales are replicated: every process needs those of all experts."""
    ranks = shard_group(stored_tensor(module, name))
    for part in ("absmax2", "offset"):
        t = module._buffers.get(f"{name}_{part}")
        if t is None or ranks is None:
            continue
        own = torch.zeros_like(t)
        own[first : first + count] = t[first : first + count]
        dist.all_reduce(own, group=ranks.group)  # bytes, zero where another process's are
        t.copy_(own)


def _place_second(module: nn.Module, name: str, bits: Packed4bit, where: slice) -> None:
    for part, value in (("absmax2", bits.absmax2), ("offset", bits.offset)):
        if value is not None:
            t = stored_tensor(module, f"{name}_{part}")[where]
            t.copy_(value.reshape(-1).view(torch.uint8).view(t.shape))
