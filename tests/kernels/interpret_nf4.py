"""Run by test_interpreter.py in its own process: Triton reads TRITON_INTERPRET when a kernel is
decorated.
"""

import torch
from lightning_peft_kernels.nf4 import dequantize_4bit_reference, quantize_4bit
from lightning_peft_kernels.nf4_triton import dequantize

SHAPES = [(64, 64), (7, 13), (33, 112), (3, 5), (128, 256)]


def poison_the_heap() -> None:
    """Freed NaN memory: an output element that the kernel leaves unwritten is likely to show."""
    for _ in range(4):
        torch.full((128, 256), torch.nan)


def main() -> None:
    torch.manual_seed(0)
    n = 0
    for shape in SHAPES:
        for kind in ("nf4", "fp4"):
            for nested in (True, False):
                q = quantize_4bit(torch.randn(shape), kind=kind, double_quant=nested)
                for dtype in (torch.float32, torch.float16):  # the interpreter rounds bf16 wrongly
                    poison_the_heap()
                    got = dequantize(q, shape, dtype, kind, 64)
                    want = dequantize_4bit_reference(q, shape, dtype, kind=kind)
                    assert torch.equal(got, want), (shape, kind, nested, dtype)
                    n += 1
    print(f"{n} cases equal")


main()
