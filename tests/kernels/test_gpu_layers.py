"""Layers and steps on a GPU: gradients, streams, graphs, a second device, 2³¹ elements."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels import launch
from lightning_peft_kernels.codebooks.eight_bit import ZERO_CODE
from lightning_peft_kernels.dispatch import Decision
from lightning_peft_kernels.dropout.ops import seeded_dropout, seeded_dropout_reference
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank, add_low_rank_reference
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from lightning_peft_kernels.nf4.small_batch import multiply_few
from lightning_peft_kernels.optim.adamw_8bit import pooled_8bit_step, pooled_8bit_step_reference
from lightning_peft_kernels.optim.step_inputs import PooledStep
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import FLOOR, assert_close, assert_same_bits
from tests.helpers.decoding_calls import decoder, static_step

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
N, K, R = 96, 256, 8


@pytest.fixture(autouse=True)
def no_kernel_was_replaced() -> None:
    """Every kernel of these tests runs: a replaced one would be tested against itself."""
    yield  # type: ignore[misc]
    assert not launch.FAILURES


def factors(dtype: torch.dtype, device: torch.device = DEVICE) -> tuple[Packed4bit, list[Tensor]]:
    """A packed W, and x, A, B that take gradients."""
    q = quantize_4bit((torch.randn(N, K) / K**0.5).to(device))
    shapes = ((40, K), (R, K), (N, R))
    return q, [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def gradients(q: Packed4bit, tensors: list[Tensor]) -> list[Tensor]:
    x, A, B = tensors
    nf4_lora_linear(x, q, (N, K), None, A, B, 0.5).square().sum().backward()
    return [t.grad for t in tensors if t.grad is not None]


@pytest.mark.parametrize("lion", [False, True], ids=["AdamW", "Lion"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_8bit_step(dtype: torch.dtype, lion: bool) -> None:
    """Against the reference on the CPU, over steps, for tensors of ragged sizes."""
    sizes, starts = (300, 256, 7), (0, 512, 768)
    params, grads = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
    pool = 1024
    codes = [torch.full((pool,), ZERO_CODE[signed], dtype=torch.uint8) for signed in (True, False)]
    scales = [torch.zeros(pool // 256) for _ in range(2)]
    row = (0.999, 1e-3, 1e-8, 0.9, 0.1, 0.999, 1e-3)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        there = [p.clone().to(device) for p in params]
        code1, code2, absmax1, absmax2 = (t.clone().to(device) for t in (*codes, *scales))
        second = (None, None) if lion else (code2, absmax2)
        work = PooledStep(
            there, [g.to(device) for g in grads], starts,
            torch.tensor([row] * 3, device=device), code1, absmax1, *second,
        )  # fmt: skip
        for _ in range(3):
            (pooled_8bit_step_reference if device.type == "cpu" else pooled_8bit_step)(work)
        found.append((there, absmax1))
    (want, want_scale), (got, got_scale) = found
    for a, b in zip(got, want, strict=True):
        assert_close("p", a.cpu(), b.double(), floor=FLOOR[dtype])
    assert_close("absmax", got_scale.cpu(), want_scale, floor=1e-3)


def test_a_step_with_an_overflow_changes_nothing() -> None:
    p, code, scale = torch.ones(256), torch.full((256,), 127, dtype=torch.uint8), torch.zeros(1)
    p, code, scale, hyper = (t.to(DEVICE) for t in (p, code, scale, torch.ones(1, 7)))
    inf = torch.ones((), device=DEVICE)
    work = PooledStep([p], [p.clone()], [0], hyper, code, scale, found_inf=inf)
    pooled_8bit_step(work)
    assert_same_bits("p", p, torch.ones_like(p))
    assert bool((code == 127).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_bits(dtype: torch.dtype) -> None:
    x, seed = torch.randn(33, 130).to(dtype), torch.tensor([1 << 45 | 3])
    got = seeded_dropout(x.to(DEVICE), seed.to(DEVICE), 0.3)
    want = seeded_dropout_reference(x, seed, 0.3)
    assert_same_bits("kept", (got != 0).cpu(), want != 0)
    assert_close("y", got.cpu(), want.double(), floor=FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_low_rank_of_experts(rank: int, dtype: torch.dtype) -> None:
    counts = [0, 70, 3, 9]
    groups = Groups.counted(counts, sum(counts), DEVICE)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    given = [torch.randn(s).to(dtype) for s in ((82, N), (82, K), (4, rank, K), (4, N, rank))]
    ours = [t.to(DEVICE, copy=True).requires_grad_() for t in given]
    wide = [t.double().requires_grad_() for t in given]
    y, *rest = ours
    got = add_low_rank(y.clone(), *rest, 0.5, groups, in_place=True)
    want = add_low_rank_reference(*wide, 0.5, expert)
    dY = torch.randn(82, N).to(dtype)
    got.backward(dY.to(DEVICE))
    want.backward(dY.double())
    assert_close("y", got.detach().cpu(), want.detach(), floor=FLOOR[dtype])
    for name, a, b in zip("yXAB", ours, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert_close(name, a.grad.cpu(), b.grad, floor=FLOOR[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grouped_projections(dtype: torch.dtype, dropout: float) -> None:
    """Against the layers one by one under the same seed."""
    packed = [factors(dtype) for _ in range(3)]
    found = []
    for together in (True, False):
        torch.manual_seed(1)
        x = torch.ones(40, K, dtype=dtype, device=DEVICE, requires_grad=True)
        layers = [
            Projection(q, (N, K), None, A.detach().clone().requires_grad_(),
                       B.detach().clone().requires_grad_(), 0.5, dropout)
            for q, (_, A, B) in packed
        ]  # fmt: skip
        ys = (
            nf4_grouped_projections(x, layers)
            if together
            else [
                nf4_lora_linear(x, p.q, p.shape, None, p.A, p.B, 0.5, dropout_p=dropout)
                for p in layers
            ]
        )
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        found.append([*(y.detach() for y in ys), x.grad, *(p.A.grad for p in layers)])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert_close("value", a, b.double(), floor=2 * FLOOR[dtype])


def test_dora_gradients_equal_those_of_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(K, N, bias=False), nn.Tanh(), nn.Linear(N, 4))
        lp.attach(net, lp.DoRA(r=4, target_modules="all-linear", init="gaussian"))
        net.to(device)
        net(torch.linspace(-1, 1, 8 * K).view(8, K).to(device)).square().sum().backward()
        found.append({n: p.grad.cpu() for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert_close(name, found[1][name], want.double(), floor=1e-4)


def test_a_second_device_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    q, tensors = factors(torch.bfloat16)
    second = torch.device("cuda", 1)
    there = Packed4bit(*(None if t is None else t.to(second) for t in q))  # type: ignore[arg-type]
    moved = [t.detach().to(second).requires_grad_() for t in tensors]
    for a, b in zip(gradients(q, tensors), gradients(there, moved), strict=True):
        assert b.device == second
        assert_same_bits("gradient", a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


def test_another_stream() -> None:
    q, tensors = factors(torch.bfloat16)
    again = [t.detach().clone().requires_grad_() for t in tensors]
    want = gradients(q, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gradients(q, again)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        assert_same_bits("gradient", a, b)


def test_a_training_step_as_a_graph() -> None:
    q, tensors = factors(torch.bfloat16)
    for t in tensors:
        t.grad = torch.zeros_like(t)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(q, tensors)  # compiles, and fills the caches of tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for t in tensors:
            assert t.grad is not None
            t.grad.zero_()
        gradients(q, tensors)
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    fresh = [t.detach().clone().requires_grad_() for t in tensors]
    for t, want in zip(tensors, gradients(q, fresh), strict=True):
        assert t.grad is not None
        assert_same_bits("gradient", t.grad, want)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_few_tokens_by_the_table_of_pairs(tokens: int, dtype: torch.dtype) -> None:
    """At most twice the library's error in the same dtype, against fp64."""
    q = quantize_4bit((torch.randn(300, 1024) / 32).to(DEVICE))
    W = dequantize_4bit(q, (300, 1024), torch.float32).double()
    x, S, B, bias = (
        torch.randn(s, device=DEVICE).to(dtype)
        for s in ((tokens, 1024), (tokens, R), (300, R), (300,))
    )
    packing, how = Packing((300, 1024), "nf4", 64), Decision("pairs", "asked")
    y = multiply_few(x, q, packing, S, B, bias, "triton", how)
    want = x.double() @ W.T + S.double() @ B.double().T + bias.double()
    theirs = nn.functional.linear(x, W.to(dtype), bias) + S @ B.T
    assert_close("y", y, want, same_dtype=theirs)


