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


def series(**variables: list[str]) -> TimeSeriesDataSet:
    return TimeSeriesDataSet(
        frame,
        time_idx="t",
        target="y",
        group_ids=["group"],
        max_encoder_length=24,
        min_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["y"],
        **variables,
    )


def batches(dataset: TimeSeriesDataSet, train: bool) -> Any:
    return dataset.to_dataloader(train=train, batch_size=16, num_workers=0)


alone = series()
known = series(static_categoricals=["group"], time_varying_known_reals=["t"])
MODELS: dict[str, tuple[TimeSeriesDataSet, Callable[[], pl.LightningModule]]] = {
    "NBeats": (
        alone,
        lambda: NBeats.from_dataset(alone, widths=[32, 64], backcast_loss_ratio=0.1),
    ),
    "NHiTS": (alone, lambda: NHiTS.from_dataset(alone, hidden_size=32)),
    "TemporalFusionTransformer": (
        known,
        lambda: TemporalFusionTransformer.from_dataset(
            known, hidden_size=16, attention_head_size=2, hidden_continuous_size=8
        ),
    ),
}


def predict(module: Any, data: TimeSeriesDataSet) -> Tensor:
    found = module.predict(batches(data, False), trainer_kwargs=dict(QUIET))
    return found if isinstance(found, Tensor) else torch.cat(list(found))


for name, (data, build) in MODELS.items():
    examine(
        Case(
            package="pytorch-forecasting",
            model=name,
            entry="`Trainer.fit`",
            build=build,
            fit=lambda module, *rest, data=data: fit(
                module, batches(data, True), *rest, weights_only=False
            ),
            predict=lambda module, data=data: predict(module, data),
            weights_only=False,
        )
    )
