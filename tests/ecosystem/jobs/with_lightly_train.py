"""lightly-train: `pretrain`, whose `trainer_args` take callbacks; it builds the LightningModule."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cpu_torchvision  # noqa: F401
import lightly_train
import numpy as np
import timm
import torch
from checks import Case, examine
from PIL import Image
from torch import Tensor

from lightning_peft import PEFT, attach

FOLDER = Path(tempfile.mkdtemp(prefix="lightly-train-"))
(FOLDER / "images").mkdir()
rng = np.random.default_rng(0)
for i in range(8):
    pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(FOLDER / "images" / f"{i}.png")
images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4
    )


def fit(net: Any, callbacks: list[Any], ckpt: str | None) -> None:
    lightly_train.pretrain(
        out=FOLDER / "out",
        overwrite=True,
        data=FOLDER / "images",
        model=net,
        method="simclr",
        epochs=2,
        batch_size=4,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        precision="32-true",
        transform_args={"image_size": (32, 32)},
        trainer_args={"callbacks": callbacks} if callbacks else {},
    )


def fit_attached(net: Any, callbacks: list[Any], ckpt: str | None) -> None:
    peft = next((c for c in callbacks if isinstance(c, PEFT)), None)
    if peft is None:
        fit(net, callbacks, ckpt)
        return
    if not any("peft" in m._modules for m in net.modules()):
        attach(net, peft.adapters["default"], quantization=peft.quantization, modules_to_save=None)
    fit(net, [], ckpt)


def predict(net: Any) -> Tensor:
    return net.forward_features(images)


for entry, train in (
    ("`pretrain(trainer_args={'callbacks': ...})`", fit),
    ("`attach`, then `pretrain` without the callback", fit_attached),
):
    examine(
        Case(
            package="lightly-train",
            model="ViT" if train is fit else "ViT (attached)",
            entry=entry,
            build=build,
            fit=train,
            predict=predict,
            resumes=False,
            weights_only=False,
            remark="writes its arguments as JSON, which no callback is" if train is fit else "",
        )
    )
