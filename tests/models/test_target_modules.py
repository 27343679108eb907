"""Which layers: the architectures' usual choice, all-linear, suffixes, patterns, layers."""

from __future__ import annotations

import peft
import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from tests.helpers.tiny_models import BUILDERS

NOT_ADAPTED = ("lm_head", "classifier", "score", "head", "router", "gate")


def adapted(model: nn.Module) -> list[str]:
    return [n for n, _ in adapted_modules(model)]


@pytest.mark.parametrize("name", BUILDERS)
def test_usual_choice_and_all_linear(name) -> None:
    usual = BUILDERS[name]()
    report = lp.attach(usual, lp.LoRA(r=2))
    chosen = set(adapted(usual))
    assert chosen
    assert report.trainable == sum(p.numel() for p in usual.parameters() if p.requires_grad)
    if name == "resnet":
        return  # no linear layer but the head
    every = BUILDERS[name]()
    lp.attach(every, lp.LoRA(r=2, target_modules="all-linear"))
    linear = set(adapted(every))
    if name != "convnext":  # their usual choice holds convolutions
        assert chosen <= linear
    assert not any(n.rpartition(".")[2] in NOT_ADAPTED for n in linear), linear


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "bloom", "t5", "bert", "vit"])
def test_usual_choice_is_pefts_where_it_has_one(name) -> None:
    ours, theirs = BUILDERS[name](), BUILDERS[name]()
    lp.attach(ours, lp.LoRA(r=2))
    try:
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2))
    except ValueError:
        pytest.skip("no row in peft's table")
    names = {
        n.removeprefix("base_model.model.")
        for n, m in wrapped.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert set(adapted(ours)) == names


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": ["0.self_attn.q_proj"]}, ["0.self_attn.q_proj"]),
        (
            {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
            ["1.mlp.up_proj", "1.mlp.down_proj"],
        ),
        ({"target_modules": "k_proj", "layers_to_transform": 1}, ["1.self_attn.k_proj"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": [0]}, ["0.self_attn.v_proj"]),
        (
            {
                "target_modules": "all-linear",
                "exclude_modules": ["mlp.gate_proj", "o_proj", "q_proj"],
                "layers_to_transform": 0,
            },
            ["0.self_attn.k_proj", "0.self_attn.v_proj", "0.mlp.up_proj", "0.mlp.down_proj"],
        ),
    ],
    ids=range(6),
)
def test_rules(arguments, want) -> None:
    model = BUILDERS["llama"]()
    lp.attach(model, lp.LoRA(r=2, **arguments))
    assert set(adapted(model)) == {f"model.layers.{n}" for n in want}


def test_patterns_of_rank_and_alpha() -> None:
    model = BUILDERS["llama"]()
    method = lp.LoRA(
        r=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
        alpha_pattern={"v_proj": 3.0},
    )
    lp.attach(model, method)
    ranks = {
        n: (a.tensors()["A"].shape[0], a.edit().terms[0].scaling)
        for n, m in adapted_modules(model)
        for a in adapters_of(m)
    }
    assert ranks["model.layers.0.self_attn.q_proj"] == (6, 8 / 6)
    assert ranks["model.layers.1.self_attn.q_proj"] == (4, 2.0)
    assert ranks["model.layers.1.self_attn.v_proj"] == (2, 1.5)


def test_an_unknown_architecture_lists_its_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)

    with pytest.raises(ValueError, match="encode"):
        lp.attach(Net(), lp.LoRA(r=2))


def test_bypassed_layers_are_left_out_and_named() -> None:
    model = BUILDERS["mamba"]()
    report = lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))
    assert any("dt_proj" in name for name, _ in report.skipped) or not any(
        "dt_proj" in n for n in adapted(model)
    )


def test_tied_weights_are_named() -> None:
    report = lp.attach(BUILDERS["gpt2"](), lp.LoRA(r=2))
    assert any({"lm_head.weight", "transformer.wte.weight"} <= set(group) for group in report.tied)


def test_report_counts_packed_weights_as_parameters() -> None:
    dense, packed = BUILDERS["llama"](), BUILDERS["llama"]()
    lp.attach(dense, lp.LoRA(r=2))
    report = lp.attach(packed, lp.LoRA(r=2), quantization=lp.Quantization("nf4", block_size=32))
    total = sum(p.numel() for p in dense.parameters())
    assert report.total == total
    assert report.percent == pytest.approx(100 * report.trainable / total)
    assert report.nbytes["quantised base"] < 0.75 * sum(
        m.weight.numel() for m in dense.modules() if isinstance(m, nn.Linear)
    )
    assert any(name == "lm_head" for name, _ in report.dense)
    assert {g.fused for g in report.groups} == {"fused; torch: cpu tensors"}


def test_a_root_that_is_one_layer() -> None:
    """``"all-linear"`` selects the layer itself; its reason is given if it is too narrow."""
    layer = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="= 2, got r = 4"):
        lp.attach(layer, lp.LoRA(r=4, target_modules="all-linear"))
    lp.attach(layer, lp.LoRA(r=2, target_modules="all-linear"))
    assert layer.peft.default.A.shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "target"), [("opt", "embed_positions"), ("bart", "embed_positions")]
)
def test_tables_of_positions_are_refused(name: str, target: str) -> None:
    """They look up other rows than they are given; an adapter would take the input for ids."""
    model = BUILDERS[name]()
    with pytest.raises(ValueError, match="computes more than rows of its weight"):
        lp.attach(model, lp.LoRA(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match="linear head"):
        lp.attach(model, lp.TrainableTokens([3], target_modules=[target]))
    lp.attach(model, lp.LoRA(r=2, target_modules=["q_proj"]), modules_to_save=[target])


@pytest.mark.parametrize("name", ["gemma", "bart"])
def test_scaled_tables_are_adapted(name: str) -> None:
    model = BUILDERS[name]()
    lp.attach(model, lp.LoRA(r=2, target_modules=["embed_tokens"]))
