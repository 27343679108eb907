"""Memory of one step that the next step finds again.

Gradients are made and freed in every step. Where malloc gives freed memory back to the system, the
next step maps and zeroes it anew, page by page, at ten times the cost of writing it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

__all__ = ["keep_freed"]

#: Bytes, just below the largest block from which glibc's malloc learns.
_LARGEST = 31 << 20


@lru_cache(maxsize=1)
def keep_freed() -> None:
    """Have glibc's malloc keep up to twice 31 MiB of what is freed at the end of its heap.

    It learns from a freed block that was mapped by itself: blocks up to that size come from the
    heap then, and up to twice that size stays there (mallopt(3), *dynamic mmap threshold*; a limit
    that the user set holds). The block is not touched, so it takes no memory. Not before training:
    while a model is loaded and quantised, what is freed shall go back.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.free(libc.malloc(_LARGEST))
