"""A model was fine-tuned whole: how small an adapter holds the difference? And a trained LoRA: how
many of its ranks does it need? The quickstart's encoder and task. CPU, about 4 minutes.
"""

import copy
import csv
import sys
from pathlib import Path

import lightning.pytorch as pl
from quickstart import MINILM, OUTPUT, Classifier, passages, trainer
from safetensors.torch import save_file

from lightning_peft import PEFT, LoRA, extract_lora, parameter_report, prune_rank, save_adapter

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "extract_and_prune.csv"
LINEAR = ["query", "key", "value", "dense"]
COLUMNS = ("model", "accuracy", "f1", "output error", "energy kept", "adapter parameters")


def score(name: str, module: pl.LightningModule, report: object = None) -> tuple:
    run = trainer(enable_progress_bar=False)
    (result,) = run.test(module, passages(str(MINILM), held_out=True), verbose=False)
    size = parameter_report(module).trainable
    error = "" if report is None else f"{report.output_error:.3f}"
    energy = "" if report is None else f"{report.energy:.3f}"
    row = (name, f"{result['accuracy']:.4f}", f"{result['f1']:.4f}", error, energy, size)
    print("{:<34}{:>9}{:>9}{:>14}{:>13}{:>20,}".format(*row), flush=True)
    return row


def fine_tuned(lr: float, *callbacks: pl.Callback) -> Classifier:
    pl.seed_everything(0)
    module = Classifier(str(MINILM), lr=lr)
    trainer(max_epochs=2, callbacks=list(callbacks), enable_checkpointing=False).fit(
        module, passages(str(MINILM), held_out=False)
    )
    return module


def verdict(before: tuple, after: tuple, what: str) -> None:
    points = 100 * (float(after[1]) - float(before[1]))
    kept = "keeps" if points >= -1 else "does not keep"
    print(f"{what} {kept} the score: {points:+.2f} points of accuracy")


def main() -> None:
    tuned, lora = fine_tuned(1e-4), fine_tuned(2e-3, PEFT(LoRA(r=16, target_modules=LINEAR),
                                                          modules_to_save=["head"]))  # fmt: skip
    OUTPUT.mkdir(exist_ok=True)
    save_file(tuned.state_dict(), OUTPUT / "tuned.safetensors")  # extracted from the file alone
    batches = passages(str(MINILM), held_out=True).dataset
    batch = batches[len(batches) // 2][0]
    inputs = [[tokens] for tokens, _ in passages(str(MINILM), held_out=False).dataset]  # no labels
    print("\n{:<34}{:>9}{:>9}{:>14}{:>13}{:>20}".format(*COLUMNS))
    rows = [whole := score("fine-tuned whole", tuned)]
    for r, given in ((2, None), (8, None), (32, None), (2, inputs), (8, inputs), (32, inputs)):
        pl.seed_everything(0)
        module = Classifier(str(MINILM), lr=0.0)
        report = extract_lora(
            module, OUTPUT / "tuned.safetensors", r, target_modules=LINEAR,
            modules_to_save=["head"], batch=[batch], inputs=given,
        )  # fmt: skip
        how = "extracted" if given is None else "fitted to inputs"
        rows.append(score(f"{how}, r = {r}", module, report))
    save_adapter(module, OUTPUT / "extracted", root="")
    rows.append(before := score("LoRA, r = 16", lora))
    for rank in (8, 4, 1):
        module = copy.deepcopy(lora)
        report = prune_rank(module, rank=rank, batch=[batch])
        rows.append(score(f"pruned to r = {rank}", module, report))
    verdict(whole, rows[3], "Extracting at r = 32 by weights alone")
    verdict(whole, rows[6], "Extracting at r = 32 with inputs")
    verdict(before, rows[8], "Pruning to half the rank")
    with RESULTS.open("w", newline="") as file:
        file.write(f"# python examples/{Path(sys.argv[0]).name}\n")
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
