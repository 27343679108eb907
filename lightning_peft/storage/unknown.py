"""Weights that are not plain dense ones and that no storage knows: refused by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_peft.core.pruning_masks import mask_of
from lightning_peft.storage.dtensor import is_sharded
from lightning_peft.storage.registry import foreign_storage, held_tensors

__all__ = ["computed_weight", "refuse_unknown_format", "unknown_format"]

_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: Ends of the names of tensors that a packed weight needs beside it.
_COMPANIONS = ("scale", "scale_inv", "scales", "zero_point", "zeros", "absmax", "SCB", "codebook")


def unknown_format(m: nn.Module, name: str) -> str:
    """Return why a weight cannot be read as a plain dense one; "" if it can.

    A weight that a storage holds or can adopt has a format that is known.
    """
    if name in held_tensors(m) or foreign_storage(m) is not None:
        return ""
    weight = m._parameters.get(name)
    if weight is None:
        return ""
    kind = _tensor_class(weight)
    if kind:
        return f"its weight is a {kind}"
    if weight.dtype not in _PLAIN:
        return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}"
    beside = _companions(m, name)
    if beside:
        return f"its weight is scaled by {', '.join(beside)}"
    return ""


def refuse_unknown_format(m: nn.Module, name: str, label: str) -> None:
    """Raise if a weight cannot be read as a plain dense one.

    Raises:
        ValueError: with the layer's class, the format, and two ways out.
    """
    reason = unknown_format(m, name)
    if reason:
        raise ValueError(
            f"{label!r}: expected a plain dense weight, or a format with a registered storage, got "
            f"{type(m).__module__}.{type(m).__name__}: {reason}; load the model without its "
            "quantization_config (or with dequantize=True where the config has it) and give "
            'quantization="nf4", or leave these layers out with exclude_modules'
        )


def _tensor_class(weight: Tensor) -> str:
    """Return the class of a tensor subclass; "" for a plain tensor or a shard of one."""
    held = weight.data
    for cls in (type(weight), type(held)):
        plain = cls in (Tensor, nn.Parameter) or issubclass(cls, UninitializedParameter)
        if not plain and not is_sharded(weight):
            return cls.__name__
    return ""


def _companions(m: nn.Module, name: str) -> list[str]:
    own = {**m._parameters, **m._buffers}
    return [
        key
        for key, t in own.items()
        if t is not None
        and key != name
        and key.startswith(f"{name}_")
        and key.endswith(_COMPANIONS)
    ]


def computed_weight(m: nn.Module, name: str = "weight") -> str:
    """Return how a layer's weight is computed before or in each forward; "" if it is a parameter.

    Pruning by torch.nn.utils.prune is not meant: its mask is known to the dense storage.
    """
    if parametrize.is_parametrized(m):
        return f"{_names(m)} computed by torch.nn.utils.parametrize"
    if getattr(m, "max_norm", None) is not None:
        return "max_norm rewrites rows of its weight in every forward"
    if name in m._parameters or mask_of(m, name) is not None:
        return ""
    for hook in m._forward_pre_hooks.values():
        if getattr(hook, "name", None) == name:
            return f"{name} computed by a {type(hook).__name__} hook"
    return ""


def _names(m: nn.Module) -> str:
    parametrized = m.get_submodule("parametrizations")
    return ", ".join(name for name, _ in parametrized.named_children())
