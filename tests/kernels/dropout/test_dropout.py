"""Dropout by seed: the mask of a seed is always the same, in every dtype, and only a small one on a
CPU is kept.
"""

import pytest
import torch
from lightning_peft_kernels.dropout import ops as dropout_ops
from lightning_peft_kernels.dropout.ops import (
    draw_seed,
    dropout,
    philox_uniform,
    seeded_dropout,
    seeded_dropout_reference,
)
from lightning_peft_kernels.lora.linear import lora_linear
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
M, K, N, R = 64, 256, 128, 4


def philox_by_integers(counter: int, seed: int) -> list[int]:
    """Philox4x32-10 of Python's integers, from the paper."""
    mask = 0xFFFFFFFF
    c, k = [counter & mask, counter >> 32, 0, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & mask, p0 >> 32 ^ c[3] ^ k[1], p0 & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 + 7, 2**62 - 1, -5])
def test_the_reference_is_philox(seed):
    words = [w for i in range(3) for w in philox_by_integers(i, seed % 2**64)][:10]
    signed = [w - 2**32 if w >= 2**31 else w for w in words]
    want = [(-w - 1 if w < 0 else w) * 4.6566127342e-10 for w in signed]
    got = philox_uniform(torch.tensor([seed]), 10)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("f", [seeded_dropout, seeded_dropout_reference])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_the_share_that_is_kept(f, p):
    y = f(torch.ones(300, 500), torch.tensor([11]), p)
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    assert abs(float(kept.float().mean()) - (1 - p)) <= 5 * (p * (1 - p) / y.numel()) ** 0.5
    columns = kept.float().mean(0)  # no column is favoured
    assert (columns - (1 - p)).abs().max() <= 6 * (p * (1 - p) / 300) ** 0.5


def test_one_seed_is_one_mask_for_every_dtype_and_layout():
    seed = draw_seed(CPU)
    want = seeded_dropout(torch.ones(M, K), seed, 0.4) != 0
    for x in (torch.ones(M, K, dtype=torch.bfloat16), torch.ones(K, M).mT, torch.ones(M, K).half()):
        assert torch.equal(seeded_dropout(x, seed, 0.4) != 0, want)
    assert not torch.equal(seeded_dropout(torch.ones(M, K), draw_seed(CPU), 0.4) != 0, want)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1), (0, 4), ()], ids=str)
def test_any_number_of_elements(shape):
    x = torch.full(shape, 3.0)
    y = seeded_dropout(x, torch.tensor([3]), 0.5)
    assert y.shape == x.shape
    assert bool(((y == 0) | (y == 6)).all())


def test_a_probability_just_below_one_keeps_a_few():
    y = seeded_dropout(torch.ones(1 << 20), torch.tensor([3]), 1 - 1e-7)
    assert 0 < int((y != 0).sum()) < 64


def test_a_probability_of_one_is_refused():
    with pytest.raises(ValueError, match=r"expected 0 <= p < 1, got p = 1\.0"):
        seeded_dropout(torch.ones(2), draw_seed(CPU), 1.0)


def test_the_op_holds_what_its_schema_says():
    torch.library.opcheck(
        torch.ops.lightning_peft.seeded_dropout.default, (torch.ones(3, 4), draw_seed(CPU), 0.5)
    )


def layer(packed, x, A, B, p=0.3):
    if packed:
        q = quantize_4bit(torch.linspace(-1, 1, N * K).view(N, K))
        return nf4_lora_linear(x, q, (N, K), None, A, B, 0.5, dropout_p=p)
    return lora_linear(x, torch.linspace(-1, 1, N * K).view(N, K), None, A, B, 0.5, dropout_p=p)


def leaves():
    g = torch.Generator().manual_seed(0)
    shapes = ((M, K), (R, K), (N, R))
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes]


