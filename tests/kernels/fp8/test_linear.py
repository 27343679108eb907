"""Products with the base in e4m3, emulated on the CPU: errors against fp64, gradients, refusals."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.dispatch import Decision
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import (
    dequantize_e4m3,
    e4m3_scale,
    quantize_rows_e4m3,
    scaled_mm,
    select_fp8,
)
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit

from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.fake_gpu import GPUS
from tests.helpers.traffic import Traffic

CPU = torch.device("cpu")


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_output_error_is_little_more_than_that_of_nf4() -> None:
    """Against the exact weights, normal data, 1024²: NF4 alone 9.2 %, with e4m3 9.9 %."""
    W, x, dY = torch.randn(1024, 1024), torch.randn(256, 1024), torch.randn(256, 1024)
    q, shape = quantize_4bit(W), (1024, 1024)
    y_want, dX_want = x.double() @ W.double().T, dY.double() @ W.double()
    leaf = x.clone().requires_grad_()
    y = fp8_lora_linear(leaf, q, shape, e4m3_scale(q), None)
    y.backward(dY)
    assert leaf.grad is not None
    nf4 = dequantize_4bit(q, shape, torch.float64)
    plain = far(x.double() @ nf4.T, y_want), far(dY.double() @ nf4, dX_want)
    for got, alone in ((far(y.detach(), y_want), plain[0]), (far(leaf.grad, dX_want), plain[1])):
        assert 0.088 < alone < 0.096
        assert alone < got < 0.103


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_one_scale_serves_both_orientations(kind: str, nested: bool) -> None:
    shape = (48, 96)
    q = quantize_4bit(torch.randn(shape) * 0.03, kind=kind, double_quant=nested)
    scale = e4m3_scale(q)
    W = dequantize_4bit(q, shape, torch.float32, kind=kind)
    assert_close("scale", scale * 448, W.abs().amax().reshape(1))
    W8 = dequantize_e4m3(q, shape, scale, kind=kind)
    turned = dequantize_e4m3(q, shape, scale, transposed=True, kind=kind)
    assert_same_bits("values", turned.view(torch.uint8).T, W8.view(torch.uint8))
    # e4m3: 3 bits of mantissa, so half a step is 1/16 of the value, or of the subnormal step.
    error = (W8.float() * scale - W).abs()
    assert (error <= W.abs() / 16 + scale * 2**-10 * 1.001).all()


def test_rows_have_their_own_scale_and_an_overflow_stays_visible() -> None:
    x = torch.randn(4, 32) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    x8, scale = quantize_rows_e4m3(x)
    assert_close("rows", x8.float() * scale, x, floor=2**-4)
    assert not x8[3].float().any()
    x[1, 5] = torch.inf
    x8, scale = quantize_rows_e4m3(x)
    assert (x8[1].float() * scale[1]).isnan().any()
    assert x8[[0, 2, 3]].float().isfinite().all()


def formula(x, W8, scale, A, B, bias, s):  # type: ignore[no-untyped-def]
    """The e4m3 product written out; straight-through for the gradient of x's rounding."""
    x8, sx = quantize_rows_e4m3(x.detach())
    base = (x8.double() * sx.double()) @ (W8.double() * scale.double()).T
    return base + s * (x.double() @ A.double().T) @ B.double().T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 64, 48, 4), (1, 32, 16, 1), (17, 128, 64, 256)], ids=str)
def test_forward_and_gradients_against_fp64(
    size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    M, K, N, R = size
    q = quantize_4bit(torch.randn(N, K) / K**0.5)
    scale = e4m3_scale(q)
    x, A, B, bias = (
        torch.randn(s).to(dtype).requires_grad_() for s in ((M, K), (R, K), (N, R), (N,))
    )
    y = fp8_lora_linear(x, q, (N, K), scale, bias, A, B, 0.5)
    W8 = dequantize_e4m3(q, (N, K), scale)
    want = formula(x, W8, scale, A, B, bias, 0.5)
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close("y", y, want.detach(), floor=floor)
    dY = torch.randn(M, N).to(dtype)
    y.backward(dY)
    g, a, b, z = dY.double(), A.detach().double(), B.detach().double(), x.detach().double()
    g8, sg = quantize_rows_e4m3(dY)
    W = W8.double() * scale.double()
    assert_close("dx", x.grad, (g8.double() * sg) @ W + 0.5 * g @ b @ a, floor=floor)
    assert_close("dA", A.grad, 0.5 * (g @ b).T @ z, floor=floor)
    assert_close("dB", B.grad, 0.5 * g.T @ (z @ a.T), floor=floor)
    assert_close("dbias", bias.grad, g.sum(0), floor=floor)


def test_the_low_rank_is_added_in_its_product() -> None:
    """Both ways: a sum of its own would read and write [M, N] once more."""
    q = quantize_4bit(torch.randn(32, 64))
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((9, 64), (4, 64), (32, 4)))
    with Traffic() as traffic:
        fp8_lora_linear(x, q, (32, 64), e4m3_scale(q), None, A, B, 2.0).backward(torch.ones(9, 32))
    assert traffic.calls["addmm_"] == 2
    assert not traffic.calls["add_"]


