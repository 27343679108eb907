"""Attaching LoRA to every linear layer of a Llama-7B-shaped model on the meta device."""

from __future__ import annotations

import argparse
import gc

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from benchmarks.lib.side_by_side import interleaved, rows, write


def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # its defaults are Llama-2-7B's


class Fresh:
    """Attach to a model made before the clock starts."""

    def __init__(self, attach) -> None:
        self.attach, self.model = attach, model()

    def __call__(self) -> None:
        self.attach(self.model)

    def again(self) -> None:
        del self.model
        gc.collect()
        self.model = model()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    candidates = {
        "peft": Fresh(lambda m: peft.get_peft_model(m, config)),
        "lightning_peft": Fresh(lambda m: lp.attach(m, lp.LoRA(r=16, target_modules="all-linear"))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(options.repeats + 1):
        for name, times in interleaved(candidates, 1, warmup=0).items():
            if turn:
                seconds[name] += times
        for candidate in candidates.values():
            candidate.again()
    write("attach", rows(seconds, "peft", model="Llama-7B shape on meta, all-linear, r=16"))


if __name__ == "__main__":
    main()
