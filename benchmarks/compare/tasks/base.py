"""What every task of the comparison offers, and the schedule that every run uses."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["HEAD_RATE", "Module", "Split", "Task", "warmed"]

Split = Literal["validation", "test"]
HEAD_RATE = 3e-3  # of a head that is trained next to every method


def warmed(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """A linear warm-up over a tenth of the steps, then a linear decay to zero."""
    up = max(1, steps // 10)
    factor: Callable[[int], float] = lambda i: min((i + 1) / up, (steps - i) / (steps - up))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Module(pl.LightningModule):
    """A model with a loss; the head has a learning rate of its own.

    Attributes:
        lr: Learning rate of everything but the head.
        head_rate: Learning rate of the head.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], head: str
    ) -> None:
        super().__init__()
        self.model, self.head = model, head
        self._loss = loss
        self.lr, self.head_rate = 0.0, HEAD_RATE

    def training_step(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        heads = [p for p in self.head_parameters() if p.requires_grad]
        known = {id(p) for p in heads}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": rest, "lr": self.lr}, {"params": heads, "lr": self.head_rate}]
        groups = [g for g in groups if g["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.lr or self.head_rate, weight_decay=0.0)
        return warmed(optimizer, int(self.trainer.estimated_stepping_batches))

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the head that is trained next to every method; none if there is none."""
        return list(self.model.get_submodule(self.head).parameters()) if self.head else []


class Task(ABC):
    """One task: a pretrained model, three splits, a metric.

    Attributes:
        name: Its id in the CSV files.
        metric: Name and unit of the score.
        higher: Whether more is better.
        margin: Half width of the interval that counts as equal, in units of the metric; relative to
            the reference's mean if `relative`.
        root: Path below the module of what a method adapts.
        head: Path below `model` of the head that every row trains, or "".
        targets: Linear layers that low-rank methods adapt, and that "full, same layers" trains.
        readout: Path below `model` of the layer that "head only" trains where there is no `head`.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher: ClassVar[bool] = True
    margin: ClassVar[float] = 1.0
    relative: ClassVar[bool] = False
    root: ClassVar[str]
    head: ClassVar[str] = ""
    readout: ClassVar[str] = ""
    targets: ClassVar[tuple[str, ...]]
    embeddings: ClassVar[tuple[str, ...]] = ()

    template: nn.Module

    def module(self, lr: float, head_rate: float = HEAD_RATE) -> Module:
        """Return the pretrained model, with a fresh head under the current seed."""
        model = copy.deepcopy(self.template)
        if self.head:
            self.reset_head(model.get_submodule(self.head))
        made = Module(model, self.loss, self.head)
        made.lr, made.head_rate = lr, head_rate
        return made

    def reset_head(self, head: nn.Module) -> None:
        """Give the head random values."""
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch."""

    @abstractmethod
    def loader(self) -> DataLoader[Any]:
        """Return all training batches of a run, in random order."""

    @abstractmethod
    def score(self, module: Module, split: Split) -> float:
        """Return the metric on a split."""


def shuffled(rows: Any, size: int, batch: int, passes: int) -> DataLoader[Any]:
    """Return `passes` random orders of `size` rows, in batches made by ``rows(indices)``."""
    orders = [torch.randperm(size) for _ in range(passes)]
    batches = [rows(chosen) for order in orders for chosen in order.split(batch)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
