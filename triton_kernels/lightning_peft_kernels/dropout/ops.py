"""Dropout whose mask is a function of a seed: nothing of x's size is kept for backward.

    y_e = x_e · [u_e(seed) ≥ p] / (1 − p),      e = row · K + column of x [M, K]

Forward and backward call the same op with the same seed, one int64 drawn from the device's
generator without waiting for it; an activation checkpoint that restores the generator draws it
again. On CUDA u is Philox4x32-10 (word e % 4 of counter e // 4), so that the mask does not depend
on the launch; on a CPU it is 16 bits of the stream of a torch generator with that seed (p in steps
of 2⁻¹⁶), which takes a fifth of the time of `bernoulli_`. Bytes moved: one read and one write of
x. Source of Philox: Salmon et al. 2011, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.dispatch import choose

__all__ = [
    "draw_seed",
    "dropout",
    "philox_uniform",
    "seeded_dropout",
    "seeded_dropout_reference",
]

_MASK = 0xFFFFFFFF
_TO_UNIT = 4.6566127342e-10


def draw_seed(device: torch.device) -> Tensor:
    """int64 [1] from the generator of `device`, left there."""
    return torch.randint(0, 1 << 62, (1,), device=device)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(upper, lower) 32 bits of a · b, both below 2³², without overflow in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return (middle >> 16) & _MASK, ((middle & 0xFFFF) << 16 | low & 0xFFFF) & _MASK


def philox_uniform(seed: Tensor, n: int) -> Tensor:
    """u [n] in [0, 1), fp32: all four words of Philox4x32-10 of counters 0, 1, …; Triton's
    `tl.rand4x` bit for bit.
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
    """The formula by Philox in plain torch."""
    keep = (philox_uniform(seed, x.numel()) >= p).view(x.shape)
    return x * keep * (1.0 / (1.0 - p))


def _seeded_dropout_cpu(x: Tensor, seed: Tensor, p: float) -> Tensor:
    generator, n = torch.Generator().manual_seed(int(seed)), x.numel()
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(
        -(1 << 63), None, generator=generator
    )
    bits = words.view(torch.int16)[:n].view(x.shape)
    first_kept = min(round(p * (1 << 16)), (1 << 16) - 1) - (1 << 15)
    keep = torch.ge(bits, first_kept, out=torch.empty(x.shape, dtype=x.dtype))
    return keep.mul_(x).mul_(1.0 / (1.0 - p))


def _implementation(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.device.type == "cpu":
        return _seeded_dropout_cpu(x, seed, p)
    if choose("seeded_dropout", x.device, x.dtype).backend == "triton":
        from lightning_peft_kernels.dropout.triton import dropout

        return dropout(x.contiguous(), seed, p)
    return seeded_dropout_reference(x, seed, p)


_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define("seeded_dropout(Tensor x, Tensor seed, float p) -> Tensor")
_library.impl("seeded_dropout", _implementation, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lightning_peft::seeded_dropout",
    lambda x, seed, p: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    lib=_library,
)


def _keep_seed(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _again(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return seeded_dropout(dY, seed, ctx.p), None, None


torch.library.register_autograd(
    "lightning_peft::seeded_dropout", _again, setup_context=_keep_seed, lib=_library
)


def dropout(x: Tensor, p: float) -> Tensor:
    """`seeded_dropout` with a seed that is drawn here; differentiable in x."""
    return seeded_dropout(x, draw_seed(x.device), p)


def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """y of x's shape and dtype, contiguous; its own transpose, so that backward calls it on dY.
    Differentiable in x.

    Args:
        x: Floating, of any shape.
        seed: int64 [1] on x's device, of `draw_seed`.
        p: Probability of dropping, 0 ≤ p < 1.

    Raises:
        ValueError: p outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"seeded_dropout: expected 0 <= p < 1, got p = {p}")
    y: Tensor = torch.ops.lightning_peft.seeded_dropout(x, seed, p)
    return y
