"""A training step with new tokens' rows, against Hugging Face peft: time, memory, optimizer state.

Each candidate runs twice, as two models: the ratio of peft to peft shows the noise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from benchmarks.lib.side_by_side import interleaved, rows, traced_peak, write

TARGETS = ["q_proj", "v_proj"]


def base(vocabulary: int, hidden: int, layers: int, *, tied: bool) -> LlamaForCausalLM:
    """A Llama whose table is most of it, as in small models with large vocabularies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).train()


class Step:
    """Forward, backward and AdamW."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def __call__(self) -> None:
        self.model(input_ids=self.inputs, labels=self.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of the optimizer's moments of the rows and of every other trained tensor."""
        states = self.optimizer.state.values()
        return sum(t.nbytes for s in states for t in s.values() if t.numel() > 1)


def candidates(model: nn.Module, ids: list[int], beside: bool) -> dict[str, Callable[[], Any]]:
    """Builders by name; with LoRA, its own step without rows is there to compare."""

    def ours(method: Any) -> nn.Module:
        built = copy.deepcopy(model)
        lp.attach(built, method)
        return built

    def theirs(config: Any) -> nn.Module:
        return peft.get_peft_model(copy.deepcopy(model), config)

    if not beside:
        return {
            "peft": lambda: theirs(
                peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens"])
            ),
            "lightning_peft": lambda: ours(lp.TrainableTokens(ids)),
        }
    lora = {"r": 8, "target_modules": TARGETS}
    with_rows = {**lora, "trainable_token_indices": ids}
    return {
        "peft": lambda: theirs(peft.LoraConfig(**with_rows)),
        "peft without rows": lambda: theirs(peft.LoraConfig(**lora)),
        "lightning_peft": lambda: ours(lp.LoRA(**with_rows)),
        "lightning_peft without rows": lambda: ours(lp.LoRA(**lora)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--machine", default="", help="what else ran on it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = torch.randint(0, options.vocabulary, (1, options.tokens))
    ids = inputs[0, : options.new].unique().tolist()
    table = []
    for tied in (True, False):
        model = base(options.vocabulary, options.hidden, options.layers, tied=tied)
        for beside in (False, True):
            built = candidates(model, ids, beside)
            steps = {name: Step(make(), inputs) for name, make in built.items()}
            steps["peft again"] = Step(built["peft"](), inputs)
            steps["lightning_peft again"] = Step(built["lightning_peft"](), inputs)
            seconds = interleaved(steps, options.repeats)
            found = rows(
                seconds,
                "peft",
                trained="LoRA and rows" if beside else "rows",
                tied=tied,
                rows=len(ids),
                vocabulary=options.vocabulary,
                hidden=options.hidden,
                tokens=options.tokens,
                machine=options.machine,
            )
            for row in found:
                step = steps[row["candidate"]]
                row["trained_bytes"] = sum(p.nbytes for p in step.trained)
                row["state_bytes"] = step.state_bytes()
                row["peak_mb"] = round(traced_peak(step.model, step, 2) / 1e6, 2)
            table += found
    write("token_rows", table)


if __name__ == "__main__":
    main()
