"""Fused experts: the weights of all experts of a layer as 3-D parameters, read by the module's own
forward.

The instance says what it is (transformers 5): `has_gate, has_bias, is_transposed, is_concatenated,
has_post_expert_norm, act_fn, _apply_gate`. One adapted class serves them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward, base_class
from lightning_peft.core.kernel_backend import backend_scope
from lightning_peft.core.protocols import WeightLayout
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.experts.forward import run_experts
from lightning_peft.layers.experts.structure import (
    first_weight,
    form_of,
    has_bias,
    is_transposed,
)
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.storage import held_tensors

__all__ = [
    "ExpertsOps",
    "QuantizedExperts",
    "experts_refusal",
    "is_experts",
    "is_transposed",
    "run_experts",
]


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a fused experts module that says what it is, or shows it by its
    structure, and can be served.
    """
    form = form_of(module)
    if form is None or not hasattr(module, "num_experts"):
        return False
    held = module._parameters
    first = "gate_up_proj" if form.has_gate else "up_proj"
    return (
        held.get("down_proj") is not None
        and held.get(first) is not None
        and not experts_refusal(module)
    )


def experts_refusal(module: nn.Module) -> str:
    """Return the reason why an experts module's weights cannot be edited or packed, and what to do.

    The reason is "" for a supported module, and for modules that hold no experts.
    """
    cls = base_class(module)
    own = {n: p for n, p in module._parameters.items() if p is not None}
    form = form_of(module)
    named = "expert" in cls.__name__.lower() and not isinstance(module, nn.Linear)
    if form is None and not (named and any(p.dim() > 1 for p in own.values())):
        return ""
    held = held_tensors(module)
    foreign = [
        f"{n} in {str(p.dtype).removeprefix('torch.')}"
        for n, p in own.items()
        if n not in held and (p.element_size() == 1 or not p.is_floating_point())
    ]
    if foreign:
        return (
            f"experts that another library quantised ({cls.__name__}: {', '.join(foreign[:3])}); "
            "load the checkpoint with lightning_peft.load_packed, or dequantised with "
            "quantization='nf4'"
        )
    leave = "leave them frozen with exclude_modules, or train them whole with modules_to_save"
    if form is None:
        shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in list(own.items())[:4])
        return f"experts in a form that is not known ({cls.__name__}: {shapes}); {leave}"
    weights = {"gate_up_proj" if form.has_gate else "up_proj", "down_proj"}
    known = weights | set(held) | ({f"{n}_bias" for n in weights} if form.has_bias else set())
    extra = sorted(set(own) - known)
    if extra:
        return (
            f"experts with further parameters {extra} ({cls.__name__}), whose meaning is not "
            f"known; {leave}"
        )
    return ""


class ExpertsOps(MatrixOps):
    """Canonical weights [E, out, in] of gate_up_proj (or up_proj) and down_proj."""

    is_linear = True

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Return the names of the weights, in the order in which the module defines them."""
        wanted = {first_weight(m), "down_proj"}
        return tuple(n for n in m._parameters if n in wanted)

    def weight_layout(self, m: nn.Module) -> WeightLayout | None:
        """Two stacks of one orientation."""
        names = tuple(self.parameters(m))
        return WeightLayout(names, is_transposed(m), QuantizedExperts, QuantizedExperts)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """[E, out], where there is one."""
        return f"{name}_bias" if has_bias(m) else None

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """[E, out, in]."""
        return torch.Size((natural[0], natural[2], natural[1])) if is_transposed(m) else natural

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """A view."""
        return W.mT if is_transposed(m) else W

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """A view."""
        return M.mT if is_transposed(m) else M

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale), per expert where the scale is."""
        return M * scale.unsqueeze(-2)

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[WeightAdapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The experts' function with every edit on its weight."""
        return run_experts(m, adapters, _inputs(m, args, kwargs))


class QuantizedExperts(PackedForward):
    """Mixin: fused experts over any storage, and over those of another library."""

    _swap_prefix = "Quantized"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts on packed weights."""
        with backend_scope(self):
            return run_experts(self, (), _inputs(self, args, kwargs))


def _inputs(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments in the order of the module's own forward, keyword arguments too."""
    if not kwargs:
        return args
    names = list(inspect.signature(base_class(m).forward).parameters)[1:]
    return (*args, *(kwargs[n] for n in names[len(args) :] if n in kwargs))
