"""A step of a small Qwen3-MoE-shaped model: experts frozen, with our LoRA on them, with peft's.

At a fixed number of tokens more experts mean more weights to read, for frozen experts too: `growth`
is over the model with the fewest experts, `over grouped_mm` the time beside frozen experts in the
library's grouped product, transformers' default and the faster of the two frozen ones. All models
take turns, two steps each, of which the second counts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from side_by_side import interleaved, rows, write
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lightning_peft as lp

ATTENTION = ["q_proj", "v_proj"]
GROUPED = "experts frozen, grouped_mm"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def base(experts: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=experts,
        num_experts_per_tok=4, vocab_size=1000, experts_implementation="eager",
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).train()


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for p in model.parameters():
            p.grad = None

    return call


def candidates(experts: int, ids: torch.Tensor, with_peft: bool) -> dict[str, Any]:
    model = base(experts)
    frozen, grouped, ours, ours4 = (copy.deepcopy(model) for _ in range(4))
    for plain in (frozen, grouped):
        lp.attach(plain, lp.LoRA(r=8, target_modules=ATTENTION))
    grouped.set_experts_implementation("grouped_mm")
    method = lp.LoRA(r=8, target_modules=[*ATTENTION, "experts"])
    lp.attach(ours, method)
    lp.attach(ours4, method, quantization=lp.Quantization("nf4"))
    made = {
        "experts frozen": step(frozen, ids),
        GROUPED: step(grouped, ids),
        "lightning_peft": step(ours, ids),
        "lightning_peft nf4": step(ours4, ids),
    }
    if with_peft:
        config = peft.LoraConfig(r=8, target_modules=ATTENTION, target_parameters=EXPERTS)
        made["peft"] = step(peft.get_peft_model(model, config), ids)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, 1000, (1, options.tokens))
    made = {
        (experts, name): call
        for experts in options.experts
        for name, call in candidates(experts, ids, with_peft=experts <= 64).items()
    }
    seconds = interleaved(made, options.repeats, again=1)
    table = []
    for experts in options.experts:
        of_model = {name: times for (n, name), times in seconds.items() if n == experts}
        table += rows(of_model, "experts frozen", experts=experts, tokens=options.tokens)
    first = {row["candidate"]: row["median_ms"] for row in reversed(table)}
    grouped = {row["experts"]: row["median_ms"] for row in table if row["candidate"] == GROUPED}
    for row in table:
        row["growth"] = round(row["median_ms"] / first[row["candidate"]], 3)
        row["over grouped_mm"] = round(row["median_ms"] / grouped[row["experts"]], 3)
    if options.dry:
        print(*("  ".join(map(str, row.values())) for row in table), sep="\n")
    else:
        write("moe_step", table)


if __name__ == "__main__":
    main()
