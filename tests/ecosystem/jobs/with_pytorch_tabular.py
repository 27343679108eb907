"""pytorch_tabular: `TabularModel.fit(train, callbacks=[...])`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from checks import Run, method
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

NARROW = ("head.layers.0",)  # two classes: too narrow for rank 4


def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 4)).astype("float32")
    frame = pd.DataFrame(x, columns=list("abcd"))
    frame["group"] = rng.integers(0, 3, 256).astype(str)
    frame["target"] = (x[:, 0] + x[:, 1] > 0).astype(int)
    return frame


def model() -> TabularModel:
    return TabularModel(
        data_config=DataConfig(
            target=["target"], continuous_cols=list("abcd"), categorical_cols=["group"]
        ),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="64-32"),
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


def main() -> None:
    run, frame = Run("pytorch_tabular", NARROW), data()
    base = model()
    base.fit(train=frame)
    pretrained = base.model.state_dict()

    def finetune(ckpt: str | None) -> TabularModel:
        tuned = model()
        datamodule = tuned.prepare_dataloader(train=frame)
        module = tuned.prepare_model(datamodule)
        module.load_state_dict(pretrained)
        run.attach_from(module, ckpt)
        tuned.train(module, datamodule, callbacks=[method(NARROW)])
        return tuned

    first = finetune(None)
    path = run.save(first.model)
    again = finetune(path)
    run.done(first.model, again.model, again.predict(frame).iloc[:, 0].to_numpy())


main()
