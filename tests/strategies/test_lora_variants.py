"""Variants of LoRA on two processes train the adapters of one process, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed.grid import cells, job
from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.once import made_once
from tests.helpers.distributed.processes import difference, run

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

#: Runs that FSDP2 refuses by name: tensors that layers share, a penalty on whole tensors.
REFUSED = {("fsdp", "MonteCLoRA"), ("fsdp", "Lily"), ("fsdp", "XLoRA")}
METHODS: dict[str, dict[str, Any]] = {
    "VeLoRA": {"method": "VeLoRA", "method_options": {"groups": 4, "direction": "random"}},
    "MonteCLoRA": {"method": "MonteCLoRA", "method_options": {"noise": 0.0, "kl_weight": 0.1}},
    "Lily": {"method": "Lily", "method_options": {"stride": 2, "per_sample": True}},
    "Poly": {"method": "Poly", "method_options": {"tasks": 3}, "tasks": 3, "draws": False},
    "MultitaskPrompt": {"method": "MultitaskPrompt", "method_options": {"tasks": 3}, "tasks": 3},
    "XLoRA": {"method": "XLoRA", "method_options": {"adapters": ["a", "b"], "layerwise": True}},
    "Arrow": {"method": "Arrow", "method_options": {"top_k": 1}, "fabric": True},
}


def jobs(folder: Path) -> dict[str, Job]:
    listed = [job(cell, METHODS, folder) for cell in cells(METHODS, REFUSED)]
    return {each.name: each for each in listed}


@pytest.fixture(scope="module")
def runs(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    def make(folder: Path) -> None:
        every = jobs(folder).values()
        run(1, [j for j in every if j.devices == 1], folder)
        run(2, [j for j in every if j.devices == 2], folder, timeout=270)

    return jobs(made_once(tmp_path_factory, f"variants-{lightning_package}", make))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", METHODS)
def test_same_adapters(name: str, where: str, runs: dict[str, Job]) -> None:
    if (where, name) in REFUSED:
        pytest.skip(f"refused by name: see tests/methods/test_{name.lower()}.py")
    assert difference(runs[f"one {name}"], runs[f"{where} {name}"]) < 1e-5
