"""merge's report and its choices, on packed bases and on tied weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, randomise, run

NF4 = lp.Quantization("nf4", block_size=32)


def qlora(name: str = "llama"):
    base, inputs = build(name)
    model = copy.deepcopy(base)
    lp.attach(model, lp.LoRA(r=4, target_modules="all-linear"), quantization=NF4)
    randomise(model, std=0.1)
    return base, model, inputs


def test_into_dense_says_what_it_changed() -> None:
    _, model, inputs = qlora()
    want = run(model, inputs)
    report = lp.merge(model, batch=inputs)
    assert_close("merged", run(model, inputs), want, floor=1e-5)
    assert len(report.sites) == 14
    assert report.worst < 1e-6
    assert report.output_error < 1e-5
    assert report.output_change > 0.01
    assert all(0.01 < site.delta < 10 for site in report.sites)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer._parameters["weight"].dtype == torch.float32
    lp.unmerge(model)
    assert layer._parameters["weight"].dtype == torch.uint8
    assert_same_bits("unmerged", run(model, inputs), want)
    assert str(report).startswith("merged 14 weights")


def test_into_storage_requantises_and_counts_the_loss() -> None:
    _, model, inputs = qlora()
    want, before = run(model, inputs), copy.deepcopy(model.state_dict())
    report = lp.merge(model, into="storage", batch=inputs)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer._parameters["weight"].dtype == torch.uint8
    assert 0.01 < report.worst < 0.2  # NF4 loses about 9 % of random weights
    got = run(model, inputs)
    error = float((got - want).norm() / want.norm())
    assert report.output_error == pytest.approx(error, rel=1e-3)
    lp.unmerge(model)
    for key, value in model.state_dict().items():
        assert_same_bits(key, value, before[key])


def test_onto_the_original_base_is_compared_with_the_dequantised() -> None:
    base, model, inputs = qlora()
    report = lp.merge(model, base=base.state_dict(), batch=inputs)
    assert set(report.output_errors) == {"dequantized", "original"}
    assert report.better_base == "dequantized"  # nothing was trained against the original
    merged = model.get_submodule("model.layers.0.mlp.up_proj").weight
    original = base.get_submodule("model.layers.0.mlp.up_proj").weight
    adapter = model.get_submodule("model.layers.0.mlp.up_proj").peft["default"]
    delta = adapter.edit().terms[0].matrix()
    assert_close("W0 + BA", merged.detach(), (original + delta).detach(), floor=1e-5)


def test_tied_weights_are_untied_and_named() -> None:
    base, inputs = build("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    lp.attach(base, lp.LoRA(r=4, target_modules=["wte", "c_attn"]))
    randomise(base)
    want = run(base, inputs)
    report = lp.merge(base)
    assert_close("merged", run(base, inputs), want, floor=1e-5)
    assert report.untied
    assert base.lm_head.weight is not base.transformer.wte.weight
    lp.unmerge(base)
    assert base.lm_head.weight is base.transformer.wte._parameters["weight"]


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    base, _ = build("llama")
    lp.attach(base, lp.LoRA(r=4))
    randomise(base)
    with torch.no_grad():
        base.get_submodule("model.layers.1.self_attn.v_proj").peft["default"].A[0, 0] = torch.nan
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.v_proj"):
        lp.merge(base)
    for key, value in base.state_dict().items():
        if "peft" not in key:
            assert_same_bits(key, value, before[key])
    with pytest.raises(ValueError, match="'dense' or 'storage'"):
        lp.merge(base, into="disk")
    with pytest.raises(KeyError, match="other"):
        lp.merge(base, "other")


def test_half_precision_bases_are_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    lp.attach(model, lp.LoRA(r=8, target_modules=["0"]))
    randomise(model)
    W = model[0]._parameters["weight"].double()
    adapter = model[0].peft["default"]
    want = W + adapter.B.double() @ adapter.A.double()
    lp.merge(model)
    assert torch.equal(model[0].weight, want.to(torch.bfloat16).detach())


@pytest.mark.parametrize("into", ["storage", "dense"])
def test_a_copy_of_a_merged_model_is_unmerged_on_its_own(into: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[1].weight = model[0].weight  # tied
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]), adapter_name="a")
    lp.attach(model, lp.BitFit(), adapter_name="b")
    lp.set_adapter(model, ["a", "b"])
    randomise(model)
    x = torch.randn(3, 8)
    attached = model(x)
    lp.merge(model, into=into)
    merged = model(x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    lp.unmerge(copied)
    assert_same_bits("the copy", copied(x), attached)
    assert copied[1].weight is copied[0]._parameters["weight"]
    assert_same_bits("the model", model(x), merged)
    assert_close("merged", merged, attached, floor=1e-6)
    lp.unmerge(model)
    assert_same_bits("the model", model(x), attached)


class MaskedLinear(nn.Linear):
    """As in masked autoregressive nets; counts its calls."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.mask * self.weight, self.bias)


class StandardizedConv(nn.Conv2d):
    """As in ResNet-v2 and normaliser-free nets."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias)


class OtherCode(nn.Linear):
    """Computes what `nn.Linear` does, by other code."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class TwoInputs(nn.Linear):
    """Takes what the comparison does not know."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (MaskedLinear, True),
        (lambda: StandardizedConv(3, 8, 3), True),
        (lambda: OtherCode(8, 8), False),
    ],
)
def test_layers_with_a_forward_of_their_own(
    layer: Callable[[], nn.Module], refused: bool, quantization: str | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer()).eval()
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]), quantization=quantization)
    with torch.no_grad():
        for t in lp.adapter_state_dict(model).values():
            t.normal_()
    x = torch.randn(2, 3, 5, 5) if isinstance(model[0], nn.Conv2d) else torch.randn(2, 8)
    before, state = model(x), copy.deepcopy(model.state_dict())
    if refused:
        with pytest.raises(RuntimeError, match=r"merge '0': .*forward computes more than the prod"):
            lp.merge(model)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    else:
        lp.merge(model)
    torch.testing.assert_close(model(x), before)


def test_a_forward_with_other_inputs_is_not_compared() -> None:
    model = nn.Sequential(TwoInputs(8, 8))
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    assert "not compared: 0" in str(lp.merge(model))
