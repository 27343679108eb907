"""The steps of tests/test_end_to_end.py that run in a process of their own."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from transformers import AutoModel

IDS = torch.arange(48).reshape(4, 12) % 50
LABELS = torch.tensor([0, 1, 2, 0])


class Classifier(pl.LightningModule):
    """A user's module: an encoder, a head of its own."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = AutoModel.from_pretrained(model)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(input_ids=ids).last_hidden_state[:, 0])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def scores(module: Classifier) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IDS)


def hidden(encoder: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return encoder.eval()(input_ids=IDS).last_hidden_state


if __name__ == "__main__":
    step, source, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if step == "load":
        from lightning_peft import load_from_checkpoint

        torch.save(scores(load_from_checkpoint(Classifier, source)), out)
    elif step == "plain":
        torch.save(hidden(AutoModel.from_pretrained(source)), out)
        assert not any(name.startswith("lightning_peft") for name in sys.modules)
