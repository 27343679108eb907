"""The cost of one adapter does not grow with the number of adapters that are attached."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import (
    LoRA,
    adapter_state_dict,
    attach,
    detach,
    load_adapter,
    parameter_report,
    save_adapter,
    set_adapter,
)

_MANY = 40
METHOD = LoRA(r=2, target_modules=["fc1", "fc2"])


class Block(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.fc1(x).relu())
        return y


def model_with(adapters: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    for i in range(adapters):
        attach(model, METHOD, adapter_name=f"a{i}")
    return model


def calls(job: Callable[[], object]) -> int:
    """Function calls of a job: a measure of time that a busy machine does not change."""
    job()  # imports and caches
    profile = cProfile.Profile()
    profile.runcall(job)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def jobs(model: nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    folder.mkdir()
    save_adapter(model, folder, adapter_name="a0")
    names = iter(f"new{i}" for i in range(9))
    loaded = iter(f"loaded{i}" for i in range(9))
    chosen = iter(["a0", "a1"] * 4)
    gone = iter(["a1", "new0"])
    return {
        "attach": lambda: attach(model, METHOD, adapter_name=next(names)),
        "load": lambda: load_adapter(model, folder / "a0", adapter_name=next(loaded)),
        "set_adapter": lambda: set_adapter(model, next(chosen)),
        "save": lambda: save_adapter(model, folder, adapter_name="a0"),
        "state": lambda: adapter_state_dict(model, "a0"),
        "forward": lambda: model(torch.zeros(2, 8)),
        "detach": lambda: detach(model, next(gone)),
    }


def test_no_cost_grows_with_the_number_of_adapters(tmp_path: Path) -> None:
    few = {k: calls(job) for k, job in jobs(model_with(2), tmp_path / "few").items()}
    many = {k: calls(job) for k, job in jobs(model_with(_MANY), tmp_path / "many").items()}
    grown = {k: many[k] / few[k] for k in few}
    assert max(grown.values()) < 1.25, grown


def test_a_later_report_counts_all_and_shows_its_own() -> None:
    model = model_with(3)
    model.half()
    report = attach(model, LoRA(r=4, target_modules=["fc1"]), adapter_name="last")
    whole = parameter_report(model)
    assert (report.total, report.nbytes) == (whole.total, whole.nbytes)
    assert report.trainable == whole.trainable == 4 * 4 * (8 + 16)
    assert sum(g.count for g in report.groups) == 4
    assert sum(g.count for g in whole.groups) == 4 + 3 * 8


def test_a_failed_attach_leaves_other_adapters_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_with(3)
    set_adapter(model, ["a0", "a2"])
    x = torch.randn(2, 8)
    want = model(x)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    keys = list(model.state_dict())
    monkeypatch.setattr("lightning_peft.adapters.attach.start_history", _fail)
    with pytest.raises(RuntimeError, match="disk full"):
        attach(model, METHOD, adapter_name="last")
    assert list(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model(x), want)
    monkeypatch.undo()
    attach(model, METHOD, adapter_name="last")
    set_adapter(model, "a1")
    assert all(p.requires_grad == (".peft.a1." in n) for n, p in model.named_parameters())


def _fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("disk full")
