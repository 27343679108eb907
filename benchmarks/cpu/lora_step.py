"""A training step with LoRA, dense and 4-bit, against Hugging Face peft (and bitsandbytes)."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from benchmarks.lib.side_by_side import interleaved, rows, write

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=1000,
    )
    return LlamaForCausalLM(config).train()


def packed_by_bitsandbytes(model: nn.Module) -> nn.Module:
    """Every targeted layer replaced by a Linear4bit, as loading in 4 bit does."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4",
                compress_statistics=True, compute_dtype=torch.float32,
            )  # fmt: skip
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4"
            )
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.to("cpu"))
    return model


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for p in model.parameters():
            p.grad = None

    return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = base(options.hidden, options.layers)
    ids = torch.randint(0, 1000, (1, options.tokens))
    ours, ours4 = copy.deepcopy(model), copy.deepcopy(model)
    method = lp.LoRA(r=16, alpha=16.0, target_modules=TARGETS)
    lp.attach(ours, method)
    lp.attach(ours4, method, quantization=lp.Quantization("nf4"))
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs4 = peft.get_peft_model(packed_by_bitsandbytes(copy.deepcopy(model)), config)
    shape = {"hidden": options.hidden, "layers": options.layers, "tokens": options.tokens}
    dense = interleaved(
        {"peft": step(theirs, ids), "lightning_peft": step(ours, ids)}, options.repeats
    )
    packed = interleaved(
        {"peft + bitsandbytes": step(theirs4, ids), "lightning_peft": step(ours4, ids)},
        options.repeats,
    )
    table = rows(dense, "peft", base="dense", **shape)
    table += rows(packed, "peft + bitsandbytes", base="nf4", **shape)
    write("lora_step", table)


if __name__ == "__main__":
    main()
