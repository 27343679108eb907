"""Wraps `configure_model` of one LightningModule, so that adapters are attached after it.

No callback hook runs between `configure_model` and the loading of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_peft.checkpoint.description import is_attached
from lightning_peft.layers.adapted import adapted_modules

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["unwrap_configure_model", "wrap_configure_model"]

#: Takes whether the user's hook replaced adapted layers.
Attach = Callable[[bool], None]


class ConfigureModelWrap:
    """Runs the user's `configure_model`, then attaches adapters once.

    Its bound method `run` is an instance attribute of the module. Lightning compares code objects
    to see whether the hook is overridden and follows `__wrapped__`, so `functools.wraps` would
    hide it.

    Attributes:
        pending: How to attach, by the id of the callback that asked.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.former = vars(module).get("configure_model")  # the user's own instance attribute
        self.user = module.configure_model
        self.pending: dict[int, Attach] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> ConfigureModelWrap:
        return self  # averaging callbacks copy the module while the wrap is in place

    def run(self) -> None:
        """Called when the Trainer or an averaging callback calls `configure_model`."""
        module, before = self.module, _count(self.module)
        self.user()
        # WeightAveraging.setup calls this too, before LightningModule.setup has built the net.
        if module._current_fx_name != "configure_model":
            return
        self.remove()
        lost = is_attached(module) and _count(module) < before
        for attach in self.pending.values():
            attach(lost)

    def remove(self) -> None:
        """Restore the hook that was there before."""
        vars(self.module).pop("configure_model", None)
        if self.former is not None:
            object.__setattr__(self.module, "configure_model", self.former)


def wrap_configure_model(module: pl.LightningModule, owner: object, attach: Attach) -> None:
    """Call `attach` once, after the Trainer has called the user's `configure_model`.

    Several owners share one wrap and attach in order.
    """
    wrap = _wrap_of(module)
    if wrap is None:
        wrap = ConfigureModelWrap(module)
        object.__setattr__(module, "configure_model", wrap.run)
    wrap.pending[id(owner)] = attach


def unwrap_configure_model(module: pl.LightningModule) -> None:
    """Remove the wrap if an exception came before it ran."""
    wrap = _wrap_of(module)
    if wrap is not None:
        wrap.remove()


def _wrap_of(module: pl.LightningModule) -> ConfigureModelWrap | None:
    owner = getattr(vars(module).get("configure_model"), "__self__", None)
    return owner if isinstance(owner, ConfigureModelWrap) else None


def _count(module: pl.LightningModule) -> int:
    return sum(1 for _ in adapted_modules(module))
