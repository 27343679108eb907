"""neuralforecast: `NeuralForecast(models).fit(df)`; the callback is an argument of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from checks import Case, examine
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS, PatchTST, iTransformer
from torch import Tensor

t = np.arange(200)
y = np.sin(t / 5) + 0.05 * np.random.default_rng(0).standard_normal(len(t))
days = pd.date_range("2020-01-01", periods=200)
frame = pd.concat(
    [pd.DataFrame({"unique_id": name, "ds": days, "y": s * y}) for name, s in (("a", 1), ("b", 2))]
)

STEPS = 16  # one batch per epoch
MODELS: dict[type, dict[str, Any]] = {
    NHITS: {"mlp_units": 3 * [[32, 32]]},
    PatchTST: {"hidden_size": 32, "linear_hidden_size": 64, "n_heads": 4, "encoder_layers": 1},
    iTransformer: {"n_series": 2, "hidden_size": 32, "n_heads": 4, "e_layers": 1, "d_ff": 64},
}


def model(kind: Any, callbacks: list[Any]) -> Any:
    return kind(
        h=12,
        input_size=24,
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        random_seed=1,
        **MODELS[kind],
    )


class Subject:
    """A forecaster with one model; the model's callbacks are fixed when it is made."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.forecast = NeuralForecast([model(kind, [])], freq="D")

    def fit(self, callbacks: list[Any], ckpt: str | None) -> None:
        self.module.trainer_kwargs["callbacks"] = callbacks
        self.forecast.fit(frame)

    def predict(self) -> Tensor:
        found = self.forecast.predict(frame)[self.kind.__name__]
        return torch.tensor(found.to_numpy())

    @property
    def module(self) -> Any:
        return self.forecast.models[0]


def build(kind: Any) -> Subject:
    subject = Subject(kind)
    subject.forecast.fit(frame, val_size=0)
    return subject


for kind in MODELS:
    examine(
        Case(
            package="neuralforecast",
            model=kind.__name__,
            entry="`NeuralForecast.fit`",
            build=lambda kind=kind: build(kind),
            fit=Subject.fit,
            predict=Subject.predict,
            module=lambda subject: subject.module,
            resumes=False,
            weights_only=False,
        )
    )
