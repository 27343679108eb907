"""4-bit quantisation on a CPU: the bytes and values of the reference in `nf4.py`, faster.

Quantising looks a value up by cell: with 16 cells a unit no cell holds two decision points, so one
comparison an element replaces fifteen. Dequantising calls bitsandbytes' vectorised routine where it
is installed, on the flattened weight (with the weight's own shape it takes wrong scales where
in % block != 0), into a buffer of ours; else a table of byte → two values.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.codebooks import code, nf4_cells
from lightning_peft_kernels.dynamic_map import dynamic_map

__all__ = ["dequantize_blocks", "quantize_nf4_blocks", "scales"]

# Elements. A chunk and its temporaries stay in the L2 cache. Ops on up to 2^15 elements run in the
# calling thread: with several threads, chunks are dealt out instead of splitting every op, because
# torch's barriers cost 10 × on a machine that others use too.
_CHUNK, _CHUNK_THREADS = 1 << 17, 1 << 15
_PAIR_CHUNK = 1 << 18
_TINY = 1e-38
_HUGE_BYTES = 1 << 24  # results from here on ask for huge pages: first touch costs half
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def quantize_nf4_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(bytes [n/2], absmax fp32 [n/block]) of `flat` [n], n a multiple of the block."""
    n, threads = flat.numel(), torch.get_num_threads()
    packed = torch.empty(n // 2, dtype=torch.uint8)
    absmax = torch.empty(n // block_size, dtype=torch.float32)
    chunk = _CHUNK if threads == 1 else _CHUNK_THREADS

    def run(start: int, stop: int) -> None:
        _quantize_range(flat, packed, absmax, start, stop, chunk, block_size)

    share = -(-n // threads // chunk) * chunk
    if threads == 1 or n <= chunk:
        run(0, n)
        return packed, absmax
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, n, share)
        list(pool.map(run, starts, [min(start + share, n) for start in starts]))
    return packed, absmax


def _quantize_range(
    flat: Tensor,
    packed: Tensor,
    absmax: Tensor,
    start: int,
    stop: int,
    chunk: int,
    block_size: int,
) -> None:
    """Elements [start, stop) with one set of temporaries, 13 bytes an element of the chunk."""
    base, bound = nf4_cells()
    size = min(chunk, stop - start)
    x, y = (torch.empty(size, dtype=torch.float32) for _ in range(2))
    cells = torch.empty(size, dtype=torch.int32)
    codes = torch.empty(size, dtype=torch.uint8)
    for first in range(start, stop, chunk):
        last = min(first + chunk, stop)
        n = last - first
        v, t, cell, c = x[:n], y[:n], cells[:n], codes[:n]
        scale = absmax[first // block_size : last // block_size]
        rows = v.view(-1, block_size)
        torch.amax(torch.abs(v.copy_(flat[first:last]), out=t).view(-1, block_size), 1, out=scale)
        rows.mul_(scale.clamp(min=_TINY).reciprocal_()[:, None]).clamp_(-1.0, 1.0)
        cell.copy_(torch.mul(v, 16.0, out=t).add_(16.0))
        torch.index_select(base, 0, cell, out=c)
        torch.index_select(bound, 0, cell, out=t)
        c += v > t
        pairs = c.view(torch.int16)  # little endian: low byte is the even element
        packed[first // 2 : last // 2] = ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Nested scales fp32 [blocks]: map[code] · absmax2[block // 256] + offset, two roundings."""
    codes = codes.reshape(-1)
    n, values = codes.numel(), dynamic_map(True)
    out = torch.empty(n, dtype=torch.float32)
    native = _native("cdequantize_blockwise_cpu_fp32") if torch.get_num_threads() == 1 else None
    if native is not None and codes.is_contiguous() and absmax2.is_contiguous():
        pointers = [_pointer(t) for t in (values, codes, absmax2, out)]
        native(*pointers, ctypes.c_longlong(256), ctypes.c_longlong(n))
        return out.add_(offset)
    for start in range(0, n, _CHUNK_THREADS):
        part = out[start : start + _CHUNK_THREADS]
        torch.index_select(values, 0, codes[start : start + _CHUNK_THREADS].int(), out=part)
        second = absmax2[start // 256 : -(-(start + part.numel()) // 256)]
        full = part.numel() // 256 * 256
        part[:full].view(-1, 256).mul_(second[: full // 256, None])
        part[full:].mul_(second[-1])
        part.add_(offset)
    return out


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Values [n] of whole blocks.

    Args:
        packed: uint8 [n/2].
        absmax: fp32 [n/block].
        dtype: Of the values.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements a scale.
        out: Contiguous, n elements of `dtype`; written instead of a new tensor.
    """
    n = packed.numel() * 2
    out = fresh((n,), dtype) if out is None else out
    # Its AVX-512 code is inexact from block 2048 on, so bitsandbytes itself avoids it there.
    suffix = _SUFFIX.get(dtype) if block_size < 2048 else None
    native = None if suffix is None else _native(f"cdequantize_blockwise_cpu_{kind}_{suffix}")
    if native is not None and packed.is_contiguous() and absmax.is_contiguous():
        width = block_size  # of its rows: any multiple of the block is right, wide ones are faster
        while width < 4096 and n % (2 * width) == 0:
            width *= 2
        sizes = [ctypes.c_longlong(i) for i in (block_size, n // width, width)]
        native(_pointer(packed), _pointer(absmax), _pointer(out), *sizes)
        return out
    step = max(_PAIR_CHUNK // block_size, 1) * block_size
    flat = out.view(-1)
    for start in range(0, n, step):
        stop = min(start + step, n)
        pairs = _pairs(kind).index_select(0, packed[start // 2 : stop // 2].int())
        values = pairs.view(torch.float32).view(-1, block_size)
        part = absmax[start // block_size : stop // block_size]
        flat[start:stop].copy_((values * part[:, None]).view(-1))
    return out


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one on huge pages where Linux has them."""
    out = torch.empty(tuple(shape), dtype=dtype)
    size = out.numel() * out.element_size()
    if size >= _HUGE_BYTES and sys.platform == "linux":
        first = -(-out.data_ptr() // 4096) * 4096
        length = (out.data_ptr() + size - first) // 4096 * 4096
        advice = 14  # MADV_HUGEPAGE; only advice, so a refusal changes nothing
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return out


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None)


@lru_cache(maxsize=16)
def _native(name: str) -> Callable[..., None] | None:
    """A routine of bitsandbytes' CPU library: nothing in torch comes near its rate."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    from bitsandbytes.cextension import lib

    library = vars(lib).get("_lib")
    if not isinstance(library, ctypes.CDLL):  # its stand-in, without a library
        return None
    routine: Callable[..., None] | None = getattr(library, name, None)
    return routine


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@lru_cache(maxsize=4)
def _pairs(kind: str) -> Tensor:
    """Byte → (even value, odd value) as one int64, [256]."""
    values = code(kind)
    byte = torch.arange(256)
    both = torch.stack([values[byte >> 4], values[byte & 15]], dim=1).contiguous()
    return both.view(torch.int64).view(-1)
