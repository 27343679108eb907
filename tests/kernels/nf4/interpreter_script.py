"""Run by test_interpreter.py in its own process: Triton reads TRITON_INTERPRET when a kernel is
decorated.
"""

import torch
from lightning_peft_kernels.codebooks.eight_bit import dynamic_map, searched_codes
from lightning_peft_kernels.nf4.dequantize_triton import dequantize
from lightning_peft_kernels.nf4.ops import (
    Packed4bit,
    dequantize_4bit_reference,
    quantize_4bit,
    quantize_4bit_reference,
)
from lightning_peft_kernels.nf4.quantize_triton import quantize

SHAPES = [(64, 64), (7, 13), (33, 112), (3, 5), (128, 256)]


def dequantised() -> int:
    n = 0
    for shape in SHAPES:
        for kind in ("nf4", "fp4"):
            for nested in (True, False):
                q = quantize_4bit(torch.randn(shape), kind=kind, double_quant=nested)
                for dtype in (torch.float32, torch.float16):  # the interpreter rounds bf16 wrongly
                    out = torch.full(shape, torch.nan, dtype=dtype)
                    dequantize(q, shape, dtype, kind, 64, out)
                    want = dequantize_4bit_reference(q, shape, dtype, kind=kind)
                    assert torch.equal(out, want), (shape, kind, nested, dtype)
                    n += 1
    return n


def dequantised_transposed_and_scaled() -> int:
    """The e4m3 forms, with the product before rounding as the result."""
    n = 0
    for shape in [(64, 64), (48, 160), (7, 24), (130, 72)]:
        for nested in (True, False):
            q = quantize_4bit(torch.randn(shape), double_quant=nested)
            factor = torch.tensor([37.5])
            want = dequantize_4bit_reference(q, shape, torch.float32) * factor
            for transposed in (True, False):
                out = torch.full(want.T.shape if transposed else shape, torch.nan)
                dequantize(
                    q, shape, out.dtype, "nf4", 64, out, factor=factor, transposed=transposed
                )
                assert torch.equal(out, want.T if transposed else want), (shape, nested)
                n += 1
    return n


def quantised() -> int:
    n = 0
    special = [torch.zeros(2, 64), torch.full((3, 64), 0.3), torch.randn(4, 64) * 1e-40]
    for W in [*(torch.randn(s) for s in SHAPES), *special, torch.randn(300, 64)]:
        for block_size in (32, 64, 256):
            packed, absmax, _, _ = quantize(W, block_size, False)
            want = quantize_4bit_reference(W, block_size=block_size, double_quant=False)
            assert torch.equal(absmax, want.absmax), (W.shape, block_size)
            assert torch.equal(packed, want.packed), (W.shape, block_size)
            q = Packed4bit(*quantize(W, block_size, True))
            assert q.absmax2 is not None
            centred = absmax - absmax.mean()
            padded = torch.nn.functional.pad(centred, (0, -centred.numel() % 256)).view(-1, 256)
            assert torch.equal(q.absmax2, padded.abs().amax(1))
            unit = padded * (1.0 / q.absmax2)[:, None]
            codes = searched_codes(unit).view(-1)[: centred.numel()]
            assert torch.equal(q.absmax, codes)
            # The oracle apart from the search: no code is nearer.
            table, x = dynamic_map(True).double(), unit.view(-1)[: centred.numel()].double()
            apart = (x[:, None] - table).abs()
            taken = apart.gather(1, codes.long()[:, None])[:, 0]
            assert (taken <= apart.min(1).values + 3 * 2**-23)[x.isfinite()].all()
            n += 1
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    total = dequantised() + dequantised_transposed_and_scaled() + quantised()
    print(f"{total} cases equal")
