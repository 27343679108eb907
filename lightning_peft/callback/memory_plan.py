"""The memory plan at the start of fit, made before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_peft.methods.base import Method
from lightning_peft.planner.estimate import Plan, estimate_memory
from lightning_peft.planner.meta_model import PRECISIONS
from lightning_peft.storage import Quantization

__all__ = ["make_plan"]


def make_plan(
    trainer: pl.Trainer,
    root: nn.Module,
    adapters: Mapping[str, Sequence[Method]],
    *,
    quantization: Quantization | None,
    optimizer: str | None,
    liger: bool,
    modules_to_save: Sequence[str],
    given: Mapping[str, Any],
) -> Plan | None:
    """Plan for this run; `given` overrides what the trainer says. None, with a warning, where it
    cannot be made: a plan never stops a run.
    """
    strategy = type(trainer.strategy).__name__.lower()
    precision = str(trainer.precision)
    how: dict[str, Any] = {
        "quantization": quantization,
        "optimizer": optimizer,
        "precision": precision if precision in PRECISIONS else "bf16-mixed",
        "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in root.modules()),
        "strategy": next((s for s in ("fsdp", "ddp") if s in strategy), None),
        "world_size": trainer.world_size,
        "liger": liger,
        "modules_to_save": modules_to_save,
        **given,
    }
    methods = [m for several in adapters.values() for m in several]
    try:
        return estimate_memory(root, methods, **how)
    # A plan is advice: a model that it cannot count (fake tensors, no sizes) still trains.
    except (ValueError, TypeError, RuntimeError) as error:
        rank_zero_warn(f"PEFT(plan=True): no plan could be made: {error}")
        return None
