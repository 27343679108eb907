"""torchgeo: its tasks under a Trainer, with images that the job makes."""

from __future__ import annotations

from typing import Any

import cpu_torchvision  # noqa: F401
import torch
from checks import Case, examine
from supervised import fit
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask

generator = torch.Generator().manual_seed(0)
images = torch.randn(8, 3, 224, 224, generator=generator)  # the size of its ViT


def batches(target: Tensor, name: str) -> Any:
    samples = [{"image": x, name: y} for x, y in zip(images, target, strict=True)]
    return DataLoader(samples, batch_size=4, shuffle=True)


labels, masks = torch.arange(8) % 4, (images[:, 0] > 0).long()
CASES = {
    "ClassificationTask": (
        lambda: ClassificationTask(
            model="vit_tiny_patch16_224", num_classes=4, weights=None, lr=1e-2
        ),
        batches(labels, "label"),
        {},
    ),
    "SemanticSegmentationTask": (
        lambda: SemanticSegmentationTask(
            model="unet", backbone="resnet18", num_classes=2, weights=None, lr=1e-2
        ),
        batches(masks, "mask"),
        {"target_modules": ["conv1", "conv2"]},
    ),
}
for name, (build, data, targets) in CASES.items():
    examine(
        Case(
            package="torchgeo",
            model=name,
            entry="`Trainer.fit`",
            build=build,
            fit=lambda module, *rest, data=data: fit(module, data, *rest, validation=data),
            predict=lambda module: module(images),
            lora=targets,
        )
    )
