"""Bad input: the error says what was expected, what was found, what to do; nothing is changed."""

from __future__ import annotations

import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import methods
from tests.helpers.compare import assert_same_bits
from tests.helpers.nets import Plain, loader, peft, trainer
from tests.helpers.peft_exchange import build


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.LoRA(r=0), "rank >= 1"),
        (lambda: lp.LoRA(r=-3), "rank >= 1"),
        (lambda: lp.LoRA(dropout=1.0), "0 <= dropout < 1"),
        (lambda: lp.LoRA(dropout=-0.1), "0 <= dropout < 1"),
        (lambda: lp.LoRA(alpha=0), "alpha > 0"),
        (lambda: lp.LoRA(rank_pattern={"q": 0}), "rank >= 1"),
        (lambda: lp.LoRA(init="zero"), "init in"),
        (lambda: lp.Quantization("nf3"), "nf4"),
        (lambda: lp.Quantization("nf4", block_size=48), "block_size"),
        (lambda: lp.OFT(block_size=8, r=2), "exactly one"),
        (lambda: lp.AdaLoRA(init_r=4, target_r=8), "target_r"),
        (lambda: lp.VeRA(r=0), "r >= 1"),
        (lambda: lp.IA3(mode="divide"), "multiply"),
        (lambda: methods.HRA(r=0), "r >= 1, got r = 0"),
        (lambda: methods.RoAd("road_3"), "variant in .*got 'road_3'"),
        (lambda: methods.RoAd(group_size=7), "even group_size >= 2, got 7"),
        (lambda: methods.DeLoRA(strength=0.0), "strength > 0, got strength = 0.0"),
        (lambda: methods.GraLoRA(r=3, k=2), "divides r, got r = 3, k = 2"),
        (lambda: methods.SHiRA(r=0), "r >= 1, got r = 0"),
        (lambda: methods.SuperTuning(sparsity=1.0), "0 <= sparsity < 1, got sparsity = 1.0"),
        (lambda: methods.SuperTuning(r=2), "both of r and alpha or none, got r = 2"),
        (lambda: methods.HiRA(dropout=1.0), "0 <= dropout < 1, got dropout = 1.0"),
        (lambda: methods.PEANuT(depth=33), "0 <= depth <= 32, got depth = 33"),
        (lambda: methods.PEANuT(act_fn="step"), "act_fn in .*got act_fn = 'step'"),
        (lambda: methods.VBLoRA(topk=300), "topk <= num_vectors = 256, got 300"),
        (lambda: methods.UniLoRA(length=0), "length >= 1, got length = 0"),
        (
            lambda: methods.TinyLoRA(weight_tying=2.0),
            "0 <= weight_tying <= 1, got weight_tying = 2.0",
        ),
        (lambda: methods.RandLoRA(alpha=0.0), "alpha > 0, got alpha = 0.0"),
        (lambda: methods.PVeRA(sample=False, sample_at_inference=True), "got sample=False"),
        (lambda: methods.C3A(init="ones"), "init in .*got 'ones'"),
        (lambda: methods.FourierFT(n_frequency=0), "n_frequency >= 1, got n_frequency = 0"),
        (lambda: methods.WaveFT(family="haar"), "family in .*got family = 'haar'"),
        (lambda: methods.KaSA(beta=-1.0), "beta >= 0, got beta = -1.0"),
        (lambda: methods.BDLoRA(r=3, nblocks=2), "divides every rank, got nblocks = 2, r = 3"),
        (lambda: methods.AdaMSS(clusters=65), "clusters <= 64, got clusters = 65"),
        (lambda: methods.DEFT(decomposition="svd"), "decomposition in .*got 'svd'"),
        (lambda: methods.GLoRA(weight_form="none"), "weight_form in .*got 'none'"),
        (lambda: methods.PSOFT(split="lora"), "split in .*got 'lora'"),
        (lambda: methods.Poly(skills=0), "skills >= 1, got skills = 0"),
        (lambda: methods.OSF(kept=0), "kept > 0, got kept = 0"),
    ],
    ids=range(40),
)
def test_values(make, match) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def unchanged(model: nn.Module, error, match: str, call) -> None:
    classes = {n: type(m) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        call(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert set(model.state_dict()) == set(before)
    for key, value in model.state_dict().items():
        assert_same_bits(key, value, before[key])


CALLS = {
    "no match": (ValueError, "q_proj", lambda m: lp.attach(m, lp.LoRA(target_modules=["q_prj"]))),
    "rank above the layer": (
        ValueError,
        r"self_attn\.\w_proj.*min\(in_features",
        lambda m: lp.attach(m, lp.LoRA(r=64)),
    ),
    "nothing to do": (ValueError, "at least one method", lambda m: lp.attach(m, [])),
    "bad name": (ValueError, "adapter_name", lambda m: lp.attach(m, lp.LoRA(), adapter_name="a.b")),
    "no such saved module": (
        ValueError,
        "modules_to_save",
        lambda m: lp.attach(m, lp.LoRA(), modules_to_save=["lm_haed"]),
    ),
    "no such layer": (
        ValueError,
        "layers_to_transform",
        lambda m: lp.attach(m, lp.LoRA(layers_to_transform=[7])),
    ),
    "bad pattern": (
        ValueError,
        "target_modules",
        lambda m: lp.attach(m, lp.LoRA(target_modules="(")),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_attach_leaves_the_model_alone(name) -> None:
    model, _ = build("llama")
    unchanged(model, *CALLS[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_quantised(value) -> None:
    model, _ = build("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = value
    unchanged(
        model, ValueError, r"layers\.1\.mlp\.up_proj",
        lambda m: lp.attach(m, lp.LoRA(), quantization=lp.Quantization("nf4")),
    )  # fmt: skip


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="with parameters"):
        lp.attach(nn.Sequential(nn.ReLU()), lp.LoRA(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lp.attach("model", lp.LoRA())


def test_names_taken_and_unknown() -> None:
    model, _ = build("llama")
    lp.attach(model, lp.LoRA(r=2))
    with pytest.raises(RuntimeError, match="free name"):
        lp.attach(model, lp.LoRA(r=2))
    with pytest.raises(KeyError, match="other"):
        lp.detach(model, "other")
    with pytest.raises(KeyError, match="other"):
        lp.set_adapter(model, "other")
    with pytest.raises(KeyError, match="other"):
        lp.adapter_state_dict(model, "other")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop(next(iter(s))), "missing"),
        (lambda s: s.update({"x.peft.default.A": torch.zeros(1)}), "extra"),
        (lambda s: s.update({next(iter(s)): torch.zeros(3, 3)}), "expected shape"),
        (lambda s: s.update({k: t * torch.nan for k, t in list(s.items())[:1]}), "finite"),
        (lambda s: s.update({next(iter(s)): "tensor"}), "expected a tensor"),
    ],
    ids=["missing", "extra", "shape", "nan", "type"],
)
def test_states(change, match) -> None:
    model, _ = build("llama")
    lp.attach(model, lp.LoRA(r=2))
    state = lp.adapter_state_dict(model)
    before = {k: t.clone() for k, t in state.items()}
    state = {k: t + 1 for k, t in state.items()}
    change(state)
    with pytest.raises(ValueError, match=match):
        lp.load_adapter_state_dict(model, state)
    for key, value in lp.adapter_state_dict(model).items():
        assert_same_bits(key, value, before[key])


def test_parametrised_and_patched_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="0"):
        lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match="instance attribute 'forward'"):
        lp.attach(model, lp.LoRA(r=2, target_modules=["1"]))
    del model[1].forward
    model[1].peft = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'peft'"):
        lp.attach(model, lp.LoRA(r=2, target_modules=["1"]))


def test_two_callbacks_of_one_name() -> None:
    with pytest.raises((RuntimeError, ValueError), match="default"):
        trainer(peft(), peft(), max_epochs=1).fit(Plain(), loader())


def test_a_trainer_of_another_package() -> None:
    """`pytorch_lightning` and `lightning` are served; nothing else is."""

    class Trainer:
        __module__ = "somebody.trainer"

    with pytest.raises(TypeError, match=r"lightning or pytorch_lightning, got somebody"):
        peft().setup(Trainer(), Plain(), "fit")  # type: ignore[arg-type]


def test_an_optimizer_over_nothing() -> None:
    class Empty(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(RuntimeError, match="configure_optimizers"):
        trainer(peft(), max_epochs=1).fit(Empty(), loader())


def test_the_package_is_imported_lazily_for_errors() -> None:
    assert "lightning_peft" in sys.modules
    assert isinstance(peft(), pl.Callback)
