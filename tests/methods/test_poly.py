"""Poly: peft's outputs and gradients; task ids in generation, checkpointing and mixed batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, randomise

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc1"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bart": ["q_proj", "fc2"],
    "distilbert": ["q_lin", "lin2"],
}
FIELDS = {"r": 2, "n_tasks": 3, "n_skills": 4}


def output(model: nn.Module, inputs: Any, **kwargs: Any) -> Tensor:
    torch.manual_seed(4)
    found = model(**inputs, **kwargs)
    return next(v for v in found.values() if torch.is_tensor(v) and v.ndim > 1)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("splits", [1, 2])
def test_exchange_and_gradients(name: str, splits: int, tmp_path: Path) -> None:
    base, inputs = build(name)
    targets = [t for t in TARGETS[name] if any(n.endswith(t) for n, _ in base.named_modules())]
    config = {**FIELDS, "n_splits": splits, "target_modules": targets}
    theirs = by_peft(base, tmp_path / "theirs", peft.PolyConfig, **config)
    ours = loaded(base, tmp_path / "theirs")
    rows = len(next(iter(inputs.values())))
    tasks = torch.arange(rows) % 3
    for training in (False, True):
        want = output(theirs.train(training).base_model, inputs, task_ids=tasks)
        with lp.task_ids(tasks):
            got = output(ours.train(training), inputs)
        assert_close("output", got, want, floor=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()  # after the block
    (want * weight).sum().backward()
    other = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    names = {"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"}
    assert grads
    for n, grad in grads.items():
        layer, _, leaf = n.partition(".peft.default.")
        assert_close(n, grad, other[f"base_model.model.{layer}.{names[leaf]}"], floor=1e-5)
    lp.save_adapter(ours, tmp_path / "ours")
    again = in_peft(base, tmp_path / "ours")
    want = output(theirs.eval().base_model, inputs, task_ids=tasks)
    assert_close("ours in peft", output(again.base_model, inputs, task_ids=tasks), want, floor=1e-5)


class Net(nn.Module):
    """Two layers, the second under activation checkpointing if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.repeats = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.repeats:
            y: Tensor = checkpoint(self.second, h, use_reentrant=False)
            return y
        return self.second(h)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    lp.attach(model, lp.Poly(r=2, tasks=3, target_modules=["first", "second"]))
    randomise(model, std=0.5)
    return model.eval()


def test_two_batches_before_their_backward_under_checkpointing() -> None:
    x = torch.randn(2, 5, 8)
    found = []
    for repeats in (False, True):
        model = net()
        model.repeats = repeats
        with lp.task_ids([0, 1]):
            one = model(x)
        with lp.task_ids([2, 2]):
            two = model(x)
        one.square().sum().backward()
        two.sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_each_row_is_under_its_own_task() -> None:
    model, x = net(), torch.randn(3, 5, 8)
    with lp.task_ids([2, 0, 1]):
        together = model(x)
        flat = model(x.reshape(15, 8)).reshape(3, 5, 8)
    torch.testing.assert_close(flat, together)
    for row, task in enumerate([2, 0, 1]):
        with lp.task_ids([task]):
            torch.testing.assert_close(model(x[row : row + 1])[0], together[row])
    assert not torch.allclose(together[0], together[1])
    lp.attach(model, lp.Poly(r=2, tasks=3, target_modules=["first"]), adapter_name="other")
    lp.set_adapter(model, ["default", "other"])
    with lp.task_ids([2, 0, 1]), lp.adapter_names(["other", "default", "__base__"]):
        mixed = model.eval()(x)
    torch.testing.assert_close(mixed[1], together[1])
    with lp.disable_adapters(model):
        torch.testing.assert_close(mixed[2], model(x)[2])


def test_beams_keep_the_task_of_their_sample() -> None:
    base, _ = build("llama")
    model = copy.deepcopy(base).eval()
    lp.attach(model, lp.Poly(r=2, tasks=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise(model, std=0.6)
    ids = torch.randint(3, 90, (2, 5))
    how: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    with lp.task_ids([1, 0]):
        both = model.generate(ids, attention_mask=mask, **how)
    for row, task in enumerate([1, 0]):
        with lp.task_ids([task]):
            alone = model.generate(ids[row : row + 1], attention_mask=mask[:1], **how)
        n = min(both.shape[1], alone.shape[1])
        assert torch.equal(both[row, :n], alone[0, :n])


def test_refused() -> None:
    model, x = net(), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match=r"run the model inside `with lightning_peft.task_ids"):
        model(x)
    with lp.task_ids([0, 3]), pytest.raises(ValueError, match="task ids below 3, got 3"):
        model(x)
    with lp.task_ids([0, 1, 2]), pytest.raises(RuntimeError, match="got 3 for a batch of 2 rows"):
        model(x)
    for ids in ([-1], [], [[0]], [0.5]):
        with pytest.raises(ValueError, match="expected one number per sample"):
            lp.task_ids(ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="splits that divide"):
        lp.attach(net(), lp.Poly(splits=3, target_modules=["first"]), adapter_name="b")
    with pytest.raises(RuntimeError, match="depends on the input"):
        lp.merge(model)
