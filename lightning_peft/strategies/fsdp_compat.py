"""Adapters over packed bytes under the FSDP2 of each torch version.

Before torch 2.13, FSDP2 shards floating parameters only and reduces what has a gradient. Packed
bytes are held as a parameter of the compute's own 16-bit type (a view: no bit changes, and no cast
is made where the types agree), which the storage views as bytes again. A tensor whose rows are an
odd number of bytes is left whole on every process. And every adapter of a block gets a zero
gradient where a process did not reach it: else FSDP2 would add gradients of different parameters
to each other.

In every version, what the last unit received stays in memory until forward ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.storage import held_tensors

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = [
    "free_received_copy",
    "hold_bytes_as_floats",
    "shards_bytes",
    "touch_every_adapter",
]


def shards_bytes() -> bool:
    """Whether FSDP2 takes packed bytes and unused parameters as they are (torch 2.13 and later)."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def free_received_copy(module: FSDPModule, args: object) -> None:
    """Free what the last all-gather received, once it was copied into parameters.

    A forward pre-hook that runs after FSDP2's own. FSDP2 frees these bytes at the next all-gather
    of the forward pass, or when that pass ends. For the output head, which comes last, that is
    after the loss: the head would be in memory twice beside the logits.
    """
    context = module._get_fsdp_state()._comm_ctx
    received = context.all_gather_state
    if received is not None:
        context.all_gather_copy_in_stream.wait_event(received.event)
        context.all_gather_stream.wait_event(received.event)
        context.all_gather_state = None


def hold_bytes_as_floats(module: nn.Module, precision: str) -> set[nn.Parameter]:
    """Give packed weights and scales a floating type, in place; returns those that stay bytes.

    Raises:
        ValueError: a precision that would cast the bytes.
    """
    if precision == "64-true":
        raise ValueError(
            f"peft_fsdp: expected 32-true, bf16-true, bf16-mixed or 16-true under torch "
            f"{torch.__version__}, got '64-true', which would cast packed bytes; update to torch "
            "2.13"
        )
    dtype = torch.float16 if precision == "16-true" else torch.bfloat16
    whole: set[nn.Parameter] = set()
    for owner in module.modules():
        for key in held_tensors(owner):
            p = owner._parameters.get(key)
            if p is None:
                continue  # a buffer: not sharded
            if p.shape[-1] % dtype.itemsize:
                whole.add(p)
            else:
                owner._parameters[key] = nn.Parameter(p.data.view(dtype), requires_grad=False)
    return whole


def touch_every_adapter(unit: nn.Module) -> None:
    """Tie all that is trained in a unit to its output, with weight zero; before it is sharded."""
    unit.register_forward_hook(_tie)


def _tie(unit: nn.Module, args: object, output: Any) -> Any:
    trained = [p for p in unit.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not trained:
        return output
    nothing = torch.stack([p.reshape(-1)[:1].sum() for p in trained]).sum() * 0.0
    if isinstance(output, Tensor):
        return output + nothing.to(output.dtype)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (output[0] + nothing.to(output[0].dtype), *output[1:])
    raise RuntimeError(
        f"peft_fsdp under torch {torch.__version__}: expected {type(unit).__name__} to return a "
        f"tensor or a tuple that begins with one, got {type(output).__name__}; name other "
        "shard_classes, update to torch 2.13, or use strategy='peft_ddp'"
    )
