"""Pieces of files of packed weights, with a checksum per MiB, so that a part can be checked.

A rank often reads some rows of a piece that another number of ranks wrote. It reads the complete
blocks around them: at most two MiB more per piece.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["block_checksums", "read_checked"]

_BLOCK = 1 << 20  # bytes per checksum


def block_checksums(data: memoryview) -> list[int]:
    """Return the checksums of the blocks of a piece.

    Args:
        data: Bytes of the piece.
    """
    return [zlib.crc32(data[i : i + _BLOCK]) for i in range(0, len(data), _BLOCK)]


def read_checked(file: Path, piece: Mapping[str, Any], start: int, out: Tensor) -> None:
    """Read a part of a piece.

    Args:
        file: The file.
        piece: ``offset`` and ``size`` of the piece in the file, and its ``checksums``.
        start: First byte of the part, counted in the piece.
        out: Bytes, filled with the part.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too short, or a block differs from what was written.
    """
    stop = start + out.numel()
    buffer = torch.empty(min(_BLOCK, piece["size"]), dtype=torch.uint8)
    with file.open("rb", buffering=0) as handle:
        for number in range(start // _BLOCK, -(-stop // _BLOCK)):
            first = number * _BLOCK
            last = min(first + _BLOCK, piece["size"])
            block = buffer[: last - first]
            view: memoryview = block.numpy().data
            handle.seek(piece["offset"] + first)
            got = 0
            while got < len(view) and (n := handle.readinto(view[got:])):
                got += n
            place = f"bytes {piece['offset'] + first} to {piece['offset'] + last}"
            if got != len(view):
                raise ValueError(f"expected {place}, got {got} of them")
            found = zlib.crc32(view)
            if found != piece["checksums"][number]:
                raise ValueError(
                    f"expected checksum {piece['checksums'][number]:08x} of {place}, "
                    f"got {found:08x}"
                )
            low, high = max(first, start), min(last, stop)
            out[low - start : high - start].copy_(block[low - first : high - first])
