"""Promise 1: a file holds whatever the module's own code does not rebuild.

What was ever trained or owned by an optimizer, and every tensor of the base whose content moved.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft import PEFT, LoRA, Quantization
from lightning_peft.checkpoint.contents import KEY
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import assert_same, trainer

pytestmark = pytest.mark.usefixtures("lightning_package")


def data(**options: Any) -> DataLoader[Any]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=16, **options)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))


@torch.no_grad()
def update_momentum(model: nn.Module, average: nn.Module, m: float) -> None:
    """As lightly has it: parameter by parameter, in the order of `parameters()`."""
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_mul_(ours, m)
    torch._foreach_add_(ours, theirs, alpha=1 - m)


class SelfSupervised(InPackage):
    """A student and an EMA teacher, as in lightly's BYOL (a copy) and DINO (a start of its own)."""

    def __init__(self, own_start: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.projection_head = perceptron(), perceptron()
        self.prediction_head = perceptron()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        head = perceptron() if own_start else copy.deepcopy(self.projection_head)
        self.projection_head_momentum = head
        for module in (self.backbone_momentum, self.projection_head_momentum):
            module.requires_grad_(False)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, 0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, 0.9)
        y = self.prediction_head(self.projection_head(self.backbone(batch[0])))
        with torch.no_grad():
            z = self.projection_head_momentum(self.backbone_momentum(batch[0]))
        loss = (y - z).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(module: pl.LightningModule, callback: PEFT, epochs: int, ckpt: Path | None = None) -> Any:
    pl.seed_everything(0 if ckpt is None else 5, verbose=False)
    it = trainer(callback, max_epochs=epochs)
    it.fit(module, data(), ckpt_path=ckpt)
    return it


TEACHERS = ["backbone_momentum", "projection_head_momentum"]
CONFIGURATIONS: dict[str, Callable[[], PEFT]] = {
    "lora": lambda: PEFT(LoRA(r=2, target_modules="all-linear"), report=False),
    "root": lambda: PEFT(LoRA(r=2, target_modules="all-linear"), report=False, root="backbone"),
    "pissa": lambda: PEFT(LoRA(r=2, init="pissa", target_modules="all-linear"), report=False),
    "nf4": lambda: PEFT(
        LoRA(r=2, target_modules="all-linear"),
        quantization=Quantization("nf4", exclude_modules=TEACHERS),
        report=False,
    ),
    "nf4 root": lambda: PEFT(
        LoRA(r=2, target_modules="all-linear"),
        quantization=Quantization("nf4", exclude_modules=TEACHERS),
        root="backbone",
        report=False,
    ),
}


