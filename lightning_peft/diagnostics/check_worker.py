"""Runs checks of kernels in a process of its own, so that a fault ends nothing else.

    python -m lightning_peft.diagnostics.check_worker REQUEST

prints one line of JSON before each check and one with its verdict after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from lightning_peft_kernels.chips import CHIPS, nvidia_chip
from lightning_peft_kernels.launch import LaunchError, use_verdicts
from lightning_peft_kernels.races import use_races
from lightning_peft_kernels.verdicts import Verdict

from lightning_peft.diagnostics.kernel_checks import kernel_checks
from lightning_peft.diagnostics.pairs import Shape
from lightning_peft.diagnostics.trials import Check

__all__ = ["Request", "run_request"]

# No memory, a module that cannot be imported, a full disk, a compiler that is missing or fails.
_OF_MACHINE = (MemoryError, ImportError, OSError, subprocess.SubprocessError)
# RuntimeErrors with the same causes: of torch, of the libraries below it, and of Triton.
_MACHINE_MESSAGES = (
    "out of memory",
    "ALLOC_FAILED",
    "Failed to find C compiler",
    "active drivers",
)


@dataclass(frozen=True)
class Request:
    """The work of one worker process.

    Attributes:
        device: Where kernels run; ``"cpu"`` is Triton's interpreter.
        shapes: (N, K, tokens) of the products.
        ops: Ops to check.
        done: Checks to leave out, by the names that `run_request` gives them.
        short: Whether only one configuration per op is checked.
    """

    device: str
    shapes: tuple[tuple[int, int, int], ...]
    ops: tuple[str, ...]
    done: tuple[str, ...] = ()
    short: bool = False


def run_request(request: Request) -> Iterator[tuple[str, Check, Verdict | None]]:
    """Yield every check twice with its name: before it runs, without a verdict, and after."""
    device = torch.device(request.device)
    interpreted = device.type == "cpu"
    if interpreted:
        CHIPS[device] = nvidia_chip(9, 0, 232_448)
    use_verdicts(device, {})  # what an earlier check found must not decide this one
    use_races(device, [])
    several = len(request.shapes) > 1
    for sizes in request.shapes:
        shape = Shape(*sizes)
        for check in kernel_checks(device, shape, interpreted=interpreted):
            asked = check.op in request.ops and (check.short or not request.short)
            name = f"{check.op} ({check.configuration})" + (f" {sizes}" if several else "")
            if not asked or name in request.done or not check.applies:
                continue
            yield name, check, None
            verdict = _verdict(check, None if interpreted else device)
            if several and verdict.outcome != "ok":
                where = f"N {shape.N}, K {shape.K}, {shape.tokens} tokens"
                verdict = replace(verdict, detail=f"{where}: {verdict.detail}")
            yield name, check, verdict


def _verdict(check: Check, timed_on: torch.device | None) -> Verdict:
    try:
        error, microseconds = check.examine(timed_on)
    except Exception as raised:
        outcome: Literal["unchecked", "refused"] = "unchecked" if _no_fault(raised) else "refused"
        if outcome == "refused" and ("CUDA error" in str(raised) or "HIP error" in str(raised)):
            raise  # the device is lost to this process: its end is the verdict
        return Verdict(check.op, check.configuration, outcome, _told(raised))
    if error:
        return Verdict(check.op, check.configuration, "wrong", error)
    return Verdict(check.op, check.configuration, "ok", "", microseconds)


def _no_fault(raised: BaseException | None) -> bool:
    """Whether an error is one of the machine, such as no memory, and says nothing of the kernel."""
    if raised is None:
        return False
    return (
        isinstance(raised, (*_OF_MACHINE, torch.OutOfMemoryError))
        or any(words in str(raised) for words in _MACHINE_MESSAGES)
        or _no_fault(raised.__cause__)
    )


def _told(raised: BaseException) -> str:
    """Return the last line of an error; the verdict names the op."""
    if isinstance(raised, LaunchError) and isinstance(raised.__cause__, LaunchError):
        raised = raised.__cause__
    lines = [line for line in str(raised).splitlines() if line.strip()] or [""]
    return f"{type(raised).__name__}: {lines[-1].strip()[:200]}"


def main(text: str) -> None:
    """Serve one request."""
    given = json.loads(text)
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    lists["shapes"] = tuple(tuple(shape) for shape in given["shapes"])
    for name, check, verdict in run_request(Request(**{**given, **lists})):
        line = {"starts": [check.op, check.configuration]}
        print(json.dumps({**asdict(verdict), "done": name} if verdict else line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
