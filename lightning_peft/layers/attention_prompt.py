"""Trained positions in self-attention, with a softmax and a factor of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.per_thread import PerThread
from lightning_peft.core.site import BlockSite
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.block import BlockAdapter
from lightning_peft.layers.mixed_batch import current_mixed_batch

if TYPE_CHECKING:
    from lightning_peft.methods.base import BlockMethod

__all__ = ["AttentionPromptAdapter", "why_no_attention_prompt"]

_KNOWN = ("gpt2", "llama", "mistral", "qwen2")


def why_no_attention_prompt(attention: nn.Module, model_type: str) -> str:
    """Return the reason why a self-attention module takes no prompt with its own softmax, or ""."""
    if model_type not in _KNOWN:
        return f"expected one of {', '.join(_KNOWN)}, got {model_type}"
    if getattr(attention, "is_cross_attention", False):
        return "expected self-attention, got cross-attention"
    return ""


def _nothing() -> None:
    return None


class AttentionPromptAdapter(BlockAdapter):
    """out + W_o (g · softmax(q K_Pᵀ / √d) V_P); K_P, V_P are projections of the positions P.

    The queries are those that the attention computes itself: a hook on their projection keeps them.
    They carry their rotary position, the keys of P none.
    """

    def __init__(self, method: BlockMethod, site: BlockSite, adapter_name: str) -> None:
        super().__init__(method, site, adapter_name)
        self.queries: PerThread[Tensor | None] = PerThread(_nothing)
        attention: Any = site.module
        self.is_fused = hasattr(attention, "c_attn")
        projection = attention.c_attn if self.is_fused else attention.q_proj
        self.query_hook = projection.register_forward_hook(self._keep_queries)

    def _keep_queries(self, module: nn.Module, args: object, y: Tensor) -> None:
        if self in acting_adapters(self.site.module).blocks:
            self.queries.set(y)

    def tensors(self) -> dict[str, Tensor]:
        """The positions and their factor by the method's own names."""
        own: dict[str, Any] = {**self.block._parameters}
        return own

    @property
    def has_hooks(self) -> bool:
        """The projection of the queries has one."""
        return True

    def remove_hooks(self) -> None:
        """Remove it."""
        self.query_hook.remove()

    def join(
        self, x: Tensor, y: Any, again: Callable[[Tensor], Any], arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Output of the attention with what the positions add."""
        hidden: Tensor = y[0] if isinstance(y, tuple) else y
        q = self.queries.take()
        if q is None:
            raise RuntimeError(
                f"{self.site.label}: expected an attention that calls its projection of queries, "
                "found that it did not; use PrefixTuning"
            )
        mix, rows = current_mixed_batch(), None
        if mix is not None:
            rows = mix.index(self.adapter_name, hidden.shape[0], hidden.device)
        change = self._added(q, arguments.get("position_embeddings"), rows).to(hidden.dtype)
        if rows is not None:
            change = torch.zeros_like(hidden).index_copy(0, rows, change)
        out = hidden + change
        return x, (out, *y[1:]) if isinstance(y, tuple) else out

    def _added(
        self, q: Tensor, rotary: tuple[Tensor, Tensor] | None, rows: Tensor | None
    ) -> Tensor:
        m: Any = self.site.module
        P, g = self.method.attention_prompt(self.block)
        P = P.to(q.dtype)
        if self.is_fused:
            width = q.shape[-1] // 3
            q, (_, k, v) = q[..., :width], m.c_attn(P).split(width, dim=-1)
        else:
            k, v = m.k_proj(P), m.v_proj(P)
        self.queries.take()  # the hook saw P
        q = q if rows is None else q[rows]
        q, k, v = (t.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            cos, sin = (t if rows is None or len(t) == 1 else t[rows] for t in rotary)
            half = q.shape[-1] // 2
            turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
            q = q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.mT / m.head_dim**0.5).softmax(-1, dtype=torch.float32)
        added: Tensor = ((g * scores).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        if not self.is_fused:
            added = m.o_proj(added)
        return added
