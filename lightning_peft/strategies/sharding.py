"""From an attached model to FSDP2 units, and the checks before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_peft.checkpoint.kept import kept_tensors
from lightning_peft.core.protocols import Reason
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.router_adapter import RouterAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.optim.method_hooks import has_step_hooks
from lightning_peft.storage import held_tensors, storage_of
from lightning_peft.strategies.base_reading import check_cache, meta_tensors, read_into
from lightning_peft.strategies.fsdp_compat import (
    free_received_copy,
    hold_bytes_as_floats,
    shards_bytes,
    touch_every_adapter,
)
from lightning_peft.strategies.shard_units import Classes, check_ties, root_units, shard_units
from lightning_peft.strategies.sharded_init import of_rank_0

__all__ = ["Options", "is_sharded", "shard_model"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


@dataclass(frozen=True)
class Options:
    """The user's options; see `PEFTFSDPStrategy`."""

    shard_classes: Classes = ()
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    base_from: str | Path | None = None
    precision: str = "32-true"
    split_root: bool = True
    packed_cache: str | Path | None = None
    replicas: int = 1
    context_parallel: int = 1

    def __post_init__(self) -> None:
        """Check what does not depend on the run."""
        check_cache("peft_fsdp", self.base_from, self.packed_cache)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds it already (a module stays sharded after a run)."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in module.modules())


