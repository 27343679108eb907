"""`merge_and_unload`: from an adapted model to the plain model of its library."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_peft.adapters.merge import merge
from lightning_peft.adapters.merge_plan import names_to_merge, plan_merge
from lightning_peft.adapters.new_bias import check_no_new_bias
from lightning_peft.adapters.plain import is_merged_for_good, make_plain
from lightning_peft.core.modules import ParameterPlace, persistent_buffers, tied_parameters
from lightning_peft.core.registry import registries_in
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules

__all__ = ["merge_and_unload"]

M = TypeVar("M", bound=nn.Module)


def merge_and_unload(model: M, dtype: torch.dtype | str | None = None) -> M:
    """Merge the active adapters and return the plain model, in place.

    Classes, keys and config are those of the model's library, and nothing is quantised. The
    model's own `save_pretrained` and `state_dict` then write what `from_pretrained` and
    `load_state_dict` read. Adapters that are not active are dropped. Tied weights stay tied
    unless the adapter changed one of them alone, of which a warning tells.

    Args:
        model: A model with adapters, merged or not; or one that `quantize` quantised.
        dtype: Dtype of the floating tensors of the state dict, for instance ``"bfloat16"``. None
            keeps the dtype that each weight has, or had before it was quantised.

    Raises:
        RuntimeError: a method has no merged form, or the adapter trains a bias that the library's
            layer does not have; the model is as before.
        ValueError: `model` has neither adapters nor a base that this package quantised.
    """
    target = _dtype(dtype)
    registries = list(registries_in(model))
    if not registries:
        raise ValueError(
            f"merge_and_unload: expected a model with adapters, got a {type(model).__name__} "
            "without; attach or load an adapter first"
        )
    if any(True for _ in adapted_modules(model)) and not is_merged_for_good(model):
        _merge(model)
    for _, root, registry in registries:
        make_plain(root, registry)
    if target is not None:
        _cast(model, target)
    return model


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(
        f"merge_and_unload: dtype: expected a floating dtype such as 'bfloat16', got {shown(given)}"
    )


def _merge(model: nn.Module) -> None:
    merged = [m._peft.active.merged for _, m in adapted_modules(model) if m._peft.active.merged]
    active = {n for _, _, registry in registries_in(model) for n in registry.active}
    if merged:
        if active - {n for names in merged for n in names}:
            raise RuntimeError(
                f"merge_and_unload: expected all active adapters merged or none, got "
                f"{sorted(active)} with {merged[0]} merged; call unmerge(model) first"
            )
        return
    if not active:
        return
    check_no_new_bias(plan_merge(model, names_to_merge(model, None)), "merge_and_unload")
    ties = [group for group in tied_parameters(model) if not _in_adapter(group)]
    configs = _tied_configs(model)
    merge(model, keep_base=False)
    apart = [group for group in ties if not _tie_again(group)]
    if not apart:
        for config in configs:
            config.tie_word_embeddings = True
    for group in apart:
        warnings.warn(
            f"merge_and_unload: {', '.join(place.name for place in group)} were tied, and the "
            "adapter made them differ; save_pretrained says so in the config, but a module that "
            "ties them again would read one tensor for all from a state_dict",
            stacklevel=3,
        )


def _in_adapter(group: list[ParameterPlace]) -> bool:
    return any("peft" in place.name.split(".") for place in group)


def _tied_configs(model: nn.Module) -> list[Any]:
    """Configs of Hugging Face models that tie embeddings."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True:
            found[id(config)] = config
    return list(found.values())


def _tie_again(group: list[ParameterPlace]) -> bool:
    """Share one tensor again if a merge gave every place the same values."""
    first, *others = (place.module._parameters[place.key] for place in group)
    assert first is not None
    if any(other is None or not torch.equal(first, other) for other in others):
        return False
    for place in group[1:]:
        place.module._parameters[place.key] = first
    return True


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a state dict holds; frequencies of rotary embeddings and the like stay exact."""
    for tensor in (*model.parameters(), *persistent_buffers(model).values()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(getattr(config, "dtype", None), torch.dtype):
            config.dtype = dtype
