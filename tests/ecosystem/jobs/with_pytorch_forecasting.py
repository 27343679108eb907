"""pytorch_forecasting: `Trainer(callbacks=[...]).fit(model)` with its own modules and dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from checks import Case, examine
from pytorch_forecasting import TimeSeriesDataSet
from pytorch_forecasting.models import NBeats, NHiTS, TemporalFusionTransformer
from supervised import QUIET, fit
from torch import Tensor

t = np.arange(120)
frame = pd.DataFrame({"t": t, "y": np.sin(t / 5), "group": "a"})
dataset = TimeSeriesDataSet(
    frame,
    time_idx="t",
    target="y",
    group_ids=["group"],
    max_encoder_length=24,
    min_encoder_length=24,
    max_prediction_length=6,
    static_categoricals=["group"],
    time_varying_known_reals=["t"],
    time_varying_unknown_reals=["y"],
)
train = dataset.to_dataloader(train=True, batch_size=16, num_workers=0)
later = dataset.to_dataloader(train=False, batch_size=16, num_workers=0)

MODELS: dict[str, Callable[[], pl.LightningModule]] = {
    "NBeats": lambda: NBeats.from_dataset(dataset, widths=[32, 64], backcast_loss_ratio=0.1),
    "NHiTS": lambda: NHiTS.from_dataset(dataset, hidden_size=32),
    "TemporalFusionTransformer": lambda: TemporalFusionTransformer.from_dataset(
        dataset, hidden_size=16, attention_head_size=2, hidden_continuous_size=8
    ),
}


def predict(module: Any) -> Tensor:
    found = module.predict(later, trainer_kwargs=dict(QUIET))
    return found if isinstance(found, Tensor) else torch.cat(list(found))


for name, build in MODELS.items():
    examine(
        Case(
            package="pytorch-forecasting",
            model=name,
            entry="`Trainer.fit`",
            build=build,
            fit=lambda module, *rest: fit(module, train, *rest, weights_only=False),
            predict=predict,
            weights_only=False,
        )
    )
