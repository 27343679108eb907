"""The measurements of `bench`: one function per group of rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from lightning_peft.diagnostics.bench_models import (
    Absent,
    Sizes,
    blocks,
    expert_stacks,
    training_step,
)
from lightning_peft.diagnostics.timing import medians, synchronize
from lightning_peft.optim.replace import convert_optimizer

__all__ = ["Found", "Row", "measure"]

#: A number, or why there is none.
Found = float | str
_Models = dict[str, nn.Module]


class Row(NamedTuple):
    """One measured value.

    Attributes:
        name: What was measured, and which way: ``"step, ours"``.
        unit: ``"ms"``, ``"GiB"`` or ``"of copy"``.
        value: The value, or why there is none.
    """

    name: str
    unit: str
    value: Found


def measure(sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """Yield all rows; a group that cannot be measured yields its reason.

    Args:
        sizes: What is measured.
        device: Where.
        seconds: Time for all groups together, beyond building and warming up.
    """
    groups: list[tuple[str, float, Callable[..., Iterator[Row]]]] = [
        ("step and decode", 0.65, _steps), ("dequantise", 0.05, _dequantise),
        ("optimizer", 0.1, _optimizers), ("experts", 0.2, _experts),
    ]  # fmt: skip
    for name, share, rows in groups:
        try:
            yield from rows(sizes, device, share * seconds)
        except (Absent, torch.cuda.OutOfMemoryError, RuntimeError, ValueError) as error:
            yield Row(name, "", _reason(error))
        _release(device)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _build(makers: dict[str, Callable[[], nn.Module]]) -> tuple[_Models, dict[str, str]]:
    """Return the models that can be made, and why others cannot."""
    made: _Models = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except (Absent, torch.cuda.OutOfMemoryError) as error:
            if name == "ours":
                raise
            absent[name] = _reason(error)
    return made, absent


def _rows(
    what: str, makers: dict[str, Any], times: dict[str, float], absent: dict[str, str]
) -> Iterator[Row]:
    for name in makers:
        value: Found = times[name] / 1e3 if name in times else absent[name]
        yield Row(f"{what}, {name}", "ms", value)


def _steps(sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """Training steps and their peak memory, then decoding steps with the same models."""
    makers = blocks(sizes, device)
    models, absent = _build(makers)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (1, sizes.tokens), generator=draw).to(device)
    steps = {name: training_step(model, tokens) for name, model in models.items()}
    for name in makers:
        peak: Found = absent.get(name, "measured on CUDA only")
        if name in steps:
            peak = _peak(steps[name], models[name], device, peak)
        yield Row(f"peak memory, {name}", "GiB", peak)
    times = medians(steps, device, repeats=3, least=seconds / 2)
    yield from _rows("step", makers, times, absent)
    steps.clear()
    for batch in sizes.batches:
        ids = torch.randint(256, (batch, 1), generator=draw).to(device)
        runs = {name: _decoding(model.eval(), ids) for name, model in models.items()}
        label = f"decode {batch}"
        least = seconds / 2 / len(sizes.batches)
        yield from _rows(label, makers, medians(runs, device, repeats=5, least=least), absent)
        graph: Found = "recorded on CUDA only"
        if device.type == "cuda":
            graph = medians({"": _graph(runs["ours"])}, device, repeats=10)[""] / 1e3
        yield Row(f"{label}, ours as a CUDA graph", "ms", graph)


def _peak(step: Callable[[], None], model: nn.Module, device: torch.device, why: Found) -> Found:
    """Return the peak of one step: weights of this model and all that the step allocates."""
    step()  # optimizer state
    synchronize(device)
    if device.type != "cuda":
        return why
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before + held) / 2**30


def _decoding(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Return one token per sequence, without context: the linear layers and what is around them."""

    def step() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return step


def _graph(step: Callable[[], object]) -> Callable[[], None]:
    for _ in range(2):
        step()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    replay: Callable[[], None] = recorded.replay
    return replay


def _dequantise(sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """Bytes per second of dequantising to bf16, against those of a copy."""
    N, K = sizes.matrix
    W = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    q, out = quantize_4bit(W), torch.empty_like(W)
    ways = {
        "copy": lambda: out.copy_(W),
        "dequantise": lambda: dequantize_4bit(q, (N, K), torch.bfloat16, out=out),
    }
    times = medians(ways, device, repeats=10, least=seconds)
    packed = sum(t.nbytes for t in q if t is not None)
    moved = {"copy": 2 * W.nbytes, "dequantise": packed + W.nbytes}
    rates = {name: moved[name] / times[name] for name in ways}
    yield Row("dequantise", "of copy", rates["dequantise"] / rates["copy"])


def _optimizers(sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """One step over the adapters of 32 blocks."""
    width, inner, rank = sizes.hidden, sizes.inner, sizes.rank
    shared = width * sizes.shared_heads // sizes.heads
    layers = [(width, width)] * 2 + [(width, shared)] * 2 + [(width, inner)] * 2 + [(inner, width)]
    shapes = [s for K, N in layers for s in ((rank, K), (N, rank))] * 32

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    cuda = device.type == "cuda"
    ours = torch.optim.AdamW(parameters(), lr=1e-4)
    convert_optimizer(ours, "adamw_8bit")
    ways: dict[str, Callable[[], object]] = {
        "ours 8-bit": ours.step,
        "torch AdamW": torch.optim.AdamW(parameters(), lr=1e-4, fused=cuda or None).step,
    }
    absent = {}
    try:
        import bitsandbytes

        theirs = bitsandbytes.optim.AdamW8bit(parameters(), lr=1e-4)
        theirs.step()
        ways["bitsandbytes 8-bit"] = theirs.step
    # Not installed (ImportError), or no kernel for this device (RuntimeError, or its subclass
    # NotImplementedError): the row then says why it is absent.
    except (ImportError, RuntimeError) as error:
        absent["bitsandbytes 8-bit"] = _reason(error)
    times = medians(ways, device, repeats=5, least=seconds)
    yield from _rows("optimizer", {**ways, **absent}, times, absent)


def _experts(sizes: Sizes, device: torch.device, seconds: float) -> Iterator[Row]:
    """Forward and backward of one layer's experts."""
    makers = expert_stacks(sizes, device)
    models, absent = _build(makers)
    hidden, _, number, top = sizes.experts
    draw = torch.Generator().manual_seed(2)
    x, dY = (
        torch.randn(sizes.expert_tokens, hidden, generator=draw).to(device, torch.bfloat16)
        for _ in range(2)
    )
    scores = torch.randn(sizes.expert_tokens, number, generator=draw).to(device)
    weights, index = scores.softmax(-1).topk(top)
    inputs = (x.requires_grad_(), index, weights.to(torch.bfloat16))

    def step(model: Any) -> Callable[[], None]:
        def run() -> None:
            model["experts"](*inputs).backward(dY)
            for p in (x, *model.parameters()):
                p.grad = None

        return run

    times = medians({n: step(m) for n, m in models.items()}, device, repeats=3, least=seconds)
    yield from _rows("experts", makers, times, absent)
