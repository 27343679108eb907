"""Grouped products of experts: values and gradients against the formula in fp64, with empty and
uneven groups, rows of nobody, every dtype, aligned and not, on the host and on the device path.
"""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.experts import cpu_pairs
from lightning_peft_kernels.experts.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
    nf4_grouped_linear,
)
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank, add_low_rank_reference
from lightning_peft_kernels.experts.products import library_product
from lightning_peft_kernels.experts.selected import SelectedExperts
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from torch.utils.checkpoint import checkpoint

from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.dispatch import count_on_host

COUNTS = {
    "even": [4] * 9,
    "uneven": [0, 7, 1, 0, 0, 12, 3, 1, 0],
    "one": [0, 0, 0, 0, 9, 0, 0, 0, 0],
    "mostly idle": [0, 0, 5, 0, 0, 0, 40, 0, 0],
    "high blocks": [0, 40, 9, 0, 60, 3, 1, 0, 20],
    "tall": [0, 70, 0, 0, 230, 0, 1, 0, 0],
    "none": [0] * 9,
}
SHAPES = {"aligned": (24, 32), "rank": (3, 32), "odd": (13, 21)}


@pytest.fixture(params=[True, False], ids=["host", "device path"])
def on_host(request, monkeypatch):
    count_on_host(monkeypatch, request.param)
    return request.param


def rows_for(counts, tail, dtype, K):
    g = torch.Generator().manual_seed(0)
    S = sum(counts) + tail
    X = torch.randn(S, K, generator=g, dtype=torch.float64).to(dtype)
    expert = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    return (
        X,
        expert,
        Groups.sorted(
            torch.cat([expert, torch.full((tail,), len(counts))]),
            len(counts),
            has_unassigned_rows=tail > 0,
        ),
    )


