"""pytorch_forecasting: `Trainer(callbacks=[...]).fit(model)` with its own module and dataset."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from checks import Run, method
from pytorch_forecasting import TimeSeriesDataSet
from pytorch_forecasting.models import NBeats

NARROW = ("theta_f_fc", "theta_b_fc")  # three outputs: too narrow for rank 4


def data() -> TimeSeriesDataSet:
    t = np.arange(120)
    frame = pd.DataFrame({"t": t, "y": np.sin(t / 5), "group": "a"})
    return TimeSeriesDataSet(
        frame,
        time_idx="t",
        target="y",
        group_ids=["group"],
        max_encoder_length=24,
        min_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["y"],
    )


def main() -> None:
    run, dataset = Run("pytorch-forecasting", NARROW), data()
    loader = dataset.to_dataloader(train=True, batch_size=16, num_workers=0)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}

    def model() -> NBeats:
        return NBeats.from_dataset(dataset, widths=[32, 64], backcast_loss_ratio=0.1)

    def fit(module: NBeats, *callbacks: pl.Callback) -> NBeats:
        trainer = pl.Trainer(
            max_epochs=1, callbacks=list(callbacks), enable_checkpointing=False, **quiet
        )
        trainer.fit(module, loader)
        return module

    pretrained = fit(model()).state_dict()

    def finetune(ckpt: str | None) -> NBeats:
        module = model()
        module.load_state_dict(pretrained)
        run.attach_from(module, ckpt)
        return fit(module, method(NARROW))

    first = finetune(None)
    path = run.save(first)
    again = finetune(path)
    with torch.no_grad():
        x, _ = next(iter(loader))
        run.done(first, again, again.eval()(x)["prediction"].numpy())


main()
