"""deepforest: `create_trainer(callbacks=[...])`, then `trainer.fit`, with a small RetinaNet."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cpu_torchvision  # noqa: F401
import torch
from checks import Case, examine
from deepforest.main import deepforest
from PIL import Image
from torch import Tensor
from torchvision.models.detection import retinanet_resnet50_fpn

generator = torch.Generator().manual_seed(0)
images = torch.rand(4, 3, 64, 64, generator=generator)
FOLDER = Path(tempfile.mkdtemp(prefix="deepforest-"))
lines = ["image_path,xmin,ymin,xmax,ymax,label"]
for i, image in enumerate(images):
    pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(FOLDER / f"{i}.png")
    lines += [f"{i}.png,8,8,30,30,Tree", f"{i}.png,20,24,56,60,Tree"]
(FOLDER / "train.csv").write_text("\n".join(lines))
CONFIG = {
    "train": {
        "csv_file": str(FOLDER / "train.csv"),
        "root_dir": str(FOLDER),
        "lr": 1e-3,
        "epochs": 2,
    },
    "accelerator": "cpu",
    "devices": 1,
    "num_classes": 1,
    "label_dict": {"Tree": 0},
    "workers": 0,
    "batch_size": 2,
}


def build() -> deepforest:
    net = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=1, min_size=64, max_size=64
    )
    module = deepforest(model=net, config_args=CONFIG)
    module.set_labels({"Tree": 0})
    return module


def fit(module: Any, callbacks: list[Any], ckpt: str | None) -> None:
    module.create_trainer(logger=False, callbacks=callbacks, enable_progress_bar=False)
    module.trainer.fit(module, ckpt_path=ckpt, weights_only=False)


def predict(module: Any) -> Tensor:
    """The outputs of the heads: what follows them is torchvision's compiled code."""
    features = list(module.model.backbone(images).values())
    found = module.model.head(features)
    return torch.cat([found["cls_logits"], found["bbox_regression"]], -1)


examine(
    Case(
        package="deepforest",
        model="RetinaNet",
        entry="`create_trainer`, `trainer.fit`",
        build=build,
        fit=fit,
        predict=predict,
        lora={"target_modules": ["conv1", "conv2", "conv3"]},
        weights_only=False,
    )
)
