"""Buffers for dequantised weights that one product reads.

On a CPU each thread reuses one buffer: fresh pages cost more than the values. Elsewhere the
allocator of the device reuses memory, so every weight gets its own tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import PLAIN_TYPES
from lightning_peft_kernels.dispatch import Backend
from lightning_peft_kernels.nf4.cpu import empty_paged
from lightning_peft_kernels.nf4.ops import dequantize_4bit, dequantize_into
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing

__all__ = ["release", "stacked_weights", "thread_buffer", "weight_for_product"]

_local = threading.local()


def release() -> None:
    """Free the buffer of this thread."""
    _local.__dict__.clear()


def weight_for_product(
    q: Packed4bit, packing: Packing, dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Return W in `dtype` for a product that follows at once; the next call may overwrite it."""
    shape, kind, block_size = packing
    if type(q.packed) not in PLAIN_TYPES or torch.compiler.is_compiling():
        return dequantize_4bit(q, shape, dtype, kind=kind, block_size=block_size, backend=backend)
    out = None
    # A recorded product (create_graph) keeps its weight, so it must not be overwritten.
    if q.packed.device.type == "cpu" and not torch.is_grad_enabled():
        out = thread_buffer(torch.Size(shape).numel(), dtype).view(tuple(shape))
    return dequantize_into(q, shape, dtype, kind, block_size, backend, out)


def stacked_weights(
    weights: Sequence[tuple[Packed4bit, Packing]], dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Return weights of one width stacked by rows, [ΣN, K]; the next call may overwrite them."""
    first, (shape, kind, block_size) = weights[0]
    if torch.compiler.is_compiling() or type(first.packed) not in PLAIN_TYPES:
        return torch.cat([_dequantize(q, packing, dtype, backend) for q, packing in weights])
    rows, K, device = [], int(shape[1]), first.packed.device
    for _, packing in weights:
        rows.append(int(packing.shape[0]))
    if device.type != "cpu" or torch.is_grad_enabled():
        W = torch.empty(sum(rows), K, dtype=dtype, device=device)
    else:
        W = thread_buffer(sum(rows) * K, dtype).view(sum(rows), K)
    for (q, (shape, kind, block_size)), part in zip(weights, W.split(rows), strict=True):
        dequantize_into(q, shape, dtype, kind, block_size, backend, part)
    return W


def _dequantize(q: Packed4bit, packing: Packing, dtype: torch.dtype, backend: Backend) -> Tensor:
    shape, kind, block_size = packing
    return dequantize_4bit(q, shape, dtype, kind=kind, block_size=block_size, backend=backend)


def thread_buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Return [numel] elements on the CPU; the next call in this thread may overwrite them."""
    size = numel * dtype.itemsize
    held: Tensor | None = getattr(_local, "buffer", None)
    if held is None or held.nbytes < size:
        _local.buffer = None  # free it before the larger one is allocated
        with torch.inference_mode(False):
            held = _local.buffer = empty_paged((numel,), dtype)
    return held[: -(-size // held.itemsize)].view(dtype)[:numel]
