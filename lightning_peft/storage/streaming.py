"""A base read from safetensors row by row into a model built on the meta device.

Each process reads its own rows only, a few at a time, and quantises them on the way; no process
ever holds more of the dense model than one chunk. Bytes are those of quantising the whole weight.
A start that needs a weight whole (PiSSA, DoRA's norms) is given it right when its rows were read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning_peft_kernels.nf4.ops import Packed4bit, quantize_4bit, quantize_scales
from torch import Tensor, nn

from lightning_peft.core.modules import tied_parameters
from lightning_peft.core.names import in_adapter
from lightning_peft.storage.base_files import BaseFiles, stored_tensor
from lightning_peft.storage.dtensor import local, local_rows, shard_group
from lightning_peft.storage.nf4.packed_layer import FourBitSpec, copy_packed_
from lightning_peft.storage.nf4.storage import FourBitStorage
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.registry import held_tensors, storage_of
from lightning_peft.storage.tensor_files import RowSource

__all__ = ["After", "Cache", "Through", "materialize", "stream_base"]

#: (module, name of the weight, how to read it whole) → the weight to store in its place, or None.
After = Callable[[nn.Module, str, Callable[[], Tensor]], Tensor | None]
#: (name of the weight, its shape in the file, its rows) → rows that are watched as they are read.
Through = Callable[[str, Sequence[int], RowSource], RowSource]

_CHUNK = 1 << 22  # elements read at once: 16 MB in fp32


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor memory; buffers that no file holds get their values again.

    Raises:
        RuntimeError: a buffer has no known value.
    """
    lost = [
        (name, module)
        for name, module in model.named_modules()
        if not in_adapter(name)
        and any(b is not None and b.device.type == "meta" for b in module._buffers.values())
    ]
    tied = tied_parameters(model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
    for first, *others in tied:
        for place in others:
            place.module._parameters[place.key] = first.module._parameters[first.key]
    for name, module in lost:
        if held_tensors(module):
            continue  # companions of a weight: written with it
        owner = _owner(model, name)
        if owner is None or not hasattr(module, "original_inv_freq"):
            raise RuntimeError(
                f"{name!r}: expected its buffers {list(module._buffers)} to have values, found "
                "them on the meta device; build the module that owns them outside of "
                "torch.device('meta')"
            )
        owner._init_weights(module)


def _owner(model: nn.Module, name: str) -> Any:
    """The innermost enclosing Hugging Face model."""
    found = None
    for path, module in model.named_modules():
        encloses = not path or name.startswith(f"{path}.")
        if encloses and hasattr(module, "_init_weights"):
            found = module
    return found


class Cache(Protocol):
    """Packed weights that need not be quantised again."""

    def fill(self, name: str, module: nn.Module, key: str) -> bool:
        """Copy a packed weight in; False if it is not there."""

    def keep(self, name: str, module: nn.Module, key: str) -> None:
        """Note a weight that was packed."""


def stream_base(
    model: nn.Module,
    base: Path | BaseFiles,
    *,
    chunk: int = _CHUNK,
    after: After | None = None,
    through: Through | None = None,
    cache: Cache | None = None,
) -> None:
    """Fill the base of `model` (adapters left out) from a folder of safetensors.

    Args:
        model: With memory for its own rows; sharded or not, packed or dense.
        base: The files, or their folder. It holds ``*.safetensors``; names are the model's, or
            those of one submodule.
        chunk: Elements of a dense weight read at once.
        after: Called when a weight's rows are in place, on every process in the same order; what
            it returns is stored instead.
        through: Wraps the rows of each weight, for instance to note a fingerprint.
        cache: Where packed weights are looked up, and noted after they were packed.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: tensors are missing or have another shape, with the list; nothing is read. Or
            values that cannot be packed, with the file and the tensor.
    """
    files = base if isinstance(base, BaseFiles) else BaseFiles(model, base)
    with torch.no_grad():
        for name, (module, key) in files.wanted.items():
            with files.naming(name), files.open(name) as rows:
                source = rows
                packed = cache is not None and storage_of(module, key).is_quantized
                if cache is None or not packed or not cache.fill(name, module, key):
                    if through is not None:
                        source = through(name, files.shape_in_file(name), rows)
                    _fill(module, key, source, chunk)
                    if cache is not None and packed:
                        cache.keep(name, module, key)
                other = None if after is None else after(module, key, partial(_whole, source))
                if other is not None:
                    _fill(module, key, other, chunk)


def _fill(module: nn.Module, key: str, source: RowSource, chunk: int) -> None:
    """Write one weight from `source`, a tensor in a file or in memory, which is sliced."""
    storage = storage_of(module, key)
    if isinstance(storage, FourBitStorage):
        _stream_packed(module, key, source, chunk)
    elif storage.is_quantized:
        storage.write(module, key, source[...].to(storage.dtype(module, key)))
    else:
        _stream_dense(stored_tensor(module, key), source, chunk)


def _whole(source: RowSource) -> Tensor:
    return source[...]


# ---- copying in


def _stream_dense(t: Tensor, source: RowSource, chunk: int) -> None:
    first, rows = local_rows(t)
    own = local(t.detach())
    if not t.ndim:
        own.copy_(source[...])
        return
    # A slice of a DTensor would gather the complete weight on every rank.
    step = max(1, chunk // max(1, t.shape[1:].numel()))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        own[start:stop].copy_(source[first + start : first + stop])


def _stream_packed(module: nn.Module, name: str, source: RowSource, chunk: int) -> None:
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
    """Blocks cross rows, or experts lie one behind the other: one weight dense for a moment."""
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