@pytest.mark.parametrize("own_start", [False, True], ids=["byol", "dino"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ema_teachers_resume_exactly(name: str, own_start: bool, tmp_path: Path) -> None:
    whole, half, resumed = (SelfSupervised(own_start) for _ in range(3))
    fit(whole, CONFIGURATIONS[name](), 2)
    fit(half, CONFIGURATIONS[name](), 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, CONFIGURATIONS[name](), 2, tmp_path / "half.ckpt")
    assert resumed.losses[-4:] == whole.losses[-4:]
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert not any(p.requires_grad for n, p in whole.named_parameters() if "momentum" in n)
    loaded = lp.load_from_checkpoint(SelfSupervised, tmp_path / "half.ckpt", own_start=own_start)
    assert_same(dict(loaded.state_dict()), dict(half.state_dict()))


def test_averaging_packed_weights_names_the_layers_and_the_way_out() -> None:
    callback = PEFT(LoRA(r=2, target_modules="all-linear"), quantization="nf4", report=False)
    with pytest.raises(RuntimeError, match=r"backbone\.0.*exclude_modules=\['backbone_momentum'"):
        fit(SelfSupervised(), callback, 1)


def test_what_the_user_froze_gets_no_adapters_unless_named() -> None:
    def net() -> nn.Module:
        model = nn.Module()
        model.net, model.loss_net = perceptron(), nn.Linear(16, 16).requires_grad_(False)
        return model

    model = net()
    report = lp.attach(model, LoRA(r=2, target_modules="all-linear"))
    assert "peft" not in dict(model.loss_net.named_children())
    assert ("loss_net", "frozen before attach; name it in target_modules to adapt it") in (
        report.skipped
    )
    model = net()
    lp.attach(model, LoRA(r=2, target_modules=["net.0", "loss_net"]))
    assert "peft" in dict(model.loss_net.named_children())
    frozen = perceptron().requires_grad_(False)  # frozen as a whole, in preparation
    lp.attach(frozen, LoRA(r=2, target_modules="all-linear"))
    assert any(p.requires_grad for p in frozen.parameters())


class Adversarial(InPackage):
    """Generator and discriminator in turns, in the order of pix2pix."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(2)
        self.G, self.D = nn.Linear(16, 16), nn.Linear(16, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        x = batch[0]
        self.D.requires_grad_(True)
        discriminator.zero_grad()
        self.manual_backward(self.D(self.G(x).detach()).mean() - self.D(x).mean())
        discriminator.step()
        self.D.requires_grad_(False)
        generator.zero_grad()
        self.manual_backward(-self.D(self.G(x)).mean())
        generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), 1e-2) for m in (self.G, self.D)]


class WarmUp(InPackage):
    """A head outside of the root that is trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enc, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.head.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.head.requires_grad_(self.current_epoch >= 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.enc(batch[0])).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class FrozenLater(WarmUp):
    """A head outside of the root that is frozen after the first epoch."""

    def on_train_epoch_start(self) -> None:
        self.head.requires_grad_(self.current_epoch < 1)


@pytest.mark.parametrize(
    ("cls", "root", "part"),
    [(Adversarial, "G", "D"), (WarmUp, "enc", "head"), (FrozenLater, "enc", "head")],
)
def test_parts_outside_the_root(
    cls: type[pl.LightningModule], root: str, part: str, tmp_path: Path
) -> None:
    callback = lambda: PEFT(LoRA(r=2), root=root, report=False)  # noqa: E731
    whole, half, resumed = cls(), cls(), cls()
    fit(whole, callback(), 3)
    fit(half, callback(), 2).save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)[KEY]["kept"]
    assert kept == [f"{part}.bias", f"{part}.weight"]
    fit(resumed, callback(), 3, tmp_path / "half.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    loaded = lp.load_from_checkpoint(cls, tmp_path / "half.ckpt")
    assert_same(dict(loaded.state_dict()), dict(half.state_dict()))


class Thawing(WarmUp):
    """Unfreezes the base, inside of training."""

    def __init__(self, where: str = "epoch") -> None:
        super().__init__()
        self.where = where

    def on_train_epoch_start(self) -> None:
        if self.where == "epoch":
            self.enc.requires_grad_(True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.where == "step":
            self.enc.requires_grad_(True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["epoch", "step"])
def test_an_unfrozen_base_is_refused_before_it_is_trained(where: str) -> None:
    module = Thawing(where)
    before = module.enc.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"2 of its parameters unfrozen \(enc\.weight"):
        fit(module, PEFT(LoRA(r=2, target_modules=["enc"]), report=False), 1)
    assert torch.equal(module.enc._parameters["weight"], before)


def test_a_base_trained_past_the_trainer_is_saved(tmp_path: Path) -> None:
    """Manual optimization with an optimizer that the Trainer never sees."""

    class Manual(WarmUp):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            with torch.no_grad():
                self.enc._parameters["bias"].add_(0.1)

    module = Manual()
    it = fit(module, PEFT(LoRA(r=2, target_modules=["enc"]), report=False), 1)
    it.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lp.load_from_checkpoint(Manual, tmp_path / "a.ckpt")
    assert torch.equal(loaded.enc._parameters["bias"], module.enc._parameters["bias"])


def test_the_files_own_list_decides(tmp_path: Path) -> None:
    module = WarmUp()
    it = fit(module, PEFT(LoRA(r=2), root="enc", report=False), 1)
    it.save_checkpoint(tmp_path / "a.ckpt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=True)

    def refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
        checkpoint = copy.deepcopy(whole)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=message):
            lp.load_from_checkpoint(WarmUp, tmp_path / "b.ckpt")

    refused(lambda c: c["state_dict"].pop("head.bias"), r"missing head\.bias")
    refused(lambda c: c["state_dict"].update(other=torch.ones(1)), "extra other")
    refused(lambda c: c[KEY]["kept"].remove("head.bias"), r"extra head\.bias")


def test_a_frozen_block_of_a_stack_is_no_teacher_of_another() -> None:
    """As in N-BEATS of darts, whose last backcast is frozen: an equal name but for the index."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].requires_grad_(False)
    lp.attach(model, LoRA(r=2, target_modules="all-linear"))
    assert [name for name, m in model.named_modules() if "peft" in m._modules] == ["0", "1"]


class Pair(nn.Module):
    """A student and a frozen copy of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


@pytest.mark.parametrize(
    "method",
    [
        lp.FourierFT(n_frequency=20),
        lp.C3A(block_size=4),
        lp.UniLoRA(r=2),
        lp.VBLoRA(r=2, vector_length=4, num_vectors=8, topk=2),
        lp.LoRA(r=2, init="pissa"),
    ],
    ids=lambda m: m.label,
)
def test_adapters_that_begin_at_random_leave_the_teacher_as_it_is(method: Any) -> None:
    model, x = Pair(), torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    want = model.teacher(x)
    report = lp.attach(model, dataclasses.replace(method, target_modules="all-linear"))
    assert report.followers == ["teacher.0", "teacher.2"]
    assert [group.path for group in report.groups] == ["student.*"]
    assert "frozen by you: teacher (a copy of an adapted part" in str(report)
    torch.testing.assert_close(model.teacher(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [lp.FourierFT(n_frequency=20), lp.C3A(block_size=4)], ids=repr)
def test_a_teacher_of_such_adapters_is_the_average_of_the_weights(method: Any) -> None:
    model, x = Pair(), torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    lp.attach(model, dataclasses.replace(method, target_modules="all-linear"))
    dense = copy.deepcopy(Pair().teacher)
    for _ in range(3):
        with torch.no_grad():
            for p in model.student.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        update_momentum(model.student, model.teacher, 0.9)
        merged = lp.merge_and_unload(copy.deepcopy(model)).student
        update_momentum(merged, dense, 0.9)
    torch.testing.assert_close(model.teacher(x), dense(x), rtol=1e-4, atol=1e-5)
