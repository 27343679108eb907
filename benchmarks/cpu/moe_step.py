"""A step of a small Qwen3-MoE-shaped model: experts frozen, with our LoRA on them, with peft's.

At a fixed number of tokens more experts mean more of them that are hit, and more weights to read,
for frozen experts too. What experts cost that are not hit is seen by itself where the model with
the fewest is given further ones that its routers leave alone: `experts asked for` says of which
kind a model is, `hit` how many experts a layer has rows for on average. `growth` is over the model
with the fewest experts; `over grouped_mm` over frozen experts in the library's grouped product,
transformers' default and the faster of the two frozen ones. Both are medians of the ratios of each
turn. All models take turns, two steps each, of which the second counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lightning_peft as lp
from benchmarks.lib.side_by_side import interleaved, rows, write

ATTENTION = ["q_proj", "v_proj"]
EAGER = "experts frozen"
GROUPED = "experts frozen, grouped_mm"
#: Experts up to which peft takes a turn: with 256 a step of it takes seconds.
WITH_PEFT = 64
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def base(experts: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=experts,
        num_experts_per_tok=4, vocab_size=1000, experts_implementation="eager",
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).train()


def with_idle(few: Qwen3MoeForCausalLM, experts: int) -> Qwen3MoeForCausalLM:
    """The model with experts behind its own that no token chooses: their logits are a tenth of the
    sum of the others', so some four of those are above.
    """
    model, own = base(experts), few.state_dict()
    for name, t in model.state_dict().items():
        rows_of_few = own[name]
        if name.endswith("mlp.gate.weight"):
            t[:] = 0.1 * rows_of_few.sum(dim=0)
        t[: len(rows_of_few)] = rows_of_few
    return model


def experts_hit(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a layer, on average."""
    hit: list[int] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hit.append(inputs[1].unique().numel())

    layers = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
    handles = [m.register_forward_pre_hook(note) for m in layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return round(statistics.mean(hit), 1)


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for p in model.parameters():
            p.grad = None

    return call


def candidates(
    model: Qwen3MoeForCausalLM, ids: torch.Tensor, *, with_peft: bool
) -> dict[str, Callable[[], None]]:
    frozen, grouped, ours, ours4 = (copy.deepcopy(model) for _ in range(4))
    for plain in (frozen, grouped):
        lp.attach(plain, lp.LoRA(r=8, target_modules=ATTENTION))
    grouped.set_experts_implementation("grouped_mm")
    method = lp.LoRA(r=8, target_modules=[*ATTENTION, "experts"])
    lp.attach(ours, method)
    lp.attach(ours4, method, quantization=lp.Quantization("nf4"))
    made = {
        EAGER: step(frozen, ids),
        GROUPED: step(grouped, ids),
        "lightning_peft": step(ours, ids),
        "lightning_peft nf4": step(ours4, ids),
    }
    if with_peft:
        config = peft.LoraConfig(r=8, target_modules=ATTENTION, target_parameters=EXPERTS)
        made["peft"] = step(peft.get_peft_model(copy.deepcopy(model), config), ids)
    return made


def compare(
    models: Mapping[int, Qwen3MoeForCausalLM],
    asked_for: str,
    ids: torch.Tensor,
    repeats: int,
    *,
    with_peft: bool,
) -> list[dict[str, Any]]:
    """Rows of models by their number of experts, the fewest first; they take turns."""
    made = {
        (n, name): call
        for n, model in models.items()
        for name, call in candidates(model, ids, with_peft=with_peft and n <= WITH_PEFT).items()
    }
    seconds = interleaved(made, repeats, again=1)
    table, fewest = [], next(iter(models))
    for experts, model in models.items():
        times = {name: seconds[n, name] for n, name in made if n == experts}
        columns = {"experts": experts, "experts asked for": asked_for}
        columns |= {"hit": experts_hit(model, ids), "tokens": ids.numel()}
        for row in rows(times, EAGER, **columns):
            seen, name = times[row["candidate"]], row["candidate"]
            row["over grouped_mm"] = by_turns(seen, times[GROUPED])
            row["growth"] = by_turns(seen, seconds[fewest, name])
            table.append(row)
    return table


def by_turns(seconds: list[float], reference: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(seconds, reference, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, 1000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    few = base(options.experts[0])
    chosen = {n: base(n) for n in options.experts}
    table = compare(chosen, "any", ids, options.repeats, with_peft=True)
    idle = {n: with_idle(few, n) for n in options.experts}
    table += compare(idle, f"the first {options.experts[0]}", ids, options.repeats, with_peft=False)
    if options.dry:
        print(*("  ".join(map(str, row.values())) for row in table), sep="\n")
    else:
        write("moe_step", table)


if __name__ == "__main__":
    main()
