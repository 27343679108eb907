"""Peft's layout of parameters that a module of no known kind holds itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_peft.hf.layouts.experts import stack_from_peft, stack_to_peft
from lightning_peft.hf.layouts.nested import NestedLayout
from lightning_peft.storage import storage_of

__all__ = ["ParametersLayout"]


class ParametersLayout(NestedLayout):
    """A matrix has the layout of a linear layer, a stack that of experts."""

    @property
    def kind(self) -> str:
        """``"parameter"``."""
        return "parameter"

    def refusal(self, name: str) -> str:
        """A stack of one, which peft adds to as if it were [out, in]."""
        shape = storage_of(self.module, name).shape(self.module, name)
        return "peft takes a stack of one for a matrix" if len(shape) == 3 and shape[0] == 1 else ""

    def weights_by_path(
        self, found: Mapping[str, Mapping[str, Tensor]], named: Sequence[str] = ()
    ) -> dict[str, str]:
        """Map path to weight; the config says which weights, their order says where."""
        paths = {path: name for name, path in self.nested_paths(named).items()}
        if set(paths) != set(found):
            raise ValueError(
                f"{type(self.module).__name__}: expected tensors at {sorted(paths)} for the "
                f"parameters {list(named)} of target_parameters, got them at {sorted(found)}"
            )
        return paths

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """A stack in experts' order."""
        return stack_to_peft(axes, t) if t.ndim == 3 else t

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Inverse of `to_peft`."""
        shape = storage_of(self.module, name).shape(self.module, name)
        if len(shape) == 3:
            return stack_from_peft(axes, t, shape[0])
        return super().from_peft(name, axes, t)
