"""Converts the user's optimizer to one of ours by changing its class."""

from __future__ import annotations

import weakref
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch

from lightning_peft.optim.optimizers import (
    AdamW8bit,
    Lion8bit,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PooledOptimizer,
)
from lightning_peft.optim.state_conversion import pack
from lightning_peft.optim.wrappers import unwrap_optimizer

__all__ = ["OPTIMIZERS", "check_optimizer_name", "convert_optimizer"]

OPTIMIZERS: dict[str, type[PooledOptimizer]] = {
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "paged_adamw_32bit": PagedAdamW32bit,
    "lion_8bit": Lion8bit,
}


def convert_optimizer(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Change the class of an optimizer in place: 8-bit or paged state, the same groups.

    Groups, hyper-parameters, hooks, schedulers and existing state are kept. Wrappers of Fabric and
    accelerate are accepted. AdamW and Adam of torch and of bitsandbytes become any of the four;
    torch's Adam only without weight decay, which is an L2 term there. Lion of bitsandbytes becomes
    lion_8bit. An AdamW converted to lion_8bit keeps its lr and betas, which Lion reads differently:
    set an lr of a third to a tenth, and betas 0.9 and 0.99.

    Args:
        optimizer: The optimizer to convert.
        name: ``"adamw_8bit"``, ``"paged_adamw_8bit"``, ``"paged_adamw_32bit"`` or ``"lion_8bit"``.

    Raises:
        ValueError: an unknown name, a group with amsgrad or differentiable, L2 weight decay.
        TypeError: an optimizer of another family.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"convert_optimizer: expected an optimizer, got {type(optimizer).__name__}; give what "
            "configure_optimizers creates"
        )
    check_optimizer_name(name)
    target = OPTIMIZERS[name]
    _check(optimizer, name)
    states = {p: pack(s, list(target.FIELDS)) for p, s in optimizer.state.items() if s}
    for group in optimizer.param_groups:
        for key, value in target.DEFAULTS.items():
            group.setdefault(key, value)
    for key, value in target.DEFAULTS.items():
        optimizer.defaults.setdefault(key, value)
    scheduled = hasattr(vars(optimizer).pop("step", None), "_wrapped_by_lr_sched")
    vars(optimizer).pop("_pool_by_device", None)
    optimizer.state.clear()
    optimizer.state.update(states)
    optimizer.__class__ = target
    optimizer._patch_step_function()  # otherwise step hooks of the new class never run
    if scheduled:
        _count_steps(optimizer)


def check_optimizer_name(name: str) -> None:
    """Raise ValueError, with the nearest name, unless there is an optimizer of that name."""
    if name not in OPTIMIZERS:
        near = get_close_matches(str(name), OPTIMIZERS, 1)
        raise ValueError(
            f"optimizer: expected one of {sorted(OPTIMIZERS)}, got {name!r}"
            f"{f'; did you mean {near[0]!r}?' if near else ''}"
        )


def _family(optimizer: torch.optim.Optimizer) -> str | None:
    for cls in type(optimizer).__mro__:
        name = cls.__name__.removeprefix("Paged")
        package = cls.__module__.split(".")[0]
        if package == "torch" and name in ("Adam", "AdamW"):
            return name
        # bitsandbytes' Adam decays weights apart from the gradient, as AdamW does
        if package == "bitsandbytes" and name.startswith(("Adam", "Lion")):
            return "Lion" if name.startswith("Lion") else "AdamW"
        if package == "lightning_peft" and cls is not PooledOptimizer:
            return "Lion" if cls is Lion8bit else "AdamW"
    return None


def _check(optimizer: torch.optim.Optimizer, name: str) -> None:
    family, kind = _family(optimizer), type(optimizer).__name__
    if family is None or (family == "Lion" and name != "lion_8bit"):
        raise TypeError(
            f"optimizer={name!r}: expected configure_optimizers to return "
            f"{'AdamW, Adam or Lion' if name == 'lion_8bit' else 'AdamW or Adam'}, got {kind}; "
            "return torch.optim.AdamW, or leave optimizer=None"
        )
    for i, group in enumerate(optimizer.param_groups):
        for option in ("amsgrad", "differentiable"):
            if group.get(option):
                raise ValueError(
                    f"optimizer={name!r}: expected {option}=False, got True in group {i}"
                )
        coupled = family == "Adam" and not group.get("decoupled_weight_decay", False)
        if coupled and group.get("weight_decay", 0):
            raise ValueError(
                f"optimizer={name!r}: expected decoupled weight decay, got Adam's L2 term "
                f"{group['weight_decay']} in group {i}; use torch.optim.AdamW"
            )


def _count_steps(optimizer: torch.optim.Optimizer) -> None:
    """Wrap `step` as schedulers do, to note that it ran; they wrapped the former class's method."""
    own = weakref.ref(optimizer)
    function = type(optimizer).step

    @wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        it: Any = own()
        it._opt_called = True
        return function(it, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
