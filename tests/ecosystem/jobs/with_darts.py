"""darts: `model.fit(series)`; the callback goes into `pl_trainer_kwargs`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import Case, examine
from darts import TimeSeries
from darts.models import NBEATSModel, TFTModel, TransformerModel
from torch import Tensor

FOLDER = Path(tempfile.mkdtemp(prefix="darts-"))
series = TimeSeries.from_values(np.sin(np.arange(240) / 5).astype(np.float32))
SIZES = {"input_chunk_length": 24, "output_chunk_length": 12, "n_epochs": 2, "random_state": 1}
MODELS = {
    TransformerModel: {
        "d_model": 32, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 1,
        "dim_feedforward": 64,
    },
    NBEATSModel: {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 32},
    TFTModel: {
        "hidden_size": 16, "num_attention_heads": 2, "add_relative_index": True,
        "likelihood": None, "loss_fn": torch.nn.MSELoss(),
    },
}  # fmt: skip


def quiet(callbacks: list[Any]) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "callbacks": callbacks,
    }


class Subject:
    """A model of darts with pretrained weights; its callbacks are fixed when it is made."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.model = self.made([])

    def made(self, callbacks: list[Any]) -> Any:
        model = self.kind(**SIZES, **MODELS[self.kind], pl_trainer_kwargs=quiet(callbacks))
        base = FOLDER / f"{self.kind.__name__}.pt"
        if not base.exists():
            model.fit(series)
            model.save(str(base))
        model.load_weights(str(base))
        return model

    def fit(self, callbacks: list[Any], ckpt: str | None) -> None:
        former, self.model = self.model, self.made(callbacks)
        self.model.model = former.model  # adapters that were loaded into it
        self.model.fit(series)

    def predict(self) -> Tensor:
        return torch.tensor(self.model.predict(12, series=series).values())


for kind in MODELS:
    examine(
        Case(
            package="darts",
            model=kind.__name__,
            entry="`model.fit`",
            build=lambda kind=kind: Subject(kind),
            fit=Subject.fit,
            predict=Subject.predict,
            module=lambda subject: subject.model.model,
            resumes=False,
            weights_only=False,
        )
    )
