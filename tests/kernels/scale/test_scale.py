"""Output scale over the base of IA³ and of DoRA against fp64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.lora.linear import lora_linear
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.scale.ops import output_scale, output_scale_reference

from tests.helpers.compare import FLOOR, assert_close


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def wide(ts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in ts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize(("M", "K", "N", "R"), [(5, 64, 48, 4), (1, 33, 7, 1), (9, 128, 64, 200)])
@pytest.mark.parametrize("op", ["ia3", "dora"])
def test_against_fp64(
    op: str, M: int, K: int, N: int, R: int, packed: bool, dtype: torch.dtype
) -> None:
    W = torch.randn(N, K) / K**0.5
    q = quantize_4bit(W)
    dense = (dequantize_4bit(q, (N, K), dtype) if packed else W.to(dtype)).double()
    names = ["x", "scale", "bias", "A", "B"]
    ts = leaves((M, K), (N,), (N,), (R, K), (N, R), dtype=dtype)
    with torch.no_grad():
        ts[3] /= K**0.5

    def run(x, g, b, A, B):  # type: ignore[no-untyped-def]
        if op == "ia3":
            u = nf4_linear(x, q, (N, K), None) if packed else x @ W.to(dtype).T
        elif packed:
            u = nf4_lora_linear(x, q, (N, K), None, A, B, 0.5)
        else:
            u = lora_linear(x, W.to(dtype), None, A, B, 0.5)
        return output_scale(u, g, b)

    def formula(W, x, g, b, A, B):  # type: ignore[no-untyped-def]
        u = x @ W.T if op == "ia3" else x @ W.T + 0.5 * x @ A.T @ B.T
        return u * g + b

    dY = torch.randn(M, N).to(dtype)
    y, doubles = run(*ts), wide(ts)
    same = [t.detach().clone().requires_grad_() for t in ts]
    want, plain = formula(dense, *doubles), formula(dense.to(dtype), *same)
    assert_close("y", y, want, same_dtype=plain, floor=FLOOR[dtype])
    y.backward(dY)
    want.backward(dY.double())
    plain.backward(dY)
    for name, t, d, p in zip(names, ts, doubles, same, strict=True):
        if d.grad is not None:
            assert t.grad is not None
            assert_close(f"d{name}", t.grad, d.grad, same_dtype=p.grad, floor=FLOOR[dtype])


@pytest.mark.parametrize("shape", [(0, 8), (2, 3, 8), (8,)], ids=str)
def test_shapes_and_layouts(shape: tuple[int, ...]) -> None:
    (g,) = leaves((8,), dtype=torch.float32)
    u = torch.randn(*shape[:-1], 16)[..., ::2].requires_grad_()
    y = output_scale(u, g)
    assert_close("y", y, output_scale_reference(u, g, None))
    y.sum().backward()
    assert g.grad is not None
    assert_close("dg", g.grad, u.detach().reshape(-1, 8).sum(0))


def test_gradcheck_and_opcheck() -> None:
    u, g, b = leaves((3, 5), (5,), (5,), dtype=torch.float64)
    assert torch.autograd.gradcheck(output_scale, (u, g, b))
    assert torch.autograd.gradcheck(output_scale_reference, (u, g, b))
    ops = torch.ops.lightning_peft
    torch.library.opcheck(ops.output_scale.default, (u.detach(), g.detach(), b.detach()))
    torch.library.opcheck(ops.output_scale_backward.default, (u.detach(), u.detach(), g.detach()))
