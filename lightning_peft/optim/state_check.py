"""Checks an optimizer state that was read from a file, before anything is loaded.

Optimizers load any state. A NaN, a wrong dtype or the state of another class would be noticed in a
later step, or never. The check compares names, shapes, dtypes and values with what the
live optimizer needs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from lightning_peft_kernels.optim.adamw_8bit import BLOCK
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.core.finite import is_finite
from lightning_peft.core.names import counted
from lightning_peft.optim.needed_state import TrialStates, form_problems, tensors_of
from lightning_peft.optim.optimizers import PooledOptimizer
from lightning_peft.optim.option_check import is_number, numbers_in, option_problems
from lightning_peft.optim.state_conversion import to_torch
from lightning_peft.optim.state_names import names_of

__all__ = ["check_optimizer_state", "converted_state", "is_8bit"]

_MOST_STEPS = 1 << 53  # a float cannot count further
_MOMENTS = {"exp_avg", "exp_avg_sq"}
_SECOND = {"exp_avg_sq", "state2"}
_CODES = {"state1", "absmax1", "state2", "absmax2"}


def is_8bit(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict holds blockwise 8-bit moments."""
    states = state_dict.get("state")
    if not isinstance(states, Mapping):
        return False
    return any(
        isinstance(s, Mapping) and isinstance(s.get("state1"), Tensor) for s in states.values()
    )


