"""The table of pairs: its codes, bit for bit, and who may use its kernel."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.codebooks.four_bit import code, pair_table
from lightning_peft_kernels.dispatch import Decision
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.selection import select_pairs, select_product
from lightning_peft_kernels.nf4.small_batch import multiply_few

from tests.helpers.fake_gpu import GPUS

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_a_byte_gives_its_two_codes(kind: str, dtype: torch.dtype) -> None:
    table = pair_table(kind, dtype, "cpu")
    assert table.dtype == torch.int32
    pairs = table.view(torch.int16).view(256, 2)
    codes = code(kind).to(dtype).view(torch.int16)
    byte = torch.arange(256)
    assert torch.equal(pairs[:, 0], codes[byte >> 4])  # the even column is in the high nibble
    assert torch.equal(pairs[:, 1], codes[byte & 15])


@pytest.mark.parametrize(
    ("chip", "dtype", "tokens", "K", "way"),
    [
        ("sm_90", BF16, 1, 256, "pairs"),
        ("sm_80", torch.float16, 8, 256, "pairs"),
        ("gfx942", BF16, 8, 256, "pairs"),
        ("sm_90", BF16, 9, 256, "dequantize"),
        ("sm_90", BF16, 0, 256, "dequantize"),
        ("sm_90", BF16, 1, 200, "dequantize"),  # a block crosses rows
        ("sm_90", torch.float32, 1, 256, "dequantize"),
        ("sm_75", torch.float16, 1, 256, "dequantize"),  # no matrix instruction
        ("gfx1100", BF16, 1, 256, "dequantize"),
    ],
)
def test_when_it_may_run(
    chip: str, dtype: torch.dtype, tokens: int, K: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(CHIPS, CPU, GPUS[chip].chip)
    assert select_pairs(CPU, dtype, tokens, (512, K)).backend == way
    # It is a candidate of the race, not the default.
    assert select_product(CPU, dtype, tokens, (512, K), "auto").backend != "pairs"


def test_a_chip_that_refuses_it_takes_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_peft_kernels.launch import FAILURES, LaunchError

    triton = pytest.importorskip("lightning_peft_kernels.nf4.pair_table_triton")

    def refuse(*given: object) -> None:
        raise LaunchError("_pairs_kernel: OutOfResources")

    monkeypatch.setattr(triton, "decode_pairs", refuse)
    N, K = 64, 128
    q, x = quantize_4bit(torch.randn(N, K)), torch.randn(2, K).to(BF16)
    how = Decision("pairs", "raced")
    with pytest.warns(UserWarning, match=r"nf4_small_batch \(bfloat16, pairs\)"):
        y = multiply_few(x, q, Packing((N, K), "nf4", 64), None, None, None, "auto", how)
    del FAILURES["nf4_small_batch", "bfloat16, pairs", CPU]
    assert torch.equal(y, torch.nn.functional.linear(x, dequantize_4bit(q, (N, K), BF16)))
