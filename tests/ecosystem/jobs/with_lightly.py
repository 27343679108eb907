"""lightly: LightningModules as in its guide, with its losses, heads and momentum teachers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import cpu_torchvision  # noqa: F401
import pytorch_lightning as pl
import torch
from checks import Case, examine
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn


class Module(pl.LightningModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64))


class SimCLR(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.head = SimCLRProjectionHead(64, 64, 32)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        return self.criterion(self(batch[0]), self(batch[1]))


class BYOL(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = BYOLProjectionHead(64, 64, 32)
        self.prediction_head = BYOLPredictionHead(32, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        one, two = batch
        first = self.criterion(self(one), self.forward_momentum(two))
        return 0.5 * (first + self.criterion(self(two), self.forward_momentum(one)))


class DINO(Module):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone = backbone()
        self.student_head = DINOProjectionHead(64, 64, 32, 128, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = DINOProjectionHead(64, 64, 32, 128)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=128, warmup_teacher_temp_epochs=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x))

    def forward_teacher(self, x: Tensor) -> Tensor:
        return self.teacher_head(self.teacher_backbone(x))

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        update_momentum(self.student_backbone, self.teacher_backbone, m=0.9)
        update_momentum(self.student_head, self.teacher_head, m=0.9)
        teacher = [self.forward_teacher(x) for x in batch]
        student = [self(x) for x in batch]
        return self.criterion(teacher, student, epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)


generator = torch.Generator().manual_seed(0)
images = torch.randn(32, 3, 8, 8, generator=generator)
views = images + 0.1 * torch.randn(images.shape, generator=generator)


def fit(module: Module, callbacks: list[Any], ckpt: str | None) -> None:
    dataset = torch.utils.data.TensorDataset(images, views)
    data = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt)


#: Packed weights cannot be averaged, and the message says so.
TEACHERS = {
    BYOL: ["backbone_momentum", "projection_head_momentum"],
    DINO: ["teacher_backbone", "teacher_head"],
}
for kind in (SimCLR, BYOL, DINO):
    examine(
        Case(
            package="lightly",
            model=kind.__name__,
            entry="`Trainer.fit`",
            build=kind,
            fit=fit,
            predict=lambda module: module(images),
            quantization={"exclude_modules": TEACHERS[kind]} if kind in TEACHERS else {},
        )
    )
