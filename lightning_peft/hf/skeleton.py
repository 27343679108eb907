"""A model of transformers' built from its directory without memory for its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

__all__ = ["skeleton", "weightless"]


def skeleton(directory: Path) -> nn.Module:
    """The model that a directory of transformers' describes, on the meta device.

    Raises:
        ValueError: no config.json that names a class of transformers.
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            f"{directory}: expected transformers to build its model, found none; pip install "
            "'lightning-peft[hf]'"
        )
    import transformers

    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory}: expected a directory with config.json, found none; give the base as a "
            "module"
        )
    config = transformers.AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0], None)
    if cls is None:
        raise ValueError(
            f"{directory}: expected an architecture of transformers, got {config.architectures}; "
            "give the base as a module"
        )
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config) if cls is transformers.AutoModel else cls(config)
    return model


def weightless(model: nn.Module, *, writable: bool = False) -> nn.Module:
    """Turn meta parameters into zeros on the CPU that take no memory, in place.

    Adapters that are attached then have memory of their own. Tied parameters stay tied.

    Args:
        model: A model on the meta device.
        writable: If True, a weight takes memory once it is written. Else all elements are one.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, meta in module._parameters.items():
            if meta is None:
                continue
            if id(meta) not in made:
                zeros = torch.zeros(meta.shape if writable else ()).expand(meta.shape)
                made[id(meta)] = nn.Parameter(zeros)
            module._parameters[key] = made[id(meta)]
    return model
