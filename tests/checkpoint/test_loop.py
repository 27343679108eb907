"""save_checkpoint and load_checkpoint in a plain loop: strict, adapter-only, atomic."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    LoRA,
    MethodHooks,
    Quantization,
    attach,
    convert_optimizer,
    load_checkpoint,
    load_from_checkpoint,
    save_checkpoint,
)
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.optim import AdamW8bit
from tests.helpers.lightning_package import fabric
from tests.helpers.nets import (
    FEATURES,
    Plain,
    adapters_of,
    assert_same,
    build,
    loader,
    lora,
    peft,
    trainer,
)
from tests.helpers.stored import stored_tensors

NF4 = Quantization("nf4")


class Loop:
    """A training loop with dropout, shuffling, a schedule and AdamW."""

    def __init__(self, method: Any = None, optimizer: str | None = None) -> None:
        self.net = build()
        attach(self.net, method or lora(), quantization=NF4)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        if optimizer is not None:
            convert_optimizer(self.optimizer, optimizer)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.hooks = MethodHooks(self.net, self.optimizer, total_steps=16)

    @property
    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "hooks": self.hooks}

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in loader(shuffle=True):
                nn.functional.cross_entropy(self.net(x), y).backward()
                self.hooks.before_step(self.optimizer)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.scheduler.step()


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        (None, None),
        (None, "adamw_8bit"),
        (
            AdaLoRA(init_r=3, target_r=2, tinit=2, tfinal=2, deltaT=1, target_modules="all-linear"),
            None,
        ),
    ],
    ids=["LoRA", "8bit", "AdaLoRA"],
)
def test_resume_is_uninterrupted(method: Any, optimizer: str | None, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = Loop(method, optimizer)
    whole.train(2)
    save_checkpoint(whole.net, tmp_path / "a.ckpt", epoch=1, **whole.state)
    whole.train(2)
    torch.manual_seed(99)
    resumed = Loop(method, optimizer)
    assert load_checkpoint(resumed.net, tmp_path / "a.ckpt", **resumed.state) == {"epoch": 1}
    resumed.train(2)
    assert_same(dict(resumed.net.state_dict()), dict(whole.net.state_dict()))
    assert resumed.hooks.step == whole.hooks.step == 16


def test_schedules_run_by_hand() -> None:
    """AdaLoRA's budget falls from 3 layers × rank 3 to 3 × 2."""
    method = AdaLoRA(init_r=3, target_r=2, tinit=2, tfinal=2, deltaT=1, target_modules="all-linear")
    loop = Loop(method)
    loop.train(4)
    masks = [t for k, t in loop.net.state_dict().items() if k.endswith("mask")]
    assert sum(int(m.count_nonzero()) for m in masks) == 3 * 2


@pytest.mark.parametrize("wrapper", ["none", "compile", "fabric"])
def test_wrappers_leave_no_trace(wrapper: str, tmp_path: Path) -> None:
    loop = Loop()
    module: nn.Module = loop.net
    if wrapper == "compile":
        module = torch.compile(loop.net, backend="eager")  # type: ignore[assignment]
    elif wrapper == "fabric":
        module = fabric().Fabric(accelerator="cpu", devices=1).setup_module(loop.net)
        assert any(k.startswith("_forward_module.") for k, _ in module.named_parameters())
    save_checkpoint(module, tmp_path / "a.ckpt", step=3)
    written = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert_same(stored_tensors(written), adapters_of(loop.net))
    with torch.no_grad():
        for t in adapters_of(loop.net):
            loop.net.get_parameter(t).add_(1)
    assert load_checkpoint(module, tmp_path / "a.ckpt") == {"step": 3, "optimizer_states": []}
    assert_same(adapters_of(loop.net), stored_tensors(written))


def _another_base(loop: Loop) -> None:
    loop.net = build()
    with torch.no_grad():
        loop.net[3].weight[0, 0] += 1
    attach(loop.net, lora(), quantization=NF4)


def _other_rank(loop: Loop) -> None:
    loop.net = build()
    attach(loop.net, lora(r=1), quantization=NF4)


