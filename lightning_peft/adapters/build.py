"""AdapterBuilder adapters at the places that were planned: class swap, start values, hooks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.placement.weights import Placement
from lightning_peft.core.site import Site
from lightning_peft.layers.adapted import Adapted, adapt
from lightning_peft.layers.adapter import Adapter, BaseRewrite
from lightning_peft.layers.block import InputTap
from lightning_peft.layers.prompt.custom_model import CustomModelHooks
from lightning_peft.layers.prompt.encoder_mask import EncoderMaskHook
from lightning_peft.layers.prompt.gating import PrefixGateHooks
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.storage import storage_of

__all__ = [
    "AdapterBuilder",
    "Planned",
    "guard_fast_path",
    "start_state",
    "start_values",
    "values_from_weight",
]

Planned = tuple[Method, str, Placement]  # (method, key of the method in a hybrid, where)


class AdapterBuilder:
    """Adapters made at the places that were planned; nothing is refused any more.

    A start that needs the dense weight of a layer is made right when that layer is packed, so that
    no more than one dense copy is kept. On the meta device it is made by whoever reads the weights.
    """

    def __init__(self, planned: Sequence[Planned], adapter_name: str) -> None:
        self._planned = planned
        self._adapter_name = adapter_name
        self._made: set[int] = set()
        self._copies: dict[int, nn.Parameter] = {}
        self._shared: dict[str, Mapping[str, Tensor]] = {}

    @contextmanager
    def around_packing(self, module: nn.Module) -> Iterator[None]:
        """Within it the module is packed; its adapters follow where they start from the weight."""
        mine = [entry for entry in self._planned if entry[2].module is module]
        originals = {
            p.site.parameter: p.site.weight(torch.float32).cpu().clone()
            for method, _, p in mine
            if isinstance(method, WeightMethod)
            and method.rewrites_base
            and p.site.device.type != "meta"
        }
        yield
        if originals:
            self._make(mine, originals)

    def finish(self) -> None:
        """All that is not made yet."""
        self._make([e for e in self._planned if id(e[2].module) not in self._made], {})

    def _make(self, entries: Sequence[Planned], originals: Mapping[str, Tensor]) -> None:
        for method, key, placement in entries:
            module, site = placement.module, placement.site
            self._made.add(id(module))
            site.storage = storage_of(module, site.parameter)  # it may have been packed since
            training = module.training
            container = adapt(module, site.ops).peft
            _rebind_forward(module)
            adapter = _build(method, placement, self._adapter_name, self._copies)
            if isinstance(method, WeightMethod):
                if key not in self._shared:
                    self._shared[key] = _hold_shared(method, key, self._planned, adapter)
                adapter.shared = self._shared[key]
                if method.starts_from_weight and site.device.type != "meta":
                    _initialise(adapter, originals.get(site.parameter))
            adapter.to(site.device)
            adapter.train(training)
            slot = "_".join(part for part in (key, placement.slot) if part)
            _hold(container, self._adapter_name, slot, adapter)


def _hold(container: nn.ModuleDict, adapter_name: str, slot: str, adapter: nn.Module) -> None:
    """`peft.<name>` for one adapter, `peft.<name>.<slot>` for each of several on one module."""
    if not slot:
        container[adapter_name] = adapter
        return
    if adapter_name not in container:
        container[adapter_name] = nn.ModuleDict()
    container[adapter_name].add_module(slot, adapter)


def _hook(method: Method, placement: Placement) -> Any:
    if method.kind == "block":
        return InputTap
    if getattr(method, "acts", "") == "attention":
        return PrefixGateHooks
    return EncoderMaskHook if getattr(placement.site, "embedding", "") else CustomModelHooks


def _build(
    method: Method, placement: Placement, adapter_name: str, copies: dict[int, nn.Parameter]
) -> Adapter:
    """An adapter at its start; `copies` has one copy a tensor, so that what is tied stays tied."""
    adapter = Adapter(method, placement.site, adapter_name)
    if method.kind == "select":
        for path in placement.paths:
            key = path.replace(".", "__")
            original = placement.module.get_parameter(path)
            if id(original) not in copies:
                copies[id(original)] = nn.Parameter(original.detach().clone())
            adapter.register_parameter(key, copies[id(original)])
            adapter.paths[key] = path
    elif method.kind in ("block", "sequence"):
        with _seeded(placement.site, adapter_name, None), torch.device("cpu"):
            adapter.block = method.module(placement.site)  # type: ignore[attr-defined]
        if placement.tap is not None:
            adapter.tap = _hook(method, placement)(adapter, placement.tap)
    else:
        assert isinstance(method, WeightMethod)
        buffers = method.buffers(placement.site)
        for key, tensor in start_values(method, placement.site, adapter_name, None).items():
            if key in buffers:
                adapter.register_buffer(key, tensor)
            else:
                adapter.register_parameter(key, nn.Parameter(tensor))
    return adapter


class _seeded:
    """Draw start values from a stream of their own: by seed, adapter and layer, not by order; data
    order is untouched.
    """

    def __init__(self, site: Any, adapter_name: str, seed: int | None) -> None:
        base = torch.initial_seed() if seed is None else seed
        self.seed = zlib.crc32(f"{base}/{adapter_name}/{site.label}".encode())

    def __enter__(self) -> None:
        self.before = torch.random.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.random.set_rng_state(self.before)


def start_values(
    method: WeightMethod, site: Any, adapter_name: str, seed: int | None
) -> dict[str, Tensor]:
    """Tensors of a weight method at their start, on the CPU."""
    with _seeded(site, adapter_name, seed), torch.no_grad(), torch.device("cpu"):
        return {**method.parameters(site), **method.buffers(site)}


def values_from_weight(
    adapter: Adapter, values: dict[str, Tensor], site: Site, W: Tensor
) -> Tensor | None:
    """Start values that need the weight W [*batch, out, in], put into `values`; returns what the
    base keeps, None where it stays.
    """
    with _seeded(site, adapter.adapter_name, None), torch.no_grad():
        base: Tensor | None = adapter.method.initialise(values, site, W)
    return base


def _initialise(adapter: Adapter, original: Tensor | None) -> None:
    """Start values that need the weight; the base's bits from before are kept on the CPU."""
    site = adapter.site
    W = site.weight(torch.float32) if original is None else original
    values = dict(adapter.tensors())
    base = values_from_weight(adapter, values, site, W)
    with torch.no_grad():
        for key, tensor in adapter.tensors().items():
            tensor.copy_(values[key])
        if base is not None:
            adapter.rewrite = BaseRewrite(
                original=site.storage.snapshot(site.module, site.parameter)
            )
            site.write(base)


