"""darts: `model.fit(series)`; the callback goes into `pl_trainer_kwargs`."""

from __future__ import annotations

import numpy as np
from checks import Run, method
from darts import TimeSeries
from darts.models import TransformerModel

NARROW = ("encoder", "decoder")  # one input or output: too narrow for rank 4


def model(*callbacks: object) -> TransformerModel:
    return TransformerModel(
        input_chunk_length=24,
        output_chunk_length=12,
        d_model=32,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=64,
        n_epochs=1,
        random_state=1,
        pl_trainer_kwargs={
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
        },
    )


def main() -> None:
    run = Run("darts", NARROW)
    t = np.arange(240)
    series = TimeSeries.from_values(np.sin(t / 5).astype(np.float32))
    base = model()
    base.fit(series)
    weights = str(run.folder / "base.pt")
    base.save(weights)

    def finetune(ckpt: str | None) -> TransformerModel:
        tuned = model(method(NARROW))
        tuned.load_weights(weights)
        run.attach_from(tuned.model, ckpt)
        tuned.fit(series)
        return tuned

    first = finetune(None)
    path = run.save(first.model)
    again = finetune(path)
    run.done(first.model, again.model, again.predict(12).values())


main()
