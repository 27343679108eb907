"""A vision transformer that knows 0 to 4 learns 5 to 9: which of query, key and value to adapt?

The model is pretrained here on scikit-learn's 8 × 8 digits, then gets LoRA on every subset of the
attention's three projections, once with the same rank and once with the same number of trained
parameters, beside the head alone and everything. Three seeds. CPU, minutes.
"""

import copy
import itertools

import lightning.pytorch as pl
import torch
from keeping import mean_and_spread, parser, show, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTModel

from lightning_peft import PEFT, LoRA, parameter_report

PARTS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
RANK = 2


def digits(first: int, few: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Five digits from `first` on: (to learn from, at most `few`; every third for the test)."""
    found = load_digits()
    keep = (found.target >= first) & (found.target < first + 5)
    x = torch.tensor(found.images[keep], dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(found.target[keep]) - first
    test = torch.arange(len(y)) % 3 == 0
    train = (~test).nonzero().flatten()[:few]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class Digits(pl.LightningModule):
    """An ordinary module: a small ViT over patches of 2 × 2, linear head."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=96,
        )  # fmt: skip
        self.net = ViTModel(config, add_pooling_layer=False)
        self.head, self.lr = nn.Linear(48, 5), 2e-3
        self.accuracy = MulticlassAccuracy(5, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).last_hidden_state[:, 0])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def run(module: Digits, train, test, epochs: int, lr: float, *callbacks: pl.Callback) -> float:
    module.lr = lr
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks], **quiet)
    trainer.fit(module.train(), DataLoader(train, 32, shuffle=True))
    return trainer.test(module, DataLoader(test, 256), verbose=False)[0]["accuracy"]


def arms() -> dict[str, LoRA | None]:
    """Every subset at one rank; the single ones again with the budget of all three."""
    found: dict[str, LoRA | None] = {"head only": None}
    for size in (1, 2, 3):
        for names in itertools.combinations(PARTS, size):
            lora = LoRA(r=RANK, alpha=2 * RANK, target_modules=[PARTS[n] for n in names])
            found[f"{' + '.join(names)}, r = {RANK}"] = lora
    for name, part in PARTS.items():
        lora = LoRA(r=3 * RANK, alpha=6 * RANK, target_modules=[part])
        found[f"{name}, r = {3 * RANK}"] = lora
    return found


def main(smoke: bool, keep: bool) -> dict[str, list[float]]:
    seeds, epochs = (1, 1) if smoke else (3, 20)
    old, new = digits(0), digits(5, few=100)
    chosen = dict(list(arms().items())[-1:] if smoke else arms())
    found: dict[str, list[float]] = {name: [] for name in [*chosen, "full"]}
    trained: dict[str, int] = {}
    before = []
    for seed in range(seeds):
        pl.seed_everything(seed)
        pretrained = Digits()
        before.append(run(pretrained, *old, epochs, 2e-3))
        for name, method in {**chosen, "full": None}.items():
            pl.seed_everything(seed)
            module = copy.deepcopy(pretrained)
            module.head.reset_parameters()
            module.net.requires_grad_(name != "head only")
            callbacks = [PEFT(method, modules_to_save=["head"], report=False)] if method else []
            lr = 1e-3 if name == "full" else 5e-3
            found[name].append(run(module, *new, epochs, lr, *callbacks))
            trained[name] = parameter_report(module).trainable
    rows = [(name, f"{trained[name]:,}", mean_and_spread(runs)) for name, runs in found.items()]
    text = table(["", "trained parameters", f"accuracy on 5 to 9, seeds: {seeds}"], rows) + (
        f"\n\nPretrained on 0 to 4: {mean_and_spread(before)} there. Adapted to {len(new[0])} "
        f"pictures of 5 to 9, asked about {len(new[1])} others. ± is half the distance between the "
        "best and the worst seed."
    )
    show("A vision transformer for other digits", text, keep)
    return found


if __name__ == "__main__":
    main(**vars(parser(__doc__).parse_args()))
