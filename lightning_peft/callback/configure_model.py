"""Wraps `configure_model` of one LightningModule, so that adapters are attached after it.

No callback hook runs between `configure_model` and the loading of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_peft.checkpoint.contents import is_attached
from lightning_peft.layers.adapted import adapted_modules

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["unwrap_configure_model", "wrap_configure_model"]

Attach = Callable[[bool], None]  # takes: whether the user's hook threw adapted layers away


def wrap_configure_model(module: pl.LightningModule, owner: object, attach: Attach) -> None:
    """Call `attach` once, after the Trainer has called the user's `configure_model`.

    Several owners share one closure and attach in order. The closure is an instance attribute. It
    does not use `functools.wraps`: Lightning follows `__wrapped__` and would treat the hook as not
    overridden.
    """
    current = vars(module).get("configure_model")
    pending: dict[int, Attach] | None = getattr(current, "peft_pending", None)
    if pending is not None:
        pending[id(owner)] = attach
        return
    user = module.configure_model
    waiting: dict[int, Attach] = {id(owner): attach}

    def configure_model() -> None:
        before = _count(module)
        user()
        # WeightAveraging.setup calls this too, before LightningModule.setup has built the net.
        if module._current_fx_name != "configure_model":
            return
        _remove(module, current)
        lost = is_attached(module) and _count(module) < before
        for attach in waiting.values():
            attach(lost)

    configure_model.peft_pending = waiting  # type: ignore[attr-defined]
    configure_model.peft_before = current  # type: ignore[attr-defined]
    object.__setattr__(module, "configure_model", configure_model)


def unwrap_configure_model(module: pl.LightningModule) -> None:
    """Remove the closure if an exception came before it ran."""
    closure: Any = vars(module).get("configure_model")
    if hasattr(closure, "peft_pending"):
        _remove(module, closure.peft_before)


def _remove(module: pl.LightningModule, before: object) -> None:
    vars(module).pop("configure_model", None)
    if before is not None:  # the user's own instance attribute
        object.__setattr__(module, "configure_model", before)


def _count(module: pl.LightningModule) -> int:
    return sum(1 for _ in adapted_modules(module))
