"""Cross entropy of hidden states and an output head; logits [tokens, vocabulary] never exist.

For each chunk of tokens, the head runs, the loss is computed, and its gradient is sent back to the
hidden states and to what the head trains, all before the next chunk. The backward pass scales these
gradients. A step computes the logits once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.value_types import shown
from lightning_peft.losses.chunk_pass import Head, Reduction, Step, chunked_loss
from lightning_peft.losses.token_loss import TokenLoss

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias``, without forming all logits.

    The value and the gradients are those of `torch.nn.functional.cross_entropy` on float32 logits,
    to rounding. Labels are not shifted.

    Args:
        hidden: Hidden states [*, features].
        weight: Output weight [vocabulary, features], or the module that computes the logits: a head
            that is tied, packed, adapted or has a bias.
        labels: Class indices [*], int64.
        bias: Bias [vocabulary] for a weight.
        ignore_index: Label of tokens that do not count.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
        softcap: Largest logit c: logits are ``c · tanh(logits / c)``. None for none.
        class_weight: Weight per class [vocabulary].
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` for float32 [*].
        chunk_tokens: Tokens per chunk. The default is an eighth of them, at most as many as have
            256 MiB of float32 logits (32 MiB on the CPU), and at least 64.

    Raises:
        TypeError: labels are not int64, the weight is neither a module nor a tensor, or the dtypes
            of hidden states and weight differ without autocast.
        ValueError: shapes that do not fit, labels outside the vocabulary (on the CPU), a value out
            of its range, or reduction "none" with a trained head.
    """
    _check_options(label_smoothing, reduction, chunk_tokens)
    _check_tensors(hidden, labels, bias, class_weight)
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap!r}")
    if isinstance(weight, nn.Module):
        if bias is not None:
            raise ValueError(
                "chunked_cross_entropy: expected no bias beside a module, which has its own; leave "
                "it out"
            )
        _check_features(hidden, weight)
        head: Head = weight
        vocabulary = _vocabulary(weight)
    elif not isinstance(weight, Tensor):
        raise TypeError(
            "chunked_cross_entropy weight: expected the output head or its weight, got "
            f"{weight!r}; give model.lm_head"
        )
    else:
        _check_dtype(hidden, "weight", weight)
        if weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"chunked_cross_entropy: expected a weight [vocabulary, {hidden.shape[-1]}], got "
                f"{list(weight.shape)}; give the output head's weight"
            )
        matrix, vocabulary = weight, weight.shape[0]

        def head(x: Tensor) -> Tensor:
            return nn.functional.linear(x, matrix, bias)

    steps: tuple[Step, ...] = ()
    if softcap is not None:
        cap = softcap
        steps = (lambda z: cap * torch.tanh(z / cap),)
    loss = TokenLoss(
        ignore_index, label_smoothing, None if class_weight is None else class_weight.float()
    )
    return chunked_loss(
        hidden,
        head,
        labels,
        loss,
        reduction,
        vocabulary=vocabulary,
        steps=steps,
        chunk_tokens=chunk_tokens,
    )


def _check_tensors(hidden: Any, labels: Any, bias: Any, class_weight: Any) -> None:
    """Raise TypeError unless these are tensors, and hidden states floating-point numbers."""
    for name, value, needed in (
        ("hidden", hidden, True),
        ("labels", labels, True),
        ("bias", bias, False),
        ("class_weight", class_weight, False),
    ):
        if not isinstance(value, Tensor) and (needed or value is not None):
            raise TypeError(f"chunked_cross_entropy {name}: expected a tensor, got {shown(value)}")
    if not hidden.is_floating_point():
        raise TypeError(
            "chunked_cross_entropy hidden: expected floating-point hidden states, got "
            f"{hidden.dtype}; give the last hidden state, not the token ids"
        )
    if bias is not None:
        _check_dtype(hidden, "bias", bias)


def _check_dtype(hidden: Tensor, name: str, t: Tensor) -> None:
    """Raise TypeError where hidden states and a weight of other dtypes would be multiplied."""
    if t.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"chunked_cross_entropy: expected a {name} of the dtype of the hidden states, "
            f"{hidden.dtype}, got {t.dtype}; convert one of them, or run under autocast"
        )


def _check_features(hidden: Tensor, head: nn.Module) -> None:
    """Raise an error where a linear head reads other features, or another dtype."""
    if not isinstance(head, nn.Linear):
        return
    if hidden.shape[-1:] != (head.in_features,):
        raise ValueError(
            f"chunked_cross_entropy: expected hidden states [*, {head.in_features}], as the head "
            f"reads them, got {list(hidden.shape)}"
        )
    if type(head) is nn.Linear:
        _check_dtype(hidden, "head", head.weight)


def _vocabulary(head: nn.Module) -> int:
    """Return the number of classes of a head, for the size of chunks: exact for known layers."""
    for name in ("out_features", "num_embeddings"):
        if isinstance(getattr(head, name, None), int):
            return int(getattr(head, name))
    return max((p.shape[0] for p in head.parameters() if p.dim() > 1), default=1)


def _check_options(label_smoothing: float, reduction: str, chunk_tokens: int | None) -> None:
    """Raise ValueError unless the options of a loss have meaning."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens: expected a whole number >= 1, got {chunk_tokens!r}")
