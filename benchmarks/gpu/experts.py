"""Experts of Qwen3-30B-A3B and Mixtral-8x7B, one layer: ours in 4 bits with LoRA against others.

Per layer, number of tokens and mode: transformers' grouped bf16 experts frozen (the limit), with
Hugging Face peft's LoRA on them, and ours with LoRA on bf16 and on NF4. Median time, ratio to peft
and to the frozen layer, peak memory of a step above the weights, bytes of the weights, and the norm
of A's gradient, which has to agree between candidates of one storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft as lp
from benchmarks.lib import harness
from benchmarks.lib.harness import NOT_MEASURED

#: (hidden, inner, experts, experts a token)
SHAPES = {"Qwen3-30B-A3B": (2048, 768, 128, 8), "Mixtral-8x7B": (4096, 14336, 8, 2)}
TOKENS = [64, 256, 1024, 4096, 16384]
MODES = ["forward", "forward + backward"]
FROZEN, PEFT = "bf16 frozen, transformers grouped_mm", "peft LoRA on bf16"
CANDIDATES = [FROZEN, PEFT, "ours LoRA on bf16", "ours LoRA on NF4"]


def experts(sizes: tuple[int, int, int, int], device: torch.device) -> nn.Module:
    """One layer's experts, the same at every call."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    hidden, inner, number, top = sizes
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=number, num_experts_per_tok=top
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        made = Qwen3MoeExperts(config).to(torch.bfloat16)
    g = torch.Generator(device).manual_seed(0)
    for p in made.parameters():
        p.requires_grad_(False).normal_(std=p.shape[-1] ** -0.5, generator=g)
    return nn.ModuleDict({"experts": made})


def candidate(name: str, sizes: tuple[int, int, int, int], r: int, device: torch.device) -> Any:
    model = experts(sizes, device)
    if name == FROZEN:
        return model
    if name == PEFT:
        import peft

        targets = ["experts.gate_up_proj", "experts.down_proj"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=r, target_parameters=targets), model)
    else:
        quantization = lp.Quantization("nf4") if "NF4" in name else None
        lp.attach(model, lp.LoRA(r=r, target_modules=["experts"]), quantization=quantization)
    for key, p in model.named_parameters():
        if p.requires_grad:
            g = torch.Generator().manual_seed(p.numel())  # the same values in either's shape
            is_A = "lora_A" in key or key.endswith(".A")
            value = torch.randn(p.shape, generator=g)
            p.data = (value * (0.02 if is_A else 0.0)).to(device, torch.bfloat16)
    return model


def step(model: Any, mode: str, inputs: tuple[Tensor, ...], dY: Tensor) -> Callable[[], None]:
    def run() -> None:
        if mode == "forward":
            with torch.no_grad():
                model["experts"](*inputs)
            return
        model["experts"](*inputs).backward(dY)
        for p in (inputs[0], *model.parameters()):
            p.grad = None

    return run


def memory(model: Any, inputs: tuple[Tensor, ...], dY: Tensor) -> dict[str, Any]:
    """Of a step: peak above what is held, and whether the gradient arrives."""
    cuda = dY.device.type == "cuda"
    held = {t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model["experts"](*inputs).backward(dY)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = sum(float(p.grad.float().norm()) ** 2 for p in trained) ** 0.5
    peak = torch.cuda.max_memory_allocated() - before if cuda else NOT_MEASURED
    for p in (inputs[0], *trained):
        p.grad = None
    return {
        "peak_bytes": peak,
        "weight_bytes": sum(held.values()),
        "grad_norm": f"{norm:.4g}" if trained else "-",
    }


def rows_of(layer: str, sizes: tuple[int, int, int, int], chosen: Any) -> list[dict[str, Any]]:
    rows = []
    hidden, inner, number, top = sizes
    r = 4 if chosen.smoke else 16
    for M in [8, 32] if chosen.smoke else TOKENS:
        times: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
        kept: dict[str, dict[str, Any]] = {}
        if harness.runs(chosen):
            g = torch.Generator().manual_seed(2)
            x = torch.randn(M, hidden, generator=g).to(chosen.device, torch.bfloat16)
            scores = torch.randn(M, number, generator=g).to(chosen.device)
            weights, index = scores.softmax(-1).topk(top)
            inputs = (x.requires_grad_(), index, weights.to(torch.bfloat16))
            dY = torch.randn(M, hidden, generator=g).to(chosen.device, torch.bfloat16)
            made = {name: candidate(name, sizes, r, chosen.device) for name in CANDIDATES}
            kept = {name: memory(model, inputs, dY) for name, model in made.items()}
            for mode in MODES:
                timed = {name: step(m, mode, inputs, dY) for name, m in made.items()}
                times[mode] = harness.interleaved(timed, repeats=3 if chosen.smoke else 15)
            del made
        for mode in MODES:
            for name in CANDIDATES:
                own = times[mode].get(name)
                empty = dict.fromkeys(("peak_bytes", "weight_bytes", "grad_norm"), NOT_MEASURED)
                rows.append(
                    {"layer": layer, "hidden": hidden, "inner": inner, "experts": number}
                    | {"top": top, "r": r, "tokens": M, "mode": mode}
                    | {"candidate": name, **harness.spread(own)}
                    | {"ratio_to_peft": harness.ratio(times[mode].get(PEFT), own)}
                    | {"ratio_to_frozen": harness.ratio(times[mode].get(FROZEN), own)}
                    | kept.get(name, empty)
                )
    return rows


def main() -> None:
    chosen = harness.options(__doc__ or "")
    shapes = {"tiny": (64, 32, 8, 2)} if chosen.smoke else SHAPES
    rows = [row for layer, sizes in shapes.items() for row in rows_of(layer, sizes, chosen)]
    harness.write(chosen, "experts", rows)


if __name__ == "__main__":
    main()
