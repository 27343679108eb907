"""MonteCLoRA: plain LoRA in eval, drawn as peft draws in training, true divergences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

import lightning_peft as lp
from lightning_peft.core.drawn import Drawn, divergence
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import StepContext
from lightning_peft.strategies.sharding import _check_adapters
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, loaded, run


def one_layer(**fields: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    lp.attach(model, lp.MonteCLoRA(**{"r": 3, "target_modules": ["0"], **fields}))
    adapter: Any = model.get_submodule("0.peft.default")
    with torch.no_grad():
        adapter.B.normal_()
    return model, adapter


def test_noise_has_pefts_spread() -> None:
    """Per row of A: the mean of squares over many draws, ours and those of peft's sampler."""
    torch.manual_seed(3)
    r, width, n, noise = 3, 40, 4, 0.1
    theirs = MontecloraSampler(width, r, n, sample_scaler=noise, buffer_size=500, device="cpu")
    ours = Drawn(
        LowRank(torch.zeros(r, width), torch.eye(r)),
        theirs.std_prior.detach(),
        theirs.expert_weights_prior.detach(),
        noise,
    )

    class Ops:
        def low_rank(self, m: Any, x: Tensor, A: Tensor, B: Tensor, s: Any) -> Tensor:
            return s * (x @ A.mT) @ B.mT

    eye = torch.eye(width)
    with torch.no_grad():
        want = []
        for _ in range(500):
            samples, weights = theirs()
            want.append(torch.einsum("n,nij->ij", weights, samples).square().mean(0))

        class Site:
            module = None

        got = [ours.apply(Ops(), Site(), eye).square().mean(0) for _ in range(500)]  # type: ignore[arg-type]
    mean_want, mean_got = torch.stack(want).mean(0), torch.stack(got).mean(0)
    torch.testing.assert_close(mean_got, mean_want, rtol=0.12, atol=0)


def test_divergences_are_those_of_the_distributions() -> None:
    _, adapter = one_layer(kl_weight=1.0, dirichlet_prior=0.7, samples=4)
    site, p = adapter.site, adapter.tensors()
    found = adapter.method.penalty(StepContext(0, None, [(site, p)]))
    r, n = 3, 4
    a = p["log_concentration"].exp()
    dirichlet = kl_divergence(Dirichlet(a), Dirichlet(torch.full((n,), 0.7)))
    variance = (2 * p["log_std"]).exp()
    wishart = 0.5 * r * (variance.sum() - variance.log().sum() - r)
    torch.manual_seed(0)
    zero = torch.zeros(r)
    normal = MultivariateNormal(zero, torch.eye(r))
    draws = torch.randn(4000, r, r).square().sum(1) * variance
    drawn = MultivariateNormal(zero, torch.diag_embed(draws))
    gaussian = n * kl_divergence(drawn, normal).mean()
    torch.testing.assert_close(found, dirichlet + wishart + gaussian, rtol=0.03, atol=0.0)
    at_prior = {"log_std": torch.zeros(r), "log_concentration": torch.full((n,), 0.7).log()}
    assert divergence(**at_prior, concentration=0.7) > -1e-5


def test_training_draws_and_eval_does_not() -> None:
    model, adapter = one_layer(noise=0.05)
    x = torch.randn(4, 6)
    model.eval()
    want = model(x)
    assert torch.equal(want, model(x))
    W = adapter.site.weight() + adapter.method.scaling(adapter.site, 3) * adapter.B @ adapter.A
    torch.testing.assert_close(want, nn.functional.linear(x, W, model[0].bias))
    model.train()
    drawn = torch.stack([model(x) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - want).abs() / (drawn.std(0) / 400**0.5)
    assert float(error.detach().max()) < 5
    drawn.square().sum().backward()
    assert all(adapter.get_parameter(k).grad.abs().sum() > 0 for k in ("log_std", "A", "B"))
    lp.merge(model)
    torch.testing.assert_close(model.eval()(x), want)


def test_fsdp_is_refused() -> None:
    model, _ = one_layer()
    with pytest.raises(ValueError, match="a method without a schedule, got MonteCLoRA"):
        _check_adapters(model)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_exchange(name: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj"], "t5": ["q"], "vit": ["query", "q_proj"]}[name]
    from peft.tuners.lora.config import MontecloraConfig

    base, inputs = build(name)
    config = MontecloraConfig(num_samples=3, sample_scaler=0.01)
    theirs = by_peft(base, tmp_path, r=4, target_modules=targets, monteclora_config=config)
    model = loaded(base, tmp_path)
    assert_close("peft's in ours", run(model, inputs), run(theirs, inputs), floor=1e-4)
    (method,) = vars(model)["_peft_registry"].adapters["default"].methods
    assert (type(method), method.samples, method.noise) == (lp.MonteCLoRA, 3, 0.01)
    lp.save_adapter(model, tmp_path / "again")
    again = loaded(base, tmp_path / "again")
    want = lp.adapter_state_dict(model)
    for key, tensor in lp.adapter_state_dict(again).items():
        assert torch.equal(tensor, want[key]), key
    import peft

    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).eval()
    assert_close("ours in peft", run(there, inputs), run(theirs, inputs), floor=1e-4)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"samples": 0}, "samples >= 1"),
        ({"noise": -1.0}, "noise >= 0"),
        ({"init": "eva"}, "a fixed rank"),
    ],
)
def test_bad_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lp.MonteCLoRA(**fields)
