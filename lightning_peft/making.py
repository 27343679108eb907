"""Making adapters at the places that were planned: class swap, start values, hooks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.layers.adapted import Adapted, Adapter, Rewrite, Tap, adapt
from lightning_peft.layers.sequence import Widen
from lightning_peft.layers.sequence_own import OwnModel
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.placing import Placement
from lightning_peft.storage import storage_of

__all__ = [
    "Planned",
    "before_quantizing",
    "guard_fast_path",
    "make",
    "start_state",
    "start_values",
]

Planned = tuple[Method, str, Placement]  # (method, key of the method in a hybrid, where)


def before_quantizing(planned: Sequence[Planned], packing: Any) -> dict[tuple[int, str], Tensor]:
    """Dense weights that an initialisation needs although the layer is about to be packed."""
    if packing is None:
        return {}
    packed = {id(m) for _, m in packing.layers}
    return {
        (id(p.module), p.site.parameter): p.site.weight(torch.float32).cpu().clone()
        for method, _, p in planned
        if isinstance(method, WeightMethod) and method.rewrites_base and id(p.module) in packed
    }


def make(
    model: nn.Module,
    planned: Sequence[Planned],
    adapter_name: str,
    originals: dict[tuple[int, str], Tensor],
) -> None:
    """Swap classes and put adapters in, in the order planned; nothing is refused any more."""
    for _, _, placement in planned:  # a layer may have been packed since it was planned
        placement.site.storage = storage_of(placement.module, placement.site.parameter)
    copies: dict[int, nn.Parameter] = {}
    shared: dict[str, Mapping[str, Tensor]] = {}
    for method, key, placement in planned:
        module, site = placement.module, placement.site
        state_training = module.training
        container = adapt(module, site.ops).peft
        _rebind_forward(module)
        adapter = _build(method, placement, adapter_name, copies)
        if isinstance(method, WeightMethod):
            if key not in shared:
                shared[key] = _hold_shared(method, key, planned, adapter)
            adapter.shared = shared[key]
        if isinstance(method, WeightMethod) and method.starts_from_weight:
            _initialise(adapter, method, originals.get((id(module), site.parameter)))
        adapter.to(site.device)
        adapter.train(state_training)
        _hold(
            container,
            adapter_name,
            "_".join(part for part in (key, placement.slot) if part),
            adapter,
        )


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
        return Tap
    return Widen if getattr(placement.site, "embedding", "") else OwnModel


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


def _initialise(adapter: Adapter, method: WeightMethod, original: Tensor | None) -> None:
    """Start values that need the weight; the base's bits from before are kept on the CPU."""
    site = adapter.site
    W = site.weight(torch.float32) if original is None else original
    values = dict(adapter.tensors())
    with _seeded(site, adapter.adapter_name, None), torch.no_grad():
        base = method.initialise(values, site, W)
        for key, tensor in adapter.tensors().items():
            tensor.copy_(values[key])
        if base is not None:
            adapter.rewrite = Rewrite(original=site.storage.snapshot(site.module, site.parameter))
            site.write(base)


def _hold_shared(
    method: WeightMethod, key: str, planned: Sequence[Planned], adapter: Adapter
) -> Mapping[str, Tensor]:
    """Put the tensors that all sites of a method share beside its first adapter.

    Returns the live buffers, a mapping that follows `.to()`.
    """
    sites = [p.site for m, k, p in planned if k == key and m.kind == "weight"]
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
    """Have `nn.TransformerEncoderLayer` call its adapted children in eval too."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for child in layer.modules():
                if isinstance(child, Adapted) and child._peft.fast_path_guard is None:
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
