"""Peft's layout of a layer with one matrix, and the refusal of unknown kinds.

Several methods take `axes`, the meaning of a tensor's axes in the method's table: ``"down"`` [r,
in], ``"up"`` [out, r], ``"out"`` [out], ``"in"`` [channels], ``"vector"`` [out, 1] or [1,
channels], and ``""`` for axes that are equal in every layer kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.modules import is_conv1d
from lightning_peft.core.protocols import LayerOps

__all__ = ["M", "MatrixLayout", "UnknownLayout", "is_before"]

#: The module class that a layout serves.
M = TypeVar("M", bound=nn.Module)


class MatrixLayout(Generic[M]):
    """Layout of one module in a peft file. The defaults are those of a plain matrix.

    Attributes:
        ops: How an Edit acts on the module.
        module: The module.
        peft_version: Version that a file that is read is from; None for the one written here.
    """

    peft_version: str | None = None

    def __init__(self, ops: LayerOps, module: M) -> None:
        self.ops = ops
        self.module = module

    @property
    def kind(self) -> str:
        """The layer kind in peft's words."""
        if self.ops.is_embedding:
            return "Embedding"
        return "Conv1D" if is_conv1d(self.module) else "Linear"

    @property
    def geometry(self) -> Mapping[str, str]:
        """Options of the layer that not every type of peft follows → what peft does instead."""
        return {}

    @property
    def note(self) -> str:
        """Note on how a file of `peft_version` is read, if versions of peft differ; else ""."""
        return ""

    def refusal(self, name: str) -> str:
        """Return the reason why no peft file can hold an adapter of this weight, or ""."""
        return ""

    def nested_paths(self, adapted: Sequence[str]) -> dict[str, str]:
        """Map each weight to the path below the module that its tensors have in a file.

        The path is "" for the module itself, and for instance ``"base_layer.out_proj"`` if peft's
        wrapper lies between.

        Args:
            adapted: All weights of the module that carry this adapter. Peft nests one wrapper per
                weight, so the paths depend on the set.
        """
        return dict.fromkeys(adapted, "")

    def weights_by_path(
        self, found: Mapping[str, Mapping[str, Tensor]], named: Sequence[str] = ()
    ) -> dict[str, str]:
        """Map each path below the module to its weight, from the content of a file.

        Args:
            found: Path → tensors by their names in the file, still in the file's shapes.
            named: Weights of the module that the config names one by one.

        Raises:
            ValueError: a path that this kind of layer does not have.
        """
        weights = self.ops.parameters(self.module)
        paths = {path: name for name, path in self.nested_paths(weights).items()}
        unknown = sorted(set(found) - set(paths))
        if unknown:
            raise ValueError(
                f"{type(self.module).__name__}: expected tensors at {sorted(paths)} below the "
                f"module, got {unknown}"
            )
        return {path: paths[path] for path in found}

    @property
    def adapts_all_weights(self) -> bool:
        """True if peft adapts all weights of the module at once, and warns of missing ones."""
        return False

    def is_target_parameter(self, name: str) -> bool:
        """True if the config names this weight under ``target_parameters``."""
        return False

    def swaps_factors(self, name: str, *, by_weight: bool = False) -> bool:
        """True if peft reads the weight as its transpose, so that ΔW = B A is (Bᵀ)(Aᵀ) there.

        Named as a parameter, GPT-2's Conv1D [in, out] and an embedding [vocabulary, out] are
        matrices like any other for peft.
        """
        return by_weight and (self.ops.is_embedding or is_conv1d(self.module))

    def config_rank(self, name: str, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        return r

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Convert a tensor from canonical axes to peft's shape."""
        return t

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Convert a tensor from peft's shape to canonical axes.

        Raises:
            ValueError: the shape or the content has no canonical equal; says what was expected.
        """
        if axes == "vector":
            if t.ndim != 2 or 1 not in t.shape:
                raise ValueError(f"expected shape [n, 1] or [1, n], got {list(t.shape)}")
            return t
        ndim = {"down": 2, "up": 2, "out": 1}.get(axes)
        if ndim is not None and t.ndim != ndim:
            raise ValueError(f"expected {ndim} axes, got shape {list(t.shape)}")
        return t


def is_before(version: str | None, other: tuple[int, int]) -> bool:
    """True if a version (None for the one written here) is before `other`, as (0, 22)."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "0.0")
    return numbers is None or (int(numbers[1]), int(numbers[2])) < other


class UnknownLayout(MatrixLayout[nn.Module]):
    """Layout of a layer kind added from outside: peft files refuse it."""

    def refusal(self, name: str) -> str:
        """Peft's shapes for this kind are not known."""
        return f"no Hugging Face layout for {base_class(self.module).__name__}"
