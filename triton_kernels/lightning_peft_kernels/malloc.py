"""Keeps freed memory in malloc, so the next step does not page-fault it again.

Every step allocates and frees its gradients. If malloc returns freed memory to the system, the next
step maps and zeroes it again page by page, at ten times the cost of writing it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

__all__ = ["keep_freed"]

# Bytes, just below the largest block that raises the threshold.
_LARGEST = 31 << 20


@lru_cache(maxsize=1)
def keep_freed() -> None:
    """Make glibc's malloc keep up to 62 MiB of freed memory at the end of its heap.

    Freeing a separately mapped block raises malloc's threshold: blocks up to that size then come
    from the heap, and up to twice that size stays there (mallopt(3), *dynamic mmap threshold*). A
    limit set by the user keeps its effect. The block is not touched, so it takes no memory. Call
    this in training only: memory freed while a model is loaded and quantised should return to the
    system.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.free(libc.malloc(_LARGEST))
