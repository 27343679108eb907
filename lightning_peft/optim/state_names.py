"""Optimizer state by parameter name, so that another order of parameters is mapped or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.names import counted, strip_compile

__all__ = ["Names", "in_live_order", "names_of", "stepped_names"]

#: Names of an optimizer's parameters, by group.
Names = list[list[str]]


def names_of(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> Names:
    """Return the names by group. A parameter that `named` lacks is called by its position."""
    found = {id(p): strip_compile(name) for name, p in named.items()}
    return [
        [found.get(id(p), f"unnamed {i}.{j}") for j, p in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def stepped_names(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that have a state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in names_of(optimizer, named) for name in group]
    return [n for n, p in zip(names, params, strict=True) if optimizer.state.get(p)]


def in_live_order(
    state_dict: Mapping[str, Any], saved: Sequence[Sequence[str]], live: Names, what: str
) -> dict[str, Any]:
    """Return a saved state dict in the order of the live optimizer's parameters.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` made it.
        saved: Names it was saved with, by group.
        live: Names in the optimizer that will load it.
        what: Name of the optimizer, for messages.

    Raises:
        ValueError: a parameter is in only one of the two, or in another group.
    """
    if [list(group) for group in saved] == live:
        return dict(state_dict)
    _require_same_groups(saved, live, what)
    groups = state_dict["param_groups"]
    key_of = {
        name: key
        for group, names in zip(groups, saved, strict=True)
        for name, key in zip(names, group["params"], strict=True)
    }
    states, renumbered, number = {}, [], 0
    for group, names in zip(groups, live, strict=True):
        for i, name in enumerate(names, number):
            if key_of[name] in state_dict["state"]:
                states[i] = state_dict["state"][key_of[name]]
        renumbered.append({**group, "params": list(range(number, number + len(names)))})
        number += len(names)
    return {**state_dict, "state": states, "param_groups": renumbered}


def _require_same_groups(saved: Sequence[Sequence[str]], live: Names, what: str) -> None:
    if [sorted(group) for group in saved] == [sorted(group) for group in live]:
        return
    then = {name: i for i, group in enumerate(saved) for name in group}
    now = {name: i for i, group in enumerate(live) for name in group}
    lines = [
        f"{name}: in {_place(then.get(name))} of the file, in {_place(now.get(name))} of "
        "configure_optimizers"
        for name in sorted(set(then) | set(now))
        if then.get(name) != now.get(name)
    ]
    more = f"\n  … and {len(lines) - 8} more" if len(lines) > 8 else ""
    raise ValueError(
        f"{what}: expected the {len(then)} parameters it was saved with, in the same "
        f"{len(saved)} groups, got {counted(len(lines), 'difference')}; give "
        "configure_optimizers the groups that were saved, or start a new fit from "
        "the weights alone:\n  " + "\n  ".join(lines[:8]) + more
    )


def _place(group: int | None) -> str:
    return "no group" if group is None else f"group {group}"
