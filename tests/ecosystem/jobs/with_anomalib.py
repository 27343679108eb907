"""anomalib: `Engine(callbacks=[...]).fit(model, datamodule)` with its own models and data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cpu_torchvision  # noqa: F401
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Ganomaly, ReverseDistillation
from checks import Case, examine
from PIL import Image
from torch import Tensor

FOLDER = Path(tempfile.mkdtemp(prefix="anomalib-"))
rng = np.random.default_rng(0)
for kind in ("good", "bad"):
    (FOLDER / kind).mkdir()
    for i in range(8):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(FOLDER / kind / f"{i}.png")
images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))

PARTS = {"post_processor": False, "evaluator": False, "visualizer": False}


def sized(kind: Any, **options: Any) -> Any:
    pre_processor = kind.configure_pre_processor(image_size=(64, 64))
    return kind(**options, **PARTS, pre_processor=pre_processor)


MODELS = {
    "ReverseDistillation": (
        lambda: sized(ReverseDistillation, backbone="resnet18", pre_trained=False),
        {"target_modules": ["conv1", "conv2"], "exclude_modules": ["encoder"]},
    ),
    "Ganomaly": (
        lambda: sized(Ganomaly, n_features=16, latent_vec_size=16),
        {"target_modules": r"model\.(generator\..*conv.*|discriminator\.features\.\d+)"},
    ),
}


def fit(module: Any, callbacks: list[Any], ckpt: str | None) -> None:
    data = Folder(
        "made",
        normal_dir="good",
        abnormal_dir="bad",
        root=FOLDER,
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        seed=0,
    )
    engine = Engine(
        callbacks=callbacks,
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=FOLDER / "results",
    )
    engine.fit(module, datamodule=data, ckpt_path=ckpt)


def predict(module: Any) -> Tensor:
    found = module.model(images)
    return found.pred_score


for name, (build, targets) in MODELS.items():
    examine(
        Case(
            package="anomalib",
            model=name,
            entry="`Engine.fit`",
            build=build,
            fit=fit,
            predict=predict,
            lora=targets,
            weights_only=False,
        )
    )
