"""Optimizers built too early; LoRA+ groups under schedulers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.optim import convert_optimizer, loraplus_groups, repair


def _net() -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    base = {n: torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False) for n in ("l1", "l2")}
    trained = {
        f"{n}.peft.default.{x}": torch.nn.Parameter(torch.ones(4, 4)) for n in base for x in "AB"
    }
    return base, trained


def test_repair_fills_the_group_of_the_base() -> None:
    base, trained = _net()
    opts = [torch.optim.AdamW([base["l1"]]), torch.optim.AdamW([base["l2"]], lr=0.5)]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opts[0], max_lr=1.0, total_steps=5)
    names = repair(opts, trained, lambda name: [base[name.split(".")[0]]])
    assert names == list(trained)
    assert [id(p) for p in opts[1].param_groups[0]["params"]] == [
        id(trained[f"l2.peft.default.{x}"]) for x in "AB"
    ]
    trained["l1.peft.default.A"].grad = torch.ones(4, 4)
    opts[0].step()
    scheduler.step()
    assert not torch.equal(trained["l1.peft.default.A"], torch.ones(4, 4))
    assert repair(opts, trained, lambda name: []) == []


def test_repair_names_what_has_no_place_and_changes_nothing() -> None:
    base, trained = _net()
    opt = torch.optim.AdamW([base["l1"]])
    with pytest.raises(RuntimeError, match=r"l2\.peft\.default\.A \(in 0\)"):
        repair([opt], trained, lambda name: [base[name.split(".")[0]]])
    assert len(opt.param_groups[0]["params"]) == 1
    both = [torch.optim.AdamW(list(trained.values())) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"in 2"):
        repair(both, trained, lambda name: [])


@pytest.mark.parametrize("early", [True, False])
def test_loraplus_keeps_schedulers(early: bool) -> None:
    _, trained = _net()
    opt = torch.optim.AdamW(list(trained.values()), lr=1e-2)
    made = [] if early else [torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5**n)]
    loraplus_groups(opt, trained.items(), 16, made)
    made = made or [torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5**n)]
    convert_optimizer(opt, "adamw_8bit")
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([1e-2, 0.16])
    for p in trained.values():
        p.grad = torch.ones_like(p)
    opt.step()
    made[0].step()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([5e-3, 0.08])
    moved = {name: float((1 - p).detach().mean()) for name, p in trained.items()}
    assert moved["l1.peft.default.B"] > 10 * moved["l1.peft.default.A"]
