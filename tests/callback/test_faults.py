"""Non-finite steps and weights, SIGTERM, and optimizer states of a file, in one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, adapters_of, assert_same, peft, trainer
from tests.helpers.stored import stored_tensors
from tests.helpers.streams import Stream

pytestmark = pytest.mark.usefixtures("lightning_package")


class Bad(Plain):
    """Has NaN in the loss of some batches."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.bad = bad

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        return loss * float("nan") if self.global_step in self.bad else loss


def test_a_step_with_nan_is_skipped_and_said() -> None:
    model = Bad((1, 2))
    with pytest.warns(UserWarning, match=r"a gradient is NaN or infinite.*\(2 so far\)"):
        trainer(peft()).fit(model)
    assert all(bool(t.isfinite().all()) for t in adapters_of(model).values())


def test_ten_in_a_row_end_the_run(tmp_path: Path) -> None:
    model = Bad(tuple(range(4, 99)))
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(RuntimeError, match="in 10 steps in a row"),
    ):
        trainer(peft(), max_epochs=9, folder=tmp_path).fit(model)
    written = stored_tensors(tmp_path / "last.ckpt")
    assert all(bool(t.isfinite().all()) for t in written.values())


def poisoning(epoch: int) -> Any:
    class Poison(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == epoch:
                with torch.no_grad():
                    next(iter(module.net[0].peft["default"].parameters())).fill_(torch.nan)

    return Poison()


def test_weights_that_are_not_finite_replace_no_file(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=1, save_last=True, save_on_train_epoch_end=True
    )
    with pytest.raises(RuntimeError, match=r"expected finite weights to save.*untouched"):
        trainer(peft(), poisoning(1), saver, max_epochs=3).fit(Plain())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        state = stored_tensors(file)
        assert all(bool(t.isfinite().all()) for t in state.values())


class Normed(Plain):
    """Its statistics meet a NaN in the second epoch; its mask has an infinity from the start."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            self.norm(batch[0] * torch.nan)
        self.mask[0] -= 1
        return super().training_step([self.norm(batch[0]), *batch[1:]], batch_idx)


@pytest.mark.parametrize("root", [None, "net"])
@pytest.mark.parametrize("form", ["adapters", "full", "merged"])
def test_statistics_that_are_not_finite_replace_no_file(
    root: str | None, form: Any, tmp_path: Path
) -> None:
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=1, save_last=True, save_on_train_epoch_end=True
    )
    with pytest.raises(RuntimeError, match=r"expected finite weights to save.*norm\.running_mean"):
        trainer(peft(root=root, checkpoint=form), saver, max_epochs=3).fit(Normed())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    if form != "merged":
        module = load_from_checkpoint(Normed, files[0])
        assert module.mask.isinf().tolist() == [False, True]


# ---- SIGTERM


class Copying(Plain):
    """Learns its input; sends itself SIGTERM in one batch."""

    def __init__(self, term_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8))
        self.term_at = term_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.net(batch) - batch).square().mean()


def stream_run(model: Any, folder: Path, ckpt: Any = None, steps: int = 6) -> Any:
    pl.seed_everything(0, verbose=False)
    it = trainer(
        PEFT(LoRA(r=2, target_modules=["0"]), report=False),
        pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=2),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=4,
    )
    it.fit(model, Stream(), ckpt_path=ckpt)
    return it


@pytest.mark.parametrize("batch", [8, 9, 10, 11])
def test_sigterm_inside_a_window(batch: int, tmp_path: Path) -> None:
    without_stop, stopped, again = Copying(), Copying(batch), Copying()
    stream_run(without_stop, tmp_path / "whole")
    folder = tmp_path / "parts"
    with pytest.raises(BaseException, match="143"):
        stream_run(stopped, folder)
    file = folder / "sigterm.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == 3
    stream_run(again, folder, "last")  # newer than last.ckpt, of step 2
    assert_same(adapters_of(again), adapters_of(without_stop))
    assert sorted(p.name for p in folder.iterdir() if "sigterm" in p.name) == []


# ---- optimizer states of a file


@pytest.fixture(scope="module")
def saved(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    it = trainer(peft(optimizer="adamw_8bit"), max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(path)
    return path


WRONG: dict[str, tuple[str, Any, str]] = {
    "nan": ("absmax2", lambda t: t * torch.nan, "absmax2: expected finite"),
    "infinite": ("absmax1", lambda t: t / 0, "absmax1: expected finite"),
    "half": ("absmax1", Tensor.half, "absmax1: expected float32, got torch.float16"),
    "integers": ("state1", Tensor.long, "state1: expected uint8, got torch.int64"),
    "empty": ("state2", lambda t: t[:0], r"state2: expected \d+ elements, got 0"),
    "missing": ("absmax1", None, "expected absmax1, got"),
    "negative": ("absmax2", lambda t: t - 1, "absmax2: expected values of at least 0"),
    "no tensor": ("state1", lambda t: "x", "state1|absmax1"),
    "step": ("step", lambda t: t * torch.nan, "step: expected finite"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_state_that_does_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    key, change, match = WRONG[case]
    content = torch.load(saved, weights_only=True)
    state = next(iter(content["optimizer_states"][0]["state"].values()))
    if change is None:
        del state[key]
    else:
        state[key] = change(state[key])
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"(?s)state of optimizer 0.*net\.0\.peft.*({match})"):
        trainer(peft(optimizer="adamw_8bit")).fit(Plain(), ckpt_path=tmp_path / "a.ckpt")


def test_a_rate_that_is_nan(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["optimizer_states"][0]["param_groups"][0]["lr"] = float("nan")
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="group 0: lr: expected finite numbers, got nan"):
        trainer(peft(optimizer="adamw_8bit")).fit(Plain(), ckpt_path=tmp_path / "a.ckpt")
