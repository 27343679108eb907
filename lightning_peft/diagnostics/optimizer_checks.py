"""The kernels of the 8-bit optimizers against the reference: AdamW and Lion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from lightning_peft_kernels.codebooks.eight_bit import BLOCK, ZERO_CODE, dequantize_blocks
from lightning_peft_kernels.optim.adamw_8bit import pooled_8bit_step, pooled_8bit_step_reference
from lightning_peft_kernels.optim.step_inputs import PooledStep
from torch import Tensor

from lightning_peft.diagnostics.pairs import Pair, Shape, close, randn
from lightning_peft.diagnostics.trials import Trial

__all__ = ["optimizer_trials"]

#: decay, step, eps, β1, 1 − β1, β2, 1 − β2
_ROW = (0.99, 1e-3, 1e-8, 0.9, 0.1, 0.999, 1e-3)


def optimizer_trials(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Trial]:
    """Yield one step of each optimizer.

    Args:
        device: Where kernels run.
        dtype: Dtype of parameters and gradients.
        shape: Shape class of the parameter.
    """
    p, g = randn(shape.N, shape.K).to(dtype), randn(shape.N, shape.K, seed=1).to(dtype)
    n = -(-p.numel() // BLOCK) * BLOCK
    draw = torch.Generator().manual_seed(2)
    # No second moment near zero: its quotient would exceed every other by orders of magnitude.
    code1, code2 = (
        torch.randint(low, 256, (n,), generator=draw).to(torch.uint8) for low in (0, 128)
    )
    for signed, codes in ((True, code1), (False, code2)):
        codes[p.numel() :] = ZERO_CODE[signed]  # what a pool holds between tensors
    absmax1, absmax2 = torch.rand(2, n // BLOCK, generator=draw)
    hyper = torch.tensor([_ROW])
    adamw = PooledStep([p], [g], [0], hyper, code1, absmax1, code2, absmax2)
    lion = PooledStep([p], [g], [0], hyper, code1, absmax1)
    m = dequantize_blocks(code1, absmax1, signed=True)[: p.numel()].view(p.shape)
    # Lion takes a sign, which rounding may turn next to zero.
    certain = (_ROW[3] * m.double() + _ROW[4] * g.double()).abs() > 1e-5
    for work, sure in ((adamw, torch.ones_like(certain)), (lion, certain)):
        yield Trial(partial(_step, _on(device, work)), partial(_compare, work, sure))


def _step(work: PooledStep) -> Sequence[Tensor]:
    pooled_8bit_step(work)
    return _changed(work)


def _compare(work: PooledStep, sure: Tensor, found: Sequence[Tensor]) -> list[Pair]:
    """Parameters and scales follow the reference; rounding may move a code by one."""
    expected = _on(torch.device("cpu"), work)
    pooled_8bit_step_reference(expected)
    (p, scales, *codes), (want_p, want_scales, *want_codes) = found, _changed(expected)
    return [
        close("p", p.cpu()[sure], want_p.double()[sure]),
        close("absmax1", scales, want_scales.double()),
        *(
            Pair("code", a.cpu().double(), b.double(), limit=1.0)
            for a, b in zip(codes, want_codes, strict=True)
        ),
    ]


def _on(device: torch.device, work: PooledStep) -> PooledStep:
    """Return a copy on a device."""

    def there(t: Tensor) -> Tensor:
        return t.to(device, copy=True)

    return work._replace(
        params=[there(t) for t in work.params],
        grads=[there(t) for t in work.grads],
        hyper=there(work.hyper),
        code1=there(work.code1),
        absmax1=there(work.absmax1),
        code2=None if work.code2 is None else there(work.code2),
        absmax2=None if work.absmax2 is None else there(work.absmax2),
    )


def _changed(work: PooledStep) -> list[Tensor]:
    """Return copies of what a step changes: the parameter, the first scales, the codes."""
    changed = [work.params[0], work.absmax1, work.code1, work.code2]
    return [t.clone() for t in changed if t is not None]
