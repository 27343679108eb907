"""AdaLoRA's schedule against peft's, step by step."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods.base import StepContext
from tests.helpers.compare import assert_close

STEPS = 100


class Net(nn.Module):
    """Two layers and a loss in the output, where peft's AdaLoRA looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 10)
        self.two = nn.Linear(10, 6)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.two(torch.tanh(self.one(x))) - y).square().mean())


def entries(model: nn.Module):
    return [
        (a.site, a.tensors()) for _, module in adapted_modules(model) for a in adapters_of(module)
    ]


def test_budget_and_masks_follow_pefts() -> None:
    torch.manual_seed(0)
    base = Net()
    # alpha / init_r = 1; both start from the same triplets.
    method = lp.AdaLoRA(
        init_r=6, target_r=2, alpha=6.0, tinit=3, tfinal=5, deltaT=2, target_modules=["one", "two"]
    )
    ours = copy.deepcopy(base)
    lp.attach(ours, method)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=6, tinit=3, tfinal=5, deltaT=2, total_step=STEPS,
        target_modules=["one", "two"],
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model
    with torch.no_grad():
        for name, (_, p) in zip(("one", "two"), entries(ours), strict=True):
            layer = getattr(theirs.model, name)
            layer.lora_A["default"].copy_(p["A"])
            layer.lora_B["default"].copy_(p["B"])
            layer.lora_E["default"].copy_(p["E"][:, None])
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5)
        for m in (ours, theirs)
    ]
    left = []
    for step in range(1, STEPS + 1):
        x, y = torch.randn(32, 12), torch.randn(32, 6)
        optimizers[0].zero_grad()
        ctx = StepContext(step, STEPS, entries(ours))
        (ours(x, y).loss + method.penalty(ctx)).backward()
        optimizers[0].step()
        with torch.no_grad():
            method.after_step(ctx)
        optimizers[1].zero_grad()
        theirs(x, y).loss.backward()
        optimizers[1].step()
        theirs.update_and_allocate(step)
        for name, (_, p) in zip(("one", "two"), entries(ours), strict=True):
            layer = getattr(theirs.model, name)
            if step < STEPS - 5:  # afterwards peft cuts the pruned triplets off
                assert_close(f"step {step}: E", p["E"], layer.lora_E["default"][:, 0], floor=1e-4)
                assert_close(f"step {step}: A", p["A"], layer.lora_A["default"], floor=1e-4)
        left.append(int(sum(p["mask"].sum() for _, p in entries(ours))))
        want = theirs(x, y).loss.detach() - _extra(theirs, x, y)
        assert_close(f"step {step}: loss", ours(x, y).loss.detach(), want, floor=1e-3)
    assert left[:3] == [12, 12, 12]
    assert left[-1] == 4
    assert left == sorted(left, reverse=True)


def _extra(theirs, x: Tensor, y: Tensor) -> Tensor:
    """Their orthogonality term, which is in their loss."""
    with torch.no_grad():
        return theirs(x, y).loss - theirs.model(x, y).loss


def test_the_term_is_pefts() -> None:
    torch.manual_seed(1)
    base = Net()
    method = lp.AdaLoRA(init_r=4, target_r=2, target_modules=["one", "two"])
    ours = copy.deepcopy(base)
    lp.attach(ours, method)
    config = peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["one", "two"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model
    with torch.no_grad():
        for name, (_, p) in zip(("one", "two"), entries(ours), strict=True):
            getattr(theirs.model, name).lora_A["default"].copy_(p["A"])
            getattr(theirs.model, name).lora_B["default"].copy_(p["B"])
    x, y = torch.randn(3, 12), torch.randn(3, 6)
    penalty = method.penalty(StepContext(0, None, entries(ours)))
    assert_close("term", penalty.detach(), _extra(theirs, x, y))


def test_a_run_without_an_end_is_refused() -> None:
    model = Net()
    method = lp.AdaLoRA(init_r=4, target_r=2, target_modules=["one"])
    lp.attach(model, method)
    with pytest.raises(ValueError, match="set total_step"):
        method.after_step(StepContext(1, None, entries(model)))


def test_equal_ranks_prune_nothing() -> None:
    model = Net()
    method = lp.AdaLoRA(init_r=4, target_r=4, target_modules=["one", "two"])
    lp.attach(model, method)
    model(torch.randn(4, 12), torch.randn(4, 6)).loss.backward()
    with torch.no_grad():
        method.after_step(StepContext(5, 5, entries(model)))
    assert all(p["mask"].all() for _, p in entries(model))
