"""Dropout whose mask is a function of a seed, so backward keeps nothing of x's size.

    y_e = x_e · [u_e(seed) ≥ p] / (1 − p),      e = row · K + column of x [M, K]

Forward and backward call the op with one seed, an int64 drawn from the device's generator without
waiting for it. An activation checkpoint that restores the generator draws the seed again. On CUDA,
u is Philox4x32-10 (word e % 4 of counter e // 4), so the mask does not depend on the launch. On a
CPU, u is 16 bits of the stream of a torch generator with that seed (p in steps of 2⁻¹⁶), which
takes a fifth of the time of `bernoulli_`. Bytes moved: one read and one write of x.
Source of Philox: Salmon et al. 2011, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import PLAIN_TYPES, Context
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.dispatch import Backend, current_backend, launches
from lightning_peft_kernels.launch import LaunchError, note_refusal
from lightning_peft_kernels.registration import define_backward, define_op

__all__ = [
    "draw_seed",
    "dropout",
    "philox_uniform",
    "seeded_dropout",
    "seeded_dropout_reference",
    "small_mask",
]

_MASK = 0xFFFFFFFF
_TO_UNIT = 4.6566127342e-10
# Elements. Up to _TINY torch's own draw is faster than the stream of a seed.
_SMALL, _TINY = 1 << 16, 1 << 13
_local = threading.local()


def draw_seed(device: torch.device) -> Tensor:
    """Draw an int64 [1] from the generator of `device`; it stays on the device."""
    return torch.randint(0, 1 << 62, (1,), device=device)


def small_mask(x: Tensor, p: float) -> Tensor | None:
    """Draw the factors 0 and 1 / (1 − p) for a small x on a CPU; None for another.

    Kept for backward they take as much memory as x, and spare drawing the mask twice more: for few
    rows that takes longer than the layer's products.
    """
    if x.numel() > _SMALL or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if x.numel() <= _TINY:
        return torch.empty_like(x).bernoulli_(1.0 - p).mul_(1.0 / (1.0 - p))
    return _seeded_dropout_cpu(torch.ones_like(x), draw_seed(x.device), p)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the (upper, lower) 32 bits of a · b, both below 2³², without overflow in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return (middle >> 16) & _MASK, ((middle & 0xFFFF) << 16 | low & 0xFFFF) & _MASK


def philox_uniform(seed: Tensor, n: int) -> Tensor:
    """Return u [n] in [0, 1), fp32: the four words of Philox4x32-10 of counters 0, 1, ….

    Equal to Triton's `tl.rand4x` bit for bit.
    """
    counter = torch.arange(-(-n // 4), device=seed.device)
    words = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        h0, l0 = _product(words[0], 0xD2511F53)
        h1, l1 = _product(words[2], 0xCD9E8D57)
        words = [h1 ^ words[1] ^ key[0], l1, h0 ^ words[3] ^ key[1], l0]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    bits = torch.stack(words, 1).reshape(-1)[:n]
    signed = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits)
    return torch.where(signed < 0, -signed - 1, signed).float() * _TO_UNIT


def seeded_dropout_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Compute `seeded_dropout` with Philox in plain torch."""
    keep = (philox_uniform(seed, x.numel()) >= p).view(x.shape)
    return x * keep * (1.0 / (1.0 - p))


def _seeded_dropout_cpu(x: Tensor, seed: Tensor, p: float) -> Tensor:
    generator: torch.Generator | None = getattr(_local, "generator", None)
    if generator is None:  # a new one takes longer than a small mask
        generator = _local.generator = torch.Generator()
    generator.manual_seed(int(seed))
    n = x.numel()
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(
        -(1 << 63), None, generator=generator
    )
    bits = words.view(torch.int16)[:n].view(x.shape)
    first_kept = min(round(p * (1 << 16)), (1 << 16) - 1) - (1 << 15)
    keep = torch.ge(bits, first_kept, out=torch.empty(x.shape, dtype=x.dtype))
    return keep.mul_(x).mul_(1.0 / (1.0 - p))


def _seeded_dropout(x: Tensor, seed: Tensor, p: float, backend: Backend = "auto") -> Tensor:
    device = x.device
    if device.type == "cpu" and device not in CHIPS:
        return _seeded_dropout_cpu(x, seed, p)
    # As `dispatch.run`, without closures: a layer comes here three times in a step.
    if launches("seeded_dropout", device, x.dtype, backend):
        from lightning_peft_kernels.dropout.triton import dropout

        try:
            return dropout(x.contiguous(), seed, p)
        except LaunchError as error:
            note_refusal("seeded_dropout", x.dtype, "", device, backend, error)
    return seeded_dropout_reference(x, seed, p)


def _seeded_dropout_fake(x: Tensor, seed: Tensor, p: float, backend: Backend = "auto") -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Context(Context, Protocol):
    """What forward saves for backward."""

    p: float
    backend: Backend


def _setup_context(
    ctx: _Context, inputs: tuple[Tensor, Tensor, float, Backend], output: Tensor
) -> None:
    _, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: _Context, dY: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return seeded_dropout(dY, seed, ctx.p, backend=ctx.backend), None, None, None


define_op(
    "seeded_dropout(Tensor x, Tensor seed, float p, str backend='auto') -> Tensor",
    fake=_seeded_dropout_fake,
    default=_seeded_dropout,
)
define_backward("seeded_dropout", setup_context=_setup_context, backward=_backward)


def dropout(x: Tensor, p: float) -> Tensor:
    """Draw a seed and call `seeded_dropout`; differentiable in x."""
    return seeded_dropout(x, draw_seed(x.device), p)


def seeded_dropout(x: Tensor, seed: Tensor, p: float, *, backend: Backend | None = None) -> Tensor:
    """Compute y in the shape and dtype of x, contiguous; differentiable in x.

    The op is its own transpose: backward calls it on dY.

    Args:
        x: Floating, of any shape.
        seed: int64 [1] on x's device, from `draw_seed`.
        p: Probability of dropping, 0 ≤ p < 1.
        backend: Requested backend; default `current_backend()`.

    Raises:
        ValueError: p is outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"seeded_dropout: expected 0 <= p < 1, got p = {p}")
    requested = backend or current_backend()
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(x) not in PLAIN_TYPES
        or torch._C._are_functorch_transforms_active()
    ):
        y: Tensor = torch.ops.lightning_peft.seeded_dropout(x, seed, p, requested)
        return y
    return _seeded_dropout(x, seed, p, requested)
