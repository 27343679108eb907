"""XLoRA in peft's files."""

from __future__ import annotations

from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.exchange import config_keys

__all__ = ["FORMAT"]


#: The table of peft's `XLoRA`.
FORMAT = HFFormat(
    peft_type="XLORA",
    tensors={},
    config=config_keys(
        depth="xlora_depth",
        hidden="xlora_size",
        dropout="xlora_dropout_p",
        layerwise="layerwise_scalings",
        softmax="enable_softmax",
        temperature="softmax_temperature",
        top_k="top_k_lora",
        softmax_top_k="enable_softmax_topk",
        weight="global_scaling_weight",
    ),
    own_defaults=True,
    fixed={"scaling_pass_value": 0.0},
    inert={"use_trainable_adapters": False},
    ignored=("adapters", "hidden_size"),
    saves_modules=False,
)
