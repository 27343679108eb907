"""A training step of each method that Hugging Face peft has too, against peft's."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from typing import Any

import peft
import torch

import lightning_peft as lp
from benchmarks.cpu.lora_step import base, step
from benchmarks.lib.side_by_side import interleaved, rows, write

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ON_WEIGHTS: dict[str, tuple[Any, Any]] = {
    "LoRA": (lp.LoRA(r=16), peft.LoraConfig(r=16)),
    "DoRA": (lp.DoRA(r=16), peft.LoraConfig(r=16, use_dora=True)),
    "AdaLoRA": (lp.AdaLoRA(init_r=12), peft.AdaLoraConfig(init_r=12, total_step=1000)),
    "LoHa": (lp.LoHa(r=8), peft.LoHaConfig(r=8)),
    "LoKr": (lp.LoKr(r=8), peft.LoKrConfig(r=8)),
    "IA3": (lp.IA3(feedforward_modules=["down_proj"]),
            peft.IA3Config(feedforward_modules=["down_proj"])),
    "VeRA": (lp.VeRA(r=64), peft.VeraConfig(r=64)),
    "OFT": (lp.OFT(block_size=32, cayley_neumann=True), peft.OFTConfig(oft_block_size=32, r=0)),
    "BOFT": (lp.BOFT(block_size=4), peft.BOFTConfig(boft_block_size=4)),
    "MiSS": (lp.MiSS(r=64), peft.MissConfig(r=64)),
    "LoRA, dropout 0.1": (lp.LoRA(r=16, dropout=0.1), peft.LoraConfig(r=16, lora_dropout=0.1)),
}  # fmt: skip
LM: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
ON_MODELS: dict[str, tuple[Any, Any]] = {
    "NormTuning": (lp.NormTuning(), peft.LNTuningConfig(target_modules=NORMS)),
    "PromptTuning": (lp.PromptTuning(n=20), peft.PromptTuningConfig(**LM)),
    "PTuning": (lp.PTuning(n=20), peft.PromptEncoderConfig(**LM, encoder_hidden_size=512)),
    "PTuning, LSTM": (
        lp.PTuning(n=20, encoder="lstm"),
        peft.PromptEncoderConfig(
            **LM, encoder_hidden_size=512, encoder_reparameterization_type="LSTM"
        ),
    ),
    "PrefixTuning": (lp.PrefixTuning(n=20), peft.PrefixTuningConfig(**LM)),
    "PrefixTuning, projection": (
        lp.PrefixTuning(n=20, projection=True, hidden=512),
        peft.PrefixTuningConfig(**LM, prefix_projection=True, encoder_hidden_size=512),
    ),
}
METHODS = {**ON_WEIGHTS, **ON_MODELS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = base(options.hidden, options.layers)
    ids = torch.randint(0, 1000, (1, options.tokens))
    table = []
    for name in options.methods:
        method, config = METHODS[name]
        if name in ON_WEIGHTS:
            method = dataclasses.replace(method, target_modules=TARGETS)
            config.target_modules = set(TARGETS)
        ours = copy.deepcopy(model)
        lp.attach(ours, method)
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
        seconds = interleaved(
            {"peft": step(theirs, ids), "lightning_peft": step(ours, ids)}, options.repeats
        )
        table += rows(seconds, "peft", method=name, hidden=options.hidden, tokens=options.tokens)
    write("method_steps", table)


if __name__ == "__main__":
    main()
