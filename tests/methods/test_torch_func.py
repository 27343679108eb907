"""Transforms of torch.func over adapted models: gradients of each example, Jacobians."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import lightning_peft as lp
from tests.methods.test_gradients_of_gradients import METHODS as SMOOTH

METHODS = {m: SMOOTH[m] for m in SMOOTH if m != "LoRA dropout"} | {
    "DoRA": lp.DoRA(r=4),
    "OFT": lp.OFT(block_size=4),
    "BOFT": lp.BOFT(block_size=4),
}


@pytest.mark.parametrize("quantization", [None, lp.Quantization("nf4")], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_each_example(method, quantization):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    method = dataclasses.replace(METHODS[method], target_modules=["0", "2"])
    lp.attach(model, method, quantization=quantization)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p, std=0.1)
    x = torch.randn(5, 3, 64)

    def loss(tensors, example):
        return functional_call(model, tensors, (example,)).pow(2).sum()

    detached = {n: p.detach() for n, p in trained.items()}
    of_each = vmap(grad(loss), in_dims=(None, 0))(detached, x)
    for i, example in enumerate(x):
        want = torch.autograd.grad(model(example).pow(2).sum(), list(trained.values()))
        for name, g in zip(trained, want, strict=True):
            torch.testing.assert_close(of_each[name][i], g, rtol=1e-4, atol=1e-4, msg=name)


def test_a_jacobian_and_a_dropout_that_differs_by_example():
    model = nn.Sequential(nn.Linear(64, 64))
    lp.attach(model, lp.LoRA(r=4, dropout=0.5, target_modules=["0"]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    x = torch.randn(64)
    y = vmap(model, randomness="different")(x.expand(2, 1, 64))
    assert not torch.equal(y[0], y[1])
    model.eval()
    want = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(jacrev(model)(x), want)