def packed_and_dense(N, K, kind, nested, experts=9):
    """Experts packed one by one, and what they are dequantised to."""
    W = torch.randn(experts, N, K, generator=torch.Generator().manual_seed(1))
    one = [quantize_4bit(w, kind=kind, block_size=32, double_quant=nested) for w in W]
    q = Packed4bit(*(None if ts[0] is None else torch.stack([t.reshape(-1) for t in ts])
                     for ts in zip(*one, strict=True)))  # fmt: skip
    how = {"kind": kind, "block_size": 32}
    return q, torch.stack([dequantize_4bit(p, (N, K), W.dtype, **how) for p in one])


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_dense(counts, shape, tail, dtype, on_host):
    N, K = SHAPES[shape]
    X, expert, groups = rows_for(COUNTS[counts], tail, dtype, K)
    W = torch.randn(9, N, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    dY = torch.randn(X.shape[0], N, generator=torch.Generator().manual_seed(2)).to(dtype)
    n = len(expert)

    def step(X, W, run):
        X, W = X.clone().requires_grad_(), W.clone().requires_grad_()
        y = run(X, W)
        y.backward(dY[: len(y)].to(y.dtype))
        return y.detach(), X.grad, W.grad

    def reference(X, W):
        return grouped_linear_reference(X[:n], W, expert)

    got = step(X, W, lambda X, W: grouped_linear(X, W, groups))
    want = step(X.double(), W.double(), reference)
    same = step(X, W, reference)
    for name, a, b, c in zip(("y", "dX", "dW"), got, want, same, strict=True):
        assert a.dtype == dtype
        if not n:
            assert not a.any()
            continue
        rows = slice(None) if name == "dW" else slice(n)
        floor = 4 * torch.finfo(dtype).eps
        assert_close(name, a[rows], b[rows], same_dtype=c[rows], floor=floor)
        assert name == "dW" or not a[n:].any(), "rows of nobody"
    for e, count in enumerate(COUNTS[counts]):
        assert bool(got[2][e].any()) == bool(count)


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(("N", "K"), [(24, 32), (6, 32), (5, 21), (128, 64)])
@pytest.mark.parametrize("counts", COUNTS)
def test_packed_is_dense_over_the_dequantised_weight(counts, N, K, tail, nested, kind, on_host):
    """Blocks may end inside an expert (5 × 21), rows be unaligned, experts few or many, scales
    of an expert in whole groups of 256 (128 × 64) or not.
    """
    X, _, groups = rows_for(COUNTS[counts], tail, torch.float32, K)
    q, dense = packed_and_dense(N, K, kind, nested)
    dY = torch.randn(X.shape[0], N, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (
        lambda X: nf4_grouped_linear(X, q, (N, K), groups, kind=kind, block_size=32),
        lambda X: grouped_linear(X, dense, groups),
    ):
        x = X.clone().requires_grad_()
        y = run(x)
        y.backward(dY)
        found.append((y.detach(), x.grad))
    assert_close("y", found[0][0], found[1][0])
    assert_close("dX", found[0][1], found[1][1])


def assert_product(y, x, W, expert, dY):
    """Y and x.grad against the formula in fp64; zero in rows of nobody."""
    n, dtype = len(expert), x.dtype
    assert x.grad.dtype == y.dtype == dtype
    assert not y[n:].any(), "rows of nobody"
    assert not x.grad[n:].any(), "rows of nobody"
    if not n:
        return
    want = []
    for d in (torch.float64, dtype):
        t = x.detach()[:n].to(d).requires_grad_()
        product = grouped_linear_reference(t, W.to(d), expert)
        product.backward(dY[:n].to(d))
        want.append((product.detach(), t.grad))
    floor = 8 * torch.finfo(dtype).eps
    for name, got, exact, same in zip(("y", "dX"), (y, x.grad), *want, strict=True):
        assert_close(name, got[:n], exact, same_dtype=same, floor=floor)


def test_gradients_of_gradients_through_packed_experts():
    """What is recorded does not read the buffer that other experts are made in since."""
    X, _, groups = rows_for(COUNTS["uneven"], 0, torch.float32, 32)
    q, dense = packed_and_dense(24, 32, "nf4", True)
    found = []
    for run in (
        lambda X: nf4_grouped_linear(X, q, (24, 32), groups, block_size=32),
        lambda X: grouped_linear(X, dense, groups),
    ):
        x = X.clone().requires_grad_()
        (dX,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dX.square().sum(), x)[0])
    assert_close("ddX", *found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("weight", ["packed", "bf16", "fp32"])
def test_under_a_checkpoint(weight, reentrant):
    X, _, groups = rows_for(COUNTS["uneven"], 0, torch.float32, 32)
    q, W = packed_and_dense(24, 32, "nf4", True)

    def run(X):
        if weight == "packed":
            return nf4_grouped_linear(X, q, (24, 32), groups, block_size=32)
        return grouped_linear(X, W.bfloat16() if weight == "bf16" else W, groups)

    plain, under = (X.clone().requires_grad_() for _ in range(2))
    run(plain).square().sum().backward()
    checkpoint(run, under, use_reentrant=reentrant).square().sum().backward()
    assert_same_bits("dX", under.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(("N", "K"), [(24, 32), (5, 21)])
@pytest.mark.parametrize("seed", range(4))
def test_few_rows_side_by_side(seed, N, K, tail, dtype):
    """Experts taken in the order of their rows, several in one batched product."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 13, (24,), generator=g)
    counts[torch.randperm(24, generator=g)[:6]] = 0
    counts[3] = 40 * (seed % 2)  # too many rows for a batched product
    X, expert, groups = rows_for(counts.tolist(), tail, dtype, K)
    q, W = packed_and_dense(N, K, "nf4", True, experts=24)
    dY = torch.randn(X.shape[0], N, generator=g, dtype=torch.float64).to(dtype)
    x = X.clone().requires_grad_()
    y = nf4_grouped_linear(x, q, (N, K), groups, block_size=32)
    y.backward(dY)
    (batches,) = groups.active._batches.values()
    assert any(n > 1 for slab in batches.slabs for n, _ in slab)
    assert sorted(batches.experts) == counts.nonzero().view(-1).tolist()
    assert_product(y, x, W.to(dtype), expert, dY)


@pytest.mark.parametrize("stored", ["[E, N, K]", "[E, K, N]", "part of another"])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(("N", "K"), [(24, 32), (5, 21)])
@pytest.mark.parametrize("seed", range(4))
def test_few_rows_in_pairs(monkeypatch, seed, N, K, tail, stored):
    """Dense experts read where they lie, two in one batched product."""
    monkeypatch.setattr(cpu_pairs, "_MANY_WEIGHTS", 0)
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 13, (25,), generator=g)
    counts[torch.randperm(25, generator=g)[: 6 + seed]] = 0
    counts[3] = 40 * (seed % 2)  # too many rows for a batched product
    X, expert, groups = rows_for(counts.tolist(), tail, torch.float32, K)
    whole = torch.randn(27, N + 3, K + 2, generator=g)
    W = whole[1:26, 2 : N + 2, 1 : K + 1]
    if stored != "part of another":
        W = W.contiguous() if stored == "[E, N, K]" else W.mT.contiguous().mT
    dY = torch.randn(X.shape[0], N, generator=g)
    x = X.clone().requires_grad_()
    y = grouped_linear(x, W, groups)
    y.backward(dY)
    (batches,) = groups.active._batches.values()
    assert {sum(n for n, _ in slab) for slab in batches.slabs[:-1]} == {2}
    assert any(n == 2 for slab in batches.slabs for n, _ in slab)
    assert_product(y, x, W, expert, dY)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("stored", ["[E, N, K]", "[E, K, N]"])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("counts", COUNTS)
def test_a_frozen_weight(counts, dtype, of_weight, tail, stored, on_host):
    """In X's dtype or cast, expert by expert; stored either way."""
    X, expert, groups = rows_for(COUNTS[counts], tail, dtype, 32)
    g = torch.Generator().manual_seed(1)
    W = torch.randn(9, 24, 32, generator=g).to(of_weight)
    dY = torch.randn(X.shape[0], 24, generator=g).to(dtype)
    given = W if stored == "[E, N, K]" else W.mT.contiguous().mT
    x = X.clone().requires_grad_()
    y = grouped_linear(x, given, groups)
    y.backward(dY)
    assert_product(y, x, W.to(dtype), expert, dY)


def test_neighbours_are_read_in_place():
    t = torch.arange(12).view(6, 2)
    wanted = SelectedExperts([1, 2, 3, 5], t.device)
    assert wanted.take(t, 0, 3).data_ptr() == t[1].data_ptr()
    assert_same_bits("others", wanted.take(t, 1, 3), t[[2, 3, 5]])


def test_groups():
    expert = torch.tensor([0, 0, 2, 5, 5, 5])
    groups = Groups.sorted(expert, 5, has_unassigned_rows=True)
    assert groups.counts == [2, 0, 1, 0, 0]
    assert groups.sizes.tolist() == groups.counts
    assert_same_bits("counted", Groups.counted([2, 0, 1, 0, 0], 6, torch.device("cpu")).offsets,
                     groups.offsets)  # fmt: skip
    with pytest.raises(ValueError, match="at most 2 rows, got 3"):
        Groups.counted([3], 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="4 experts and 6 rows, got 5 experts and 6 rows"):
        grouped_linear(torch.ones(6, 8), torch.ones(4, 8, 8), groups)


def test_ops_for_compilers():
    """Shapes without values as with them."""
    X, _, groups = rows_for(COUNTS["even"], 0, torch.float32, 32)
    W = torch.randn(9, 24, 32)
    tests = ("test_schema", "test_faketensor")
    args = (X, W.mT, groups.offsets)
    torch.library.opcheck(torch.ops.lightning_peft.grouped_mm, args, test_utils=tests)
    for transposed, x in ((True, X), (False, torch.randn(X.shape[0], 24))):
        args = (x, groups.offsets, False, [W], [24, 32], "", 0, transposed)
        torch.library.opcheck(
            torch.ops.lightning_peft.on_the_fly_grouped_linear, args, test_utils=tests
        )
    whole = torch.compile(library_product, backend="aot_eager", fullgraph=True)
    assert_same_bits(
        "compiled",
        whole(X, W, groups.offsets, has_unassigned_rows=False),
        library_product(X, W, groups.offsets, has_unassigned_rows=False),
    )


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(("N", "K", "R"), [(24, 32, 4), (13, 21, 3), (24, 32, 1), (24, 32, 17)])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_low_rank_is_added(counts, N, K, R, tail, dtype, in_place, on_host):
    X, expert, groups = rows_for(COUNTS[counts], tail, dtype, K)
    g = torch.Generator().manual_seed(1)
    W, A, B, y_out = (
        torch.randn(s, generator=g).to(dtype)
        for s in ((9, N, K), (9, R, K), (9, N, R), (X.shape[0], N))
    )
    n = len(expert)

    def step(dtype, run):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (X, W, A, B)]
        y = run(*leaves)
        y.backward(y_out[: len(y)].to(dtype))
        return [y.detach(), *(t.grad for t in leaves)]

    def ours(X, W, A, B):  # onto a product, as a layer does
        y = grouped_linear(X, W, groups)
        return add_low_rank(y, X, A, B, 0.5, groups, in_place=in_place)

    def reference(X, W, A, B):
        y = grouped_linear_reference(X[:n], W, expert)
        return add_low_rank_reference(y, X[:n], A, B, 0.5, expert)

    got, want, same = step(dtype, ours), step(torch.float64, reference), step(dtype, reference)
    for name, a, b, c in zip(("y", "dX", "dW", "dA", "dB"), got, want, same, strict=True):
        assert a.dtype == dtype
        if not n:
            assert not a.any(), name
            continue
        rows = slice(n) if name in ("y", "dX") else slice(None)
        floor = 8 * torch.finfo(dtype).eps
        assert_close(name, a[rows], b[rows], same_dtype=c[rows], floor=floor)
        assert rows == slice(None) or not a[n:].any(), "rows of nobody"


def test_a_scaling_that_is_trained_and_a_y_of_another_dtype():
    X, expert, groups = rows_for(COUNTS["uneven"], 0, torch.float32, 32)
    A, B, scaling = torch.randn(9, 4, 32), torch.randn(9, 24, 4), torch.tensor(0.5)
    y = torch.zeros(X.shape[0], 24, dtype=torch.bfloat16)
    scaling.requires_grad_()
    got = add_low_rank(y, X, A, B, scaling, groups, in_place=True)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    want = add_low_rank_reference(torch.zeros(X.shape[0], 24), X, A, B, scaling.detach(), expert)
    assert_close("y", got.detach().float(), want, floor=1e-2)
    assert_close("d scaling", scaling.grad, want.sum() / 0.5, floor=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_with_its_expert(bad, on_host):
    """Blocks are filled up: never with another expert's row."""
    counts = COUNTS["uneven"]
    X, expert, groups = rows_for(counts, 0, torch.float32, 32)
    X[expert == 1] = bad
    A, B = torch.randn(9, 4, 32).requires_grad_(), torch.randn(9, 24, 4).requires_grad_()
    y = add_low_rank(torch.zeros(X.shape[0], 24), X, A, B, 0.5, groups)
    y[expert != 1].sum().backward()
    others = [e for e in range(9) if e != 1]
    assert torch.isfinite(y[expert != 1]).all()
    assert torch.isfinite(A.grad[others]).all()
    assert torch.isfinite(B.grad[others]).all()


@pytest.mark.parametrize("counts", COUNTS)
def test_blocks_hold_every_row_once(counts):
    X, expert, groups = rows_for(COUNTS[counts], 0, torch.bfloat16, 4)
    blocks = groups.blocks(torch.empty(9, 4, 4, dtype=torch.bfloat16))
    if not len(expert):
        assert blocks is None
        return
    assert_same_bits("there and back", blocks.joined(blocks.cut(X)), X)
    rows = blocks.row.view(-1, blocks.height)
    assert bool((expert[rows] == blocks.expert[:, None]).all()), "fillers of another expert"
    assert int((~blocks.padding).sum()) == len(expert)


def test_blocks_are_for_few_rows_and_small_factors():
    _, _, few = rows_for([3, 0, 5], 0, torch.float32, 4)
    _, _, many = rows_for([100, 0, 200], 0, torch.float32, 4)
    _, _, some_of_nobody = rows_for([3, 0, 5], 1, torch.float32, 4)
    small, large = torch.empty(3, 8, 256), torch.empty(3, 512, 256)
    assert few.blocks(small, small) is not None
    assert few.blocks(small, large) is None
    assert many.blocks(small) is None
    assert some_of_nobody.blocks(small) is None
