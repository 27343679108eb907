"""LightningCLI: the method, the quantisation and the data come from a YAML file.

python examples/cli.py fit --config examples/cli.yaml
"""

import lightning.pytorch as pl
import torch
from byte_model import LanguageModel, split, texts
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader


class Text(pl.LightningDataModule):
    """One kind of text of byte_model.texts(), `batches` batches of it."""

    def __init__(self, kind: str = "python", batches: int = 100):
        super().__init__()
        self.train, self.held_out = split(texts()[kind], batches)

    def train_dataloader(self) -> DataLoader:
        return self.train

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 32)


class Model(LanguageModel):
    """The language model, with its loss on held-out text."""

    def __init__(self, width: int = 96, layers: int = 3, lr: float = 3e-3):
        super().__init__(width, layers, lr)

    def validation_step(self, ids: Tensor) -> None:
        self.log("loss", self.net(input_ids=ids, labels=ids).loss, prog_bar=True)


def main(arguments: list[str] | None = None) -> LightningCLI:
    torch.set_float32_matmul_precision("high")
    return LightningCLI(Model, Text, args=arguments, save_config_callback=None)


if __name__ == "__main__":
    print(f"loss on held-out text: {main().trainer.callback_metrics['loss']:.3f}")
