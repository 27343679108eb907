"""Methods that train the model's own parameters, on copies; and DiffPruning's schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import BitFit, DiffPruning, Full, LastLayers, NormTuning
from lightning_peft.methods.base import SelectMethod, StepContext
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

METHODS = {
    "bitfit": BitFit(),
    "norm": NormTuning(),
    "last": LastLayers(n=1),
    "full": Full(),
    "full of a part": Full(target_modules=["mlp", "DenseReluDense", "output"]),
}
MODELS = ["gpt2", "llama", "bert", "t5", "encoder layer"]


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    if name == "encoder layer":
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2), {"src": torch.randn(2, 5, 16)}
    return BUILDERS[name](), example_inputs(name)


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    y = model(**x)
    return y if isinstance(y, Tensor) else main_output(y)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_copies(name: str, model_name: str) -> None:
    """Start, gradients, base untouched, off, merge, detach."""
    method = METHODS[name]
    model, x = built(model_name)
    before, flags = bits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        base = logits(model, x)
    plain = copy.deepcopy(model)
    lacks = (model_name in ("llama", "t5") and name == "bitfit") or (
        model_name == "encoder layer" and name == "full of a part"
    )
    if lacks:
        with pytest.raises(ValueError, match="at least one parameter"):
            lp.attach(model, method)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        return
    lp.attach(model, method)
    # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
    chosen = {n.replace(".peft.default", "") for n in trained_tensors(model)}
    for n, p in plain.named_parameters():
        p.requires_grad_(n in chosen)
    with torch.no_grad():
        assert_same_bits("start", logits(model, x), logits(plain, x))
        frozen = logits(plain.requires_grad_(False), x)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".peft." in n for n in trained)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(0.1 * torch.randn_like(p))
    y = logits(model, x)
    (y * torch.randn_like(y)).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) or n not in trained or n.endswith("__bias"), n
        assert n in trained or p.grad is None, n
    assert not torch.equal(y, base)
    after = bits(model)
    for key, value in before.items():
        assert_same_bits(key, after[key], value)
    with torch.no_grad(), lp.disable_adapters(model):
        assert_same_bits("off", logits(model, x), frozen)
    lp.merge(model)
    with torch.no_grad():
        assert_close("merged", logits(model, x), y.detach())
    lp.unmerge(model)
    lp.detach(model)
    assert set(bits(model)) == set(before)
    with torch.no_grad():
        assert_same_bits("detached", logits(model, x), base)


def test_what_each_selects() -> None:
    def names(method: SelectMethod, model_name: str) -> set[str]:
        model, _ = built(model_name)
        lp.attach(model, method)
        return {n.replace(".peft.default", "") for n in trained_tensors(model)}

    assert names(LastLayers(1), "gpt2") == {
        n for n in names(Full(), "gpt2") if n.startswith("transformer.h.1.")
    }
    t5 = names(LastLayers(1), "t5")
    assert t5
    assert all(n.startswith("decoder.block.1.") for n in t5)
    biases = names(BitFit(target_modules=["mlp"]), "gpt2")
    assert biases == {f"transformer.h.{i}.mlp.{c}.bias" for i in (0, 1) for c in ("c_fc", "c_proj")}
    assert all("norm" in n for n in names(NormTuning(), "llama"))
    assert all("LayerNorm" in n for n in names(NormTuning(bias=False), "bert"))
    some = names(Full(layers_to_transform=[0], exclude_modules=["attn"]), "gpt2")
    assert some
    assert all(n.startswith("transformer.h.0.") and ".attn." not in n for n in some)


def test_tied_weights_stay_tied() -> None:
    model, x = built("gpt2")
    lp.attach(model, Full())
    tensors = trained_tensors(model)
    embedding = tensors["transformer.wte.peft.default.weight"]
    assert tensors["lm_head.peft.default.weight"] is embedding
    logits(model, x).sum().backward()
    assert embedding.grad is not None


def test_copies_switch_and_mix_by_row() -> None:
    model, x = built("bert")
    x = {k: torch.cat([t, t[:1]]) for k, t in x.items()}
    for name in ("a", "b"):
        lp.attach(model, NormTuning(), adapter_name=name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
    alone = []
    with torch.no_grad():
        for i, name in enumerate(("a", "b", None)):
            lp.set_adapter(model, name)
            alone.append(logits(model, x)[i])
        lp.set_adapter(model, ["a", "b"])
        with lp.adapter_names(["a", "b", "__base__"]):
            y = logits(model, x)
    for i, row in enumerate(alone):
        assert_close(f"row {i}", y[i], row)


def test_a_quantised_base_takes_no_copies() -> None:
    for before in (False, True):
        model, _ = built("llama")
        quantization = lp.Quantization("nf4", block_size=32)
        if before:
            lp.quantize(model, quantization)
        with pytest.raises(ValueError, match="dense weight"):
            lp.attach(model, LastLayers(1), quantization=None if before else quantization)
    lp.attach(model, NormTuning())  # norms stay dense


def test_last_layers_counts() -> None:
    with pytest.raises(ValueError, match="n <= 2"):
        lp.attach(built("gpt2")[0], LastLayers(3))
    with pytest.raises(ValueError, match="n >= 1"):
        LastLayers(0)
    with pytest.raises(ValueError, match="ModuleList"):
        lp.attach(nn.Bilinear(2, 2, 2), LastLayers(1))


def test_reset_and_state() -> None:
    model, _ = built("bert")
    lp.attach(model, BitFit())
    start = lp.adapter_state_dict(model)
    start = {k: t.clone() for k, t in start.items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    moved = {k: t.clone() for k, t in lp.adapter_state_dict(model).items()}
    lp.reset_adapters(model)
    for k, t in lp.adapter_state_dict(model).items():
        assert_same_bits(k, t, start[k])
    lp.load_adapter_state_dict(model, moved)
    for k, t in lp.adapter_state_dict(model).items():
        assert_same_bits(k, t, moved[k])


# ---- DiffPruning


def test_export_is_refused() -> None:
    for method in (Full(), BitFit(), LastLayers()):
        model, _ = built("bert")
        lp.attach(model, method)
        with pytest.raises(ValueError, match=r"merge\(\)"):
            lp.save_adapter(model, "unused")


def entries(model: nn.Module) -> list[tuple[object, dict[str, Tensor]]]:
    from lightning_peft.layers.adapted import adapted_modules, adapters_of

    return [(a.site, a.tensors()) for _, m in adapted_modules(model) for a in adapters_of(m)]


def test_gates_are_sampled_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    lp.attach(model, DiffPruning(target_modules=["0"], alpha_init=0.0, structured=True))
    with torch.no_grad():
        for _, p in entries(model):
            p["w"].normal_()
    x = torch.randn(3, 16)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    y = model(x)
    assert_same_bits("eval", model(x), y)
    model.train()
    lp.merge(model)
    assert_close("merged", model(x).detach(), y.detach())


def test_penalty_closes_gates() -> None:
    """Its gradient is that of the formula, and descending it closes gates."""
    model = nn.Sequential(nn.Linear(8, 6))
    method = DiffPruning(target_modules=["0"], l0=1.0, alpha_init=2.0)
    lp.attach(model, method)
    (_, p) = entries(model)[0]
    value = method.penalty(StepContext(0, 10, entries(model)))
    shift = (2 / 3) * torch.log(torch.tensor(0.1 / 1.1))
    assert_close("penalty", value.detach(), torch.sigmoid(2.0 - shift))
    for step in range(200):
        (g,) = torch.autograd.grad(
            method.penalty(StepContext(step, 200, entries(model))), [p["alpha"]]
        )
        with torch.no_grad():
            p["alpha"] -= 50 * g
    assert float((p["alpha"] < -2).float().mean()) == 1.0


def test_mask_is_fixed_to_the_density() -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20))
    method = DiffPruning(
        target_modules=["0", "1"], density=0.1, fix_at=0.5, temperature=1.0, final_temperature=0.25
    )
    lp.attach(model, method)
    with torch.no_grad():
        for _, p in entries(model):
            p["w"].normal_()
    with torch.no_grad():
        method.after_step(StepContext(1, 8, entries(model)))
        assert all(not bool(p["fixed"]) for _, p in entries(model))
        method.after_step(StepContext(4, 8, entries(model)))
    for _, p in entries(model):
        assert bool(p["fixed"])
        assert float(p["tau"]) == pytest.approx(0.5)
    assert sum(int(p["mask"].sum()) for _, p in entries(model)) == 40
    x = torch.randn(3, 20)
    model.train()
    assert_same_bits("no noise after fixing", model(x), model(x))
    before = [m._parameters["weight"].clone() for m in model]
    y = model(x).detach()
    lp.merge(model)
    assert_close("merged", model(x).detach(), y)
    changed = sum(int((m.weight != w).sum()) for m, w in zip(model, before, strict=True))
    assert changed == 40


@pytest.mark.parametrize(
    "fields",
    [{"l0": -1.0}, {"temperature": 0.0}, {"density": 0.0}, {"density": 1.5}, {"fix_at": 2.0}],
    ids=str,
)
def test_bad_values(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DiffPruning(**fields)  # type: ignore[arg-type]


class Lists(nn.Module):
    """Reads parameters of containers, which have no forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.rows = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.named = nn.ParameterDict({"a": torch.randn(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for row in self.rows:
            x = torch.tanh(x @ row)
        return x + self.named["a"]


@pytest.mark.parametrize("saved", [["rows", "named"], None], ids=["modules_to_save", "full"])
def test_parameters_of_lists_are_trained_and_kept(saved: list[str] | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Lists()), torch.randn(4, 8)
    base, start = model(x).detach(), {k: t.clone() for k, t in model.state_dict().items()}
    fresh = copy.deepcopy(model)
    method = lp.Full() if saved is None else lp.LoRA(r=2, target_modules=["body"])
    for each in (model, fresh):
        lp.attach(each, method, modules_to_save=saved or ())
    model(x).square().sum().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                p.sub_(0.05 * (1 + torch.rand_like(p)))
    y = model(x).detach()
    assert (y - base).abs().max() > 1e-3
    lp.load_adapter_state_dict(fresh, lp.adapter_state_dict(model))
    torch.testing.assert_close(fresh(x), y, rtol=0, atol=0)
    lp.merge(model)
    torch.testing.assert_close(model(x).detach(), y)
    lp.unmerge(model)
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
    lp.detach(model)
    assert all(torch.equal(t, start[k]) for k, t in model.state_dict().items())
    torch.testing.assert_close(model(x), base, rtol=0, atol=0)