def test_dropout_uses_one_mask_and_leaves_the_base_alone() -> None:
    q = quantize_4bit(torch.zeros(64, 64))
    eye = torch.eye(64)
    x = torch.ones(50, 64, requires_grad=True)
    y = fp8_lora_linear(x, q, (64, 64), e4m3_scale(q), None, eye, eye, dropout_p=0.5)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    y.sum().backward()
    assert_same_bits("mask", x.grad, y.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 64), (2, 3, 64), (64,)], ids=str)
def test_layouts(shape: tuple[int, ...]) -> None:
    q = quantize_4bit(torch.randn(32, 64))
    A, B = torch.randn(4, 64), torch.randn(32, 4)
    x = torch.randn(shape, requires_grad=True)
    y = fp8_lora_linear(x, q, (32, 64), e4m3_scale(q), None, A, B)
    assert y.shape == (*shape[:-1], 32)
    y.sum().backward()
    assert x.grad is not None
    near = nf4_lora_linear(x.detach(), q, (32, 64), None, A, B, 1.0)
    assert not shape[0] or far(y.detach(), near.double()) < 0.08


def test_autocast_and_compile() -> None:
    q = quantize_4bit(torch.randn(32, 64))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    scale, x = e4m3_scale(q), torch.randn(3, 64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        return fp8_lora_linear(x, q, (32, 64), scale, None, A, B, 0.5)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = f(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32
    made = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert_close("compiled", made, f(x).detach())


def test_the_chip_s_recipe_on_the_cpu_is_the_emulation() -> None:
    """torch implements row-wise scaled products on a CPU too; layouts are what CUDA asks for."""
    q = quantize_4bit(torch.randn(32, 64))
    scale = e4m3_scale(q)
    x8, sx = quantize_rows_e4m3(torch.randn(5, 64))
    W8 = dequantize_e4m3(q, (32, 64), scale)
    assert W8.t().stride(0) == 1, "the second operand has to be column-major"
    emulated = scaled_mm(x8, sx, W8, scale, torch.bfloat16, select_fp8((32, 64), CPU), fast=True)
    try:
        recipe = torch._scaled_mm(
            x8, W8.t(), scale_a=sx, scale_b=scale.reshape(1, 1).expand(1, 32).contiguous(),
            out_dtype=torch.bfloat16,
        )  # fmt: skip
    except RuntimeError as error:
        pytest.skip(f"this torch has no row-wise scaled product on a CPU: {error}")
    assert_close("product", recipe, emulated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["scaled_rows", "emulated"])
def test_products_without_scales_per_row(
    way: Literal["scaled_rows", "emulated"], dtype: torch.dtype
) -> None:
    """Against fp64, with sums that exceed the range of fp16 before they are scaled."""
    x8, sx = quantize_rows_e4m3(torch.rand(7, 512) * 3)
    w8, sw = (torch.rand(32, 512) * 448).to(torch.float8_e4m3fn), torch.tensor([0.01])
    want = (x8.double() * sx.double()) @ (w8.double() * sw.double()).T
    found = scaled_mm(x8, sx, w8, sw, dtype, Decision(way, "a test"), fast=False)
    exact = want.to(torch.bfloat16) if way == "scaled_rows" else want.to(dtype)
    floor = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[exact.dtype]
    assert_close("product", found, want, floor=floor)


@pytest.mark.parametrize(
    ("chip", "backend"),
    [
        ("sm_75", "emulated"),
        ("sm_86", "emulated"),
        ("sm_89", "scaled_mm"),
        ("sm_90", "scaled_mm"),
        ("sm_120", "scaled_rows"),
        ("gfx942", "emulated"),
    ],
)
def test_products_by_chip(chip: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, GPUS[chip].chip)
    decision = select_fp8((32, 64), CPU)
    assert decision.backend == backend
    assert backend == "scaled_mm" or chip in decision.reason


def test_opcheck() -> None:
    q = quantize_4bit(torch.randn(16, 64))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lightning_peft.dequantize_e4m3.default,
        (*q, e4m3_scale(q), [16, 64], True, "nf4", 64), test_utils=tests,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.lightning_peft.quantize_rows_e4m3.default, (torch.randn(3, 64),), test_utils=tests
    )


def test_ragged_bases_are_refused_with_the_reason() -> None:
    q = quantize_4bit(torch.randn(33, 64))
    assert select_fp8((33, 64), CPU).backend == "dequantize"
    with pytest.raises(ValueError, match=r"got \(33, 64\)"):
        fp8_lora_linear(torch.randn(2, 64), q, (33, 64), e4m3_scale(q), None)
