"""Structure of fused experts: which weights and biases they have, and in which axis order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor, nn

from lightning_peft.storage import storage_of

__all__ = [
    "FusedExperts",
    "expert_count",
    "first_weight",
    "form_of",
    "has_bias",
    "is_presorted",
    "is_transposed",
]


class FusedExperts(nn.Module):
    """Attributes of a fused experts module, for the type checker: there are no instances."""

    num_experts: int
    down_proj: nn.Parameter
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """The attributes that the decorator of transformers 5 writes on an instance."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_norm: bool


def is_presorted(module: nn.Module) -> bool:
    """Llama 4's experts: [E, in, out], gate and up concatenated, the input sorted by the caller
    with the same number of rows per expert.
    """
    return any(c.__name__ == "Llama4TextExperts" for c in type(module).__mro__)


def form_of(m: nn.Module) -> Form | None:
    """Return the form of a fused experts module; None if attributes and structure tell none."""
    if is_presorted(m):
        return Form(True, False, True, False)
    if hasattr(m, "has_gate") and hasattr(m, "is_transposed"):
        norm = bool(getattr(m, "has_post_expert_norm", False))
        return Form(bool(m.has_gate), bool(m.has_bias), bool(m.is_transposed), norm)
    return _UNDECORATED if _is_undecorated(m) else None


_UNDECORATED = Form(True, False, False, False)


def _is_undecorated(m: nn.Module) -> bool:
    """The decorated form without the decorator: [E, 2·inner, d] and [E, d, inner] and a gate."""
    first, second = _shape(m, "gate_up_proj"), _shape(m, "down_proj")
    if not hasattr(m, "_apply_gate") or not hasattr(m, "num_experts"):
        return False
    if first is None or second is None:
        return False
    (E, both, d), (E2, d2, inner) = first, second
    return E == E2 == m.num_experts and d == d2 and both == 2 * inner


def _shape(m: nn.Module, name: str) -> tuple[int, ...] | None:
    if m._parameters.get(name) is None:
        return None
    shape = storage_of(m, name).shape(m, name)
    return tuple(shape) if len(shape) == 3 else None


def is_transposed(m: nn.Module) -> bool:
    """Whether the weights are stored [E, in, out]."""
    return _form(m).is_transposed


def first_weight(m: nn.Module) -> str:
    """Name of the weight that leads in."""
    return "gate_up_proj" if _form(m).has_gate else "up_proj"


def has_bias(m: nn.Module) -> bool:
    """Whether every weight has a bias [E, out]."""
    return _form(m).has_bias


def _form(m: nn.Module) -> Form:
    form = form_of(m)
    assert form is not None  # `is_experts` said so
    return form


def expert_count(m: nn.Module) -> int:
    """Number of experts of the layer."""
    return int(cast(int, m.num_experts))
