"""Shared-input projections against the layers one by one, and against fp64."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.nf4 import linear, projections
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.projections import (
    Projection,
    nf4_grouped_projections,
    nf4_grouped_projections_reference,
)
from torch import Tensor

from tests.helpers.compare import assert_close
from tests.helpers.traffic import Traffic


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
    weights = [dequantize_4bit(p.q, p.shape, dtype).double() for p in group]
    ys = [
        torch.nn.functional.linear(wide, W, p.bias) + wide @ p.A.T @ p.B.T * p.scaling
        for W, p in zip(weights, doubled, strict=True)
    ]
    truth = results(wide, doubled, ys, dYs)
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    for name, want in truth.items():
        if want.numel():
            assert_close(name, got[name], want, same_dtype=plain[name], floor=floor)


@pytest.mark.parametrize("widths", [(512, 128, 128), (1792, 1792)], ids=["q, k, v", "gate, up"])
def test_a_group_moves_fewer_bytes_than_its_layers(
    widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama block of 8B, an eighth as wide, forward and backward; both decode W for free."""
    K, M, dtype = 512, 256, torch.bfloat16
    group = layers(K, [(N, 16) for N in widths], dtype)
    W = torch.randn(sum(widths), K).to(dtype)
    monkeypatch.setattr(projections, "stacked_weights", lambda *given: W)
    monkeypatch.setattr(linear, "weight_for_product", lambda q, packing, *given: W[: packing[0][0]])
    moved = {}
    for together in (True, False):
        x = torch.randn(M, K).to(dtype).requires_grad_()
        dYs = [torch.randn(M, N).to(dtype) for N in widths]
        with Traffic() as traffic:
            if together:
                ys = nf4_grouped_projections(x, group)
            else:
                ys = [nf4_lora_linear(x, p.q, p.shape, p.bias, p.A, p.B, 1.5) for p in group]
            torch.autograd.backward(ys, dYs)
        moved[together] = traffic.bytes
    assert moved[True] < moved[False], moved


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_layers_one_by_one_under_the_same_seed(dropout: float) -> None:
    """Forward and every gradient, masks included: each layer draws the seed it would draw alone."""
    group = [p._replace(dropout_p=dropout) for p in layers(64, [(48, 4), (16, 2)], torch.float32)]
    x0 = torch.randn(5, 64)
    found = []
    for together in (True, False):
        for p in group:
            for t in (p.A, p.B, p.bias):
                if t is not None:
                    t.grad = None
        x = x0.clone().requires_grad_()
        torch.manual_seed(11)
        ys = (
            nf4_grouped_projections(x, group)
            if together
            else [
                nf4_lora_linear(x, p.q, p.shape, p.bias, p.A, p.B, p.scaling, dropout_p=p.dropout_p)
                for p in group
            ]
        )
        dYs = [torch.ones_like(y) * (i + 1) for i, y in enumerate(ys)]
        found.append(results(x, group, ys, dYs))
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=1e-5, atol=1e-5, msg=name)


def test_dropout_is_off_in_evaluation() -> None:
    eye, q = torch.eye(32), quantize_4bit(torch.zeros(32, 32))
    x = torch.ones(40, 32)
    group = [Projection(q, (32, 32), None, eye, eye, 1.0, 0.5)] * 2
    y1, y2 = nf4_grouped_projections(x, group)
    assert not torch.equal(y1, y2)
    assert set(y1.unique().tolist()) == {0.0, 2.0}
    evaluated = [p._replace(dropout_p=0.0) for p in group]
    assert torch.equal(nf4_grouped_projections(x, evaluated)[0], x)


def test_an_output_may_be_changed_in_place_and_one_may_stay_unused() -> None:
    group = layers(64, [(32, 4), (16, 4)], torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    first, second = nf4_grouped_projections(x, group)
    before = second.detach().clone()
    first.mul_(2.0)
    assert torch.equal(second, before)
    first.sum().backward()
    assert x.grad is not None
    alone = x.detach().clone().requires_grad_()
    p = group[0]
    want = nf4_lora_linear(alone, p.q, p.shape, p.bias, p.A, p.B, p.scaling)
    want.mul(2.0).sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(x.grad, alone.grad, rtol=1e-5, atol=1e-5)


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


def test_mapped_over_examples() -> None:
    group = layers(32, [(16, 4), (8, 2)], torch.float32)
    x = torch.randn(3, 5, 32)
    mapped = torch.func.vmap(lambda one: tuple(nf4_grouped_projections(one, group)))(x)
    for y, want in zip(mapped, nf4_grouped_projections(x, group), strict=True):
        torch.testing.assert_close(y, want)
