"""Few tokens on a CPU with AVX512-BF16: against fp64, and when it is taken."""

from __future__ import annotations

import gc
from typing import Literal

import pytest
import torch
from lightning_peft_kernels.dispatch import use_backend
from lightning_peft_kernels.nf4 import bf16_cpu
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.selection import select_product
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close

BF16, CPU = torch.bfloat16, torch.device("cpu")
needs_chip = pytest.mark.skipif(
    not bf16_cpu.has_bf16_product((64, 64), "nf4", 64), reason="no AVX512-BF16 or bitsandbytes"
)


def exact(q: Packed4bit, shape: tuple[int, int], kind: str, block: int) -> Tensor:
    return dequantize_4bit(q, shape, torch.float64, kind=kind, block_size=block)


@needs_chip
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("N", "K", "block"),
    [(32, 64, 32), (64, 64, 64), (96, 192, 64), (32, 1024, 256), (64, 4096, 4096), (32, 2048, 512)],
)
@pytest.mark.parametrize("nested", [True, False])
def test_against_fp64(
    kind: Literal["nf4", "fp4"], N: int, K: int, block: int, nested: bool
) -> None:
    q = quantize_4bit(torch.randn(N, K), kind=kind, block_size=block, double_quant=nested)
    W = exact(q, (N, K), kind, block)
    for M in (1, 3, 8, 32):
        x = torch.randn(M, 2 * K).to(BF16)[:, ::2] if M == 3 else torch.randn(M, K).to(BF16)
        y = bf16_cpu.multiply_bf16(x, q, Packing((N, K), kind, block))
        # Twice torch's bf16 product, and the rounding of the scales.
        by_torch = nn.functional.linear(x, W.to(BF16))
        assert_close("y", y, x.double() @ W.T, same_dtype=by_torch, floor=2**-8)


@needs_chip
def test_a_layer_generates_with_it_and_trains_without() -> None:
    N, K, R = 64, 128, 4
    q = quantize_4bit(torch.randn(N, K) / K**0.5)
    x, A, B, bias = (
        torch.randn(s).to(t)
        for s, t in (((2, 3, K), BF16), ((R, K), BF16), ((N, R), BF16), ((N,), BF16))
    )
    W = exact(q, (N, K), "nf4", 64)
    want = x.double() @ (W + 0.5 * B.double() @ A.double()).T + bias.double()
    with torch.no_grad():
        y = nf4_lora_linear(x, q, (N, K), bias, A, B, 0.5)
        wide = nf4_lora_linear(x, q, (N, K), bias, A.float(), B.float(), 0.5)
        plain = nf4_linear(x, q, (N, K), bias)
    assert len(bf16_cpu.REORDERED) >= 1
    for name, got in (("y", y), ("fp32 adapters", wide)):
        assert_close(name, got, want, floor=2**-7)
    assert_close("plain", plain, x.double() @ W.T + bias.double(), floor=2**-7)
    trained = nf4_lora_linear(x, q, (N, K), bias, A.requires_grad_(), B, 0.5)
    assert id(q.packed) not in bf16_cpu.REORDERED  # training needs no copy
    with use_backend("torch"), torch.no_grad():
        same = nf4_lora_linear(x, q, (N, K), bias, A, B, 0.5)
    assert_close("exact", same, trained.double(), floor=2**-8)


@needs_chip
def test_the_copy_follows_the_bytes_and_goes_with_them() -> None:
    gc.collect()
    N, K = 32, 64
    q = quantize_4bit(torch.randn(N, K))
    other = quantize_4bit(torch.randn(N, K))
    x, held = torch.randn(1, K).to(BF16), len(bf16_cpu.REORDERED)
    with torch.no_grad():
        nf4_linear(x, q, (N, K), None)
        for mine, new in zip(q, other, strict=True):
            assert mine is not None
            assert new is not None
            mine.copy_(new)
        y, want = nf4_linear(x, q, (N, K), None), nf4_linear(x, other, (N, K), None)
    assert torch.equal(y, want)
    assert len(bf16_cpu.REORDERED) == held + 2
    del q, other
    gc.collect()
    assert len(bf16_cpu.REORDERED) == held


@pytest.mark.parametrize(
    ("dtype", "tokens", "shape", "block", "exact_", "way"),
    [
        (BF16, 1, (64, 128), 64, False, "bf16"),
        (BF16, 32, (64, 128), 64, False, "bf16"),
        (BF16, 33, (64, 128), 64, False, "dequantize"),
        (BF16, 0, (64, 128), 64, False, "dequantize"),
        (BF16, 1, (64, 128), 64, True, "dequantize"),
        (torch.float32, 1, (64, 128), 64, False, "dequantize"),
        (BF16, 1, (48, 128), 64, False, "dequantize"),  # no whole groups of rows
        (BF16, 1, (64, 96), 64, False, "dequantize"),  # a block crosses rows
        (BF16, 1, (64, 32), 32, False, "dequantize"),  # bitsandbytes 0.50.2 misreads short rows
    ],
)
def test_when_it_is_taken(
    dtype: torch.dtype, tokens: int, shape: tuple[int, int], block: int, exact_: bool, way: str
) -> None:
    if way == "bf16" and not bf16_cpu.has_bf16_product(shape, "nf4", block):
        way = "dequantize"
    found = select_product(CPU, dtype, tokens, shape, "auto", block, exact=exact_)
    assert found.backend == way
    assert select_product(CPU, dtype, tokens, shape, "torch", block).backend == "dequantize"


@needs_chip
def test_the_report_names_the_precision() -> None:
    def told(dtype: torch.dtype, compute: Literal["auto", "bf16"]) -> str:
        model = nn.Sequential(nn.Linear(128, 64)).to(dtype)
        every = lp.LoRA(r=2, target_modules="all-linear")
        report = lp.attach(model, every, quantization=lp.Quantization(compute=compute))
        return report.groups[0].fused

    words = "without gradients up to 32 tokens by AVX512-BF16, scales in bf16"
    assert words in told(BF16, "auto")
    assert words in told(torch.float32, "bf16")
    assert "AVX512" not in told(torch.float32, "auto")


def test_bf16_compute_in_an_fp32_model_acts_without_gradients_alone() -> None:
    torch.manual_seed(0)
    every = lp.LoRA(r=2, target_modules="all-linear")
    found = {}
    for compute in ("auto", "bf16"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64))
        lp.attach(model, every, quantization=lp.Quantization(compute=compute))  # type: ignore[arg-type]
        lp.disable_adapters(model)
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            inside = model(x)
        found[compute] = inside, model(x)
    (exact_, trained), (rounded, same) = found.values()
    assert rounded.dtype == torch.float32
    assert torch.equal(trained, same)
    assert not torch.equal(exact_, rounded)
    assert_close("bf16", rounded, exact_.double(), floor=2**-7)
