"""Pooled blockwise 8-bit optimizer step: AdamW and Lion over many tensors at once.

All tensors share one pool of state. Each begins at a multiple of 256, so its 256-blocks are those
of bitsandbytes. A state element is map[code] · absmax[block], with the signed dynamic map for the
first moment m and the unsigned one for the second, v. One step, in fp32:
    AdamW   p ← p·decay;  m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  p ← p − step·m / (√v + eps)
    Lion    p ← p·decay;  p ← p − step·sign(β1·m + (1−β1)·g);  m ← β2·m + (1−β2)·g
then absmax of the new moments and their nearest codes (the lower one on a tie). A row of `hyper`
fp32 [T, 7] is (decay, step, eps, β1, 1−β1, β2, 1−β2) for one tensor: decay = 1 − lr·weight_decay,
and for AdamW step = lr·√(1−β2ᵗ)/(1−β1ᵗ), eps scaled by √(1−β2ᵗ), which is torch.optim.AdamW's
update. The decay comes before the update, as in torch; bitsandbytes' CUDA kernel does it after (a
difference of lr²·wd). Bytes moved per element, AdamW on fp32: 12 for p and g, 4.06 for the state.
Source: Dettmers et al. 2021, arXiv:2110.02861; Chen et al. 2023, arXiv:2302.06675 (Lion).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.adamw_8bit_cpu import step_cpu
from lightning_peft_kernels.backend import choose
from lightning_peft_kernels.dynamic_map import BLOCK, dequantize_blocks, quantize_blocks

__all__ = [
    "BLOCK",
    "dequantize_blocks",
    "pooled_8bit_step",
    "pooled_8bit_step_reference",
    "quantize_blocks",
]


# ---- reference


def pooled_8bit_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """The formulas, a tensor at a time. Arguments as for `pooled_8bit_step`."""
    if found_inf is not None and float(found_inf) != 0.0:
        return
    for p, grad, start, row in zip(params, grads, starts, hyper.tolist(), strict=True):
        decay, step, eps, beta1, rest1, beta2, rest2 = row
        n = p.numel()
        here, blocks = slice(start, start + n), slice(start // BLOCK, (start + n - 1) // BLOCK + 1)
        g = grad.reshape(-1).float()
        g = g if grad_scale is None else g / grad_scale
        g = -g if maximize else g
        m = dequantize_blocks(code1[here], absmax1[blocks], signed=True)
        value = p.reshape(-1).float() * decay
        if code2 is None or absmax2 is None:
            value = value - step * torch.sign(m * beta1 + g * rest1)
            m = m * beta2 + g * rest2
        else:
            v = dequantize_blocks(code2[here], absmax2[blocks], signed=False)
            m = m * beta1 + g * rest1
            v = v * beta2 + g * g * rest2
            value = value - step * (m / (v.sqrt() + eps))
            code2[here], absmax2[blocks] = quantize_blocks(v, signed=False)
        code1[here], absmax1[blocks] = quantize_blocks(m, signed=True)
        p.copy_(value.view_as(p))


# ---- op

_library = torch.library.Library("lightning_peft", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "pooled_8bit_step(Tensor(a!)[] params, Tensor[] grads, int[] starts, Tensor hyper, Tensor(b!) "
    "code1, Tensor(c!) absmax1, Tensor(d!)? code2, Tensor(e!)? absmax2, Tensor? grad_scale, "
    "Tensor? found_inf, bool maximize) -> ()"
)


def _implementation(
    params: list[Tensor],
    grads: list[Tensor],
    starts: list[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
) -> None:
    if choose("pooled_8bit_step", code1.device, params[0].dtype).backend == "triton":
        from lightning_peft_kernels.adamw_8bit_triton import step_triton

        step_triton(
            params,
            grads,
            starts,
            hyper,
            code1,
            absmax1,
            code2,
            absmax2,
            grad_scale,
            found_inf,
            maximize,
        )
    elif code1.device.type == "cpu":
        if found_inf is None or float(found_inf) == 0.0:
            step_cpu(
                params, grads, starts, hyper, code1, absmax1, code2, absmax2, grad_scale, maximize
            )
    else:
        pooled_8bit_step_reference(
            params,
            grads,
            starts,
            hyper,
            code1,
            absmax1,
            code2,
            absmax2,
            grad_scale,
            found_inf,
            maximize,
        )


_library.impl(  # type: ignore[no-untyped-call]
    "pooled_8bit_step", _implementation, "CompositeExplicitAutograd"
)
torch.library.register_fake("lightning_peft::pooled_8bit_step", lambda *a, **k: None, lib=_library)


@torch.no_grad()
def pooled_8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None = None,
    absmax2: Tensor | None = None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """One step of AdamW, or of Lion without second moments, in place; one launch on CUDA.

    Args:
        params: contiguous, of one dtype; all tensors on one device. None may be empty.
        grads: the shapes of `params`, of one dtype.
        starts: first element of each tensor in the pool, a multiple of 256.
        hyper: fp32 [T, 7], see the module.
        code1: uint8 [pool], `absmax1` fp32 [pool / 256]; likewise `code2`, `absmax2`.
        absmax1: see `code1`.
        code2: None for Lion.
        absmax2: None for Lion.
        grad_scale: fp32 scalar that gradients are divided by.
        found_inf: fp32 scalar; nothing changes where it is not 0.
        maximize: ascend.

    Raises:
        ValueError: mixed dtypes, a start that is no multiple of 256, a parameter that is not
            contiguous.
    """
    if not params:
        return
    kinds = {(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"pooled_8bit_step: expected one dtype, got {kinds}; call once a dtype")
    if any(start % BLOCK for start in starts):
        raise ValueError(
            f"pooled_8bit_step: expected starts % {BLOCK} = 0, got {list(starts)}; pad"
        )
    if not all(p.is_contiguous() for p in params):
        raise ValueError(
            "pooled_8bit_step: expected contiguous parameters, got a strided one; copy it"
        )
    torch.ops.lightning_peft.pooled_8bit_step(
        list(params), list(grads), list(starts), hyper, code1, absmax1, code2, absmax2,
        grad_scale, found_inf, maximize,
    )  # fmt: skip
