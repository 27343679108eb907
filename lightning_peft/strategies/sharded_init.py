"""Adapters that were attached to a base without memory: their start values, while it is read.

Most starts are drawn before the base is there. Those that need a weight (PiSSA, OLoRA, LoftQ, the
norms of DoRA) are made on rank 0 from the whole of that one weight, right when its rows were read,
and sent to the others; the residual takes the weight's place. Copies come last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.modules import parameter_at
from lightning_peft.core.protocols import Storage
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import BaseRewrite, WeightAdapter, initial_shared
from lightning_peft.storage.dtensor import fill_rows, is_sharded, local
from lightning_peft.storage.streaming import After

__all__ = ["of_rank_0", "start_after_base", "start_before_base", "starts_from_weights"]


def of_rank_0(t: Tensor, device: torch.device) -> Tensor:
    """Rank 0's values everywhere, in place: an unseeded process draws its own."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        moved = t.to(device)
        dist.broadcast(moved, 0)
        t.copy_(moved)
    return t


def start_before_base(module: nn.Module, device: torch.device) -> None:
    """Start values that need no weight; tensors that sites share.

    Raises:
        RuntimeError: prompts over a sharded model, which start from the embeddings.
    """
    sharded = any(is_sharded(p) for p in module.parameters())
    shared: dict[tuple[str, int], list[WeightAdapter]] = {}
    for name, adapted in adapted_modules(module):
        for adapter in adapters_of(adapted):
            if isinstance(adapter, PromptAdapter):
                if sharded:
                    raise RuntimeError(
                        f"{name!r}: expected an adapter that can start before the base is read, "
                        f"got {adapter.method.label}, which reads the embeddings; build the model "
                        "outside of torch.device('meta')"
                    )
                continue
            if isinstance(adapter, WeightAdapter):
                own = adapter.adapter_name, id(adapter.method)
                shared.setdefault(own, []).append(adapter)
            if not isinstance(adapter, CopyAdapter):
                _fill_fresh(adapter, device)
    for adapters in shared.values():
        _start_shared(adapters, device)


def _fill_fresh(adapter: Adapter, device: torch.device) -> None:
    """Fill an adapter with its initial values, rank 0's on every rank."""
    fresh = adapter.initial_tensors(None)
    for key, t in adapter.state_dict(keep_vars=True).items():
        if key in fresh:
            fill_rows(t, of_rank_0(fresh[key].detach().clone(), device))


def _start_shared(adapters: Sequence[WeightAdapter], device: torch.device) -> None:
    """Fill the tensors that the sites of one method share, and buffers that depend on all sites."""
    first, sites = adapters[0], [a.site for a in adapters]
    frozen, trained = initial_shared(first.method, sites, first.adapter_name, None)
    for live, initial in ((first.shared_buffers, frozen), (first.shared_trained, trained)):
        for name, t in live.items():
            fill_rows(t, of_rank_0(initial[name].detach().clone(), device))
    for adapter, buffers in zip(adapters, first.method.site_buffers(sites), strict=True):
        for name, buffer in buffers.items():
            fill_rows(adapter.get_buffer(name), of_rank_0(buffer.clone(), device))


def starts_from_weights(module: nn.Module, device: torch.device) -> After | None:
    """Return the hook that `stream_base` calls after each weight; None if none starts from it."""
    waiting: dict[tuple[int, str], list[WeightAdapter]] = {}
    for _, adapted in adapted_modules(module):
        for adapter in weight_adapters_of(adapted):
            if adapter.method.starts_from_weight:
                owner, _, leaf = adapter.site.parameter.rpartition(".")
                key = id(adapter.site.module.get_submodule(owner)), leaf
                waiting.setdefault(key, []).append(adapter)
    if not waiting:
        return None

    def after(owner: nn.Module, name: str, read: Callable[[], Tensor]) -> Tensor | None:
        base = None
        for adapter in waiting.get((id(owner), name), ()):
            base = _start(adapter, read, device)
        return base

    return after


def _start(
    adapter: WeightAdapter, read: Callable[[], Tensor], device: torch.device
) -> Tensor | None:
    """Values from the whole weight on rank 0, sent to all; returns the natural weight to store."""
    site = adapter.site
    values = {k: torch.empty(t.shape, dtype=t.dtype) for k, t in adapter.tensors().items()}
    base: Tensor | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        natural = read().float()
        whole = replace(site, storage=_InMemory(site.storage, natural))
        fresh = adapter.initial_tensors(None)
        found = {k: fresh[k].detach().clone() if k in fresh else v for k, v in values.items()}
        M = site.ops.to_canonical(site.module, site.parameter, natural)
        base = adapter.values_from_weight(found, whole, M)
        for key, value in found.items():
            values[key].copy_(value)
    for key, t in adapter.tensors().items():
        if key not in adapter.shared_buffers:
            fill_rows(t, of_rank_0(values[key], device))
    if not adapter.method.rewrites_base:
        return None
    adapter.rewrite = BaseRewrite(site.storage.snapshot(site.module, site.parameter))
    kept = torch.empty(site.shape) if base is None else base.float().contiguous()
    return site.ops.from_canonical(site.module, site.parameter, of_rank_0(kept, device))


class _InMemory:
    """A storage whose weight is read from one whole tensor, rounded as it is stored."""

    def __init__(self, storage: Storage, W: Tensor) -> None:
        self._storage = storage
        self._W = W

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Return the weight as storage reads it back."""
        W = self._storage.quantization_roundtrip(m, name, self._W)
        W = W if part is None else W[part]
        return W if dtype is None else W.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def start_after_base(module: nn.Module, device: torch.device) -> None:
    """Start what needs the base that was just read.

    Trained copies start from their originals, which have the same shards, and prompts from the
    embeddings.
    """
    with torch.no_grad():
        for _, adapted in adapted_modules(module):
            for adapter in adapters_of(adapted):
                if isinstance(adapter, PromptAdapter):
                    _fill_fresh(adapter, device)
                for path, copied in adapter.copies().items():
                    local(copied).copy_(local(parameter_at(adapted, path)))
