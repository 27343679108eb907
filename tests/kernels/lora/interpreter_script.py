"""Run by test_interpreter.py in its own process: both gradients from one pass, fp64 truth."""

import torch
from lightning_peft_kernels.lora import rank_gradients_triton as kernels


def main() -> int:
    n = 0
    # Ragged rows and columns, several of either, ranks that are padded.
    for M, N, R in [(1, 1, 1), (70, 300, 3), (200, 64, 16), (130, 520, 32), (64, 256, 17)]:
        for dtype, floor in ((torch.float32, 1e-6), (torch.float16, 3e-3)):
            dY, S, B = (torch.randn(s).to(dtype) for s in ((M, N), (M, R), (N, R)))
            for _ in range(4):  # freed NaN memory shows what is left unwritten
                torch.full((M * R,), torch.nan)
                torch.full((N * R,), torch.nan)
            got = kernels.low_rank_gradients(dY, S, B, 0.5)
            wide = dY.double()
            for a, b in zip(got, (0.5 * wide @ B.double(), wide.mT @ S.double()), strict=True):
                assert a.dtype == dtype
                error = (a.double() - b).abs().max() / b.abs().max()
                assert error < floor, (M, N, R, dtype, float(error))
                n += 1
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    counts = []
    for rows, programs in ((1024, 264), (64, 1)):  # the rows in one part, and in several
        kernels._ROWS, kernels._PROGRAMS = rows, programs
        counts.append(main())
    print(f"{sum(counts)} cases equal")
