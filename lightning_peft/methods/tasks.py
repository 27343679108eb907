"""Task ids of the batch, as methods that are trained on several tasks read them, and the change
that follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import NotMergeable, Term

__all__ = ["MixedSkills", "tasks_of_rows"]


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


@dataclass(frozen=True)
class MixedSkills(Term):
    """x A B / r, with A and B mixed for each sample by the weights of its task.

    Attributes:
        A: [splits, skills, in / splits, r].
        B: [splits, skills, r, out / splits].
        logits: [tasks, splits · skills].
        tasks: [samples]; None where no task is known.
    """

    A: Tensor
    B: Tensor
    logits: Tensor
    tasks: Tensor | None

    def matrix(self) -> Tensor:
        """None: it depends on the task."""
        raise NotMergeable("it depends on the task of each sample")

    def weights(self, site: Site, rows: int) -> Tensor:
        """Weights of the skills [rows, splits, skills]; in training they are drawn."""
        tasks = tasks_of_rows(self.tasks, rows, len(self.logits), site.label)
        chosen = self.logits[tasks.to(self.logits.device)].unflatten(-1, self.A.shape[:2])
        if site.module.training:  # a relaxed Bernoulli variable of temperature 1
            eps = torch.finfo(chosen.dtype).eps
            u = torch.rand_like(chosen).clamp(eps, 1 - eps)
            chosen = chosen + u.log() - (-u).log1p()
        w = torch.sigmoid(chosen)
        return w / (w.sum(-1, keepdim=True) + 1e-12)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products per sample."""
        x = to_adapter_dtype(x, self.A)
        w = self.weights(site, len(x)).to(self.A.dtype)
        A = torch.einsum("bqs,qsdr->bqdr", w, self.A).flatten(1, 2)
        # 1 / r goes onto the few weights of the mixture, not onto the output.
        B = torch.einsum("bqs,qsrd->brqd", w / self.A.shape[-1], self.B).flatten(2)
        y = x.reshape(len(x), -1, x.shape[-1]) @ A @ B
        return y.reshape(*x.shape[:-1], -1)