def test_a_weight_with_gaps_is_quantised_as_its_copy() -> None:
    W = torch.randn(64, 256, device=DEVICE)[:, ::2]
    for got, want in zip(quantize_4bit(W), quantize_4bit(W.contiguous()), strict=True):
        assert got is not None
        assert want is not None
        assert_same_bits("bytes", got, want)


def test_a_decoding_step_as_a_graph() -> None:
    """An adapted NF4 model with a static cache: replayed tokens are those of `generate`."""
    pytest.importorskip("transformers")
    model = decoder().to(DEVICE)
    prompt = torch.tensor([[1, 2, 3]], device=DEVICE)
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    step, (ids, _) = static_step(model, prompt)
    tokens = [int(ids)]
    step()
    tokens.append(int(ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        graph.replay()
        tokens.append(int(ids))
    assert tokens == wanted[0, 3:].tolist()


def test_compiled_decoding_with_reduced_overhead() -> None:
    pytest.importorskip("transformers")
    model = decoder().to(DEVICE)
    prompt = torch.tensor([[1, 2, 3]], device=DEVICE)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **given)
    found = model.generate(prompt, cache_implementation="static", **given)
    assert torch.equal(found, wanted)


def test_a_weight_buffer_serves_every_layer_of_a_backward() -> None:
    """Layers of several shapes, twice: no product reads a weight that the next one wrote over."""
    shapes = [(64, 96), (96, 64), (64, 96), (96, 64)]
    packed = [quantize_4bit((torch.randn(s) / s[1] ** 0.5).to(DEVICE)) for s in shapes]
    x = torch.randn(33, 96, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, want = x, wide
    for q, (n, k) in zip(packed, shapes, strict=True):
        A, B = torch.randn(R, k, device=DEVICE), torch.randn(n, R, device=DEVICE) / 8
        y = nf4_lora_linear(y, q, (n, k), None, A, B, 0.5)
        W = dequantize_4bit(q, (n, k), torch.float32).double()
        want = want @ W.T + 0.5 * want @ A.double().T @ B.double().T
    y.sum().backward()
    want.sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert_close("dX", x.grad, wide.grad, floor=10 * FLOOR[torch.float32])


def test_compiled() -> None:
    q, tensors = factors(torch.bfloat16)
    again = [t.detach().clone().requires_grad_() for t in tensors]
    want = gradients(q, tensors)
    layer = torch.compile(lambda x, A, B: nf4_lora_linear(x, q, (N, K), None, A, B, 0.5))
    layer(*again).square().sum().backward()
    for t, b in zip(again, want, strict=True):
        assert t.grad is not None
        assert_close("gradient", t.grad, b.double(), floor=2 * FLOOR[torch.bfloat16])


def test_more_elements_than_31_bits_number() -> None:
    n = (1 << 31) + 4096
    if torch.cuda.get_device_properties(DEVICE).total_memory < 16 * n // 2:
        pytest.skip("needs 16 GiB")
    packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=DEVICE)
    q = Packed4bit(packed, torch.rand(n // 64, device=DEVICE), None, None)
    W = dequantize_4bit(q, (n,), torch.bfloat16)
    last = Packed4bit(packed[-2048:], q.absmax[-64:], None, None)
    assert_same_bits("tail", W[-4096:], dequantize_4bit(last, (4096,), torch.bfloat16))