@pytest.fixture
def seeds_alone(monkeypatch):
    """As for larger inputs and on a GPU: masks of small ones are not kept."""
    monkeypatch.setattr(dropout_ops, "_SMALL", 0)


@pytest.mark.parametrize("size", [(8, 64), (200, 96)], ids=str)
def test_the_mask_of_a_small_input_is_kept(size):
    """Backward reads it: gradients are those of the formula with the mask written out."""
    rows, width = size
    assert (rows * width > dropout_ops._TINY) == (size == (200, 96))
    q = quantize_4bit(torch.randn(N, width) / width**0.5)
    given = [torch.randn(s) for s in (size, (R, width), (N, R))]
    x, A, B = (t.clone().requires_grad_() for t in given)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nf4_lora_linear(x, q, (N, width), None, A, B, 0.5, dropout_p=0.25)
    (mask,) = [t for t in saved if t.shape == size and not torch.equal(t, x)]
    values = mask.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert abs(float((mask == 0).float().mean()) - 0.25) < 0.08
    x2, A2, B2 = (t.clone().requires_grad_() for t in given)
    W = dequantize_4bit(q, (N, width), torch.float32)
    want = x2 @ W.T + (x2 * mask) @ A2.mT @ B2.mT * 0.5
    for t in (y, want):
        t.square().sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    for mine, theirs in zip((x, A, B), (x2, A2, B2), strict=True):
        bound = 1e-4 * float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.usefixtures("seeds_alone")
def test_no_mask_is_saved(packed):
    """A fixed seed tells the mask: backward is that of the formula with the mask written out; what
    is saved beyond the run without dropout is the seed, 8 bytes.
    """
    x, A, B = leaves()
    saved: dict[float, int] = {}
    for p in (0.0, 0.3):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
        ):
            layer(packed, x, A, B, p)
        saved[p] = sum(sizes)
    assert saved[0.3] - saved[0.0] == 8
    torch.manual_seed(4)
    y = layer(packed, x, A, B)
    y.square().sum().backward()
    got = [t.grad.clone() for t in (x, A, B)]
    torch.manual_seed(4)
    mask = seeded_dropout(torch.ones(M, K), draw_seed(CPU), 0.3)
    x2, A2, B2 = leaves()
    base = layer(packed, x2, torch.zeros(R, K), torch.zeros(N, R), 0.0)
    want = base + (x2 * mask) @ A2.mT @ B2.mT * 0.5
    want.square().sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    for mine, theirs in zip(got, (x2.grad, A2.grad, B2.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2 * float(theirs.abs().mean()))


def test_steps_differ_and_a_seed_brings_them_back():
    x, A, B = leaves()
    torch.manual_seed(7)
    first, second = layer(True, x, A, B), layer(True, x, A, B)
    torch.manual_seed(7)
    again = layer(True, x, A, B)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_mask_again(reentrant):
    grads = []
    for wrapped in (False, True):
        x, A, B = leaves()
        torch.manual_seed(3)
        y = (
            checkpoint(layer, True, x, A, B, use_reentrant=reentrant)
            if wrapped
            else layer(True, x, A, B)
        )
        torch.randn(5)  # the generator moves on before backward
        y.sum().backward()
        grads.append((x.grad, A.grad, B.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("seeds_alone")
def test_compiles_without_a_graph_break():
    x, A, B = leaves()
    q = quantize_4bit(torch.randn(N, K))

    def f(x):
        return nf4_lora_linear(x, q, (N, K), None, A, B, 0.5, dropout_p=0.3)

    torch.manual_seed(5)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    torch.manual_seed(5)
    assert torch.allclose(f(x), y, atol=1e-5)


def test_dropout_of_an_activation_keeps_a_seed_alone():
    x = torch.randn(M, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.nbytes) or t, lambda t: t
    ):
        y = dropout(x, 0.3)
    assert saved == [8]
    (dX,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dX * x, y)
    assert 0 < int((y == 0).sum()) < y.numel()
