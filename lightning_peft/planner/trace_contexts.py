"""Changes of a model for a traced run, undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.activations.config import Activations
from lightning_peft.activations.host_memory import HostMemories
from lightning_peft.activations.limit import ActivationLimit
from lightning_peft.losses.output_head import ChunkedLoss
from lightning_peft.planner.planned_host import PlannedHost
from lightning_peft.planner.storage_meter import Meter

__all__ = ["filled", "limited", "plain_attention", "shortened"]

_ATTENTION = "lightning_peft_plan"


@contextmanager
def shortened(stacks: Sequence[nn.ModuleList], n: int) -> Iterator[None]:
    """Context in which the stacks have n blocks."""
    kept = [s._modules for s in stacks]
    for s in stacks:
        s._modules = dict(list(s._modules.items())[:n])
    try:
        yield
    finally:
        for s, modules in zip(stacks, kept, strict=True):
            s._modules = modules


@contextmanager
def filled(model: nn.Module, meter: Meter) -> Iterator[None]:
    """Context with fake tensors on the CPU in the place of meta tensors."""
    made: dict[int, Tensor] = {}
    undo: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in made:
                    fresh = torch.empty(t.shape, dtype=t.dtype, device="cpu")
                    if isinstance(t, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=t.requires_grad)
                    meter.know(fresh)
                    made[id(t)] = fresh
                undo.append((tensors, key, t))
    for tensors, key, t in undo:
        tensors[key] = made[id(t)]
    try:
        yield
    finally:
        for tensors, key, t in undo:
            tensors[key] = t


@contextmanager
def plain_attention(net: nn.Module) -> Iterator[None]:
    """Context with attention without a mask, as a batch without padding has it."""
    configs = {id(c): c for m in net.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [
        c for c in configs.values() if getattr(c, "_attn_implementation_internal", None) == "sdpa"
    ]
    if changed:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    for c in changed:
        c._attn_implementation_internal = _ATTENTION
    try:
        yield
    finally:
        for c in changed:
            c._attn_implementation_internal = "sdpa"


@contextmanager
def limited(
    model: nn.Module, activations: Activations | None, loss: str | None
) -> Iterator[HostMemories]:
    """Context with the limits of a run; what it yields knows how many bytes left the device.

    Raises:
        ValueError: a model without blocks or without an output head.
    """
    memories = HostMemories(lambda device: PlannedHost())
    with ExitStack() as stack:
        if activations is not None:
            limit = ActivationLimit(model, activations, memories, keeps_random_states=False)
            stack.enter_context(limit)
        if loss is not None:
            stack.enter_context(ChunkedLoss(model, torch.device("cuda")))
        yield memories
