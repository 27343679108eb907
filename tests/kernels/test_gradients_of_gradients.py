"""A recorded backward (create_graph): every op's second derivatives against finite differences in
fp64.
"""

import pytest
import torch
from lightning_peft_kernels.experts.grouped_linear import grouped_linear, nf4_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import e4m3_scale
from lightning_peft_kernels.lora.linear import lora_linear
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, quantize_4bit
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from lightning_peft_kernels.scale.ops import output_scale

K, N, R = 6, 4, 2
ROWS = {"two axes": (3,), "three axes": (2, 2)}
PACKED = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(function, *inputs):
    """Also with each input frozen in turn."""

    def seeded(*given):  # the same masks in every call
        torch.manual_seed(1)
        return function(*given)

    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(seeded, inputs, fast_mode=True)
    for frozen in range(len(inputs)) if len(inputs) > 1 else ():
        some = [t.detach() if i == frozen else t for i, t in enumerate(inputs)]
        assert torch.autograd.gradgradcheck(seeded, some, fast_mode=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_on_a_dense_and_on_a_packed_base(rows, dropout_p):
    def dense(x, A, B, bias, W):
        return lora_linear(x, W, bias, A, B, 0.7, dropout_p=dropout_p)

    def packed(x, A, B, bias):
        return nf4_lora_linear(x, PACKED, (N, K), bias, A, B, 0.7, dropout_p=dropout_p)

    inputs = leaf(*ROWS[rows], K), leaf(R, K), leaf(N, R), leaf(N)
    check(dense, *inputs, leaf(N, K))
    check(packed, *inputs)
    check(lambda x, bias: nf4_linear(x, PACKED, (N, K), bias).sin(), inputs[0], inputs[3])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_projections_that_share_their_input(dropout_p):
    def together(x, A, B, bias, A2, B2):
        given = (bias, A, B, 0.7), (None, A2, B2, 1.5)
        layers = [Projection(PACKED, (N, K), *parts, dropout_p) for parts in given]
        return tuple(nf4_grouped_projections(x, layers))

    check(together, leaf(2, 2, K), leaf(R, K), leaf(N, R), leaf(N), leaf(1, K), leaf(N, 1))


@pytest.mark.parametrize("rows", ROWS)
def test_output_scales(rows):
    W = leaf(N, K).detach()

    def ia3(x, scale, bias):
        return output_scale(x @ W.T, scale, bias)

    def dora(x, A, B, scale, bias):
        return output_scale(lora_linear(x, W, None, A, B, 0.7), scale, bias)

    x, scale, bias = leaf(*ROWS[rows], K), leaf(N), leaf(N)
    # Sums over rows are made in fp32 at least; u itself is fp64, so they are here.
    check(ia3, x, scale, bias)
    check(dora, x, leaf(R, K), leaf(N, R), scale, bias)


@pytest.mark.parametrize("counts", [[0, 2, 1, 0, 3], [0, 0, 60, 0, 1]])
def test_experts(counts):
    """Few rows an expert, for which a low rank goes by blocks, and many."""
    S, groups = sum(counts), Groups.counted(counts, sum(counts), torch.device("cpu"))
    weights = [quantize_4bit(torch.randn(N, K)) for _ in counts]
    q = Packed4bit(*(torch.stack([t.reshape(-1) for t in ts]) for ts in zip(*weights, strict=True)))

    def dense(X, W):
        return grouped_linear(X, W, groups)

    def packed(X):
        return nf4_grouped_linear(X, q, (N, K), groups).sin()

    def low_rank(y, X, B, A):
        return add_low_rank(y, X, A, B, 0.5, groups)

    def all_but_a(y, X, B):
        return low_rank(y, X, B, A.detach())

    A, B = leaf(5, R, K), leaf(5, N, R)
    check(dense, leaf(S, K), leaf(5, N, K))
    check(packed, leaf(S, K))
    for frozen in range(3):
        inputs = [leaf(S, N), leaf(S, K), B, A]
        inputs[frozen] = inputs[frozen].detach()
        assert torch.autograd.gradgradcheck(low_rank, inputs, fast_mode=True)
    y = all_but_a(leaf(S, N), leaf(S, K), B)
    with pytest.raises(RuntimeError, match="create_graph=True; train A too"):
        torch.autograd.grad(y.square().sum(), B, create_graph=True)


def test_rounded_products_refuse():
    q = quantize_4bit(torch.randn(16, 32))
    x, A, B = torch.randn(3, 32, requires_grad=True), torch.randn(2, 32), torch.randn(16, 2)
    y = fp8_lora_linear(x, q, (16, 32), e4m3_scale(q), None, A, B)
    with pytest.raises(RuntimeError, match="create_graph=True; its products are rounded"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
