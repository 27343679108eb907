"""The memory plan at the start of fit, made before anything is attached."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.activations.config import Activations
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.core.value_types import argument_types, require_fit
from lightning_peft.methods.base import Method
from lightning_peft.planner.byte_sizes import parse_bytes
from lightning_peft.planner.estimate import Plan, estimate_memory
from lightning_peft.planner.preparation import PRECISIONS
from lightning_peft.storage import StorageConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_plan", "make_plan"]

#: Arguments that the callback itself gives.
_OWN = ("model_or_config", "method")
#: Values for messages, where the default says nothing about the form.
_EXAMPLES: dict[str, object] = {
    "quantization": "nf4",
    "optimizer": "adamw_8bit",
    "sequence_length": 2048,
    "activations": "checkpoint",
    "loss": "chunked",
    "strategy": "fsdp",
    "memory": "24GB",
}


def check_plan(plan: bool | Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for arguments that `estimate_memory` does not take.

    A plan that cannot be made is a warning in the run; a wrong argument is not left for then.
    """
    if not isinstance(plan, Mapping):
        return
    parameters = inspect.signature(estimate_memory).parameters
    known = [name for name in parameters if name not in _OWN]
    types = argument_types(estimate_memory)
    for name, value in plan.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise TypeError(
                f"PEFT plan: expected arguments of estimate_memory, got {name!r}; {remedy}"
            )
        form = f"plan={{{name!r}: {_EXAMPLES.get(name, parameters[name].default)!r}}}"
        require_fit("PEFT plan", name, value, types.get(name), form)
        if name == "memory" and isinstance(value, str):
            parse_bytes(value, "PEFT plan memory")


def make_plan(
    trainer: pl.Trainer,
    root: nn.Module,
    adapters: Mapping[str, Sequence[Method]],
    *,
    quantization: StorageConfig | None,
    optimizer: str | None,
    liger: bool,
    activations: Activations | None,
    loss: str | None,
    modules_to_save: Sequence[str] | None,
    given: Mapping[str, Any],
) -> Plan | None:
    """Return the plan of this run; None, with a warning, if it cannot be made.

    Values in `given` override those of the Trainer. A plan never stops a run.
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
        "liger": liger and loss is None,
        "activations": activations,
        "loss": loss,
        **given,
    }
    methods = [m for several in adapters.values() for m in several]
    if modules_to_save is None:
        modules_to_save = list(new_layers_of(root, methods).trained)
    how.setdefault("modules_to_save", modules_to_save)
    try:
        return estimate_memory(root, methods, **how)
    # A plan is advice: a model that it cannot count (fake tensors, no sizes) still trains.
    except (ValueError, TypeError, RuntimeError) as error:
        if trainer.is_global_zero:
            warnings.warn(f"PEFT(plan=True): no plan could be made: {error}", stacklevel=2)
        return None
