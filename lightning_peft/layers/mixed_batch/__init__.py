"""Mixed batches: every row of a batch runs under its own adapter.

The mix in force belongs to a context (`contextvars`), so each thread and each asyncio task has its
own. Backward is different: activation checkpointing repeats a forward there, possibly in one of
autograd's threads and after the block has ended. A mixed batch therefore binds itself to the
tensors that autograd saves inside its block. A checkpointed function reads its saved inputs before
it is repeated, which puts the mix of the first run in force again, for the nodes of that run only.
"""

from lightning_peft.layers.mixed_batch.batch import BASE, Choices, Hooks, MixedBatch
from lightning_peft.layers.mixed_batch.contexts import (
    batch_facts,
    chosen_adapters,
    mixed_batch,
    without_mixed_batch,
)
from lightning_peft.layers.mixed_batch.in_force import (
    any_mixed_batch,
    current_choices,
    current_facts,
    current_gates,
    current_mixed_batch,
)
from lightning_peft.layers.mixed_batch.saved_tensors import hooks_in_force, saves_for_recomputation

__all__ = [
    "BASE",
    "Choices",
    "Hooks",
    "MixedBatch",
    "any_mixed_batch",
    "batch_facts",
    "chosen_adapters",
    "current_choices",
    "current_facts",
    "current_gates",
    "current_mixed_batch",
    "hooks_in_force",
    "mixed_batch",
    "saves_for_recomputation",
    "without_mixed_batch",
]
