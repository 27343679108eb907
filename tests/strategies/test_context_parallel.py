"""Ranks that share sequences train as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


def run(folder: Path, name: str, ranks: int, shared: int, length: int = 16) -> tuple[Path, str]:
    out = folder / f"{name}-{ranks}-{shared}"
    printed = run_function(
        "tests.strategies.context_job:main",
        [str(out), name, ranks, shared, length],
        folder,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    return out, printed


def losses(out: Path, ranks: int) -> list[float]:
    """Losses by step; ranks that share a sequence report one value."""
    found = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)]
    return [sum(step) / ranks for step in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("llama", [(2, 2), (4, 2)]),
        pytest.param("llama", [(4, 4)], marks=pytest.mark.slow),
        pytest.param("gpt2", [(2, 2), (4, 4)], marks=pytest.mark.slow),
    ],
)
def test_losses_and_adapters_are_those_of_one_process(
    name: str, runs: list[tuple[int, int]], tmp_path: Path
) -> None:
    one, _ = run(tmp_path, name, 1, 1)
    want = torch.load(f"{one}.pt", weights_only=True)
    for ranks, shared in runs:
        out, printed = run(tmp_path, name, ranks, shared)
        assert f"statuses {[0] * ranks}" in printed, printed[-3000:]
        pairs = zip(losses(one, 1), losses(out, ranks), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5
        have = torch.load(f"{out}.pt", weights_only=True)
        assert max(float((want[k] - have[k]).abs().max()) for k in want) <= 1e-4


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    for name, length, text in (
        ("llama", 15, "expected sequences whose length is a multiple of 2, got 15 tokens"),
        ("bert", 16, "expected a causal language model"),
    ):
        _, printed = run(tmp_path, name, 2, 2, length)
        assert "statuses [1, 1]" in printed
        assert text in printed, printed[-3000:]
