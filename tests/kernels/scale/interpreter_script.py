"""Run by test_interpreter.py in its own process: the scaled output's two kernels."""

import torch
from lightning_peft_kernels.scale import triton as kernels


def main() -> int:
    n = 0
    for M, N in [(1, 1), (7, 300), (130, 256), (300, 70)]:
        for dtype, floor in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            u, g, b, d = (torch.randn(s).to(dtype) for s in ((M, N), (N,), (N,), (M, N)))
            wide_u, wide_g, wide_b, wide_d = (t.double() for t in (u, g, b, d))
            for _ in range(4):  # freed NaN memory shows what is left unwritten
                torch.full((M, N), torch.nan, dtype=dtype)
            cases = [
                (kernels.forward(u, g, b), wide_u * wide_g + wide_b),
                (kernels.forward(u, g, None), wide_u * wide_g),
            ]
            sums = (wide_d * wide_g, (wide_d * wide_u).sum(0), wide_d.sum(0))
            cases += zip(kernels.backward(d, u, g), sums, strict=True)
            for got, want in cases:
                error = (got.double() - want).abs().max() / want.abs().max()
                assert error < floor, (M, N, dtype, float(error))
                n += 1
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{main()} cases equal")
