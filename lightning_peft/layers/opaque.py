"""Modules whose forward reads its weights itself: MultiheadAttention, LSTM, GRU, RNN, routers.

The class of the reader is swapped, and around its own forward each weight is shadowed by W'. Keys
stay as they are (`torch.nn.utils.parametrize` would rename them). An edit that needs the input
(dropout, rows under different adapters) has no meaning here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import apply_edits
from lightning_peft.core.modules import own_tensor
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["WeightsOps"]


class WeightsOps(MatrixOps):
    """Edits on the weight, for a reader of any number of [out, in] weights."""

    is_opaque = True

    on_activations = frozenset()

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[WeightAdapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's own forward, reading W' and b'."""
        if current_mixed_batch() is not None:
            raise ValueError(
                f"{adapters[0].site.name}: expected a layer whose rows can be told apart, got "
                f"{type(m).__name__}, whose adapters act on the weight; run the adapters one after "
                "the other"
            )
        with self.substituted(m, self.edited(m, adapters)):
            return run(*args, **kwargs)

    def edited(self, m: nn.Module, adapters: Sequence[WeightAdapter]) -> dict[str, Tensor]:
        """W' (and b' where it differs) by path, in the dtype of the weights."""
        by_weight: dict[str, list[WeightAdapter]] = {}
        for adapter in adapters:
            by_weight.setdefault(adapter.site.parameter, []).append(adapter)
        tensors: dict[str, Tensor] = {}
        for path, group in by_weight.items():
            site = group[0].site
            edits = [a.edit() for a in group]
            copy = own_tensor(*_owner(m, path)) if _is_covered(m, path) else None
            start = None if copy is None else self.to_canonical(m, path, copy)
            W = apply_edits(site, edits, start).to(site.dtype)
            tensors[path] = self.from_canonical(m, path, W)
            b_path = self.bias(m, path)
            b = None if b_path is None else _attribute(m, b_path)
            edited = b
            for e in edits:
                edited = e.edited_bias(edited)
            if edited is not b and edited is not None:
                if b_path is None:
                    raise ValueError(
                        f"{site.label}: expected a bias to edit, got a layer without one; exclude "
                        "it"
                    )
                tensors[b_path] = edited.to(site.dtype)
        return tensors


def _owner(m: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, leaf = path.rpartition(".")
    return (m.get_submodule(owner) if owner else m), leaf


def _is_covered(m: nn.Module, path: str) -> bool:
    """Whether the forward reads a trained copy in place of the parameter."""
    owner, leaf = _owner(m, path)
    return leaf in vars(owner)


def _attribute(m: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    value = getattr(m.get_submodule(owner) if owner else m, leaf)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(m).__name__}.{path}: expected a tensor, got {type(value).__name__}")
    return value
