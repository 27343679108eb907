"""Shared-input projections against the layers one by one, and against fp64."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels import grouped
from lightning_peft_kernels.grouped import (
    Projection,
    nf4_grouped_projections,
    nf4_grouped_projections_reference,
)
from lightning_peft_kernels.nf4 import quantize_4bit
from torch import Tensor

from tests.asserting import assert_close


def layers(K: int, sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[Projection]:
    made = []
    for i, (N, R) in enumerate(sizes):
        A, B, bias = torch.randn(R, K) / K**0.5, torch.randn(N, R), torch.randn(N)
        A, B, bias = (t.to(dtype).requires_grad_() for t in (A, B, bias))
        q = quantize_4bit(torch.randn(N, K) / K**0.5, double_quant=bool(i % 2))
        made.append(Projection(q, (N, K), bias if i else None, A, B, 0.5 + i))
    return made


def widened(p: Projection) -> Projection:
    A, B = (t.detach().double().requires_grad_() for t in (p.A, p.B))
    bias = None if p.bias is None else p.bias.detach().double().requires_grad_()
    return p._replace(A=A, B=B, bias=bias)


def results(x: Tensor, group: list[Projection], ys: list[Tensor], dYs: list[Tensor]):  # type: ignore[no-untyped-def]
    sum((y * d.to(y.dtype)).sum() for y, d in zip(ys, dYs, strict=True)).backward()  # type: ignore[union-attr]
    found = {"dx": x.grad, **{f"y{i}": y.detach() for i, y in enumerate(ys)}}
    for i, p in enumerate(group):
        found |= {f"dA{i}": p.A.grad, f"dB{i}": p.B.grad}
        if p.bias is not None:
            found[f"dbias{i}"] = p.bias.grad
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lead", "K", "sizes"),
    [
        ((7,), 64, [(48, 4), (16, 4), (16, 4)]),
        ((2, 3), 33, [(20, 1), (20, 8)]),
        ((1,), 128, [(64, 256), (7, 3), (1, 1)]),
        ((0,), 64, [(16, 4), (8, 4)]),
    ],
    ids=str,
)
def test_outputs_and_gradients(
    lead: tuple[int, ...], K: int, sizes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    group = layers(K, sizes, dtype)
    x = torch.randn(*lead, K).to(dtype)
    dYs = [torch.randn(*lead, N) for N, _ in sizes]
    mine, alone, wide = (x.detach().clone().requires_grad_() for _ in range(3))
    wide = x.detach().double().requires_grad_()
    got = results(mine, group, nf4_grouped_projections(mine, group), dYs)
    for p in group:
        p.A.grad = p.B.grad = None
        if p.bias is not None:
            p.bias.grad = None
    plain = results(alone, group, nf4_grouped_projections_reference(alone, group), dYs)
    # W is rounded to the dtype first: the truth has the same weights.
    doubled = [widened(p) for p in group]
    weights = [grouped.dequantize_4bit(p.q, p.shape, dtype).double() for p in group]
    ys = [
        torch.nn.functional.linear(wide, W, p.bias) + wide @ p.A.T @ p.B.T * p.scaling
        for W, p in zip(weights, doubled, strict=True)
    ]
    truth = results(wide, doubled, ys, dYs)
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    for name, want in truth.items():
        if want.numel():
            assert_close(name, got[name], want, same_dtype=plain[name], floor=floor)


def test_one_mask_for_the_group() -> None:
    eye, q = torch.eye(32), quantize_4bit(torch.zeros(32, 32))
    x = torch.ones(40, 32, requires_grad=True)
    group = [Projection(q, (32, 32), None, eye, eye, 1.0)] * 2
    y1, y2 = nf4_grouped_projections(x, group, dropout_p=0.5)
    assert torch.equal(y1, y2)
    assert set(y1.unique().tolist()) == {0.0, 2.0}
    (y1.sum() + y2.sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * y1.detach())
    still = nf4_grouped_projections(x, group, dropout_p=0.5, training=False)
    assert torch.equal(still[0], x)


def test_compiles_and_respects_autocast() -> None:
    group = layers(64, [(32, 4), (16, 4)], torch.float32)

    def f(x: Tensor) -> Tensor:
        return torch.cat(nf4_grouped_projections(x, group), dim=-1)

    x = torch.randn(3, 64)
    made = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert_close("compiled", made, f(x).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = f(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert group[0].A.grad is not None
    assert group[0].A.grad.dtype == torch.float32


def test_different_widths_are_refused() -> None:
    a, b = layers(64, [(16, 4)], torch.float32)[0], layers(32, [(16, 4)], torch.float32)[0]
    with pytest.raises(ValueError, match=r"widths \[32, 64\]"):
        nf4_grouped_projections(torch.randn(2, 64), [a, b])