def shard_model(
    module: nn.Module, mesh: DeviceMesh, device: torch.device, options: Options
) -> list[str]:
    """Shard blocks and the module itself, in place.

    Returns:
        Names of the units.

    Raises:
        RuntimeError: a tensor is on the meta device and has no source; or the bytes changed.
        ValueError: adapters that cannot be sharded.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    _check_adapters(module)
    empty = meta_tensors(module)
    if empty and options.base_from is None:
        raise RuntimeError(
            f"peft_fsdp: expected weights, got {len(empty)} tensors on the meta device "
            f"({', '.join(empty[:3])}); give PEFT(base_from=<folder of safetensors>), or the "
            "strategy under Fabric"
        )
    if not empty:
        for t in kept_tensors(module).values():
            of_rank_0(t.detach(), device)
    units = shard_units(module, options.shard_classes)
    ends = root_units(module, units) if options.split_root else []
    check_ties(module, [*([unit] for unit in units), *ends], options.shard_classes)
    probe = _probe(units)
    kwargs: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": options.reshard_after_forward}
    newer = shards_bytes()
    if not newer:
        kwargs["ignored_params"] = _for_older_torch(module, units, bool(empty), options.precision)
    if options.cpu_offload:
        kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for _, unit in units:
        fully_shard(unit, **kwargs)
    for end in ends:
        _shard_end([m for _, m in end], kwargs)
    fully_shard(module, **kwargs)
    for step in _STEPS:
        if hasattr(module, step):
            register_fsdp_forward_method(module, step)
    if newer:
        # Ranks may reach different adapters (experts); else their gradients would be mixed.
        module.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    if empty:
        place = torch.device("cpu") if options.cpu_offload else device
        read_into(
            module,
            str(options.base_from),
            place=place,
            device=device,
            packed_cache=options.packed_cache,
        )
    _check(module)
    if probe is not None:
        _compare(*probe)
    return [name for name, _ in [*units, *(part for end in ends for part in end)]]


def _shard_end(modules: list[nn.Module], kwargs: dict[str, Any]) -> None:
    """Shard an embedding, a head, or both if they are tied.

    Backward begins with the head, so it stays gathered after a forward with gradients. Backward of
    a frozen embedding reads no weight, so nothing is gathered for it.
    """
    from torch.distributed.fsdp import fully_shard

    last: Any = modules[-1]
    embedding = len(modules) == 1 and isinstance(last, nn.Embedding)
    kept = kwargs if embedding else {**kwargs, "reshard_after_forward": False}
    fully_shard(last if len(modules) == 1 else modules, **kept)
    if embedding:
        if not any(p.requires_grad for p in last.parameters()):
            last.set_unshard_in_backward(False)
        return
    last.register_forward_pre_hook(free_received_copy)
    for module in modules:
        module.register_forward_hook(_free_without_gradients)


def _free_without_gradients(module: Any, args: object, output: object) -> None:
    if not torch.is_grad_enabled():
        module.reshard()


def _for_older_torch(
    module: nn.Module, units: list[tuple[str, nn.Module]], empty: bool, precision: str
) -> set[nn.Parameter]:
    if empty:
        raise RuntimeError(
            f"peft_fsdp: expected torch >= 2.13 to read a base into shards, got "
            f"{torch.__version__}, whose FSDP2 shards no bytes; update torch, or build the model "
            "outside of torch.device('meta')"
        )
    for _, unit in units:
        touch_every_adapter(unit)
    return hold_bytes_as_floats(module, precision)


def _check_adapters(module: nn.Module) -> None:
    for name, adapted in adapted_modules(module):
        for adapter in adapters_of(adapted):
            trained = (
                [*adapter.shared_trained, *adapter.tied_trained, *adapter.borrowed]
                if isinstance(adapter, WeightAdapter)
                else []
            )
            if trained:
                raise ValueError(
                    f"peft_fsdp: expected adapters that own what they train, got "
                    f"{adapter.method.label} on {name!r} with shared {trained}; use "
                    "strategy='peft_ddp'"
                )
            if isinstance(adapter, RouterAdapter):
                raise ValueError(
                    f"peft_fsdp: expected adapters that run in one pass, got "
                    f"{adapter.method.label} on {name!r}, which runs the model twice; use "
                    "strategy='peft_ddp'"
                )
            if has_step_hooks(adapter.method):
                raise ValueError(
                    f"peft_fsdp: expected a method without a schedule, got {adapter.method.label} "
                    f"on {name!r}, whose penalty and budget need every tensor whole; use "
                    "strategy='peft_ddp'"
                )
    for name, layer in module.named_modules():
        for held in held_tensors(layer).values():
            found = held.storage.can_shard(layer)
            if isinstance(found, Reason):
                raise ValueError(
                    f"peft_fsdp: expected a base that is dense or can be sharded, got {name!r} in "
                    f"{held.storage.label}: {found}"
                )
    trained_dtypes = {p.dtype for p in module.parameters() if p.requires_grad}
    if len(trained_dtypes) > 1:
        raise ValueError(
            f"peft_fsdp: expected one dtype for everything trained, got "
            f"{sorted(map(str, trained_dtypes))}; cast the module before fitting"
        )


# ---- whether what comes back is what went in

Probe = tuple[nn.Module, nn.Module, str, Tensor]


def _probe(units: list[tuple[str, nn.Module]]) -> Probe | None:
    """A weight of the first unit, dequantised, with its layer and its name."""
    for _, unit in units[:1]:
        for name, layer in unit.named_modules():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.ndim > 1 and weight.device.type != "meta":
                W = storage_of(layer).read(layer, "weight").detach().to("cpu", copy=True)
                return unit, layer, name, W
    return None


def _compare(unit: Any, layer: nn.Module, name: str, before: Tensor) -> None:
    """Raise where one block, gathered again, differs in a bit."""
    with torch.no_grad():
        unit.unshard()
        # A dense weight is read as it is, and resharding takes its memory away.
        after = storage_of(layer).read(layer, "weight").detach().to("cpu", copy=True)
        unit.reshard()
    if not torch.equal(before, after):
        raise RuntimeError(
            f"peft_fsdp: expected {name!r} to come back bit for bit from its shards, got another "
            "weight; this combination of torch and device changes packed bytes: use "
            "strategy='peft_ddp'"
        )


def _check(module: nn.Module) -> None:
    """No tensor without memory, nothing trained outside the shards."""
    from torch.distributed.tensor import DTensor

    empty = meta_tensors(module)
    plain = [
        n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)
    ]
    if empty or plain:
        raise RuntimeError(
            f"peft_fsdp: expected every tensor to have memory and every trained one to be sharded, "
            f"got meta tensors {empty[:5]} and unsharded ones {plain[:5]}"
        )
