"""Starts from data that stand in a file: their shapes, and the base that belongs to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.adapter import Adapter, BaseRewrite

__all__ = ["initialized_shapes", "load_tensors", "needs_data", "restore_starts", "store_residual"]


def needs_data(adapter: Adapter) -> str:
    """`WeightMethod.needs_data`; ``""`` for the other kinds of method."""
    method: Any = adapter.method
    return str(method.needs_data) if adapter.kind == "weight" else ""


def _adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(prefix of the canonical keys, adapter) of every adapter that starts from data."""
    for name, module in adapted_modules(model):
        for path, child in module.peft.named_modules():
            if isinstance(child, Adapter) and needs_data(child):
                prefix = f"{name}.peft.{path}." if name else f"peft.{path}."
                yield prefix.replace("_orig_mod.", ""), child


def initialized_shapes(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Key → meta tensor of the shape in `state`, where data chose another rank than the settings.

    Only what can be: A [k, in] and B [out, k] of one k.
    """
    found: dict[str, Tensor] = {}
    for prefix, adapter in _adapters(model):
        A, B = state.get(f"{prefix}A"), state.get(f"{prefix}B")
        if adapter.method.needs_data != "inputs" or not (
            isinstance(A, Tensor) and isinstance(B, Tensor) and A.ndim == B.ndim == 2
        ):
            continue
        want = (adapter.site.in_features, adapter.site.out_features)
        if A.shape[0] == B.shape[1] and (A.shape[1], B.shape[0]) == want:
            for key, t in (("A", A), ("B", B)):
                found[prefix + key] = torch.empty(t.shape, device="meta")
    return found


def restore_starts(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the adapters that `state` holds the shapes and the base that they were trained with.

    They start from data no more. Call it when the state was checked, before it is loaded.
    """
    for prefix, adapter in _adapters(model):
        tensors = {k: state[prefix + k] for k in adapter.tensors() if prefix + k in state}
        if tensors:
            load_tensors(adapter, tensors)
            store_residual(adapter)
            adapter.waiting = False


def load_tensors(adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Copy values in; a tensor of another shape takes the place of the one that is there."""
    with torch.no_grad():
        for key, old in list(adapter.tensors().items()):
            if key not in values:
                continue
            if old.shape == values[key].shape:
                old.copy_(values[key])
                continue
            fresh = values[key].detach().to(old).clone(memory_format=torch.contiguous_format)
            adapter._parameters[key] = nn.Parameter(fresh, requires_grad=old.requires_grad)


def store_residual(adapter: Adapter) -> None:
    """Write the base that belongs to the start; its own bits are kept on the CPU.

    Raises:
        RuntimeError: the layer's adapters are merged.
    """
    site = adapter.site
    state: Any = site.module._peft
    if adapter.method.needs_data != "gradients" or site.storage.label != "dense":
        return
    if state.merged:
        raise RuntimeError(
            f"{site.label}: expected unmerged adapters, found {state.merged} merged; unmerge first"
        )
    acts = adapter.adapter_name in state.names and not state.disabled
    before = adapter.rewrite
    if before is not None and before.active:
        site.storage.restore(site.module, site.parameter, before.original)
    original = site.storage.snapshot(site.module, site.parameter)
    with torch.no_grad():
        base = adapter.method.residual(adapter.tensors(), site, site.weight(torch.float32))
        site.write(base)
    adapter.rewrite = BaseRewrite(original)
    if not acts:
        adapter.rewrite.written = site.storage.snapshot(site.module, site.parameter)
        site.storage.restore(site.module, site.parameter, original)
        adapter.rewrite.active = False
