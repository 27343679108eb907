"""Selects the implementation of each op, with a reason.

`select` decides from the device, the dtype and the requested backend; `select_*` functions beside
the ops also read the chip, the number of tokens and the shape. The returned `Decision` carries the
reason, which the preflight report prints. `run` runs what was selected.

The requested backend belongs to a context, not to the process: `use_backend` applies inside its
`with` block, in the current thread or task. Ops read it in forward and hand it to their backward,
which autograd may run in another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch

from lightning_peft_kernels.chips import CHIPS, chip_of
from lightning_peft_kernels.launch import (
    FAILURES,
    VERDICTS_READ,
    LaunchError,
    any_failure,
    configuration,
    failure,
    launches_freely,
    note_refusal,
)
from lightning_peft_kernels.races import Question, measured

__all__ = [
    "Backend",
    "Decision",
    "checkpoint_contexts",
    "configuration",
    "current_backend",
    "fastest",
    "launches",
    "run",
    "select",
    "triton_available",
    "triton_problem",
    "use_backend",
]

Backend = Literal["auto", "triton", "torch"]
T = TypeVar("T")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Decision:
    """A selected implementation and the reason for it.

    Attributes:
        backend: ``"triton"`` or ``"torch"``. Products with a packed base use ``"fused"``,
            ``"pairs"``, ``"bitsandbytes"``, ``"bf16"``, ``"dequantize"``, ``"scaled_mm"``,
            ``"scaled_rows"`` or ``"emulated"``; layers that share an input use ``"grouped"`` or
            ``"apart"``.
        reason: One clause for the report.
    """

    backend: Literal[
        "triton", "torch", "fused", "pairs", "bitsandbytes", "bf16", "dequantize", "scaled_mm",
        "scaled_rows", "emulated", "grouped", "apart",
    ]  # fmt: skip
    reason: str


_requested: ContextVar[Backend] = ContextVar("lightning_peft_kernels.backend", default="auto")


def current_backend() -> Backend:
    """Return the backend requested in this context.

    A region compiled with `torch.compile` keeps the backend that was requested when it was traced.
    """
    return _requested.get()


# What torch.compiler.assume_constant_result does; that function would import torch._dynamo, which
# takes longer than the rest of this package.
vars(current_backend)["_dynamo_marked_constant"] = True


class use_backend(AbstractContextManager[None]):
    """Request a backend inside a ``with`` block, in the current thread or task.

    Args:
        backend: ``"auto"``, or ``"triton"`` or ``"torch"`` to force one.

    Raises:
        ValueError: The backend is unknown.
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in ("auto", "triton", "torch"):
            raise ValueError(
                f"kernels: expected 'auto', 'triton' or 'torch', got {backend!r}; use 'auto' "
                "unless comparing"
            )
        self.backend = backend
        self._tokens: list[Token[Backend]] = []

    def __enter__(self) -> None:
        self._tokens.append(_requested.set(self.backend))

    def __exit__(self, *exception: object) -> None:
        _requested.reset(self._tokens.pop())


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts that recompute a checkpointed function under the backend of its forward.

    Pass it as ``torch.utils.checkpoint.checkpoint(..., context_fn=checkpoint_contexts)``. Autograd
    recomputes in the thread of the device, where no ``with`` block of the caller applies.
    """
    return nullcontext(), use_backend(current_backend())


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Whether triton can be imported. The first call tries, and only devices with kernels ask."""
    return not triton_problem()


@lru_cache(maxsize=1)
def triton_problem() -> str:
    """Return why triton cannot be used; "" if it can."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed"
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return ""


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend | None = None,
    detail: str = "",
) -> Decision:
    """Select the implementation of `op` for tensors on `device` in `dtype`.

    Args:
        op: Name for the reason and for errors.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        backend: Requested backend; default `current_backend()`.
        detail: What else distinguishes the kernel that would run.

    Raises:
        RuntimeError: ``"triton"`` is requested but cannot run.
    """
    requested = backend or current_backend()
    if requested == "torch":
        return Decision("torch", "requested")
    # Every launch asks here, so the usual answer takes as few calls as possible.
    if requested == "auto" and dtype in _FLOATS and launches_freely(device) and triton_available():
        return Decision("triton", f"{op} on {device.type}")
    if chip_of(device) is not None and dtype in _FLOATS and triton_available():
        if requested == "triton":
            return Decision("triton", "requested")
        if any_failure(device):
            failed = failure(op, configuration(dtype, detail), device)
            if failed:
                return Decision("torch", f"{op} does not run on {device}: {failed}")
        return Decision("triton", f"{op} on {device.type}")
    blocked = _why_not_triton(device, dtype)
    if requested == "triton":
        raise RuntimeError(f"{op}: expected a device for Triton, got {blocked}; use kernels='auto'")
    return Decision("torch", blocked)


def launches(op: str, device: torch.device, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether `select` chooses Triton; it makes no reason and no call in the usual case."""
    if (
        backend == "auto"
        and dtype in _FLOATS
        and not torch.compiler.is_compiling()
        and not FAILURES
        and device in VERDICTS_READ
        and device in CHIPS
        and triton_available()
    ):
        return True
    return select(op, device, dtype, backend).backend == "triton"


def fastest(
    question: Question,
    device: torch.device,
    dtype: torch.dtype,
    shape: Sequence[int],
    tokens: int,
) -> Decision | None:
    """Return what `check --tune` found fastest on this device; None if it was not measured.

    Args:
        question: What is chosen.
        device: Device of x.
        dtype: Dtype of x.
        shape: Shape of the question, see `races.Race`.
        tokens: Rows of x; the next larger number that was measured decides.
    """
    for most, winner, reason in measured(question, device, dtype, shape):
        if tokens <= most:
            return Decision(winner, f"{tokens} tokens, {reason}")  # type: ignore[arg-type]
    return None


def run(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    triton: Callable[[], T],
    otherwise: Callable[[], T],
    *,
    cpu: Callable[[], T] | None = None,
) -> T:
    """Run the selected implementation of `op`; a kernel that cannot be launched is replaced.

    Args:
        op: Name of the op.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        backend: Requested backend.
        triton: Launches the kernels.
        otherwise: Computes the same result without them.
        cpu: Computes it for CPU tensors, whichever backend is requested: weights may be packed on
            the host before a run on a GPU.
    """
    if cpu is not None and device.type == "cpu" and device not in CHIPS:
        return cpu()
    if not launches(op, device, dtype, backend):
        return otherwise()
    try:
        return triton()
    except LaunchError as error:
        note_refusal(op, dtype, "", device, backend, error)
    return otherwise()


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    if chip_of(device) is None:
        return f"{device.type} tensors"
    return triton_problem() or f"{dtype}"
