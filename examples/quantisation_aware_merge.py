"""QLoRA, merged back into NF4: what does rounding cost, and what is left of it when the last part
of training ran on the rounded weights? The quickstart's encoder and task. CPU, about 4 minutes.
"""

import csv
import sys
from pathlib import Path

import lightning.pytorch as pl
from quickstart import MINILM, Classifier, passages, trainer

from lightning_peft import PEFT, LoRA, QuantAwareLoRA, Quantization, merge

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "quantisation_aware_merge.csv"
SETTINGS = {"r": 8, "target_modules": ["query", "key", "value", "dense"]}
COLUMNS = ("trained with", "attached", "merged into NF4", "logits error")


def row(method: LoRA) -> tuple:
    pl.seed_everything(0)
    module = Classifier(str(MINILM), lr=2e-3)
    peft = PEFT(method, quantization=Quantization("nf4"), modules_to_save=["head"])
    run = trainer(max_epochs=2, callbacks=[peft], enable_checkpointing=False)
    run.fit(module, passages(str(MINILM), held_out=False))
    held_out = passages(str(MINILM), held_out=True)
    (attached,) = run.test(module, held_out, verbose=False)
    batch = held_out.dataset[len(held_out.dataset) // 2][0]
    error = merge(module, into="storage", batch=[batch]).output_error
    (merged,) = run.test(module, held_out, verbose=False)
    scores = (f"{result['accuracy']:.4f}" for result in (attached, merged))
    return type(method).__name__, *scores, f"{error:.4f}"


def main() -> None:
    rows = [row(LoRA(**SETTINGS)), row(QuantAwareLoRA(**SETTINGS, start=0.75))]
    for line in ("", COLUMNS, *rows):
        print(("{:<16}{:>10}{:>18}{:>14}" if line else "").format(*line))
    plain, aware = (float(r[3]) for r in rows)
    print(f"merging changes the logits {plain / aware:.1f} times less")
    with RESULTS.open("w", newline="") as file:
        file.write(f"# python examples/{Path(sys.argv[0]).name}\n")
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
