"""The requested backend: per thread and block, carried into backward, recomputation and graphs."""

import threading

import pytest
import torch
from functorch.compile import make_boxed_func
from lightning_peft_kernels import (
    checkpoint_contexts,
    current_backend,
    dispatch,
    lora_linear,
    nf4_lora_linear,
    quantize_4bit,
    seeded_dropout,
    use_backend,
)
from lightning_peft_kernels.dropout import ops as dropout_ops
from lightning_peft_kernels.lora import selection as lora_selection
from lightning_peft_kernels.nf4 import linear
from lightning_peft_kernels.nf4 import selection as nf4_selection
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

N, K, R = 16, 32, 4


@pytest.fixture
def seen(monkeypatch):
    """(op, requested backend) of every selection."""
    found = []
    select = dispatch.select

    def spy(op, device, dtype, backend=None, detail=""):
        found.append((op, backend or current_backend()))
        return select(op, device, dtype, backend, detail)

    select_product = nf4_selection.select_product

    def spy_on_products(device, dtype, tokens, shape, backend=None, *more, **options):
        found.append(("product", backend or current_backend()))
        return select_product(device, dtype, tokens, shape, backend, *more, **options)

    for module in (dispatch, nf4_selection, lora_selection):
        monkeypatch.setattr(module, "select", spy)
    monkeypatch.setattr(linear, "select_product", spy_on_products)
    return found


def in_thread(function):
    """Run in a thread of its own, as autograd does on a GPU."""
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def leaves():
    shapes = ((3, K), (R, K), (N, R))
    return [torch.randn(s, requires_grad=True) for s in shapes]


Q = quantize_4bit(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))


def packed(x, A, B):
    return nf4_lora_linear(x, Q, (N, K), None, A, B, 0.5)


def dense(x, A, B):
    return lora_linear(x, torch.eye(N, K), None, A, B, 0.5)


def test_a_block_ends_and_nests():
    assert current_backend() == "auto"
    torch_only = use_backend("torch")
    with torch_only:
        with use_backend("auto"), torch_only:
            assert current_backend() == "torch"
        assert current_backend() == "torch"
    with pytest.raises(KeyError), torch_only:
        raise KeyError
    assert current_backend() == "auto"


def test_threads_have_their_own():
    both = threading.Barrier(2, timeout=30)
    found = {}

    def run(name):
        with use_backend(name):
            both.wait()
            found[name] = current_backend()
            both.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("torch", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"torch": "torch", "triton": "triton"}
    assert current_backend() == "auto"


@pytest.mark.parametrize("layer", [packed, dense])
def test_backward_in_another_thread_uses_the_choice_of_forward(layer, seen):
    tensors = leaves()
    with use_backend("torch"):
        y = layer(*tensors)
    seen.clear()
    in_thread(lambda: y.sum().backward())
    assert {op for op, _ in seen} >= {"rank_gradients"}
    assert {backend for _, backend in seen} == {"torch"}


def test_backward_of_dropout_uses_the_choice_of_forward(monkeypatch):
    x, seed = torch.randn(3, 8, requires_grad=True), torch.tensor([3])
    with use_backend("torch"):
        y = seeded_dropout(x, seed, 0.5)
    requested = []

    def spy(x, seed, p, *, backend):
        requested.append(backend)
        return seeded_dropout(x, seed, p, backend=backend)

    monkeypatch.setattr(dropout_ops, "seeded_dropout", spy)
    y.sum().backward()
    assert requested == ["torch"]


@pytest.mark.parametrize("carried", [True, False])
def test_recomputation_of_a_checkpoint(carried, seen):
    tensors = leaves()
    more = {"context_fn": checkpoint_contexts} if carried else {}
    with use_backend("torch"):
        y = checkpoint(packed, *tensors, use_reentrant=False, **more)
    seen.clear()
    in_thread(lambda: y.sum().backward())
    # The backward of the layer keeps the choice of forward in either case.
    assert {backend for _, backend in seen} == ({"torch"} if carried else {"torch", "auto"})


def test_a_checkpoint_may_be_recomputed_twice(seen):
    tensors = leaves()
    with use_backend("torch"):
        y = checkpoint(packed, *tensors, use_reentrant=False, context_fn=checkpoint_contexts)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert {backend for _, backend in seen} == {"torch"}


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_compiled_graph_holds_the_backend_it_was_traced_with(backend):
    """Forward and backward pass it to their ops, so they do not depend on the context later."""
    torch._dynamo.reset()
    found = []

    def capture(graph, inputs):
        calls = [n for n in graph.graph.nodes if "lightning_peft" in str(n.target)]
        found.append([n.args[-1] if n.args[-1] == "torch" else "auto" for n in calls])
        return make_boxed_func(graph.forward)

    traced = aot_autograd(fw_compiler=capture, bw_compiler=capture)
    compiled = torch.compile(packed, fullgraph=True, backend=traced)
    tensors = leaves()
    with use_backend(backend):
        y, want = compiled(*tensors), packed(*tensors)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    forward, backward = found
    assert set(forward) == set(backward) == {backend}
