"""What fits where: peak bytes per GPU of QLoRA runs by model, GPUs and context, from the planner.

Nothing is loaded and no GPU is needed. One sample per GPU, LoRA of rank 16 on all linear layers of
an NF4 base, bf16, AdamW. "limits" are activations="checkpoint+offload" and loss="chunked". CUDA's
context and NCCL's buffers are added as round allowances. The published figures at the end are
compared with plans of the same setting. `make pictures` draws the table.

    python benchmarks/cpu/what_fits.py [--smoke]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig

from benchmarks.lib.side_by_side import write
from lightning_peft import LoRA, Plan, estimate_memory
from lightning_peft.planner.choice import ALLOWANCES


def llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 128_256) -> Any:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


MODELS = {
    "8B": llama(4096, 14_336, 32, 32),
    "70B": llama(8192, 28_672, 80, 64),
    "405B": llama(16_384, 53_248, 126, 128),
}
SMOKE = {"tiny": llama(64, 128, 4, 8, 512)}
GPUS, LENGTHS = (1, 8, 64), (4_096, 32_768, 131_072)
CARDS = (24, 48, 80, 141)  # GB: the sizes that are common
METHOD = LoRA(r=16, target_modules="all-linear")
QLORA: dict[str, Any] = {"quantization": "nf4", "precision": "bf16-true"}


def plans(config: Any, length: int) -> dict[tuple[str, int], Plan]:
    """Plans by options and number of GPUs; the traces of a step are shared."""
    found = {}
    for name, how in (
        ("checkpoint", {"activations": "checkpoint"}),
        ("limits", {"activations": "checkpoint+offload", "loss": "chunked"}),
    ):
        one = estimate_memory(config, METHOD, sequence_length=length, **QLORA, **how)
        for gpus in GPUS:
            strategy = None if gpus == 1 else "fsdp"
            allowances = tuple(ALLOWANCES.items())[: 1 if gpus == 1 else None]
            choice = replace(one.choice, strategy=strategy, world_size=gpus, allowances=allowances)
            found[name, gpus] = replace(one, choice=choice)  # sizes and the traced step are shared
    return found


def card(nbytes: float) -> str:
    """The smallest card that holds this many bytes."""
    return next((f"{size} GB" for size in CARDS if nbytes <= size * 10**9), "-")


def table(models: dict[str, Any], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for model, config in models.items():
        for length in lengths:
            print(model, length, flush=True)
            for (options, gpus), plan in plans(config, length).items():
                needed = plan.peak + plan.allowance
                rows.append(
                    {
                        "model": model,
                        "gpus": gpus,
                        "tokens": length,
                        "options": options,
                        "gpu_gb": round(needed / 1e9, 1),
                        "host_gb": round(plan.host / 1e9, 1),
                        "card": card(needed),
                        "published_gb": "",
                        "source": "",
                    }
                )
    return rows


#: (setting, GB as published, source, model, arguments of the plan).
PUBLISHED: list[tuple[str, float, str, Any, dict[str, Any]]] = [
    (
        "8B QLoRA, batch 2 x 2048, 1 GPU",
        7.4 * 1.0737,
        "torchtune README, 2024",
        MODELS["8B"],
        {"batch_size": 2, "sequence_length": 2048, "loss": "chunked"},
    ),
    (
        "405B QLoRA, batch 1 x 2048, 8 GPUs",
        44.8,
        "torchtune README, 2024",
        MODELS["405B"],
        {"sequence_length": 2048, "loss": "chunked", "strategy": "fsdp", "world_size": 8},
    ),
    (
        "Llama-2 70B QLoRA, batch 2 x 2048, 2 GPUs, CPU offload",
        14.92 * 1.0737,
        "AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md",
        llama(8192, 28_672, 80, 64, 32_000),
        {
            **{"batch_size": 2, "sequence_length": 2048},
            **{"strategy": "fsdp", "world_size": 2, "cpu_offload": True},
        },
    ),
]


def published() -> list[dict[str, Any]]:
    rows = []
    for setting, gb, source, config, how in PUBLISHED:
        plan = estimate_memory(config, METHOD, activations="checkpoint", **QLORA, **how)
        rows.append(
            {
                "model": setting,
                "gpus": plan.choice.world_size,
                "tokens": plan.choice.sequence_length,
                "options": "published",
                "gpu_gb": round(plan.peak / 1e9, 1),
                "host_gb": round(plan.host / 1e9, 1),
                "card": card(plan.peak),
                "published_gb": round(gb, 1),
                "source": source,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no files")
    chosen = parser.parse_args()
    if chosen.smoke:
        for row in table(SMOKE, (64,)):
            print(row)
        return
    write("what_fits", [*table(MODELS, LENGTHS), *published()])


if __name__ == "__main__":
    main()
