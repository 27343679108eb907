"""Optimizers with pooled, 8-bit or paged state, and conversion from and to the user's."""

from lightning_peft.optim.half_precision import check_half_precision
from lightning_peft.optim.method_hooks import MethodHooks
from lightning_peft.optim.optimizers import (
    AdamW8bit,
    Lion8bit,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PooledOptimizer,
)
from lightning_peft.optim.param_groups import loraplus_groups, repair
from lightning_peft.optim.replace import OPTIMIZERS, convert_optimizer
from lightning_peft.optim.state_check import check_optimizer_state, converted_state
from lightning_peft.optim.state_conversion import from_torch, join_shards, moments, shard, to_torch
from lightning_peft.optim.state_names import in_live_order, names_of, stepped_names

#: The former name of `convert_optimizer`.
swap = convert_optimizer

__all__ = [
    "OPTIMIZERS",
    "AdamW8bit",
    "Lion8bit",
    "MethodHooks",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PooledOptimizer",
    "check_half_precision",
    "check_optimizer_state",
    "convert_optimizer",
    "converted_state",
    "from_torch",
    "in_live_order",
    "join_shards",
    "loraplus_groups",
    "moments",
    "names_of",
    "repair",
    "shard",
    "stepped_names",
    "swap",
    "to_torch",
]
