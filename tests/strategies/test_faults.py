"""Faults on two processes: an error on both or an end on both, never a hang; the run goes on."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.processes import Processes, difference, result_file, run

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

DDP: dict[str, Any] = {"devices": 2, "strategy": "peft_ddp"}
FSDP: dict[str, Any] = {"devices": 2, "strategy": "peft_fsdp"}
FOLDER: dict[str, Any] = {**FSDP, "strategy_options": {"save_distributed_checkpoint": True}}
LIMIT = 60.0  # seconds in which a fault must have ended every process


def faulty(folder: Path, where: dict[str, Any], **fault: Any) -> tuple[Processes, list[int]]:
    group = Processes(2, [Job("run", str(folder), **{**where, **fault})], folder)
    return group, group.wait(LIMIT)


@pytest.mark.parametrize(("where", "rank"), [(DDP, 0), (FSDP, 1)], ids=["ddp", "fsdp"])
def test_kill_9_ends_the_other_and_the_run_resumes(
    where: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    group, statuses = faulty(tmp_path, where, fault="kill", fault_rank=rank)
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1, group.text()
    whole = Job("whole", str(tmp_path), **where)
    resumed = Job("again", str(tmp_path), ckpt=str(tmp_path / "run-last.ckpt"), **where)
    run(2, [whole, resumed], tmp_path)
    assert difference(whole, resumed) <= 1e-6


@pytest.mark.parametrize(
    ("where", "rank"), [(DDP, 1), (FSDP, 0)], ids=["ddp, rank 1", "fsdp, rank 0"]
)
def test_sigterm_saves_then_ends_all(where: dict[str, Any], rank: int, tmp_path: Path) -> None:
    group, statuses = faulty(tmp_path, where, fault="sigterm", fault_rank=rank, fault_step=2)
    assert statuses == [143, 143], group.text()
    written = torch.load(tmp_path / "sigterm.ckpt", weights_only=True)
    assert written["global_step"] == 3
    assert not result_file(Job("run", str(tmp_path))).exists()


def test_sigterm_to_the_whole_group(tmp_path: Path) -> None:
    job = Job("run", str(tmp_path), step_seconds=0.05, epochs=500, **FSDP)
    group = Processes(2, [job], tmp_path)
    wait_for(tmp_path / "run-last.ckpt", group)
    for pid in group.pids:
        os.kill(pid, signal.SIGTERM)
    assert group.wait(LIMIT) == [143, 143], group.text()
    assert (tmp_path / "sigterm.ckpt").exists()


def wait_for(file: Path, group: Processes) -> None:
    end = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < end, group.text()
        assert group.poll() == [None] * len(group.pids), group.text()
        time.sleep(0.02)


def test_an_error_on_one_process_with_a_callback_that_saves(tmp_path: Path) -> None:
    for where in (DDP, FSDP):
        folder = tmp_path / where["strategy"]
        group, statuses = faulty(
            folder, where, fault="error", fault_rank=1, callbacks=["on_exception"]
        )
        assert statuses == [1, 1], group.text()
        assert "made up" in group.logs[1].read_text()


@pytest.mark.parametrize("where", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("differing", "named"),
    [
        ({"base_seed": [7, 8]}, "base net.model.layers.0.mlp.down_proj.weight"),
        ({"lora_r": [4, 2]}, "adapter 'default', method 0, r: 4 on rank 0, 2 on rank 1"),
    ],
    ids=["base", "adapter"],
)
def test_processes_that_differ_are_told_at_the_start(
    where: dict[str, Any], differing: dict[str, Any], named: str, tmp_path: Path
) -> None:
    group, statuses = faulty(tmp_path, where, **differing)
    assert statuses == [1, 1]
    for log in group.logs:
        assert named in log.read_text()
        assert "expected the same on all 2 processes" in log.read_text()


def test_other_versions_on_one_process_are_told_at_the_start(tmp_path: Path) -> None:
    metadata = tmp_path / "site" / "transformers-4.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    group, statuses = faulty(tmp_path, DDP, site_packages=["", str(tmp_path / "site")])
    assert statuses == [1, 1]
    told = r"transformers: \d+\.\d+\.\d+ on rank 0, 4\.0\.0 on rank 1"
    for log in group.logs:
        assert re.search(told, log.read_text())


@pytest.mark.parametrize(
    ("where", "rank"), [(DDP, 0), (FSDP, 0), (FOLDER, 1)], ids=["ddp", "fsdp", "folder"]
)
def test_a_save_that_fails_is_told_to_all_and_leaves_the_former(
    where: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    group, statuses = faulty(tmp_path, where, fault="full", fault_rank=rank)
    assert statuses == [1, 1], group.text()
    assert f"rank {rank} got" in group.logs[1 - rank].read_text()
    last = tmp_path / "run-last.ckpt"
    resumed = Job("again", str(tmp_path), ckpt=str(last), **where)
    run(2, [resumed], tmp_path)


@pytest.mark.parametrize("folder_form", [False, True], ids=["file", "folder"])
def test_a_truncated_checkpoint_is_named(folder_form: bool, tmp_path: Path) -> None:
    where = FOLDER if folder_form else FSDP
    job = Job("run", str(tmp_path), epochs=1, **where)
    run(2, [job], tmp_path)
    last = tmp_path / "run-last.ckpt"
    broken = last / "piece-1.pt" if folder_form else last
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    group, statuses = faulty(tmp_path, where, ckpt=str(last))
    assert statuses == [1, 1]
    for log in group.logs:
        assert f"{broken}: expected a whole checkpoint" in log.read_text()
    if folder_form:
        (last / "meta.pt").unlink()
        group, statuses = faulty(tmp_path, where, ckpt=str(last))
        assert "never finished" in group.logs[0].read_text()
        shutil.rmtree(last)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_random_kills(tmp_path: Path) -> None:
    """Nothing is lost beyond the last checkpoint, under changing strategies; no end takes longer
    than the limit.
    """
    rng = random.Random(5)
    whole = Job("whole", str(tmp_path), epochs=12, **DDP)
    run(2, [whole], tmp_path)
    last = tmp_path / "run-last.ckpt"
    kills, longest, steps = 0, 0.0, 0
    while kills < 20:
        ckpt = str(last) if last.exists() else None
        where = (DDP, FSDP, FOLDER)[kills % 3]
        job = Job("run", str(tmp_path), epochs=12, ckpt=ckpt, step_seconds=0.1, **where)
        group = Processes(2, [job], tmp_path)
        time.sleep(rng.uniform(0.5, 5))
        victim = rng.randrange(2)
        os.kill(group.pids[victim], signal.SIGKILL)
        begin = time.monotonic()
        statuses = group.wait(LIMIT)
        if statuses[victim] == 0:  # it had come to its end before: begin again
            assert statuses == [0, 0], group.text()
            shutil.rmtree(last) if last.is_dir() else last.unlink()
            steps = 0
            continue
        assert statuses[victim] == -signal.SIGKILL, group.text()
        longest = max(longest, time.monotonic() - begin)
        kills += 1
        if last.exists():
            meta = last / "meta.pt" if last.is_dir() else last
            now = torch.load(meta, weights_only=True)["global_step"]
            assert now >= steps
            steps = now
    ckpt = str(last) if last.exists() else None
    resumed = Job("again", str(tmp_path), epochs=12, ckpt=ckpt, **FSDP)
    run(2, [resumed], tmp_path)
    print(f"slowest end after a kill: {longest:.1f} s; last resumed from step {steps}")
    assert difference(whole, resumed) <= 1e-6
    assert longest < LIMIT
