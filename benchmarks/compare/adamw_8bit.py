"""The quickstart's QLoRA run with fp32 and with 8-bit optimizer state: losses side by side.

    python benchmarks/compare/adamw_8bit.py [--steps 300]

Same model, data, order and start; mean training loss by hundred steps, loss on the held-out files,
bytes of optimizer state an element.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA, Quantization

RESULTS = Path(__file__).parents[1] / "results"
WINDOW = 100


def quickstart() -> Any:
    """examples/quickstart.py as a module."""
    path = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


@torch.no_grad()
def held_out_loss(module: Any, batches: Any) -> float:
    module.eval()
    total, rows = 0.0, 0
    for tokens, labels in batches:
        total += float(nn.functional.cross_entropy(module(tokens), labels, reduction="sum"))
        rows += len(labels)
    return total / rows


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(bytes of moments and scales, elements they belong to)."""
    held = {p: s for p, s in optimizer.state.items() if s}
    tensors = [t for s in held.values() for k, t in s.items() if isinstance(t, Tensor)]
    nbytes = sum(t.nbytes for t in tensors if t.ndim)
    return nbytes, sum(p.numel() for p in held)


def run(example: Any, optimizer: str | None, steps: int, train: Any, test: Any) -> dict[str, Any]:
    """The quickstart's `qlora`, cut to `steps`."""
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    peft = PEFT(
        LoRA(r=8, target_modules=["query", "key", "value", "dense"]),
        quantization=Quantization("nf4"),
        modules_to_save=["head"],
        optimizer=optimizer,
        report=False,
    )
    module = example.Classifier(str(example.MINILM), lr=2e-3)
    trainer = example.trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[peft, losses],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, train)
    nbytes, elements = state_bytes(trainer.optimizers[0])
    held_out = held_out_loss(module, test)
    return {"losses": losses.seen, "held out": held_out, "bytes": nbytes, "elements": elements}


def compare(steps: int, every: int = 1) -> list[dict[str, Any]]:
    """Return a row per hundred steps, for all steps, for the held-out files and for the bytes.

    Args:
        steps: Training steps of each run.
        every: Evaluate every n-th batch of the held-out files.
    """
    example = quickstart()
    train, test = (example.passages(str(example.MINILM), held_out=h) for h in (False, True))
    test = list(test)[::every]
    wide, small = (run(example, name, steps, train, test) for name in (None, "adamw_8bit"))

    def row(what: str, a: float, b: float) -> dict[str, Any]:
        return {"what": what, "adamw_fp32": f"{a:.5f}", "adamw_8bit": f"{b:.5f}",
                "ratio": f"{b / a:.5f}"}  # fmt: skip

    spans = [(first, min(first + WINDOW, steps)) for first in range(0, steps, WINDOW)]
    rows = [
        row(
            f"training loss, steps {first + 1} to {last}",
            statistics.fmean(wide["losses"][first:last]),
            statistics.fmean(small["losses"][first:last]),
        )
        for first, last in (*spans, (0, steps))
    ]
    rows.append(row("loss on the held-out files", wide["held out"], small["held out"]))
    per_element = [r["bytes"] / r["elements"] for r in (wide, small)]
    rows.append(row("bytes of state an element", *per_element))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--csv", type=Path, default=RESULTS / "adamw_8bit_quickstart.csv")
    options = parser.parse_args()
    rows = compare(options.steps)
    about = {
        "steps": options.steps,
        "device": "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benchmarks/compare/adamw_8bit.py", *sys.argv[1:]]),
    }
    for found in rows:
        print("  ".join(found.values()))
    with options.csv.open("w", newline="") as file:
        out = csv.DictWriter(file, [*rows[0], *about])
        out.writeheader()
        out.writerows({**found, **about} for found in rows)


if __name__ == "__main__":
    main()
