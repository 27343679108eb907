"""Tokens a second of greedy decoding with the adapter attached, Llama-3-8B's shape.

Batch 1, 8 and 64, a static cache: ours with the library product, ours with the product that decodes
the weight, and Hugging Face peft + bitsandbytes. The fraction of bandwidth counts the packed base
and the dense head once a step against the copy rate measured in the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from lightning_peft_kernels import use_backend
from torch import nn

from benchmarks.lib import harness, llama
from benchmarks.lib.harness import NOT_MEASURED

CANDIDATES = ["peft + bitsandbytes", "ours", "ours, dequantised"]


def stepper(model: Any, batch: int, length: int) -> Callable[[], None]:
    """One decoding step after a prompt; the cache is put back each time."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    prompt = torch.randint(64, (batch, length), device=device)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1]

    def run() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def model_of(name: str, chosen: Any) -> nn.Module:
    r = 4 if chosen.smoke else 16
    model = llama.base(chosen.smoke, chosen.device)
    if name.startswith("peft"):
        return llama.hugging_face(model, r, quantized=True).eval()
    return llama.ours(model, r).eval()


def bytes_a_step(model: nn.Module) -> int:
    """Every frozen byte is read once, but of the embedding only a few rows."""
    tensors = [
        (name, t) for name, t in (*model.named_parameters(), *model.named_buffers())
        if "embed_tokens" not in name
    ]  # fmt: skip
    return sum(t.numel() * t.element_size() for _, t in tensors)


def copy_rate(chosen: Any) -> float:
    """Bytes a millisecond, read and written."""
    a = torch.empty(1 << (16 if chosen.smoke else 28), device=chosen.device)
    b = torch.empty_like(a)
    times = harness.interleaved({"copy": lambda: b.copy_(a)}, repeats=5)["copy"]
    return 8 * a.numel() / sorted(times)[2]


def main() -> None:
    chosen = harness.options(__doc__ or "")
    batches, length = ([1, 2], 4) if chosen.smoke else ([1, 8, 64], 512)
    rate = copy_rate(chosen) if harness.runs(chosen) else 0.0
    rows, base = [], {}
    for name in CANDIDATES:
        model = model_of(name, chosen) if harness.runs(chosen) else None
        for batch in batches:
            times = None
            if model is not None:
                run = stepper(model, batch, length)
                with use_backend("torch" if "dequantised" in name else "auto"):
                    repeats = 3 if chosen.smoke else 20
                    times = harness.interleaved({name: run}, repeats=repeats)[name]
                base.setdefault(batch, times)
            spread = harness.spread(times)
            tokens = fraction = NOT_MEASURED
            if times is not None and model is not None:
                median = float(spread["median_ms"])
                tokens = f"{1e3 * batch / median:.1f}"
                fraction = f"{bytes_a_step(model) / median / rate:.3f}"
            rows.append(
                {"candidate": name, "batch": batch, "prompt": length, **spread}
                | {"tokens_per_s": tokens, "fraction_of_copy": fraction}
                | {"ratio_to_peft": harness.ratio(base.get(batch), times)}
            )
        del model
        gc.collect()
        if chosen.device.type == "cuda":
            torch.cuda.empty_cache()
    harness.write(chosen, "decode", rows)


if __name__ == "__main__":
    main()
