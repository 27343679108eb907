"""Checkpoints in shards: on disks that are not shared, at an address, and read by rows."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest
import torch

from lightning_peft.checkpoint.sharded import (
    OwnRows,
    gather_optimizers,
    gather_tensors,
    optimizer_shard,
    own_part,
    tensor_shards,
)
from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


def job(name: str, place: Path) -> str:
    return run_function(
        f"tests.checkpoint.shared_disk_job:{name}",
        [str(place)],
        place,
        environment={"LIGHTNING_PACKAGE": current()},
    )


def test_disks_that_are_not_shared_are_refused(tmp_path: Path) -> None:
    """At the start if the folder is known, else at the first save; nothing seems to be saved."""
    out = job("refused", tmp_path)
    results = [line for line in out.splitlines() if line.startswith("[")]
    assert len(results) == 2, out[-3000:]
    for line in results:
        statuses = literal_eval(line[: line.index("]") + 1])
        assert statuses == [1, 1], out[-3000:]
        assert float(line.split("]")[1].split()[0]) < 60
        assert line.endswith("[]")
    assert "that all 2 processes share, for a checkpoint in shards, got one that ranks [1]" in out
    assert "expected 2 shards, got none of ranks [1] on the disk of rank 0; not saved" in out
    assert "save_distributed_checkpoint=False" in out


def test_shards_at_an_address(tmp_path: Path) -> None:
    out = job("at_an_address", tmp_path)
    assert "['meta.pt', 'piece', 'piece']" in out, out[-3000:]
    assert out.strip().endswith("equal"), out[-3000:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_own_rows_are_read_and_no_others(ranks: int) -> None:
    """Of shards of two processes, and of a file."""
    W, b = torch.randn(5, 3), torch.randn(4)
    parts = [
        {"W": {"shape": [5, 3], "first": 0, "rows": W[:3]}, **tensor_shards({"b": b})},
        {"W": {"shape": [5, 3], "first": 3, "rows": W[3:]}, **tensor_shards({"b": b})},
    ]
    states = [{"exp_avg": W[:3], "step": torch.tensor(1.0)}, {"exp_avg": W[3:]}]
    firsts = (0, 9)
    optimizers = [
        {"state": {0: {"shape": [5, 3], "first": f, "state": s}}, "param_groups": []}
        for s, f in zip(states, firsts, strict=True)
    ]
    seen = torch.zeros(5)
    for rank in range(ranks):
        own = OwnRows(rank, ranks, frozenset(["W"]))
        first, rows = own.of([5, 3])
        inside = torch.zeros(5, dtype=torch.bool)
        inside[first : first + rows] = True
        seen += inside
        want = W * inside[:, None]
        found = gather_tensors(parts, own)
        assert torch.equal(found["W"], want)
        assert torch.equal(found["b"], b)
        state = gather_optimizers(optimizers, own)["state"][0]
        assert torch.equal(state["exp_avg"], want)
        assert state["step"] == 1
        assert torch.equal(own_part({"state_dict": {"W": W, "b": b}}, own)["state_dict"]["W"], want)
    assert torch.equal(seen, torch.ones(5))
    assert torch.equal(gather_tensors(parts)["W"], W)


def test_state_of_one_process_is_read_by_rows() -> None:
    p = torch.nn.Parameter(torch.randn(4, 2))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.randn(4, 2)
    optimizer.step()
    want = optimizer.state[p]["exp_avg"].clone()
    want[2:] = 0
    own = OwnRows(0, 2, frozenset())
    found = gather_optimizers([optimizer_shard(optimizer)], own)["state"][0]
    assert torch.equal(found["exp_avg"], want)
