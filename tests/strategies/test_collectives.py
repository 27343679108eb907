"""What `peft_fsdp` sends in a step: embeddings and head once, gradients once per window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current
from tests.strategies.collectives_job import llama

pytestmark = [
    pytest.mark.usefixtures("lightning_package"),
    pytest.mark.one_package,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="other names of the operations"),
]


def run(tmp_path: Path, tied: bool, accumulate: int) -> Any:
    out = tmp_path / f"{tied}-{accumulate}.json"
    run_function(
        "tests.strategies.collectives_job:main",
        [str(out), tied, accumulate],
        tmp_path,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    return json.loads(out.read_text())


def gathered(found: Any, step: int = 1) -> int:
    """Bytes that one rank sends in all-gathers."""
    return sum(n for name, (_, n) in found["steps"][step].items() if "gather" in name)


def reduced(found: Any, step: int) -> int:
    return sum(n for name, (_, n) in found["steps"][step].items() if "reduce_scatter" in name)


def test_ends_are_gathered_once(tmp_path: Path) -> None:
    """Blocks and the last norm are gathered twice; the embedding and the head once."""
    for tied in (False, True):
        found = run(tmp_path, tied, 1)
        sizes = found["sizes"]
        ends = sizes["embedding"] if tied else 2 * sizes["embedding"]
        trained = sizes["trained"] // 2  # this rank's half
        twice = 2 * (sizes["frozen"] + trained - ends)
        head = gathered(found) - twice
        # Adapters of the head are in its unit, and gathered once too.
        assert 0.9 * ends <= head <= 1.05 * ends, (tied, found["steps"][1], sizes)
        assert reduced(found, 1) == sizes["trained"]


def test_a_window_is_reduced_once(tmp_path: Path) -> None:
    found = run(tmp_path, False, 2)
    sent = [reduced(found, step) for step in range(4)]
    assert sent == [0, found["sizes"]["trained"]] * 2


@pytest.mark.parametrize("packed", [False, True])
def test_no_weight_is_gathered_to_read_a_base_or_to_cut_a_state(
    packed: bool, tmp_path: Path
) -> None:
    """Each rank reads its own rows. Scales of double quantisation need those of all rows."""
    torch.manual_seed(0)
    state = llama(False).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    out = tmp_path / "sent.json"
    run_function(
        "tests.strategies.collectives_job:main_of_reading",
        [str(tmp_path), str(out), packed],
        tmp_path,
    )
    found = json.loads(out.read_text())
    blocks = sum(t.numel() // 32 for name, t in state.items() if "proj" in name) if packed else 0
    scales = 4 * blocks // 2  # those of this rank's rows
    flags = 64  # whether a rank has failed
    assert scales <= sum(found.pop("reading").values()) <= scales + flags
    assert found == {"saving": {}, "loading": {}}
