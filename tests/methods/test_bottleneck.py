"""Bottleneck adapters: formulas, places in many architectures, composition, rows, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.methods import BottleneckAdapter
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.tiny_models import BUILDERS, KINDS, example_inputs, main_output

STYLES = ["houlsby", "pfeiffer", "parallel"]
QUICK = {"llama", "mixtral", "gpt2", "bert", "t5", "vit"}  # `-m slow` runs the others
ARCHITECTURES = [n for n in BUILDERS if n not in ("mamba", "convnext", "resnet")]


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    return BUILDERS[name]().requires_grad_(False), example_inputs(name)


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return main_output(model(**x))


def move(model: nn.Module, std: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_architectures(name: str, style: Any) -> None:
    """Start, gradient of everything, off, detach; at least one place a block."""
    model, x = built(name)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    base = logits(model, x)
    report = lp.attach(model, BottleneckAdapter(style=style, reduction_factor=4))
    blocks = {"encoder_decoder": 4, "speech": 4, "clip": 4}.get(KINDS[name], 2)
    places = {"houlsby": 2 * blocks, "pfeiffer": blocks, "parallel": blocks}[style]
    if style == "houlsby" and KINDS[name] in ("encoder_decoder", "speech"):
        places += 2  # cross attention
    assert sum(g.count for g in report.groups) == places
    assert_same_bits("start", logits(model, x), base)
    move(model)
    y = logits(model, x)
    (y * torch.randn_like(y)).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, n
    assert not torch.equal(y, base)
    with lp.disable_adapters(model):
        assert_same_bits("off", logits(model, x), base)
    assert_same_bits("on", logits(model, x).detach(), y.detach())
    with pytest.raises(RuntimeError, match="no merged form"):
        lp.merge(model)
    lp.detach(model)
    assert set(model.state_dict()) == set(before)
    assert_same_bits("detached", logits(model, x), base)
    assert not any(m._forward_pre_hooks for m in model.modules())


def bottleneck(model: nn.Module, place: str) -> Any:
    block: Any = model.get_submodule(place).get_submodule("peft.default.block")
    return lambda z: block.up(block.f(block.down(z)))


def bert_layer(style: str, layer: Any, h: Tensor, u: dict[str, Any]) -> Tensor:
    """One BERT block by hand: post-norm."""
    a = layer.attention.output.dense(attended(layer.attention, h))
    if style == "houlsby":
        a = a + u["a"](a)
    att = layer.attention.output.LayerNorm(a + h)
    o = layer.output.dense(layer.intermediate(att))
    norm = layer.output.LayerNorm
    if style == "houlsby":
        return norm(o + u["o"](o) + att)
    if style == "pfeiffer":
        return norm(u["r"](norm(o + att)) + o + att)
    return norm(o + 4 * u["x"](att) + att)


def attended(attention: Any, h: Tensor) -> Tensor:
    parts = [attention.self.query(h), attention.self.key(h), attention.self.value(h)]
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in parts)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("style", STYLES)
def test_formula_in_a_post_norm_block(style: Any) -> None:
    base, _ = built("bert")
    model = copy.deepcopy(base)
    lp.attach(model, BottleneckAdapter(style=style))
    move(model)
    h = torch.randn(2, 5, 32)
    at = "bert.encoder.layer.0"
    places = {"a": "attention.output.dense", "o": "output.dense"}
    places = {"pfeiffer": {"r": "output.LayerNorm"}, "parallel": {"x": "output.dense"}}.get(
        style, places
    )
    u = {k: bottleneck(model, f"{at}.{p}") for k, p in places.items()}
    got = model.get_submodule(at)(h)
    assert_close("block", got, bert_layer(style, base.get_submodule(at), h, u))


@pytest.mark.parametrize("style", STYLES)
def test_formula_in_a_pre_norm_block(style: Any) -> None:
    base, x = built("llama")
    model = copy.deepcopy(base)
    lp.attach(model, BottleneckAdapter(style=style, layers_to_transform=[1]))
    move(model)
    layer: Any = base.get_submodule("model.layers.1")
    seen: dict[str, Tensor] = {}
    keep = [
        layer.register_forward_pre_hook(lambda m, a: seen.update(h=a[0])),
        layer.self_attn.register_forward_hook(lambda m, a, y: seen.update(a=y[0])),
    ]
    logits(base, x)
    for hook in keep:
        hook.remove()
    after: dict[str, Tensor] = {}
    model.get_submodule("model.layers.1").register_forward_hook(
        lambda m, a, y: after.update(y=y[0] if isinstance(y, tuple) else y)
    )
    logits(model, x)
    h, a = seen["h"], seen["a"]
    at = "model.layers.1"
    if style == "houlsby":
        a = a + bottleneck(model, f"{at}.self_attn.o_proj")(a)
    s = h + a
    o = layer.mlp(layer.post_attention_layernorm(s))
    want = s + o
    if style == "houlsby":
        want = s + o + bottleneck(model, f"{at}.mlp")(o)
    elif style == "pfeiffer":
        want = s + o + bottleneck(model, at)(s + o)
    else:
        want = s + o + 4 * bottleneck(model, f"{at}.mlp")(s)
    assert_close("block", after["y"], want)


OPTIONS: dict[str, dict[str, Any]] = {
    "learned scale": {"scaling": "learned"},
    "scale a channel": {"scaling": "channel"},
    "norms": {"ln_before": True, "ln_after": True},
    "gate": {"gating": True},
    "bert init": {"init": "bert"},
    "gelu": {"non_linearity": "gelu"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str) -> None:
    model, x = built("bert")
    base = logits(model, x)
    lp.attach(model, BottleneckAdapter(**OPTIONS[option]))
    if option == "bert init":
        assert_close("near the base", logits(model, x), base, floor=5e-2)
    else:
        assert_same_bits("start", logits(model, x), base)
    move(model)
    logits(model, x).sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, n
            # A shift in front of a sum over normalised features may cancel; all else may not.
            assert p.grad.abs().sum() > 0 or n.endswith("bias"), n


def test_named_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    x = torch.randint(0, 9, (2, 5))
    base = model(x).detach()
    lp.attach(model, BottleneckAdapter(target_modules=["0", "1", "2"], reduction_factor=2))
    assert_same_bits("start", model(x).detach(), base)
    move(model)
    u = [bottleneck(model, str(i)) for i in range(3)]
    z = F.embedding(x, model[0].weight)
    z = z + u[0](z)
    z = F.linear(z, model[1].weight, model[1].bias)
    z = z + u[1](z)
    z = F.layer_norm(z, (6,), model[2].weight, model[2].bias)
    z = z + u[2](z)
    assert_close("output", model(x), F.linear(z, model[3].weight, model[3].bias))


def test_beside_a_named_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    base = model(x).detach()
    lp.attach(model, BottleneckAdapter("parallel", target_modules=["0"], scaling=2.0))
    move(model)
    assert_close("output", model(x).detach(), base + 2 * bottleneck(model, "0")(x).detach())


def test_what_cannot_hold_one() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="type Conv2d"):
        lp.attach(plain, BottleneckAdapter(target_modules=["0"]))
    with pytest.raises(ValueError, match="name the modules"):
        lp.attach(plain, BottleneckAdapter())
    for fields in ({"style": "other"}, {"reduction_factor": 0}, {"scaling": "x"}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            BottleneckAdapter(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES)
def test_quantised_base_copies_and_checkpointing(style: Any) -> None:
    model, x = built("llama")
    lp.attach(model, BottleneckAdapter(style), quantization=lp.Quantization("nf4", block_size=32))
    move(model)
    y = logits(model, x)
    y.sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        move(twin)  # a copy stands for itself: neither its tensors nor its taps are the model's
        assert not torch.equal(logits(twin, x), y)
        assert_same_bits("model", logits(model, x).detach(), y.detach())
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    logits(model, x).sum().backward()
    for n, p in model.named_parameters():
        if n in want:
            assert_close(n, p.grad, want[n])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_and_order(name: str, style: Any) -> None:
    """Each row as under its adapter alone; two active adapters act in the order named."""
    model, x = built(name)
    x = {k: torch.cat([t, t[:1]]) for k, t in x.items()}
    for adapter in ("a", "b"):
        lp.attach(model, BottleneckAdapter(style), adapter_name=adapter)
        move(model, 0.2)
    alone = []
    for i, adapter in enumerate(("a", "b", None)):
        lp.set_adapter(model, adapter)
        alone.append(logits(model, x)[i].detach())
    lp.set_adapter(model, ["a", "b"])
    with lp.adapter_names(["a", "b", "__base__"]):
        y = logits(model, x).detach()
    for i, row in enumerate(alone):
        assert_close(f"row {i}", y[i], row)
    both = logits(model, x).detach()
    lp.set_adapter(model, ["b", "a"])
    if style == "parallel":
        assert_close("the order of sums", logits(model, x).detach(), both)
    else:
        assert not torch.allclose(logits(model, x), both)


def test_state_and_hybrid() -> None:
    model, x = built("gpt2")
    methods = [lp.LoRA(r=2), BottleneckAdapter("houlsby"), BottleneckAdapter("parallel")]
    lp.attach(model, methods)
    move(model)
    state, y = lp.adapter_state_dict(model), logits(model, x).detach()
    assert any(".block." in k for k in state)
    assert any(k.endswith(".A") for k in state)
    twin, _ = built("gpt2")
    lp.attach(twin, methods)
    lp.load_adapter_state_dict(twin, state)
    assert_same_bits("loaded", logits(twin, x).detach(), y)
    lp.reset_adapters(twin, seed=1)
    assert all(
        not t.any() for k, t in lp.adapter_state_dict(twin).items() if k.endswith("block.up.weight")
    )
    with pytest.raises(ValueError, match="exactly one"):
        lp.save_adapter(model, "unused")
