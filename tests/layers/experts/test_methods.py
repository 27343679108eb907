"""Every method that has a meaning on a stack of experts × {dense, NF4}: the invariants."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning_peft_kernels.nf4.ops import quantize_4bit

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.experts.ops import is_experts
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, randomise, run

TARGETS = ["experts"]
METHODS = {
    "lora": lp.LoRA(r=2, alpha=4.0, target_modules=TARGETS),
    "rslora": lp.LoRA(r=2, use_rslora=True, target_modules=TARGETS),
    "dora": lp.DoRA(r=2, target_modules=TARGETS),
    "ia3": lp.IA3(target_modules=TARGETS),
    "ia3 input": lp.IA3(target_modules=TARGETS, feedforward_modules=TARGETS),
    "vera": lp.VeRA(r=8, target_modules=TARGETS),
    "loha": lp.LoHa(r=2, target_modules=TARGETS),
    "lokr": lp.LoKr(r=2, target_modules=TARGETS),
    "lokr full": lp.LoKr(r=64, target_modules=TARGETS),
    "miss": lp.MiSS(r=4, target_modules=TARGETS),
}
QUANTIZED = {"dense": None, "nf4": lp.Quantization("nf4", block_size=32)}


def bits(model):
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_invariants(name, method, storage):
    base, inputs = build(name)
    plain = copy.deepcopy(base)
    if QUANTIZED[storage] is not None:
        lp.quantize(plain, QUANTIZED[storage])
    y_base = run(plain, inputs)
    before = bits(base)

    model = copy.deepcopy(base)
    lp.attach(model, METHODS[method], quantization=QUANTIZED[storage])
    assert_close("at the start", run(model, inputs), y_base)
    randomise(model, std=0.1)
    start = bits(model)
    logits = model(**inputs).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for _, module in adapted_modules(model):
        assert is_experts(module)
        for adapter in adapters_of(module):
            for key, p in adapter.named_parameters():
                assert p.grad is not None, key
                assert p.grad.abs().sum() > 0, key
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    y = run(model, inputs)
    assert (y - y_base).abs().max() > 1e-4
    with lp.disable_adapters(model):
        assert_same_bits("off", run(model, inputs), y_base)
    lp.merge(model)
    assert_close("merged", run(model, inputs), y, floor=1e-4)
    lp.unmerge(model)
    for key, value in bits(model).items():
        assert_same_bits(key, value, start[key])
    lp.detach(model)
    if storage == "dense":
        for key, value in bits(model).items():
            assert_same_bits(key, value, before[key])
    assert_same_bits("detached", run(model, inputs), y_base)


@pytest.mark.parametrize(
    "method",
    [lp.LoKr(r=2, rank_dropout=0.1), lp.OFT(block_size=4), lp.BOFT(block_size=4), lp.AdaLoRA()],
)
def test_methods_without_a_meaning_there_say_so(method):
    import dataclasses

    base, _ = build("mixtral")
    before = set(base.state_dict())
    with pytest.raises(ValueError, match="experts"):
        lp.attach(base, dataclasses.replace(method, target_modules=TARGETS))
    assert set(base.state_dict()) == before


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lora", "rslora")])
def test_what_peft_has_not_on_experts_is_not_written(method, tmp_path):
    base, _ = build("mixtral")
    lp.attach(base, METHODS[method])
    with pytest.raises(ValueError, match=r"experts.*adapter_state_dict"):
        lp.save_adapter(base, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bytes_are_those_of_each_expert_alone():
    base, _ = build("mixtral")
    experts = base.model.layers[0].mlp.experts
    weights = experts.gate_up_proj.detach().clone()
    lp.quantize(base, lp.Quantization("nf4"))
    packed = experts._parameters["gate_up_proj"]
    for e, W in enumerate(weights):
        q = quantize_4bit(W, kind="nf4", block_size=64, double_quant=True)
        assert_same_bits(f"expert {e}", packed[e].reshape(-1), q.packed.reshape(-1))


def test_int8_is_refused_with_the_reason():
    base, _ = build("mixtral")
    with pytest.raises(ValueError, match="nf4"):
        lp.quantize(base, lp.Quantization("int8"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rows_under_different_adapters(name):
    base, inputs = build(name)
    for key in ("a", "b"):
        lp.attach(base, METHODS["lora"], adapter_name=key)
    randomise(base)
    rows = inputs["input_ids"].shape[0]
    want = []
    for i in range(rows):
        lp.set_adapter(base, "ab"[i % 2])
        want.append(run(base, inputs)[i])
    lp.set_adapter(base, ["a", "b"])
    with lp.adapter_names(["ab"[i % 2] for i in range(rows)]):
        got = run(base, inputs)
    for i, row in enumerate(want):
        assert_close(f"row {i}", got[i], row, floor=1e-4)


def test_an_expert_without_tokens_has_a_zero_gradient():
    base, inputs = build("mixtral")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.gate.weight[3] = -100.0 * layer.mlp.gate.weight[:3].abs().sum()
            layer.mlp.gate.weight[3] = 0.0
    lp.attach(base, METHODS["lora"])
    randomise(base)
    one = {k: v[:1, :2] for k, v in inputs.items()}
    base(**one).logits.sum().backward()
    grads = [a.tensors()["A"].grad for _, m in adapted_modules(base) for a in adapters_of(m)]
    assert all(g is not None for g in grads)
    assert any(bool((g.flatten(1).abs().sum(1) == 0).any()) for g in grads)
