"""The callback: when each part of the package is called in a Trainer's life."""

from lightning_peft.callback.peft import PEFT

__all__ = ["PEFT"]
