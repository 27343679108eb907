"""Rows under different adapters: every thread and task has its own mix, backward included."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    LoRA,
    Quantization,
    adapter_names,
    attach,
    set_adapter,
)
from lightning_peft.layers.mixed_batch import any_mixed_batch, current_mixed_batch

NAMES = ("a", "b", "c", "d")
WIDTH = 32


class Net(nn.Module):
    """Two layers, run under activation checkpointing if a way is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.repeat: Callable[..., Any] | None = None

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) if self.repeat is None else self.repeat(self.block, x)
        return y * y


def build(quantization: Quantization | None = None) -> Any:
    torch.manual_seed(0)
    model = Net()
    for name in NAMES:
        method = LoRA(r=2, target_modules="all-linear")
        attach(model, method, adapter_name=name, quantization=quantization)
        quantization = None
    set_adapter(model, list(NAMES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    return model


def once(block: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return checkpoint(block, x, use_reentrant=True)


def twice(block: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """Two checkpoints inside a checkpoint."""
    return once(lambda x: once(block, once(block, x)), x)


def reentrant_twice(block: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return reentrant(block, reentrant(block, x))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in another thread, which has no block of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    (value,) = found
    return value


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6, msg=name)


# ---- threads and tasks


@pytest.mark.parametrize(
    "quantization", [None, Quantization("nf4", block_size=32)], ids=["dense", "nf4"]
)
def test_four_threads_with_four_adapters(quantization: Quantization | None) -> None:
    """Each of 160 forwards equals the one that runs alone."""
    model = build(quantization)
    x = torch.randn(6, WIDTH)
    wanted = {}
    with torch.no_grad():
        for name in NAMES:
            set_adapter(model, name)
            wanted[name] = model(x)
    assert min((wanted[a] - wanted[b]).abs().max() for a in NAMES for b in NAMES if a < b) > 0.1
    set_adapter(model, list(NAMES))
    start, wrong, ran = threading.Barrier(4), [], []

    def serve(name: str) -> None:
        start.wait()
        for _ in range(40):
            with torch.no_grad(), adapter_names([name] * 6):
                y = model(x)
            ran.append(name)
            if not torch.allclose(y, wanted[name], rtol=1e-4, atol=1e-4):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 160
    assert wrong == []


@pytest.mark.parametrize("repeat", [None, once, reentrant])
def test_training_in_four_threads(repeat: Callable[..., Any] | None) -> None:
    """Gradients of the inputs, with backward after the block."""
    model = build()
    model.repeat = repeat
    x = torch.randn(3, WIDTH)

    def input_gradient(name: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        with adapter_names([name] * 3):
            loss = model(leaf).sum()
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    wanted = {name: input_gradient(name) for name in NAMES}
    start, wrong = threading.Barrier(4), []

    def train(name: str) -> None:
        start.wait()
        for _ in range(8):
            if not torch.allclose(input_gradient(name), wanted[name], rtol=1e-4, atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=train, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tasks_that_wait_inside_their_blocks() -> None:
    """Tasks of one thread take turns inside their blocks; each backward follows its block."""
    model = build()
    model.repeat = once
    x = torch.randn(2, WIDTH)

    async def work(names: list[str], turns: int) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with adapter_names(names):
            await asyncio.sleep(0)
            y = model(leaf)
            for _ in range(turns):
                await asyncio.sleep(0)
        y.sum().backward()
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    async def plain() -> Tensor:
        await asyncio.sleep(0)
        y: Tensor = model(x)
        return y.detach()

    async def together() -> Any:
        return await asyncio.gather(
            work(["a", "b"], 3), plain(), work(["c", "a"], 1), work(["d", "__base__"], 5)
        )

    wanted = [asyncio.run(work(names, 0)) for names in (["a", "b"], ["c", "a"], ["d", "__base__"])]
    alone = model(x).detach()
    first, without, second, third = asyncio.run(together())
    torch.testing.assert_close(without, alone)
    for (y, gradient), (want_y, want_gradient) in zip((first, second, third), wanted, strict=True):
        torch.testing.assert_close(y, want_y)
        torch.testing.assert_close(gradient, want_gradient)


# ---- backward


@pytest.mark.parametrize("where", ["inside", "after", "another thread", "inside another block"])
@pytest.mark.parametrize("repeat", [once, reentrant, twice])
def test_checkpoints_repeat_their_own_mix(repeat: Callable[..., Any], where: str) -> None:
    model, names = build(), ["a", "b", "__base__", "d"]
    x = torch.randn(4, WIDTH)

    def forward() -> Tensor:
        loss: Tensor = model(x.clone().requires_grad_()).sum()
        return loss

    model.repeat = (lambda block, x: block(block(x))) if repeat is twice else None
    with adapter_names(names):
        wanted = gradients(model, forward())
    model.repeat = repeat
    with adapter_names(names):
        loss = forward()
        if where == "inside":
            found = gradients(model, loss)
    if where == "after":
        found = gradients(model, loss)
    elif where == "another thread":
        found = in_thread(lambda: gradients(model, loss))
    elif where == "inside another block":
        with adapter_names(["c"] * 4):
            found = gradients(model, loss)
    assert_equal(found, wanted)


def test_nested_reentrant_checkpoints_inside_the_block() -> None:
    model, names = build(), ["a", "b", "__base__", "d"]
    x = torch.randn(4, WIDTH)
    model.repeat = lambda block, x: block(block(x))
    with adapter_names(names):
        wanted = gradients(model, model(x.clone().requires_grad_()).sum())
        model.repeat = lambda block, x: reentrant(
            lambda x: reentrant(block, reentrant(block, x)), x
        )
        found = gradients(model, model(x.clone().requires_grad_()).sum())
    assert_equal(found, wanted)


@pytest.mark.parametrize("repeat", [once, reentrant])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("inside", [False, True])
def test_one_backward_of_several_mixes(
    repeat: Callable[..., Any], order: tuple[int, ...], inside: bool
) -> None:
    """Two mixes and a forward without one, summed into one loss."""
    model = build()
    x = torch.randn(4, WIDTH)
    mixes = (["a", "b", "c", "d"], None, ["d", "d", "__base__", "a"])

    def loss() -> Tensor:
        losses = []
        for i in order:
            names = mixes[i]
            with nullcontext() if names is None else adapter_names(names):
                losses.append((i + 1) * model(x.clone().requires_grad_()).sum())
        return torch.stack(losses).sum()

    wanted = gradients(model, loss())
    model.repeat = repeat
    found = loss()
    with adapter_names(["c"] * 4) if inside else nullcontext():
        assert_equal(gradients(model, found), wanted)


def test_a_checkpointed_function_may_hold_the_block() -> None:
    model = build()
    x = torch.randn(4, WIDTH, requires_grad=True)

    def part(x: Tensor) -> Tensor:
        with adapter_names(["a", "b", "c", "d"]):
            y: Tensor = model.block(x)
        return y

    wanted = gradients(model, part(x).square().sum())
    for repeat in (once, reentrant):
        found = gradients(model, repeat(part, x).square().sum())
        assert_equal(found, wanted)
        with adapter_names(["d"] * 4):
            found = gradients(model, repeat(part, x).square().sum())
        assert_equal(found, wanted)


# ---- what autograd saves inside the block


def test_hooks_around_the_block_still_pack() -> None:
    model = build()
    model.repeat = once
    x = torch.randn(4, WIDTH, requires_grad=True)
    with adapter_names(list(NAMES)):
        wanted = gradients(model, model(x).sum())
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor)
        return (tensor.clone(),)

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0]),
        adapter_names(["c"] * 4),
        adapter_names(list(NAMES)),
    ):
        loss = model(x).sum()
    assert len(packed) > 0
    assert_equal(gradients(model, loss), wanted)


def test_an_in_place_change_of_a_saved_tensor_is_an_error() -> None:
    x = torch.randn(3, requires_grad=True)
    with adapter_names(["a"]):
        y = x.exp()
        y.add_(1)
    with pytest.raises(RuntimeError, match="in-place operation modified it"):
        y.sum().backward()


def test_nothing_is_kept() -> None:
    model = build()
    model.repeat = once
    with adapter_names(list(NAMES)):
        loss = model(torch.randn(4, WIDTH, requires_grad=True)).sum()
        batch = weakref.ref(current_mixed_batch())
    assert current_mixed_batch() is None
    assert batch() is not None  # until backward has read the tensors
    loss.backward(retain_graph=True)
    assert not any_mixed_batch()
    loss.backward()
    del loss
    gc.collect()
    assert batch() is None


def test_compiled_layers_see_the_mix_of_each_call() -> None:
    model = build()
    compiled: Any = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, WIDTH, requires_grad=True)
    plain = model(x)
    torch.testing.assert_close(compiled(x), plain)
    for names in (["a", "b", "c", "d"], ["d", "d", "__base__", "a"]):
        with adapter_names(names):
            wanted = model(x)
            found = compiled(x)
        torch.testing.assert_close(found, wanted)
        assert_equal(gradients(model, found.sum()), gradients(model, wanted.sum()))
        del wanted, found
        torch.testing.assert_close(in_thread(lambda: compiled(x)), plain)
    gc.collect()
    torch.testing.assert_close(compiled(x), plain)
