"""Hooks of a method around the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.core.site import Site

__all__ = ["StepContext", "overrides_step_hooks"]


@dataclass
class StepContext:
    """The state of the run that a schedule may read at a step.

    Attributes:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the run; None if it is unbounded.
        entries: (site, tensors) of every place where the method is attached; tensors include
            buffers.
        grad_scale: Factor that gradients carry at this moment (GradScaler's), 1.0 without one.
    """

    step: int
    total_steps: int | None
    entries: Sequence[tuple[Site, Mapping[str, Tensor]]]
    grad_scale: float = 1.0


def overrides_step_hooks(cls: type[object], base: type[object]) -> bool:
    """Whether a class has a hook around the optimizer's step that its base has not."""
    hooks = ("penalty", "after_backward", "after_step")
    return any(getattr(cls, hook) is not getattr(base, hook) for hook in hooks)
