"""The same run in one process, under DDP and under FSDP2, for a table of methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tests.helpers.distributed.jobs import Job

#: Where a run takes place → its number of processes and its strategy.
WHERE: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"devices": 2, "strategy": "peft_ddp"},
    "fsdp": {"devices": 2, "strategy": "peft_fsdp"},
}


def cells(
    methods: Collection[str], refused: Collection[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """(where, name) of every run that no strategy refuses."""
    return [(where, name) for where in WHERE for name in methods if (where, name) not in refused]


def job(
    cell: tuple[str, str], methods: Mapping[str, Mapping[str, Any]], folder: Path, **more: Any
) -> Job:
    """One run, called by its cell unless `title` is given."""
    where, name = cell
    title = more.pop("title", f"{where} {name}")
    return Job(title, str(folder), **{**WHERE[where], **methods[name], **more})
