"""A prefix in `nn.MultiheadAttention`: trained keys and values before those of the text.

The module's own function checks masks against the text's length before it adds keys of its own, so
attention is computed here from the module's weights (as they are at this moment: other adapters'
edits included).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["attend", "batch_of", "refusal"]


def batch_of(module: nn.MultiheadAttention, query: Tensor) -> int:
    """Number of rows of a query."""
    if query.dim() == 2:
        return 1
    return query.shape[0 if module.batch_first else 1]


def attend(
    module: nn.MultiheadAttention, call: Mapping[str, Any], values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run the module with prefix `values` [B, n, 2 · embed_dim] and its mask [B, n]."""
    query, key, value = call["query"], call["key"], call["value"]
    single = query.dim() == 2
    if single:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    elif not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = _projected(module, query, key, value)
    heads, features = module.num_heads, module.head_dim
    P = values.to(k.dtype)
    k = torch.cat([P[..., : module.embed_dim], k], dim=1)
    v = torch.cat([P[..., module.embed_dim :], v], dim=1)
    q, k, v = (t.unflatten(-1, (heads, features)).transpose(1, 2) for t in (q, k, v))
    bias = _mask(call, q.shape[0], heads, q.shape[2], key.shape[1], q)
    if bias is not None or mask is not None:
        front = q.new_zeros(q.shape[0], 1, 1, values.shape[1])
        if mask is not None:
            front = front.masked_fill(mask[:, None, None] == 0, -math.inf)
        text = q.new_zeros(1, 1, 1, key.shape[1]) if bias is None else bias
        shape = (q.shape[0], max(text.shape[1], 1), max(text.shape[2], 1))
        bias = torch.cat([front.expand(*shape, -1), text.expand(*shape, -1)], dim=-1)
    p = module.dropout if module.training else 0.0
    weights = None
    if call.get("need_weights", True):
        scores = q @ k.mT / math.sqrt(features)
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        y = F.dropout(weights, p) @ v
        weights = weights[..., values.shape[1] :]  # of the text
        if call.get("average_attn_weights", True):
            weights = weights.mean(dim=1)
    else:
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p)
    y = y.transpose(1, 2).flatten(-2)
    y = F.linear(y, module.out_proj.weight, module.out_proj.bias)
    if single:
        return y[0], None if weights is None else weights[0]
    return (y if module.batch_first else y.transpose(0, 1)), weights


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(x, W, b) for x, W, b in zip((query, key, value), weights, biases, strict=True)]


def _mask(
    call: Mapping[str, Any], batch: int, heads: int, queries: int, keys: int, like: Tensor
) -> Tensor | None:
    """Both masks as one addend [B or 1, heads or 1, queries or 1, keys]; None without any."""
    bias = _addend(call.get("attn_mask"), like)
    if bias is not None:
        bias = bias.view(batch, heads, queries, keys) if bias.dim() == 3 else bias[None, None]
    elif call.get("is_causal"):
        ones = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
        bias = _addend(ones.triu(1), like)[None, None]  # type: ignore[index]
    padding = _addend(call.get("key_padding_mask"), like)
    if padding is not None:
        padding = padding.view(-1, 1, 1, keys)
        bias = padding if bias is None else bias + padding
    return bias


def _addend(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """True means: not attended to."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask.bool(), -math.inf)


def refusal(module: nn.Module) -> str:
    """Return the reason why a module takes no prefix, or ""."""
    if not isinstance(module, nn.MultiheadAttention):
        return f"it is a {type(module).__name__}, whose keys and values are not known"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own"
    if module.kdim != module.embed_dim or module.vdim != module.embed_dim:
        return "its keys and values have another width"
    return ""
