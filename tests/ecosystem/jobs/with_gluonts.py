"""gluonts: the LightningModule of a PyTorch estimator, trained as the estimator does it."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pandas as pd
import torch
from checks import Case, examine
from gluonts.dataset.pandas import PandasDataset
from gluonts.torch import DeepAREstimator, PatchTSTEstimator, SimpleFeedForwardEstimator
from gluonts.torch.model.estimator import PyTorchLightningEstimator
from torch import Tensor

index = pd.date_range("2020-01-01", periods=200, freq="D")
series = pd.Series(np.sin(np.arange(200) / 5).astype("float32"), index=index)
dataset = PandasDataset({"a": series})
#: The estimator reads its best checkpoint back, also after a resume.
FOLDER = tempfile.mkdtemp(prefix="gluonts-")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Subject:
    """An estimator that hands out one module, so that its adapters can be looked at."""

    def __init__(self, kind: Any, **options: Any) -> None:
        self.kind, self.options = kind, options
        estimator = kind(**options)
        self.module = estimator.create_lightning_module()
        self.predictor: Any = None

    def estimator(self, **trainer: Any) -> PyTorchLightningEstimator:
        made = self.kind(**self.options, trainer_kwargs={**QUIET, **trainer})
        made.create_lightning_module = lambda: self.module
        return made

    def fit(self, callbacks: list[Any], ckpt: str | None) -> None:
        trainer = {"callbacks": callbacks, "max_epochs": 2, "default_root_dir": FOLDER}
        self.estimator(**trainer).train_model(dataset, ckpt_path=ckpt)

    def predict(self) -> Tensor:
        estimator = self.estimator()
        predictor = estimator.create_predictor(estimator.create_transformation(), self.module)
        np.random.seed(0)
        return torch.tensor(np.stack([f.mean for f in predictor.predict(dataset)]))


#: The estimator returns its best epoch: enough batches that the second one is.
COMMON = {"prediction_length": 6, "context_length": 24, "num_batches_per_epoch": 20}
MODELS = {
    "SimpleFeedForward": (SimpleFeedForwardEstimator, {**COMMON, "hidden_dimensions": [32, 32]}),
    "DeepAR": (DeepAREstimator, {**COMMON, "freq": "D", "hidden_size": 32}),
    "PatchTST": (
        PatchTSTEstimator,
        {**COMMON, "patch_len": 8, "d_model": 32, "dim_feedforward": 64},
    ),
}

#: The linear layers of DeepAR have one output each.
TARGETS = {"DeepAR": {"target_modules": ["rnn"]}}

for name, (kind, options) in MODELS.items():
    examine(
        Case(
            package="gluonts",
            model=name,
            entry="`Estimator.train_model`",
            build=lambda kind=kind, options=options: Subject(kind, **options),
            fit=Subject.fit,
            predict=Subject.predict,
            module=lambda subject: subject.module,
            peft={"checkpoint": "full"},
            lora=TARGETS.get(name, {}),
        )
    )
