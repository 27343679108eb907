"""The base as teacher: its own logits, no second copy, gradients of the formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.recipes import distillation_loss, teaching
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, run, trained


def fused_linear_term(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """Σ p_t (log p_t − log p_s), fp64, a row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    rows = list(zip(student.flatten(0, -2).double(), teacher.flatten(0, -2).double(), strict=True))
    for s, t in rows:
        p = (t / T).exp() / (t / T).exp().sum()
        q = (s / T).exp() / (s / T).exp().sum()
        total = total + (p * (p.log() - q.log())).sum()
    return T * T * total / len(rows)


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_loss_and_gradient(T: float) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    loss = distillation_loss(s, t, temperature=T)
    want = fused_linear_term(s, t.detach(), T)
    assert_close("loss", loss.double(), want, floor=1e-5)
    (got,) = torch.autograd.grad(loss, s)
    (wanted,) = torch.autograd.grad(want, s)
    assert_close("gradient", got.double(), wanted.double(), floor=1e-5)
    assert t.grad is None
    assert distillation_loss(t, t, temperature=T) == 0


def test_masked_rows_do_not_count() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    want = fused_linear_term(s[mask.bool()], t[mask.bool()], 2.0)
    t[0, 2] = 1e4
    assert_close("loss", distillation_loss(s, t, mask=mask).double(), want, floor=1e-5)


def test_bf16_logits_are_compared_in_fp32() -> None:
    s, t = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    assert distillation_loss(s, t).dtype == torch.float32
    assert_close("loss", distillation_loss(s, t).double(), fused_linear_term(s, t, 2.0), floor=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), r"got \[2, 3\] of the student and \[2, 4\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature > 0, got 0.0"),
        ((torch.ones(2, 3), torch.ones(2, 3), math.nan), "temperature > 0, got nan"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, torch.ones(3)), r"expected shape \[2\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, torch.zeros(2)), "rows that count, got none"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    s, t, *rest = arguments
    more = dict(zip(("temperature", "mask"), rest, strict=False))
    with pytest.raises(ValueError, match=message):
        distillation_loss(s, t, **more)


@pytest.mark.parametrize("quantization", [None, lp.Quantization("nf4")], ids=["dense", "nf4"])
def test_the_teacher_is_the_base_itself(quantization: lp.Quantization | None) -> None:
    """Same parameters, none added: no copy of the base stands anywhere."""
    base, inputs = build("llama")
    model = trained(
        base, lp.LoRA(r=4, dropout=0.5, target_modules="all-linear"), quantization=quantization
    )
    plain = copy.deepcopy(base)
    if quantization is not None:
        lp.quantize(plain, quantization)
    model.train()
    held = {id(p): n for n, p in model.named_parameters()}
    ran: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda module, *_: ran.append(module)) for m in model.modules()
    ]
    with teaching(model):
        soft = model(**inputs).logits
    assert_same_bits("the base's logits", soft, run(plain, inputs))
    assert not soft.requires_grad
    assert {id(p) for module in ran for p in module.parameters(recurse=False)} <= set(held)
    assert {id(p): n for n, p in model.named_parameters()} == held
    for hook in hooks:
        hook.remove()
    assert all(m.training for m in model.modules()), "dropout acts again"
    model.eval()
    assert not torch.equal(run(model, inputs), soft), "the adapter acts again"


def test_modes_come_back_one_by_one_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    model.train()
    model[1].eval()
    with pytest.raises(KeyError), teaching(model):
        raise KeyError
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]
    assert not model[0]._peft.active.disabled  # type: ignore[union-attr]


def test_another_model_as_teacher() -> None:
    teacher, student = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), nn.Linear(4, 3)
    lp.attach(student, lp.LoRA(r=2))
    x = torch.randn(64, 4)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(60):
        with teaching(teacher):
            soft = teacher(x)
        loss = distillation_loss(student(x), soft, temperature=2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_no_teacher_once_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    lp.merge(model)
    with pytest.raises(RuntimeError, match="expected unmerged adapters"), teaching(model):
        pass
