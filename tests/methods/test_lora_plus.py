"""LoRA+ in the Trainer: groups split once, schedulers follow, resume is exact, peft reads LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.adapted import adapters_of as of_module
from tests.helpers.compare import assert_close
from tests.helpers.nets import Plain, adapters_of, assert_same, trainer
from tests.helpers.peft_exchange import build, in_peft, run, trained


class Scheduled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def callback() -> lp.PEFT:
    return lp.PEFT(lp.LoRAPlus(r=2, ratio=8.0, target_modules="all-linear"), report=False)


def test_rates_and_schedule() -> None:
    module = Scheduled()
    it = trainer(callback(), max_epochs=1)
    it.fit(module)
    names = {id(p): n for n, p in module.named_parameters()}
    slow, fast = it.optimizers[0].param_groups
    assert {names[id(p)].rpartition(".")[2] for p in slow["params"] if p.requires_grad} == {"A"}
    assert {names[id(p)].rpartition(".")[2] for p in fast["params"]} == {"B"}
    assert slow["lr"] == 1e-3 / (1 + it.global_step)
    assert fast["lr"] == 8 * slow["lr"]


def test_resume(tmp_path: Path) -> None:
    whole, first, second = Scheduled(), Scheduled(), Scheduled()
    pl.seed_everything(1, verbose=False)
    trainer(callback(), folder=tmp_path / "whole", max_epochs=4).fit(whole)
    pl.seed_everything(1, verbose=False)
    trainer(callback(), folder=tmp_path / "parts", max_epochs=2).fit(first)
    trainer(callback(), folder=tmp_path / "parts", max_epochs=4).fit(
        second, ckpt_path=tmp_path / "parts" / "last.ckpt"
    )
    assert_same(adapters_of(second), adapters_of(whole))


def test_exchange_is_loras(tmp_path: Path) -> None:
    base, inputs = build("llama")
    model = trained(base, lp.LoRAPlus(r=4))
    lp.save_adapter(model, tmp_path)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), run(model, inputs), floor=1e-4)
    lp.load_adapter(base, tmp_path)
    methods = {type(a.method).__name__ for _, m in adapted_modules(base) for a in of_module(m)}
    assert methods == {"LoRA"}
