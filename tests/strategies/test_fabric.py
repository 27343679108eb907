"""Loops under Fabric on two processes: equal to a Trainer, saved and resumed across strategies."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.once import made_once
from tests.helpers.distributed.processes import Processes, difference, result, run
from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current
from tests.helpers.stored import stored_tensors

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

ONE: dict[str, Any] = {"fabric": True}
DDP: dict[str, Any] = {"devices": 2, "strategy": "peft_ddp", "fabric": True}
FSDP: dict[str, Any] = {"devices": 2, "strategy": "peft_fsdp", "fabric": True}


def jobs(folder: Path) -> dict[str, Job]:
    def job(name: str, where: dict[str, Any], source: str = "", **more: Any) -> Job:
        ckpt = str(folder / f"{source}-epoch=0.ckpt") if source else None
        return Job(name, str(folder), **{**where, **more}, ckpt=ckpt)

    adalora: dict[str, Any] = {
        "method": "AdaLoRA",
        "method_options": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    }
    listed = [
        job("trainer", {}),
        job("trainer AdaLoRA", {}, **adalora),
        job("one", ONE),
        job("one AdaLoRA", ONE, **adalora),
        job("ddp", DDP),
        job("fsdp", FSDP),
        job("ddp from fsdp", DDP, "fsdp", reverse=True),
        job("fsdp from one", FSDP, "one", reverse=True),
        job("fsdp 8bit", FSDP, optimizer="adamw_8bit"),
        job("fsdp 8bit from fsdp 8bit", FSDP, "fsdp 8bit", optimizer="adamw_8bit"),
        job("one from ddp", ONE, "ddp"),
    ]
    return {j.name: j for j in listed}


def make(folder: Path) -> None:
    every = list(jobs(folder).values())
    run(1, [j for j in every if j.devices == 1 and j.ckpt is None], folder)
    run(2, [j for j in every if j.devices == 2], folder)
    run(1, [j for j in every if j.devices == 1 and j.ckpt is not None], folder)


@pytest.fixture(scope="module")
def runs(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return jobs(made_once(tmp_path_factory, f"fabric-{lightning_package}", make))


@pytest.mark.parametrize(
    ("a", "b", "limit"),
    [
        ("trainer", "one", 0),
        ("trainer AdaLoRA", "one AdaLoRA", 0),
        ("one", "ddp", 1e-5),
        ("ddp", "fsdp", 1e-6),
        ("fsdp", "ddp from fsdp", 1e-6),
        ("one", "fsdp from one", 1e-5),
        ("one", "one from ddp", 1e-5),
        ("fsdp 8bit", "fsdp 8bit from fsdp 8bit", 0),
    ],
)
def test_runs_are_equal(runs: dict[str, Job], a: str, b: str, limit: float) -> None:
    one, two = result(runs[a])["adapters"], result(runs[b])["adapters"]
    assert one.keys() == two.keys()
    assert difference(runs[a], runs[b]) <= limit


def test_files_hold_adapters_under_plain_keys(runs: dict[str, Job]) -> None:
    for name in ("one", "ddp", "fsdp"):
        written = torch.load(Path(runs[name].folder) / f"{name}-last.ckpt", weights_only=True)
        assert list(stored_tensors(written)) == list(result(runs["one"])["adapters"])
        assert written["epoch"] == 1
        assert len(written["lightning_peft"]["rng"]) == runs[name].devices


@pytest.mark.parametrize("where", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_another_base_is_refused_on_every_rank(
    where: dict[str, Any], runs: dict[str, Job], tmp_path: Path
) -> None:
    ckpt = str(Path(runs["one"].folder) / "one-last.ckpt")
    group = Processes(2, [Job("run", str(tmp_path), ckpt=ckpt, base_seed=[8], **where)], tmp_path)
    assert group.wait(60) == [1, 1]
    for log in group.logs:
        assert "expected the base it was trained on, got another one" in log.read_text()


def test_processes_with_other_bases_are_told_at_setup(tmp_path: Path) -> None:
    group = Processes(2, [Job("run", str(tmp_path), base_seed=[7, 8], **DDP)], tmp_path)
    assert group.wait(60) == [1, 1]
    for log in group.logs:
        assert "expected the same on all 2 processes" in log.read_text()


def test_a_kill_during_a_save_leaves_the_former_file(runs: dict[str, Job], tmp_path: Path) -> None:
    job = Job("run", str(tmp_path), fault="kill in save", **FSDP)
    group = Processes(2, [job], tmp_path)
    statuses = group.wait(60)
    assert statuses[0] == -signal.SIGKILL, group.text()
    assert statuses[1] != 0
    last = tmp_path / "run-last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0
    resumed = Job("again", str(tmp_path), ckpt=str(last), **FSDP)
    run(2, [resumed], tmp_path)
    assert difference(runs["fsdp"], resumed) == 0


@pytest.mark.parametrize("strategy", ["peft_ddp", "peft_fsdp"])
def test_half_precision_is_refused_before_the_first_step(strategy: str, tmp_path: Path) -> None:
    environment = {"LIGHTNING_PACKAGE": current()}
    said = [
        run_function("tests.strategies.half_job:main", [strategy, name], tmp_path, 60, environment)
        for name in ("", "adamw_8bit")
    ]
    assert re.search("error: AdamW: expected an eps.*16-mixed.*adamw_8bit", said[0]), said[0]
    assert "error:" not in said[1]
    assert all("finite: True" in each for each in said)
