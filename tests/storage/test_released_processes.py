"""Packed bases on two processes: DDP equals one process; FSDP2 is refused by name on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current
from tests.helpers.released import write

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

FORMATS = [
    "fp8 experts",
    pytest.param("mxfp4", marks=pytest.mark.slow),
    pytest.param("int4 experts", marks=pytest.mark.slow),
    pytest.param("nvfp4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", FORMATS)
def test_two_processes(name: str, tmp_path: Path) -> None:
    folder, _ = write(name, tmp_path)
    target = "tests.storage.released_job:main"
    environment = {"LIGHTNING_PACKAGE": current()}
    out = run_function(target, [str(folder), str(tmp_path)], tmp_path, environment=environment)
    assert "statuses [0]" in out, out[-3000:]
    assert "statuses [0, 0]" in out, out[-3000:]
    one, *two = (torch.load(tmp_path / f"{r}.pt") for r in ("1-0", "2-0", "2-1"))
    for rank in two:
        assert_all(rank["packed"], one["packed"], floor=None)
        assert_all(rank["trained"], one["trained"], floor=1e-5)
        assert_all(rank["trained"], two[0]["trained"], floor=None)
    assert "sharded [1, 1]" in out
    assert out.count("are not cut together; use strategy='peft_ddp'") >= 2


def assert_all(got: dict[str, Any], want: dict[str, Any], floor: float | None) -> None:
    assert got.keys() == want.keys()
    assert want
    for key, value in want.items():
        if floor is None:
            assert_same_bits(key, got[key], value)
        else:
            assert_close(key, got[key], value, floor=floor)
