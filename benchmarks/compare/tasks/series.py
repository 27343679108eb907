"""Time series: an encoder that knows Seattle's year learns San Francisco's.

Hourly temperatures of one year from the PyPI package vega_datasets, read from its files. A window
is three days without their mean, and the class is the month. Training windows lie in the days 1 to
15 of each month, validation windows in 16 to 22, test windows in the rest, so no hour belongs to
two splits.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.compare.tasks.base import Module, Split, Task, shuffled
from benchmarks.compare.tasks.pretraining import pretrained

__all__ = ["Series"]

DAYS, DAY, STRIDE = 3, 24, 6
BATCH, PASSES, MONTHS = 16, 6, 12


class Reader(nn.Module):
    """Days [batch, DAYS, 24] → logits of the months [batch, 12]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=DAYS, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.embed = nn.Linear(DAY, 64)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(64, MONTHS)

    def forward(self, days: Tensor) -> Tensor:
        states = self.encoder(inputs_embeds=self.embed(days)).last_hidden_state
        logits: Tensor = self.head(states.mean(1))
        return logits


class Series(Task):
    """Accuracy in percent."""

    name: ClassVar[str] = "series"
    metric: ClassVar[str] = "accuracy, %"
    root: ClassVar[str] = "model.encoder"
    head: ClassVar[str] = "head"
    targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "dense")

    def __init__(self, work: Path) -> None:
        source, self.splits = windows("seattle-temps.csv"), windows("sf-temps.csv")
        x, y = (torch.cat([part[i] for part in source.values()]) for i in (0, 1))

        def batches() -> Iterator[Any]:
            while True:
                rows = torch.randint(len(x), (32,))
                yield x[rows], y[rows]

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Reader()
        path = work / "series_months.pt"
        self.template = pretrained(model, path, batches, self.loss, steps=800, lr=1e-3)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def loader(self) -> DataLoader[Any]:
        x, y = self.splits["train"]
        return shuffled(lambda rows: (x[rows], y[rows]), len(x), BATCH, PASSES)

    @torch.no_grad()
    def score(self, module: Module, split: Split) -> float:
        module.eval()
        x, y = self.splits[split]
        return 100 * float((module.model(x).argmax(-1) == y).float().mean())


def windows(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (days [N, DAYS, 24] without their mean, month [N]) by split, in units of 10 °F."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("series: pip install vega_datasets")
    with (Path(spec.origin).parent / "_data" / name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    dates = [datetime.strptime(line["date"][:10], "%Y/%m/%d") for line in lines]
    degrees = torch.tensor([float(line["temp"]) for line in lines])
    length = DAYS * DAY
    found: dict[str, list[tuple[Tensor, int]]] = {"train": [], "validation": [], "test": []}
    for start in range(0, len(lines) - length + 1, STRIDE):
        first, last = dates[start], dates[start + length - 1]
        split = _split_of(first.day)
        if first.month == last.month and split == _split_of(last.day):
            window = degrees[start : start + length].view(DAYS, DAY)
            found[split].append(((window - window.mean()) / 10, first.month - 1))
    return {
        split: (torch.stack([x for x, _ in own]), torch.tensor([y for _, y in own]))
        for split, own in found.items()
    }


def _split_of(day: int) -> str:
    return "train" if day <= 15 else ("validation" if day <= 22 else "test")
