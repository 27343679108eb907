"""Time series: an encoder that forecasts Seattle's temperature learns San Francisco's.

Hourly temperatures of one year from the PyPI package vega_datasets, read from its files. A window
is six days; the target is the 24 hours that follow. Training windows lie in the first half of each
month, validation windows in the second half of odd months, test windows in that of even months, so
no hour belongs to two splits.
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

DAYS, DAY, STRIDE = 6, 24, 6
BATCH, PASSES = 16, 6


class Forecaster(nn.Module):
    """Days [batch, DAYS, 24] → the next day [batch, 24]."""

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
        self.head = nn.Linear(64, DAY)

    def forward(self, days: Tensor) -> Tensor:
        states = self.encoder(inputs_embeds=self.embed(days)).last_hidden_state
        return days[:, -1] + self.head(states[:, -1])  # a change of the last day


class Series(Task):
    """Root mean square error in °F; lower is better. Equal is within 1 % of the reference."""

    name: ClassVar[str] = "series"
    metric: ClassVar[str] = "RMSE, °F"
    higher: ClassVar[bool] = False
    margin: ClassVar[float] = 0.01
    relative: ClassVar[bool] = True
    root: ClassVar[str] = "model.encoder"
    head: ClassVar[str] = "head"
    targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "dense")

    def __init__(self, work: Path) -> None:
        source, own = windows("seattle-temps.csv"), windows("sf-temps.csv")
        every = torch.cat([days for days, _ in source.values()])
        self.mean, self.scale = float(every.mean()), float(every.std())
        self.splits = {k: (self._scaled(x), self._scaled(y)) for k, (x, y) in own.items()}
        x, y = (self._scaled(torch.cat([v[i] for v in source.values()])) for i in (0, 1))

        def batches() -> Iterator[Any]:
            while True:
                rows = torch.randint(len(x), (32,))
                yield x[rows], y[rows]

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Forecaster()
        path = work / "series.pt"
        self.template = pretrained(model, path, batches, self.loss, steps=800, lr=1e-3)

    def _scaled(self, degrees: Tensor) -> Tensor:
        return (degrees - self.mean) / self.scale

    def reset_head(self, head: nn.Module) -> None:
        """Keep the head: it forecasts already."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def loader(self) -> DataLoader[Any]:
        x, y = self.splits["train"]
        return shuffled(lambda rows: (x[rows], y[rows]), len(x), BATCH, PASSES)

    @torch.no_grad()
    def score(self, module: Module, split: Split) -> float:
        module.eval()
        x, y = self.splits[split]
        return self.scale * float(nn.functional.mse_loss(module.model(x), y)) ** 0.5


def windows(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (days [N, DAYS, 24], next day [N, 24]) in °F by split."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("series: pip install vega_datasets")
    with (Path(spec.origin).parent / "_data" / name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [(datetime.strptime(r["date"], "%Y/%m/%d %H:%M:%S"), float(r["temp"])) for r in lines]
    degrees = torch.tensor([t for _, t in rows])
    length = (DAYS + 1) * DAY
    found: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for start in range(0, len(rows) - length + 1, STRIDE):
        first, last = rows[start][0], rows[start + length - 1][0]
        if first.month != last.month or (first.day <= 15) != (last.day <= 15):
            continue
        split = "train" if last.day <= 15 else ("validation" if first.month % 2 else "test")
        found[split].append(degrees[start : start + length].view(DAYS + 1, DAY))
    stacked = {k: torch.stack(v) for k, v in found.items()}
    return {k: (v[:, :-1], v[:, -1]) for k, v in stacked.items()}
