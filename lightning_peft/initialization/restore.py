"""Restores adapters that were initialised from data: their shapes, and the base they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import join, strip_compile
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.weight_adapter import BaseRewrite, WeightAdapter
from lightning_peft.methods.base import InitData

__all__ = ["initialized_shapes", "load_tensors", "restore_initialized", "store_residual"]


def _adapters(model: nn.Module) -> Iterator[tuple[str, WeightAdapter]]:
    """(prefix of the canonical keys, adapter) of every adapter whose method needs data."""
    for name, module in adapted_modules(model):
        for path, child in module.peft.named_modules():
            if isinstance(child, WeightAdapter) and child.method.needs_data:
                yield strip_compile(join(name, "peft", path)) + ".", child


def initialized_shapes(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Key → meta tensor of its shape in `state`, where data chose another rank than the settings.

    Only pairs A [k, in] and B [out, k] of one k are returned.
    """
    found: dict[str, Tensor] = {}
    for prefix, adapter in _adapters(model):
        A, B = state.get(f"{prefix}A"), state.get(f"{prefix}B")
        if adapter.method.needs_data != InitData.INPUTS or not (
            isinstance(A, Tensor) and isinstance(B, Tensor) and A.ndim == B.ndim == 2
        ):
            continue
        want = (adapter.site.in_features, adapter.site.out_features)
        if A.shape[0] == B.shape[1] and (A.shape[1], B.shape[0]) == want:
            for key, t in (("A", A), ("B", B)):
                found[prefix + key] = torch.empty(t.shape, device="meta")
    return found


def restore_initialized(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the adapters in `state` the shapes and the base that they were trained with.

    They no longer wait for data. Call it after `state` was checked and before it is loaded.
    """
    for prefix, adapter in _adapters(model):
        tensors = {k: state[prefix + k] for k in adapter.tensors() if prefix + k in state}
        if tensors:
            load_tensors(adapter, tensors)
            store_residual(adapter)
            adapter.awaits_data = False


def load_tensors(adapter: WeightAdapter, values: Mapping[str, Tensor]) -> None:
    """Copy values in; a value of another shape replaces the parameter."""
    with torch.no_grad():
        for key, old in list(adapter.tensors().items()):
            if key not in values:
                continue
            if old.shape == values[key].shape:
                old.copy_(values[key])
                continue
            fresh = values[key].detach().to(old).clone(memory_format=torch.contiguous_format)
            adapter._parameters[key] = nn.Parameter(fresh, requires_grad=old.requires_grad)
            adapter.forget_size()


def store_residual(adapter: WeightAdapter) -> None:
    """Write the base that belongs to the initialisation; the old bits are kept on the CPU.

    Raises:
        RuntimeError: the layer's adapters are merged.
    """
    site, active = adapter.site, adapter.state.active
    if not adapter.method.needs_data.moves_base or not site.storage.lossless_write:
        return
    if active.merged:
        raise RuntimeError(
            f"{site.label}: expected unmerged adapters, found {active.merged} merged; unmerge first"
        )
    adapter.switch_base(False)  # a residual from before
    original = site.storage.snapshot(site.module, site.parameter)
    with torch.no_grad():
        base = adapter.method.residual(adapter.tensors(), site, site.weight(torch.float32))
        if base is None:
            return
        site.write(base)
    adapter.rewrite = BaseRewrite(original)
    adapter.switch_base(adapter.adapter_name in active.names and not active.disabled)
