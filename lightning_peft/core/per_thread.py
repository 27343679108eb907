"""Values that belong to a thread, and locks that belong to a module.

Several threads may run one model at once. What one step of a forward hands to a later step belongs
to the thread. A forward that puts a tensor on its module for a moment runs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import nn

__all__ = ["ModuleLock", "PerThread", "drop_lock", "exclusive"]

T = TypeVar("T")
_ATTRIBUTE = "_peft_lock"


class PerThread(Generic[T]):
    """One value per thread. Copies and pickles start empty.

    Args:
        default: Makes the value that a thread finds first.
    """

    def __init__(self, default: Callable[[], T]) -> None:
        self._default = default
        self._local = threading.local()

    def get(self) -> T:
        """Return this thread's value."""
        if not hasattr(self._local, "value"):
            self._local.value = self._default()
        found: T = self._local.value
        return found

    def set(self, value: T) -> None:
        """Set this thread's value."""
        self._local.value = value

    def take(self) -> T:
        """Return this thread's value and delete it."""
        found = self.get()
        del self._local.value
        return found

    def __deepcopy__(self, memo: dict[int, object]) -> PerThread[T]:
        return PerThread(self._default)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self._default,)


class ModuleLock:
    """A lock that a thread may take again. Copies and pickles have a lock of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, object]) -> ModuleLock:
        return ModuleLock()

    def __reduce__(self) -> tuple[type[ModuleLock], tuple[()]]:
        return ModuleLock, ()


def exclusive(module: nn.Module) -> AbstractContextManager[None]:
    """Return the lock of a module: one thread at a time runs the block.

    A compiled graph has no attributes that change, so it takes no lock.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    lock: ModuleLock = vars(module).setdefault(_ATTRIBUTE, ModuleLock())
    return lock


def drop_lock(module: nn.Module) -> None:
    """Remove the lock of a module that needs none any more."""
    vars(module).pop(_ATTRIBUTE, None)
