"""The kinds of method: what a method defines, by what it changes.

A method is a frozen dataclass: what the user says, nothing that is computed. Its file holds the
formula and the table of names it has in Hugging Face's format; it never sees a kind of layer,
packed bytes, the trainer or a strategy.
"""

from lightning_peft.methods.base.block import BlockMethod
from lightning_peft.methods.base.method import Method, Targeted
from lightning_peft.methods.base.router import RouterMethod
from lightning_peft.methods.base.select import SelectMethod
from lightning_peft.methods.base.sequence import SequenceMethod
from lightning_peft.methods.base.step import StepContext, overrides_step_hooks
from lightning_peft.methods.base.weight import FromWeight, InitData, WeightMethod
from lightning_peft.methods.exchange import HFEntry, HFFormat

__all__ = [
    "BlockMethod",
    "FromWeight",
    "HFEntry",
    "HFFormat",
    "InitData",
    "Method",
    "RouterMethod",
    "SelectMethod",
    "SequenceMethod",
    "StepContext",
    "Targeted",
    "WeightMethod",
    "overrides_step_hooks",
]
