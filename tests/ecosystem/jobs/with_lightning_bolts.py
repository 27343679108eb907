"""lightning-bolts: `ImageGPT` under a Trainer; its last release pins pytorch_lightning 1.9."""

from __future__ import annotations

from typing import Any

import cpu_torchvision  # noqa: F401
import pytorch_lightning as pl
import torch
from checks import Case, examine
from pl_bolts.models.vision import ImageGPT
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, attach

generator = torch.Generator().manual_seed(0)
images = torch.rand(16, 8, 8, generator=generator)
data = DataLoader(TensorDataset(images, torch.arange(16) % 4), batch_size=4, shuffle=True)


def fit(module: Any, callbacks: list[Any], ckpt: str | None) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt)


def fit_attached(module: Any, callbacks: list[Any], ckpt: str | None) -> None:
    peft = next((c for c in callbacks if isinstance(c, PEFT)), None)
    if peft is None:
        fit(module, callbacks, ckpt)
        return
    if not any("peft" in m._modules for m in module.modules()):
        attach(
            module, peft.adapters["default"], quantization=peft.quantization, modules_to_save=None
        )
    fit(module, [], ckpt)


def build() -> ImageGPT:
    return ImageGPT(
        embed_dim=32, heads=2, layers=2, pixels=8, vocab_size=16, num_classes=4, batch_size=4
    )


for entry, train, resumes in (
    ("`Trainer.fit`", fit, True),
    ("`attach`, then `Trainer.fit` without the callback", fit_attached, False),
):
    examine(
        Case(
            package="lightning-bolts",
            model="ImageGPT" if resumes else "ImageGPT (attached)",
            entry=entry,
            build=build,
            fit=train,
            predict=lambda module: module(images),
            resumes=resumes,
            weights_only=False,
        )
    )
