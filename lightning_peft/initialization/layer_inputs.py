"""Inputs of adapted layers while batches run: rows, masks, and which layers share an input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import first_argument
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["attended", "input_owners", "watch_input"]


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The input of a layer as rows [n, in], without masked positions."""
    x: Tensor = first_argument(args, kwargs)
    if mask is not None and x.shape[: mask.ndim] == mask.shape:
        x = x[mask.to(x.device)]
    return x.detach().reshape(-1, x.shape[-1])


def attended(batch: object, options: Mapping[str, Any]) -> Tensor | None:
    """Positions of a text that are attended to and, if there are labels, contribute to the loss."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    labels, counted = batch.get("labels"), mask.bool()
    if options.get("use_label_mask") and labels is not None and labels.shape == mask.shape:
        counted = counted & (labels != options["label_mask_value"])
    return counted


def watch_input(
    stack: ExitStack, adapter: WeightAdapter, see: Callable[[Tensor], object], mask: Tensor | None
) -> None:
    """Call `see` with the rows [n, in] of every input of the adapter's layer, within `stack`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(_rows(args, kwargs, mask))

    handle = adapter.site.module.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _digest(x: Tensor) -> str:
    raw = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def _note_digest(seen: dict[str, str], name: str, x: Tensor) -> None:
    seen.setdefault(name, _digest(x))


def input_owners(
    named: Mapping[str, WeightAdapter],
    batch: object,
    mask: Tensor | None,
    run: Callable[[Any], Any],
) -> dict[str, str]:
    """Layer → first layer with the same input. Layers that are their own owner come first."""
    seen: dict[str, str] = {}
    with ExitStack() as stack:
        for name, adapter in named.items():
            watch_input(
                stack,
                adapter,
                partial(_note_digest, seen, name),
                mask,
            )
        run(batch)
    missing = [name for name in named if name not in seen]
    if missing:
        init = getattr(next(iter(named.values())).method, "init", "data")
        raise ValueError(
            f"init={init!r}: expected every adapted layer to run, found that {missing[:5]} did "
            "not; exclude them, or use init='default' for them"
        )
    first: dict[str, str] = {}
    for name in named:
        first.setdefault(seen[name], name)
    own = {n: n for n in named if first[seen[n]] == n}
    rest = {n: o for o in own for n in named if n != o and first[seen[n]] == o}
    return {**own, **rest}
