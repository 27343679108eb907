"""The plan trains as many numbers as attaching does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from tests.helpers.method_rows import ROWS, placed

CONFIG = LlamaConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
NAMES = [n for n, r in ROWS.items() if "decoder" not in r.skip and not isinstance(r.method, list)]
QUICK = ("mica", "tinylora", "osf", "lily", "cartridge")


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_trained_numbers(name: str, base: Any) -> None:
    method = placed(ROWS[name].method, "decoder")
    model = copy.deepcopy(base)
    lp.attach(model, method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = lp.estimate_memory(CONFIG, method, batch_size=1, sequence_length=8)
    assert plan.trainable == trained
