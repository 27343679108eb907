"""Runs the races of a device in a process of their own and stores the winners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from lightning_peft_kernels.races import Race, read_races, store_races, use_races
from lightning_peft_kernels.verdicts import device_key, verdict_lock

from lightning_peft.diagnostics.model_shapes import LLAMA_8B, ModelShapes
from lightning_peft.diagnostics.race_worker import RaceRequest
from lightning_peft.diagnostics.worker_process import run_worker

__all__ = ["WORKER", "tune_device"]

WORKER = "lightning_peft.diagnostics.race_worker"


def tune_device(
    device: torch.device,
    shapes: ModelShapes = LLAMA_8B,
    *,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 15,
    tokens: int = 256,
    told: Callable[[Race], None] | None = None,
    worker: str = WORKER,
) -> tuple[list[Race], str]:
    """Race the ways that a device offers for these shapes, and have selections follow the winners.

    A way that ends its process is left out, and the others go on.

    Args:
        device: A CUDA device or the CPU.
        shapes: Sizes of a model's packed weights.
        dtype: Dtype of activations.
        repeats: Runs of each way.
        tokens: Most tokens of a product.
        told: Called with each result.
        worker: Module that a process runs to serve a request.

    Returns:
        The races, and why they could not be stored, or "".

    Raises:
        RuntimeError: A process ended before its first race, so nothing is known.
    """
    request = RaceRequest(
        str(device), str(dtype).removeprefix("torch."), shapes.linear, shapes.groups,
        shapes.experts, repeats=repeats, tokens=tokens,
    )  # fmt: skip
    key, why = device_key(device), ""
    found: list[Race] = []
    while True:
        entries = run_worker(worker, asdict(request))
        done = list(request.done)
        ended = None
        while True:
            try:
                entry = next(entries)
            except StopIteration as stop:
                ended = stop.value
                break
            except RuntimeError:
                if not found:
                    raise
                break  # the device is lost after a fault: what was raced before holds
            done.append(entry.pop("done"))
            race = Race(**{**entry, "shape": tuple(entry["shape"])})
            found.append(race)
            with verdict_lock(key):  # one by one: what was raced is kept if the user interrupts
                why = store_races(key, [race])
            if told is not None:
                told(race)
        if ended is None:
            break
        banned = f"{ended.starts[0]} {ended.starts[1]}"
        request = replace(request, done=tuple(done), banned=(*request.banned, banned))
    use_races(device, read_races(key) if not why else found)
    return found, why
