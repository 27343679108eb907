"""A LightningModule around a small Hugging Face model, and its data."""

import functools

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


class MyModule(pl.LightningModule):
    """Any module; in practice `net` is pretrained."""

    def __init__(self, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = LlamaForCausalLM(config)

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the language model's loss."""
        return self.net(input_ids=ids, labels=ids).loss

    def train_dataloader(self) -> DataLoader:
        """Return two batches of token ids [4, 16]."""
        return data

    def configure_callbacks(self) -> list[pl.Callback]:
        """Save the last checkpoint in the current folder."""
        return [ModelCheckpoint(".", save_last=True, enable_version_counter=False)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an ordinary optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


Trainer = functools.partial(pl.Trainer, max_epochs=1, enable_model_summary=False)
data = DataLoader(torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0)), 4)
module = MyModule()
model = MyModule().net
