"""Principal directions of layers' inputs, for EVA."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import first_argument
from lightning_peft.initialization.incremental_pca import IncrementalPCA, share_ranks
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["input_directions"]

_MOST_PASSES = 1000


@torch.no_grad()
def input_directions(
    adapters: Sequence[WeightAdapter], batches: Sequence[Any], run: Callable[[Any], Any]
) -> list[tuple[Tensor, Tensor]]:
    """(directions [k, in], singular values [k]) of every adapter's input.

    Layers with one input share their directions. The ranks k share the budget of all adapters.

    Args:
        adapters: Adapters of one method.
        batches: Batches; repeated until the directions settle.
        run: Runs the model on a batch.

    Raises:
        ValueError: a layer did not run, or no batch has enough rows.
    """
    options, named = adapters[0].method.data_options, {a.site.label: a for a in adapters}
    masks = [_mask(batch, options) for batch in batches]
    owner = _owners(named, batches[0], masks[0], run)
    largest = _largest_ranks(named, owner, float(options["rho"]))
    found = {
        own: IncrementalPCA(largest[own], float(options["tau"]))
        for own in dict.fromkeys(owner.values())
    }
    budget = sum(a.method.rank(a.site) for a in adapters)
    ranks, turning = dict(largest), list(found)
    for done, (batch, mask) in enumerate(cycle(zip(batches, masks, strict=True))):
        turning = [n for n, pca in found.items() if not bool(pca.settled[: ranks[n]].all())]
        if not turning or done >= _MOST_PASSES:
            break
        _add_batch({n: (named[n], found[n]) for n in turning}, batch, mask, run)
        if done + 1 == len(batches):
            _require_found(found)
        if all(pca.components is not None for pca in found.values()):
            ranks = share_ranks(found, owner, largest, budget)
    if turning:
        warnings.warn(
            f"init='eva': the directions of {len(turning)} layers still turned after "
            f"{_MOST_PASSES} passes ({turning[:3]}); they are taken as they are. Lower tau, or "
            "give more batches",
            stacklevel=4,
        )
    return [found[owner[name]].leading(ranks[name]) for name in named]


def _add_batch(
    turning: Mapping[str, tuple[WeightAdapter, IncrementalPCA]],
    batch: Any,
    mask: Tensor | None,
    run: Callable[[Any], Any],
) -> None:
    """Add the inputs of one batch to the layers whose directions still turn."""
    with ExitStack() as stack:
        for adapter, pca in turning.values():
            _watch(stack, adapter, pca.add, mask)
        run(batch)


def _largest_ranks(
    named: Mapping[str, WeightAdapter], owner: Mapping[str, str], rho: float
) -> dict[str, int]:
    """Layer → largest rank; layers with one input get the largest among them."""
    own = {name: _largest_rank(adapter, rho) for name, adapter in named.items()}
    shared: dict[str, int] = {}
    for name, first in owner.items():
        shared[first] = max(shared.get(first, 0), own[name])
    return {name: shared[owner[name]] for name in named}


def _largest_rank(adapter: WeightAdapter, rho: float) -> int:
    wanted = round(adapter.method.rank(adapter.site) * rho)
    return min(wanted, adapter.site.out_features, adapter.site.in_features)


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The input of a layer as rows [n, in], without masked positions."""
    x: Tensor = first_argument(args, kwargs)
    if mask is not None and x.shape[: mask.ndim] == mask.shape:
        x = x[mask.to(x.device)]
    return x.detach().reshape(-1, x.shape[-1])


def _mask(batch: Any, options: Mapping[str, Any]) -> Tensor | None:
    """Positions of a text that are attended to and, if there are labels, contribute to the loss."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    labels, counted = batch.get("labels"), mask.bool()
    if options["use_label_mask"] and labels is not None and labels.shape == mask.shape:
        counted = counted & (labels != options["label_mask_value"])
    return counted


def _watch(
    stack: ExitStack, adapter: WeightAdapter, see: Callable[[Tensor], object], mask: Tensor | None
) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(_rows(args, kwargs, mask))

    handle = adapter.site.module.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _digest(x: Tensor) -> str:
    raw = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def _note_digest(seen: dict[str, str], name: str, x: Tensor) -> None:
    seen.setdefault(name, _digest(x))


def _owners(
    named: Mapping[str, WeightAdapter], batch: Any, mask: Tensor | None, run: Callable[[Any], Any]
) -> dict[str, str]:
    """Layer → first layer with the same input. Layers that are their own owner come first."""
    seen: dict[str, str] = {}
    with ExitStack() as stack:
        for name, adapter in named.items():
            _watch(
                stack,
                adapter,
                partial(_note_digest, seen, name),
                mask,
            )
        run(batch)
    missing = [name for name in named if name not in seen]
    if missing:
        raise ValueError(
            f"init='eva': expected every adapted layer to run, found that {missing[:5]} did not; "
            "exclude them, or use init='default' for them"
        )
    first: dict[str, str] = {}
    for name in named:
        first.setdefault(seen[name], name)
    own = {n: n for n in named if first[seen[n]] == n}
    rest = {n: o for o in own for n in named if n != o and first[seen[n]] == o}
    return {**own, **rest}


def _require_found(found: Mapping[str, IncrementalPCA]) -> None:
    for name, pca in found.items():
        if pca.components is None:
            raise ValueError(
                f"init='eva': {name!r}: expected a batch with at least {pca.count} rows (r · rho), "
                "found none; give larger batches, or lower r or rho"
            )
