"""Layers of the library's own dense classes, in the place of those that held packed weights.

transformers gives a quantised model classes of their own (`FP8Linear`, `Mxfp4GptOssExperts`). The
model that its config builds without a quantization_config has the dense ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.names import in_adapter
from lightning_peft.models.saving import is_transformers_model

__all__ = ["restore_dense_classes"]

_FOREIGN = ("transformers.integrations.", "compressed_tensors.")


def restore_dense_classes(root: nn.Module) -> None:
    """Put dense layers in the place of those of transformers' quantised classes.

    Parameters, buffers and children stay; a bias gets the dtype of the weights.

    Raises:
        TypeError: a layer of a quantised class outside of a transformers model, or one whose
            tensors are not those of the dense class.
    """
    for name, module in list(root.named_modules()):
        if is_transformers_model(module) and not in_adapter(name) and _has_foreign(module):
            _restore(module)


def _is_foreign(module: nn.Module) -> bool:
    return base_class(module).__module__.startswith(_FOREIGN)


def _has_foreign(model: nn.Module) -> bool:
    return any(_is_foreign(m) for m in model.modules())


def _restore(model: nn.Module) -> None:
    twin = _twin(model)
    twins = dict(twin.named_modules())
    names = [n for n, m in model.named_modules() if _is_foreign(m) and not in_adapter(n)]
    for name in reversed(names):  # children before the layer around them
        live, dense = model.get_submodule(name), twins[name]
        if _is_foreign(dense):
            continue  # it is quantised in every form, such as an FP8Embedding
        _move(name, live, dense)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = dense


def _twin(model: Any) -> nn.Module:
    config = copy.deepcopy(model.config)
    for holder in (config, getattr(config, "text_config", None)):
        if holder is not None:
            vars(holder).pop("quantization_config", None)
    with torch.device("meta"):
        twin: nn.Module = base_class(model)(config)
    return twin


def _move(name: str, live: nn.Module, dense: nn.Module) -> None:
    held, wanted = live._parameters, dense._parameters
    absent = [k for k, p in wanted.items() if p is not None and held.get(k) is None]
    if absent:
        raise TypeError(
            f"{name!r}: expected the parameters {absent} of {type(dense).__name__}, found "
            f"{sorted(held)}; dequantise the model with the library that loaded it"
        )
    dtypes = [p.dtype for p in held.values() if p is not None and p.ndim > 1]
    for key, p in wanted.items():
        value = held[key]
        if p is None or value is None:
            continue
        if value.dtype != dtypes[0] and key.endswith("bias"):
            value.data = value.data.to(dtypes[0])
        dense._parameters[key] = value
    for key in list(dense._buffers):
        if key in live._buffers:
            dense._buffers[key] = live._buffers[key]
    for key in list(dense._modules):
        dense._modules[key] = live._modules[key]
    dense.train(live.training)
