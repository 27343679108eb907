"""scvi-tools: `model.train()`, which wraps the net into a new LightningModule at every call."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import scvi
import torch
from checks import Case, examine
from torch import Tensor

rng = np.random.default_rng(0)
counts = rng.poisson(3.0, (64, 48)).astype(np.float32)
data = anndata.AnnData(counts, obs={"labels": np.repeat(["a", "b"], 32)})
scvi.settings.progress_bar_style = "tqdm"
scvi.settings.num_threads = 1
scvi.model.SCVI.setup_anndata(data)
base = scvi.model.SCVI(data, n_hidden=32, n_latent=8)


class Subject:
    def __init__(self) -> None:
        self.model = scvi.model.SCVI(data, n_hidden=32, n_latent=8)
        self.model.module.load_state_dict(base.module.state_dict())
        self.model.is_trained_ = True

    def fit(self, callbacks: list[Any], ckpt: str | None) -> None:
        self.model.train(
            max_epochs=2,
            accelerator="cpu",
            batch_size=16,
            train_size=1.0,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
        )

    def predict(self) -> Tensor:
        return torch.tensor(self.model.get_latent_representation())


examine(
    Case(
        package="scvi-tools",
        model="SCVI",
        entry="`model.train`",
        build=Subject,
        fit=Subject.fit,
        predict=Subject.predict,
        module=lambda subject: subject.model.module,
        resumes=False,
        weights_only=False,
    )
)
