"""Every row of the methods, and the kinds of whole models and storages that they run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.methods import GatedLoRA, mam, unipelt
from lightning_peft.methods.base import BlockMethod, SelectMethod, WeightMethod
from tests.helpers.method_cases import CASES
from tests.helpers.tiny_models import BUILDERS, example_inputs

__all__ = [
    "MODELS",
    "NEEDS",
    "NF4",
    "ROWS",
    "STORAGES",
    "Row",
    "build",
    "diagonal",
    "output",
    "parts_of",
    "placed",
]


class Plain(nn.Module):
    """A transformer of the user's own; in training mode, since the fused path that torch takes in
    eval rounds otherwise than the layers that it stands for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


@dataclass(frozen=True)
class Model:
    """One kind of model; `linears` are ordinary linear layers of it."""

    build: str
    linears: tuple[str, ...]
    attention: tuple[str, ...] = ()


MODELS = {
    "decoder": Model("llama", ("q_proj", "v_proj", "down_proj")),
    "encoder": Model("bert", ("query", "value", "intermediate.dense")),
    "encoder-decoder": Model("t5", ("q", "v", "wo")),
    "plain": Model("", ("linear1", "linear2"), ("self_attn",)),
}
NF4 = lp.Quantization("nf4", block_size=32)
STORAGES: dict[str, lp.Quantization | None] = {"dense": None, "nf4": NF4}


@dataclass(frozen=True)
class Row:
    """One row of the methods.

    Attributes:
        method: What is attached.
        skip: Kind of model or storage → the reason, which the error at attach says too.
        exact: Whether the model starts as the base, bit for bit.
        no_gradient: Tensors whose gradient may vanish, or that are unused in eval mode.
    """

    method: Any
    skip: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    no_gradient: frozenset[str] = frozenset()


_DENSE_COPY = {"nf4": "expected a dense weight"}
_OWN = {"plain": "target_modules"}
ROWS: dict[str, Row] = {
    **{c.name: Row(c.method, {}, c.exact_start, c.no_gradient) for c in CASES},
    "houlsby": Row(lp.BottleneckAdapter("houlsby", reduction_factor=2, non_linearity="gelu")),
    "pfeiffer": Row(lp.BottleneckAdapter("pfeiffer", reduction_factor=2, non_linearity="gelu")),
    "parallel": Row(lp.BottleneckAdapter("parallel", non_linearity="gelu")),
    "bottleneck_gated": Row(
        lp.BottleneckAdapter(
            "houlsby", non_linearity="gelu", gating=True, ln_before=True, scaling="channel"
        )
    ),
    "prompt": Row(lp.PromptTuning(n=3), exact=False),
    "prompt_add": Row(lp.PromptTuning(n=3, mode="add"), _OWN),
    "hard_prompt": Row(lp.HardPrompt(n=3), exact=False),
    "ptuning_mlp": Row(lp.PTuning(n=3, hidden=8), exact=False),
    "ptuning_lstm": Row(lp.PTuning(n=3, encoder="lstm", hidden=8), exact=False),
    "prefix": Row(lp.PrefixTuning(n=3), exact=False),
    "adaption_prompt": Row(
        lp.AdaptionPrompt(n=3),
        dict.fromkeys(("encoder", "encoder-decoder", "plain"), "expected"),
    ),
    "cartridge": Row(lp.Cartridge(n=3, frozen=1), exact=False),
    "cpt": Row(lp.CPT(init_ids=[5, 9, 17], types=[1, 2, 3]), exact=False),
    "prefix_projection": Row(lp.PrefixTuning(n=3, projection=True, hidden=8), exact=False),
    "prefix_gated": Row(lp.PrefixTuning(n=3, gating=True), exact=False),
    "bitfit": Row(lp.BitFit(), {"decoder": "at least one", "encoder-decoder": "at least one"}),
    "norm_tuning": Row(lp.NormTuning()),
    "last_layers": Row(lp.LastLayers(1), _DENSE_COPY),
    "full": Row(lp.Full(), _DENSE_COPY),
    "diff_pruning_gates": Row(lp.DiffPruning(sample=False, alpha_init=0.5, density=0.5)),
    "gated_lora": Row(GatedLoRA(r=2)),
    "lily": Row(lp.Lily(r=2, stride=2)),
    "lily_per_sample": Row(lp.Lily(r=2, per_sample=True)),
    "hybrid": Row([lp.LoRA(r=2), lp.BottleneckAdapter("houlsby", non_linearity="gelu")]),
    "mam": Row(mam(n=3, hidden=8), exact=False),
    "unipelt": Row(unipelt(n=3, hidden=8, r=2, reduction_factor=2), exact=False),
    "loftq": Row(lp.LoRA(r=2, init="loftq"), exact=False),
}
# Why a row cannot run on a storage although attach takes it.
NEEDS = {
    ("loftq", "dense"): "LoftQ starts from what quantising loses, and a dense base loses nothing"
}

_KINDS = list(MODELS)


def diagonal(row: str, model: str, storage: str) -> bool:
    """Whether this is the row's one cell in the fast tests."""
    i = list(ROWS).index(row)
    return _KINDS.index(model) == i % 4 and (storage == "nf4") == (i // 4 % 2 == 1)


def build(model: Model) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    if not model.build:
        return Plain().train().requires_grad_(False), {"input_ids": torch.randint(3, 99, (2, 7))}
    return BUILDERS[model.build]().requires_grad_(False), example_inputs(model.build)


def placed(method: Any, kind: str) -> Any:
    """The method on this kind of model: weight methods on its linear layers, others where they go
    by themselves; in a plain module where they are told to.
    """
    if isinstance(method, list):
        return [placed(m, kind) for m in method]
    model = MODELS[kind]
    if isinstance(method, WeightMethod):
        targets = list(model.linears)
    elif kind != "plain" or isinstance(method, SelectMethod):
        return method
    elif isinstance(method, BlockMethod):
        targets = ["linear2"]
    else:
        targets = list(model.attention) if method.insertion == "attention" else ["embed"]
    return dataclasses.replace(method, target_modules=targets)


def output(model: nn.Module, x: Mapping[str, Tensor]) -> Tensor:
    y = model(**x)
    logits: Tensor = y if isinstance(y, Tensor) else y.logits
    return logits


def parts_of(row: Row) -> list[Any]:
    return row.method if isinstance(row.method, list) else [row.method]
