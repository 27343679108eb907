"""LSTM, GRU and RNN: edits on the matrices that the recurrent kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.layers.example_inputs import random_inputs
from lightning_peft.layers.opaque import WeightsOps

__all__ = ["RecurrentOps"]


class RecurrentOps(WeightsOps):
    """LSTM, GRU, RNN: every weight_ih and weight_hh (and weight_hr of a projected LSTM)."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """All matrices, layer by layer."""
        return tuple(
            n for n, p in m._parameters.items() if n.startswith("weight_") and p is not None
        )

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """Two samples of three positions."""
        if base_class(m).forward not in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward):
            return None
        weight = next(iter(m._parameters.values()))
        width = int(cast(nn.RNNBase, m).input_size)
        return None if weight is None else random_inputs(m, weight.dtype, (2, 3, width))

    def bias(self, m: nn.Module, name: str) -> str | None:
        """bias_ih for weight_ih and so on."""
        path = name.replace("weight_", "bias_")
        return path if m._parameters.get(path) is not None else None

    @contextmanager
    def substituted(self, m: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Shadow the edited weights, also in the flat list that the kernels take.

        The list's weak references are blanked meanwhile: otherwise the module would notice unknown
        tensors and rebuild the list from its attributes.
        """
        with super().substituted(m, tensors):
            attributes = vars(m)
            before = {k: attributes[k] for k in ("_flat_weights", "_flat_weight_refs")}
            attributes["_flat_weights"] = [getattr(m, n) for n in m._flat_weights_names]
            attributes["_flat_weight_refs"] = [None] * len(m._flat_weights_names)
            try:
                yield
            finally:
                attributes.update(before)
