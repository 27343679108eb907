"""timm: nets of `create_model` inside a LightningModule."""

from __future__ import annotations

import cpu_torchvision  # noqa: F401
import timm
import torch
from checks import Case, examine
from supervised import Supervised, fit, loader

NETS = {
    "vit_tiny_patch16_224": {
        "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4,
    },
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4),
    },
    "beit_base_patch16_224": {
        "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4,
    },
    "eva02_tiny_patch14_224": {
        "img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 4,
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64)},
    "mobilenetv3_small_050": {},
}  # fmt: skip
#: "all-linear" finds no linear layer but the head, and says so.
CONVOLUTIONS = {
    "convnext_atto": ["conv_dw", "fc1", "fc2"],
    "mobilenetv3_small_050": ["conv_pw", "conv_pwl", "conv_dw"],
}
images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
labels = torch.arange(16) % 8


def build(name: str) -> Supervised:
    return Supervised(timm.create_model(name, num_classes=8, **NETS[name]))


for name in NETS:
    size = NETS[name].get("img_size", 32)
    x = images[..., :size, :size]
    examine(
        Case(
            package="timm",
            model=name,
            entry="`Trainer.fit`",
            build=lambda name=name: build(name),
            fit=lambda module, *rest, x=x: fit(module, loader(x, labels), *rest),
            predict=lambda module, x=x: module(x),
            lora={"target_modules": CONVOLUTIONS[name]} if name in CONVOLUTIONS else {},
        )
    )
