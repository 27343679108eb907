"""Changes of a model for a traced run, undone afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.planner.storage_meter import Meter

__all__ = ["checkpointed", "filled", "plain_attention", "shortened"]

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
def checkpointed(net: Any, wanted: bool) -> Iterator[None]:
    """Context with gradient checkpointing, if `wanted`.

    Raises:
        ValueError: no Hugging Face model.
    """
    if not wanted:
        yield
        return
    if not hasattr(net, "gradient_checkpointing_enable"):
        raise ValueError(
            f"checkpointing=True: expected a Hugging Face model, got {type(net).__name__}; for "
            "other modules leave it out: what their forward checkpoints is seen"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 has another name for it
        net.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        try:
            yield
        finally:
            net.gradient_checkpointing_disable()
