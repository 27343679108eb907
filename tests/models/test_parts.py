"""Adapters on parts of vision-language models: places, limits, packed bases, exchange with peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    IA3,
    PEFT,
    Activations,
    LoRA,
    attach,
    chunk_losses,
    limit_activations,
    load_adapter,
    save_adapter,
)
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.losses.deferred_logits import DeferredLogits
from lightning_peft.models.parts import parts_of
from tests.helpers.lightning_package import InPackage
from tests.helpers.nets import trainer
from tests.helpers.tiny_models import BUILDERS
from tests.helpers.vision_language import MODELS, built, inputs

QUICK = {"llava", "gemma3", "idefics2", "qwen2_vl"}
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


def places(model: nn.Module) -> set[str]:
    return {name for name, _ in adapted_modules(model)}


@pytest.mark.parametrize("name", NAMES)
def test_usual_layers_of_a_part(name: str) -> None:
    _, language, vision, vision_layers = MODELS[name]
    found: dict[str, set[str]] = {}
    for rule in ("language", "vision", "language+vision"):
        model = built(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(model, LoRA(r=2, target_modules=rule))
        found[rule] = places(model)
    assert all(n.startswith(f"{language}.") for n in found["language"])
    assert {n.rpartition(".")[2] for n in found["language"]} == {"q_proj", "v_proj"}
    assert all(n.startswith(f"{vision}.") for n in found["vision"])
    assert {n.rpartition(".")[2] for n in found["vision"]} == vision_layers
    assert found["language+vision"] == found["language"] | found["vision"]
    model = built(name)
    attach(model, LoRA(r=2, target_modules="all-linear", exclude_modules="vision"))
    assert found["language"] < places(model)
    assert not any(n.startswith(f"{vision}.") for n in places(model))
    attach(model, IA3(target_modules="vision"), adapter_name="scales")
    assert any(n.startswith(f"{vision}.") for n in places(model))


def test_models_without_parts() -> None:
    llama = BUILDERS["llama"]()
    assert parts_of(llama) == {"language": [], "vision": []}
    with pytest.raises(ValueError, match="'vision', which matches none"):
        attach(llama, LoRA(r=2, target_modules="vision"))
    clip = BUILDERS["clip"]()
    attach(clip, LoRA(r=2, target_modules="vision"))
    assert all(n.startswith("vision_model.") for n in places(clip))


def adapted(name: str, quantization: str | None = None) -> Any:
    model = built(name)
    attach(model, LoRA(r=2, target_modules="language+vision"), quantization=quantization)
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def step(model: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**x, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_limits(name: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(name, quantization), inputs(name)
    want = step(model, x)
    _, language, vision, _ = MODELS[name]
    for part in (language, vision):
        assert any(n.startswith(f"{part}.") and g.any() for n, g in want.items())
    for kind in ("checkpoint", "offload", "checkpoint+offload"):
        with limit_activations(model, Activations(kind, min_bytes=0)) as limit:
            got = step(model, x)
        assert {n.rpartition(".")[0].startswith(language) for n in limit.blocks} == {True, False}
        assert [n for n in want if not torch.equal(got[n], want[n])] == []
    monkeypatch.setattr(DeferredLogits, "tensor", None)
    with chunk_losses(model):
        got = step(model, x)
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-6, msg=n)


@pytest.mark.parametrize("name", NAMES)
def test_exchange_with_peft(name: str, tmp_path: Path) -> None:
    model, x = adapted(name).eval(), inputs(name)
    with torch.no_grad():
        want = model(**x).logits
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(built(name).eval(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**x).logits, want, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = built(name).eval()
    load_adapter(back, tmp_path / "theirs")
    assert places(back) == places(model)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(**x).logits, want, rtol=1e-4, atol=1e-5)


class Captions(InPackage):
    """Trains on one batch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net: Any = built(name)
        self.batch = inputs(name)
        self.losses = list[float]()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 3, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("lightning_package")
@pytest.mark.one_package
def test_in_the_trainer() -> None:
    runs = []
    for limits in ({}, {"activations": "checkpoint", "loss": "chunked"}):
        model = Captions("qwen2_vl")
        method = LoRA(r=2, target_modules="language+vision")
        callback = PEFT(method, quantization="nf4", report=False, **limits)  # type: ignore[arg-type]
        trainer(callback, max_epochs=1).fit(model)
        runs.append(model.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][-1] < runs[0][0]
