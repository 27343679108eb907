"""The kernel backend of a run, kept on the modules whose forward uses kernels.

Autograd recomputes a checkpointed block in the thread of the device, which does not inherit the
context of the caller. The module itself therefore requests its backend.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from lightning_peft_kernels.dispatch import Backend, use_backend
from torch import nn

from lightning_peft.core.class_swap import Swapped

__all__ = ["backend_scope", "keep_backend", "release_backend"]


def keep_backend(root: nn.Module, backend: Backend) -> None:
    """Have every adapted or quantised module under `root` request a backend in its forward."""
    for module in root.modules():
        if isinstance(module, Swapped):
            module._kernel_backend = backend


def release_backend(root: nn.Module) -> None:
    """Undo `keep_backend`."""
    for module in root.modules():
        vars(module).pop("_kernel_backend", None)


def backend_scope(module: Swapped) -> AbstractContextManager[None]:
    """Return the context in which a module's forward runs.

    A compiled region keeps the backend that was requested when it was traced. Reading the attribute
    while tracing guards on it, so another backend traces again.
    """
    backend = module._kernel_backend
    if backend is None or torch.compiler.is_compiling():
        return nullcontext()
    return use_backend(backend)
