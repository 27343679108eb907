"""Adapters are found wherever they are: below the root, in a part, under a new module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.checkpoint.description import describe
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import trainer

LORA = lp.LoRA(r=2, target_modules="all-linear")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Stage(InPackage):
    """A LightningModule around a net that lives longer, as scvi-tools makes one per `train()`."""

    def __init__(self, module: nn.Module, attribute: str = "net") -> None:
        super().__init__()
        self.attribute = attribute
        setattr(self, attribute, module)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.attribute)(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - 1).pow(2).mean()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


def data() -> Any:
    return torch.utils.data.DataLoader(X, batch_size=8)


def callback(**options: Any) -> lp.PEFT:
    return lp.PEFT(LORA, report=False, **options)


@pytest.mark.usefixtures("lightning_package")
@pytest.mark.parametrize("attribute", ["net", "model"])
def test_a_new_module_around_the_net_continues(attribute: str, tmp_path: Path) -> None:
    shared = net()
    trainer(callback(), max_epochs=3).fit(Stage(shared), data())
    trained, y = shared[0].peft["default"].B.detach().clone(), shared(X).detach()
    assert trained.any()
    predicted = trainer(callback()).predict(Stage(shared, attribute), data())
    assert_same_bits("predicted", torch.cat(predicted), y)

    class See(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert torch.equal(shared[0].peft["default"].B, trained)

    second = Stage(shared, attribute)
    run = trainer(callback(), See(), max_epochs=1)
    run.fit(second, data())
    assert not torch.equal(shared[0].peft["default"].B, trained)
    run.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Stage(net(), attribute)
    loaded = trainer(callback()).predict(fresh, data(), ckpt_path=tmp_path / "a.ckpt")
    assert_same_bits("reloaded", torch.cat(loaded), shared(X).detach())


def test_a_part_of_the_root() -> None:
    whole = nn.Module()
    whole.net, whole.other = net(), nn.Linear(8, 8)
    lp.attach(whole, LORA)
    with torch.no_grad():
        for p in whole.parameters():
            if p.requires_grad:
                p += 0.1
    y = whole.net(X).detach()
    assert set(lp.adapter_state_dict(whole.net)) == {
        f"{i}.peft.default.{t}" for i in (0, 2) for t in "AB"
    }
    lp.set_adapter(whole.net, None)
    assert not torch.equal(whole.net(X), y)
    assert whole.other.peft["default"].A.requires_grad  # the other part is as it was
    lp.set_adapter(whole, "default")
    assert_close("merged part", (lp.merge(whole.net), whole.net(X))[1], y, floor=1e-6)
    lp.unmerge(whole.net)
    with pytest.raises(ValueError, match="got a part of it"):
        lp.detach(whole.net)
    lp.detach(whole)
    assert not any("peft" in key for key in whole.state_dict())


def test_an_adapter_that_was_loaded_before_is_continued(tmp_path: Path) -> None:
    source = net()
    lp.attach(source, LORA)
    with torch.no_grad():
        source[0].peft["default"].B += 0.1
    lp.save_adapter(source, tmp_path)
    model = net()
    lp.load_adapter(model, tmp_path)
    before = model(X).detach()
    module = Stage(model)
    trainer(lp.PEFT(lp.LoRA(r=2), report=False), max_epochs=1).fit(module, data())
    assert list(model[0].peft) == ["default"]
    assert not torch.equal(model(X), before)
    with pytest.raises(RuntimeError, match="expected the configuration that is attached already"):
        trainer(lp.PEFT(lp.LoRA(r=3), report=False), max_epochs=1).fit(Stage(model), data())


def test_the_last_named_copy_acts() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for i, name in enumerate(("a", "b")):
        lp.attach(model, lp.Full(target_modules=["0"]), adapter_name=name)
        with torch.no_grad():
            model[0].peft[name].bias += i + 1
    alone = {}
    for name in ("a", "b"):
        lp.set_adapter(model, name)
        alone[name] = model(X).detach()
    lp.set_adapter(model, ["a", "b"])
    assert_same_bits("a, b", model(X).detach(), alone["b"])
    lp.set_adapter(model, ["b", "a"])
    assert_same_bits("b, a", model(X).detach(), alone["a"])
    y = model(X).detach()
    lp.merge(model)
    assert_same_bits("merged", model(X).detach(), y)


class Moving(nn.Module):
    """Has a base tensor that its own forward moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(self.encoder(x)) + self.calls


@pytest.mark.usefixtures("lightning_package")
@pytest.mark.parametrize("part", ["", "encoder"])
def test_the_file_of_a_part_is_that_of_the_part(part: str, tmp_path: Path) -> None:
    """The root is gone or in use: the part's file has the part's names, and what moved in it."""
    shared = Moving()
    stage = Stage(shared)
    trainer(callback(), max_epochs=2).fit(stage, data())
    before = describe(stage)["roots"]
    lp.save_checkpoint(shared.get_submodule(part), tmp_path / "a.ckpt")
    assert describe(stage)["roots"] == before
    fresh = Moving()
    lp.attach(fresh.get_submodule(part), LORA)
    lp.load_checkpoint(fresh.get_submodule(part), tmp_path / "a.ckpt")
    ours, theirs = fresh.get_submodule(part).eval(), shared.get_submodule(part).eval()
    assert_same_bits("loaded", ours(X).detach(), theirs(X).detach())
    lp.load_checkpoint(theirs, tmp_path / "a.ckpt")


def test_a_copy_made_after_attaching_is_named(tmp_path: Path) -> None:
    stage = Stage(net())
    lp.attach(stage, LORA)
    stage.teacher = copy.deepcopy(stage.net)
    for call in (lp.merge, lambda m: lp.save_checkpoint(m, tmp_path / "last.ckpt")):
        with pytest.raises(RuntimeError, match=r"copies of them under \['teacher'\].*del module"):
            call(stage)
    del stage.teacher
    lp.save_checkpoint(stage, tmp_path / "last.ckpt")  # nothing of the training is lost
