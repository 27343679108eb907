"""Threads that serve one model: each computes with its own adapters."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.helpers.peft_exchange import randomise
from tests.helpers.tiny_models import BUILDERS

NAMES = ("a", "b", "c", "d")
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lp.LoRA(r=4),
    "prefix": lambda: lp.PrefixTuning(n=3),
    "prompt": lambda: lp.PromptTuning(n=3),
    "bottleneck": lambda: lp.BottleneckAdapter(),
    "copies": lambda: lp.NormTuning(),
}


def served(method: str, stored: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS["llama"]().eval()
    for i, name in enumerate(NAMES):
        lp.attach(
            model,
            METHODS[method](),
            adapter_name=name,
            quantization=lp.Quantization(stored) if stored and i == 0 else None,
        )
    lp.set_adapter(model, list(NAMES))
    randomise(model, std=0.3)
    lp.set_adapter(model, "a")
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def wrong_outputs(model: nn.Module, threads: int, forwards: int) -> int:
    """Forwards of all threads, each under another adapter, that differ from the one before."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (1, 6))
    expected = {}
    for name in (None, *NAMES):
        lp.set_adapter(model, name)
        expected[name] = logits(model, ids)
    lp.set_adapter(model, "a")
    assert len({tuple(t.flatten()[:4].tolist()) for t in expected.values()}) == len(expected)
    start = threading.Barrier(threads)

    def serve(number: int) -> int:
        start.wait()
        wrong = 0
        for i in range(forwards):
            name = (None, *NAMES)[(number + i) % 5]
            with lp.use_adapters(model, name):
                wrong += not torch.allclose(logits(model, ids), expected[name], atol=1e-5)
        wrong += not torch.allclose(logits(model, ids), expected["a"], atol=1e-5)
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(serve, range(threads)))


@pytest.mark.parametrize("stored", [None, "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_eight_threads(method: str, stored: str | None) -> None:
    assert wrong_outputs(served(method, stored), threads=8, forwards=10) == 0


@pytest.mark.parametrize("method", ["prompt", "bottleneck", "copies"])
def test_other_kinds_of_adapters(method: str) -> None:
    assert wrong_outputs(served(method, None), threads=4, forwards=10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_ten_thousand_forwards(method: str, stored: str | None) -> None:
    assert wrong_outputs(served(method, stored), threads=8, forwards=1250) == 0


class Readers(nn.Module):
    """Layers whose adapters put tensors on the module while it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, input_ids: Tensor) -> Any:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        y = self.attention(x, x, x, need_weights=False)[0]

        class Out:
            logits = self.rnn(x + y)[0]

        return Out


def test_modules_that_read_shadowed_weights() -> None:
    model = Readers().eval()
    for name in NAMES:
        lp.attach(model, lp.LoRA(r=2, target_modules=["attention", "rnn"]), adapter_name=name)
    lp.set_adapter(model, list(NAMES))
    randomise(model, std=0.3)
    assert wrong_outputs(model, threads=4, forwards=20) == 0


# ---- one thread


class Block(nn.Module):
    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.checkpointed = checkpointed

    def inner(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.inner(x)
        reentrant = self.checkpointed == "reentrant"
        found: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
        return found


def adapted(checkpointed: str = "") -> Block:
    model = Block(checkpointed)
    for name in NAMES[:2]:
        lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"), adapter_name=name)
    lp.set_adapter(model, list(NAMES[:2]))
    randomise(model, std=0.3)
    return model


def gradients(model: Block, names: Sequence[str], *, chosen: bool) -> dict[str, Tensor]:
    x = torch.ones(2, 8, requires_grad=True)
    if chosen:
        with lp.use_adapters(model, names):
            y = model(x)
    else:
        lp.set_adapter(model, names)
        y = model(x)
    y.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", ["", "plain", "reentrant"])
def test_backward_after_the_block(checkpointed: str) -> None:
    got = gradients(adapted(checkpointed), ["b"], chosen=True)
    want = gradients(adapted(), ["b"], chosen=False)
    assert {n for n in got if got[n].abs().sum()} == {n for n in want if want[n].abs().sum()}
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad)


def test_rows_inside_a_choice_and_a_choice_inside_rows() -> None:
    model, x = adapted(), torch.ones(2, 8)
    with lp.use_adapters(model, "a"):
        a = model(x)
        with lp.use_adapters(model, None):
            assert torch.equal(model(x), Block()(x))
        assert torch.equal(model(x), a)
        with lp.adapter_names(["a", "__base__"]):
            torch.testing.assert_close(model(x), torch.stack([a[0], Block()(x)[1]]))
        unknown = pytest.raises(ValueError, match=r"expected active adapters, one of \['a'\]")
        with unknown, lp.adapter_names(["a", "b"]):
            model(x)


def test_tasks_of_one_thread() -> None:
    model, x = adapted(), torch.ones(2, 8)
    expected = {}
    for name in NAMES[:2]:
        with lp.use_adapters(model, name):
            expected[name] = model(x)

    async def serve(name: str) -> bool:
        with lp.use_adapters(model, name):
            await asyncio.sleep(0)
            return torch.equal(model(x), expected[name])

    async def both() -> list[bool]:
        return await asyncio.gather(*(serve(n) for n in NAMES[:2] * 3))

    assert all(asyncio.run(both()))


def test_what_threads_cannot_choose() -> None:
    model, x = adapted(), torch.ones(2, 8)
    with pytest.raises(KeyError, match=r"use_adapters: expected one of \['a', 'b'\], got 'z'"):
        lp.use_adapters(model, "z")
    lp.set_adapter(model, "a")
    lp.merge(model)
    with lp.use_adapters(model, "b"), pytest.raises(RuntimeError, match=r"expected unmerged"):
        model(x)
    lp.unmerge(model)
    changed = Block()
    lp.attach(changed, lp.LoRA(r=2, target_modules="all-linear", init="pissa"))
    with lp.use_adapters(changed, None), pytest.raises(RuntimeError, match="leave the base alone"):
        changed(x)


def test_copies_and_pickles_have_their_own_state() -> None:
    model, x = adapted(), torch.ones(2, 8)
    with lp.use_adapters(model, "a"):
        want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with lp.use_adapters(other, "a"):
            assert torch.equal(other(x), want)
