"""Resets adapters to their initial values."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter, initial_shared

__all__ = ["reset_adapters"]


def reset_adapters(model: nn.Module, seed: int | None = None) -> None:
    """Reset every adapter to the values that `attach` draws under this seed.

    Raises:
        RuntimeError: an adapter rewrote the base or was initialised from data; detach and attach
            again.
    """
    sharing: dict[int, list[WeightAdapter]] = {}
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            if not adapter.can_reset:
                raise RuntimeError(
                    f"{adapter.site.label}: expected an adapter whose start leaves the base alone "
                    f"and needs no data, got {adapter.method.label}; detach and attach again"
                )
            fresh = adapter.initial_tensors(seed)
            with torch.no_grad():
                for key, tensor in adapter.state_dict(keep_vars=True).items():
                    if key in fresh:
                        tensor.copy_(fresh[key])
            if not isinstance(adapter, WeightAdapter):
                continue
            if adapter.method.starts_from_weight and not adapter.tied_trained:
                adapter.initialize_from_weight(None)
            if adapter.shared_trained:
                sharing.setdefault(id(adapter.shared_trained), []).append(adapter)
    for adapters in sharing.values():
        first = adapters[0]
        sites = [a.site for a in adapters]
        _, trained = initial_shared(first.method, sites, first.adapter_name, seed)
        with torch.no_grad():
            for key, tensor in first.shared_trained.items():
                tensor.copy_(trained[key])
