"""Pooled blockwise 8-bit optimizer step: AdamW and Lion over many tensors at once.

All tensors share one pool of state. Each starts at a multiple of 256, so its 256-blocks are those
of bitsandbytes. A state element is map[code] · absmax[block], with the signed dynamic map for the
first moment m and the unsigned one for the second moment v. One step, in fp32:

    AdamW   p ← p·decay;  m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  p ← p − step·m / (√v + eps)
    Lion    p ← p·decay;  p ← p − step·sign(β1·m + (1−β1)·g);  m ← β2·m + (1−β2)·g

The step then stores absmax of the new moments and their nearest codes (the lower one on a tie).
`hyper` fp32 [T, 7] holds one row per tensor: (decay, step, eps, β1, 1−β1, β2, 1−β2), with
decay = 1 − lr·weight_decay. For AdamW, step = lr·√(1−β2ᵗ)/(1−β1ᵗ) and eps is scaled by √(1−β2ᵗ),
which gives torch.optim.AdamW's update. Decay precedes the update, as in torch; bitsandbytes' CUDA
kernel decays afterwards (a difference of lr²·wd). AdamW on fp32 moves 12 bytes per element for p
and g, and 4.06 for the state.
Source: Dettmers et al. 2021, arXiv:2110.02861; Chen et al. 2023, arXiv:2302.06675 (Lion).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import BLOCK, dequantize_blocks, quantize_blocks
from lightning_peft_kernels.dispatch import Backend, current_backend, run
from lightning_peft_kernels.optim.adamw_8bit_cpu import step_cpu
from lightning_peft_kernels.optim.step_inputs import PooledStep
from lightning_peft_kernels.registration import define_op

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
    """Compute `pooled_8bit_step` in plain torch, one tensor at a time."""
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


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    starts: Sequence[int],
    hyper: Tensor,
    code1: Tensor,
    absmax1: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    backend: Backend = "auto",
) -> None:
    work = PooledStep(
        params, grads, starts, hyper, code1, absmax1, code2, absmax2, grad_scale, found_inf,
        maximize,
    )  # fmt: skip

    def by_kernel() -> None:
        from lightning_peft_kernels.optim.adamw_8bit_triton import step_triton

        step_triton(work)

    def by_torch() -> None:
        (step_cpu if code1.device.type == "cpu" else pooled_8bit_step_reference)(work)

    run("pooled_8bit_step", code1.device, params[0].dtype, backend, by_kernel, by_torch)


def _step_fake(*fields: object) -> None:
    """Return nothing: the step changes its arguments only."""


define_op(
    "pooled_8bit_step(Tensor(a!)[] params, Tensor[] grads, int[] starts, Tensor hyper, Tensor(b!) "
    "code1, Tensor(c!) absmax1, Tensor(d!)? code2, Tensor(e!)? absmax2, Tensor? grad_scale, "
    "Tensor? found_inf, bool maximize, str backend='auto') -> ()",
    fake=_step_fake,
    default=_step,
)


@torch.no_grad()
def pooled_8bit_step(work: PooledStep) -> None:
    """Run one step of AdamW in place, or of Lion if there is no second moment.

    One launch on CUDA.

    Args:
        work: Tensors and settings of the step.

    Raises:
        ValueError: The dtypes differ, a start is not a multiple of 256, or a parameter is not
            contiguous.
    """
    params, grads, starts = list(work.params), list(work.grads), list(work.starts)
    if not params:
        return
    kinds = {(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)}
    if len(kinds) > 1:
        raise ValueError(
            f"pooled_8bit_step: expected one dtype, got {kinds}; call it once per dtype"
        )
    # Lists, not generators, which take a call of Python per parameter.
    if [start for start in starts if start % BLOCK]:
        raise ValueError(f"pooled_8bit_step: expected starts % {BLOCK} = 0, got {starts}; pad")
    if [p for p in params if not p.is_contiguous()]:
        raise ValueError(
            "pooled_8bit_step: expected contiguous parameters, got a strided one; copy it"
        )
    torch.ops.lightning_peft.pooled_8bit_step(params, grads, starts, *work[3:], current_backend())
