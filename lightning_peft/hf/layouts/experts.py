"""Peft's layout of fused experts and routers, which it adapts as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.hf.layouts.base import MatrixLayout
from lightning_peft.hf.layouts.nested import NestedLayout
from lightning_peft.layers.experts.structure import expert_count, is_presorted
from lightning_peft.storage import storage_of

__all__ = ["ExpertsLayout", "RouterLayout", "stack_from_peft", "stack_to_peft"]


def stack_to_peft(axes: str, t: Tensor) -> Tensor:
    """A [E, r, in] → [E·r, in] expert-major; B [E, out, r] → [out, r·E] rank-major."""
    if axes == "down":
        return t.reshape(-1, t.shape[-1])
    return t.permute(1, 2, 0).reshape(t.shape[1], -1) if axes == "up" else t


def stack_from_peft(axes: str, t: Tensor, E: int) -> Tensor:
    """Inverse of `stack_to_peft` for E experts.

    Raises:
        ValueError: no matrix, or a rank axis that is no multiple of E.
    """
    if t.ndim != 2 or t.shape[0 if axes == "down" else 1] % E:
        raise ValueError(
            f"expected a matrix whose rank axis is a multiple of {E} experts, got {list(t.shape)}"
        )
    if axes == "down":
        return t.reshape(E, -1, t.shape[1])
    return t.reshape(t.shape[0], -1, E).permute(2, 0, 1)


class ExpertsLayout(NestedLayout):
    """Fused experts: A [r·E, in] expert-major, B [out, r·E] rank-major."""

    @property
    def kind(self) -> str:
        """``"experts"``."""
        return "experts"

    def swaps_factors(self, name: str, *, by_weight: bool = False) -> bool:
        """True for Llama 4: peft reads its [E, in, out] as [E, out, in]."""
        return is_presorted(self.module)

    def weights_by_path(
        self, found: Mapping[str, Mapping[str, Tensor]], named: Sequence[str] = ()
    ) -> dict[str, str]:
        """Map path to weight; a single path is recognised by the shapes of its factors."""
        names = self.ops.parameters(self.module)
        if len(found) == len(names):
            paths = {path: name for name, path in self.nested_paths(names).items()}
            if set(paths) == set(found):
                return paths
        if set(found) == {""}:
            shapes = {k: t.shape for k, t in found[""].items()}
            for name in names:
                if self._fits(name, shapes):
                    return {"": name}
        raise ValueError(
            f"{type(self.module).__name__}: expected tensors of {list(names)} at "
            f"{list(self.nested_paths(names).values())}, got places {sorted(found)} whose shapes "
            "fit none of them"
        )

    def _fits(self, name: str, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether a file's A and B are factors of this weight."""
        natural = storage_of(self.module, name).shape(self.module, name)
        E, out, width = self.ops.shape(self.module, name, natural)
        if self.swaps_factors(name):
            out, width = width, out
        A = next((s for k, s in shapes.items() if "lora_A" in k), None)
        B = next((s for k, s in shapes.items() if "lora_B" in k), None)
        if A is None or B is None:
            return False
        return A[1] == width and B[0] == out and A[0] % E == 0

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """A [E, r, in] → [E·r, in] expert-major; B [E, out, r] → [out, r·E] rank-major."""
        if t.ndim == 2:  # one adapter shared by all experts: repeat it
            t = t.expand(expert_count(self.module), *t.shape)
        return stack_to_peft(axes, t)

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Inverse of `to_peft`."""
        return stack_from_peft(axes, t, expert_count(self.module))


class RouterLayout(MatrixLayout[nn.Module]):
    """A router that is no `nn.Linear`: one matrix, adapted as a parameter."""

    @property
    def kind(self) -> str:
        """``"router"``."""
        return "router"

    def is_target_parameter(self, name: str) -> bool:
        """Always: a router is no layer that peft knows."""
        return True
