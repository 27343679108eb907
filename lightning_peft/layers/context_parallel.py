"""Context parallelism: ranks of a group share a sequence, and each attends from its own tokens.

Rank r of c holds tokens r S/c to (r + 1) S/c. In every attention layer the keys and values of all
ranks are gathered, and queries stay where they are. Activations are a c-th of the sequence's; keys
and values of one layer are complete while that layer runs, and while it runs backward.

torch's own `context_parallel` has no rule for attention on the CPU (torch 2.13), and replaces
`scaled_dot_product_attention` for the whole process. Here the model's own attention interface is
used.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.modules import modules_by_name
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.gathered_sequence import gather_sequence, saving_parts
from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = ["ContextParallel"]

_NAME = "lightning_peft_context"
_ATTRIBUTE = "_peft_context"
_IGNORED = -100  # label of a token without a loss


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
        self._mask: tuple[tuple[object, ...], Tensor] | None = None
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
        heads, queries = q.shape[1] // k.shape[1], q.shape[2]

        def complete(part: Tensor) -> Tensor:
            earlier = gather_sequence(part, self.group)[:, :, : (self.rank + 1) * queries]
            return earlier.repeat_interleave(heads, 1) if heads > 1 else earlier

        keys, values = complete(k), complete(v)
        own = [(t, partial(complete, part.detach())) for t, part in ((keys, k), (values, v))]
        how: dict[str, Any] = {"dropout_p": dropout, "scale": scale}
        if self.rank:
            how["attn_mask"] = self._lower_right(queries, keys.shape[2], q)
        else:
            how["is_causal"] = True
        with saving_parts(own):
            return F.scaled_dot_product_attention(q, keys, values, **how)

    def _lower_right(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """Return the causal mask of the last queries: a tensor, or what flash attention knows.

        A tensor is shared by all layers, and has the dtype of the scores: attention would convert
        another one, and save the result in every layer.
        """
        if like.device.type == "cuda":
            from torch.nn.attention.bias import causal_lower_right

            bias: Any = causal_lower_right(queries, keys)
            return bias  # type: ignore[no-any-return]
        key = (queries, keys, like.dtype)
        if self._mask is None or self._mask[0] != key:
            later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            mask = torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(later, float("-inf"))
            self._mask = key, mask.to(like.device)
        return self._mask[1]


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
