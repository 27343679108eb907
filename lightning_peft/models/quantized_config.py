"""What transformers notes on a model that it loaded quantised."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["forget_quantization"]

_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_NOTES = ("hf_quantizer", "quantization_method")


def forget_quantization(model: nn.Module) -> None:
    """Remove the notes from every module: its weights are dense now.

    A saved config would otherwise have `from_pretrained` look for packed weights.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        for holder in (config, getattr(config, "text_config", None)):
            if holder is not None and "quantization_config" in vars(holder):
                del holder.quantization_config
        own = vars(module)
        for note in _NOTES:
            own.pop(note, None)
        for flag in _FLAGS:
            if flag in own:
                own[flag] = False
