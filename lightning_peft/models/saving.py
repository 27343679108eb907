"""Lets transformers' `save_pretrained` write a plain model while adapters are attached."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.core.modules import base_modules

__all__ = ["is_transformers_model", "restore_saving", "save_plainly"]

#: Attribute that `save_pretrained` reads.
_QUANTIZER = "hf_quantizer"


def is_transformers_model(module: nn.Module) -> bool:
    """Whether the module is a `PreTrainedModel`, by class name: transformers is not imported."""
    return any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def save_plainly(model: nn.Module, around: nn.Module | None = None) -> None:
    """Let every transformers model inside save plain weights, or refuse; once per model.

    Args:
        model: Where to look for transformers models.
        around: If given, only models that contain this module.
    """
    for module in _transformers_models(model):
        if around is not None and not any(part is around for part in module.modules()):
            continue
        from lightning_peft.models.plain_saver import PlainSaver

        found = vars(module).get(_QUANTIZER)
        if not isinstance(found, PlainSaver):
            vars(module)[_QUANTIZER] = PlainSaver(found)


def restore_saving(model: nn.Module) -> None:
    """Undo `save_plainly`."""
    for module in _transformers_models(model):
        from lightning_peft.models.plain_saver import PlainSaver

        found = vars(module).get(_QUANTIZER)
        if isinstance(found, PlainSaver):
            del vars(module)[_QUANTIZER]
            if found.replaced is not None:
                vars(module)[_QUANTIZER] = found.replaced


def _transformers_models(model: nn.Module) -> Iterator[nn.Module]:
    for module in base_modules(model).values():
        if is_transformers_model(module):
            yield module
