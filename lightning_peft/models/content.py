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

import torch
from torch import Tensor

from lightning_peft.storage.dtensor import is_sharded, local

__all__ = ["Contents", "TensorContent", "changed_tensors", "content_hash", "take_content"]

_HASHED_WHOLE = 1 << 24  # bytes up to which a tensor is always hashed completely
_SAMPLE_STEP = 4096  # elements per sampled value
_SMALL = 1 << 19  # bytes up to which one checksum call is faster than the polynomial
_WIDTHS = (32749, 4093)  # words per row, primes: the largest row and sum fit a CPU's second cache
_MULTIPLIER = 0x1E3779BB  # 3 modulo 8, so that its powers differ in their low bits
_ROWS_AT_ONCE = 64  # on a GPU, where a kernel per row would cost more than the row
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
    bytes are read as 32-bit words. Rows of words are the coefficients of a polynomial modulo 2^32
    at a fixed odd number, its values are reduced once more in shorter rows, and the CRC-32 is taken
    of the result. A change of any single word changes the hash.

    The top bit of a word reaches nothing but the top bit of a value, where an even number of
    changed signs in one column cancels. Therefore the width of a row is a prime: a row, a column,
    or all of a matrix with its sign changed leaves an odd number in some column.

    It is no cryptographic hash.
    """
    kind = zlib.crc32(f"{t.dtype}{list(t.shape)}".encode())
    if t.device.type == "cpu" and t.nbytes <= _SMALL and t.is_contiguous():
        return (kind << 32) ^ _checksum(t)
    values = t.detach().reshape(-1)
    if values.stride() != (1,):  # one element may have any stride, and counts as contiguous
        values = values.clone(memory_format=torch.contiguous_format)
    flat = values.view(torch.uint8)
    if flat.numel() <= _SMALL:
        return (kind << 32) ^ _checksum(flat.cpu())
    if flat.storage_offset() % 4:
        flat = flat.clone()
    words = flat.numel() // 4
    rest = bytes(flat[words * 4 :].tolist())
    reduced = flat[: words * 4].view(torch.int32)
    for width in _WIDTHS:
        reduced = _polynomials(reduced, width)
    return (kind << 32) ^ zlib.crc32(rest, _checksum(reduced.cpu()))


def _checksum(t: Tensor) -> int:
    """Return the checksum of a contiguous tensor on the CPU.

    It reads the memory itself: views of torch cost more than the checksum of a few kilobytes.
    """
    if t.numel() == 0:
        return 0
    return zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))


def _polynomials(words: Tensor, width: int) -> Tensor:
    """Return the value of the polynomial of each column, for rows of `width` words."""
    if words.device.type != "cpu":
        return _polynomials_by_blocks(words, width)
    first, *rows = words.split(width)
    total: Tensor = first.clone()
    for row in rows:
        column = total if row.numel() == width else total[: row.numel()]
        torch.add(row, column, alpha=_MULTIPLIER, out=column)
    return total


def _polynomials_by_blocks(words: Tensor, width: int) -> Tensor:
    """Return the values that `_polynomials` does, in a few kernels per block of rows."""
    powers = _powers(_ROWS_AT_ONCE + 1)
    weights = torch.tensor(powers[-2::-1], dtype=torch.int32, device=words.device)[:, None]
    complete = words.numel() // width
    total: Tensor = words.new_zeros(width)
    for block in words[: complete * width].view(complete, width).split(_ROWS_AT_ONCE):
        n = block.shape[0]
        total *= powers[n]
        total += (block * weights[-n:]).sum(0, dtype=torch.int32)
    rest = words[complete * width :]
    if rest.numel():
        column = total[: rest.numel()]
        torch.add(rest, column, alpha=_MULTIPLIER, out=column)
    return total


def _powers(count: int) -> list[int]:
    """Return the first powers of the multiplier as signed 32-bit numbers."""
    found = [pow(_MULTIPLIER, n, 1 << 32) for n in range(count)]
    return [n - (1 << 32) if n >> 31 else n for n in found]
