"""Checkpointing, offloading and the chunked loss under two processes: the same adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.once import made_once
from tests.helpers.distributed.processes import difference, result, run

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

BOTH: dict[str, Any] = {
    "activations": {"kind": "checkpoint+offload", "min_bytes": 0},
    "loss": "chunked",
}
OFFLOAD: dict[str, Any] = {"activations": {"kind": "offload", "min_bytes": 0}}
HEAD: dict[str, Any] = {"modules_to_save": ["lm_head"], "quantization": None}
#: Pairs of jobs that end with the same adapters.
PAIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offload": OFFLOAD,
    "mixtral": {"model": "mixtral", **BOTH},
    "head": {**HEAD, **BOTH},
    "mixed": {"mixed": True, **BOTH},
}
SLOW = {
    *("peft_ddp mixed", "peft_ddp offload", "peft_ddp mixtral", "peft_ddp head"),
    *("peft_fsdp mixed", "peft_fsdp offload"),
}


def jobs(folder: Path) -> list[tuple[Job, Job]]:
    made = []
    for strategy in ("peft_ddp", "peft_fsdp"):
        for name, options in PAIRS.items():
            where: dict[str, Any] = {
                "devices": 2,
                "strategy": strategy,
                "epochs": 1,
                "validate": True,
                "sgd": 0.5,
            }
            without = {k: v for k, v in options.items() if k not in ("activations", "loss")}
            with_limits = {**BOTH, **options} if name == "plain" else options
            made.append(
                (
                    Job(f"{strategy} {name} without", str(folder), **where, **without),
                    Job(f"{strategy} {name}", str(folder), **where, **with_limits),
                )
            )
    return made


def chosen(folder: Path, slow: bool) -> list[tuple[Job, Job]]:
    return [pair for pair in jobs(folder) if slow == (pair[1].name in SLOW)]


def compare(folder: Path, slow: bool) -> None:
    for plain, limited in chosen(folder, slow):
        print(limited.name, difference(plain, limited))
        assert difference(plain, limited) <= 1e-6, limited.name
        grown = [t for k, t in result(limited)["adapters"].items() if k.endswith(".B")]
        assert max(float(t.abs().max()) for t in grown) > 1e-3, limited.name  # B starts at zero
        for rank in (0, 1):
            assert result(limited, rank)["losses"] == pytest.approx(result(plain, rank)["losses"])
        assert result(limited)["val"] == pytest.approx(result(plain)["val"])
        assert result(limited)["frozen_grads"] == []


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_same_adapters(
    slow: bool, lightning_package: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def make(folder: Path) -> None:
        run(2, [job for pair in chosen(folder, slow) for job in pair], folder, timeout=240)

    folder = made_once(tmp_path_factory, f"step-memory-{slow}-{lightning_package}", make)
    compare(folder, slow)
