"""The few-token product on a CPU: values, registration, compile; the kernels are interpreted and
run on a GPU elsewhere.
"""

from __future__ import annotations

import pytest
import torch
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
