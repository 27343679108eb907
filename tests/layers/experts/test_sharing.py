"""LoRA on experts: one pair A, B an expert, one for all of a layer, or none; several adapters, rows
of a batch under different ones, ranks by weight.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.experts.ops import is_experts
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run

TARGETS = ["experts"]
METHODS = {
    "LoRA": lp.LoRA(r=2, alpha=4.0, target_modules=TARGETS, experts="shared"),
    "bias": lp.LoRA(r=2, target_modules=TARGETS, experts="shared", lora_bias=True),
    "DoRA": lp.DoRA(r=2, target_modules=TARGETS, experts="shared"),
    "LoRA+": lp.LoRAPlus(r=2, target_modules=TARGETS, experts="shared"),
}
QUANTIZED = {"dense": None, "nf4": lp.Quantization("nf4", block_size=32)}


def by_formula(base, model):
    """A copy of the base whose experts' weights are W + s B A, in fp64, of LoRA."""
    copied = copy.deepcopy(base)
    for name, module in adapted_modules(model):
        plain = copied.get_submodule(name)
        for adapter in adapters_of(module):
            p = adapter.tensors()
            delta = adapter.method.alpha / adapter.method.r * (p["B"].double() @ p["A"].double())
            W = plain.get_parameter(adapter.site.parameter)
            natural = delta.mT if adapter.site.shape != W.shape else delta
            with torch.no_grad():
                W.copy_(W.double() + natural)
    return copied


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_shared_is_one_change_for_all_experts(name):
    base, inputs = build(name)
    model = copy.deepcopy(base)
    lp.attach(model, METHODS["LoRA"])
    randomise(model)
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            assert all(t.ndim == 2 for t in adapter.parameters())
    assert_close("logits", run(model, inputs), run(by_formula(base, model), inputs), floor=1e-4)


@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("method", METHODS)
def test_shared_keeps_the_invariants(method, storage):
    base, inputs = build("mixtral")
    lp.attach(base, METHODS[method], quantization=QUANTIZED[storage])
    with lp.disable_adapters(base):
        plain = run(base, inputs)
    assert_close("at the start", run(base, inputs), plain)
    randomise(base, std=0.1)
    start = {k: t.detach().clone() for k, t in base.state_dict().items()}
    base(**inputs).logits.square().sum().backward()
    for _, module in adapted_modules(base):
        for key, p in module.peft.named_parameters():
            assert p.grad is not None, key
            assert p.grad.abs().sum() > 0, key
    y = run(base, inputs)
    state = {k: t.clone() for k, t in lp.adapter_state_dict(base).items()}
    if method == "bias":  # these experts have no bias to merge one into
        with pytest.raises(RuntimeError, match="hold a bias"):
            lp.merge(base)
    else:
        lp.merge(base)
        assert_close("merged", run(base, inputs), y, floor=1e-4)
        lp.unmerge(base)
    for key, value in base.state_dict().items():
        assert_same_bits(key, value, start[key])
    randomise(base, seed=9)
    lp.load_adapter_state_dict(base, state)
    assert_same_bits("loaded again", run(base, inputs), y)
    lp.detach(base)
    assert_same_bits("detached", run(base, inputs), plain)


def test_shared_is_written_for_peft_as_copies(tmp_path: Path):
    base, inputs = build("mixtral")
    model = copy.deepcopy(base)
    lp.attach(model, METHODS["LoRA"])
    randomise(model)
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want, floor=1e-4)
    again = loaded(base, tmp_path)
    assert_close("in ours", run(again, inputs), want, floor=1e-4)
    assert all(
        a.method.experts == "each" for _, m in adapted_modules(again) for a in adapters_of(m)
    )


