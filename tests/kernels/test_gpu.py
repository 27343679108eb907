"""Every Triton kernel on a GPU: bytes against bitsandbytes, values against fp64."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.chips import chip_of
from lightning_peft_kernels.dispatch import select
from lightning_peft_kernels.experts import selection
from lightning_peft_kernels.experts.grouped_linear import nf4_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import (
    dequantize_e4m3,
    e4m3_scale,
    quantize_rows_e4m3,
    scaled_mm,
    select_fp8,
)
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import (
    Packed4bit,
    dequantize_4bit,
    dequantize_4bit_reference,
    quantize_4bit,
)
from lightning_peft_kernels.nf4.selection import select_product
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch_reference
from lightning_peft_kernels.scale.ops import output_scale

from tests.helpers.compare import FLOOR, assert_close, assert_same_bits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (33, 112), (7, 13), (50, 96), (128, 4096), (3, 5)]


def decode(*arguments, **more):  # type: ignore[no-untyped-def]
    """Triton is imported only where a test runs."""
    from lightning_peft_kernels.nf4.small_batch_triton import decode as kernel

    return kernel(*arguments, **more)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_equal_bitsandbytes(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    W = (torch.randn(shape) * 0.02).to(dtype).to(CUDA)
    for nested in (True, False):
        packed, state = functional.quantize_4bit(
            W, blocksize=block_size, compress_statistics=nested, quant_type="nf4"
        )
        q = quantize_4bit(W, block_size=block_size, double_quant=nested)
        assert_same_bits("packed", q.packed.view(-1), packed.view(-1))
        assert_same_bits("absmax", q.absmax, state.absmax)
        if q.absmax2 is not None and q.offset is not None:
            assert_same_bits("absmax2", q.absmax2, state.state2.absmax)
            assert_same_bits("offset", q.offset, state.offset.reshape(1))
        values = functional.dequantize_4bit(packed, state)
        assert_same_bits("W", dequantize_4bit(q, shape, dtype, block_size=block_size), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_equal_the_reference(shape: tuple[int, int], kind: str) -> None:
    for nested in (True, False):
        q = quantize_4bit(torch.randn(shape), kind=kind, double_quant=nested)
        there = Packed4bit(*(None if t is None else t.to(CUDA) for t in q))  # type: ignore[arg-type]
        for dtype in FLOATS:
            out = torch.full(shape, torch.nan, dtype=dtype, device=CUDA)
            dequantize_4bit(there, shape, dtype, kind=kind, out=out)
            want = dequantize_4bit_reference(q, shape, dtype, kind=kind)
            assert_same_bits("W", out.cpu(), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 3, 4, 5, 17, 64])
@pytest.mark.parametrize(("N", "K", "R"), [(48, 512, 16), (1000, 4096, 1), (33, 200, 256)])
def test_decode_against_fp64(M: int, N: int, K: int, R: int, dtype: torch.dtype) -> None:
    for nested in (True, False):
        q = quantize_4bit(torch.randn(N, K, device=CUDA) / K**0.5, double_quant=nested)
        x, S, B, bias = (
            torch.randn(s, device=CUDA).to(dtype) for s in ((M, K), (M, R), (N, R), (N,))
        )
        y = decode(x, q, N, S, B, bias, "nf4", 64)
        wide = [t.double() for t in (S, B, bias)]
        want = nf4_small_batch_reference(x.double(), q, (N, K), *wide)
        assert_close("y", y, want, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [0, 1, 5, 64, 300])
def test_layer_against_fp64(M: int, dtype: torch.dtype) -> None:
    N, K, R = 96, 256, 8
    q = quantize_4bit(torch.randn(N, K, device=CUDA) / 16)
    W = dequantize_4bit(q, (N, K), dtype).double()
    ts = [torch.randn(s, device=CUDA).to(dtype) for s in ((M, K), (R, K), (N, R), (N,))]
    ours = [t.clone().requires_grad_() for t in ts]
    wide = [t.double().requires_grad_() for t in ts]
    dY = torch.randn(M, N, device=CUDA).to(dtype)
    x, A, B, bias = ours
    y = nf4_lora_linear(x, q, (N, K), bias, A, B, 0.5)
    want = wide[0] @ W.T + 0.5 * wide[0] @ wide[1].T @ wide[2].T + wide[3]
    y.backward(dY)
    want.backward(dY.double())
    for name, got, truth in [("y", y, want), *zip("xABb", ours, wide, strict=True)]:
        a, b = (got, truth) if name == "y" else (got.grad, truth.grad)
        assert a is not None
        if b is not None and b.numel():
            assert_close(name, a, b, floor=FLOOR[dtype])


def test_e4m3_in_both_orientations_and_by_row() -> None:
    if select_fp8((64, 64), CUDA).backend == "emulated":
        pytest.skip("this chip has no e4m3 products")
    N, K, M = 96, 256, 33
    q = quantize_4bit(torch.randn(N, K, device=CUDA))
    scale = e4m3_scale(q)
    W8 = dequantize_e4m3(q, (N, K), scale)
    turned = dequantize_e4m3(q, (N, K), scale, transposed=True)
    want = (dequantize_4bit(q, (N, K), torch.float32) * (1.0 / scale)).to(torch.float8_e4m3fn)
    assert_same_bits("W8", W8.view(torch.uint8), want.view(torch.uint8))
    assert_same_bits("transposed", turned.view(torch.uint8), want.T.contiguous().view(torch.uint8))
    x = torch.randn(M, K, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    x8, sx = quantize_rows_e4m3(x.detach())
    assert_close("rows", x8.float() * sx, x.detach().float(), floor=2**-4)
    emulated = (x8.float() @ W8.float().T) * (sx * scale)
    decision = select_fp8((N, K), CUDA)
    got = scaled_mm(x8, sx, W8, scale, torch.bfloat16, decision, fast=False)
    assert_close("product", got, emulated, floor=2e-2)
    A, B = torch.randn(4, K, device=CUDA), torch.randn(N, 4, device=CUDA)
    fp8_lora_linear(x, q, (N, K), scale, None, A, B).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_scale(dtype: torch.dtype) -> None:
    u, g, b = (torch.randn(s, device=CUDA).to(dtype) for s in ((300, 70), (70,), (70,)))
    ours = [t.clone().requires_grad_() for t in (u, g, b)]
    wide = [t.double().requires_grad_() for t in (u, g, b)]
    y, want = output_scale(*ours), wide[0] * wide[1] + wide[2]
    y.sum().backward()
    want.sum().backward()
    assert_close("y", y, want, floor=FLOOR[dtype])
    for name, got, truth in zip("ugb", ours, wide, strict=True):
        assert got.grad is not None
        assert truth.grad is not None
        assert_close(name, got.grad, truth.grad, floor=FLOOR[dtype])


def test_a_forward_can_be_captured() -> None:
    q = quantize_4bit(torch.randn(64, 128, device=CUDA))
    A, B = torch.randn(4, 128, device=CUDA), torch.randn(64, 4, device=CUDA)
    for M in (1, 300):
        x = torch.randn(M, 128, device=CUDA)
        with torch.no_grad():
            want = nf4_lora_linear(x, q, (64, 128), None, A, B, 1.0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = nf4_lora_linear(x, q, (64, 128), None, A, B, 1.0)
            graph.replay()
        assert_same_bits("y", y, want)


def test_the_decision_can_be_asked_for() -> None:
    assert select("dequantize_4bit", CUDA, torch.bfloat16).backend == "triton"
    chip = chip_of(CUDA)
    assert chip is not None
    assert chip.shared >= 48 << 10
    few = select_product(CUDA, torch.bfloat16, 1, (14336, 4096))
    many = select_product(CUDA, torch.bfloat16, 4096, (14336, 4096))
    assert few.backend in ("fused", "bitsandbytes")
    assert many.backend == "dequantize"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "R"), [(5, 64, 1), (4096, 1000, 16), (300, 4096, 33), (64, 520, 64)]
)
def test_rank_gradients(M: int, N: int, R: int, dtype: torch.dtype) -> None:
    dY, S, B = (torch.randn(s).to(dtype) for s in ((M, N), (M, R), (N, R)))
    found = rank_gradients(dY.to(CUDA), S.to(CUDA), B.to(CUDA), 0.5)
    want = 0.5 * dY.double() @ B.double(), dY.double().mT @ S.double()
    for name, a, b in zip(("dS", "dB"), found, want, strict=True):
        assert_close(name, a.cpu(), b, floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("most", [0, 64], ids=["made first", "decoded inside"])
@pytest.mark.parametrize("counts", [[0, 7, 1, 0], [300, 0, 2, 90], [0] * 4], ids=str)
def test_packed_experts(
    counts: list[int], most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "EXPERT_ROWS", most)
    N, K, tail = 192, 320, 5
    each = [quantize_4bit(torch.randn(N, K) / K**0.5) for _ in counts]
    W = torch.stack([dequantize_4bit(q, (N, K), torch.float32) for q in each]).double()
    parts = (torch.stack([t.reshape(-1) for t in ts]).to(CUDA) for ts in zip(*each, strict=True))
    q = Packed4bit(*parts)
    groups = Groups.counted(counts, sum(counts) + tail, CUDA)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    x, dY = torch.randn(groups.rows, K).to(dtype), torch.randn(groups.rows, N).to(dtype)
    found = x.to(CUDA).requires_grad_()
    y = nf4_grouped_linear(found, q, (N, K), groups)
    y.backward(dY.to(CUDA))
    assert found.grad is not None
    n = len(expert)
    want = torch.einsum("sk,snk->sn", x[:n].double(), W[expert])
    dX = torch.einsum("sn,snk->sk", dY[:n].double(), W[expert])
    for name, got, truth in (("y", y.detach(), want), ("dX", found.grad, dX)):
        assert not got[n:].any(), "rows of nobody"
        assert_close(name, got[:n].cpu(), truth, floor=FLOOR[dtype])
