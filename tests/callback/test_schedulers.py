"""LoRA+ adds a group per optimizer group; every scheduler follows, and a run with one resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_peft import PEFT, LoRAPlus
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, assert_same, trainer

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.LinearLR(o, 0.1, total_iters=2),
            schedulers.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False),
        ],
        [2],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda e: 0.9**e for _ in o.param_groups]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda e: 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(
        o, patience=0, min_lr=[1e-5 for _ in o.param_groups]
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),
}


class Scheduled(Plain):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        first = {id(p) for p in self.net[0].parameters()}
        rest = [p for p in self.parameters() if id(p) not in first]
        groups = [{"params": self.net[0].parameters()}, {"params": rest, "lr": 5e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = SCHEDULERS[self.kind](optimizer)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def fit(kind: str, **options: Any) -> tuple[Plain, list[float]]:
    module = Scheduled(kind)
    pl.seed_everything(1, verbose=False)
    method = LoRAPlus(r=2, ratio=4.0, target_modules="all-linear")
    folder, ckpt = options.get("folder"), options.get("ckpt")
    run = trainer(PEFT(method, report=False), folder=folder)
    run.fit(module, ckpt_path=ckpt)
    return module, [group["lr"] for group in run.optimizers[0].param_groups]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rates_follow_and_the_run_resumes(kind: str, tmp_path: Path) -> None:
    whole, rates = fit(kind, folder=tmp_path)
    assert rates[2:] == pytest.approx([4 * rate for rate in rates[:2]])
    resumed, again = fit(kind, ckpt=tmp_path / "epoch=0.ckpt")
    assert again == rates
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
