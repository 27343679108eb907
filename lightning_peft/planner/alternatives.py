"""Other choices for the same model: those a plan is compared with, and what to switch on next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lightning_peft.activations.config import ActivationKind, Activations
from lightning_peft.methods.lora import LoRA
from lightning_peft.planner.choice import Choice
from lightning_peft.storage import Quantization

__all__ = ["baselines", "next_changes"]

_BOTH: ActivationKind = "checkpoint+offload"


def baselines(choice: Choice) -> dict[str, Choice]:
    """Full fine-tuning, LoRA and QLoRA under the other settings of `choice`."""
    lora = replace(choice, method=(_lora(choice),), quantization=None)
    return {
        "full": replace(choice, method=None, quantization=None, modules_to_save=()),
        "LoRA r=16": lora,
        "QLoRA r=16": replace(lora, quantization=Quantization("nf4")),
    }


def next_changes(choice: Choice) -> Iterator[tuple[str, Choice]]:
    """Yield what is not switched on yet: as it is written in code, and the choice with it."""

    def option(name: str, written: str, value: Any) -> tuple[str, Choice]:
        return f"{name}={written}", replace(choice, **{name: value})

    if choice.method is None:
        yield option("method", "LoRA(r=16)", (_lora(choice),))
    elif choice.quantization is None:
        yield option("quantization", '"nf4"', Quantization("nf4"))
    kept = choice.activations
    if kept is None:
        yield option("activations", '"checkpoint"', Activations("checkpoint"))
    elif not kept.recomputes:
        yield option("activations", f'"{_BOTH}"', Activations(_BOTH))
    elif not kept.offloads:
        yield option("activations", f'"{_BOTH}"', replace(kept, kind=_BOTH))
    if not choice.liger and choice.loss is None:
        yield option("loss", '"chunked"', "chunked")
    if choice.optimizer in ("adamw", "adam"):
        yield option("optimizer", '"adamw_8bit"', "adamw_8bit")
    if choice.world_size > 1 and choice.strategy != "fsdp":
        yield option("strategy", '"fsdp"', "fsdp")


def _lora(choice: Choice) -> LoRA:
    """LoRA on the layers that the choice names, where it names any."""
    named = [t for m in choice.method or () if (t := getattr(m, "target_modules", None))]
    return LoRA(r=16, target_modules=named[0]) if named else LoRA(r=16)
