"""Fused experts against peft's `target_parameters`: outputs, gradients, directories both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.hf.layouts import layout_for
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.experts.ops import is_experts
from lightning_peft.methods.exchange import HFEntry
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run, trained

FLOOR = 1e-4
ARCHITECTURES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss"),
    "llama4_text",
]
#: What the calls differ in: both weights of the experts, or one of them, with attention or without.
PARAMETERS = {
    "both": ["experts.gate_up_proj", "experts.down_proj"],
    "down": ["experts.down_proj"],
    "first": ["experts.gate_up_proj"],
}


def by_peft(base: nn.Module, directory: Path, **config: Any) -> nn.Module:
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    randomise(model)
    model.save_pretrained(str(directory))
    return model


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_in_ours(name: str, which: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    theirs = by_peft(
        base, tmp_path, r=3, lora_alpha=6, target_modules=["q_proj", "q_a_proj"],
        target_parameters=PARAMETERS[which],
    )  # fmt: skip
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.merge(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    lp.unmerge(model)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("in peft again", run(in_peft(base, tmp_path / "again"), inputs), want, floor=FLOOR)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ours_in_peft(name: str, tmp_path: Path) -> None:
    """all-linear takes attention and experts, the router is left alone."""
    base, inputs = build(name)
    shared = [*("gate_proj", "up_proj", "down_proj")] if name == "deepseek_v3" else None
    method = lp.LoRA(r=2, alpha=4.0, target_modules="all-linear", exclude_modules=shared)
    model = trained(base, method)
    adapted = [n for n, _ in adapted_modules(model)]
    assert any(is_experts(m) for _, m in adapted_modules(model))
    assert not any(n.endswith(("gate", "router", "shared_expert_gate")) for n in adapted)
    lp.save_adapter(model, tmp_path)
    want = run(model, inputs)
    assert_close("logits", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    theirs = by_peft(base, tmp_path, r=2, lora_alpha=4, target_parameters=PARAMETERS["both"])
    model = loaded(base, tmp_path)
    for m in (theirs, model):
        logits = m(**inputs).logits
        torch.manual_seed(0)
        (logits * torch.randn_like(logits)).sum().backward()
    want = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    checked = 0
    for path, module in adapted_modules(model):
        layout = layout_for(adapters_of(module)[0].site.ops, module)
        places = layout.nested_paths([a.site.parameter for a in adapters_of(module)])
        for adapter in adapters_of(module):
            parameter = adapter.site.parameter
            grads = {k: adapter.tensors()[k].grad for k in "AB"}
            entry = HFEntry(path, adapter.site, layout, adapter.method, grads)
            grads = adapter.method.hf.oriented(entry)
            for ours, theirs_name, axes in (("A", "lora_A", "down"), ("B", "lora_B", "up")):
                grad = layout.to_peft(parameter, axes, grads[ours])
                place = f"{places[parameter]}." if places[parameter] else ""
                key = f"base_model.model.{path}.{place}{theirs_name}.default.weight"
                assert_close(f"{key}.grad", grad, want[key], floor=FLOOR)
                checked += 1
    assert checked == len(want)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "mixtral"])
def test_all_linear_of_peft_in_ours(name: str, tmp_path: Path) -> None:
    """peft's all-linear takes router and experts by their names from before transformers 5."""
    base, inputs = build(name)
    theirs = by_peft(base, tmp_path, r=2, lora_alpha=4, target_modules="all-linear")
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("in peft again", run(in_peft(base, tmp_path / "again"), inputs), want, floor=FLOOR)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_layers_named_as_old_experts_in_peft(name: str, tmp_path: Path) -> None:
    """gate_proj of a dense layer, or of a shared expert, beside fused experts: named by weight."""
    base, inputs = build(name)
    patterns = {"gate_proj": 1, "experts.gate_up_proj": 4, "q_proj": 3}
    method = lp.LoRA(r=2, target_modules="all-linear", rank_pattern=patterns, dropout=0.1)
    model = trained(base, method)
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    assert_close("in ours", run(loaded(base, tmp_path), inputs), want, floor=FLOOR)


def test_what_peft_cannot_do_to_a_weight_is_refused(tmp_path: Path) -> None:
    base, _ = build("deepseek_v3")
    model = trained(base, lp.DoRA(r=2, target_modules="all-linear", exclude_modules=["experts"]))
    with pytest.raises(ValueError, match=r"use_dora.*exclude them"):
        lp.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_the_config_names_must_be_there(tmp_path: Path) -> None:
    base, _ = build("mixtral")
    by_peft(base, tmp_path, r=2, target_parameters=PARAMETERS["first"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_parameters": PARAMETERS["both"]}))
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=r"missing: \['model.layers.0.mlp.experts.down_proj'"):
        lp.load_adapter(base, tmp_path)
    assert set(base.state_dict()) == before


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    base, _ = build("mixtral")
    by_peft(base, tmp_path, r=2, target_parameters=PARAMETERS["both"])
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**{**base.config.to_diff_dict(), "num_local_experts": 3})
    other = MixtralForCausalLM(config)
    before = set(other.state_dict())
    with pytest.raises(ValueError, match="experts"):
        lp.load_adapter(other, tmp_path)
    assert set(other.state_dict()) == before
