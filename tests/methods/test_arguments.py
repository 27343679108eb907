"""What users write first: the wrong form names the right one."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.method_cases import CASES, Case
from tests.helpers.peft_exchange import build


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.PEFT(lp.LoRA), r"got the class LoRA; write PEFT\(LoRA\(\)\)"),
        (lambda: lp.PEFT([lp.DoRA]), r"write PEFT\(DoRA\(\)\)"),
        (lambda: lp.PEFT("lora"), r"got 'lora'; write PEFT\(LoRA\(r=8\)\)"),
        (lambda: lp.PEFT(adapters=[lp.LoRA()]), "methods by adapter name, got .*adapters={"),
        (lambda: lp.PEFT(lp.LoRA(), quantization=lp.Quantization), "write quantization='nf4'"),
        (lambda: lp.attach(nn.Linear(2, 2), lp.LoRA), r"write attach\(model, LoRA\(\)\)"),
        (lambda: lp.LoRA("all-linear"), r"got 'all-linear'; write LoRA\(target_modules='all-l"),
        (lambda: lp.LoRA(lora_alpha=16), r"got lora_alpha=16; write LoRA\(alpha=16\)"),
        (lambda: lp.LoRA(drop_out=0.1), r"write LoRA\(dropout=0.1\)"),
        (lambda: lp.LoRA(use_dora=True), r"write DoRA\("),
        (lambda: lp.LoRA(r="8"), "expected a whole number for r, got '8'"),
        (lambda: lp.LoRA(r=8.0), r"got 8.0; write LoRA\(r=8\)"),
        (lambda: lp.LoRA(r=True), "expected a whole number for r, got True"),
        (lambda: lp.LoRA(alpha=None), r"expected a number for alpha, got None; write LoRA\(alpha"),
        (lambda: lp.LoRA(rank_pattern={"q": 2.0}), "rank_pattern: .* whole number for 'q', got 2"),
        (lambda: lp.LoRA(alpha_pattern={"q": "8"}), "alpha_pattern: .* a number for 'q', got '8'"),
        (lambda: lp.PEFT(lp.LoRA(), export_to=3), "PEFT export_to: expected a directory, got 3"),
        (lambda: lp.LoHa(frequency=3), "got frequency=3; write one of r, "),
        (lambda: lp.LoRA(layer_replication=[[0, 1]]), "merge is wrong. Build the deeper model"),
        (lambda: lp.LoRA(use_qalora=True), "GPTQ layers.*Train LoRA on a base in NF4"),
    ],
    ids=range(20),
)
def test_the_right_form_is_named(make: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


def test_a_misspelt_all_linear_asks_back() -> None:
    model, _ = build("llama")
    with pytest.raises(ValueError, match="did you mean 'all-linear'"):
        lp.attach(model, lp.LoRA(target_modules="all-linears"))


def test_a_layer_whose_weight_is_computed_says_by_what() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"it matches 0, .*; weight computed by .*parametrize\)"):
        lp.attach(model, lp.LoRA(r=2, target_modules=[r"0"]))


@pytest.mark.parametrize("activate", [lp.set_adapter, lp.use_adapters])
def test_an_adapter_is_named_once(activate: Any) -> None:
    model, _ = build("llama")
    lp.attach(model, lp.LoRA(r=2))
    with pytest.raises(ValueError, match=r"expected each adapter once, got \['default', 'default"):
        activate(model, ["default", "default"])


def test_methods_stay_ordinary_dataclasses() -> None:
    method = lp.LoRA(4, alpha=16)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert replace(method, r=2).r == 2
    assert list(inspect.signature(lp.LoRA).parameters)[:2] == ["r", "alpha"]


@pytest.mark.parametrize("call", ["attach", "quantize", "load_adapter"])
def test_strings_are_configurations(call: str, tmp_path) -> None:
    model, _ = build("llama")
    if call == "attach":
        lp.attach(model, lp.LoRA(r=2), quantization="nf4")
    elif call == "quantize":
        lp.quantize(model, "nf4")
    else:
        other, _ = build("llama")
        lp.attach(other, lp.LoRA(r=2))
        lp.load_adapter(model, lp.save_adapter(other, tmp_path), quantization="nf4")
    assert model.model.layers[0].mlp.up_proj._parameters["weight"].dtype == torch.uint8


def test_print_shows_adapter_and_storage() -> None:
    model, _ = build("gpt2")
    lp.attach(model, lp.LoRA(r=2), quantization="nf4")
    attention, mlp = model.transformer.h[0].attn.c_attn, model.transformer.h[0].mlp.c_fc
    assert repr(attention).startswith("AdaptedNF4Conv1D(\n  nf=96, nx=32\n  (peft)")
    assert "LoRA: A [2, 32]" in repr(attention)
    assert repr(mlp) == "NF4Conv1D(nf=128, nx=32)"


@pytest.mark.parametrize("given", [{"r": 10**400}, {"r": 4, "rank_pattern": {"q": 1 << 63}}])
def test_a_size_that_no_tensor_has_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"LoHa: expected (r|rank_pattern) below 2\*\*63"):
        lp.LoHa(**given)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_numbers_are_finite(case: Case) -> None:
    """Every number of every method; infinity would make the output infinite, or nothing at all."""
    for f in dataclasses.fields(case.method):  # type: ignore[arg-type]
        if type(getattr(case.method, f.name)) is float:
            for bad in (math.nan, math.inf, 1e300):
                with pytest.raises(ValueError, match="expected"):
                    replace(case.method, **{f.name: bad})


@pytest.mark.parametrize("cls", [lp.LoRA, lp.LoHa, lp.HiRA, lp.DeLoRA])
def test_patterns_have_names(cls: Any) -> None:
    with pytest.raises(TypeError, match="rank_pattern: expected names of layers, got 3"):
        cls(rank_pattern={3: 2})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.AdaLoRA(orth_reg_weight=-0.5), "orth_reg_weight >= 0"),
        (lambda: lp.ALoRA(invocation_tokens={3, 1}), "a list invocation_tokens"),
        (lambda: lp.Cartridge(hidden=0), "1 <= hidden"),
        (lambda: lp.Cartridge(n=2, init="text", init_ids={3, 1}), "in the order of the text"),
        (lambda: lp.CPT(init_ids=[3, 4], types=[1, 2], n=-1), "1 <= n"),
        (lambda: lp.GatedLoRA(freeze_A=True), "freeze_A=False"),
        (lambda: lp.LoRA(loftq_iter=0), "loftq_iter >= 1"),
        (lambda: lp.PromptTuning(n=2, init="text", init_ids={3, 1}), "in the order of the text"),
        (lambda: lp.TinyLoRA(bound=-0.1), "bound >= 0"),
        (lambda: lp.UniLoRA(bound=0.0), "bound > 0, since from zero"),
        (lambda: lp.VBLoRA(bank_bound=0.0), "bank_bound > 0, since from zero"),
        (lambda: lp.VBLoRA(logits_std=-0.1), "logits_std >= 0"),
        (lambda: lp.PEANuT(scaling=0.0), "scaling != 0"),
        (lambda: lp.FourierFT(scaling=0.0), "scaling != 0"),
        (lambda: lp.WaveFT(scaling=0.0), "scaling != 0"),
        (lambda: lp.BottleneckAdapter(scaling=0.0), "scaling != 0"),
        (lambda: lp.XLoRA(adapters=["a"], weight=0.0), "weight != 0"),
        (lambda: lp.BottleneckAdapter(gating="tokens"), r"gating in \('token', True, False\)"),
        (lambda: lp.C3A(block_size_pattern={"q": 0}), "block_size_pattern >= 1, got q = 0"),
    ],
    ids=range(19),
)
def test_a_value_out_of_range_is_refused_where_it_is_given(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"expected .*{match}"):
        make()


def test_feedforward_modules_is_a_suffix_or_a_pattern() -> None:
    """As in peft a single string may be a pattern; as a suffix it matched nothing."""
    for rule in ("fc2", r".*\.fc2", r".*fc[2-9]"):
        model = nn.Module()
        model.block = nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4)})
        lp.attach(model, lp.IA3(target_modules="all-linear", feedforward_modules=rule))
        sizes = {n: t.numel() for n, t in lp.adapter_state_dict(model).items()}
        assert sorted(sizes.values()) == [6, 6]  # outputs of fc1, inputs of fc2
    with pytest.raises(ValueError, match="expected a regular expression, got '\\('"):
        lp.attach(
            nn.Sequential(nn.Linear(4, 4)), lp.IA3(target_modules=["0"], feedforward_modules="(")
        )


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (lp.HRA(r=13, apply_gs=True), "in_features = 12 with apply_gs, got r = 13"),
        (lp.AdaMSS(r=4, rank_per_cluster=100_000), "rank_per_cluster <= 4, .*got 100000"),
        (lp.PSOFT(r=100_000), r"r <= min\(in_features, out_features\) = 8, got r = 100000"),
        (lp.LoRA(r=100_000), r"r <= min\(in_features, out_features\) = 8, got r = 100000"),
        (lp.KaSA(r=8), r"r < min\(in_features, out_features\) = 8, got r = 8|r <= "),
    ],
    ids=["HRA", "AdaMSS", "PSOFT", "LoRA", "KaSA"],
)
def test_a_rank_above_the_layers_size_is_refused_before_anything_is_built(
    method: Any, match: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"on '0': expected .*{match}"):
        lp.attach(model, dataclasses.replace(method, target_modules=["0"]))
    assert list(model.state_dict()) == before
