"""Rows of a batch under different prompts and prefixes, and several prompts at once."""

from __future__ import annotations

import pytest
import torch

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import PrefixTuning, PromptTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.compare import assert_close
from tests.helpers.prompt_cases import METHODS, alone_and_mixed, built, logits, move, some


@pytest.mark.parametrize("method_name", ["prompt", "add", "mlp", "prefix"])
@pytest.mark.parametrize("name", some(["llama", "gpt2", "bloom", "t5"], "bloom"))
def test_rows(name: str, method_name: str) -> None:
    method = METHODS[method_name]
    alone, mixed = alone_and_mixed(name, {"a": method, "b": method}, ["b", "__base__", "a"])
    if name == "t5" and method_name == "prefix":
        assert_close("rows", mixed, alone, floor=1e-4)
    else:
        assert_close("rows", mixed, alone)


def test_rows_of_different_length_and_kind() -> None:
    methods: dict[str, SequenceMethod] = {
        "short": PromptTuning(n=2),
        "long": PromptTuning(n=5),
        "prefix": PrefixTuning(n=3),
    }
    for name in ("llama", "gpt2"):
        alone, mixed = alone_and_mixed(name, methods, ["long", "prefix", "short", "__base__"])
        assert_close(name, mixed, alone)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_rows_in_an_encoder(name: str) -> None:
    """A head reads the first position, where a row without a prompt has nothing."""
    method = PromptTuning(n=3)
    alone, mixed = alone_and_mixed(name, {"a": method, "b": method}, ["b", "a", "b"])
    assert_close("rows", mixed, alone)
    with pytest.raises(ValueError, match="one after the other"):
        alone_and_mixed(name, {"a": method}, ["a", "__base__"])


def test_positions_that_are_counted_from_the_ids() -> None:
    """RoBERTa counts positions behind its padding index, skipping padding."""
    with pytest.raises(ValueError, match="one after the other"):
        alone_and_mixed("roberta", {"a": PrefixTuning(n=3), "b": PrefixTuning(n=2)}, ["b", "a"])


def test_two_prompts_stand_in_the_order_named() -> None:
    """The adapter named last stands outermost, as every other kind does."""
    model, x = built("gpt2")
    for adapter in ("a", "b"):
        lp.attach(model, PromptTuning(n=2), adapter_name=adapter)
        move(model)
    tensors = trained_tensors(model)
    parts = [next(t for k, t in tensors.items() if f"peft.{a}." in k) for a in ("b", "a")]
    lp.set_adapter(model, ["a", "b"])
    y = logits(model, x).detach()
    one, _ = built("gpt2")
    lp.attach(one, PromptTuning(n=4))
    with torch.no_grad():
        next(p for p in one.parameters() if p.requires_grad).copy_(torch.cat(parts))
    assert_close("one long prompt", logits(one, x).detach(), y)
