"""Linear layers of Llama-3-8B and Mistral-7B (the same shapes): ours against what others run.

Per shape, tokens and mode (forward; forward + backward; with recomputation): median time, ratio to
peft + bitsandbytes and to a plain bf16 layer, bytes saved for backward, peak memory, and the norm
of A's gradient, which has to agree between candidates. Then the fraction of copy bandwidth that
dequantising and decoding reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from lightning_peft_kernels.lora.rank_gradients import rank_gradients, rank_gradients_reference
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.selection import select_product
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.lib import harness
from benchmarks.lib.harness import NOT_MEASURED
from benchmarks.lib.providers import Candidate, candidates

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096)}
SHAPES["down"] = (4096, 14336)
TOKENS = [1, 16, 64, 256, 2048, 4096, 8192, 16384]
MODES = ["forward", "forward + backward", "with recomputation"]
BASE = "peft + bitsandbytes, autocast"
RANK = ("dS and dB", "dS and dB as two products")
PLAIN = "bf16 linear without LoRA"


def step(candidate: Candidate, mode: str, x: Tensor, dY: Tensor) -> Callable[[], None]:
    def run() -> None:
        context = (
            torch.autocast(x.device.type, dtype=torch.bfloat16)
            if candidate.autocast
            else contextlib.nullcontext()
        )
        with context:
            if mode == "forward":
                with torch.no_grad():
                    candidate.run(x)
                return
            recompute = mode == "with recomputation"
            y = checkpoint(candidate.run, x, use_reentrant=False) if recompute else candidate.run(x)
        y.backward(dY.to(y.dtype))
        x.grad = None
        for t in candidate.trained:
            t.grad = None

    return run


def memory(candidate: Candidate, x: Tensor, dY: Tensor) -> dict[str, Any]:
    """Bytes saved for backward, peak bytes of a step, norm of A's gradient."""
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    cuda = x.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        context = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=candidate.autocast)
        with context:
            y = candidate.run(x)
    y.backward(dY.to(y.dtype))
    norm = candidate.trained[0].grad.float().norm().item() if candidate.trained else NOT_MEASURED
    x.grad = None
    for t in candidate.trained:
        t.grad = None
    peak = torch.cuda.max_memory_allocated() - before if cuda else NOT_MEASURED
    for t in (*candidate.held, *candidate.trained):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return {"bytes_saved": sum(saved.values()), "peak_bytes": peak, "grad_norm_A": norm}


def layers(chosen: Any) -> list[dict[str, Any]]:
    rows = []
    shapes, tokens, r = (SHAPES, TOKENS, 16)
    if chosen.smoke:
        shapes, tokens, r = {"tiny": (64, 128)}, [1, 16], 4
    for layer, (N, K) in shapes.items():
        made = candidates(N, K, r, chosen.device) if harness.runs(chosen) else {}
        for M in tokens:
            x = dY = torch.empty(0)
            if made:
                x = torch.randn(M, K, device=chosen.device, dtype=torch.bfloat16)
                x.requires_grad_()
                dY = torch.randn(M, N, device=chosen.device, dtype=torch.bfloat16)
            used = {k: c for k, c in made.items() if isinstance(c, Candidate)}
            kept = {name: memory(c, x, dY) for name, c in used.items()}
            for mode in MODES:
                timed = {name: step(c, mode, x, dY) for name, c in used.items()}
                times = harness.interleaved(timed, repeats=3 if chosen.smoke else 15)
                for name in made or ["all"]:
                    own = times.get(name)
                    empty = dict.fromkeys(
                        ("bytes_saved", "peak_bytes", "grad_norm_A"), NOT_MEASURED
                    )
                    path = "-"
                    if made:
                        path = select_product(chosen.device, torch.bfloat16, M, (N, K)).backend
                    rows.append(
                        {"layer": layer, "N": N, "K": K, "tokens": M, "r": r, "mode": mode}
                        | {"candidate": name, **harness.spread(own)}
                        | {"ratio_to_peft": harness.ratio(times.get(BASE), own)}
                        | {"ratio_to_bf16": harness.ratio(times.get(PLAIN), own)}
                        | kept.get(name, empty)
                        | {"path": path if name == "ours" else "-"}
                    )
    return rows


