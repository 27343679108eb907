"""pytorch_tabular: `TabularModel.fit(train, callbacks=[...])`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from checks import Case, examine
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig, FTTransformerConfig
from torch import Tensor

rng = np.random.default_rng(0)
x = rng.standard_normal((256, 4)).astype("float32")
frame = pd.DataFrame(x, columns=list("abcd"))
frame["group"] = rng.integers(0, 3, 256).astype(str)
frame["target"] = (x[:, 0] + x[:, 1] > 0).astype(int)

CONFIGS = {
    "CategoryEmbeddingModel": CategoryEmbeddingModelConfig(task="classification", layers="64-32"),
    "FTTransformer": FTTransformerConfig(
        task="classification", input_embed_dim=16, num_heads=4, num_attn_blocks=1
    ),
}


class Subject:
    def __init__(self, name: str) -> None:
        self.model = TabularModel(
            data_config=DataConfig(
                target=["target"], continuous_cols=list("abcd"), categorical_cols=["group"]
            ),
            model_config=CONFIGS[name],
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                max_epochs=2,
                batch_size=64,
                accelerator="cpu",
                checkpoints=None,
                load_best=False,
                early_stopping=None,
                progress_bar="none",
            ),
            verbose=False,
        )
        self.model.datamodule = self.model.prepare_dataloader(train=frame)
        self.model.model = self.model.prepare_model(self.model.datamodule)

    def fit(self, callbacks: list[Any], ckpt: str | None) -> None:
        self.model.train(self.model.model, self.model.datamodule, callbacks=callbacks)

    def predict(self) -> Tensor:
        found = self.model.predict(frame)
        return torch.tensor(found.filter(like="probability").to_numpy())


for name in CONFIGS:
    examine(
        Case(
            package="pytorch_tabular",
            model=name,
            entry="`TabularModel.train`",
            build=lambda name=name: Subject(name),
            fit=Subject.fit,
            predict=Subject.predict,
            module=lambda subject: subject.model.model,
            resumes=False,
            weights_only=False,
        )
    )
