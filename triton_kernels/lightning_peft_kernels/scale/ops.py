"""An output scale and a bias in one pass, y = u ∘ g + bias, for IA³ and DoRA over any base.

Shapes: u [..., N], g [N], bias [N]. Plain torch passes over M·N elements for the product and again
for the bias; its backward passes over them for dY ∘ g, for dY ∘ u and for the sum. Here forward
reads and writes once (4 bytes per element in bf16). Backward reads dY and u and writes du once, and
sums dg and dbias on the way in fp32 (6 bytes per element).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    apply_or_forward,
    gradients_of,
    in_functorch_transform,
    is_double_backward,
)
from lightning_peft_kernels.dispatch import Backend, current_backend, run
from lightning_peft_kernels.registration import define_op

__all__ = ["output_scale", "output_scale_reference"]


def output_scale_reference(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `output_scale` in plain torch: in fp32 or wider, rounded once."""
    wide = torch.promote_types(u.dtype, torch.float32)
    y = u.to(wide) * g.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(u.dtype)


def _unbiased(u: Tensor, g: Tensor) -> Tensor:
    return output_scale_reference(u, g, None)


def _output_scale(u: Tensor, g: Tensor, bias: Tensor | None, backend: Backend = "auto") -> Tensor:
    def by_kernel() -> Tensor:
        from lightning_peft_kernels.scale.triton import forward

        u_, g_ = u.contiguous(), g.contiguous()  # kernels read rows without gaps
        return forward(u_, g_, None if bias is None else bias.contiguous())

    def by_torch() -> Tensor:
        return output_scale_reference(u, g, bias)

    return run("output_scale", u.device, u.dtype, backend, by_kernel, by_torch)


def _output_scale_fake(
    u: Tensor, g: Tensor, bias: Tensor | None, backend: Backend = "auto"
) -> Tensor:
    return u.new_empty(u.shape)


def _output_scale_backward(
    dY: Tensor, u: Tensor, g: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (du, dg, dbias) of dY, u [M, N]; the sums are fp32 or wider."""

    def by_kernel() -> tuple[Tensor, Tensor, Tensor]:
        from lightning_peft_kernels.scale.triton import backward

        return backward(dY.contiguous(), u.contiguous(), g.contiguous())

    def by_torch() -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(u.dtype, torch.float32)
        d = dY.to(wide)
        return (d * g.to(wide)).to(u.dtype), (d * u.to(wide)).sum(0), d.sum(0)

    return run("output_scale_backward", u.device, u.dtype, backend, by_kernel, by_torch)


def _output_scale_backward_fake(
    dY: Tensor, u: Tensor, g: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    column = u.new_empty(u.shape[1], dtype=wide)
    return u.new_empty(u.shape), column, column.clone()


define_op(
    "output_scale(Tensor u, Tensor g, Tensor? bias, str backend='auto') -> Tensor",
    fake=_output_scale_fake,
    default=_output_scale,
)
define_op(
    "output_scale_backward(Tensor dY, Tensor u, Tensor g, str backend='auto') -> "
    "(Tensor, Tensor, Tensor)",
    fake=_output_scale_backward_fake,
    default=_output_scale_backward,
)


class _Context(Context, Protocol):
    """What forward saves for backward."""

    bias_dtype: torch.dtype | None
    backend: Backend


class _OutputScale(KernelFunction):
    """y = u ∘ g + bias."""

    @staticmethod
    def forward(
        ctx: _Context, u: Tensor, g: Tensor, bias: Tensor | None, backend: Backend
    ) -> Tensor:
        u2 = u.reshape(-1, u.shape[-1]).contiguous()
        ctx.save_for_backward(u, g)
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        y: Tensor = torch.ops.lightning_peft.output_scale(u2, g, bias, backend)
        return y.view(u.shape)

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        u, g = ctx.saved_tensors
        needs_u, needs_g, needs_bias, _ = ctx.needs_input_grad
        dY2 = dY.reshape(-1, dY.shape[-1]).contiguous()
        u2 = u.reshape(-1, u.shape[-1]).contiguous()
        if is_double_backward():
            du, dg = gradients_of(_unbiased, (u, g), (needs_u, needs_g), dY)
            return du, dg, dY2.sum(0).to(ctx.bias_dtype) if needs_bias else None, None
        du, dg, d_bias = torch.ops.lightning_peft.output_scale_backward(dY2, u2, g, ctx.backend)
        return (
            du.view(u.shape),
            dg.to(g.dtype) if needs_g else None,
            d_bias.to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


def output_scale(u: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``y = u ∘ g + bias`` in the dtype of u; differentiable in all three.

    Args:
        u: [..., N] floating.
        g: Scale per column, [N].
        bias: [N] or None. It is not scaled.
    """
    if in_functorch_transform():
        return output_scale_reference(u, g, bias)
    y: Tensor = apply_or_forward(_OutputScale, u, g, bias, current_backend())
    return y
