"""litgpt: `litgpt.lora`-free fine-tuning of its `GPT`, under a Trainer and its own `LLM` class."""

from __future__ import annotations

import torch
from checks import Case, examine
from litgpt import GPT, Config
from supervised import Supervised, fit, loader
from torch import Tensor

SIZES = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "block_size": 32,
    "vocab_size": 100,
    "padded_vocab_size": 128,
}
CONFIGS = {
    "GPT (pythia)": Config(**SIZES),
    "GPT (llama)": Config(
        **SIZES,
        n_query_groups=2,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=128,
    ),
}
tokens = torch.randint(100, (16, 16), generator=torch.Generator().manual_seed(0))


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def fresh(name: str) -> Supervised:
    net = GPT(CONFIGS[name])
    net.apply(net._init_weights)
    return Supervised(net, loss)


for name in CONFIGS:
    examine(
        Case(
            package="litgpt",
            model=name,
            entry="`Trainer.fit`",
            build=lambda name=name: fresh(name),
            fit=lambda module, *rest: fit(module, loader(tokens, tokens.roll(-1, 1)), *rest),
            predict=lambda module: module(tokens),
        )
    )
