"""LoRA with one factor frozen, or with changed gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods.base import StepContext
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, run, trained


def adapted(method: lp.LoRA, n: int = 24) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n))
    lp.attach(model, method)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def step(model: nn.Module, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Gradients of one step, after the method's hook; the tensors of every site."""
    model(x).pow(2).sum().backward()
    adapters = [a for _, m in adapted_modules(model) for a in adapters_of(m)]
    method = adapters[0].method
    assert method.has_step_hooks
    method.after_backward(StepContext(0, None, [(a.site, a.tensors()) for a in adapters]))
    return [a.tensors() for a in adapters]


def test_the_projected_step_is_nearest_to_the_full_gradient():
    """Among all dB the least-squares solution of s dB A = dW / s, in fp64."""
    model = adapted(lp.LoRA(r=4, alpha=8.0, freeze_A=True, target_modules=["0", "2"]))
    x = torch.randn(7, 24)
    twin = copy.deepcopy(model)
    found = step(model, x)
    twin(x).pow(2).sum().backward()
    for tensors, plain in zip(
        found, (a.tensors() for _, m in adapted_modules(twin) for a in adapters_of(m)), strict=True
    ):
        A, g = tensors["A"].double(), plain["B"].grad.double()
        assert not tensors["A"].requires_grad
        s = 2.0  # g = s dW Aᵀ
        want = torch.linalg.lstsq((A @ A.mT).mT, g.mT).solution.mT / s**2
        assert_close("dB", tensors["B"].grad, want.float(), floor=1e-4)


def test_one_step_is_that_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's LoRA-FA optimizer, its product in fp32, and AdamW over projected gradients."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    base, inputs = build("llama")
    theirs = by_peft(base, tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    ours = loaded(base, tmp_path)
    model = copy.deepcopy(base)
    lp.attach(model, lp.LoRA(r=4, alpha=8.0, freeze_A=True, target_modules=["q_proj", "v_proj"]))
    lp.load_adapter_state_dict(model, lp.adapter_state_dict(ours))
    theirs.train()
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=0.01)
    # Large gradients: the two optimizers add eps at other places.
    theirs(**inputs).logits.pow(2).sum().backward()
    optimizer.step()
    trained_here = [p for p in model.parameters() if p.requires_grad]
    own = torch.optim.AdamW(trained_here, lr=0.01, eps=1e-6, weight_decay=0.0)
    model(**inputs).logits.pow(2).sum().backward()
    adapters = [a for _, m in adapted_modules(model) for a in adapters_of(m)]
    adapters[0].method.after_backward(
        StepContext(0, None, [(a.site, a.tensors()) for a in adapters])
    )
    own.step()
    assert_close("output after a step", run(model, inputs), run(theirs.eval(), inputs), floor=1e-3)


def test_the_input_is_not_kept():
    kept = {}
    for freeze in (True, False):
        model = adapted(lp.LoRA(r=4, freeze_A=freeze, target_modules=["0"]), 64)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model[0](torch.randn(512, 64, requires_grad=True))
        kept[freeze] = 512 * 64 in sizes
    assert kept == {True: False, False: True}


def test_preconditioned_steps_do_not_depend_on_how_the_change_is_split():
    """(c A, B / c) takes the same step of ΔW for every c."""
    changes = []
    for c in (1.0, 4.0):
        model = adapted(lp.LoRA(r=4, precondition=True, target_modules=["0", "2"]))
        adapter = adapters_of(model[0])[0]
        with torch.no_grad():
            adapter.A.mul_(c)
            adapter.B.div_(c)
        tensors = step(model, torch.ones(3, 24))[0]
        A, B = tensors["A"], tensors["B"]
        changes.append((B @ A.grad + B.grad @ A).detach())
    assert_close("first order of ΔW", changes[1], changes[0], floor=1e-3)


def test_a_schedule_is_only_where_it_was_asked_for():
    assert not lp.LoRA().has_step_hooks
    assert not lp.DoRA().has_step_hooks
    assert lp.LoRA(freeze_A=True).has_step_hooks
    assert lp.AdaLoRA().has_step_hooks


@pytest.mark.parametrize("how", [{"freeze_A": True}, {"init": "mica"}], ids=str)
def test_files_are_plain_lora(how, tmp_path: Path) -> None:
    base, inputs = build("llama")
    model = trained(base, lp.LoRA(r=4, target_modules=["q_proj"], **how))
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want)
    assert_close("in ours", run(loaded(base, tmp_path), inputs), want)


def test_starts_as_peft_does(tmp_path: Path) -> None:
    """MiCA's B spans peft's minor singular directions."""
    base, _ = build("llama")
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica"),
    )
    model = copy.deepcopy(base)
    lp.attach(model, lp.LoRA(r=4, init="mica", target_modules=["q_proj"]))
    found = {n: p for n, p in theirs.named_parameters() if "lora_B" in n}
    ours = [a.tensors() for _, m in adapted_modules(model) for a in adapters_of(m)]
    assert len(found) == len(ours)
    for want, tensors in zip(found.values(), ours, strict=True):
        B = tensors["B"]
        assert_close("B Bᵀ", B @ B.mT, want.detach() @ want.detach().mT, floor=1e-4)
        assert not B.requires_grad
        assert tensors["A"].requires_grad


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "mica"},
        {"velora_config": peft.tuners.lora.config.VeloraConfig()},
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    ],
    ids=lambda c: next(iter(c)),
)
def test_files_of_variants_are_read_as_lora(config, tmp_path: Path) -> None:
    base, inputs = build("llama")
    theirs = by_peft(base, tmp_path, r=4, target_modules=["q_proj", "v_proj"], **config)
    assert_close("peft's in ours", run(loaded(base, tmp_path), inputs), run(theirs, inputs))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"freeze_A": True, "init": "eva"}, "init='eva'"),
        ({"freeze_A": True, "precondition": True}, "precondition=True"),
        ({"precondition": True, "init": "mica"}, "init='mica'"),
    ],
)
def test_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        lp.LoRA(**arguments)
