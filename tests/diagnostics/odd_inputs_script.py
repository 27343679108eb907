"""Run by test_check.py in Triton's interpreter, in bf16: tensors with gaps, inside others, empty.

A kernel gives the same bits for the same values, wherever they lie; without rows it gives an empty
result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning_peft_kernels.chips import CHIPS, nvidia_chip
from lightning_peft_kernels.dispatch import Decision, use_backend
from lightning_peft_kernels.dropout.ops import seeded_dropout
from lightning_peft_kernels.experts.grouped_linear import nf4_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank
from lightning_peft_kernels.launch import use_verdicts
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import quantize_4bit
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.reference import quantize_4bit_reference
from lightning_peft_kernels.nf4.small_batch import multiply_few, nf4_small_batch
from torch import Tensor

from tests.helpers.interpreter_bf16 import use_bf16

CPU, BF16 = torch.device("cpu"), torch.bfloat16
N, K, R, E = 48, 128, 8, 3
Op = Callable[..., object]


def gaps(t: Tensor) -> Tensor:
    """Every other element of a buffer."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def inside(t: Tensor) -> Tensor:
    """A part of a larger buffer, three elements from its start."""
    flat = torch.full((t.numel() + 8,), torch.nan, dtype=t.dtype)
    flat[3 : 3 + t.numel()] = t.reshape(-1)
    return flat[3 : 3 + t.numel()].view(t.shape)


def transposed(t: Tensor) -> Tensor:
    """Columns one after the other."""
    return t.mT.contiguous().mT if t.ndim > 1 else t


def packed() -> Packed4bit:
    return quantize_4bit_reference(torch.randn(N, K) / K**0.5)


def stacked() -> Packed4bit:
    parts = zip(*(packed() for _ in range(E)), strict=True)
    return Packed4bit(*(torch.stack([t.reshape(-1) for t in p]) for p in parts))  # type: ignore[misc]


def pairs(q: Packed4bit, x: Tensor, S: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    how = Decision("pairs", "asked")
    return multiply_few(x, q, Packing((N, K), "nf4", 64), S, B, bias, "triton", how)


def few(q: Packed4bit, x: Tensor, S: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    return nf4_small_batch(x, q, (N, K), S, B, bias)


def experts(q: Packed4bit, x: Tensor) -> Tensor:
    return nf4_grouped_linear(x, q, (N, K), groups(x.shape[0]))


def low_rank(y: Tensor, X: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return add_low_rank(y, X, A, B, 0.5, groups(X.shape[0]))


def groups(rows: int) -> Groups:
    """The first expert has no rows, the last all that are left."""
    return Groups.counted([0, rows // 3, rows - rows // 3], rows, CPU)


def ops() -> list[tuple[str, Op, Sequence[tuple[int, ...]]]]:
    """(name, op, shapes of its tensors); -1 is the number of rows."""
    q, qs, seed = packed(), stacked(), torch.tensor([1 << 33 | 5])
    lightning_peft = torch.ops.lightning_peft
    factors = ((-1, K), (-1, R), (N, R), (N,))
    return [
        ("output_scale", partial(lightning_peft.output_scale, backend="triton"),
         ((-1, N), (N,), (N,))),
        ("output_scale_backward", partial(lightning_peft.output_scale_backward, backend="triton"),
         ((-1, N), (-1, N), (N,))),
        ("seeded_dropout", lambda x: seeded_dropout(x, seed, 0.3), ((-1, K),)),
        ("rank_gradients", lambda *t: rank_gradients(*t, 0.5), ((-1, N), (-1, R), (N, R))),
        ("quantize_4bit", lambda W: tuple(quantize_4bit(W)), ((N, K),)),
        ("nf4_small_batch", partial(few, q), factors),
        ("pairs", partial(pairs, q), factors),
        ("nf4_grouped_linear", partial(experts, qs), ((-1, K),)),
        ("add_low_rank", low_rank, ((-1, N), (-1, K), (E, R, K), (E, N, R))),
    ]  # fmt: skip


def results(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in found if t is not None]  # type: ignore[attr-defined]


def same_bits(name: str, op: Op, shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    sizes = [tuple(rows if n == -1 else n for n in shape) for shape in shapes]
    tensors = [torch.randn(size).to(BF16) for size in sizes]
    want = results(op(*(t.clone() for t in tensors)))
    count = 0
    for lay in (gaps, inside, transposed):
        for position in range(len(tensors)):
            given = [lay(t) if i == position else t.clone() for i, t in enumerate(tensors)]
            for got, truth in zip(results(op(*given)), want, strict=True):
                assert torch.equal(got, truth), (name, lay.__name__, position, rows)
            count += 1
    return count


def empty() -> int:
    count = 0
    for name, op, shapes in ops():
        if name in ("quantize_4bit", "pairs"):  # a weight has rows; a race is never without tokens
            continue
        sizes = [tuple(0 if n == -1 else n for n in shape) for shape in shapes]
        found = results(op(*(torch.randn(size).to(BF16) for size in sizes)))
        assert all(not t.isnan().any() for t in found), name
        assert not found[0].numel() or not found[0].any(), name
        count += 1
    x, A, B = (torch.randn(s).to(BF16).requires_grad_() for s in ((0, K), (R, K), (N, R)))
    y = nf4_lora_linear(x, packed(), (N, K), None, A, B, 0.5)
    assert y.shape == (0, N)
    y.sum().backward()
    for t in (x, A, B):
        assert t.grad is not None
        assert not t.grad.any()
    return count + 1


def main(sample: bool) -> None:
    use_bf16()
    CHIPS[CPU] = nvidia_chip(9, 0, 232_448)
    use_verdicts(CPU, {})
    torch.manual_seed(0)
    count = 0
    with use_backend("triton"):
        for name, op, shapes in ops():
            for rows in (4,) if sample else (1, 4, 7):
                count += same_bits(name, op, shapes, rows)
    with use_backend("auto"):
        count += empty()
    print(f"{count} checks agree")


if __name__ == "__main__":
    main("sample" in sys.argv)
