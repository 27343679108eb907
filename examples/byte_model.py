"""A small language model over bytes, and four kinds of text that every Python brings along."""

import _pydecimal
import inspect
import string
import unicodedata
from pydoc_data import topics

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 96, 16


def texts() -> dict[str, str]:
    """English about Python, Python, names of characters, sums."""
    letters = (unicodedata.name(chr(i), "") for i in range(0x3000) if not 0x2800 <= i < 0x2900)
    sums = (f"{a} + {b} = {a + b}; {a} * {b} = {a * b}\n" for a in range(60) for b in range(60))
    return {
        "prose": "\n".join(topics.topics.values()),
        "python": inspect.getsource(_pydecimal),
        "names": "\n".join(filter(None, letters)),
        "sums": "".join(sums),
    }


def tokens(text: str) -> Tensor:
    """One byte a token, in rows of one length."""
    plain = "".join(c if c in string.printable else "?" for c in text)
    ids = torch.frombuffer(bytearray(plain, "ascii"), dtype=torch.uint8).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def split(text: str, batches: int) -> tuple[DataLoader, Tensor]:
    """So many batches to train on, from everything but every eighth row; 64 rows of those."""
    rows = tokens(text)
    held_out = torch.arange(len(rows)) % 8 == 7
    train = rows[~held_out][torch.randint(int((~held_out).sum()), (batches * BATCH,))]
    return DataLoader(train, BATCH), rows[held_out][:64]


class LanguageModel(pl.LightningModule):
    """An ordinary module around an ordinary Hugging Face model."""

    def __init__(self, width: int = 96, layers: int = 3, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_attention_heads=4,
            num_hidden_layers=layers, num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.net, self.lr = LlamaForCausalLM(config), lr
        self.losses: list[float] = []

    def training_step(self, ids: Tensor) -> Tensor:
        loss = self.net(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@torch.no_grad()
def loss(module: LanguageModel, rows: Tensor) -> float:
    """Mean over bytes, in nats."""
    module.eval()
    value = module.net(input_ids=rows, labels=rows).loss.item()
    module.train()
    return value


def fit(module: LanguageModel, data: DataLoader, *callbacks: pl.Callback) -> None:
    """One pass over the data."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    module.train()
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[*callbacks], **quiet).fit(module, data)