def test_none_leaves_experts_alone_and_says_so():
    base, _ = build("mixtral")
    report = lp.attach(base, lp.LoRA(r=2, target_modules="all-linear", experts=None))
    names = [n for n, _ in adapted_modules(base)]
    assert names
    assert not any(is_experts(m) for _, m in adapted_modules(base))
    left = [n for n, why in report.skipped if why == "experts=None"]
    assert left == [n for n, m in base.named_modules() if is_experts(m)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: lp.LoRA(experts="some"),
        lambda: lp.attach(build("mixtral")[0], lp.LoRA(target_modules=TARGETS, experts=None)),
        lambda: lp.attach(
            build("mixtral")[0],
            lp.LoRA(r=2, target_modules=TARGETS, experts="shared", init="pissa"),
        ),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match=r"experts=|experts in"):
        call()


@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_rows_under_adapters_of_different_sharing(name, storage):
    """Three adapters (one an expert; shared; DoRA) by row, against one after the other."""
    base, inputs = build(name)
    rows = inputs["input_ids"].shape[0]
    methods = {
        "a": lp.LoRA(r=2, target_modules=TARGETS),
        "b": METHODS["LoRA"],
        "c": METHODS["DoRA"],
    }
    for key, method in methods.items():
        lp.attach(
            base, method, adapter_name=key, quantization=QUANTIZED[storage] if key == "a" else None
        )
    lp.set_adapter(base, list(methods))
    randomise(base)
    for batch in (["a", "b"], ["c", "a"], ["b", "c"]):
        want = []
        for i in range(rows):
            lp.set_adapter(base, batch[i])
            want.append(run(base, inputs)[i])
        lp.set_adapter(base, list(methods))
        with lp.adapter_names(batch):
            base.zero_grad()
            logits = base(**inputs).logits
            logits.square().sum().backward()
        for i, row in enumerate(want):
            assert_close(f"row {i} under {batch[i]}", logits[i], row, floor=1e-4)
        for _, module in adapted_modules(base):
            for adapter in adapters_of(module):
                for key, p in adapter.named_parameters():
                    moved = p.grad is not None and bool(p.grad.abs().sum())
                    assert moved == (adapter.adapter_name in batch), (adapter.adapter_name, key)


def test_several_adapters_add_up():
    base, inputs = build("mixtral")
    lp.attach(base, lp.LoRA(r=2, target_modules=TARGETS), adapter_name="a")
    lp.attach(base, METHODS["LoRA"], adapter_name="b")
    lp.set_adapter(base, ["a", "b"])
    randomise(base)
    both = run(base, inputs)
    lp.merge(base)
    assert_close("merged", run(base, inputs), both, floor=1e-4)


def test_ranks_by_layer_and_by_weight():
    base, inputs = build("mixtral")
    pattern = {"layers.0.mlp.experts": 4, "experts.down_proj": 3}
    lp.attach(base, lp.LoRA(r=2, target_modules=TARGETS, rank_pattern=pattern))
    randomise(base)
    ranks = {
        f"{n}.{a.site.parameter}": a.tensors()["A"].shape[-2]
        for n, m in adapted_modules(base)
        for a in adapters_of(m)
    }
    assert ranks == {
        "model.layers.0.mlp.experts.gate_up_proj": 4,
        "model.layers.0.mlp.experts.down_proj": 4,
        "model.layers.1.mlp.experts.gate_up_proj": 2,
        "model.layers.1.mlp.experts.down_proj": 3,
    }
    y = run(base, inputs)
    lp.merge(base)
    assert_close("merged", run(base, inputs), y, floor=1e-4)


def test_dropout_draws_a_mask_for_every_pair():
    """The mean over masks is the output without dropout, which is linear in the last weight."""
    base, _ = build("mixtral")
    lp.attach(base, lp.LoRA(r=2, dropout=0.5, target_modules=["experts.down_proj"]))
    randomise(base, std=0.5)
    experts = base.model.layers[0].mlp.experts
    torch.manual_seed(0)
    x = torch.randn(1, 32).repeat(2, 1)
    index, weights = torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 0.5)
    plain = experts.eval()(x, index, weights)
    experts.train()
    many = torch.stack([experts(x, index, weights) for _ in range(500)])
    assert (many[:, 0] != many[:, 1]).any(), "two tokens drew one mask"
    spread = many.std(0) / 500**0.5
    assert ((many.mean(0) - plain).abs() < 6 * spread + 1e-6).all()