def check_gradients(rows: list[dict[str, Any]]) -> None:
    """Norms of A's gradient differ by rounding only: bf16, and e4m3 for its own rows."""
    want = {(r["layer"], r["tokens"]): r["grad_norm_A"] for r in rows if r["candidate"] == "ours"}
    for row in rows:
        own, reference = row["grad_norm_A"], want.get((row["layer"], row["tokens"]))
        if isinstance(own, float) and isinstance(reference, float):
            allowed = 0.05 * max(reference, 1e-6)
            if abs(own - reference) > allowed and row["candidate"] != "torchao NF4":
                raise SystemExit(f"gradient of A differs: {row} against {reference}")


def bandwidth(chosen: Any) -> list[dict[str, Any]]:
    """Bytes a second of what memory bounds against a copy: dequantising, decoding, and dS and dB of
    rank 16 (the bytes of dY alone) in one pass and in two products.
    """
    rows = []
    N, K = (64, 128) if chosen.smoke else (14336, 4096)
    if not harness.runs(chosen):
        return [
            {"op": op, "N": N, "K": K, **harness.spread(None), "bytes": NOT_MEASURED}
            | {"fraction_of_copy": NOT_MEASURED}
            for op in ("copy", "dequantize bf16", "decode 1 token", *RANK)
        ]
    W = torch.randn(N, K, device=chosen.device, dtype=torch.bfloat16)
    q, other = quantize_4bit(W), torch.empty_like(W)
    x = torch.randn(1, K, device=chosen.device, dtype=torch.bfloat16)
    M, R = (32, 4) if chosen.smoke else (8192, 16)
    dY, S, B = (
        torch.randn(s, device=chosen.device, dtype=torch.bfloat16) for s in ((M, N), (M, R), (N, R))
    )
    packed = sum(t.numel() * t.element_size() for t in q if t is not None)
    moved = {"copy": 4 * N * K, "dequantize bf16": packed + 2 * N * K, "decode 1 token": packed}
    moved |= dict.fromkeys(RANK, 2 * M * N)
    made: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(W),
        "dequantize bf16": lambda: dequantize_4bit(q, (N, K), torch.bfloat16, out=other),
        "decode 1 token": lambda: nf4_small_batch(x, q, (N, K)),
        RANK[0]: lambda: rank_gradients(dY, S, B, 0.5),
        RANK[1]: lambda: rank_gradients_reference(dY, S, B, 0.5),
    }
    times = harness.interleaved(made, repeats=3 if chosen.smoke else 50)
    rates = {name: moved[name] / float(harness.spread(t)["median_ms"]) for name, t in times.items()}
    for name, own in times.items():
        rows.append(
            {"op": name, "N": N, "K": K, **harness.spread(own), "bytes": moved[name]}
            | {"fraction_of_copy": f"{rates[name] / rates['copy']:.3f}"}
        )
    return rows


def plot(rows: list[dict[str, Any]], device: str) -> None:
    """Ratio to peft + bitsandbytes by tokens, with recomputation; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["candidate"] for row in rows):
        totals = []
        for M in TOKENS:
            own, base = (
                [
                    float(r["median_ms"])
                    for r in rows
                    if r["candidate"] == which
                    and r["tokens"] == M
                    and r["mode"] == MODES[2]
                    and r["median_ms"] != NOT_MEASURED
                ]
                for which in (name, BASE)
            )
            totals.append(sum(base) / sum(own) if own and base else float("nan"))
        axes.plot(TOKENS, totals, marker="o", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel=f"times as fast as {BASE}", title=device)
    axes.legend(fontsize=7)
    folder = harness.RESULTS.parent.parent / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "linear_layers.png", dpi=150, bbox_inches="tight")


def main() -> None:
    chosen = harness.options(__doc__ or "")
    rows = layers(chosen)
    check_gradients(rows)
    harness.write(chosen, "linear_layers", rows)
    if chosen.csv:
        chosen.csv = chosen.csv.with_name(f"bandwidth_{chosen.csv.name}")
    harness.write(chosen, "bandwidth", bandwidth(chosen))
    if chosen.device.type == "cuda" and not chosen.smoke:
        plot(rows, harness.device_name())


if __name__ == "__main__":
    main()
