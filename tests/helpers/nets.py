"""Tiny LightningModules and one way to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, LoRA
from tests.helpers.lightning_package import InPackage, pl

ROWS, FEATURES, HIDDEN, CLASSES = 32, 8, 16, 3


def build() -> nn.Sequential:
    """The pretrained net: the same values wherever and whenever it is built."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    net = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        nn.Tanh(),
        nn.Dropout(0.1),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, CLASSES),
    )
    torch.set_rng_state(state)
    return net


class Plain(InPackage):
    """Knows nothing of PEFT; the net is built in `where`."""

    def __init__(self, where: str = "init", lr: float = 1e-2, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.where, self.lr, self.batch_size = where, lr, batch_size
        if where == "init":
            self.net = build()

    def setup(self, stage: str) -> None:
        if self.where == "setup" and not hasattr(self, "net"):
            self.net = build()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Configured(Plain):
    """Builds its net in `configure_model`."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__("configure_model", lr)

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = build()


def module(where: str) -> Plain:
    return Configured() if where == "configure_model" else Plain(where)


def loader(batch_size: int = 8, shuffle: bool = False) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, FEATURES, generator=g)
    y = torch.randint(0, CLASSES, (ROWS,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def lora(**kwargs: Any) -> LoRA:
    return LoRA(**{"r": 2, "dropout": 0.1, "target_modules": "all-linear", **kwargs})


def peft(**kwargs: Any) -> PEFT:
    return PEFT(lora(), **{"report": False, **kwargs})


def trainer(*callbacks: Any, folder: Path | None = None, **kwargs: Any) -> Any:
    """Quiet, on the CPU; with `folder`, a checkpoint at the end of every epoch, and `last.ckpt`."""
    saving = [] if folder is None else [saver(folder)]
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(saving)
        or any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "max_epochs": 2,
    }
    return pl.Trainer(callbacks=[*callbacks, *saving], **{**quiet, **kwargs})


def saver(folder: Path, **kwargs: Any) -> Any:
    return pl.callbacks.ModelCheckpoint(
        folder,
        filename="{epoch}",
        save_last=True,
        save_top_k=-1,
        save_on_train_epoch_end=True,
        **kwargs,
    )


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything but adapters."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if ".peft." not in f".{k}"}


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if ".peft." in f".{k}"}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
