"""Promise 4: what is not a plain dense weight is never read as one.

Packed, scaled, sub-classed weights have a storage or are refused by name, before any change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_same_bits


def float8_linear() -> nn.Module:
    """Codes without scales: no storage knows what they stand for."""
    layer = nn.Linear(16, 16)
    codes = torch.randn(16, 16).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    return layer


def bit_linear() -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(16, 16)


def integer_linear() -> nn.Module:
    layer = nn.Linear(16, 16)
    weight = torch.randint(-128, 127, (16, 16), dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def scaled_linear() -> nn.Module:
    """A dense dtype, but the forward multiplies with a scale beside it."""
    layer = nn.Linear(16, 16)
    layer.register_buffer("weight_scale", torch.rand(16, 1))
    return layer


class Wrapped(Tensor):
    """A tensor subclass, as torchao's weights are."""


def subclassed_linear() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Wrapped))
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "float8": (float8_linear, "float8_e4m3fn"),
    "bitnet": (bit_linear, "scale"),
    "int8": (integer_linear, "int8"),
    "scaled": (scaled_linear, "weight_scale"),
    "subclass": (subclassed_linear, "Wrapped"),
}
METHODS: dict[str, Any] = {
    "LoRA": lp.LoRA(r=2, target_modules=["0"]),
    "all-linear": lp.LoRA(r=2, target_modules="all-linear"),
    "PiSSA": lp.LoRA(r=2, init="pissa", target_modules=["0"]),
    "DoRA": lp.DoRA(r=2, target_modules=["0"]),
    "IA3": lp.IA3(target_modules=["0"], feedforward_modules=[]),
    "Full": lp.Full(target_modules=["0"]),
}


def net(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(make(), nn.Linear(16, 16))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_refused_by_name_before_any_change(layer: str, method: str) -> None:
    make, format_name = LAYERS[layer]
    if method == "Full" and layer == "int8":
        pytest.skip("Full selects floating-point parameters only")
    model = net(make)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"'0'.*{format_name}.*exclude_modules"):
        lp.attach(model, METHODS[method])
    assert [type(m) for m in model.modules()] == classes
    for key, value in model.state_dict().items():
        assert_same_bits(key, value.view(torch.uint8), before[key].view(torch.uint8))


@pytest.mark.parametrize("layer", LAYERS)
def test_it_may_stay_frozen_beside_adapters(layer: str) -> None:
    make, format_name = LAYERS[layer]
    model = net(make)
    weight = model[0]._parameters["weight"]
    report = lp.attach(model, lp.LoRA(r=2, target_modules=["1"]), quantization="nf4")
    assert model[0]._parameters["weight"] is weight
    assert model[1]._parameters["weight"].dtype == torch.uint8
    assert any(
        name == "0" and ("already" in why or format_name in why) for name, why in report.dense
    )
    lp.merge(model)
    assert model[0]._parameters["weight"] is weight


def test_the_advice_works() -> None:
    model = net(integer_linear)
    method = lp.LoRA(r=2, target_modules="all-linear", exclude_modules=["0"])
    lp.attach(model, method)
    assert "peft" in dict(model[1].named_children())
