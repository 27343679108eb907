"""Reuse between recomputation and backward, and prefetch: equal bit for bit, fewer
dequantisations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from lightning_peft_kernels.nf4 import weight_buffers
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.compare import assert_same_bits

SHAPES = [(48, 64), (64, 48), (40, 64)]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Dequantisations so far; settings as before afterwards."""
    calls = [0]

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls[0] += 1
        return dequantize_4bit(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_buffers, "dequantize_4bit", counted)
    before = weight_buffers.configure()
    yield calls
    weight_buffers.configure(reuse=before.reuse, prefetch=before.prefetch)
    weight_buffers.release()


def net(lora: bool = True) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    torch.manual_seed(1)
    layers, trained = [], []
    for N, K in SHAPES[:2]:
        A, B = torch.randn(4, K), torch.randn(N, 4)
        layers.append((quantize_4bit(torch.randn(N, K) / 8), (N, K), A, B))
        trained += [A.requires_grad_(), B.requires_grad_()] if lora else []

    def run(x: Tensor) -> Tensor:
        for q, shape, A, B in layers:
            y = (
                nf4_lora_linear(x, q, shape, None, A, B, 0.5)
                if lora
                else nf4_linear(x, q, shape, None)
            )
            x = torch.tanh(y)
        return x

    return run, trained


def step(reuse: bool, kind: bool | None, lora: bool = True) -> list[Tensor]:
    weight_buffers.configure(reuse=reuse)
    run, trained = net(lora)
    x = torch.randn(5, 64, requires_grad=True)
    y = run(x) if kind is None else checkpoint(run, x, use_reentrant=kind)
    y.sum().backward()
    return [y.detach(), x.grad, *(t.grad for t in trained)]  # type: ignore[list-item]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "base"])
@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
def test_reuse_saves_one_dequantisation_of_three(kind: bool, lora: bool, count: list[int]) -> None:
    runs = {}
    for reuse in (False, True):
        torch.manual_seed(0)
        count[0] = 0
        runs[reuse] = step(reuse, kind, lora)
        assert count[0] == (4 if reuse else 6)
    for a, b in zip(runs[False], runs[True], strict=True):
        assert_same_bits("tensor", b, a)


def test_without_a_checkpoint_nothing_is_kept(count: list[int]) -> None:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        step(True, None)
    assert max(sizes) < 48 * 64
    assert count[0] == 4


def test_prefetch_gives_the_same_weights_and_finds_the_order(count: list[int]) -> None:
    packed = [quantize_4bit(torch.randn(shape)) for shape in SHAPES]
    ahead = weight_buffers.Prefetch(torch.device("cpu"))
    orders = [[0, 1, 2, 2, 1, 0]] * 3 + [[1, 0]]  # forward and backward, then another order
    for turn, order in enumerate(orders):
        hits = ahead.hits
        for i in order:
            W = ahead.take(packed[i], SHAPES[i], torch.float32, "nf4", 64)
            assert_same_bits("W", W, dequantize_4bit(packed[i], SHAPES[i], torch.float32))
        if turn == 2:
            assert ahead.hits == hits + len(order)


def test_prefetched_bytes_that_were_written_over_are_not_used() -> None:
    a, b = (quantize_4bit(torch.randn(8, 64)) for _ in range(2))
    ahead = weight_buffers.Prefetch(torch.device("cpu"))
    for q in (a, b, a):
        ahead.take(q, (8, 64), torch.float32, "nf4", 64)
    b.packed.copy_(a.packed)
    W = ahead.take(b, (8, 64), torch.float32, "nf4", 64)
    assert_same_bits("W", W, dequantize_4bit(b, (8, 64), torch.float32))


def test_a_recorded_product_does_not_read_the_shared_buffer() -> None:
    """Gradients of gradients: the first backward keeps its weight, later layers write the
    buffer.
    """
    q, other = quantize_4bit(torch.randn(16, 16)), quantize_4bit(torch.randn(16, 16))
    x = torch.randn(3, 16, requires_grad=True)
    y = nf4_linear(x, q, (16, 16), None).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    nf4_linear(x.detach(), other, (16, 16), None)
    W = dequantize_4bit(q, (16, 16), torch.float32)
    torch.testing.assert_close(g, 2 * x @ W.T @ W)
