"""State dict of the adapters, written and loaded strictly.

Keys come from the modules' structure, never from substrings of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.intact import check_intact
from lightning_peft.core.finite import is_finite
from lightning_peft.core.marker import unmarked
from lightning_peft.core.modules import base_modules, persistent_buffers
from lightning_peft.core.names import counted, join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.core.value_types import shown
from lightning_peft.initialization.restore import initialized_shapes, restore_initialized
from lightning_peft.layers.adapted import adapted_modules

__all__ = ["adapter_state_dict", "check_state", "load_adapter_state_dict", "trained_tensors"]


def trained_tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Live adapter tensors (parameters and buffers) by canonical key, each tensor once.

    A key is the module's first name in `named_modules()`, without torch.compile's ``_orig_mod``,
    followed by ``peft.<adapter>.<tensor>``. Running statistics of normalisation layers are
    included, because training changes them although the base is frozen.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in adapted_modules(model):
        for key, entry in module.peft.items():
            if adapter_name is None or key == adapter_name:
                _collect(tensors, entry, join(name, "peft", key))
    if tensors or any(True for _ in registries_in(model)):
        tensors |= _running_statistics(model)
    return {strip_compile(k): t for k, t in tensors.items()}


def _collect(into: dict[str, Tensor], module: nn.Module, prefix: str) -> None:
    saved = module.state_dict(keep_vars=True)
    for key, tensor in saved.items():
        into[f"{prefix}.{key}"] = tensor


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in base_modules(model).items():
        if getattr(module, "track_running_stats", False):
            own = persistent_buffers(module, recurse=False)
            found |= {join(name, key): buffer for key, buffer in own.items()}
    return found


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Detached tensors of one adapter, or of all adapters.

    Raises:
        KeyError: no adapter of that name.
        RuntimeError: an adapted layer was replaced or resized after attach.
    """
    _require(model, adapter_name)
    check_intact(model, "adapter_state_dict", adapter_name)
    return {k: t.detach() for k, t in trained_tensors(model, adapter_name).items()}


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True
) -> None:
    """Copy tensors into the adapters. All are checked first; if one is wrong, none is copied.

    Args:
        model: A model with the adapters attached.
        state: Tensors by canonical key, as `adapter_state_dict` returns them; or the
            ``"state_dict"`` of a checkpoint.
        strict: Whether the key sets must be equal. Unequal shapes and non-finite values always
            raise.

    Raises:
        TypeError: no mapping of tensors, for instance the path of a file.
        ValueError: missing, extra, misshapen or non-finite tensors, with the list.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"load_adapter_state_dict: expected tensors by name, got {shown(state)}; read a "
            "directory with load_adapter, a checkpoint with load_checkpoint"
        )
    state, live = unmarked(state), trained_tensors(model)
    check_state({**live, **initialized_shapes(model, state)}, state, strict=strict)
    restore_initialized(model, state)
    live = trained_tensors(model)
    with torch.no_grad():
        for key, tensor in live.items():
            if key in state:
                tensor.copy_(state[key])


def check_state(
    live: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    strict: bool,
    source: str = "adapter state",
) -> None:
    """Raise ValueError with every difference between the expected tensors and `state`."""
    problems: list[str] = []
    if strict:
        problems += [f"missing {k}" for k in live if k not in state]
        problems += [f"extra {k}" for k in state if k not in live]
    elif not any(k in live for k in state):
        problems.append("no key matches")
    checked = (_problem(k, value, live[k]) for k, value in state.items() if k in live)
    problems += [problem for problem in checked if problem]
    if problems:
        listed = "\n  ".join(problems[:20]) + (
            f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise ValueError(
            f"{source}: expected {len(live)} tensors that match the attached adapters, got "
            f"{len(state)} with {counted(len(problems), 'difference')}; nothing was loaded. "
            f"{_advice(problems)}:\n  {listed}"
        )


def _problem(key: str, value: object, live: Tensor) -> str:
    """Return what is wrong with one tensor of a file; "" if it can be loaded."""
    if not isinstance(value, Tensor):
        return f"{key}: expected a tensor, got {type(value).__name__}"
    if value.shape != live.shape:
        return f"{key}: expected shape {list(live.shape)}, got {_short(value.shape)}"
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (live, value)]
    if kinds[0] != kinds[1] or (value.dtype.itemsize == 1 and value.is_floating_point()):
        return f"{key}: expected {live.dtype}, got {value.dtype}"
    if not is_finite(value):
        finite = torch.isfinite(value)
        if live.device.type == "meta" or is_finite(live):
            return f"{key}: expected finite values, got NaN or infinity"
        if not bool((finite | ~torch.isfinite(live).to(finite.device)).all()):
            return f"{key}: expected finite values, got NaN or infinity"
    elif live.is_floating_point() and not is_finite(value.to(live.dtype)):
        peak = float(value.abs().max())
        return f"{key}: expected values in the range of {live.dtype}, got {peak:.3g}"
    return ""


def _short(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"{len(shape)} axes"


def _advice(problems: Sequence[str]) -> str:
    if all("finite values" in line for line in problems):
        return (
            "The weights were not finite when the file was written: load an earlier file, and "
            "train with a lower learning rate"
        )
    if all("in the range of" in line for line in problems):
        return "Attach to a model in a wider dtype, such as bfloat16 or float32"
    return "Attach with the configuration that was saved"


def _require(model: nn.Module, adapter_name: str | None) -> None:
    known = sorted({n for _, _, r in registries_in(model) for n in r.adapters})
    if not known or (adapter_name is not None and adapter_name not in known):
        raise KeyError(
            f"adapter_state_dict: expected one of the attached adapters {known}, got "
            f"{adapter_name!r}"
        )
