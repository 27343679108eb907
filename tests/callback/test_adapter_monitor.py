"""`AdapterMonitor`: what it logs, against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightning_peft as lp
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, lora, trainer

pytestmark = pytest.mark.usefixtures("lightning_package")


class Observed(Plain):
    """Plain SGD, so that the update is the gradient times the rate."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def run(tmp_path, **settings: Any) -> tuple[dict[str, list[tuple[int, float]]], list[Any]]:
    logged: list[Any] = []

    class Spy(pl.loggers.Logger):
        name, version = "spy", 0

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.append((step, dict(metrics)))

    monitor = lp.AdapterMonitor(tmp_path / "run.png")
    peft = lp.PEFT(adapters={"a": lora(dropout=0.0), "b": lora(dropout=0.0)}, report=False)
    trainer(peft, monitor, max_steps=4, logger=Spy(), **{"log_every_n_steps": 2, **settings}).fit(
        Observed()
    )
    return monitor.history, logged


def test_norms_speed_and_figure(tmp_path) -> None:
    history, logged = run(tmp_path)
    for name in ("a", "b"):
        gradients = dict(history[f"peft/{name}/gradient_norm"])
        updates = dict(history[f"peft/{name}/update_norm"])
        assert list(gradients) == [2, 4]
        for step, norm in gradients.items():
            assert norm > 0
            assert updates[step] == pytest.approx(0.5 * norm, rel=1e-4)
    assert len(history["peft/samples_per_second"]) == 2
    assert all(value > 0 for _, value in history["peft/samples_per_second"])
    sent = [metrics for _, metrics in logged if "peft/a/gradient_norm" in metrics]
    assert len(sent) == 2
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_accumulation_logs_once_per_step(tmp_path) -> None:
    history, _ = run(tmp_path, accumulate_grad_batches=2)
    assert [step for step, _ in history["peft/a/update_norm"]] == [2, 4]
