"""LoRA linear ops over dense and packed bases against the fp64 formula, forward and every
gradient.
"""

import itertools

import pytest
import torch
from lightning_peft_kernels.lora.linear import lora_linear, lora_linear_reference
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit

NAMES = ("x", "A", "B", "bias")
SIZES = [(5, 64, 48, 4), (1, 33, 7, 1), (17, 130, 64, 16), (3, 64, 300, 64), (2, 256, 256, 256)]
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(M, K, N, R, dtype, bias=True, x=None):
    return {
        "x": torch.randn(M, K).to(dtype) if x is None else x,
        "A": torch.randn(R, K).to(dtype) / K**0.5,
        "B": torch.randn(N, R).to(dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }


def grads(f, t, dY):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in t.items() if v is not None}
    y = f(**{**t, **leaves})
    y.backward(dY.to(y.dtype))
    return {"y": y.detach(), **{f"d{k}": v.grad for k, v in leaves.items()}}


def check(ours, W, t, dtype, s=0.7):
    """err(ours, fp64) ≤ 2 × err(torch in the same dtype, fp64) + floor, for y and every
    gradient.
    """
    dY = torch.randn(*t["x"].shape[:-1], W.shape[0])

    def formula(weight):
        def f(x, A, B, bias=None):
            return lora_linear_reference(x, weight.to(x.dtype), bias, A, B, s)

        return f

    wide = {k: None if v is None else v.double() for k, v in t.items()}
    truth = grads(formula(W.double()), wide, dY.double())
    plain = grads(formula(W), t, dY)
    got = grads(ours, t, dY)
    for name, want in truth.items():
        unit = want.abs().max().clamp_min(1e-6)
        err = (got[name].double() - want).abs().max() / unit
        allowed = 2 * (plain[name].double() - want).abs().max() / unit + FLOOR[dtype]
        assert err <= allowed, f"{name}: relative error {err:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense_base(size, bias, dtype):
    M, K, N, R = size
    W = torch.randn(N, K).to(dtype) / K**0.5
    t = make(M, K, N, R, dtype, bias)
    check(lambda x, A, B, bias=None: lora_linear(x, W, bias, A, B, 0.7), W, t, dtype)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_base(size, dtype, nested):
    M, K, N, R = size
    q = quantize_4bit(torch.randn(N, K) / K**0.5, double_quant=nested)
    W = dequantize_4bit(q, (N, K), dtype)
    t = make(M, K, N, R, dtype)

    def ours(x, A, B, bias=None):
        return nf4_lora_linear(x, q, (N, K), bias, A, B, 0.7)

    check(ours, W, t, dtype)


def layouts():
    x = torch.randn(6, 8, 64)
    yield "three axes", x
    yield "transposed", torch.randn(64, 6).T
    yield "expanded", torch.randn(1, 64).expand(5, 64)
    yield "strided", torch.randn(6, 128)[:, ::2]
    yield "empty batch", torch.randn(0, 64)
    yield "one row", torch.randn(64)


@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=[n for n, _ in layouts()])
def test_layouts_of_the_input(name, x):
    W = torch.randn(48, 64)
    q = quantize_4bit(W)
    t = make(0, 64, 48, 4, torch.float32, x=x)
    Wq = dequantize_4bit(q, W.shape, torch.float32)
    if name == "empty batch":
        got = grads(
            lambda x, A, B, bias: nf4_lora_linear(x, q, W.shape, bias, A, B, 1.0),
            t,
            torch.zeros(0, 48),
        )
        assert got["y"].shape == (0, 48)
        assert not got["dA"].any()
        return
    check(lambda x, A, B, bias: lora_linear(x, W, bias, A, B, 0.7), W, t, torch.float32)
    check(
        lambda x, A, B, bias: nf4_lora_linear(x, q, W.shape, bias, A, B, 0.7), Wq, t, torch.float32
    )


def test_wider_adapters_compute_in_their_own_dtype():
    """As Hugging Face peft: a bf16 base with fp32 adapters runs the rank-sized products in fp32."""
    W = torch.randn(32, 64).bfloat16()
    x = torch.randn(4, 64).bfloat16()
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    y = lora_linear(x, W, None, A, B, 1.0)
    want = (x @ W.T + (x.float() @ A.T @ B.T).bfloat16()).float()
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).abs().max() <= 2**-6 * want.abs().max()
    y.float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_dtype_and_gradients_return_in_the_parameters(dtype):
    q = quantize_4bit(torch.randn(32, 64))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = nf4_lora_linear(x, q, (32, 64), None, A, B, 1.0)
        assert nf4_linear(x, q, (32, 64), None).dtype == dtype
    assert y.dtype == dtype
    y.sum().backward()
    assert A.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_an_unbiased_mask_on_the_low_rank_branch_only(p):
    """With B = A = identity and W = 0 the output is the mask itself; the gradient must use the same
    one.
    """
    n = 64
    eye, x = torch.eye(n), torch.ones(500, n, requires_grad=True)
    y = lora_linear(x, torch.zeros(n, n), None, eye, eye, 1.0, dropout_p=p)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))
    assert abs(float(y.detach().mean()) - 1.0) < 5 * (p / (1 - p) / y.numel()) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(lora_linear(x, torch.zeros(n, n), None, eye, eye, 1.0, dropout_p=0.0), x)


def test_gradcheck_of_the_reference_and_of_ours():
    t = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 5), (4, 5), (4,), (2, 5), (4, 2))
    ]
    assert torch.autograd.gradcheck(
        lambda x, W, b, A, B: lora_linear_reference(x, W, b, A, B, 0.5), t
    )
    assert torch.autograd.gradcheck(lambda x, W, b, A, B: lora_linear(x, W, b, A, B, 0.5), t)


def test_compiles_without_a_graph_break():
    q = quantize_4bit(torch.randn(32, 64))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)

    def f(x):
        return nf4_lora_linear(x, q, (32, 64), None, A, B, 0.5)

    x = torch.randn(3, 64)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(y, f(x), atol=1e-6)
    y.sum().backward()
    assert A.grad is not None


def test_nothing_but_rank_sized_tensors_is_saved():
    """The dequantised weight must not live until backward: what is saved is x, S, A, B and the
    packed bytes.
    """
    N, K, R, M = 256, 512, 4, 8
    q = quantize_4bit(torch.randn(N, K))
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    x = torch.randn(M, K, requires_grad=True)
    sizes: list[int] = []

    def note(t):
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        nf4_lora_linear(x, q, (N, K), None, A, B, 1.0)
    assert max(sizes) <= N * K // 2, "a dense [N, K] tensor is kept for backward"
    assert sum(sizes) <= N * K // 2 + 4 * (M * K + M * R + R * K + N * R) + N * K // 32


def test_frozen_input_and_frozen_factors_cost_no_gradient():
    q = quantize_4bit(torch.randn(32, 64))
    x = torch.randn(3, 64)
    for trains in itertools.product([True, False], repeat=2):
        A, B = (
            torch.randn(4, 64, requires_grad=trains[0]),
            torch.randn(32, 4, requires_grad=trains[1]),
        )
        y = nf4_lora_linear(x, q, (32, 64), None, A, B, 1.0)
        if any(trains):
            y.sum().backward()
        assert (A.grad is not None) == trains[0]
        assert (B.grad is not None) == trains[1]
