"""Parameter groups: completed if they were built before the adapters, and split for LoRA+."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["loraplus_groups", "repair"]


def repair(
    optimizers: Sequence[torch.optim.Optimizer],
    trained: Mapping[str, Tensor],
    bases: Callable[[str], Iterable[Tensor]],
) -> list[str]:
    """Put trained parameters into optimizers that were built over the base's parameters.

    An optimizer that is built before the adapters exist holds only frozen weights and would move
    nothing. Each trained parameter without a group joins the group of its layer's base weights.
    Frozen parameters then leave the groups that grew. Groups are changed in place, so that
    schedulers stay valid.

    Args:
        optimizers: All optimizers of the run.
        trained: Trained parameters by name.
        bases: Returns the base parameters beside a trained parameter, given its name.

    Returns:
        The names of the added parameters.

    Raises:
        RuntimeError: a trained parameter would be in no group, or in several. Nothing is changed.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    holders: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            holders.setdefault(id(p), []).append(i)
    added: dict[int, list[Tensor]] = {}
    wrong: list[str] = []
    put_in: list[str] = []
    seen: set[int] = set()
    for name, p in trained.items():
        if id(p) in seen:  # tied under two names
            continue
        seen.add(id(p))
        held = holders.get(id(p), [])
        places = held or sorted({i for base in bases(name) for i in holders.get(id(base), ())})
        if len(places) != 1:
            wrong.append(f"{name} (in {len(places)})")
        elif not held:
            added.setdefault(places[0], []).append(p)
            put_in.append(name)
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise RuntimeError(
            f"optimizers: expected each trained parameter in exactly one, got "
            f"{', '.join(wrong[:4])}{more}; build them in configure_optimizers over "
            "self.parameters(), or, for a part that no optimizer is meant to train, leave its "
            "layers out with exclude_modules"
        )
    called = {id(p): name for name, p in trained.items()}
    for i, params in added.items():
        group = groups[i]
        if "param_names" in group:
            known = zip(map(id, group["params"]), group["param_names"], strict=True)
            called = {**called, **dict(known)}
        kept = [p for p in group["params"] if p.requires_grad]
        group["params"][:] = kept + params
        if "param_names" in group:
            group["param_names"] = [called[id(p)] for p in group["params"]]
    return put_in


def loraplus_groups(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    ratio: float,
    schedulers: Iterable[Any] = (),
    *,
    is_fast: Callable[[str, Tensor], bool] | None = None,
) -> None:
    """Split each group in place: B and 1-D tensors learn at lr·ratio, A at lr.

    Source: Hayou et al. 2024, arXiv:2402.12354. The fast half becomes a group behind the existing
    ones. A scheduler that exists is extended by what it keeps for each group (base_lrs,
    lr_lambdas, last lr, min_lrs).

    Args:
        optimizer: changed in place.
        named_parameters: names of the trained parameters.
        ratio: the fast learning rate over the slow one.
        schedulers: those that already drive `optimizer`.
        is_fast: which parameters are fast; default: named B (`….B`, `…lora_B…`) or of one
            dimension.

    Raises:
        ValueError: `ratio` is not positive.
    """
    if ratio <= 0:
        raise ValueError(f"LoRA+: expected ratio > 0, got {ratio}; 16 is usual")
    fast_rule = is_fast or _is_b
    fast = {id(p) for name, p in named_parameters if fast_rule(name, p)}
    rates = ("lr", "initial_lr", "max_lr", "min_lr")
    scheduled = list(schedulers)
    for i, group in enumerate(list(optimizer.param_groups)):
        quick = [p for p in group["params"] if id(p) in fast]
        slow = [p for p in group["params"] if id(p) not in fast]
        if not quick:
            continue
        if not slow:
            group.update({k: group[k] * ratio for k in rates if k in group})
            _scale(scheduled, i, ratio, extend=False)
            continue
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        group["params"][:] = slow
        twin = {k: v for k, v in group.items() if k != "params"}
        twin.update({k: group[k] * ratio for k in rates if k in group})
        if "name" in group:  # LearningRateMonitor requires a name per group
            twin["name"] = f"{group['name']} (fast)"
        if names:
            group["param_names"] = [names[id(p)] for p in slow]
            twin["param_names"] = [names[id(p)] for p in quick]
        optimizer.param_groups.append({"params": quick, **twin})
        _scale(scheduled, i, ratio, extend=True)


def _is_b(name: str, p: Tensor) -> bool:
    return p.ndim == 1 or "lora_B" in name or name.rsplit(".", 1)[-1] == "B"


#: Lists of schedulers with one value per group. The value here is the factor of a new group; None
#: stands for the ratio of learning rates.
_PER_GROUP: Mapping[str, float | None] = {
    "base_lrs": None,
    "_last_lr": None,
    "min_lrs": None,
    "max_lrs": None,
    "base_momentums": 1.0,
    "max_momentums": 1.0,
}


def _scale(schedulers: Sequence[Any], group: int, ratio: float, *, extend: bool) -> None:
    """Multiply the rates of a group in each scheduler, or append a group with the product."""
    changed: dict[int, list[float]] = {}  # SequentialLR shares a list with its first scheduler
    for scheduler in _with_inner(schedulers):
        for key, factor in _PER_GROUP.items():
            values = getattr(scheduler, key, None)
            if not isinstance(values, list) or id(values) in changed:
                continue
            changed[id(values)] = values
            factor = ratio if factor is None else factor
            if extend:
                values.append(values[group] * factor)
            else:
                values[group] = values[group] * factor
        lambdas = getattr(scheduler, "lr_lambdas", None)
        if extend and lambdas is not None:
            lambdas.append(lambdas[group])


def _with_inner(schedulers: Sequence[Any]) -> Iterator[Any]:
    """Yield each scheduler and the schedulers inside it."""
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(getattr(scheduler, "_schedulers", ()))
