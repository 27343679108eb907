"""lightly: a LightningModule as in its guide, with its loss, head and transform."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from checks import Run, method
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = SimCLRProjectionHead(64, 64, 32)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.criterion(self(batch[0]), self(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    run = Run("lightly")
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16)
    views = torch.utils.data.TensorDataset(images, images + 0.1 * torch.randn_like(images))
    data = torch.utils.data.DataLoader(views, batch_size=8)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}

    def fit(module: SimCLR, *callbacks: pl.Callback) -> SimCLR:
        trainer = pl.Trainer(
            max_epochs=1, callbacks=list(callbacks), enable_checkpointing=False, **quiet
        )
        trainer.fit(module, data)
        return module

    pretrained = fit(SimCLR()).state_dict()

    def finetune(ckpt: str | None) -> SimCLR:
        module = SimCLR()
        module.load_state_dict(pretrained)
        run.attach_from(module, ckpt)
        return fit(module, method())

    first = finetune(None)
    path = run.save(first)
    again = finetune(path)
    with torch.no_grad():
        run.done(first, again, again.eval()(images).numpy())


main()
