"""The kernel backend that `PEFT(kernels=...)` requests, from `setup` to the end of the run."""

from __future__ import annotations

from lightning_peft_kernels.dispatch import Backend, current_backend, use_backend
from torch import nn

from lightning_peft.core.kernel_backend import keep_backend, release_backend

__all__ = ["RunBackend"]


class RunBackend:
    """Requests a backend for one run of the Trainer; ``"auto"`` leaves the caller's choice.

    Args:
        backend: Value of `PEFT(kernels=...)`.
    """

    def __init__(self, backend: Backend) -> None:
        self.requested = use_backend(backend)
        self._entered = False

    def enter(self) -> None:
        """Request the backend in the current thread, unless another callback has done so."""
        backend = self.requested.backend
        if not self._entered and backend not in ("auto", current_backend()):
            self.requested.__enter__()
            self._entered = True

    def keep(self, root: nn.Module) -> None:
        """Have the attached modules request it too, for recomputation in another thread."""
        if self.requested.backend != "auto":
            keep_backend(root, self.requested.backend)

    def leave(self, module: nn.Module) -> None:
        """Withdraw the request."""
        release_backend(module)
        if self._entered:
            self._entered = False
            self.requested.__exit__()
