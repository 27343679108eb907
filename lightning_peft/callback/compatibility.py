"""What cannot work beside the callback: said in `setup`, before anything is changed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    TransformerEnginePrecision,
    XLAPrecision,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

__all__ = ["refuse_trainer", "refuse_unfit"]

_PRECISIONS: dict[type[Any], str] = {
    BitsandbytesPrecision: (
        "it quantises the same layers; leave the plugin out and give "
        "PEFT(quantization=Quantization('nf4'))"
    ),
    TransformerEnginePrecision: (
        "it replaces the layers that adapters sit in; use precision='bf16-true'"
    ),
    DeepSpeedPrecision: "it is untested with adapters; use strategy='peft_ddp' or 'peft_fsdp'",
    XLAPrecision: "it is untested with adapters; use a CPU or CUDA accelerator",
}
_STRATEGIES: dict[type[Any], str] = {
    DeepSpeedStrategy: "it is untested with adapters; use strategy='peft_ddp' or 'peft_fsdp'",
    FSDPStrategy: (
        "it needs one dtype and one requires_grad a unit, and writes the base; use "
        "strategy='peft_fsdp'"
    ),
    ModelParallelStrategy: "it shards before adapters are there; use strategy='peft_fsdp'",
}


def refuse_trainer(trainer: Any) -> None:
    """`pytorch_lightning` and `lightning` hold different classes; a mix runs, and does nothing.

    Raises:
        TypeError: the trainer is of another package.
    """
    if isinstance(trainer, pl.Trainer):
        return
    old = any(c.__module__.startswith("pytorch_lightning") for c in type(trainer).__mro__)
    advice = (
        "pytorch_lightning is another package with classes of its own: import lightning as L, and "
        "take L.Trainer, L.LightningModule and L.Callback from there"
        if old
        else "give the callback to a lightning.pytorch.Trainer"
    )
    raise TypeError(
        "PEFT: expected a lightning.pytorch.Trainer, got "
        f"{type(trainer).__module__}.{type(trainer).__name__}; {advice}"
    )


def refuse_unfit(trainer: pl.Trainer, peft: Any, peers: list[Any]) -> None:
    """Raise where another part of the trainer works against adapters.

    Args:
        trainer: The trainer.
        peft: The callback that asks.
        peers: Every PEFT callback of the trainer, `peft` included.

    Raises:
        ValueError: with the part, the reason and what to do.
    """
    _refuse_names(peft, peers)
    _refuse_launcher(trainer.strategy)
    for cls, why in _PRECISIONS.items():
        if isinstance(trainer.precision_plugin, cls):
            raise ValueError(f"PEFT: expected another precision plugin than {cls.__name__}: {why}")
    for cls, why in _STRATEGIES.items():
        if isinstance(trainer.strategy, cls) and not getattr(trainer.strategy, "knows_peft", False):
            raise ValueError(
                f"PEFT: expected another strategy than {type(trainer.strategy).__name__}: {why}"
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"PEFT: expected no {type(callback).__name__} beside it: it unfreezes layers of "
                "the base, which adapters keep as it is; leave it out, or name the layers in "
                "PEFT(modules_to_save=[…])"
            )


def _refuse_names(peft: Any, peers: list[Any]) -> None:
    for other in peers:
        twice = sorted(set(peft.names) & set(other.names)) if other is not peft else []
        if twice:
            raise ValueError(
                f"PEFT: expected one callback an adapter name, got two with {twice}; give one of "
                "them another adapter_name"
            )
        a, b = peft.root or "", other.root or ""
        if a != b and (not a or not b or a.startswith(f"{b}.") or b.startswith(f"{a}.")):
            raise ValueError(
                "PEFT: expected callbacks with the same root or with separate ones, got "
                f"{a or None!r} and {b or None!r}; name the smaller one in both, or use "
                "target_modules"
            )


def _refuse_launcher(strategy: Strategy) -> None:
    launcher = type(strategy.launcher)
    if any(c.__name__ == "_MultiProcessingLauncher" for c in launcher.__mro__):
        raise ValueError(
            "PEFT: expected processes that are started as scripts, got a strategy that spawns or "
            f"forks them ({launcher.__name__}): the adapters stay in the workers and are lost when "
            "they end; use strategy='ddp'"
        )