def _hold_shared(
    method: WeightMethod, key: str, planned: Sequence[Planned], adapter: Adapter
) -> Mapping[str, Tensor]:
    """Put the tensors that all sites of a method share beside its first adapter.

    Returns the live buffers, a mapping that follows `.to()`.
    """
    sites = [p.site for m, k, p in planned if k == key and m.kind == "weight"]
    for site in sites:  # layers may have been packed since they were planned
        site.storage = storage_of(site.module, site.parameter)
    holder = nn.Module()
    for name, tensor in method.shared(sites).items():
        holder.register_buffer(name, tensor)
    if holder._buffers:
        adapter.add_module("shared_tensors", holder)
    found: Any = holder._buffers
    return found  # type: ignore[no-any-return]


def _rebind_forward(module: nn.Module) -> None:
    """accelerate keeps the forward it found in the instance; point it at the swapped class."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = type(module).forward.__get__(module)  # type: ignore[attr-defined]


def _keep_off_fast_path(*args: Any) -> None:
    """A hook that does nothing: `nn.TransformerEncoderLayer` leaves its fused eval path where a
    child has hooks.
    """


def guard_fast_path(model: nn.Module) -> None:
    """Have `nn.TransformerEncoderLayer` call its adapted and its packed children in eval too."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for child in layer.modules():
                if _keep_off_fast_path in child._forward_pre_hooks.values():
                    continue
                own = next(iter(child._parameters), "")
                if own and storage_of(child, own).label != "dense":  # stays so when adapters go
                    child.register_forward_pre_hook(_keep_off_fast_path)
                elif isinstance(child, Adapted):
                    child._peft.fast_path_guard = child.register_forward_pre_hook(
                        _keep_off_fast_path
                    )  # type: ignore[attr-defined]


def start_state(adapter: Adapter, seed: int | None) -> Mapping[str, Tensor]:
    """Start values by key in the adapter's state dict."""
    if adapter.kind == "weight":
        return start_values(adapter.method, adapter.site, adapter.adapter_name, seed)
    if adapter.kind == "select":
        return {k: adapter.site.module.get_parameter(p) for k, p in adapter.paths.items()}
    with _seeded(adapter.site, adapter.adapter_name, seed), torch.device("cpu"):
        block: nn.Module = adapter.method.module(adapter.site)
    return {f"block.{k}": t for k, t in block.state_dict().items()}
