"""MAM and UniPELT: the formulas of their gates, life of a hybrid, generation."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods import GatedLoRA, Method, mam, unipelt
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

HYBRIDS: dict[str, Any] = {
    "mam": lambda: mam(n=3, hidden=8),
    "unipelt": lambda: unipelt(n=3, hidden=8, reduction_factor=2),
    "unipelt token": lambda: unipelt(n=3, hidden=8, reduction_factor=2, gate="token"),
}


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(3)
    return BUILDERS[name]().requires_grad_(False), example_inputs(name)


def move(model: nn.Module, std: float = 0.2) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))


def attached(name: str, methods: list[Method] | Method) -> tuple[Any, dict[str, Tensor]]:
    model, x = built(name)
    lp.attach(model, methods)
    move(model)
    return model, x


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize(
    "name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "t5"))]
)
def test_life(name: str, hybrid: str) -> None:
    model, x = built(name)
    base = main_output(model(**x))
    before = set(model.state_dict())
    lp.attach(model, HYBRIDS[hybrid]())
    move(model)
    out = model(**x)
    out.loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not dead
    y = main_output(out).detach()
    assert not torch.equal(y, base)
    with lp.disable_adapters(model):
        assert_same_bits("off", main_output(model(**x)), base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("copy", main_output(twin(**x)).detach(), y)
    fresh, _ = built(name)
    lp.attach(fresh, HYBRIDS[hybrid]())
    lp.load_adapter_state_dict(fresh, lp.adapter_state_dict(model))
    assert_same_bits("loaded", main_output(fresh(**x)).detach(), y)
    with pytest.raises(RuntimeError, match="no merged form"):
        lp.merge(model)
    with pytest.raises(ValueError, match=r"one method|hybrid|list"):
        lp.save_adapter(model, "never")
    lp.detach(model)
    assert set(model.state_dict()) == before
    assert_same_bits("detached", main_output(model(**x)), base)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("gate", ["sequence", "token"])
def test_gated_lora_by_its_formula(gate: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    lp.attach(model, GatedLoRA(r=2, alpha=4.0, target_modules=["0"], gate=gate))
    move(model)
    x = torch.randn(3, 7, 6)
    (adapter,) = adapters_of(dict(adapted_modules(model))["0"])
    p = adapter.tensors()
    g = torch.sigmoid(x @ p["w"] + p["c"]).unsqueeze(-1)
    g = g.mean(dim=1, keepdim=True) if gate == "sequence" else g
    want = nn.functional.linear(x, model[0]._parameters["weight"], model[0].bias)
    assert_close("y", model(x), want + 2 * g * (x @ p["A"].T @ p["B"].T))


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gated_prefix_by_its_formula(name: str, mode: str) -> None:
    """With every gate's weight 0 a gate is σ(c): an ungated prefix with keys and values times that.
    With another weight it is the mean over tokens of what the attention of that layer reads.
    """
    model, x = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    method = lp.PrefixTuning(n=3, gating=True)
    plain, gated = copy.deepcopy(model), copy.deepcopy(model)
    lp.attach(gated, method)
    lp.attach(plain, dataclasses.replace(method, gating=False))
    ours, theirs = adapter_of(gated), adapter_of(plain)
    seen: dict[int, Tensor] = {}
    for i, module in enumerate(attention(gated)):
        module.register_forward_pre_hook(
            lambda m, a, k, i=i: seen.update({i: (a[0] if a else k["hidden_states"]).detach()}),
            with_kwargs=True,
        )
    with torch.no_grad():
        ours.block.gate_c.copy_(torch.tensor([0.7, -1.1]))
        ours.block.gate_w.mul_(20)
    if mode != "eval":
        gated.train(), plain.train()
    if mode in ("checkpointed", "reentrant"):
        gated.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    for row in range(2):
        one = {k: t[row : row + 1] for k, t in x.items()}
        out = gated(**one)
        gates = [
            torch.sigmoid(seen[i][0] @ ours.block.gate_w[i] + ours.block.gate_c[i]).mean()
            for i in range(2)
        ]
        with torch.no_grad():
            parts = ours.block.P.view(3, 2, -1) * torch.stack(gates)[None, :, None]
            theirs.block.P.copy_(parts.view(3, -1))
        assert_close("output", main_output(out).detach(), main_output(plain(**one)).detach())
        out.loss.backward()
    for key in ("P", "gate_w", "gate_c"):
        assert getattr(ours.block, key).grad.any(), key
    grad = {k: getattr(ours.block, k).grad.clone() for k in ("P", "gate_w", "gate_c")}
    if mode in ("checkpointed", "reentrant"):  # as without checkpointing
        gated.zero_grad()
        gated.gradient_checkpointing_disable()
        for row in range(2):
            gated(**{k: t[row : row + 1] for k, t in x.items()}).loss.backward()
        for key, tensor in grad.items():
            assert_close(key, getattr(ours.block, key).grad, tensor)


def adapter_of(model: nn.Module) -> Any:
    return next(a for _, m in adapted_modules(model) for a in adapters_of(m))


def attention(model: nn.Module) -> list[nn.Module]:
    named = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return [m for m in named if isinstance(getattr(m, "layer_idx", None), int)]


@pytest.mark.parametrize("beams", [1, 3])
def test_gates_by_token_generate_as_a_full_forward(beams: int) -> None:
    model, _ = attached("llama", unipelt(n=3, hidden=8, reduction_factor=2, gate="token"))
    ids = torch.randint(3, 99, (2, 5))
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5}
    mask = torch.ones_like(ids)
    found = [
        model.generate(ids, attention_mask=mask, do_sample=False, use_cache=c, **options)
        for c in (True, False)
    ]
    assert torch.equal(*found)


def test_gates_that_have_no_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves the base alone"):
        GatedLoRA(init="pissa")
    with pytest.raises(ValueError, match="gating"):
        lp.BottleneckAdapter(gating="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear layer"):
        lp.attach(nn.Sequential(nn.Embedding(9, 4)), GatedLoRA(r=2, target_modules=["0"]))
    model, x = attached("llama", lp.PrefixTuning(n=2, gating=True))
    with lp.adapter_names(["default"] * 2), pytest.raises(ValueError, match="set_adapter"):
        model(**x)
