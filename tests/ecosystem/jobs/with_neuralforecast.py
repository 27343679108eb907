"""neuralforecast: `NeuralForecast(models).fit(df)`; the callback is an argument of the model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from checks import Run, method
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

STEPS = 15


def data() -> pd.DataFrame:
    t = np.arange(200)
    rng = np.random.default_rng(0)
    y = np.sin(t / 5) + 0.05 * rng.standard_normal(len(t))
    return pd.DataFrame(
        {"unique_id": "a", "ds": pd.date_range("2020-01-01", periods=len(t)), "y": y}
    )


def model(*callbacks: object) -> NHITS:
    return NHITS(
        h=12,
        input_size=24,
        max_steps=STEPS,
        mlp_units=3 * [[32, 32]],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        random_seed=1,
    )


def main() -> None:
    run, df = Run("neuralforecast"), data()
    base = NeuralForecast([model()], freq="D")
    base.fit(df)
    pretrained = base.models[0].state_dict()

    def finetune(ckpt: str | None) -> NeuralForecast:
        tuned = NeuralForecast([model(method())], freq="D")
        tuned.models[0].load_state_dict(pretrained)
        run.attach_from(tuned.models[0], ckpt)
        tuned.fit(df)
        return tuned

    first = finetune(None)
    path = run.save(first.models[0])
    again = finetune(path)
    run.done(first.models[0], again.models[0], again.predict()["NHITS"].to_numpy())


main()
