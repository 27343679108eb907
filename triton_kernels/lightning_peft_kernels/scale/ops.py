"""An output scale and a bias in one pass: y = u ∘ g + bias, for IA³ and DoRA over any base.

    ia3_linear   y = (x Wᵀ) ∘ l + bias
    dora_linear  y = (x Wᵀ + s · drop(x) Aᵀ Bᵀ) ∘ g + bias      g = m / ‖W + s B A‖ by row, given

Shapes: u [..., N], g [N], bias [N]. Plain torch passes over M·N elements for the product and for
the bias, and in backward for dY ∘ g, for dY ∘ u and for its sum; here forward reads and writes once
(4 bytes an element in bf16) and backward reads dY and u and writes du once, with dg and dbias
summed on the way in fp32 (6 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import applied, gradients_of, recording, transformed
from lightning_peft_kernels.dispatch import choose
from lightning_peft_kernels.lora.linear import lora_linear
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = ["dora_linear", "ia3_linear", "output_scale", "output_scale_reference"]

_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define("output_scale(Tensor u, Tensor g, Tensor? bias) -> Tensor")
_library.define("output_scale_backward(Tensor dY, Tensor u, Tensor g) -> (Tensor, Tensor, Tensor)")


def output_scale_reference(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in fp32 at least, rounded once."""
    wide = torch.promote_types(u.dtype, torch.float32)
    y = u.to(wide) * g.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(u.dtype)


def _unbiased(u: Tensor, g: Tensor) -> Tensor:
    return output_scale_reference(u, g, None)


def _forward(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    if choose("output_scale", u.device, u.dtype).backend == "triton":
        from lightning_peft_kernels.scale.triton import forward

        return forward(u, g, bias)
    return output_scale_reference(u, g, bias)


def _backward(dY: Tensor, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dg and dbias in fp32 at least) of dY, u [M, N]."""
    if choose("output_scale", u.device, u.dtype).backend == "triton":
        from lightning_peft_kernels.scale.triton import backward

        return backward(dY, u, g)
    wide = torch.promote_types(u.dtype, torch.float32)
    d = dY.to(wide)
    return (d * g.to(wide)).to(u.dtype), (d * u.to(wide)).sum(0), d.sum(0)


def _forward_fake(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    return u.new_empty(u.shape)


def _backward_fake(dY: Tensor, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    column = u.new_empty(u.shape[1], dtype=wide)
    return u.new_empty(u.shape), column, column.clone()


for _name, _impl, _fake in (
    ("output_scale", _forward, _forward_fake),
    ("output_scale_backward", _backward, _backward_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightning_peft::{_name}", _fake, lib=_library)


class _OutputScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        u2 = u.reshape(-1, u.shape[-1]).contiguous()
        ctx.save_for_backward(u, g)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: Tensor = torch.ops.lightning_peft.output_scale(u2, g, bias)
        return y.view(u.shape)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        u, g = ctx.saved_tensors
        dY2, u2 = (t.reshape(-1, t.shape[-1]).contiguous() for t in (dY, u))
        if recording():
            needs = ctx.needs_input_grad
            du, dg = gradients_of(_unbiased, (u, g), needs[:2], dY)
            return du, dg, dY2.sum(0).to(ctx.bias_dtype) if needs[2] else None
        du, dg, d_bias = torch.ops.lightning_peft.output_scale_backward(dY2, u2, g)
        return (
            du.view(u.shape),
            dg.to(g.dtype) if ctx.needs_input_grad[1] else None,
            d_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )


def output_scale(u: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """u ∘ g + bias in the dtype of u [..., N]; differentiable in all three."""
    if transformed():
        return output_scale_reference(u, g, bias)
    y: Tensor = applied(_OutputScale, u, g, bias)
    return y


def _base(x: Tensor, W: Tensor | Packed4bit, shape: Sequence[int], how: dict[str, Any]) -> Tensor:
    if isinstance(W, Packed4bit):
        return nf4_linear(x, W, shape, None, **how)
    return torch.nn.functional.linear(x, W.to(x.dtype))


def ia3_linear(
    x: Tensor,
    W: Tensor | Packed4bit,
    shape: Sequence[int],
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """Y = (x Wᵀ) ∘ scale + bias; differentiable in x, scale [N] and bias.

    Args:
        x: [..., K] floating.
        W: [N, K] dense, or its bytes.
        shape: [N, K].
        scale: [N]; to scale the bias too, as peft does, give bias ∘ scale.
        bias: [N] or None.
        kind: ``"nf4"`` or ``"fp4"``, of bytes.
        block_size: Of bytes.
    """
    u = _base(x, W, shape, {"kind": kind, "block_size": block_size})
    return output_scale(u, scale, bias)


def dora_linear(
    x: Tensor,
    W: Tensor | Packed4bit,
    shape: Sequence[int],
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Y = (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) ∘ scale + bias; differentiable in x, A, B, scale, bias.

    Args:
        x: [..., K] floating.
        W: [N, K] dense, or its bytes.
        shape: [N, K].
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        scale: [N], magnitude over the row norms of W + scaling · B A, which are not differentiated.
        bias: [N] or None.
        kind: ``"nf4"`` or ``"fp4"``, of bytes.
        block_size: Of bytes.
        dropout_p: Probability of dropping an element of x in the low-rank branch.
        training: Whether dropout is on.
    """
    drop: dict[str, Any] = {"dropout_p": dropout_p, "training": training}
    if isinstance(W, Packed4bit):
        how: dict[str, Any] = {"kind": kind, "block_size": block_size, **drop}
        u = nf4_lora_linear(x, W, shape, None, A, B, scaling, **how)
    else:
        u = lora_linear(x, W, None, A, B, scaling, **drop)
    return output_scale(u, scale, bias)
