"""Embeddings: weight [vocabulary, dim]; canonical [dim, vocabulary], the input being a one-hot
row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.pruning_masks import held
from lightning_peft.core.replaced_rows import ReplacedRows
from lightning_peft.layers.base import MatrixOps

__all__ = ["EmbeddingOps", "has_other_rows"]


class EmbeddingOps(MatrixOps):
    """`nn.Embedding` and subclasses that multiply their output by ``embed_scale`` (Gemma, BART)."""

    on_activations = frozenset({"out_scale", "replaced"})
    is_embedding = True

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """The first ids."""
        weight = held(m, "weight")
        if weight.device.type == "meta" or hasattr(weight, "to_local"):
            return None
        return (torch.arange(min(8, weight.shape[0]), device=weight.device),)

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical [dim, vocabulary]."""
        return torch.Size((natural[1], natural[0]))

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Transposed view."""
        return W.mT

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Transposed view."""
        return M.mT

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Rows of another table."""
        y: Tensor = F.embedding(x, W, _padding(m)) * _output_scale(m, W.dtype)
        return y

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """Rows of Aᵀ [vocabulary, r], then B."""
        h = F.embedding(x, A.mT, _padding(m)) * scaling
        y: Tensor = F.linear(h, B) * _output_scale(m, B.dtype)
        return y

    def put_replaced(
        self, m: nn.Module, x: Tensor, y: Tensor, replaced: ReplacedRows, b: Tensor | None
    ) -> Tensor:
        """Look the replaced tokens up in their own rows, in the dtype of the output."""
        ids, rows = replaced.ids, replaced.rows.to(y.dtype)
        padding = _padding(m)
        if padding is not None:  # the padding row takes no gradient here, as in nn.Embedding
            rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
        at = torch.searchsorted(ids, x.to(ids.dtype)).clamp(max=len(ids) - 1)
        found = F.embedding(at, rows) * _output_scale(m, y.dtype)
        return torch.where((ids[at] == x).unsqueeze(-1), found.to(y.dtype), y)

    def per_output(self, m: nn.Module, v: Tensor) -> Tensor:
        """[dim]."""
        return v


def has_other_rows(m: nn.Module) -> bool:
    """Whether an embedding returns something else than rows of its weight, scaled.

    Tables of positions shift or count what they are given (OPT, BART), others normalise the rows.
    """
    if not isinstance(m, nn.Embedding) or type(m) is not base_class(m):
        return False
    weight = held(m, "weight")
    table = tuple(weight.shape) == (m.num_embeddings, m.embedding_dim)
    if type(m).forward is nn.Embedding.forward or not (table and weight.is_floating_point()):
        return False
    ids = EmbeddingOps().example_inputs(m)
    if ids is None:
        return False
    try:
        with torch.no_grad():
            y = type(m).forward(m, ids[0][None])
            want = EmbeddingOps().functional(m, ids[0][None], weight, None)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return True
    return y.shape != want.shape or not torch.allclose(y.float(), want.float(), rtol=1e-2)


def _output_scale(m: nn.Module, dtype: torch.dtype) -> Any:
    scale = getattr(m, "embed_scale", 1.0)
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def _padding(m: nn.Module) -> int | None:
    return cast(nn.Embedding, m).padding_idx
