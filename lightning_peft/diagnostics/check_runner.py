"""Checks the kernels of a device in processes of their own and stores the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
from lightning_peft.diagnostics.kernel_checks import kernel_checks
from lightning_peft.diagnostics.pairs import Shape
from lightning_peft.diagnostics.worker_process import Ended, run_worker

__all__ = ["OPS", "SHAPE", "Verdicts", "check_device", "ensure_checked"]

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
    """Check the kernels of a device and store the verdicts beside those that are there.

    The full form runs one process per op. The short form runs one process for all ops and starts it
    again without an op that ended it.

    Args:
        device: A CUDA device, or the CPU for Triton's interpreter.
        short: If True, one configuration per op.
        ops: Ops to check.
        shapes: (N, K, tokens) of the products, each checked; the default is one, small.
        told: Called with each verdict.
        jobs: Processes at a time. Most of a check is compiling, but times of kernels that share the
            device mean little.
        worker: Module that a process runs to serve a request.

    Returns:
        The verdicts by op and configuration, and why they could not be stored, or "".

    Raises:
        RuntimeError: A process ended before its first check, so nothing is known.
    """
    wanted = tuple(shapes) or (_shape(device),)
    request = Request(str(device), wanted, tuple(ops), short=short)
    each = [request] if short else [replace(request, ops=(op,)) for op in request.ops]
    key = device_key(device)
    found: Verdicts = {}
    why = ""
    for part in _parts(each, told, jobs, worker):
        with verdict_lock(key):  # one by one: an interruption loses what runs at that moment
            why = _store(device, part)
        found.update(part)
    return found, why


def _parts(
    requests: Sequence[Request],
    told: Callable[[Verdict], None] | None,
    jobs: int,
    worker: str,
) -> Iterator[Verdicts]:
    """Yield the verdicts of each request as it ends."""
    if jobs == 1:
        for request in requests:
            yield _check(request, told, worker)
        return
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_check, request, told, worker) for request in requests]
        try:
            for done in as_completed(running):
                yield done.result()
        finally:
            for waiting in running:
                waiting.cancel()


def ensure_checked(device: torch.device) -> tuple[Verdicts, str]:
    """Return the stored verdicts on a device, after the short form for what has none.

    Processes that ask for the same device at once wait for one of them.
    """
    key = device_key(device)
    with verdict_lock(key):
        found = read_verdicts(key)
        use_verdicts(device, found)
        ops = _unchecked(device, found)
        if not ops:
            return found, ""
        new = _check(Request(str(device), (_shape(device),), ops, short=True), None, WORKER)
        why = _store(device, new)
    return {**found, **new}, why


def _unchecked(device: torch.device, found: Verdicts) -> tuple[str, ...]:
    """Return the ops whose short check has no verdict: never run, or the check was interrupted."""
    checks = kernel_checks(device, Shape(*_shape(device)), interpreted=device.type == "cpu")
    missing = {
        c.op for c in checks if c.short and (c.op, c.configuration) not in found and c.applies
    }
    return tuple(op for op in OPS if op in missing)


def _shape(device: torch.device) -> tuple[int, int, int]:
    return SHAPE if device.type == "cuda" else _SMALL_SHAPE


def _store(device: torch.device, found: Verdicts) -> str:
    """Store verdicts beside those that are there; return why that failed, or ""."""
    key = device_key(device)
    use_verdicts(device, found)
    return store_verdicts(key, {**read_verdicts(key), **found})


def _check(request: Request, told: Callable[[Verdict], None] | None, worker: str) -> Verdicts:
    """Return one verdict per op and configuration: the first that is not "ok", if there is one."""
    found: Verdicts = {}
    for verdict in _run(request, worker):
        name = verdict.op, verdict.configuration
        if name not in found or found[name].outcome == "ok":
            found[name] = verdict
        if told is not None:
            told(verdict)
    return found


def _run(request: Request, worker: str) -> Iterator[Verdict]:
    """Run a request; an op that ends its process gets a verdict, and the others go on."""
    done: list[str] = []
    while request.ops:
        ended = yield from _run_once(replace(request, done=tuple(done)), worker, done)
        if ended is None:
            return
        op, configuration = ended.starts[:2]
        yield Verdict(op, configuration, "crashed", ended.message)
        request = replace(request, ops=tuple(name for name in request.ops if name != op))


def _run_once(
    request: Request, worker: str, done: list[str]
) -> Generator[Verdict, None, Ended | None]:
    """Yield verdicts; names of finished checks are added to `done`."""
    entries = run_worker(worker, asdict(request), interpret=request.device == "cpu")
    while True:
        try:
            entry = next(entries)
        except StopIteration as stop:
            ended: Ended | None = stop.value
            return ended
        done.append(entry.pop("done", f"{entry['op']} ({entry['configuration']})"))
        yield Verdict(**entry)
