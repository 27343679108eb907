"""Predicted against measured peak memory of training steps on the CPU.

Measured: every allocation and release that torch's profiler sees over two steps (forward,
zero_grad, backward, optimizer step), on top of what the model holds before them.

    python benchmarks/cpu/planner.py [--smoke] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_peft import LoRA, Quantization, attach, estimate_memory

RESULTS = Path(__file__).parents[1] / "results" / "planner.csv"

LLAMA = (
    LlamaForCausalLM,
    LlamaConfig(
        **{"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688},
        **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
)
MINILM = (
    BertForSequenceClassification,
    BertConfig(
        **{"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536},
        **{"num_hidden_layers": 6, "num_attention_heads": 12},
    ),
)
VIT = (
    ViTForImageClassification,
    ViTConfig(
        **{"hidden_size": 192, "intermediate_size": 768, "image_size": 96, "patch_size": 8},
        **{"num_hidden_layers": 6, "num_attention_heads": 3},
    ),
)
ALL = LoRA(r=8, target_modules="all-linear")

# name, (class, configuration), method, quantization, precision, batch, length, checkpointing
CASES: list[tuple[Any, ...]] = [
    ("Llama 256×6, LoRA", LLAMA, LoRA(r=8), None, "bf16", 4, 256, False),
    ("Llama 256×6, LoRA", LLAMA, LoRA(r=8), None, "32-true", 4, 256, False),
    ("Llama 256×6, LoRA, checkpointing", LLAMA, LoRA(r=8), None, "32-true", 4, 256, True),
    ("Llama 256×6, LoRA on nf4", LLAMA, ALL, Quantization("nf4"), "32-true", 4, 256, False),
    ("Llama 256×6, full", LLAMA, "full", None, "bf16", 4, 256, False),
    ("MiniLM, full", MINILM, "full", None, "32-true", 8, 128, False),
    ("MiniLM, LoRA", MINILM, LoRA(r=8), None, "32-true", 16, 128, False),
    ("ViT 192×6, LoRA", VIT, LoRA(r=8), None, "32-true", 16, 145, False),
]


def measured(case: tuple[Any, ...]) -> int:
    """Bytes at the fullest moment of two steps."""
    _, (cls, config), method, quantization, precision, batch, length, checkpointing = case
    torch.manual_seed(0)
    model = cls(config).train()
    if method != "full":
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        attach(model, method, quantization=quantization)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    inputs = made(config, batch, length)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    events = [
        (e.start_ns(), e.nbytes())
        for e in prof.profiler.kineto_results.events()  # type: ignore[union-attr]
        if e.name() == "[memory]"
    ]
    now = top = 0
    for _, n in sorted(events, key=lambda e: e[0]):
        now += n
        top = max(top, now)
    return sum(held.values()) + top


def made(config: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    if isinstance(config, ViTConfig):
        side = config.image_size
        return {
            "pixel_values": torch.zeros(batch, 3, side, side),
            "labels": torch.zeros(batch, dtype=torch.long),
        }
    ids = torch.zeros(batch, length, dtype=torch.long)
    short = isinstance(config, BertConfig)
    return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long) if short else ids}


def row(case: tuple[Any, ...]) -> dict[str, Any]:
    name, (cls, config), method, quantization, precision, batch, length, checkpointing = case
    config.architectures = [cls.__name__]
    plan = estimate_memory(
        config,
        method,
        quantization=quantization,
        precision=precision,
        batch_size=batch,
        sequence_length=length,
        checkpointing=checkpointing,
    )
    peak = measured(case)
    return {
        "case": name,
        "precision": precision,
        "batch": batch,
        "length": length,
        "predicted_mb": round(plan.peak / 1e6, 1),
        "measured_mb": round(peak / 1e6, 1),
        "ratio": round(plan.peak / peak, 3),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benchmarks/cpu/planner.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one case")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows = []
    for case in CASES[:1] if chosen.smoke else CASES:
        rows.append(row(case))
        print(
            {k: rows[-1][k] for k in ("case", "precision", "predicted_mb", "measured_mb", "ratio")}
        )
    with chosen.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
