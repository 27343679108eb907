"""torchvision: its models inside a LightningModule."""

from __future__ import annotations

import cpu_torchvision  # noqa: F401
import torch
import torchvision
from checks import Case, examine
from supervised import Supervised, fit, loader
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

SWIN = {
    "patch_size": [4, 4], "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4],
    "window_size": [4, 4], "num_classes": 8,
}  # fmt: skip
NETS = {
    "VisionTransformer": lambda: VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=8),
    "SwinTransformer": lambda: SwinTransformer(**SWIN),
    "SwinTransformer (V2)": lambda: SwinTransformer(
        **SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    ),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=8),
}
#: "all-linear" finds no linear layer but the head, and says so.
CONVOLUTIONS = {"resnet18": ["conv1", "conv2"]}
images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
labels = torch.arange(16) % 8


def build(name: str) -> Supervised:
    net = NETS[name]()
    for head in ("heads", "head", "fc", "classifier"):  # torchvision's own heads begin with zeros
        for parameter in getattr(net, head, nn.Identity()).parameters():
            nn.init.normal_(parameter, std=0.1)
    return Supervised(net)


for name in NETS:
    examine(
        Case(
            package="torchvision",
            model=name,
            entry="`Trainer.fit`",
            build=lambda name=name: build(name),
            fit=lambda module, *rest: fit(module, loader(images, labels), *rest),
            predict=lambda module: module(images),
            lora={"target_modules": CONVOLUTIONS[name]} if name in CONVOLUTIONS else {},
        )
    )
