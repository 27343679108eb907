"""A checkpoint inside an accumulation window holds the window's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.checkpoint.description import KEY
from tests.checkpoint.window_job import Net, SaveAt
from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current, pl
from tests.helpers.nets import Plain, assert_same, peft, trainer
from tests.helpers.streams import Stream

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


@pytest.mark.parametrize("strategy", ["", "peft_ddp", "peft_fsdp"])
def test_a_run_resumes_inside_a_window(strategy: str, tmp_path: Path) -> None:
    out = run_function(
        "tests.checkpoint.window_job:main",
        [str(tmp_path), strategy],
        tmp_path,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    assert out.strip().endswith("equal"), out[-3000:]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a run of windows of two batches, saved after each batch."""
    fit(tmp_path, SaveAt(tmp_path))
    return tmp_path


def fit(folder: Path, *callbacks: Any, ckpt: Path | None = None) -> None:
    run = trainer(peft(), *callbacks, max_epochs=1, accumulate_grad_batches=2)
    run.fit(Plain(), ckpt_path=ckpt)


def changed(path: Path, gradients: list[dict[str, torch.Tensor]] | None) -> Path:
    content = torch.load(path, weights_only=True)
    content[KEY].pop("gradients")
    if gradients is not None:
        content[KEY]["gradients"] = gradients
    torch.save(content, path)
    return path


def test_files_between_windows_hold_no_gradients(saved: Path) -> None:
    held = [
        "gradients" in torch.load(saved / f"{i}.ckpt", weights_only=True)[KEY] for i in range(4)
    ]
    assert held == [True, False, True, False]


def test_lost_gradients_are_told(saved: Path) -> None:
    with pytest.warns(UserWarning, match="inside an accumulation window: expected gradients of 1"):
        fit(saved, ckpt=changed(saved / "2.ckpt", None))


@pytest.mark.parametrize(
    ("name", "gradient", "message"),
    [
        (
            "net.0.peft.default.A",
            torch.zeros(3),
            r"net\.0\.peft\.default\.A: expected shape \[2, 8",
        ),
        ("net.9.A", torch.zeros(3), r"net\.9\.A: expected a trained parameter"),
        (
            "net.0.peft.default.A",
            torch.zeros(2, 8, dtype=torch.int8),
            "a list of gradients by name",
        ),
    ],
)
def test_foreign_gradients_are_refused(
    name: str, gradient: torch.Tensor, message: str, saved: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(saved, ckpt=changed(saved / "2.ckpt", [{name: gradient}]))


def test_a_schedule_of_the_windows_size_goes_on(tmp_path: Path) -> None:
    """Lightning asks it at the start of an epoch; this one starts in the middle."""

    def ended(folder: Path, *callbacks: Any, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        schedule = pl.callbacks.GradientAccumulationScheduler({0: 3})
        module = Net()
        pl.seed_everything(1, verbose=False)
        run = trainer(peft(), schedule, *callbacks, max_epochs=1, default_root_dir=folder)
        run.fit(module, Stream(12), ckpt_path=ckpt)
        assert run.global_step == 4
        return dict(module.state_dict())

    whole = ended(tmp_path, SaveAt(tmp_path))
    for batch in (4, 5):  # in a window and after one
        assert_same(ended(tmp_path, ckpt=tmp_path / f"{batch}.ckpt"), whole)
