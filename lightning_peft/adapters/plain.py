"""From a merged model to a plain one: no adapters, nothing packed, the libraries' own classes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.adapters.build import unguard_fast_path
from lightning_peft.core.class_swap import PackedForward, base_class
from lightning_peft.core.kernel_backend import release_backend
from lightning_peft.core.names import in_adapter, quoted
from lightning_peft.core.registry import AdapterRegistry, forget
from lightning_peft.layers.adapted import (
    Adapted,
    adapted_modules,
    adapters_of,
    refresh,
    release,
    weight_adapters_of,
)
from lightning_peft.models.dense_twin import restore_dense_classes
from lightning_peft.models.quantized_config import forget_quantization
from lightning_peft.storage import held_tensors, storage_of

__all__ = ["is_merged_for_good", "make_plain", "remove_adapters"]


def is_merged_for_good(root: nn.Module) -> bool:
    """Whether a merge into dense weights was made that cannot be undone."""
    undone = [m for _, m in adapted_modules(root) if m._peft.merge_undo is not None]
    return bool(undone) and all(_is_final(module) for module in undone)


def _is_final(module: Adapted) -> bool:
    undo = module._peft.merge_undo
    assert undo is not None
    packed = any(a.site.storage.is_quantized for a in weight_adapters_of(module))
    return not undo.base_kept and not packed


def remove_adapters(root: nn.Module, names: list[str]) -> None:
    """Remove the adapters; modules without any left get their class back."""
    for _, module in list(adapted_modules(root)):
        for name in names:
            if name in module.peft:
                for adapter in adapters_of(module, name):
                    adapter.remove_hooks()
                del module.peft[name]
        refresh(module)
        if not module.peft:
            release(module)


def make_plain(root: nn.Module, registry: AdapterRegistry) -> None:
    """Remove all adapters of a merged root and dequantise its base.

    The weights stay as they are: an adapter that is not merged is dropped.
    """
    release_backend(root)
    remove_adapters(root, list(registry.adapters))
    for name, module in list(root.named_modules()):
        if not in_adapter(name):
            _dequantize(module)
    restore_dense_classes(root)
    for name, module in list(root.named_modules()):
        if isinstance(module, PackedForward) and not in_adapter(name):
            _replace_foreign(root, name, module)
    for name, parameter in root.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(registry.requires_grad.get(name, True))
    forget_quantization(root)
    forget(root)


def _dequantize(module: nn.Module) -> None:
    weights = list(dict.fromkeys(held.weight for held in held_tensors(module).values()))
    with torch.no_grad():
        for weight in weights:
            storage = storage_of(module, weight)
            storage.to_dense(module, weight, storage.read(module, weight))
    if weights:
        unguard_fast_path(module)


def _replace_foreign(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a layer whose class reads only packed weights by an `nn.Linear`."""
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    if weight.ndim != 2 or not name or not isinstance(module, nn.Linear):
        raise TypeError(
            f"{quoted(name)}: expected a linear layer to hold the dense weight of "
            f"{base_class(module).__name__}, got one of shape {list(weight.shape)}; exclude the "
            "layer, or dequantise the model with the library that loaded it"
        )
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain._parameters["weight"] = weight
    plain._parameters["bias"] = bias
    plain.train(module.training)
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = plain
