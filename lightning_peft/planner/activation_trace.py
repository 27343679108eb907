"""Memory of one training step: a pass over fake tensors counts storages while they live.

Long stacks of equal blocks are run at two lengths and extrapolated; so is the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from lightning_peft.activations.config import Activations
from lightning_peft.models.modules import hf_models
from lightning_peft.planner.example_inputs import example_inputs, runnable
from lightning_peft.planner.storage_meter import GRADIENTS, LOGITS, Meter, labelled
from lightning_peft.planner.trace_contexts import filled, limited, plain_attention, shortened

__all__ = ["UNTRACEABLE", "Trace", "trace"]

# A pass over fake tensors meets a value it does not have, or a layer that refuses them.
UNTRACEABLE = (RuntimeError, TypeError)

_SHORT, _LONG = 2, 4  # blocks that are run of a longer stack


@dataclass
class Trace:
    """Bytes by part when most of them live.

    Attributes:
        forward: At the fullest moment of forward.
        backward: At the fullest moment of backward, gradients made so far included.
        host: Bytes that forward moves to host memory.
    """

    forward: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)
    host: float = 0.0

    def along(self, other: Trace, steps: float) -> Trace:
        """The line through this and `other`, `steps` of their distance from here."""
        return Trace(
            _along(self.forward, other.forward, steps),
            _along(self.backward, other.backward, steps),
            max(0.0, self.host + steps * (other.host - self.host)),
        )


def _along(a: Mapping[str, float], b: Mapping[str, float], steps: float) -> dict[str, float]:
    line = {k: a.get(k, 0) + steps * (b.get(k, 0) - a.get(k, 0)) for k in {**a, **b}}
    return {k: max(0.0, n) for k, n in line.items()}


def trace(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    autocast: torch.dtype | None,
    activations: Activations | None = None,
    loss: str | None = None,
    fused_loss: bool = False,
) -> Trace:
    """One training step of a prepared meta model.

    Raises:
        NoInputs: no Hugging Face model inside and no `example_input_array`.
        ValueError: a limit that the model cannot take.
    """
    stacks = _stacks(model)
    long = max((len(s) for s in stacks), default=0)
    how = (batch_size, sequence_length, autocast, activations, loss, fused_loss)
    if long <= _LONG:
        return _run(model, *how)
    try:
        with shortened(stacks, _SHORT):
            short = _run(model, *how)
        with shortened(stacks, _LONG):
            longer = _run(model, *how)
    # It needs all of its blocks: a cache that counts them, a limit that names one of them.
    except (RuntimeError, IndexError, ValueError):
        return _run(model, *how)
    return short.along(longer, (long - _SHORT) / (_LONG - _SHORT))


def _run(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    autocast: torch.dtype | None,
    activations: Activations | None,
    loss: str | None,
    fused_loss: bool,
) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, kind = runnable(model)
    meter = Meter((LOGITS,) if fused_loss else ())
    with ExitStack() as stack:
        stack.enter_context(_unlogged("torch._subclasses.fake_tensor"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(filled(model, meter))
        stack.enter_context(plain_attention(net))
        memories = stack.enter_context(limited(model, activations, loss))
        stack.enter_context(labelled(net, meter))
        inputs = example_inputs(net, kind, batch_size, sequence_length)
        for p in model.parameters():
            if p.requires_grad:
                stack.callback(
                    p.register_post_accumulate_grad_hook(
                        lambda p: meter.relabel(p.grad, GRADIENTS)
                    ).remove
                )
        stack.enter_context(meter)
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            out = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
            value = _loss(out)
        del out
        meter.phase = "backward"
        if value.requires_grad:
            value.backward()
        del value
        moved = float(memories.moved)
    return Trace(meter.peaks.get("forward", {}), meter.peaks.get("backward", {}), moved)


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger quiet: what a step over fake tensors raises is in the plan's own words."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _loss(out: object) -> Tensor:
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    first = next(t for t in tree_iter(out) if isinstance(t, Tensor))
    return first.float().mean()


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Outermost lists of blocks of one class; all of the same length, else none."""
    found: list[nn.ModuleList] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(i) for i in inside) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) > _LONG and len({type(m) for m in module}) == 1:
            found.append(module)
            inside.append(f"{name}.")
    same = len({len(s) for s in found}) == 1 and any(True for _ in hf_models(model))
    return found if same else []
