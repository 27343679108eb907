"""Vision: a ViT that knows the digits 0 to 4 learns 5 to 9 from 150 pictures (scikit-learn)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.compare.tasks.base import Module, Split, Task, shuffled
from benchmarks.compare.tasks.pretraining import pretrained

__all__ = ["Vision"]

BATCH, PASSES, TRAIN, VALIDATION = 16, 12, 150, 250


class Vision(Task):
    """Accuracy in percent."""

    name: ClassVar[str] = "vision"
    metric: ClassVar[str] = "accuracy, %"
    root: ClassVar[str] = "model.vit"
    head: ClassVar[str] = "classifier"
    targets: ClassVar[tuple[str, ...]] = (
        *("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"),
        *("attention.output.dense", "fc1", "fc2", "intermediate.dense", "output.dense"),
    )

    def __init__(self, work: Path) -> None:
        from sklearn.datasets import load_digits
        from transformers import ViTConfig, ViTForImageClassification

        digits = load_digits()
        pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        old = order[labels[order] < 5]
        new = order[labels[order] >= 5]
        parts = new.split([TRAIN, VALIDATION, len(new) - TRAIN - VALIDATION])
        self.splits = {
            name: (pixels[rows], labels[rows] - 5)
            for name, rows in zip(("train", "validation", "test"), parts, strict=True)
        }
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=4, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=5,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ViTForImageClassification(config)

        def batches() -> Iterator[Any]:
            while True:
                rows = old[torch.randint(len(old), (32,))]
                yield pixels[rows], labels[rows]

        path = work / "vision.pt"
        self.template = pretrained(model, path, batches, self.loss, steps=500, lr=1e-3)
        names = {n for n, m in self.template.named_modules() if isinstance(m, nn.Linear)}
        self.targets = tuple(t for t in self.targets if any(n.endswith("." + t) for n in names))  # type: ignore[misc]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(pixel_values=batch[0], labels=batch[1]).loss
        return loss

    def loader(self) -> DataLoader[Any]:
        pixels, labels = self.splits["train"]
        return shuffled(lambda rows: (pixels[rows], labels[rows]), len(labels), BATCH, PASSES)

    @torch.no_grad()
    def score(self, module: Module, split: Split) -> float:
        module.eval()
        pixels, labels = self.splits[split]
        found = module.model(pixel_values=pixels).logits.argmax(-1)
        return 100 * float((found == labels).float().mean())
