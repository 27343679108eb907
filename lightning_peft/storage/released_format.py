"""A quantised format as released checkpoints hold it: its configurations, names and tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout
from torch import nn

__all__ = ["DeclaredTensor", "DeclaredWeight", "ReleasedFormat", "ReleasedWeight"]


@dataclass(frozen=True)
class ReleasedWeight:
    """One weight of a model, with what is known of the checkpoint that may hold it.

    Attributes:
        layer: Name of the layer in the model.
        name: Name of the weight in the layer.
        shape: Canonical shape, [out, in] or [experts, out, in].
        config: The checkpoint's ``quantization_config``.
        dtypes: Dtype of the tensors in the files by the last part of their name; empty where there
            are no files.
    """

    layer: str
    name: str
    shape: torch.Size
    config: Mapping[str, Any]
    dtypes: Mapping[str, torch.dtype]

    @property
    def experts(self) -> tuple[int, ...]:
        """(experts,) of a stack, () of one matrix."""
        return tuple(self.shape[:-2])

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return self.shape[-2], self.shape[-1]

    @property
    def halves(self) -> int:
        """2 if gate and up are one tensor, else 1."""
        return 2 if self.name == "gate_up_proj" else 1


class DeclaredTensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        key: Its name in the module.
        shape: Its shape.
        dtype: Its dtype.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class DeclaredWeight:
    """The tensors of a checkpoint that hold one weight.

    Attributes:
        layout: Meaning of the codes.
        tensors: Role → tensor.
    """

    layout: BlockLayout
    tensors: Mapping[str, DeclaredTensor]


class ReleasedFormat(ABC):
    """How the files of a format are read by `load_packed`."""

    #: ``quant_method`` of the configurations whose checkpoints `load_packed` reads.
    quant_methods: tuple[str, ...] = ()
    #: Weight of a layer → names of the tensors that hold it in a file.
    file_names: Mapping[str, Sequence[str]] = MappingProxyType({})
    #: (pattern, replacement) of further names in files.
    renamings: Sequence[tuple[str, str]] = ()
    #: What files add to the name of a weight for its codes.
    codes_suffix: str = ""
    #: For tensors whose last axis is that of outputs: name in a linear layer → name in its files.
    outputs_last: Mapping[str, str] = MappingProxyType({})

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether `declare` knows this ``quantization_config``."""
        return config.get("quant_method") in self.quant_methods

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """Patterns of layers that the checkpoint holds densely; None if it does not list them."""
        skip: Sequence[str] | None = config.get("modules_to_not_convert")
        return skip

    @abstractmethod
    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """The tensors of one weight in a checkpoint; None if it is dense there.

        Raises:
            ValueError: a setting of the configuration that is not known.
        """

    def repack(self, m: nn.Module, name: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Bring tensors as they were read into the form that the storage holds; in place.

        Args:
            m: The layer.
            name: The weight.
            keys: Role → name of each declared tensor.

        Returns:
            Role → name of each tensor that is held.

        Raises:
            ValueError: values that the form cannot hold.
        """
        return dict(keys)
