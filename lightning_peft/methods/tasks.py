"""Task ids of the batch, as methods that are trained on several tasks read them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tasks_of_rows"]


def tasks_of_rows(tasks: Tensor | None, rows: int, count: int, what: str) -> Tensor:
    """Return the task of each row of a layer's input [rows].

    Rows that repeat a sample, such as its beams or its tokens, follow each other.

    Args:
        tasks: Task of each sample; None outside of `task_ids`.
        rows: Leading length of the input.
        count: Number of tasks of the method.
        what: The layer or the method, for messages.

    Raises:
        RuntimeError: no task ids, or a number of rows that is no multiple of theirs.
        ValueError: a task that the method does not have.
    """
    if tasks is None:
        raise RuntimeError(
            f"{what}: expected the task of every sample, got none; run the model inside "
            "`with lightning_peft.task_ids([...]):`"
        )
    if rows % len(tasks):
        raise RuntimeError(
            f"{what}: expected one task id per sample, got {len(tasks)} for a batch of {rows} rows"
        )
    if not torch.compiler.is_compiling() and int(tasks.max()) >= count:
        raise ValueError(
            f"{what}: expected task ids below {count}, got {int(tasks.max())}; attach with more "
            "tasks"
        )
    return tasks.repeat_interleave(rows // len(tasks))
