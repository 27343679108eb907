"""Memory for optimizer state: device memory, or managed memory that the driver pages."""

from __future__ import annotations

import ctypes
import logging
import weakref
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from lightning_peft_kernels.nf4.bitsandbytes_library import bitsandbytes_library
from torch import Tensor

__all__ = ["allocate", "prefetch"]

_log = logging.getLogger(__name__)


class _Managed:
    """Owns one managed allocation. The tensor keeps it alive; when it goes, the memory is freed."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        weakref.finalize(self, _free, address).atexit = False  # at exit the driver frees it anyway


def _free(address: int) -> None:
    torch.cuda.synchronize()  # a running kernel may still use it
    ctypes.CDLL("libcuda.so.1").cuMemFree_v2(ctypes.c_uint64(address))


@lru_cache(maxsize=1)
def _library() -> Any:
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "paged optimizer: expected bitsandbytes, which allocates managed memory, found none; "
            "pip install bitsandbytes, or leave 'paged_' out of the optimizer's name"
        )
    return bitsandbytes_library()


@lru_cache(maxsize=1)
def _say_plain(device_type: str) -> None:
    _log.info("Paged optimizer state needs CUDA; on %s plain memory is used.", device_type)


def allocate(nbytes: int, device: torch.device, paged: bool) -> Tensor:
    """Return zeros, uint8 [nbytes] on `device`; managed memory if `paged` on a CUDA device."""
    if not paged or nbytes == 0:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        _say_plain(device.type)
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        address = _library().cget_managed_ptr(ctypes.c_size_t(nbytes))
        if not address:
            raise RuntimeError(f"paged state: expected {nbytes} bytes of managed memory, got none")
        return torch.as_tensor(_Managed(int(address), nbytes), device=device).zero_()


def prefetch(buffer: Tensor) -> None:
    """Ask the driver to move a managed `buffer` to its device before it is read."""
    _library().cprefetch(
        ctypes.c_void_p(buffer.data_ptr()),
        ctypes.c_size_t(buffer.numel()),
        ctypes.c_int32(buffer.device.index or 0),
    )
