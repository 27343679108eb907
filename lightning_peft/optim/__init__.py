"""Optimizer state: pooled, 8-bit, paged; from the user's optimizer and back."""

from lightning_peft.optim.convert import from_torch, join_shards, moments, shard, to_torch
from lightning_peft.optim.groups import loraplus_groups, repair
from lightning_peft.optim.named import in_live_order, names_of
from lightning_peft.optim.pooled import (
    AdamW8bit,
    Lion8bit,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PooledOptimizer,
)
from lightning_peft.optim.swapping import OPTIMIZERS, swap

__all__ = [
    "OPTIMIZERS",
    "AdamW8bit",
    "Lion8bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PooledOptimizer",
    "from_torch",
    "in_live_order",
    "join_shards",
    "loraplus_groups",
    "moments",
    "names_of",
    "repair",
    "shard",
    "swap",
    "to_torch",
]
