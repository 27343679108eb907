"""Checks the kernels of a device in processes of their own and stores the verdicts."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from typing import Literal

import torch
from lightning_peft_kernels.launch import use_verdicts
from lightning_peft_kernels.verdicts import (
    Key,
    Verdict,
    device_key,
    read_verdicts,
    store_verdicts,
    verdict_lock,
)

from lightning_peft.diagnostics.check_worker import Request
from lightning_peft.diagnostics.kernel_checks import kernel_checks
from lightning_peft.diagnostics.pairs import Shape
from lightning_peft.diagnostics.worker_process import Ended, run_worker

__all__ = ["OPS", "SHAPE", "Verdicts", "check_device", "ensure_checked", "plain_device"]

Verdicts = dict[tuple[str, str], Verdict]
#: The ops, in the order of the full form: one process each.
OPS = (
    "dequantize_4bit",
    "quantize_4bit",
    "decode_blocks",
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
WORKER = "lightning_peft.diagnostics.check_worker"


def check_device(
    device: torch.device,
    *,
    short: bool = False,
    ops: Sequence[str] = OPS,
    shapes: Sequence[tuple[int, int, int]] = (),
    told: Callable[[Verdict], None] | None = None,
    jobs: int = 1,
    worker: str = WORKER,
) -> tuple[Verdicts, str]:
    """Check the kernels of a device and store each verdict beside those that are there.

    The full form runs one process per op. The short form runs one process for all ops and starts it
    again without an op that ended it.

    Args:
        device: A CUDA device, or the CPU for Triton's interpreter.
        short: If True, one configuration per op.
        ops: Ops to check.
        shapes: (N, K, tokens) of the products, each checked; the default is one, small.
        told: Called with each verdict, once it is stored.
        jobs: Processes at a time. Most of a check is compiling, but times of kernels that share the
            device mean little.
        worker: Module that a process runs to serve a request.

    Returns:
        The verdicts by op and configuration, and why they could not be stored, or "".

    Raises:
        RuntimeError: A process ended before its first check, so nothing is known.
    """
    device = plain_device(device)
    wanted = tuple(shapes) or (_shape(device),)
    request = Request(str(device), wanted, tuple(ops), short=short)
    each = [request] if short else [replace(request, ops=(op,)) for op in request.ops]
    key = device_key(device)
    found: Verdicts = {}
    why = [""]
    one_at_a_time = threading.Lock()

    def arrived(verdict: Verdict) -> None:
        with one_at_a_time:
            with verdict_lock(key):  # one by one: an interruption loses what runs at that moment
                why[0] = _store(device, key, _add(found, verdict)) or why[0]
            if told is not None:
                told(verdict)

    if jobs == 1:
        for request in each:
            _check(request, arrived, worker)
    else:
        _check_together(each, arrived, jobs, worker)
    return found, why[0]


def plain_device(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it: `cpu` without an index, `cuda` with one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def _check_together(
    requests: Sequence[Request], arrived: Callable[[Verdict], None], jobs: int, worker: str
) -> None:
    """Serve several requests at a time; an error or an interruption ends all."""
    processes: list[subprocess.Popen[str]] = []
    ends = threading.Event()

    def started(process: subprocess.Popen[str]) -> None:
        processes.append(process)
        if ends.is_set():
            process.kill()

    def still_wanted(verdict: Verdict) -> None:
        if ends.is_set():
            raise KeyboardInterrupt
        arrived(verdict)

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_check, each, still_wanted, worker, started) for each in requests]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            ends.set()
            for waiting in running:
                waiting.cancel()
            for process in processes:
                process.kill()
            raise


def ensure_checked(device: torch.device) -> tuple[Verdicts, str]:
    """Return the stored verdicts on a device, after the short form for what has none.

    Processes that ask for the same device at once wait for one of them.
    """
    key = device_key(device)
    new: Verdicts = {}
    why = ""

    def arrived(verdict: Verdict) -> None:
        nonlocal why
        why = _store(device, key, _add(new, verdict)) or why

    with verdict_lock(key):
        found = read_verdicts(key)
        use_verdicts(device, found)
        ops = _unchecked(device, found)
        if ops:
            _check(Request(str(device), (_shape(device),), ops, short=True), arrived, WORKER)
    return {**found, **new}, why


def _unchecked(device: torch.device, found: Verdicts) -> tuple[str, ...]:
    """Return the ops whose short check has no verdict: never run, not to its end, or in vain."""
    checks = kernel_checks(device, Shape(*_shape(device)), interpreted=device.type == "cpu")
    missing = {
        c.op for c in checks if c.short and (c.op, c.configuration) not in found and c.applies
    }
    return tuple(op for op in OPS if op in missing)


def _shape(device: torch.device) -> tuple[int, int, int]:
    return SHAPE if device.type == "cuda" else _SMALL_SHAPE


def _store(device: torch.device, key: Key, verdict: Verdict) -> str:
    """Store a verdict beside those that are there; return why that failed, or ""."""
    if verdict.outcome == "unchecked":
        return ""
    new = {(verdict.op, verdict.configuration): verdict}
    use_verdicts(device, new)
    return store_verdicts(key, {**read_verdicts(key), **new})


def _add(found: Verdicts, verdict: Verdict) -> Verdict:
    """Keep the worst verdict per op and configuration, of equals the first; return it."""
    name = verdict.op, verdict.configuration
    if name not in found or _badness(verdict) > _badness(found[name]):
        found[name] = verdict
    return found[name]


def _badness(verdict: Verdict) -> int:
    return {"ok": 0, "unchecked": 1}.get(verdict.outcome, 2)


def _check(
    request: Request,
    arrived: Callable[[Verdict], None],
    worker: str,
    started: Callable[[subprocess.Popen[str]], None] | None = None,
) -> None:
    """Run a request and pass its verdicts on."""
    for verdict in _run(request, worker, started):
        arrived(verdict)


def _run(
    request: Request, worker: str, started: Callable[[subprocess.Popen[str]], None] | None
) -> Iterator[Verdict]:
    """Run a request; an op that ends its process gets a verdict, and the others go on."""
    done: list[str] = []
    while request.ops:
        ended = yield from _run_once(replace(request, done=tuple(done)), worker, done, started)
        if ended is None:
            return
        op, configuration = ended.starts[:2]
        outcome: Literal["unchecked", "crashed"] = "unchecked" if ended.from_outside else "crashed"
        yield Verdict(op, configuration, outcome, ended.message)
        request = replace(request, ops=tuple(name for name in request.ops if name != op))


def _run_once(
    request: Request,
    worker: str,
    done: list[str],
    started: Callable[[subprocess.Popen[str]], None] | None,
) -> Generator[Verdict, None, Ended | None]:
    """Yield verdicts; names of finished checks are added to `done`."""
    interpret = torch.device(request.device).type == "cpu"
    entries = run_worker(worker, asdict(request), interpret=interpret, started=started)
    while True:
        try:
            entry = next(entries)
        except StopIteration as stop:
            ended: Ended | None = stop.value
            return ended
        done.append(entry.pop("done", f"{entry['op']} ({entry['configuration']})"))
        yield Verdict(**entry)
