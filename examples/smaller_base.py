"""A smaller base, then adapted: half of its weights zero, a third of its neurons gone, its layers
factorised. What does each save, and what does LoRA win back? CPU, about 6 minutes.
"""

import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from quickstart import MINILM, Classifier, passages, trainer

from lightning_peft import PEFT, LoRA, SparseLoRA, merge
from lightning_peft.recipes import factorise, prune_magnitude, remove_neurons, sparsity

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "smaller_base.csv"
LINEAR = ["query", "key", "value", "dense"]
COLUMNS = ("base", "parameters", "zeros", "forward / whole", "accuracy", "merged", "zeros merged")


@torch.no_grad()
def timed(module: Classifier, batch: dict) -> float:
    start = time.perf_counter()
    module.eval()(batch)
    return time.perf_counter() - start


def row(name: str, method: LoRA, shrink: Callable) -> tuple:
    pl.seed_everything(0)
    module = Classifier(str(MINILM), lr=2e-3)
    held_out = passages(str(MINILM), held_out=True)
    batch = held_out.dataset[len(held_out.dataset) // 2][0]
    whole = copy.deepcopy(module)
    print(name, "\n", shrink(module.encoder, batch))
    size = sum(p.numel() for p in module.encoder.parameters())
    turns = [(timed(module, batch), timed(whole, batch)) for _ in range(21)]
    seconds, of_whole = (statistics.median(column) for column in zip(*turns, strict=True))
    zeros = sparsity(module.encoder, r".*encoder.*").share
    module.train()
    peft = PEFT(method, modules_to_save=["head"])
    run = trainer(max_epochs=1, callbacks=[peft], enable_checkpointing=False)
    run.fit(module, passages(str(MINILM), held_out=False))
    (attached,) = run.test(module, held_out, verbose=False)
    merge(module)
    (merged,) = run.test(module, held_out, verbose=False)
    scores = (f"{result['accuracy']:.4f}" for result in (attached, merged))
    after = f"{sparsity(module.encoder, r'.*encoder.*').share:.3f}"
    return name, size, f"{zeros:.3f}", f"{seconds / of_whole:.2f}", *scores, after


def main() -> None:
    lora, sparse = LoRA(r=8, target_modules=LINEAR), SparseLoRA(r=8, target_modules=LINEAR)
    thin = LoRA(r=8, target_modules=[*LINEAR, "up", "down"])
    rows = [
        row("as it is", lora, lambda m, b: "nothing"),
        row("half zeros, LoRA", lora, lambda m, b: f"{prune_magnitude(m, 0.5).share:.1%} zeros"),
        row("half zeros, SparseLoRA", sparse, lambda m, b: f"{prune_magnitude(m, 0.5).share:.1%}"),
        row("a third of the neurons", lora, lambda m, b: remove_neurons(m, 1 / 3, batch=b)),
        row("factorised", thin, lambda m, b: factorise(m, energy=0.9, batch=b)),
    ]
    print()
    for line in (COLUMNS, *rows):
        print("{:<24}{:>12}{:>8}{:>12}{:>10}{:>8}{:>14}".format(*line))
    with RESULTS.open("w", newline="") as file:
        file.write(f"# python examples/{Path(sys.argv[0]).name}\n")
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
