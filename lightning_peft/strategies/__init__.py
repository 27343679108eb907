"""Strategies for adapters: `strategy="peft_ddp"` and `strategy="peft_fsdp"`.

The classes for each package are in `lightning`, `pytorch_lightning`, `fabric` and
`lightning_fabric`. Only the modules of loaded packages are imported.
"""

from lightning_peft.strategies.registration import register_strategies

__all__ = ["register_strategies"]
