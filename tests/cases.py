"""The table of methods that the generic suite runs: one line a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_peft.methods.base import Method
from lightning_peft.methods.lora import LoRA

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: Its id.
        method: The method; targets are set by the suite.
        exact_start: Whether the adapted model equals the base bit for bit at the start.
        skip: Layer, storage or check → why the row does not run there.
    """

    name: str
    method: Method
    exact_start: bool = True
    skip: Mapping[str, str] = field(default_factory=dict)


_REWRITES = {
    "embedding": "its start needs features, not ids",
    "bnb4": "rewriting a bitsandbytes weight requantises it: the start is not equal",
    "bnb8": "rewriting a bitsandbytes weight requantises it: the start is not equal",
    "mha": "two weights a module: covered by linear",
}
_NEEDS_QUANTISED = dict.fromkeys(
    [
        "linear",
        "no_bias",
        "conv1d_gpt2",
        "conv1d",
        "conv2d",
        "conv3d",
        "depthwise",
        "reflect",
        "lstm",
        "odd",
    ],
    "LoftQ needs a quantised base",
)

CASES = [
    Case("lora", LoRA(r=2, alpha=4)),
    Case("rslora", LoRA(r=4, alpha=4, use_rslora=True)),
    Case("lora_gaussian", LoRA(r=2, init="gaussian")),
    Case("lora_orthogonal", LoRA(r=2, init="orthogonal"), exact_start=False),
    Case(
        "lora_bias",
        LoRA(r=2, lora_bias=True),
        skip={"embedding": "refused: an embedding adds no bias"},
    ),
    Case("lora_trains_biases", LoRA(r=2, bias="lora_only")),
    Case("pissa", LoRA(r=2, init="pissa"), exact_start=False, skip=_REWRITES),
    Case("olora", LoRA(r=2, init="olora"), exact_start=False, skip=_REWRITES),
    Case(
        "loftq",
        LoRA(r=2, init="loftq", loftq_iter=2),
        exact_start=False,
        skip={**_REWRITES, **_NEEDS_QUANTISED},
    ),
]
