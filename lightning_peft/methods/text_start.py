"""What prompts and prefixes share that start from a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.checks import require

__all__ = ["TextStart", "cache_of_text", "take_length_from_ids"]

M = TypeVar("M", bound="TextStart")


class TextStart:
    """Mixin of methods with the start ``"text"`` and token ids for it."""

    @classmethod
    def from_text(cls: type[M], text: str, tokenizer: Any, **fields: Any) -> M:
        """The method started from a text; n is the number of its tokens unless given."""
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
        chosen: dict[str, Any] = {"init": "text", "init_ids": ids, "n": len(ids), **fields}
        return cls(**chosen)


def take_length_from_ids(method: Any) -> None:
    """Set n of a frozen dataclass to the number of `init_ids`, if it is 0.

    Raises:
        ValueError: no ids, or an n that is not their number.
    """
    count = len(method.init_ids)
    require(
        count > 0,
        f"{method.label}: expected init='text' with init_ids of a text, got no ids",
    )
    require(
        method.n <= 0 or method.n == count,
        f"{method.label}: expected n = {count}, the number of init_ids, got n = {method.n}; leave "
        "n out",
    )
    if method.n == 0:
        object.__setattr__(method, "n", count)


@torch.no_grad()
def cache_of_text(label: str, site: SequenceSite, ids: Sequence[int]) -> Tensor:
    """Return what a stack puts into its cache for a text [n, columns].

    Raises:
        ValueError: no decoder of Hugging Face with its weights.
    """
    stack: Any = site.module
    require(
        bool(site.embedding) and not site.embeddings.weight.is_meta,
        f"{label} on {site.quoted}: expected a decoder of Hugging Face with its weights "
        "to run the text through, got none; use init='random'",
    )
    batch = torch.tensor([list(ids)], device=site.embeddings.weight.device)
    modes = [(m, m.training) for m in stack.modules()]
    stack.eval()
    try:
        cache = stack(input_ids=batch, use_cache=True).past_key_values
    finally:
        for m, training in modes:
            m.training = training
    pairs = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
    require(
        len(pairs) == len(site.layers),
        f"{label} on {site.quoted}: expected keys and values of {len(site.layers)} "
        f"layers, got {len(pairs)}; use init='random'",
    )
    rows = [t[0].transpose(0, 1).reshape(len(ids), -1) for pair in pairs for t in pair]
    return torch.cat(rows, dim=1).float().cpu()
