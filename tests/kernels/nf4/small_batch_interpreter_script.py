"""Run by test_interpreter.py in its own process: products that decode the weight, fp64 truth."""

import sys

import torch
from lightning_peft_kernels.fp8 import quantize_rows_triton
from lightning_peft_kernels.nf4 import pair_table_triton, small_batch_triton
from lightning_peft_kernels.nf4.ops import dequantize_4bit_reference, quantize_4bit
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch_reference

# M, K, N, R, block size: ragged, several parts of K, ranks 1 … 256, blocks that cross rows.
SIZES = [
    (1, 512, 48, 4, 64),
    (1, 2048, 20, 1, 64),
    (3, 520, 20, 0, 64),
    (4, 96, 33, 256, 32),
    (5, 256, 70, 16, 64),
    (17, 200, 33, 3, 64),
    (64, 384, 64, 17, 128),
]


PAIR_SIZES = [
    (1, 512, 130, 0, 64),
    (8, 256, 70, 16, 128),
    (3, 192, 200, 3, 32),
    (5, 1024, 128, 8, 1024),
    (8, 64, 1, 1, 64),
]


def poison_the_heap(numel: int) -> None:
    """Freed NaN memory: an output element that a kernel leaves unwritten is likely to show."""
    for _ in range(4):
        torch.full((numel,), torch.nan)


def decoded(sample: bool = False) -> int:
    """All cases; a sample takes half of them, every row of SIZES in both dtypes."""
    n = 0
    for M, K, N, R, block_size in SIZES:
        for dtype, floor in ((torch.float32, 1e-6), (torch.float16, 3e-3)):
            for nested in (dtype is torch.float32,) if sample else (True, False):
                q = quantize_4bit(torch.randn(N, K), block_size=block_size, double_quant=nested)
                x = torch.randn(M, K).to(dtype)
                S = torch.randn(M, R).to(dtype) if R else None
                B = torch.randn(N, R).to(dtype) if R else None
                bias = torch.randn(N).to(dtype) if nested else None
                poison_the_heap(M * N)
                y = small_batch_triton.decode(x, q, N, S, B, bias, "nf4", block_size)
                wide = [None if t is None else t.double() for t in (S, B, bias)]
                want = nf4_small_batch_reference(
                    x.double(), q, (N, K), *wide, block_size=block_size
                )
                error = (y.double() - want).abs().max() / want.abs().max()
                assert error < floor, (M, K, N, R, dtype, float(error))
                n += 1
    return n


def by_pairs(sample: bool = False) -> int:
    """Twice torch's error in the same dtype, against fp64; ragged rows, several parts of K."""
    n = 0
    for M, K, N, R, block_size in PAIR_SIZES[: 3 if sample else None]:
        for nested in (True, False):
            q = quantize_4bit(torch.randn(N, K) / K**0.5, block_size=block_size,
                              double_quant=nested)  # fmt: skip
            x, S, B = (torch.randn(s).half() for s in ((M, K), (M, R), (N, R)))
            bias = torch.randn(N).half() if nested else None
            poison_the_heap(M * N)
            y = pair_table_triton.decode_pairs(
                x, q, N, S if R else None, B if R else None, bias, "nf4", block_size
            )
            wide = [None if t is None else t.double() for t in (S, B, bias)]
            low = wide[:2] if R else [None, None]
            want = nf4_small_batch_reference(
                x.double(), q, (N, K), *low, wide[2], block_size=block_size
            )
            W = dequantize_4bit_reference(q, (N, K), torch.float16, block_size=block_size)
            theirs = torch.nn.functional.linear(x, W, bias)
            theirs = theirs + S @ B.T if R else theirs
            error, allowed = (float((t.double() - want).norm()) for t in (y, theirs))
            assert error <= 2 * allowed, (M, K, N, R, block_size, error, allowed)
            n += 1
    return n


def rows_scaled() -> int:
    """Before rounding to e4m3, which the interpreter does wrongly."""
    n = 0
    for M, K in [(1, 16), (5, 2048), (3, 4100), (0, 32)]:
        x = torch.randn(M, K) * torch.logspace(-3, 3, M)[:, None]
        x[:1] = 0
        got, scale = quantize_rows_triton.quantize_rows(x, 448.0, 1e-30, torch.float32)
        want = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
        torch.testing.assert_close(scale, want)
        torch.testing.assert_close(got, x / want, rtol=1e-6, atol=0)
        n += 1
    for bad in (torch.inf, torch.nan):
        x = torch.randn(2, 64)
        x[1, 3] = bad
        got, scale = quantize_rows_triton.quantize_rows(x, 448.0, 1e-30, torch.float32)
        assert got[0].isfinite().all(), "a bad row must not reach its neighbours"
        assert (got[1] * scale[1]).isnan().any(), "an overflow must stay visible"
        n += 1
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    small_batch_triton._PROGRAMS = 16  # several parts of K at these sizes
    pair_table_triton._PROGRAMS = 8
    sample = "sample" in sys.argv
    count = decoded(sample) + by_pairs(sample) + rows_scaled()
    print(f"{count} cases equal")
