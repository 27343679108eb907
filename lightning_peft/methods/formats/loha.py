"""LoHa in peft's files."""

from __future__ import annotations

from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.exchange import config_keys

__all__ = ["FORMAT"]


#: The table of peft's `LoHa`.
FORMAT = HFFormat(
    peft_type="LOHA",
    tensors={
        "w1_a": "hada_w1_a",
        "w1_b": "hada_w1_b",
        "w2_a": "hada_w2_a",
        "w2_b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
    },
    config=config_keys(
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "rank_pattern",
        "alpha_pattern",
    ),
    own_defaults=True,
    ignored=("init_weights",),
    kinds=("Linear", "Conv1d", "Conv2d"),
    follows=("dilation",),
)
