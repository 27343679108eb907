"""Forward of an `nn.MultiheadAttention` with the prefixes of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.prompt.gating import prefix_method, refuse_rows
from lightning_peft.layers.prompt.multihead_attention import attend, batch_of
from lightning_peft.layers.prompt.prompt import prompt_of

__all__ = ["forward_attention"]


def forward_attention(
    module: nn.MultiheadAttention, adapters: Sequence[PromptAdapter], arguments: dict[str, Any]
) -> Any:
    """Run one `nn.MultiheadAttention` with a prefix."""
    query = arguments["query"]
    refuse_rows(adapters)
    batch = batch_of(module, query)
    prefix = prompt_of(adapters, batch, query.device)
    if prefix is None:
        nothing = query.new_zeros(batch, 0, 2 * module.embed_dim)
        return attend(module, arguments, nothing, None)
    if any(getattr(a.method, "gating", False) for a in adapters):
        prefix.values = prefix.values * _gates_in_attention(module, adapters, query)
    return attend(module, arguments, prefix.values, prefix.mask)


def _gates_in_attention(
    module: nn.MultiheadAttention, adapters: Sequence[PromptAdapter], query: Tensor
) -> Tensor:
    """Return the factors of the prefix, [B, n, 1]."""
    x = query.unsqueeze(0) if query.dim() == 2 else query
    x = x if module.batch_first or query.dim() == 2 else x.transpose(0, 1)
    parts = []
    for adapter in reversed(adapters):
        method = prefix_method(adapter)
        gate = x.new_ones(x.shape[0], 1)
        if method.gating:
            gate = method.gate(adapter.block, 0, x)
        parts.append(gate.expand(-1, method.n))
    return torch.cat(parts, dim=1).unsqueeze(-1)
