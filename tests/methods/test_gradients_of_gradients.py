"""Products with the Hessian through every method: what `create_graph` gives against differences of
gradients, in fp64.
"""

import dataclasses

import pytest
import torch
from lightning_peft_kernels import use_backend
from torch import nn

import lightning_peft as lp

METHODS = {
    "LoRA": lp.LoRA(r=4),
    "LoRA dropout": lp.LoRA(r=4, dropout=0.2),
    "IA3": lp.IA3(),
    "LoHa": lp.LoHa(r=4),
    "LoKr": lp.LoKr(r=4),
    "AdaLoRA": lp.AdaLoRA(),
    "VeRA": lp.VeRA(r=4),
    "MiSS": lp.MiSS(r=4),
    "Houlsby": lp.BottleneckAdapter("houlsby", 4),
}
KEEPS_NO_INPUT = {"VeRA", "MiSS"}


@pytest.fixture
def formulas():
    """torch's own formulas, as `kernels="torch"` asks for."""
    with use_backend("torch"):
        yield


def adapted(method, quantization=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    lp.attach(
        model, dataclasses.replace(method, target_modules=["0", "2"]), quantization=quantization
    )
    model.double()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def gradients(model, x, create_graph):
    torch.manual_seed(1)  # the same masks
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(model(x).pow(3).sum(), wanted, create_graph=create_graph)


def check(model):
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]
    direction = [torch.randn_like(t) for t in tensors]
    pairs = zip(gradients(model, x, create_graph=True), direction, strict=True)
    got = torch.autograd.grad(sum((g * v).sum() for g, v in pairs), tensors)
    sides = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for t, v in zip(tensors, direction, strict=True):
                t.add_(v, alpha=step)
        sides.append(gradients(model, x, create_graph=False))
    for h, above, below in zip(got, *sides, strict=True):
        torch.testing.assert_close(h, (above - below) / 2e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in KEEPS_NO_INPUT])
def test_through_every_method(method):
    check(adapted(METHODS[method]))


@pytest.mark.parametrize("method", ["LoRA", "LoRA dropout", "VeRA", "MiSS"])
def test_over_a_packed_base(method):
    check(adapted(METHODS[method], lp.Quantization("nf4")))


@pytest.mark.parametrize("method", sorted(KEEPS_NO_INPUT))
def test_refused_where_the_input_is_not_kept(method):
    model = adapted(METHODS[method])
    with pytest.raises(
        RuntimeError, match="create_graph=True; its input is not kept: use kernels="
    ):
        gradients(model, torch.randn(3, 16, dtype=torch.float64, requires_grad=True), True)


@pytest.mark.parametrize("method", sorted(KEEPS_NO_INPUT))
@pytest.mark.usefixtures("formulas")
def test_as_the_refusal_says(method):
    check(adapted(METHODS[method]))
