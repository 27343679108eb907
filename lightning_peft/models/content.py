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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_peft.storage.dtensor import is_sharded, local

__all__ = ["Contents", "TensorContent", "changed_tensors", "content_hash", "take_content"]

_HASHED_WHOLE = 1 << 24  # bytes up to which a tensor is always hashed completely
_SAMPLE_STEP = 4096  # elements per sampled value
_SMALL = 1 << 16  # bytes up to which one checksum is faster than a weighted sum and its checksum
_WIDTH = 2039  # words per row: a prime, and a row of sums stays in a CPU's first cache
_ROWS_AT_ONCE = 64  # on a GPU, where torch has no product of integer matrices
_THREADS = 4  # more wait for the interpreter lock
_WORTH_THREADS = 1 << 22  # bytes


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
    found = {name: local(tensor.detach()) for name, tensor in tensors.items()}
    hashed = _hashes({name: t for name, t in found.items() if _has_content(t)})
    return {
        name: _content(t, hashed[name], is_sharded(tensors[name])) if name in hashed else None
        for name, t in found.items()
    }


def _content(t: Tensor, digest: int, sharded: bool) -> TensorContent:
    return TensorContent(t.data_ptr(), _version(t), _sample(t), digest, sharded)


def changed_tensors(before: Contents, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose bytes differ from before, and of new ones.

    A tensor that had no values before, was only converted to another dtype, or was cut into shards
    is unchanged, and its entry is replaced.
    """
    changed = {name for name in tensors if name not in before}
    renewed: dict[str, Tensor] = {}
    compared: dict[str, tuple[TensorContent, Tensor]] = {}
    for name, tensor in tensors.items():
        t = local(tensor.detach())
        if name in changed or not _has_content(t):
            continue
        entry = before[name]
        if entry is None or entry.sharded != is_sharded(tensor) or _was_converted(entry, t):
            renewed[name] = tensor
        elif _may_differ(entry, t):
            compared[name] = entry, t
    before.update(take_content(renewed))
    hashed = _hashes({name: t for name, (_, t) in compared.items()})
    for name, (entry, t) in compared.items():
        if entry.digest != hashed[name]:
            changed.add(name)
        else:
            entry.address, entry.version = t.data_ptr(), _version(t)
    return [name for name in tensors if name in changed]


def _has_content(t: Tensor) -> bool:
    """Whether every element has memory of its own: not so on meta, nor in an expanded tensor."""
    return t.device.type != "meta" and t.untyped_storage().nbytes() >= t.nbytes


def _was_converted(entry: TensorContent, t: Tensor) -> bool:
    if entry.sample.dtype == t.dtype:
        return False
    sample = _sample(t)
    return _equal_bytes(entry.sample.to(t.dtype), sample)


def _may_differ(entry: TensorContent, t: Tensor) -> bool:
    """Whether the tensor has to be hashed: it is small, or something hints at a write."""
    if t.nbytes <= _HASHED_WHOLE or entry.address != t.data_ptr() or entry.version != _version(t):
        return True
    return not _equal_bytes(entry.sample, _sample(t))


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


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the hash of every tensor, by name. Tensors on the CPU are shared out to threads."""
    inline = {n: t for n, t in tensors.items() if t.device.type != "cpu" or not t.is_contiguous()}
    shares = _shares({n: t for n, t in tensors.items() if n not in inline})

    def hashed(share: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: content_hash(t) for name, t in share.items()}

    if len(shares) < 2:
        return hashed(tensors)
    with ThreadPoolExecutor(len(shares) - 1) as pool:
        others = [pool.submit(hashed, share) for share in shares[1:]]
        found = hashed({**shares[0], **inline})
    for other in others:
        found |= other.result()
    return found


def _shares(tensors: Mapping[str, Tensor]) -> Sequence[dict[str, Tensor]]:
    """Return shares of about equal size, one per thread; one share if threads cost more."""
    count = min(torch.get_num_threads(), _THREADS)
    if count < 2 or sum(t.nbytes for t in tensors.values()) < _WORTH_THREADS:
        return [dict(tensors)]
    shares: list[dict[str, Tensor]] = [{} for _ in range(count)]
    held = [0] * count
    for name in sorted(tensors, key=lambda n: -tensors[n].nbytes):
        least = held.index(min(held))
        shares[least][name] = tensors[name]
        held[least] += tensors[name].nbytes
    return shares


def content_hash(t: Tensor) -> int:
    """Return a hash of the tensor's bytes, dtype and shape, computed where the tensor is.

    It is the same on every device. A small tensor is hashed by its CRC-32. Of a larger one, the
    bytes are read as 64-bit words in rows. Each row is multiplied by an odd number of its own,
    modulo 2^64, and the rows are added. The hash is the CRC-32 of this sum and of the bytes after
    the last complete row. A change of any single word changes it.

    Only the top bit of a word reaches nothing but the top bit of a sum, where an even number of
    changes in one column cancels. It is the sign of every second value in 32 bits, and of every
    fourth in 16. A change of these signs alone is what may be missed, and the width of a row is a
    prime, so that few patterns of a matrix fall into one column.

    It is no cryptographic hash.
    """
    kind = zlib.crc32(f"{t.dtype}{list(t.shape)}".encode())
    if t.device.type == "cpu" and t.nbytes <= _SMALL and t.is_contiguous():
        return (kind << 32) ^ _checksum(t)
    values = t.detach().reshape(-1)
    if values.stride() != (1,):  # one element may have any stride, and counts as contiguous
        values = values.clone(memory_format=torch.contiguous_format)
    data = values.view(torch.uint8)
    if data.numel() <= _SMALL:
        return (kind << 32) ^ _checksum(data.cpu())
    if data.storage_offset() % 8:
        data = data.clone()
    end = data.numel() - data.numel() % (8 * _WIDTH)
    sums = _weighted_sum(data[:end].view(torch.int64).view(-1, _WIDTH))
    return (kind << 32) ^ _checksum(data[end:].cpu(), _checksum(sums.cpu()))


def _checksum(t: Tensor, before: int = 0) -> int:
    """Return the checksum of a contiguous tensor on the CPU, after bytes with a known checksum.

    It reads the memory itself: views of torch cost more than the checksum of a few kilobytes.
    """
    if t.numel() == 0:
        return before
    return zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr()), before)


def _weighted_sum(rows: Tensor) -> Tensor:
    """Return the sum of all rows, each times its weight, modulo 2^64."""
    weights = _weights(rows.shape[0])
    if rows.device.type == "cpu":
        return torch.mv(rows.t(), weights)
    return _weighted_sum_by_blocks(rows, weights.to(rows.device))


def _weighted_sum_by_blocks(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum in a few kernels per block of rows, without an integer product."""
    total = torch.zeros_like(rows[0])
    blocks = zip(rows.split(_ROWS_AT_ONCE), weights.split(_ROWS_AT_ONCE), strict=True)
    for block, weight in blocks:
        total += (block * weight[:, None]).sum(0)
    return total


@lru_cache(maxsize=64)
def _weights(count: int) -> Tensor:
    """Return odd numbers that look random: two of them differ in their low bits already.

    Two words that change places are missed only if the product of their difference and that of
    their weights is 0 modulo 2^64.
    """
    halves = torch.arange(1, 2 * count + 1, device="cpu")
    for multiplier in (0x7FEB352D, 0x68E31DA5):
        halves = halves * multiplier % (1 << 32)
        halves ^= halves >> 15
    pairs = halves.view(2, count)
    weights: Tensor = (pairs[0] << 32) | pairs[1] | 1
    return weights
