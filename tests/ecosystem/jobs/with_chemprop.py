"""chemprop: its `MPNN` under a Trainer, as in its notebooks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from checks import Case, examine
from chemprop import data, models, nn
from supervised import QUIET, fit
from torch import Tensor

SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "C1CCCCC1", "CCOC", "CC#N"] * 2
points = [data.MoleculeDatapoint.from_smi(s, np.array([float(len(s))])) for s in SMILES]
dataset = data.MoleculeDataset(points)


def loader(shuffle: bool) -> Any:
    return data.build_dataloader(dataset, batch_size=4, num_workers=0, shuffle=shuffle)


def predict(module: models.MPNN) -> Tensor:
    found = pl.Trainer(**QUIET).predict(module, loader(False))
    assert found is not None
    return torch.cat(found)


for passing in (nn.BondMessagePassing, nn.AtomMessagePassing):
    examine(
        Case(
            package="chemprop",
            model=f"MPNN({passing.__name__})",
            entry="`Trainer.fit`",
            build=lambda passing=passing: models.MPNN(
                passing(d_h=32, depth=2),
                nn.MeanAggregation(),
                nn.RegressionFFN(input_dim=32, hidden_dim=32),
                batch_norm=True,
            ),
            fit=lambda module, *rest: fit(module, loader(True), *rest, weights_only=False),
            predict=predict,
            weights_only=False,
        )
    )
