"""A sentence encoder learns a task, and forgets what it was good at: its sentences' neighbours.
Its own base, adapters off, teaches it to remember. No second model. CPU, about 4 minutes.
"""

import csv
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from quickstart import MINILM, Classifier, passages, trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_peft import PEFT, LoRA, disable_adapters
from lightning_peft.recipes import distillation_loss, teaching

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "distillation.csv"
COLUMNS = ("soft targets' weight", "accuracy", "nearest neighbour kept", "parameters held")


class Remembering(Classifier):
    """The quickstart's classifier; its sentence vectors also answer like the base's."""

    def __init__(self, model: str, lr: float, weight: float = 0.0):
        super().__init__(model, lr)
        self.weight = weight

    def vectors(self, tokens: dict[str, Tensor]) -> Tensor:
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def neighbours(self, tokens: dict[str, Tensor]) -> Tensor:
        """How alike each sentence of a batch is to every other, as logits."""
        x = self.vectors(tokens)
        return (20 * x @ x.T).fill_diagonal_(-1e4)

    def training_step(self, batch: tuple) -> Tensor:
        loss = super().training_step(batch)
        if self.weight:
            with teaching(self):  # the same parameters, adapters off
                targets = self.neighbours(batch[0])
            student = self.neighbours(batch[0])
            loss = loss + self.weight * distillation_loss(student, targets, temperature=2.0)
        return loss


@torch.no_grad()
def kept(module: Remembering, batches: list) -> float:
    """Share of held-out sentences whose nearest neighbour is still that of the base."""
    module.eval()
    now = torch.cat([module.vectors(tokens) for tokens, _ in batches])
    with disable_adapters(module):
        before = torch.cat([module.vectors(tokens) for tokens, _ in batches])
    nearest = [(x @ x.T).fill_diagonal_(-1).argmax(1) for x in (now, before)]
    return (nearest[0] == nearest[1]).float().mean().item()


def row(weight: float) -> tuple:
    pl.seed_everything(0)
    module = Remembering(str(MINILM), 2e-3, weight)
    lora = LoRA(r=8, target_modules=["query", "key", "value", "dense"])
    run = trainer(max_epochs=1, callbacks=[PEFT(lora, modules_to_save=["head"])],
                  enable_checkpointing=False)  # fmt: skip
    run.fit(module, passages(str(MINILM), held_out=False))
    held_out = passages(str(MINILM), held_out=True)
    (result,) = run.test(module, held_out, verbose=False)
    size = sum(p.numel() for p in module.parameters())
    return weight, f"{result['accuracy']:.4f}", f"{kept(module, held_out.dataset):.4f}", size


def main() -> None:
    rows = [row(weight) for weight in (0.0, 0.1, 0.3, 1.0)]
    print()
    for line in (COLUMNS, *rows):
        print("{:>20}{:>10}{:>24}{:>18}".format(*line))
    with RESULTS.open("w", newline="") as file:
        file.write(f"# python examples/{Path(sys.argv[0]).name}\n")
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
