"""The one place that launches Triton kernels, and what happens if a kernel does not compile.

A kernel that needs more than the chip has, or that the compiler refuses, raises before anything
runs. The op then takes another implementation, for the rest of the process, and says so once.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.verdicts import Verdict, device_key, read_verdicts

__all__ = [
    "FAILURES",
    "VERDICTS_READ",
    "LaunchError",
    "any_failure",
    "attempt",
    "configuration",
    "failure",
    "launch",
    "launches_freely",
    "note_refusal",
    "use_verdicts",
]

T = TypeVar("T")
# RuntimeErrors of Triton's compiler: a pass that fails, and a host without a C compiler. A
# RuntimeError of a kernel that ran (an illegal address) must not be taken for one of these.
_COMPILER_MESSAGES = ("PassManager::run failed", "Failed to find C compiler")

#: (op, configuration, device) → why its kernel does not run there.
FAILURES: dict[tuple[str, str, torch.device], str] = {}
#: Devices whose stored verdicts are in `FAILURES`.
VERDICTS_READ: set[torch.device] = set()


class LaunchError(RuntimeError):
    """A kernel could not be compiled or loaded for a device. Nothing has run."""


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, /, *others: Any, **options: Any
) -> None:
    """Launch a kernel on the device of its first argument and on that device's current stream.

    Triton launches on the current device, whichever device the arguments are on.

    Args:
        kernel: `@triton.jit` function.
        grid: Programs per axis.
        first: First argument of the kernel.
        others: Remaining arguments.
        options: Compile-time constants and options of the compiler.

    Raises:
        LaunchError: The kernel does not compile or does not fit the device.
    """
    device = first.device
    try:
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            kernel[grid](first, *others, **options)
        else:
            with torch.cuda.device(device):
                kernel[grid](first, *others, **options)
    except Exception as error:
        if not _before_launch(error):
            raise
        raise LaunchError(f"{kernel.__name__}: {_reason(error)}") from error


def configuration(dtype: torch.dtype, detail: str = "") -> str:
    """Name a kernel of an op: by its dtype, and `detail` if one dtype has several kernels."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}, {detail}" if detail else name


def attempt(
    op: str,
    dtype: torch.dtype,
    detail: str,
    device: torch.device,
    requested: str,
    run: Callable[[], T],
    otherwise: Callable[[], T],
) -> T:
    """Run an op's kernels; if one cannot be launched, remember it and run the alternative.

    Args:
        op: Name of the op.
        dtype: Dtype of the tensors.
        detail: What else distinguishes this kernel from others of the op, see `configuration`.
        device: Device of the tensors.
        requested: Requested backend; ``"triton"`` allows no alternative.
        run: Launches the kernels. It changes no argument before its last launch.
        otherwise: Computes the same result without them.

    Raises:
        LaunchError: A kernel cannot be launched and the backend ``"triton"`` is requested.
    """
    try:
        return run()
    except LaunchError as error:
        note_refusal(op, dtype, detail, device, requested, error)
    return otherwise()


def note_refusal(
    op: str,
    dtype: torch.dtype,
    detail: str,
    device: torch.device,
    requested: str,
    error: LaunchError,
) -> None:
    """Remember that a kernel cannot be launched; the caller runs the alternative. See `attempt`.

    Raises:
        LaunchError: The backend ``"triton"`` is requested.
    """
    if requested == "triton":
        raise LaunchError(
            f"{op} ({configuration(dtype, detail)}): expected a kernel that runs on {device}, got "
            f"{error}; use kernels='auto', which computes this op with torch"
        ) from error
    _remember(op, configuration(dtype, detail), device, str(error))


def any_failure(device: torch.device) -> bool:
    """Whether any kernel is known not to run; false spares asking for each launch."""
    if device not in VERDICTS_READ:
        if device.type == "cuda":
            use_verdicts(device, read_verdicts(device_key(device)))
        VERDICTS_READ.add(device)
    return bool(FAILURES)


def launches_freely(device: torch.device) -> bool:
    """Whether kernels were launched on a device and none is known to fail: nothing to look up."""
    return not FAILURES and device in VERDICTS_READ and device in CHIPS


def failure(op: str, configuration: str, device: torch.device) -> str:
    """Return why a kernel of this op does not run on the device; "" if nothing is against it.

    A launch failed in this process, or the check on such a device found the kernel wrong.
    """
    return FAILURES.get((op, configuration, device), "") if any_failure(device) else ""


def use_verdicts(device: torch.device, found: Mapping[tuple[str, str], Verdict]) -> None:
    """Take the verdicts on a device over: no kernel runs that the check found wrong."""
    VERDICTS_READ.add(device)
    for (op, configuration), verdict in found.items():
        if verdict.outcome not in ("ok", "unchecked"):
            reason = f"{verdict.outcome} in the check: {verdict.detail}"
            FAILURES[op, configuration, device] = reason


# A traced graph reads it as a constant; the ops in the graph ask again when they run.
for _asked in (any_failure, failure, launches_freely):
    vars(_asked)["_dynamo_marked_constant"] = True


def _remember(op: str, configuration: str, device: torch.device, reason: str) -> None:
    key = op, configuration, device
    if key in FAILURES:
        return
    FAILURES[key] = reason
    warnings.warn(
        f"{op} ({configuration}): expected a kernel that runs on {device}, got {reason}; "
        "torch computes it from now on. Results are the same, speed may differ.",
        stacklevel=3,
    )


def _before_launch(error: Exception) -> bool:
    """Whether an error of Triton was raised before anything ran on the device."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (CompilationError, OutOfResources, PTXASError)):
        return True
    # The launcher is compiled on the host, which may lack headers.
    if isinstance(error, subprocess.CalledProcessError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(_COMPILER_MESSAGES)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1][:200].rstrip(".") if lines else "no message"
    return f"{type(error).__name__}: {told}"
