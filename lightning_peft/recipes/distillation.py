"""Knowledge distillation. The teacher is the base with adapters disabled, or another model.

L = T² · mean over rows of KL(softmax(t / T) ‖ softmax(s / T)).   Hinton et al. 2015,
arXiv:1503.02531, section 2.

The base of an adapted model is the model from before fine-tuning, so a teacher that knows what must
not be forgotten costs one more forward and no memory::

    def training_step(self, batch):
        with teaching(self):
            targets = self(batch.x)
        logits = self(batch.x)
        return cross_entropy(logits, batch.y) + distillation_loss(logits, targets, temperature=2)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.activation import disable_adapters
from lightning_peft.models.modules import evaluating

__all__ = ["distillation_loss", "teaching"]


@contextmanager
def teaching(model: nn.Module) -> Iterator[None]:
    """Make `model` a teacher inside the block: adapters disabled, eval mode, no gradients.

    Trained copies (modules_to_save) are off too: the teacher has the base's own head.

    Raises:
        RuntimeError: adapters are merged, so that there is no base.
    """
    with disable_adapters(model), torch.no_grad(), evaluating(model):
        yield


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return T² · KL(teacher ‖ student) at temperature T, a scalar in fp32.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0. With T² gradients keep their size when T changes.
        mask: [...], rows that count (no padding); None means all.

    Raises:
        ValueError: other shapes, T ≤ 0, or no row that counts.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: expected logits of one shape, got {list(student.shape)} of the "
            f"student and {list(teacher.shape)} of the teacher"
        )
    if not temperature > 0:
        raise ValueError(f"distillation_loss: expected temperature > 0, got {temperature}")
    s = F.log_softmax(student.float() / temperature, dim=-1)
    t = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    rows = F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    if mask is not None:
        if mask.shape != rows.shape:
            raise ValueError(
                f"distillation_loss: mask: expected shape {list(rows.shape)}, got "
                f"{list(mask.shape)}"
            )
        rows = rows[mask.bool()]
    if not rows.numel():
        raise ValueError("distillation_loss: expected rows that count, got none")
    return temperature**2 * rows.mean()
