"""Run by test_interpreter.py in its own process: packed experts decoded in the product, fp64 truth;
experts without rows left as they are.
"""

import itertools
import sys

import torch
from lightning_peft_kernels.chips import CHIPS, nvidia_chip
from lightning_peft_kernels.experts import selection
from lightning_peft_kernels.experts.dequantize_active_triton import dequantize_active_experts
from lightning_peft_kernels.experts.grouped_linear import (
    grouped_linear_reference,
    nf4_grouped_linear,
)
from lightning_peft_kernels.experts.grouped_linear_triton import grouped_linear_4bit
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit

# Rows of each expert, rows of nobody, N, K, block size: several tiles an expert, several steps of
# either axis, ragged ones, blocks that cross rows and end inside an expert.
CASES = [
    ([3, 0, 17, 1], 0, 48, 64, 64),
    ([0, 0, 5, 0, 0], 4, 70, 200, 32),
    ([40, 1, 0, 90], 2, 130, 96, 64),
    ([0, 0, 0], 3, 16, 32, 64),
    ([1] * 9, 0, 33, 258, 128),
]


def packed_experts(W, block_size, nested):
    """(every part with a leading expert axis, the dequantised weights in fp64)."""
    each = [quantize_4bit(w, block_size=block_size, double_quant=nested) for w in W]
    dense = [dequantize_4bit(q, w.shape, torch.float32, block_size=block_size)
             for q, w in zip(each, W, strict=True)]  # fmt: skip
    parts = [
        None if ts[0] is None else torch.stack([t.reshape(-1) for t in ts])
        for ts in zip(*each, strict=True)
    ]
    return Packed4bit(*parts), torch.stack(dense)


def poison_the_heap(numel: int) -> None:
    """Freed NaN memory: an output element that a kernel leaves unwritten is likely to show."""
    for _ in range(4):
        torch.full((numel,), torch.nan)


def products(sample: bool = False) -> int:
    """All cases; a sample takes a quarter of them, every row of CASES among them."""
    n = 0
    grid = list(itertools.product(CASES, (True, False)))
    forms = list(itertools.product(((torch.float32, 1e-6), (torch.float16, 3e-3)), (True, False)))
    if sample:
        grid = [grid[2 * i + i % 2] for i in range(len(CASES))]
        forms = [forms[0], forms[3]]
    for (counts, tail, N, K, block_size), nested in grid:
        E, used = len(counts), sum(counts)
        groups = Groups.counted(counts, used + tail, torch.device("cpu"))
        q, W = packed_experts(torch.randn(E, N, K), block_size, nested)
        expert = torch.tensor([e for e, rows in enumerate(counts) for _ in range(rows)]).long()
        for (dtype, floor), transposed in forms:
            X = torch.randn(used + tail, K if transposed else N).to(dtype)
            poison_the_heap(X.shape[0] * max(N, K))
            y = grouped_linear_4bit(
                X, q, (N, K), groups.offsets, "nf4", block_size, transposed=transposed
            )[:used]
            form = "sk,snk->sn" if transposed else "sn,snk->sk"
            want = torch.einsum(form, X[:used].double(), W[expert].double())
            assert y.shape == want.shape
            if used:
                error = (y.double() - want).abs().max() / want.abs().max()
                assert error < floor, (counts, N, K, dtype, transposed, float(error))
            n += 1
    return n


def used_only() -> int:
    n = 0
    for counts, N, K, block_size in [
        ([2, 0, 0, 1], 32, 64, 64),
        ([0, 1, 0], 128, 128, 64),
        ([0, 0], 16, 32, 32),
        ([1, 0, 0, 0, 0, 0, 4], 64, 512, 128),
    ]:
        q, W = packed_experts(torch.randn(len(counts), N, K), block_size, False)
        ends = Groups.counted(counts, sum(counts), torch.device("cpu")).offsets
        for dtype in (torch.float32, torch.float16):
            out = torch.full(W.shape, torch.nan, dtype=dtype)
            dequantize_active_experts(q.packed, q.absmax, ends, "nf4", block_size, out)
            for e, rows in enumerate(counts):
                if rows:
                    assert torch.equal(out[e], W[e].to(dtype)), (counts, e)
            if N * K % 4096 == 0:  # a program then lies within one expert
                untouched = [e for e, rows in enumerate(counts) if not rows]
                assert out[untouched].isnan().all(), counts
            n += 1
    return n


def layer() -> int:
    """The layer as a GPU runs it, on either side of the crossing, with gradients."""
    n, chosen = 0, set()
    CHIPS[torch.device("cpu")] = nvidia_chip(9, 0, 232_448)
    Groups.on_host = property(lambda self: False)
    # An odd K is not decoded in the product; blocks that end inside an expert are all made.
    sizes = [(48, 64, 3), (48, 64, 0), (20, 21, 0), (10, 10, 2)]
    for (N, K, tail), most in itertools.product(sizes, (64, 0)):
        selection.EXPERT_ROWS = most
        counts = [4, 0, 9, 1]
        groups = Groups.counted(counts, sum(counts) + tail, torch.device("cpu"))
        q, W = packed_experts(torch.randn(4, N, K), 64, True)
        expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        x = torch.randn(groups.rows, K, dtype=torch.float16, requires_grad=True)
        dY = torch.randn(groups.rows, N, dtype=torch.float16)
        y = nf4_grouped_linear(x, q, (N, K), groups)
        y.backward(dY)
        z = x.detach().double()[: len(expert)].requires_grad_()
        want = grouped_linear_reference(z, W.double(), expert)
        want.backward(dY.double()[: len(expert)])
        for got, truth in ((y.detach(), want.detach()), (x.grad, z.grad)):
            error = (got[: len(expert)].double() - truth).abs().max() / truth.abs().max()
            assert error < 3e-3, (N, K, tail, most, float(error))
            assert not got[len(expert) :].any(), "rows of nobody"
        decision = selection.select_experts(x.device, x.dtype, groups.rows, 4, (N, K))
        chosen.add(decision.backend)
        n += 1
    assert chosen == {"fused", "dequantize"}
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    count = products(sample="sample" in sys.argv) + used_only() + layer()
    print(f"{count} cases equal")
