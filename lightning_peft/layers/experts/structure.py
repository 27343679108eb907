"""What fused experts say about themselves, and how Hugging Face peft stores adapters of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.layers.base import MatrixOps

__all__ = [
    "ExpertsLayout",
    "first_weight",
    "form_of",
    "has_bias",
    "is_presorted",
    "is_transposed",
]


class Form(NamedTuple):
    """What the decorator of transformers 5 writes on an instance."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_norm: bool


def is_presorted(module: nn.Module) -> bool:
    """Llama 4's experts: [E, in, out], gate and up concatenated, the input sorted by the caller
    with equally many rows an expert.
    """
    return any(c.__name__ == "Llama4TextExperts" for c in type(module).__mro__)


def form_of(m: Any) -> Form | None:
    """Of a fused experts module; None where it does not say and its structure does not tell."""
    if is_presorted(m):
        return Form(True, False, True, False)
    if hasattr(m, "has_gate") and hasattr(m, "is_transposed"):
        norm = bool(getattr(m, "has_post_expert_norm", False))
        return Form(bool(m.has_gate), bool(m.has_bias), bool(m.is_transposed), norm)
    return _UNDECORATED if _is_undecorated(m) else None


_UNDECORATED = Form(True, False, False, False)


def _is_undecorated(m: Any) -> bool:
    """The decorated form without the decorator: [E, 2·inner, d] and [E, d, inner] and a gate."""
    shapes = [_shape(m, n) for n in ("gate_up_proj", "down_proj")]
    if not hasattr(m, "_apply_gate") or not hasattr(m, "num_experts") or None in shapes:
        return False
    (E, both, d), (E2, d2, inner) = shapes  # type: ignore[misc]
    return E == E2 == m.num_experts and d == d2 and both == 2 * inner


def _shape(m: Any, name: str) -> tuple[int, ...] | None:
    packing = (vars(m).get("_packed") or {}).get(name)
    parameter = m._parameters.get(name)
    shape = parameter.shape if packing is None and parameter is not None else None
    shape = packing.shape if packing is not None else shape
    return tuple(shape) if shape is not None and len(shape) == 3 else None


def is_transposed(m: Any) -> bool:
    """Whether the weights are stored [E, in, out]."""
    return _form(m).is_transposed


def first_weight(m: Any) -> str:
    """Name of the weight that leads in."""
    return "gate_up_proj" if _form(m).has_gate else "up_proj"


def has_bias(m: Any) -> bool:
    """Whether every weight has a bias [E, out]."""
    return _form(m).has_bias


def _form(m: Any) -> Form:
    form = form_of(m)
    assert form is not None  # `is_experts` said so
    return form


class ExpertsLayout(MatrixOps):
    """Exchange hooks of fused experts: peft nests one wrapper a parameter, the first defined
    innermost.
    """

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Always: experts are parameters, not layers."""
        return True

    def hf_swaps(self, m: nn.Module, name: str) -> bool:
        """Llama 4's [E, in, out] does not say so: peft reads it as [E, out, in]."""
        return is_presorted(m)

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """Weight → path below the module; names alone do not say which parameter, the order
        does.
        """
        inside_out = [n for n in self.parameters(m) if n in adapted]
        depth = len(inside_out) - 1
        return {n: ".".join(["base_layer"] * (depth - i)) for i, n in enumerate(inside_out)}

    def hf_found(self, m: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Place → weight; a single place is told by its shape."""
        names = self.parameters(m)
        if len(found) == len(names):
            places = {place: name for name, place in self.hf_places(m, names).items()}
            if set(places) == set(found):
                return places
        if set(found) == {""}:
            for name in names:
                E, out, width = self.shape(m, name, _natural(m, name))
                if self.hf_swaps(m, name):
                    out, width = width, out
                shapes = {k: t.shape for k, t in found[""].items()}
                A = next((s for k, s in shapes.items() if "lora_A" in k), None)
                B = next((s for k, s in shapes.items() if "lora_B" in k), None)
                if (
                    A is not None
                    and B is not None
                    and A[1] == width
                    and B[0] == out
                    and A[0] % E == 0
                ):
                    return {"": name}
        raise ValueError(
            f"{type(m).__name__}: expected tensors of {list(names)} at "
            f"{list(self.hf_places(m, names).values())}, got places {sorted(found)} whose shapes "
            "fit none of them"
        )

    def hf_rank(self, m: nn.Module, name: str, r: int) -> int:
        """As ours: one rank an expert."""
        return r

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """A [E, r, in] → [E·r, in] expert-major; B [E, out, r] → [out, r·E] rank-major."""
        if t.ndim == 2:  # one adapter shared over experts: repeat it
            t = t.expand(int(m.num_experts), *t.shape)  # type: ignore[arg-type]
        if layout == "down":
            return t.reshape(-1, t.shape[-1])
        return t.permute(1, 2, 0).reshape(t.shape[1], -1) if layout == "up" else t

    def hf_unpack(self, m: Any, name: str, layout: str, t: Tensor) -> Tensor:
        """Inverse of `hf_pack`."""
        E = m.num_experts
        if t.ndim != 2 or t.shape[0 if layout == "down" else 1] % E:
            raise ValueError(
                f"expected a matrix whose rank axis is a multiple of {E} experts, got "
                f"{list(t.shape)}"
            )
        if layout == "down":
            return t.reshape(E, -1, t.shape[1])
        return t.reshape(t.shape[0], -1, E).permute(2, 0, 1)


def _natural(m: Any, name: str) -> torch.Size:
    packing = (vars(m).get("_packed") or {}).get(name)
    if packing is None:
        shape: torch.Size = m._parameters[name].shape
        return shape
    E, out, width = packing.shape
    return torch.Size((E, width, out)) if packing.transposed else torch.Size((E, out, width))
