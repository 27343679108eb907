"""Inputs for a run without data, from the config of a model or its example."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_peft.models.modules import hf_models

__all__ = ["NoInputs", "example_inputs", "runnable", "usual_length"]


_LENGTH = 512


class NoInputs(ValueError):
    """The module cannot be run without data: nothing says what its inputs are, or it looks at
    values.
    """


def runnable(model: nn.Module) -> tuple[Any, str]:
    """Return the module to run, and where its inputs come from: ``"hf"`` or ``"example"``.

    Raises:
        NoInputs: no Hugging Face model inside and no `example_input_array`.
    """
    for _, net in hf_models(model):
        return net, "hf"
    if getattr(model, "example_input_array", None) is not None:
        return model, "example"
    raise NoInputs(
        f"{type(model).__name__}: expected a Hugging Face model inside or an example_input_array, "
        "found neither; set example_input_array to have activations counted"
    )


def usual_length(model: nn.Module) -> int:
    """Return 512, or how many positions the Hugging Face models inside have."""
    configs = [net.config.get_text_config() for _, net in hf_models(model)]
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([_LENGTH, *(n for n in positions if isinstance(n, int) and n > 0)])


def example_inputs(net: Any, kind: str, batch_size: int, sequence_length: int) -> Any:
    """Return arguments for the forward: a tuple, or a dict by name."""
    if kind == "example":

        def resized(t: object) -> object:
            if not isinstance(t, Tensor):
                return t
            return torch.zeros(batch_size, *t.shape[1:], dtype=t.dtype)

        example = tree_map(resized, net.example_input_array)
        return example if isinstance(example, tuple | dict) else (example,)
    config = net.config.get_text_config() if hasattr(net.config, "get_text_config") else net.config
    accepted = inspect.signature(type(net).forward).parameters
    name = getattr(net, "main_input_name", "input_ids")
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    inputs: dict[str, Any] = {}
    if name == "pixel_values":
        size = net.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs[name] = torch.zeros(batch_size, net.config.num_channels, height, width)
    elif name == "input_ids":
        inputs[name] = ids
    else:
        raise NoInputs(f"{type(net).__name__}: inputs {name!r} are not known to the planner")
    if "labels" in accepted:
        short = "SequenceClassification" in type(net).__name__ or name == "pixel_values"
        inputs["labels"] = torch.zeros(batch_size, dtype=torch.long) if short else ids
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in accepted or hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs
