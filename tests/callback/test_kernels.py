"""`PEFT(kernels=...)`: in force during a run, in every thread that computes, and not later."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from lightning_peft_kernels import current_backend, use_backend
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_peft import PEFT, LoRA, Quantization, attach
from lightning_peft.core.kernel_backend import keep_backend, release_backend
from tests.helpers.lightning_package import InPackage
from tests.helpers.nets import lora, module, trainer


class Recorded(InPackage):
    """Notes the backend in each hook of a step, or fails in one."""

    lightning_base = "Callback"

    def __init__(self, fail: bool = False) -> None:
        self.seen: set[str] = set()
        self.fail = fail

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.add(current_backend())

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.seen.add(current_backend())
        if self.fail:
            raise RuntimeError("a step that fails")


def leftovers(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "_kernel_backend" in vars(m)]


def test_a_run_requests_it_and_ends_it() -> None:
    model, recorded = module("setup"), Recorded()
    trainer(PEFT(lora(), kernels="torch"), recorded).fit(model)
    assert recorded.seen == {"torch"}
    assert current_backend() == "auto"
    assert leftovers(model) == []


def test_a_run_that_fails_ends_it_too() -> None:
    model, recorded = module("setup"), Recorded(fail=True)
    with pytest.raises(RuntimeError, match="a step that fails"):
        trainer(PEFT(lora(), kernels="torch"), recorded).fit(model)
    assert current_backend() == "auto"
    assert leftovers(model) == []


def test_auto_leaves_the_choice_to_the_caller() -> None:
    recorded = Recorded()
    with use_backend("torch"):
        trainer(PEFT(lora()), recorded).fit(module("setup"))
        assert current_backend() == "torch"
    assert recorded.seen == {"torch"}


def test_two_callbacks_agree_or_are_refused() -> None:
    first = PEFT(LoRA(r=2, target_modules="all-linear"), kernels="torch")
    same = PEFT(LoRA(r=2, target_modules="all-linear"), adapter_name="b", kernels="torch")
    trainer(first, same).fit(module("setup"))
    assert current_backend() == "auto"
    other = PEFT(LoRA(r=2, target_modules="all-linear"), adapter_name="c", kernels="triton")
    with pytest.raises(ValueError, match=r"one backend .* got \['torch', 'triton'\]"):
        trainer(first, other).fit(module("setup"))
    assert current_backend() == "auto"


@pytest.mark.parametrize("quantization", [None, Quantization("nf4", block_size=32)], ids=str)
def test_recomputation_in_another_thread(
    quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where autograd recomputes a block in the thread of the device."""
    from lightning_peft_kernels.lora import linear

    requested: list[str] = []
    prepare = linear.prepare

    def spy(*args: Any) -> Any:
        found = prepare(*args)
        requested.append(found[-1].backend)
        return found

    for target in ("lora.linear", "nf4.linear"):
        monkeypatch.setattr(f"lightning_peft_kernels.{target}.prepare", spy)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=quantization)
    keep_backend(model, "torch")
    x = torch.randn(2, 32, requires_grad=True)
    y: Tensor = checkpoint(model, x, use_reentrant=False)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None
    assert requested == ["torch"] * 4  # two layers, forward and recomputation
    release_backend(model)
    model(x)
    assert requested[4:] == ["auto"] * 2


def test_a_compiled_model_follows_the_run() -> None:
    """The kept backend guards the graph, so it is traced again after the run."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    attach(model, LoRA(r=2, target_modules="all-linear"))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = torch.randn(2, 8)
    keep_backend(model, "torch")
    with use_backend("torch"):
        first = compiled(x)
    release_backend(model)
    torch.testing.assert_close(compiled(x), first)
    assert len(graphs) == 2