def converted_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an 8-bit state to the form of a live optimizer of torch. Others are returned as is.

    Call `check_optimizer_state` first.
    """
    if isinstance(optimizer, PooledOptimizer) or not is_8bit(state_dict):
        return dict(state_dict)
    params = dict(zip(_keys(state_dict), _params(optimizer), strict=True))
    shapes = {key: p.shape for key, p in params.items() if key in state_dict["state"]}
    return to_torch(state_dict, shapes)


def check_optimizer_state(
    optimizer: Optimizer,
    state_dict: Any,
    named: Mapping[str, Tensor],
    what: str = "optimizer state",
    *,
    stepped: Collection[str] = (),
    sharded: bool = False,
) -> None:
    """Raise unless a state dict, in live order, can be loaded.

    Args:
        optimizer: The live optimizer.
        state_dict: As the file holds it.
        named: The model's parameters by name, for messages.
        what: The file or optimizer, for messages.
        stepped: Names of the parameters that had a state when the file was written.
        sharded: If True, the state holds all rows of tensors of which the optimizer has some.

    Raises:
        ValueError: with every difference, by parameter name; nothing is loaded.
    """
    _check_structure(optimizer, state_dict, what)
    names = list(chain.from_iterable(names_of(optimizer, named)))
    problems: list[str] = []
    for i, (group, live) in enumerate(
        zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ):
        problems += [f"group {i}: {line}" for line in option_problems(optimizer, group, live)]
    trials = TrialStates(optimizer, state_dict["param_groups"])
    groups = [i for i, g in enumerate(optimizer.param_groups) for _ in g["params"]]
    for key, name, p, i in zip(_keys(state_dict), names, _params(optimizer), groups, strict=True):
        state = state_dict["state"].get(key)
        if state is None and name in stepped:
            problems.append(f"{name}: expected a state, got none")
        if state is not None:
            numel, trial = None if sharded else p.numel(), trials.of(p, i)
            needed = None if trial is None else tensors_of(trial)
            lines = list(_state_problems(optimizer, state, p, needed, numel))
            if trial is not None and not lines and "shards" not in state:
                lines += form_problems(state, trial, p, sharded=sharded)
            problems += [f"{name}: {line}" for line in lines]
    if problems:
        more = f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"{what}: expected a state that {type(optimizer).__name__} can continue from, got "
            f"{counted(len(problems), 'difference')}; nothing was loaded. Resume from "
            "another checkpoint, return the optimizer class that was saved, or start a new fit "
            "from the weights alone:\n  " + "\n  ".join(problems[:12]) + more
        )


def _keys(state_dict: Mapping[str, Any]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- structure


def _check_structure(optimizer: Optimizer, state_dict: object, what: str) -> None:
    """Raise ValueError unless the state dict has the form of `Optimizer.state_dict`."""
    found = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = found.get("state"), found.get("param_groups")
    if (
        not isinstance(state, Mapping)
        or not isinstance(groups, Sequence)
        or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        or not all(isinstance(k, int) for g in groups for k in g["params"])
    ):
        raise ValueError(
            f"{what}: expected a dict with 'state' and 'param_groups', as an optimizer writes it, "
            f"got {str(state_dict)[:80]!r}; resume from another checkpoint"
        )
    sizes = [len(g["params"]) for g in groups]
    live = [len(g["params"]) for g in optimizer.param_groups]
    if sizes != live:
        raise ValueError(
            f"{what}: expected groups of {live} parameters, as in configure_optimizers, got "
            f"{sizes}; give configure_optimizers the groups that were saved"
        )
    extra = [key for key in state if key not in set(_keys(found))]
    if extra:
        raise ValueError(
            f"{what}: expected states of the parameters in its groups, got states of "
            f"{extra[:5]} too; resume from another checkpoint"
        )


# ---- the state of one parameter


def _state_problems(
    optimizer: Optimizer, state: object, p: Tensor, needed: set[str] | None, numel: int | None
) -> Iterator[str]:
    if not isinstance(state, Mapping):
        yield f"expected a dict of tensors, got {type(state).__name__}"
        return
    if "shards" in state:
        shards = state["shards"]
        if not isinstance(shards, list) or not all(isinstance(s, Mapping) for s in shards):
            yield f"shards: expected a list of states, got {str(shards)[:40]!r}"
            return
        for i, part in enumerate(shards):
            for line in _flat_problems(optimizer, {"step": state.get("step"), **part}, None, None):
                yield f"shard {i}: {line}"
        return
    nested = state.get("__bnb_optimizer_quant_state__")
    flat = {**state, **(nested if isinstance(nested, Mapping) else {})}
    yield from _flat_problems(optimizer, flat, p, needed, numel)


def _flat_problems(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    p: Tensor | None,
    needed: set[str] | None,
    numel: int | None = None,
) -> Iterator[str]:
    missing = _missing(optimizer, state, needed)
    unused = sorted(_unused(optimizer, state, needed))
    if not missing and unused:
        yield f"expected none of {', '.join(unused)}: it was saved by another optimizer class"
        return
    if missing:
        yield (
            f"expected {', '.join(sorted(missing))}, got {', '.join(sorted(map(str, state)))}: it "
            "was saved by another optimizer class"
        )
        return
    wrong = [
        k
        for k in {"step", *_MOMENTS, *_CODES} & set(state)
        if not isinstance(state[k], Tensor) and (k != "step" or not is_number(state[k]))
    ]
    if wrong:
        for k in sorted(wrong):
            yield f"{k}: expected a tensor, got {type(state[k]).__name__}"
        return
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield from _tensor_problems(key, value, p, numel)
            yield from _size_problems(key, value, state, p, numel)
        elif isinstance(value, float | int) and not all(map(math.isfinite, numbers_in(value))):
            yield f"{key}: expected a finite number, got {str(value)[:40]}"
        elif key == "step" and not 0 <= value <= _MOST_STEPS:
            yield f"step: expected a count, got {value}"


def _missing(optimizer: Optimizer, state: Mapping[str, Any], needed: set[str] | None) -> set[str]:
    """Return the names that the live optimizer needs and the state has in no form."""
    has = set(state)
    codes = {"state1", "absmax1"} if isinstance(state.get("state1"), Tensor) else set()
    if codes and state["state1"].dtype != torch.uint8:
        codes = {"state1"}  # bitsandbytes keeps small parameters in fp32
    if isinstance(optimizer, PooledOptimizer):
        second = {"state2", "exp_avg_sq"} & set(optimizer.FIELDS)
        if codes:
            wanted = codes | ({c.replace("1", "2") for c in codes} if second else set())
        else:
            wanted = {"exp_avg", "exp_avg_sq"} if second else {"exp_avg"}
        return (wanted | {"step"}) - has
    if needed is None:
        return set()
    if codes and needed == {"step", *_MOMENTS}:  # converted on loading
        return ({"step"} | codes | {c.replace("1", "2") for c in codes}) - has
    return needed - has


def _unused(optimizer: Optimizer, state: Mapping[str, Any], needed: set[str] | None) -> set[str]:
    """Return second moments that the live optimizer would drop, as Lion those of AdamW."""
    if isinstance(optimizer, PooledOptimizer):
        keeps_them = bool(_SECOND & set(optimizer.FIELDS))
    else:
        keeps_them = needed is None or bool(_SECOND & needed)
    return set() if keeps_them else _SECOND & set(state)


def _tensor_problems(key: str, value: Tensor, p: Tensor | None, numel: int | None) -> Iterator[str]:
    floating = {"step", "absmax1", "absmax2", *_MOMENTS}
    if (
        value.dtype.is_complex
        or (value.dtype.is_floating_point and value.dtype.itemsize == 1)
        or (key in ("absmax1", "absmax2") and value.dtype != torch.float32)
    ):
        yield f"{key}: expected float32, got {value.dtype}"
    elif key in ("state1", "state2") and value.dtype not in (torch.uint8, torch.float32):
        yield f"{key}: expected uint8, got {value.dtype}"
    elif key in floating - {"step"} and not value.dtype.is_floating_point:
        yield f"{key}: expected a floating dtype, got {value.dtype}"
    elif value.ndim > 16:
        yield f"{key}: expected the axes of the parameter, got {value.ndim} axes"
    elif key == "step" and value.numel() != 1:
        yield f"step: expected one number, got shape {list(value.shape)}"
    elif value.device.type != "meta" and not is_finite(value):
        yield f"{key}: expected finite values, got NaN or infinity"
    elif key == "step" and float(value) > _MOST_STEPS:
        yield f"step: expected a count, got {float(value)}"
    elif (
        key in ("step", "absmax1", "absmax2", "exp_avg_sq", "max_exp_avg_sq")
        and value.numel()
        and bool((value < 0).any())
    ):
        yield f"{key}: expected values of at least 0, got {float(value.min())}"


def _size_problems(
    key: str, value: Tensor, state: Mapping[str, Any], p: Tensor | None, numel: int | None
) -> Iterator[str]:
    if numel is None or p is None:
        return
    blocks = -(-numel // BLOCK)
    if key in ("state1", "state2") and value.numel() != numel:
        yield f"{key}: expected {numel} elements, got {value.numel()}"
    elif key in ("absmax1", "absmax2") and state.get(f"state{key[-1]}", value).dtype != torch.uint8:
        yield f"state{key[-1]}: expected uint8 beside {key}, got float32"
    elif (
        key in ("absmax1", "absmax2")
        and state.get(f"state{key[-1]}", value).dtype == torch.uint8
        and value.numel() != blocks
    ):
        yield f"{key}: expected {blocks} blocks, got {value.numel()}"
    elif key in {*_MOMENTS, "max_exp_avg_sq", "momentum_buffer"} and value.numel() != numel:
        yield f"{key}: expected shape {list(p.shape)}, got {list(value.shape)}"