def _other_storage(loop: Loop) -> None:
    loop.net = build()
    attach(loop.net, lora())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_base, r"another one \(1 tensors differ\)[\s\S]*3\.weight: same shape, other"),
        (_other_rank, r"LoRA\.r: 2 in the file, 1 attached"),
        (_other_storage, r"written with quantization .*nf4.*, this model has None"),
    ],
    ids=["base", "rank", "storage"],
)
def test_what_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    first, second = Loop(), Loop()
    first.train(1)
    save_checkpoint(first.net, tmp_path / "a.ckpt", optimizer=first.optimizer)
    change(second)
    before = adapters_of(second.net)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(second.net, tmp_path / "a.ckpt", optimizer=second.optimizer)
    assert_same(adapters_of(second.net), before)
    assert not second.optimizer.state


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    first, second = Loop(), Loop()
    first.train(1)
    save_checkpoint(first.net, tmp_path / "a.ckpt", optimizer=first.optimizer)
    fewer = torch.optim.AdamW([p for p in second.net.parameters() if p.requires_grad][:2])
    before = adapters_of(second.net)
    with pytest.raises(ValueError, match="state of optimizer: expected the 6 parameters"):
        load_checkpoint(second.net, tmp_path / "a.ckpt", optimizer=fewer)
    with pytest.raises(ValueError, match="expected 1 optimizers, as in the file, got 2"):
        load_checkpoint(second.net, tmp_path / "a.ckpt", a=second.optimizer, b=fewer)
    with pytest.raises(ValueError, match=r"expected the state of \['scheduler'\]"):
        load_checkpoint(second.net, tmp_path / "a.ckpt", scheduler=second.scheduler)
    with pytest.raises(ValueError, match=r"with a load_state_dict, got \['epoch'\]"):
        load_checkpoint(second.net, tmp_path / "a.ckpt", epoch=1)
    assert_same(adapters_of(second.net), before)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(ValueError, match="expected a model with adapters, got Sequential"):
        save_checkpoint(build(), tmp_path / "a.ckpt")
    with pytest.raises(TypeError, match=r"got where \(PosixPath\)"):
        save_checkpoint(loop.net, tmp_path / "a.ckpt", where=tmp_path)
    with pytest.raises(ValueError, match="expected names other than"):
        save_checkpoint(loop.net, tmp_path / "a.ckpt", state_dict={})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError, match=r"path of a file to write.*last\.ckpt"):
        save_checkpoint(loop.net, tmp_path, **loop.state)


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_kill_during_a_save_leaves_the_former_file(moment: str, tmp_path: Path) -> None:
    loop = Loop()
    save_checkpoint(loop.net, tmp_path / "a.ckpt", step=1)
    former = (tmp_path / "a.ckpt").read_bytes()
    pid = os.fork()
    if pid == 0:
        owner = torch if moment == "save" else os
        setattr(owner, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save_checkpoint(loop.net, tmp_path / "a.ckpt", step=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "a.ckpt").read_bytes() == former
    assert load_checkpoint(loop.net, tmp_path / "a.ckpt")["step"] == 1
    save_checkpoint(loop.net, tmp_path / "a.ckpt", step=3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.usefixtures("lightning_package")
def test_files_of_loop_and_trainer_are_read_by_both(tmp_path: Path) -> None:
    module = Plain()
    run = trainer(peft(quantization=NF4), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "trainer.ckpt")
    fresh = Plain()
    attach(fresh, lora(), quantization=NF4)
    optimizer = torch.optim.AdamW(fresh.parameters())
    rest = load_checkpoint(fresh, tmp_path / "trainer.ckpt", optimizer=optimizer)
    assert rest["global_step"] == 4
    assert_same(adapters_of(fresh), adapters_of(module))
    assert len(optimizer.state) == 6
    save_checkpoint(fresh, tmp_path / "loop.ckpt")
    loaded = load_from_checkpoint(Plain, tmp_path / "loop.ckpt")
    assert_same(adapters_of(loaded), adapters_of(fresh))
    tested = Plain()
    trainer(peft(quantization=NF4)).test(
        tested, ckpt_path=str(tmp_path / "loop.ckpt"), verbose=False
    )
    assert_same(adapters_of(tested), adapters_of(fresh))


def test_the_optimizer_of_fabric_is_converted() -> None:
    net = build()
    attach(net, LoRA(r=2, target_modules="all-linear"))
    loop = fabric().Fabric(accelerator="cpu", devices=1)
    model = loop.setup_module(net)
    optimizer = loop.setup_optimizers(torch.optim.AdamW(net.parameters(), lr=1e-2))
    convert_optimizer(optimizer, "adamw_8bit")
    assert isinstance(optimizer.optimizer, AdamW8bit)
    before = adapters_of(net)
    for x, y in loader():
        loop.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in adapters_of(net).items())


def test_half_precision_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def half() -> tuple[nn.Module, nn.Module]:
        net = build()
        attach(net, lora())
        loop = fabric().Fabric(accelerator="cpu", devices=1, precision="16-true")
        return net, loop.setup_module(net)

    net, model = half()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    hooks = MethodHooks(model, optimizer)
    model(torch.ones(2, FEATURES)).square().mean().backward()
    with pytest.raises(ValueError, match=r"16-mixed.*adamw_8bit"):
        hooks.before_step(optimizer)
    convert_optimizer(optimizer, "adamw_8bit")
    hooks.before_step(optimizer)
    optimizer.step()
    save_checkpoint(model, tmp_path / "a.ckpt", optimizer=optimizer)
    again, wrapped = half()
    load_checkpoint(wrapped, tmp_path / "a.ckpt")
    assert_same(adapters_of(again), adapters_of(net))
    assert all(bool(p.isfinite().all()) for p in trained)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    loop = Loop()
    save_checkpoint(loop.net, tmp_path / "a.ckpt")
    former = (tmp_path / "a.ckpt").read_bytes()
    with torch.no_grad():
        loop.net.get_parameter("0.peft.default.A")[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"expected finite.*0\.peft\.default\.A.*not wri"):
        save_checkpoint(loop.net, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == former
