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

from typing import Any

import torch

from lightning_peft_kernels.codebooks.eight_bit import BLOCK, dequantize_blocks, quantize_blocks
from lightning_peft_kernels.dispatch import choose
from lightning_peft_kernels.optim.adamw_8bit_cpu import step_cpu
from lightning_peft_kernels.optim.step_inputs import PooledStep

__all__ = [
    "BLOCK",
    "PooledStep",
    "dequantize_blocks",
    "pooled_8bit_step",
    "pooled_8bit_step_reference",
    "quantize_blocks",
]


# ---- reference


def pooled_8bit_step_reference(work: PooledStep) -> None:
    """The formulas, a tensor at a time."""
    if work.found_inf is not None and float(work.found_inf) != 0.0:
        return
    rows, code2, absmax2 = work.hyper.tolist(), work.code2, work.absmax2
    for p, grad, start, row in zip(work.params, work.grads, work.starts, rows, strict=True):
        decay, step, eps, beta1, rest1, beta2, rest2 = row
        n = p.numel()
        here, blocks = slice(start, start + n), slice(start // BLOCK, (start + n - 1) // BLOCK + 1)
        g = grad.reshape(-1).float()
        g = g if work.grad_scale is None else g / work.grad_scale
        g = -g if work.maximize else g
        m = dequantize_blocks(work.code1[here], work.absmax1[blocks], signed=True)
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
        work.code1[here], work.absmax1[blocks] = quantize_blocks(m, signed=True)
        p.copy_(value.view_as(p))


# ---- op

_library = torch.library.Library("lightning_peft", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "pooled_8bit_step(Tensor(a!)[] params, Tensor[] grads, int[] starts, Tensor hyper, Tensor(b!) "
    "code1, Tensor(c!) absmax1, Tensor(d!)? code2, Tensor(e!)? absmax2, Tensor? grad_scale, "
    "Tensor? found_inf, bool maximize) -> ()"
)


def _implementation(*fields: Any) -> None:
    work = PooledStep(*fields)
    device = work.code1.device
    if choose("pooled_8bit_step", device, work.params[0].dtype).backend == "triton":
        from lightning_peft_kernels.optim.adamw_8bit_triton import step_triton

        step_triton(work)
    elif device.type == "cpu":
        step_cpu(work)
    else:
        pooled_8bit_step_reference(work)


_library.impl(  # type: ignore[no-untyped-call]
    "pooled_8bit_step", _implementation, "CompositeExplicitAutograd"
)
torch.library.register_fake("lightning_peft::pooled_8bit_step", lambda *a, **k: None, lib=_library)


@torch.no_grad()
def pooled_8bit_step(work: PooledStep) -> None:
    """One step of AdamW, or of Lion without second moments, in place; one launch on CUDA.

    Raises:
        ValueError: mixed dtypes, a start that is no multiple of 256, a parameter that is not
            contiguous.
    """
    params, grads, starts = list(work.params), list(work.grads), list(work.starts)
    if not params:
        return
    kinds = {(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"pooled_8bit_step: expected one dtype, got {kinds}; call once a dtype")
    if any(start % BLOCK for start in starts):
        raise ValueError(f"pooled_8bit_step: expected starts % {BLOCK} = 0, got {starts}; pad")
    if not all(p.is_contiguous() for p in params):
        raise ValueError(
            "pooled_8bit_step: expected contiguous parameters, got a strided one; copy it"
        )
    torch.ops.lightning_peft.pooled_8bit_step(params, grads, starts, *work[3:])
