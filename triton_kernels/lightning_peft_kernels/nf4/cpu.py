"""Fast 4-bit quantisation on a CPU, with the bytes and values of `nf4.reference`.

Quantising looks each value up by cell, one byte per element. Adding 1.5 · 2^(23 - 14) to v in
[-1, 1] leaves round(2^14 · v) in the low bits of the sum, so no conversion is needed. The few
elements in cells that a decision point splits are searched for.

Dequantising calls the vectorised routine of bitsandbytes, if it is installed, on the flattened
weight: with the weight's own shape it takes wrong scales if in % block != 0. Otherwise a table maps
each byte to two values.
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

from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.codebooks.four_bit import (
    NF4_CELLS,
    SPLIT_CELL,
    code,
    midpoints,
    nf4_cells,
)
from lightning_peft_kernels.nf4.bitsandbytes_library import bitsandbytes_library

__all__ = [
    "block_scales",
    "dequantize_blocks",
    "empty_paged",
    "native_routine",
    "quantize_nf4_blocks",
]

# Elements. A chunk and its temporaries stay in the L2 cache. One thread works on a chunk, because
# torch's barriers, one per op, cost 10 × on a shared machine.
_CHUNK = 1 << 17
_ONE_THREAD = 1 << 15  # ops on at most this many elements run in the calling thread
_PAIR_CHUNK = 1 << 18
_TINY = 1e-38
_ROUND = 1.5 * 2**23 / NF4_CELLS  # v + _ROUND has steps of 1 / NF4_CELLS
_FIRST_CELL = int(torch.tensor(_ROUND - 1.0, dtype=torch.float32).view(torch.int32))
_SPLIT_BYTES = int.from_bytes([SPLIT_CELL] * 8, "little", signed=True)
# Results from this size on ask for huge pages, which halves the cost of the first touch.
# malloc maps each of them separately.
_HUGE_BYTES = 1 << 25
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def quantize_nf4_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (bytes [n/2], absmax fp32 [n/block]) of `flat` [n], n a multiple of the block."""
    n, threads = flat.numel(), torch.get_num_threads()
    packed = torch.empty(n // 2, dtype=torch.uint8)
    absmax = torch.empty(n // block_size, dtype=torch.float32)
    share = -(-n // threads // _CHUNK) * _CHUNK
    if share >= n:
        _quantize_range(flat, packed, absmax, 0, n, block_size)
        return packed, absmax
    starts, inference = range(0, n, share), torch.is_inference_mode_enabled()

    def run(start: int) -> None:
        with torch.inference_mode(
            inference
        ):  # as in the calling thread, which allocated the results
            _quantize_range(flat, packed, absmax, start, min(start + share, n), block_size)

    try:
        # Applies to the threads of the pool, and to threads that start meanwhile.
        with ThreadPoolExecutor(len(starts), initializer=lambda: torch.set_num_threads(1)) as pool:
            list(pool.map(run, starts))
    finally:
        torch.set_num_threads(threads)
    return packed, absmax


def _quantize_range(
    flat: Tensor, packed: Tensor, absmax: Tensor, start: int, stop: int, block_size: int
) -> None:
    """Quantise elements [start, stop) with one set of temporaries, 11 bytes per chunk element."""
    table, points = nf4_cells(), midpoints("nf4")
    split = torch.tensor(_SPLIT_BYTES)
    size = min(_CHUNK, stop - start)
    values, sums = (torch.empty(size, dtype=torch.float32) for _ in range(2))
    codes, words = torch.empty(size, dtype=torch.uint8), torch.empty(size // 8, dtype=torch.int64)
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        n = last - first
        v, t, c = values[:n], sums[:n], codes[:n]
        source = flat[first:last]
        if source.dtype != torch.float32:
            source = v.copy_(source)
        scale = absmax[first // block_size : last // block_size]
        torch.amax(torch.abs(source, out=t).view(-1, block_size), 1, out=scale)
        factor = scale.clamp(min=_TINY).reciprocal_()[:, None]
        torch.mul(source.view(-1, block_size), factor, out=v.view(-1, block_size))
        cell = torch.add(v, _ROUND, out=t).view(torch.int32).sub_(_FIRST_CELL)
        torch.index_select(table, 0, cell, out=c)
        eights = c.view(torch.int64)
        near = torch.bitwise_and(eights, split, out=words[: n // 8]).nonzero().view(-1)
        if near.numel():
            found = torch.bucketize(v.view(-1, 8)[near], points).to(torch.uint8)
            eights[near] = found.view(torch.int64).view(-1)
        pairs = c.view(torch.int16)  # little endian: low byte is the even element
        odd = torch.bitwise_right_shift(pairs, 8, out=t.view(torch.int16)[: n // 2])
        packed[first // 2 : last // 2] = pairs.bitwise_left_shift_(4).bitwise_or_(odd)


def block_scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Return nested scales fp32 [..., blocks].

    scale = map[code] · absmax2[block // 256] + offset, with two roundings.

    Args:
        codes: uint8 [blocks], or [weights, blocks] with whole groups of 256.
        absmax2: fp32, one per group.
        offset: fp32 [1], or [weights, 1].
    """
    flat, absmax2 = codes.reshape(-1), absmax2.reshape(-1)
    n, values = flat.numel(), dynamic_map(True)
    out = torch.empty(n, dtype=torch.float32)
    native = native_routine("cdequantize_blockwise_cpu_fp32", 6)
    if native is not None and flat.is_contiguous() and absmax2.is_contiguous():
        native(values.data_ptr(), flat.data_ptr(), absmax2.data_ptr(), out.data_ptr(), 256, n)
        return out.view(codes.shape).add_(offset)
    for start in range(0, n, _ONE_THREAD):
        part = out[start : start + _ONE_THREAD]
        torch.index_select(values, 0, flat[start : start + _ONE_THREAD].int(), out=part)
        second = absmax2[start // 256 : -(-(start + part.numel()) // 256)]
        full = part.numel() // 256 * 256
        part[:full].view(-1, 256).mul_(second[: full // 256, None])
        part[full:].mul_(second[-1])
    return out.view(codes.shape).add_(offset)


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantise full blocks to values [n].

    Args:
        packed: uint8 [n/2].
        absmax: fp32 [n/block].
        dtype: Dtype of the values.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements per scale.
        out: Contiguous, n elements of `dtype`; written instead of a new tensor.
    """
    n = packed.numel() * 2
    out = empty_paged((n,), dtype) if out is None else out
    # The AVX-512 code is inexact from block 2048 on; bitsandbytes itself avoids it there.
    suffix = _SUFFIX.get(dtype) if block_size < 2048 else None
    name = f"cdequantize_blockwise_cpu_{kind}_{suffix}"
    native = None if suffix is None else native_routine(name, 6)
    if native is not None and packed.is_contiguous() and absmax.is_contiguous():
        width = block_size  # row width: any multiple of the block is correct, wide rows are faster
        while width < 4096 and n % (2 * width) == 0:
            width *= 2
        pointers = packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        native(*pointers, block_size, n // width, width)
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


def empty_paged(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; a large one uses huge pages if Linux offers them."""
    out = torch.empty(tuple(shape), dtype=dtype)
    size = out.numel() * out.element_size()
    if size >= _HUGE_BYTES and sys.platform == "linux":
        first = -(-out.data_ptr() // 4096) * 4096
        length = (out.data_ptr() + size - first) // 4096 * 4096
        advice = 14  # MADV_HUGEPAGE is advice: a refusal changes nothing
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return out


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None)


@lru_cache(maxsize=16)
def native_routine(name: str, arguments: int) -> Callable[..., Any] | None:
    """Return a routine of bitsandbytes' CPU library, an order of magnitude faster than torch.

    It takes addresses and sizes as plain integers of 64 bits, without a Python call for each. One
    without arguments returns an int, the others nothing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    library = vars(bitsandbytes_library()).get("_lib")
    if not isinstance(
        library, ctypes.CDLL
    ):  # bitsandbytes without its library puts a placeholder here
        return None
    routine = getattr(library, name, None)
    if routine is None:
        return None
    # A function of our own at its address: bitsandbytes' object keeps its argument types.
    address = ctypes.cast(routine, ctypes.c_void_p).value or 0
    form = ctypes.CFUNCTYPE(None if arguments else ctypes.c_int, *[ctypes.c_int64] * arguments)
    typed: Callable[..., Any] = form(address)
    return typed


@lru_cache(maxsize=4)
def _pairs(kind: str) -> Tensor:
    """Return the table byte → (even value, odd value) as one int64, [256]."""
    values = code(kind)
    byte = torch.arange(256, device="cpu")  # also inside `with torch.device(…)`
    both = torch.stack([values[byte >> 4], values[byte & 15]], dim=1).contiguous()
    return both.view(torch.int64).view(-1)
