"""Values of a wrong type are refused in words, before anything is done with them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin

import lightning.pytorch as pl
import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.core.value_types import argument_types, describe, fits
from lightning_peft.methods.registry import METHODS

#: Values of every kind that people write by mistake.
VALUES = (object(), "zzz", 5, -3.5, True, ["a"], [1], {"a": 1}, {"a": object()}, None, [None])
#: Arguments without a default.
NEEDED = {"TrainableTokens": {"token_indices": [1]}, "ALoRA": {"invocation_tokens": [1]}}


def refusal(cls: Any, given: dict[str, Any]) -> str | None:
    """What a constructor says against its arguments; None if it takes them."""
    try:
        cls(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_argument_of_every_method(name: str) -> None:
    cls: Any = METHODS[name]
    types = argument_types(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        for value in VALUES:
            given = {**NEEDED.get(name, {}), field.name: value}
            message = refusal(cls, given)
            if message is not None:
                assert "expected" in message, (field.name, value)
                continue
            annotation = types[field.name]
            assert fits(value, annotation), (field.name, value)
            if get_origin(annotation) is Literal:
                assert value in get_args(annotation), (field.name, value)


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "words"),
    [
        (str | list[str] | None, ("a", ["a"], {"a"}, None), (1, [1], {"a": 1}), "a string, a list"),
        (dict[str, int], ({"a": 1}, {}), ([], {"a": "1"}, {"a": True}), "whole numbers by name"),
        (dict[str, list[int]], ({"a": [1]},), ({"a": 1},), "lists of whole numbers by name"),
        (bool, (True,), (1, "no", None), "True or False"),
        (float, (1, 0.5), (True, "1"), "a number"),
        (Literal["a", 1], ("b", 2), (1.0, None), "one of 'a', 1"),
        (tuple[int, ...] | list[int], ((1,), [1], ()), ("1", 1), "a list of whole numbers"),
    ],
)
def test_what_fits(annotation: Any, good: Any, bad: Any, words: str) -> None:
    assert all(fits(value, annotation) for value in good)
    assert not any(fits(value, annotation) for value in bad)
    assert words in describe(annotation)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"adapter_name": 3}, "adapter_name: expected a string, got 3"),
        ({"adapter_name": "__base__"}, "rows without an adapter"),
        ({"adapter_name": "../a"}, "expected letters, digits"),
        ({"root": 3}, "root: expected a string or None, got 3"),
        ({"optimizer": "adamw8bit"}, "did you mean 'adamw_8bit'"),
        ({"optimizer": nn.Linear}, "optimizer: expected a string or None"),
        ({"modules_to_save": "head"}, r"got 'head'; write \['head'\]"),
        ({"modules_to_save": 5}, "modules_to_save: expected a list of strings or None, got 5"),
        ({"report": "no"}, "report: expected True or False, got 'no'"),
        ({"plan": 3}, "plan: expected True or False or values by name, got 3"),
        ({"plan": {"memry": 1}}, "plan: .* got 'memry'; did you mean 'memory'"),
        ({"plan": {"memory": "lots"}}, "PEFT plan memory: .* such as '24GB' or '22.5GiB', got 'lo"),
        (
            {"plan": {"batch_size": "4"}},
            "plan batch_size: .* got '4'; write plan={'batch_size': 1}",
        ),
    ],
)
def test_arguments_of_the_callback(given: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        lp.PEFT(lp.LoRA(r=2), **given)


MODEL = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lp.PEFT(MODEL),
        lambda: lp.PEFT(adapters={"a": MODEL}),
        lambda: lp.PEFT(lp.LoRA(), quantization=MODEL),
        lambda: lp.PEFT(lp.LoRA(), export_to=MODEL),
        lambda: lp.attach(MODEL, MODEL),
        lambda: lp.attach([MODEL], lp.LoRA()),
        lambda: lp.attach(MODEL, lp.LoRA(), adapter_name=MODEL),
        lambda: lp.quantize(MODEL, MODEL),
        lambda: lp.estimate_memory(MODEL, [MODEL]),
        lambda: lp.estimate_memory(MODEL, lp.LoRA(), batch_size=MODEL),
        lambda: lp.export_merged(MODEL, "base", "out"),
        lambda: lp.export_merged("adapter", "base", "out", MODEL),
        lambda: lp.load_adapter(nn.Linear(8, 8), MODEL),
        lambda: lp.load_from_checkpoint(pl.LightningModule, MODEL),
    ],
)
def test_a_model_in_the_wrong_place_does_not_fill_the_message(call: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="expected") as caught:
        call()
    assert any(word in str(caught.value) for word in ("Sequential", "bfloat16", "list"))
    assert "(0): Linear" not in str(caught.value)


def test_no_method_at_all() -> None:
    with pytest.raises(ValueError, match="expected one of method and adapters"):
        lp.PEFT([])


def test_an_export_that_cannot_succeed_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(ValueError, match="methods that peft has too, got BitFit"):
        lp.PEFT(lp.BitFit(), export_to=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a directory, got the file"):
        lp.PEFT(lp.LoRA(), export_to=tmp_path / "file")


def test_arguments_of_quantization() -> None:
    with pytest.raises(TypeError, match=r"exclude_modules: .*got 'head'; write \['head'\]"):
        lp.Quantization("nf4", exclude_modules="head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="double_quant: expected True or False, got 'no'"):
        lp.Quantization("nf4", double_quant="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [None, "adapter", nn.Linear])
@pytest.mark.parametrize(
    "call",
    [
        lp.merge,
        lp.merge_and_unload,
        lp.detach,
        lp.adapter_state_dict,
        lp.parameter_report,
        lambda model: lp.attach(model, lp.LoRA()),
        lambda model: lp.quantize(model, "nf4"),
        lambda model: lp.set_adapter(model, "a"),
        lambda model: lp.save_adapter(model, "no"),
        lambda model: lp.load_adapter(model, "no"),
        lambda model: lp.save_checkpoint(model, "no.ckpt"),
        lambda model: lp.load_checkpoint(model, "no.ckpt"),
    ],
)
def test_something_else_than_a_model(call: Any, given: Any) -> None:
    with pytest.raises((TypeError, FileNotFoundError), match="expected"):
        call(given)
