"""Builds the planned adapters: class swap, initial values, hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.core.class_swap import rebind_forward
from lightning_peft.core.modules import base_modules
from lightning_peft.core.site import Site
from lightning_peft.layers.adapted import adapt, is_adapted
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter, initial_shared
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.modules_to_save import ModulesToSave
from lightning_peft.storage import storage_of

__all__ = ["AdapterBuilder", "guard_fast_path", "unguard_fast_path"]


class AdapterBuilder:
    """Builds the planned adapters. All checks have passed by this point.

    An adapter whose initialisation needs the dense weight is built right after its layer is packed,
    so that at most one dense copy is kept. On the meta device the code that reads the weights
    initialises the adapter.
    """

    def __init__(
        self,
        planned: Sequence[PlannedAdapter],
        adapter_name: str,
        built: list[WeightAdapter],
    ) -> None:
        """Take the plan.

        Args:
            planned: What to build.
            adapter_name: Name to attach under.
            built: Extended by every adapter that may rewrite the base, before it does.
        """
        self._planned = planned
        self._by_module: dict[int, list[PlannedAdapter]] = {}
        for each in planned:
            self._by_module.setdefault(id(each.placement.module), []).append(each)
        self._weight_adapters = built
        self._adapter_name = adapter_name
        self._built: set[int] = set()
        self._copies: dict[str, dict[int, nn.Parameter]] = {}
        self._by_site: dict[int, WeightAdapter] = {}
        self._shared: dict[str, _Shared] = {}

    @contextmanager
    def around_packing(self, module: nn.Module) -> Iterator[None]:
        """Pack the module within this block; adapters that need its dense weight are built after.

        The sites of the module then see the storage of the packed weight.
        """
        mine = self._by_module.get(id(module), [])
        originals = {
            p.placement.site.parameter: p.placement.site.weight(torch.float32).cpu().clone()
            for p in mine
            if isinstance(p.method, WeightMethod)
            and p.method.rewrites_base
            and p.placement.site.device.type != "meta"
        }
        yield
        for planned in mine:
            site = planned.placement.site
            site.storage = storage_of(module, site.parameter)
        if originals:
            self._build_all(mine, originals)

    def finish(self) -> None:
        """Build the remaining adapters."""
        self._build_all([p for p in self._planned if id(p.placement.module) not in self._built], {})

    def _build_all(
        self, planned: Sequence[PlannedAdapter], originals: Mapping[str, Tensor]
    ) -> None:
        for each in planned:
            self._build(each, originals)

    def _build(self, planned: PlannedAdapter, originals: Mapping[str, Tensor]) -> None:
        placement = planned.placement
        module, site = placement.module, placement.site
        self._built.add(id(module))
        training = module.training
        container = adapt(module, site.ops).peft
        rebind_forward(module)
        method = planned.method
        group = method.group(placement.name) if isinstance(method, ModulesToSave) else ""
        copies = self._copies.setdefault(group, {})
        adapter = placement.build(method, self._adapter_name, copies)
        if isinstance(adapter, WeightAdapter):
            self._weight_adapters.append(adapter)
            self._by_site[id(site)] = adapter
            held = self._held(planned, adapter)
            adapter.shared_buffers, adapter.shared_trained = held.frozen, held.trained
            if site.tied_to is not None:
                adapter.tied_trained = self._by_site[id(site.tied_to)]._parameters
            for name, buffer in held.site_buffers.get(id(site), {}).items():
                adapter.register_buffer(name, buffer)
            for name, owner in held.owners.get(id(site), {}).items():
                adapter.borrow(name, self._by_site[id(owner)])
            fresh = not adapter.tied_trained and site.device.type != "meta"
            if adapter.method.starts_from_weight and fresh:
                adapter.initialize_from_weight(originals.get(site.parameter))
        if any(t.device != site.device for t in _held_tensors(adapter)):  # `to` is slow
            adapter.to(site.device)
        adapter.train(training)
        slot = "_".join(part for part in (planned.key, placement.slot) if part)
        _hold(container, self._adapter_name, slot, adapter)

    def _held(self, planned: PlannedAdapter, adapter: WeightAdapter) -> _Shared:
        """The tensors that all sites of a method share. The method's first adapter owns them."""
        key = planned.key
        if key not in self._shared:
            sites = [
                p.placement.site
                for p in self._planned
                if p.key == key and isinstance(p.method, WeightMethod)
            ]
            self._shared[key] = _hold_shared(adapter, sites)
        return self._shared[key]


def _held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module and of its children."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _held_tensors(child)


@dataclass(frozen=True)
class _Shared:
    """Tensors that the sites of one method have in common.

    Attributes:
        frozen: Live buffers of the holder; the mapping follows `.to()`.
        trained: Live parameters of the holder.
        site_buffers: Buffers that depend on all sites, by the site's id.
        owners: Trained tensors that another site owns, by the id of the site that borrows.
    """

    frozen: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    site_buffers: Mapping[int, Mapping[str, Tensor]]
    owners: Mapping[int, Mapping[str, Site]]


def _hold_shared(adapter: WeightAdapter, sites: Sequence[Site]) -> _Shared:
    """Put the tensors that all sites of a method share into a child of its first adapter."""
    method = adapter.method
    holder = nn.Module()
    frozen, trained = initial_shared(method, sites, adapter.adapter_name, None)
    for name, tensor in frozen.items():
        holder.register_buffer(name, tensor)
    for name, tensor in trained.items():
        holder.register_parameter(name, nn.Parameter(tensor))
    if frozen or trained:
        adapter.add_module("shared_tensors", holder)
    buffers = zip(sites, method.site_buffers(sites), strict=True)
    live: Any = holder
    pairs = zip(sites, method.owners(sites), strict=True)
    owners = {id(s): {name: sites[i] for name, i in found.items()} for s, found in pairs}
    return _Shared(live._buffers, live._parameters, {id(s): b for s, b in buffers}, owners)


def _hold(container: nn.ModuleDict, adapter_name: str, slot: str, adapter: Adapter) -> None:
    """Store as `peft.<name>`, or as `peft.<name>.<slot>` if the module has several adapters."""
    if not slot:
        container[adapter_name] = adapter
        return
    if adapter_name not in container:
        container[adapter_name] = nn.ModuleDict()
    container[adapter_name].add_module(slot, adapter)


def _keep_off_fast_path(*args: object) -> None:
    """An empty hook: a child with hooks keeps `nn.TransformerEncoderLayer` off its fused path."""


def guard_fast_path(model: nn.Module) -> None:
    """Make `nn.TransformerEncoderLayer` call its adapted and its packed children in eval too."""
    for layer in base_modules(model).values():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for child in base_modules(layer).values():
                _guard(child)


def unguard_fast_path(child: nn.Module) -> None:
    """Let a child that is plain again run on the fused path."""
    for key, hook in list(child._forward_pre_hooks.items()):
        if hook is _keep_off_fast_path:
            del child._forward_pre_hooks[key]


def _guard(child: nn.Module) -> None:
    if _keep_off_fast_path in child._forward_pre_hooks.values():
        return
    own = next(iter(child._parameters), "")
    if own and storage_of(child, own).is_quantized:  # the hook stays when adapters are detached
        child.register_forward_pre_hook(_keep_off_fast_path)
    elif is_adapted(child):
        child._peft.fast_path_guard = child.register_forward_pre_hook(_keep_off_fast_path)
