"""The pooled 8-bit step: codes, CPU path and kernel against formulas written here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_peft_kernels.codebooks.eight_bit import code_cells, decision_points, dynamic_map
from lightning_peft_kernels.optim.adamw_8bit import (
    PooledStep,
    dequantize_blocks,
    pooled_8bit_step,
    pooled_8bit_step_reference,
    quantize_blocks,
)


@pytest.mark.parametrize("signed", [True, False])
def test_table_gives_the_nearest_code(signed: bool) -> None:
    v = torch.rand(50_000) * 2 - 1 if signed else torch.rand(50_000)
    edges = decision_points(signed)
    inf = torch.tensor(torch.inf)
    v = torch.cat([v, v * 1e-3, v * 1e-6, edges, edges.nextafter(inf), edges.nextafter(-inf)])
    v = torch.cat([v, torch.tensor([0.0, 1.0])]) if signed else torch.cat([v, torch.zeros(1)]).abs()
    bits = v.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    codes = (bits + code_cells(signed)[(bits >> 16) + (32768 if signed else 0)]) >> 16
    table = dynamic_map(signed).double()
    distance = (v.double()[:, None] - table).abs()
    taken = distance.gather(1, codes.long()[:, None])[:, 0]
    # A decision point is an fp32 midpoint: a value within 1.5 units of it may go either way.
    assert (taken <= distance.min(1).values + 3 * 2**-23 * v.abs().double() + 1e-15).all()
    assert torch.equal(codes, torch.searchsorted(edges, v).int())


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_come_back_within_half_a_gap(signed: bool) -> None:
    v = torch.randn(1000) if signed else torch.randn(1000).square()
    codes, absmax = quantize_blocks(v, signed=signed)
    back = dequantize_blocks(codes, absmax, signed=signed)
    assert ((back - v).abs() <= 0.0071 * absmax.repeat_interleave(256)[:1000]).all()


def _case(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor]], list[int]]:
    shapes = [(64, 100), (300,), (1,), (700, 400), (13, 7)]
    params = [torch.randn(s).to(dtype) for s in shapes]
    grads = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(3)]
    starts, at = [], 0
    for p in params:
        starts.append(at)
        at += -(-p.numel() // 256) * 256
    return params, grads, [*starts, at]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lion", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_cpu_path_is_the_reference(dtype: torch.dtype, lion: bool, maximize: bool) -> None:
    params, grads, (*starts, total) = _case(dtype)
    hyper = torch.tensor([[0.999, 1e-2, 1e-8, 0.9, 0.1, 0.99, 0.01]] * 5)
    hyper[2:4, 1] *= 16  # another group in between
    state = [torch.full((total,), 127, dtype=torch.uint8), torch.zeros(total // 256)]
    if not lion:
        state += [torch.zeros(total, dtype=torch.uint8), torch.zeros(total // 256)]
    told, told_params = [s.clone() for s in state], [p.clone() for p in params]
    for own in grads:
        more = {"grad_scale": torch.tensor(2.0), "maximize": maximize}
        pooled_8bit_step(PooledStep(params, own, starts, hyper, *state, **more))
        pooled_8bit_step_reference(PooledStep(told_params, own, starts, hyper, *told, **more))
    spare = 1e-4 if dtype == torch.float32 else 2e-2
    for i, (a, b) in enumerate(zip(params, told_params, strict=True)):
        # A code that falls the other way at a tie moves its own element by more than rounding.
        apart = (a - b).abs() > spare * (1 + b.abs())
        assert apart.sum() <= 1e-4 * a.numel(), (i, int(apart.sum()), a.numel())
    for a, b in zip(state, told, strict=True):
        if a.dtype == torch.uint8:
            assert (a != b).float().mean() < 1e-3  # rounding of one product, at a tie


def test_op_checks() -> None:
    params, grads, (*starts, total) = _case(torch.float32)
    hyper = torch.tensor([[0.999, 1e-2, 1e-8, 0.9, 0.1, 0.99, 0.01]] * 5)
    codes = [torch.full((total,), 127, dtype=torch.uint8), torch.zeros(total // 256)]
    codes += [torch.zeros(total, dtype=torch.uint8), torch.zeros(total // 256)]
    torch.library.opcheck(
        torch.ops.lightning_peft.pooled_8bit_step.default,
        (params, grads[0], starts, hyper, *codes, None, None, False),
    )


def test_unaligned_starts_are_refused() -> None:
    p = torch.zeros(4)
    with pytest.raises(ValueError, match="got \\[3\\]"):
        pooled_8bit_step(PooledStep([p], [p], [3], torch.zeros(1, 7), p.byte(), p, p.byte(), p))


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreter_script.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agrees"
