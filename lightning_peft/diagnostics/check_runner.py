"""Checks the kernels of a device in processes of their own and stores the verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from lightning_peft_kernels.launch import use_verdicts
from lightning_peft_kernels.verdicts import (
    Verdict,
    device_key,
    read_verdicts,
    store_verdicts,
    verdict_lock,
)

from lightning_peft.diagnostics.check_worker import Request

__all__ = ["OPS", "SHAPE", "Verdicts", "check_device", "ensure_checked"]

Verdicts = dict[tuple[str, str], Verdict]
#: The ops, in the order of the full form: one process each.
OPS = (
    "dequantize_4bit",
    "quantize_4bit",
    "nf4_small_batch",
    "rank_gradients",
    "seeded_dropout",
    "pooled_8bit_step",
    "output_scale",
    "output_scale_backward",
    "nf4_grouped_linear",
    "dequantize_experts",
    "expert_low_rank",
    "expert_rank_gradients",
    "dequantize_e4m3",
    "quantize_rows_e4m3",
)
#: (N, K, tokens): several tiles each way, and a remainder.
SHAPE = (272, 512, 100)
_SMALL_SHAPE = (80, 192, 20)  # the interpreter takes seconds for more
_SECONDS = 600
WORKER = "lightning_peft.diagnostics.check_worker"


def check_device(
    device: torch.device,
    *,
    short: bool = False,
    ops: Sequence[str] = OPS,
    shape: tuple[int, int, int] | None = None,
    told: Callable[[Verdict], None] | None = None,
    worker: str = WORKER,
) -> tuple[Verdicts, str]:
    """Check the kernels of a device and store the verdicts beside those that are there.

    The full form runs one process per op. The short form runs one process for all ops and starts it
    again without an op that ended it.

    Args:
        device: A CUDA device, or the CPU for Triton's interpreter.
        short: If True, one configuration per op.
        ops: Ops to check.
        shape: (N, K, tokens) of the products; the default is small.
        told: Called with each verdict.
        worker: Module that a process runs to serve a request.

    Returns:
        The verdicts by op and configuration, and why they could not be stored, or "".

    Raises:
        RuntimeError: A process ended before its first check, so nothing is known.
    """
    shape = shape or (SHAPE if device.type == "cuda" else _SMALL_SHAPE)
    request = Request(str(device), shape, tuple(ops), short=short)
    each = [request] if short else [replace(request, ops=(op,)) for op in ops]
    found: Verdicts = {}
    for one in each:
        for verdict in _run(one, worker):
            found[verdict.op, verdict.configuration] = verdict
            if told is not None:
                told(verdict)
    key = device_key(device)
    why = store_verdicts(key, {**read_verdicts(key), **found})
    use_verdicts(device, found)
    return found, why


def ensure_checked(device: torch.device) -> tuple[Verdicts, str]:
    """Return the stored verdicts on a device, after the short form if there are none.

    Processes that ask for the same device at once wait for one of them.
    """
    key = device_key(device)
    with verdict_lock(key):
        found = read_verdicts(key)
        if found:
            use_verdicts(device, found)
            return found, ""
        return check_device(device, short=True)


def _run(request: Request, worker: str) -> Iterator[Verdict]:
    """Run a request; an op that ends its process gets a verdict, and the others go on."""
    done: list[str] = []
    while request.ops:
        running = yield from _run_once(replace(request, done=tuple(done)), worker, done)
        if running is None:
            return
        op, configuration, detail = running
        yield Verdict(op, configuration, "crashed", detail)
        request = replace(request, ops=tuple(name for name in request.ops if name != op))


def _run_once(
    request: Request, worker: str, done: list[str]
) -> Generator[Verdict, None, tuple[str, str, str] | None]:
    """Yield verdicts; return (op, configuration, message) of the check that ended the process.

    Names of finished checks are added to `done`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if request.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", worker]
    starts: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(asdict(request))], stdout=subprocess.PIPE, stderr=errors,
            text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None  # Popen was given PIPE
        limit = threading.Timer(_SECONDS, process.kill)  # a kernel that never ends
        limit.start()
        for line in process.stdout:
            entry = json.loads(line)
            starts = entry.get("starts", [])
            if not starts:
                verdict = Verdict(**entry)
                done.append(f"{verdict.op} ({verdict.configuration})")
                yield verdict
        status = process.wait()
        limit.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
    if status and not starts:
        raise RuntimeError(
            f"check of {request.device}: expected a process that checks kernels, got one that "
            f"ended at its start ({last}); no kernel was checked"
        )
    return (starts[0], starts[1], last[:200]) if status else None
