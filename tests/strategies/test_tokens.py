"""Trained token rows on two processes equal those of one process, or are refused by name.

Runs go on from the files of runs on another number of processes, with 8-bit state too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed.grid import WHERE, cells, job
from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.once import made_once
from tests.helpers.distributed.processes import Processes, difference, result, run

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

#: 16 rows of width 32: half of them, as on one of two processes, is one block of 8-bit state.
IDS = list(range(3, 19))


def rows(**more: Any) -> dict[str, Any]:
    options = {"token_indices": IDS, "target_modules": None}
    return {"method": "TrainableTokens", "method_options": options, **more}


METHODS: dict[str, dict[str, Any]] = {
    "beside": {"method": "LoRA", "method_options": {"trainable_token_indices": IDS}},
    "alone": rows(),
    "8bit": rows(optimizer="adamw_8bit"),
    "tied": rows(model="gemma"),
    "tied 8bit": rows(model="gemma", optimizer="adamw_8bit"),
}
#: FSDP2 shards no tensor that two layers share.
REFUSED = {("fsdp", "tied"), ("fsdp", "tied 8bit")}
CELLS = cells(METHODS, REFUSED)
#: (where a run goes on, where its file is from, method)
RESUMED = [
    (where, source, name) for where, name in CELLS for source in WHERE if (source, name) in CELLS
]


def jobs(folder: Path) -> dict[str, Job]:
    """Uninterrupted runs of four steps, then those that go on after the second one."""
    listed = [job(cell, METHODS, folder) for cell in CELLS]
    for where, source, name in RESUMED:
        ckpt = str(folder / f"{source} {name}-step=2.ckpt")
        title = f"{where} from {source} {name}"
        listed.append(job((where, name), METHODS, folder, title=title, ckpt=ckpt))
    return {each.name: each for each in listed}


@pytest.fixture(scope="module")
def runs(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    def make(folder: Path) -> None:
        every = list(jobs(folder).values())
        run(1, [j for j in every if j.devices == 1 and j.ckpt is None], folder)
        run(2, [j for j in every if j.devices == 2], folder, timeout=400)
        run(1, [j for j in every if j.devices == 1 and j.ckpt is not None], folder, timeout=400)

    return jobs(made_once(tmp_path_factory, f"tokens-{lightning_package}", make))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("where", "name"), [c for c in CELLS if c[0] != "one"])
def test_same_rows(name: str, where: str, runs: dict[str, Job]) -> None:
    assert difference(runs[f"one {name}"], runs[f"{where} {name}"]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("where", "source", "name"), RESUMED)
def test_resumed(where: str, source: str, name: str, runs: dict[str, Job]) -> None:
    resumed = runs[f"{where} from {source} {name}"]
    assert result(resumed)["step"] == 4
    assert len(result(resumed)["losses"]) == 2
    assert difference(runs[f"{source} {name}"], resumed) < 1e-5


def test_shared_rows_are_refused_by_name(tmp_path: Path) -> None:
    """On every process, before the first step."""
    job = Job("tied", str(tmp_path), **{**WHERE["fsdp"], **METHODS["tied"]})
    group = Processes(2, [job], tmp_path)
    assert group.wait() == [1, 1]
    for log in group.logs:
        assert "TrainableTokens on 'net.lm_head' with shared ['rows']; use" in log.read_text()
