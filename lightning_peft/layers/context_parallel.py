"""Context parallelism: ranks of a group share a sequence, and each attends from its own tokens.

Rank r of c holds tokens r S/c to (r + 1) S/c. In every attention layer the keys and values of all
ranks are gathered, and queries stay where they are. Activations are a c-th of the sequence's; keys
and values of one layer are complete while that layer runs.

torch's own `context_parallel` has no rule for attention on the CPU (torch 2.13), and replaces
`scaled_dot_product_attention` for the whole process. Here the model's own attention interface is
used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lightning_peft.core.modules import modules_by_name
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = ["ContextParallel"]

_NAME = "lightning_peft_context"
_ATTRIBUTE = "_peft_context"
_IGNORED = -100  # label of a token without a loss


# torch 2.13 renamed the two.
_Collective = Callable[..., object]
_all_gather: _Collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: _Collective = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class _GatherContext(FunctionCtx):
    """What `_Gather` keeps for backward."""

    group: dist.ProcessGroup
    shape: torch.Size


class _Gather(torch.autograd.Function):
    """[B, H, S/c, D] of every rank → [c, B, H, S/c, D]; backward sums the ranks' gradients."""

    @staticmethod
    def forward(ctx: _GatherContext, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        size = dist.get_world_size(group)
        out = x.new_empty((size * x.shape[0], *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=group)
        return out.view(size, *x.shape)

    @staticmethod
    def backward(ctx: _GatherContext, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].flatten(0, 1).contiguous()
        out = grad.new_empty(ctx.shape)
        _reduce_scatter(out, grad, group=ctx.group)
        return out, None


class ContextParallel:
    """Splits the sequences of one causal language model of Hugging Face over a group of ranks.

    Give the model ``labels``: its loss is that of the complete sequences, on every rank. Logits and
    hidden states are those of the rank's own tokens.

    Args:
        model: The model, with adapters attached.
        group: The process group.

    Raises:
        ValueError: a model whose attention cannot be split, by its class.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup) -> None:
        _check(model)
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._signature = inspect.signature(model.forward)
        _register()
        model.set_attn_implementation(_NAME)
        for module in modules_by_name(model).values():
            if hasattr(module, "is_causal") or type(module).__name__.endswith("Attention"):
                vars(module)[_ATTRIBUTE] = self
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave)

    def _enter(
        self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        _refuse(given)
        tokens = next(given[k] for k in ("input_ids", "inputs_embeds") if given.get(k) is not None)
        length = tokens.shape[1]
        if length % self.size:
            raise ValueError(
                f"context_parallel={self.size}: expected sequences whose length is a multiple of "
                f"{self.size}, got {length} tokens; pad or cut the batch (padding at the end gets "
                f"the label {_IGNORED})"
            )
        own = slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)
        for key in ("input_ids", "inputs_embeds"):
            if given.get(key) is not None:
                given[key] = given[key][:, own]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        given |= {"position_ids": positions[:, own], "attention_mask": None, "use_cache": False}
        labels = given.get("labels")
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
            count = given.get("num_items_in_batch")
            count = (shifted != _IGNORED).sum() if count is None else count
            # Gradients are averaged over ranks, so each part counts as often as there are parts.
            given |= {
                "labels": labels[:, own],
                "shift_labels": shifted[:, own].contiguous(),
                "num_items_in_batch": torch.as_tensor(count, device=labels.device) / self.size,
            }
        return (), given

    def _leave(self, model: nn.Module, args: object, output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if loss is None:
            return output
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        output["loss"] = loss + (total / self.size - loss).detach()
        return output

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attend from own queries [B, H, S/c, D] to the keys of all earlier tokens."""
        heads = q.shape[1] // k.shape[1]
        k, v = (self._complete(t)[:, :, : (self.rank + 1) * q.shape[2]] for t in (k, v))
        if heads > 1:
            k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
        mask = _lower_right(q.shape[2], k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)

    def _complete(self, t: Tensor) -> Tensor:
        gather: Callable[..., Tensor] = _Gather.apply
        parts = gather(t, self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the causal mask of the last queries: a tensor, or what flash attention knows."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        bias: Tensor = causal_lower_right(queries, keys)
        return bias
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; [B, H, S, D] → [B, S, H, D]."""
    context: ContextParallel | None = vars(module).get(_ATTRIBUTE)
    special = [n for n in ("sliding_window", "softcap", "s_aux") if others.get(n) is not None]
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if context is None or special or not causal or attention_mask is not None:
        found = special or ["a mask" if attention_mask is not None else "no causal order"]
        raise ValueError(
            f"context_parallel on {type(module).__name__}: expected plain causal attention, got "
            f"{', '.join(found)}; leave context_parallel=1"
        )
    out = context.attend(query, key, value, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: object, **kwargs: object) -> None:
    """The mask function that transformers calls: masks are formed in `attend`."""


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)


def _check(model: nn.Module) -> None:
    config, kind = getattr(model, "config", None), type(model).__name__
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    reasons = {
        "a causal language model": not any(
            c.__name__.endswith(("ForCausalLM", "LMHeadModel")) for c in type(model).__mro__
        ),
        "a decoder": bool(getattr(config, "is_encoder_decoder", False)),
        "one text model": getattr(config, "text_config", None) is not None,
        "full attention in every layer": layers != {"full_attention"},
        "transformers' attention interface": not getattr(model, "_supports_attention_backend", 0)
        or not hasattr(model, "set_attn_implementation"),
        "no auxiliary loss of a router": bool(getattr(config, "output_router_logits", False)),
    }
    missing = [rule for rule, broken in reasons.items() if broken]
    prompts = [
        adapter.method.label
        for _, adapted in adapted_modules(model)
        for adapter in adapters_of(adapted)
        if isinstance(adapter, PromptAdapter)
    ]
    if missing or prompts:
        rules = missing or ["adapters that keep the sequence's length"]
        got = sorted(set(prompts)) or [kind]
        raise ValueError(
            f"context_parallel on {kind}: expected {' and '.join(rules)}, got {', '.join(got)}; "
            "leave context_parallel=1"
        )


def _refuse(given: dict[str, Any]) -> None:
    """Raise for inputs whose parts cannot be attended to separately."""
    mask = given.get("attention_mask")
    if mask is not None and not (mask.ndim == 2 and bool((mask != 0).all())):
        raise ValueError(
            f"context_parallel: expected sequences without padding, got an attention mask "
            f"{list(mask.shape)} with zeros; pack sequences to one length, or pad at the end, "
            f"leave the mask out and give these tokens the label {_IGNORED}"
        )
    if given.get("past_key_values") is not None:
        raise ValueError(
            "context_parallel: expected complete sequences, got past_key_values; generate with "
            "context_parallel=1"
        )
