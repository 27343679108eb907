"""Promise 6: what a user forgot is said at the start, not at the load."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank_pattern": {"22": 2}}, "LoRA rank_pattern: '22' matches no adapted layer"),
        ({"alpha_pattern": {"^9": 2.0}}, "LoRA alpha_pattern: '^9' matches no adapted layer"),
        ({"exclude_modules": ["7"]}, "LoRA exclude_modules: '7' matches no module; nearest: "),
        ({"exclude_modules": ".*head"}, "LoRA exclude_modules: '.*head' matches no module"),
        ({"target_modules": ["0", "22"]}, "LoRA target_modules: '22' matches no module; nearest: "),
    ],
)
def test_names_that_match_nothing(fields: dict[str, Any], said: str) -> None:
    method = lp.LoRA(**{"r": 4, "target_modules": ["0", "2"], **fields})
    with pytest.warns(UserWarning, match=re.escape(said)):
        lp.attach(net(), method)


def test_names_that_match_are_silent() -> None:
    method = lp.LoRA(
        r=4,
        target_modules="all-linear",
        exclude_modules=["3"],
        rank_pattern={"0": 2},
        alpha_pattern={"2": 3.0},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.attach(net(), method)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_broken_expression_is_named(field: str) -> None:
    method = lp.LoRA(r=4, target_modules=["0"], **{field: {"(0": 2}})
    with pytest.raises(ValueError, match=rf"LoRA {field}: expected .*regular expression.*'\(0'"):
        lp.attach(net(), method)


def test_layers_narrower_than_the_rank_are_left_out_and_listed() -> None:
    report = lp.attach(net(), lp.LoRA(r=16, target_modules="all-linear"))
    assert [name for name, _ in report.skipped] == ["3"]
    assert "expected 1 <= r" in report.skipped[0][1]
    with pytest.raises(ValueError, match=r"'3'.*expected 1 <= r"):
        lp.attach(net(), lp.LoRA(r=16, target_modules=["0", "3"]))
    with pytest.raises(ValueError, match="expected 1 <= r"):  # nothing would be left
        lp.attach(nn.Sequential(nn.Linear(4, 4)), lp.LoRA(r=16, target_modules="all-linear"))


@pytest.mark.parametrize(
    "method",
    [
        lp.LoRA(r=16, target_modules="all-linear"),
        lp.OFT(r=3, block_size=0, target_modules="all-linear"),
        lp.TrainableTokens([99]),
    ],
)
def test_a_model_that_is_one_layer_is_called_the_model(method: lp.methods.Method) -> None:
    model = nn.Embedding(8, 8) if isinstance(method, lp.TrainableTokens) else nn.Linear(8, 8)
    with pytest.raises(ValueError, match=f"^{method.label} on the model: expected") as caught:
        lp.attach(model, method)
    assert "name other layers" not in str(caught.value)


class Linear(nn.Module):
    """A linear layer that is no `nn.Linear`, as graph libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_unknown_linear_layers_are_listed() -> None:
    report = lp.attach(
        nn.Sequential(Linear(), nn.Linear(8, 8)), lp.LoRA(r=2, target_modules="all-linear")
    )
    assert "no known kind of layer; register_layer adds one" in dict(report.skipped)["0"]


def test_lazy_layers_are_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"lazy ones \(0\.weight.*run one batch"):
        lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))
    model(torch.randn(2, 5))
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))


def test_a_quantisation_that_packs_nothing_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    said = "^quantization nf4: packed no layer of Sequential, which has Conv2d$"
    with pytest.warns(UserWarning, match=said):
        lp.attach(model, lp.LoRA(r=2, target_modules=["0", "1"]), quantization="nf4")


def test_an_unknown_architecture_is_offered_all_linear() -> None:
    with pytest.raises(ValueError, match='target_modules="all-linear"'):
        lp.attach(net(), lp.LoRA(r=4))


def test_a_model_with_layers_of_peft_inside_is_refused_by_that_name() -> None:
    import peft

    inside = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0"]))
    model = nn.Sequential(inside)
    with pytest.raises(ValueError, match=r"Hugging Face peft.*peft\.tuners.*load_adapter"):
        lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("model_type", ["chatglm", "RefinedWeb", "btlm", "rwkv7", "gemma4", "rwkv"])
def test_the_table_has_pefts_remaining_types(model_type: str) -> None:
    from lightning_peft.models.target_table import MODEL_TYPES

    assert MODEL_TYPES[model_type].lora


def test_a_method_whose_layers_are_all_trained_whole() -> None:
    said = "only 3; name other layers (0, 2 (Linear ×2)), or leave LoRA out and give modules_to"
    with pytest.raises(ValueError, match=re.escape(said)):
        lp.attach(net(), lp.LoRA(r=1, target_modules=["3"]), modules_to_save=["3"])


def test_a_model_whose_linear_layers_are_all_too_narrow() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "head": nn.Linear(8, 1)})
    with pytest.raises(ValueError, match=r"LoRA on 'head': .*; or name other layers: rnn \(LSTM"):
        lp.attach(model, lp.LoRA(r=4, target_modules="all-linear"))
