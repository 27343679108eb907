"""The notes that transformers leaves on a model that it loaded quantised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["QuantizationNotes", "forget_quantization"]

_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_NOTES = ("hf_quantizer", "quantization_method")


@dataclass
class QuantizationNotes:
    """Notes about packed weights in a model's config and on the model, taken off it.

    Attributes:
        taken: (object, attribute, value) of each note.
    """

    taken: list[tuple[Any, str, Any]] = field(default_factory=list)

    @classmethod
    def take(cls, model: nn.Module) -> QuantizationNotes:
        """Take the notes off: `save_pretrained` then writes what `from_pretrained` reads."""
        notes = cls()
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            for holder in (config, getattr(config, "text_config", None)):
                if holder is not None and "quantization_config" in vars(holder):
                    notes.taken.append((holder, "quantization_config", holder.quantization_config))
                    del holder.quantization_config
            conversions = vars(module).get("_weight_conversions")
            if conversions is not None:
                notes.taken.append((module, "_weight_conversions", conversions))
                kept = [c for c in conversions if not _deserializes(c)]
                vars(module)["_weight_conversions"] = kept
        return notes

    def undo(self) -> None:
        """Put the notes back."""
        for holder, name, value in self.taken:
            vars(holder)[name] = value


def _deserializes(conversion: Any) -> bool:
    """Whether a conversion of transformers builds packed weights: its reverse would read them."""
    operations = getattr(conversion, "operations", None) or ()
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)


def forget_quantization(model: nn.Module) -> None:
    """Remove the notes from every module: its weights are dense now.

    A saved config would otherwise have `from_pretrained` look for packed weights.
    """
    QuantizationNotes.take(model)
    for module in model.modules():
        own = vars(module)
        for note in _NOTES:
            own.pop(note, None)
        for flag in _FLAGS:
            if flag in own:
                own[flag] = False
