"""The report's words on kernels: the decision that was made, and its reason."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels import use_backend
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.launch import FAILURES
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.base import Method
from tests.helpers.dispatch import group_projections
from tests.helpers.fake_gpu import GPUS
from tests.helpers.peft_exchange import build
from tests.helpers.tiny_models import BUILDERS

NF4 = lp.Quantization("nf4", block_size=32)


def words(model: nn.Module, method: Method, quantization: lp.Quantization | None) -> set[str]:
    return {g.fused for g in lp.attach(model, method, quantization=quantization).groups}


@pytest.mark.parametrize(
    ("method", "quantization", "want"),
    [
        (lp.LoRA(r=2), None, "fused"),
        (lp.LoRA(r=2), NF4, "fused; torch: cpu tensors"),
        (lp.DoRA(r=2), NF4, "fused; torch: cpu tensors"),
        (lp.IA3(), NF4, "4-bit: no fused kernel for"),
        (lp.OFT(block_size=4), None, "dense: no fused kernel for ['rotation']"),
        (
            lp.LoRA(r=2),
            lp.Quantization("nf4", block_size=32, compute="fp8"),
            "fused; fp8: no e4m3 products on cpu: multiplied in the dtype of x",
        ),
    ],
    ids=str,
)
def test_words(method: Method, quantization: lp.Quantization | None, want: str) -> None:
    found = words(BUILDERS["llama"](), method, quantization)
    assert all(word.startswith(want) for word in found), found
    assert found


@pytest.mark.parametrize(
    ("method", "quantization", "want"),
    [
        (lp.LoRA(r=2, target_modules=["experts"]), None, {"grouped products"}),
        (lp.DoRA(r=2, target_modules=["experts"]), NF4, {"grouped products; torch: cpu tensors"}),
        (
            lp.MiSS(r=4, form="bat", target_modules=["experts"]),
            None,
            # 4 experts, 32 → 2 × 64 and 64 → 32, fp32
            {f"W' of all experts formed in every forward: {n} bytes" for n in ("65,536", "32,768")},
        ),
    ],
    ids=["LoRA", "DoRA NF4", "MiSS bat"],
)
def test_words_on_experts(
    method: Method, quantization: lp.Quantization | None, want: set[str]
) -> None:
    model, _ = build("mixtral")
    assert words(model, method, quantization) == want


def test_a_bias_that_dora_does_not_scale() -> None:
    net = nn.ModuleDict({"with": nn.Linear(8, 8), "without": nn.Linear(8, 8, bias=False)})
    report = lp.attach(net, lp.DoRA(r=2, target_modules="all-linear"))
    by_name = {g.layers: g.fused for g in report.groups}
    assert by_name["without"] == "fused"
    assert by_name["with"].startswith("a bias that is not scaled")


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
def test_adapters_wider_than_the_base_are_told(quantization: lp.Quantization | None) -> None:
    model = BUILDERS["llama"]().to(torch.bfloat16)
    wide = "low rank in float32 unless autocast is on (`.to(torch.bfloat16)` is faster)"
    (told,) = words(model, lp.LoRA(r=2), quantization)
    assert told.startswith(f"fused; {wide}")
    model.to(torch.bfloat16)
    assert lp.parameter_report(model).groups[0].fused == told.replace(f"; {wide}", "")


def test_a_preference_is_told() -> None:
    with use_backend("torch"):
        assert words(BUILDERS["llama"](), lp.LoRA(r=2), NF4) == {"fused; torch: requested"}


def test_a_kernel_that_the_device_refused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, model = torch.device("cpu"), BUILDERS["llama"]()
    lp.quantize(model, NF4)
    monkeypatch.setitem(CHIPS, cpu, GPUS["sm_90"].chip)
    monkeypatch.setitem(FAILURES, ("dequantize_4bit", "float32", cpu), "PTXASError: no such chip")
    report = lp.attach(model, lp.LoRA(r=2))
    told = "dequantize_4bit does not run on cpu: PTXASError: no such chip"
    assert {g.fused for g in report.groups} == {f"fused; torch: {told}"}
    assert [line for line in report.kernels if "PTXASError" in line] == [
        f"kernels: fused; torch: {told}"
    ]
    # A kernel that no group names has a line of its own.
    monkeypatch.setitem(FAILURES, ("output_scale", "float32", cpu), "PTXASError: another one")
    assert (
        "kernels: output_scale (float32) does not run on cpu: PTXASError: another one"
        in lp.parameter_report(model).kernels
    )


@pytest.mark.parametrize(
    ("preference", "how"),
    [
        (None, "one by one (cpu: no faster as one product)"),
        (False, "one by one (forced by a test)"),
        (True, "one dequantisation and one product"),
    ],
)
def test_layers_over_one_input(preference: bool | None, how: str) -> None:
    group_projections(preference)
    try:
        every = lp.LoRA(r=2, target_modules="all-linear")
        report = lp.attach(BUILDERS["llama"](), every, quantization=NF4)
    finally:
        group_projections(None)
    groups = [n for n in report.kernels if "read one input" in n]
    assert f"q_proj, k_proj, v_proj read one input: {how}" in groups
    assert how in str(report)


def test_nothing_is_decided_without_weights() -> None:
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    assert words(model, lp.LoRA(r=2), NF4) == {"decided when the weights are there"}
