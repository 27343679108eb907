"""Trained token rows on two processes equal those of one process, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.once import made_once
from tests.helpers.distributed.processes import difference, run

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

ROWS = {"token_indices": [3, 5, 7], "target_modules": None}
METHODS: dict[str, dict[str, Any]] = {
    "beside": {"method": "LoRA", "method_options": {"trainable_token_indices": [3, 5, 7]}},
    "alone": {"method": "TrainableTokens", "method_options": ROWS},
    "tied": {"method": "TrainableTokens", "method_options": ROWS, "model": "gemma"},
}
WHERE: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"devices": 2, "strategy": "peft_ddp"},
    "fsdp": {"devices": 2, "strategy": "peft_fsdp"},
}
#: FSDP2 shards no tensor that two layers share.
REFUSED = {("fsdp", "tied")}


def jobs(folder: Path) -> dict[str, Job]:
    listed = [
        Job(f"{where} {name}", str(folder), epochs=1, **{**how, **options})
        for name, options in METHODS.items()
        for where, how in WHERE.items()
        if (where, name) not in REFUSED
    ]
    return {job.name: job for job in listed}


@pytest.fixture(scope="module")
def runs(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    def make(folder: Path) -> None:
        every = jobs(folder).values()
        run(1, [j for j in every if j.devices == 1], folder)
        run(2, [j for j in every if j.devices == 2], folder, timeout=270)

    return jobs(made_once(tmp_path_factory, f"tokens-{lightning_package}", make))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", METHODS)
def test_same_rows(name: str, where: str, runs: dict[str, Job]) -> None:
    if (where, name) in REFUSED:
        pytest.skip("refused by name: shared by two layers")
    assert difference(runs[f"one {name}"], runs[f"{where} {name}"]) < 1e-5
