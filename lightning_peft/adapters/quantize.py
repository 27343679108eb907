"""Quantising a model: which layers, in what order, one at a time."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import nn

from lightning_peft.layers import ops_for
from lightning_peft.layers.experts.ops import (
    ExpertsOps,
    QuantizedExperts,
    experts_refusal,
    is_transposed,
)
from lightning_peft.layers.linear import Conv1DOps, LinearOps
from lightning_peft.models.target_modules import output_head
from lightning_peft.storage import Quantization, storage_of
from lightning_peft.storage.nf4.packed_layer import pack

__all__ = ["QuantizationPlan", "plan_quantization", "quantize_layers"]


@dataclass
class QuantizationPlan:
    """What will be packed.

    Attributes:
        quantization: How.
        layers: (name, module) in the model's order.
        dense: (name, reason) of linear layers that stay as they are.
    """

    quantization: Quantization
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)


def plan_quantization(
    model: nn.Module, quantization: Quantization, *, keep: Sequence[str] = ()
) -> QuantizationPlan:
    """Choose the layers and check their weights; nothing is changed.

    Args:
        model: The model.
        quantization: How.
        keep: Names of modules that stay dense (they are trained whole).

    Raises:
        ValueError: a weight with a NaN or an infinity, by name.
        ModuleNotFoundError: ``"int8"`` without bitsandbytes.
    """
    if quantization.kind == "int8" and find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "quantization='int8': expected bitsandbytes, found none; pip install bitsandbytes, or "
            "use 'nf4', which needs nothing"
        )
    plan = QuantizationPlan(quantization)
    heads = output_head(model)
    shared = _shared_parameters(model)
    fp32 = _keep_in_fp32(model)
    for name, module in model.named_modules():
        ops = ops_for(module)
        refusal = experts_refusal(module)
        if refusal:
            plan.dense.append((name, refusal))
        if not isinstance(ops, LinearOps | Conv1DOps | ExpertsOps):
            continue
        if storage_of(module, ops.parameters(module)[0]).label != "dense":
            continue
        reason = _stays_dense(name, module, quantization, keep, heads, shared, fp32)
        if reason:
            plan.dense.append((name, reason))
            continue
        _require_finite(name, module)
        plan.layers.append((name, module))
    return plan


def _stays_dense(
    name: str,
    module: nn.Module,
    quantization: Quantization,
    keep: Sequence[str],
    heads: Iterable[str],
    shared: set[int],
    fp32: Sequence[str],
) -> str:
    ops = ops_for(module)
    assert ops is not None  # the caller chose by it
    names = ops.parameters(module)
    weight = module.get_parameter(names[0])
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "read by nn.MultiheadAttention"
    if name in heads:
        return "output head"
    if any(name == k or name.startswith(f"{k}.") for k in keep):
        return "trained whole"
    if any(
        name == e or name.endswith(f".{e}") or fnmatch.fnmatch(name, e)
        for e in quantization.exclude_modules or ()
    ):
        return "excluded"
    if id(weight) in shared:
        return "tied to another parameter"
    if any(part in name.split(".") for part in fp32):
        return "the model keeps it in fp32"
    if not weight.is_floating_point():
        return f"already {weight.dtype}"
    if quantization.kind == "int8" and isinstance(ops, ExpertsOps):
        raise ValueError(
            f"{name!r}: expected linear layers for kind='int8', got fused experts, which hold most "
            "of the weights; use kind='nf4', or name them in exclude_modules to leave them dense"
        )
    if quantization.kind == "int8" and not isinstance(ops, LinearOps):
        return "bitsandbytes' int8 needs an nn.Linear; use nf4"
    if isinstance(ops, ExpertsOps):
        for key in names:
            n = module.get_parameter(key).shape[1:].numel()
            if n % quantization.block_size:
                return (
                    f"{n} weights an expert are no multiple of the block of "
                    f"{quantization.block_size}"
                )
    return ""


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    # One module under two names is one owner, not a tie.
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for own in module._parameters.values():
            owners.setdefault(id(own), set()).add(id(module))
    return {i for i in twice if len(owners.get(i, ())) > 1}


def _keep_in_fp32(model: nn.Module) -> list[str]:
    """Names of layers that a Hugging Face model keeps in fp32: its code casts activations to their
    weight's dtype.
    """
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


def _require_finite(name: str, module: nn.Module) -> None:
    for key in _weights(module):
        weight = module.get_parameter(key).detach()
        if weight.device.type == "meta" or torch.isfinite(weight).all():
            continue
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"quantize {name!r} {key}: expected finite weights, got {bad} NaN or infinite of "
            f"{weight.numel()}; repair the checkpoint, or keep the layer dense with "
            "Quantization(exclude_modules=[…])"
        )


def quantize_layers(
    model: nn.Module,
    plan: QuantizationPlan,
    device: torch.device | str | None,
    around: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
) -> None:
    """Pack one layer at a time: to the device, quantised there, the dense weight freed.

    Args:
        model: The model.
        plan: The layers.
        device: Where to pack; None means where each weight is.
        around: Entered for the packing of each layer.
    """
    for name, module in _progress(plan.layers):
        del name
        if device is not None and module.get_parameter(_weights(module)[0]).device.type != "meta":
            module.to(device)
        with nullcontext() if around is None else around(module):
            _pack_layer(module, plan.quantization)


def _pack_layer(module: nn.Module, quantization: Quantization) -> None:
    ops = ops_for(module)
    if quantization.kind == "int8":
        from lightning_peft.storage.bitsandbytes import to_int8

        to_int8(module)
    elif isinstance(ops, ExpertsOps):
        pack(
            module,
            quantization,
            transposed=is_transposed(module),
            names=_weights(module),
            mixin=QuantizedExperts,
        )
    else:
        pack(module, quantization, transposed=isinstance(ops, Conv1DOps))


def _weights(module: nn.Module) -> Sequence[str]:
    ops = ops_for(module)
    assert ops is not None  # planned by its ops
    return ops.parameters(module)


def _progress(layers: list[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    """A bar on rank 0 when there is enough to wait for."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (distributed and torch.distributed.get_rank() != 0) or _numel(layers) < 1 << 28:
        return layers
    from rich.progress import track

    return track(layers, description="Quantising", transient=True)


def _numel(layers: list[tuple[str, nn.Module]]) -> int:
    return sum(m.get_parameter(n).numel() for _, m in layers for n in _weights(m))
