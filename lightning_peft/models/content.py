"""Content of tensors at one moment, kept small, to tell later which tensors were written to.

A tensor of up to 16 MiB is hashed completely whenever it is compared. A larger one is hashed again
only if its memory address or its version counter changed, or if a sample of its values did. The
sample has a value of every row and at least one value in 4,096.

A write is missed only if the tensor is larger than 16 MiB, the write bypasses the version counter
(through `.data` or a raw pointer), and it leaves every sampled value as it was.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.storage.dtensor import is_sharded, local

__all__ = ["Contents", "TensorContent", "changed_tensors", "content_hash", "take_content"]

_HASHED_WHOLE = 1 << 24  # bytes up to which a tensor is always hashed completely
_SAMPLE_STEP = 4096  # elements per sampled value
_SMALL = 1 << 19  # bytes up to which one checksum call is faster than the polynomial
_ROW = 1 << 16  # words per row of the polynomial: row and sum stay in a CPU's second cache
_SHORT_ROW = 1 << 14  # words per row of a tensor with fewer than `_LONG` words
_LONG = 1 << 18
_ODD = 0x1E3779B97F4A7C15


@dataclass
class TensorContent:
    """Content of one tensor at one moment; of a sharded tensor, of this process's rows.

    Attributes:
        address: Memory address.
        version: Version counter; writes in place raise it.
        sample: Some of the values, on the CPU.
        digest: Hash of all bytes.
        sharded: Whether it is this process's rows of a larger tensor.
    """

    address: int
    version: int
    sample: Tensor
    digest: int
    sharded: bool


#: Content by name; None for a tensor without values (on meta).
Contents = dict[str, TensorContent | None]


def take_content(tensors: Mapping[str, Tensor]) -> Contents:
    """Return the content of every tensor, by name."""
    return {name: _content(tensor) for name, tensor in tensors.items()}


def _content(tensor: Tensor) -> TensorContent | None:
    t = local(tensor.detach())
    if not _has_content(t):
        return None
    return TensorContent(t.data_ptr(), _version(t), _sample(t), content_hash(t), is_sharded(tensor))


def changed_tensors(before: Contents, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield the names of tensors whose bytes differ from before, and of new ones.

    A tensor that had no values before, was only converted to another dtype, or was cut into shards
    is unchanged, and its entry is replaced.
    """
    for name, tensor in tensors.items():
        t = local(tensor.detach())
        if name not in before:
            yield name
        elif not _has_content(t):
            continue
        else:
            entry = before[name]
            if entry is None or entry.sharded != is_sharded(tensor) or _was_converted(entry, t):
                before[name] = _content(tensor)
            elif _differs(entry, t):
                yield name


def _has_content(t: Tensor) -> bool:
    """Whether every element has memory of its own: not so on meta, nor in an expanded tensor."""
    return t.device.type != "meta" and t.untyped_storage().nbytes() >= t.nbytes


def _was_converted(entry: TensorContent, t: Tensor) -> bool:
    if entry.sample.dtype == t.dtype:
        return False
    sample = _sample(t)
    return _equal_bytes(entry.sample.to(t.dtype), sample)


def _differs(entry: TensorContent, t: Tensor) -> bool:
    if t.nbytes > _HASHED_WHOLE:
        same_memory = entry.address == t.data_ptr() and entry.version == _version(t)
        if same_memory and _equal_bytes(entry.sample, _sample(t)):
            return False
    if entry.digest != content_hash(t):
        return True
    entry.address, entry.version = t.data_ptr(), _version(t)
    return False


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _sample(t: Tensor) -> Tensor:
    """Return values of every row, at least one in 4,096. A small tensor needs fewer."""
    if t.nbytes <= _HASHED_WHOLE or t.ndim < 2:
        sample = t.reshape(-1)[::_SAMPLE_STEP]
        if sample.device.type == "cpu":
            return sample.clone(memory_format=torch.contiguous_format)
        return sample.cpu()
    rows = t.flatten(0, -2) if t.ndim == 3 else t.flatten(1)
    width = rows.shape[1]
    first = torch.arange(rows.shape[0], device=t.device) * 31 % min(width, _SAMPLE_STEP)
    steps = torch.arange(0, width, _SAMPLE_STEP, device=t.device)
    columns = (first[:, None] + steps).clamp(max=width - 1)
    return rows.gather(1, columns).cpu()


def _equal_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two samples are equal bit for bit; a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def content_hash(t: Tensor) -> int:
    """Return a hash of the tensor's bytes, dtype and shape, computed where the tensor is.

    The bytes are read as 64-bit words. Rows of words are the coefficients of a polynomial modulo
    2^64 at a fixed odd number, and the checksum is taken of its values, so that a change of any
    single word changes the hash, and so does an exchange of two. It is no cryptographic hash.
    """
    kind = zlib.crc32(f"{t.dtype}{list(t.shape)}".encode())
    if t.device.type == "cpu" and t.nbytes <= _SMALL and t.is_contiguous():
        return (kind << 32) ^ _checksum(t)
    values = t.detach().reshape(-1)
    if values.stride() != (1,):  # one element may have any stride, and counts as contiguous
        values = values.clone(memory_format=torch.contiguous_format)
    flat = values.view(torch.uint8)
    if flat.device.type == "cpu" and flat.numel() <= _SMALL:
        return (kind << 32) ^ _checksum(flat)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.numel() // 8
    rest = bytes(flat[words * 8 :].tolist())
    return (kind ^ zlib.crc32(rest)) + _polynomial(flat[: words * 8].view(torch.int64))


def _checksum(t: Tensor) -> int:
    """Return the checksum of a contiguous tensor on the CPU.

    It reads the memory itself: views of torch cost more than the checksum of a few kilobytes.
    """
    if t.numel() == 0:
        return 0
    return zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))


def _polynomial(words: Tensor) -> int:
    """Return one number for all words: a polynomial per column, then a checksum of these."""
    width = _SHORT_ROW if words.numel() < _LONG else _ROW
    total, *rows = words.split(width)
    total = total.clone()
    for row in rows:
        n = row.numel()
        torch.add(row, total[:n], alpha=_ODD, out=total[:n])
    return _checksum(total.cpu())
