"""The few-token product on a CPU: values, registration, compile; the kernels are interpreted and
run on a GPU elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.nf4 import bitsandbytes_product
from lightning_peft_kernels.nf4.ops import quantize_4bit
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch, nf4_small_batch_reference

from tests.helpers.compare import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "K", "N", "R"), [(1, 64, 48, 4), (3, 33, 7, 0), (0, 64, 8, 2)])
def test_against_fp64(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> None:
    q = quantize_4bit(torch.randn(N, K) / K**0.5)
    x, S, B, bias = (torch.randn(s).to(dtype) for s in ((M, K), (M, R), (N, R), (N,)))
    low = (S, B) if R else (None, None)
    y = nf4_small_batch(x, q, (N, K), *low, bias)
    wide = [None if t is None else t.double() for t in (*low, bias)]
    want = nf4_small_batch_reference(x.double(), q, (N, K), *wide)
    same = nf4_small_batch_reference(x, q, (N, K), *low, bias)
    assert_close("y", y, want, same_dtype=same, floor=1e-5 if dtype == torch.float32 else 2e-2)


def test_opcheck() -> None:
    q = quantize_4bit(torch.randn(8, 64))
    x, S, B, bias = (torch.randn(s) for s in ((2, 64), (2, 3), (8, 3), (8,)))
    for low in ((S, B, bias), (None, None, None)):
        torch.library.opcheck(
            torch.ops.lightning_peft.nf4_small_batch.default, (x, *q, [8, 64], *low, "nf4", 64)
        )


def test_compiles_without_a_graph_break() -> None:
    q = quantize_4bit(torch.randn(8, 64))
    x = torch.randn(2, 64)
    made = torch.compile(nf4_small_batch, fullgraph=True, backend="aot_eager")(x, q, (8, 64))
    assert_close("y", made, nf4_small_batch(x, q, (8, 64)))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bitsandbytes_multiplies_our_bytes(kind: str, nested: bool, bias: bool) -> None:
    """Its op on a CPU; on a GPU the arguments are the same."""
    pytest.importorskip("bitsandbytes")
    N, K = 48, 128
    q = quantize_4bit(torch.randn(N, K) / K**0.5, kind=kind, double_quant=nested)
    x, b = torch.randn(3, K), torch.randn(N) if bias else None
    y = bitsandbytes_product.multiply(x, q, (N, K), b, kind, 64)
    wide = None if b is None else b.double()
    want = nf4_small_batch_reference(x.double(), q, (N, K), bias=wide, kind=kind)
    assert_close("y", y, want, floor=1e-5)


def test_the_rule_of_bitsandbytes_gives_the_most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first number of tokens that it refuses; none where blocks cross rows."""

    def rule(index: int | None, dtype: torch.dtype, tokens: int, N: int, K: int) -> bool:
        return tokens < 8 or 10 <= tokens <= 64 if N > 64 else True

    bitsandbytes_product._fused_tokens.cache_clear()
    monkeypatch.setattr(bitsandbytes_product, "_rule", lambda: rule)
    device = torch.device("cuda", 0)

    def most(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> int | None:
        return bitsandbytes_product.fused_tokens(device, dtype, shape, 64)

    found = most((128, 64)), most((64, 64)), most((128, 96)), most((128, 64), torch.float64)
    bitsandbytes_product._fused_tokens.cache_clear()
    assert found == (7, 1536, 0, None)
    assert bitsandbytes_product.fused_tokens(torch.device("cpu"), torch.bfloat16, (8, 8), 8) is None
