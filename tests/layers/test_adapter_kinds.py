"""The four kinds of adapter: what each holds, when it acts, and the state it leaves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.adapters.placement import weights
from lightning_peft.adapters.placement.find import find_placements
from lightning_peft.layers.adapted import adapted_modules, adapters_of, is_adapted
from lightning_peft.layers.block import BlockAdapter
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import Method
from tests.helpers.compare import assert_same_bits

KINDS = {
    "edits": (lp.LoRA(r=2, target_modules=["0", "2"]), WeightAdapter),
    "blocks": (lp.BottleneckAdapter(target_modules=["0", "2"]), BlockAdapter),
    "prompts": (lp.PrefixTuning(2, target_modules=["attention"]), PromptAdapter),
    "trained_copies": (lp.BitFit(), CopyAdapter),
}


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return model


@pytest.mark.parametrize("slot", KINDS)
def test_an_adapter_acts_in_the_list_of_its_kind(slot: str) -> None:
    method, kind = KINDS[slot]
    model = net()
    lp.attach(model, method)
    adapted = [m for _, m in adapted_modules(model)]
    assert adapted
    for module in adapted:
        adapters = adapters_of(module)
        assert all(type(a) is kind for a in adapters)
        active = module._peft.active
        lists = {
            "edits": active.edits,
            "blocks": active.blocks,
            "prompts": active.prompts,
            "trained_copies": active.trained_copies,
        }
        assert lists.pop(slot) == adapters
        assert not any(lists.values())
    lp.set_adapter(model, None)
    assert not any(getattr(m._peft.active, slot) for m in adapted)
    lp.detach(model)
    assert not any(is_adapted(m) for m in model.modules())


@pytest.mark.parametrize("slot", KINDS)
def test_initial_tensors_are_those_of_attach(slot: str) -> None:
    method, _ = KINDS[slot]
    model = net()
    torch.manual_seed(3)
    lp.attach(model, method)
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            state = adapter.state_dict()
            initial = adapter.initial_tensors(3)
            assert set(initial) == set(state)
            for key, tensor in initial.items():
                assert_same_bits(key, state[key], tensor.detach())


def test_kinds_say_why_they_have_no_merged_form() -> None:
    reasons = {}
    for slot, (method, _) in KINDS.items():
        model = net()
        lp.attach(model, method)
        (_, module), *_ = adapted_modules(model)
        reasons[slot] = adapters_of(module)[0].why_not_mergeable()
    assert reasons.pop("edits") == reasons.pop("trained_copies") == ""
    assert "modules" in reasons["blocks"]
    assert "positions" in reasons["prompts"]


def test_a_layer_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ops: Counter[int] = Counter()
    stored: Counter[tuple[int, str]] = Counter()
    editable_ops, storage_of = weights.editable_ops, weights.storage_of

    def count_ops(module):
        ops[id(module)] += 1
        return editable_ops(module)

    def count_storage(module, name):
        stored[id(module), name] += 1
        return storage_of(module, name)

    monkeypatch.setattr(weights, "editable_ops", count_ops)
    monkeypatch.setattr(weights, "storage_of", count_storage)
    model = net()
    lp.attach(model, lp.LoRA(r=2, target_modules=["0", "2", "out_proj.weight"]))
    linear = [model.get_submodule(n) for n in ("0", "2")]
    assert all(ops[id(m)] == stored[id(m), "weight"] == 1 for m in linear)
    assert stored[id(model.attention), "out_proj.weight"] == 1
    assert max(ops.values()) == max(stored.values()) == 1


def test_a_method_is_of_one_of_the_four_kinds() -> None:
    @dataclass(frozen=True)
    class Other(Method):
        pass

    with pytest.raises(TypeError, match=r"Other: expected a WeightMethod, BlockMethod"):
        find_placements(Other(), net())
