"""Replicas of shards (HSDP): two groups of two ranks train as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_peft.strategies.meshes import check_context, check_replicas
from tests.helpers.distributed.jobs import Job, build
from tests.helpers.distributed.processes import Processes, difference, result, run
from tests.strategies.test_stream import save_sharded

pytestmark = [
    pytest.mark.usefixtures("lightning_package"),
    pytest.mark.one_package,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="reads a base into shards"),
]


def test_two_replicas_of_two_shards(tmp_path: Path) -> None:
    """Parity, 8-bit state, both forms of checkpoints, and a base that is streamed."""
    one = Job("one", str(tmp_path))
    save_sharded(build(one), tmp_path / "base")
    half = {"replicas": 2}
    file = replace(one, name="file", devices=4, strategy="peft_fsdp", strategy_options=half)
    folder = replace(
        file, name="folder", strategy_options={**half, "save_distributed_checkpoint": True}
    )
    streamed = replace(
        file,
        name="streamed",
        meta_from=str(tmp_path / "base"),
        packed_cache=str(tmp_path / "cache"),
    )
    cached = replace(streamed, name="cached")
    # Blocks of 8-bit state are those of two ranks.
    eight = replace(file, name="eight", optimizer="adamw_8bit")
    two = replace(eight, name="two", devices=2, strategy_options={})
    run(4, [file, folder, streamed, cached, eight], tmp_path, timeout=280)
    run(2, [two], tmp_path)
    run(1, [one], tmp_path)
    assert difference(two, eight) <= 1e-5
    for job in (file, folder, streamed, cached):
        assert difference(one, job) <= 1e-5, job.name
        want, have = result(one)["packed"], result(job)["packed"]
        assert all(torch.equal(want[k], have[k]) for k in want), job.name
    # A rank holds a half, not a quarter.
    own, packed = (result(file)[key] for key in ("own_bytes", "packed_bytes"))
    assert abs(2 * own - packed) <= 0.05 * packed
    (data,) = {p.parent for p in (tmp_path / "cache").rglob("rank-*.bin")}
    assert sorted(p.name for p in data.glob("rank-*")) == ["rank-00000.bin", "rank-00001.bin"]
    for devices in (1, 2):
        resumed = [
            Job(
                f"{source} on {devices}",
                str(tmp_path),
                devices=devices,
                strategy="auto" if devices == 1 else "peft_fsdp",
                ckpt=str(tmp_path / f"{source}-step=2.ckpt"),
            )
            for source in ("file", "folder")
        ]
        run(devices, resumed, tmp_path)
        for job in resumed:
            assert difference(one, job) <= 1e-5, job.name


def test_numbers_that_do_not_divide_the_ranks(tmp_path: Path) -> None:
    check_replicas(2, 4)
    with pytest.raises(ValueError, match=r"a divisor of the 6 ranks, one of \[1, 2, 3, 6\], got 4"):
        check_replicas(4, 6)
    for wrong in ("2", 2.0, True):
        for check in (check_replicas, check_context):
            with pytest.raises(ValueError, match="expected a divisor of the 6 ranks"):
                check(wrong, 6)  # type: ignore[arg-type]
    options = {"replicas": 3}
    job = Job("run", str(tmp_path), devices=2, strategy="peft_fsdp", strategy_options=options)
    group = Processes(2, [job], tmp_path)
    assert group.wait(60) == [1, 1]
    assert "expected a divisor of the 2 ranks, one of [1, 2], got 3" in group.text()
