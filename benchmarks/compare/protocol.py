"""Compares methods on four tasks: choices on validation data, test data read once per run.

    python -m benchmarks.compare.protocol --hours 12          # everything, resumable
    python -m benchmarks.compare.protocol --tasks vision --rows LoRA "full, same layers" --seeds 2
    python -m benchmarks.compare.protocol --stage steps       # seconds per step, with a control
    python -m benchmarks.compare.publish                      # tables for the site and `recommend`

Every row has six trials per task (learning rates, seed 100, validation data); all are kept in
results/compare_trials.csv. The runs use the best trial's rate: ten seeds on every task for the
front rows, five on the text task for the others, in results/compare_runs.csv. A row that is in its
file is not computed again, so the command continues where it was stopped. A method that cannot be
attached to a task's model gets one line with the reason.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_peft as lp
from benchmarks.compare.peers import adapt
from benchmarks.compare.rows import ROWS, Row, learning_rates, methods_of
from benchmarks.compare.tasks import TASKS, Module, Split, Task
from benchmarks.lib.side_by_side import interleaved, traced_peak

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "lightning", "peft", "bitsandbytes")
FRONT_SEEDS, OTHER_SEEDS, TRIAL_SEED = 10, 5, 100
OTHER_TASK = "text"
Job = tuple[Row, str, float, int, Split]


# ---- one run


def adapted(row: Row, task: Task, rate: float) -> tuple[Module, list[pl.Callback]]:
    """Return the module of a row, ready to train, and its callbacks."""
    head_only = row.reference == "head"
    module = task.module(rate, head_rate=rate) if head_only else task.module(rate)
    if row.peer is not None:
        adapt(module, row, task)
        return module, []
    if row.reference is not None:
        _select(module, row, task)
        return module, []
    saved = list(task.embeddings) if row.embeddings else ()
    callback = lp.PEFT(
        methods_of(row, task), quantization="nf4" if row.nf4 else None, root=task.root,
        modules_to_save=saved, report=False,
    )  # fmt: skip
    return module, [callback]


def _select(module: Module, row: Row, task: Task) -> None:
    """Choose what a reference trains."""
    if row.reference == "full":
        return
    module.requires_grad_(False)
    for p in module.head_parameters():
        p.requires_grad_(True)
    if row.reference == "same layers":
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear) and any(
                name.endswith("." + t) for t in task.targets
            ):
                layer.requires_grad_(True)
    elif task.readout:
        module.model.get_submodule(task.readout).requires_grad_(True)


def run(job: Job, task: Task) -> dict[str, Any]:
    """Train and score once; return one line of a CSV file."""
    row, _, rate, seed, split = job
    start = time.process_time()
    pl.seed_everything(seed, verbose=False)
    line: dict[str, Any] = {
        "task": task.name, "row": row.name, "seed": seed, "split": split, "metric": task.metric,
        "learning_rate": rate, "score": "", "trained": "", "percent": "", "bytes": "",
        "peak_mb": "", "cpu_seconds": "", "settings": "; ".join(map(_said, methods_of(row, task))),
        "note": "",
    }  # fmt: skip
    try:
        module, callbacks = adapted(row, task, rate)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, task.loader())
    except (ValueError, TypeError, RuntimeError) as error:
        line["note"] = " ".join(str(error).split())[:300]
        return line
    trained = round(time.process_time() - start, 1)
    line.update(sizes(module, row, task))  # first: bitsandbytes repacks for the CPU in eval
    line["score"] = round(task.score(module, split), 4)
    line["cpu_seconds"] = trained
    return line


def _said(method: Any) -> str:
    """Return the method with the fields that differ from the defaults, targets left out."""
    fields = [f for f in dataclasses.fields(method) if f.name != "target_modules"]
    given = [(f.name, getattr(method, f.name), f.default) for f in fields]
    changed = [f"{k}={v!r}" for k, v, plain in given if v != plain and v not in ({}, [])]
    return f"{method.label}({', '.join(changed)})"


def sizes(module: Module, row: Row, task: Task) -> dict[str, Any]:
    """Return what a row trains without the head, its bytes, and the peak memory of two steps."""
    heads = {id(p) for p in module.head_parameters()}
    own = [p for p in module.parameters() if p.requires_grad and id(p) not in heads]
    whole = lp.parameter_report(module).total
    batch = next(iter(task.loader()))
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)
    peak = traced_peak(module, _stepper(module, optimizer, task, batch), steps=2)
    return {
        "trained": sum(p.numel() for p in own),
        "percent": round(100 * sum(p.numel() for p in own) / whole, 4),
        "bytes": sum(p.nbytes for p in own),
        "peak_mb": round(peak / 1e6, 1),
    }


def _stepper(module: Module, optimizer: Any, task: Task, batch: Any) -> Callable[[], None]:
    def step() -> None:
        loss = task.loss(module.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# ---- what has to be run


def tasks_of(row: Row, tasks: Sequence[str]) -> list[str]:
    """Return the tasks of a row: all for the front rows, else the text task (or the only one)."""
    if row.embeddings:
        return [t for t in tasks if TASKS[t].embeddings]
    return [t for t in tasks if row.front or t == OTHER_TASK]


def trials(rows: Sequence[Row], tasks: Sequence[str]) -> Iterator[Job]:
    """Yield the trials: every row's first rate, then every row's second rate, and so on."""
    width = max(len(learning_rates(r, t)) for r in rows for t in tasks)
    for i in range(width):
        for row in rows:
            for task in tasks_of(row, tasks):
                yield row, task, learning_rates(row, task)[i], TRIAL_SEED, "validation"


def runs(
    rows: Sequence[Row], tasks: Sequence[str], found: Sequence[dict[str, str]], limit: int | None
) -> Iterator[Job]:
    """Yield the runs at the chosen rates, seed by seed, so that a prefix is balanced."""
    for seed in range(min(limit or FRONT_SEEDS, FRONT_SEEDS)):
        for row in rows:
            if not row.front and seed >= OTHER_SEEDS:
                continue
            for task in tasks_of(row, tasks):
                rate = chosen(found, row.name, TASKS[task])
                if rate is not None:
                    yield row, task, rate, seed, "test"


def chosen(found: Sequence[dict[str, str]], row: str, task: type[Task]) -> float | None:
    """Return the rate with the best validation score; or None if no trial has one."""
    own = [x for x in found if x["row"] == row and x["task"] == task.name and x["score"]]
    if not own:
        return None
    best = (max if task.higher else min)(own, key=lambda x: float(x["score"]))
    return float(best["learning_rate"])


# ---- files


def lines(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line; the file is complete after every line."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def origin() -> dict[str, str]:
    """Return the columns that say where a line is from."""
    return {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": " ".join(f"{p} {version(p)}" for p in PACKAGES),
        "date": datetime.date.today().isoformat(),
    }


def complete(jobs: Iterator[Job], path: Path, tasks: dict[str, Task], until: float) -> bool:
    """Run the jobs that the file lacks; return False if the time was used up."""
    keys = ("row", "task", "learning_rate", "seed")
    done = {tuple(x[k] for k in keys) for x in lines(path)}
    for job in jobs:
        row, name, rate, seed, _ = job
        if (row.name, name, str(rate), str(seed)) in done:
            continue
        if time.process_time() > until:
            return False
        line = {**run(job, tasks[name]), **origin()}
        append(path, line)
        shown = ("task", "row", "seed", "learning_rate", "score", "cpu_seconds", "note")
        print("  ".join(str(line[k]) for k in shown), flush=True)
    return True


# ---- seconds per step


def steps(rows: Sequence[Row], tasks: dict[str, Task], path: Path, repeats: int) -> None:
    """Time a step of each row next to LoRA, and LoRA next to itself as the control."""
    done = {(x["task"], x["row"]) for x in lines(path)}
    lora = next(r for r in ROWS if r.name == "LoRA")
    for name, task in tasks.items():
        for row in rows:
            if (name, row.name) in done or name not in tasks_of(row, [name]):
                continue
            try:
                timed = {"LoRA": stepper(lora, task), "control": stepper(lora, task)}
                timed["own"] = stepper(row, task)
            except (ValueError, TypeError) as error:
                print(f"{name}  {row.name}  refused: {' '.join(str(error).split())[:160]}")
                continue
            seconds = {k: statistics.median(v) for k, v in interleaved(timed, repeats).items()}
            line = {
                "task": name, "row": row.name, "step_ms": round(1e3 * seconds["own"], 2),
                "ratio_to_lora": round(seconds["own"] / seconds["LoRA"], 3),
                "control": round(seconds["control"] / seconds["LoRA"], 3), "repeats": repeats,
                **origin(),
            }  # fmt: skip
            append(path, line)
            print("  ".join(str(v) for v in list(line.values())[:5]), flush=True)


def stepper(row: Row, task: Task) -> Callable[[], None]:
    """Return a call that makes one training step on one batch, without a Trainer."""
    pl.seed_everything(0, verbose=False)
    module = task.module(0.0)
    if row.method is None:
        module = adapted(row, task, 0.0)[0]
    else:
        lp.attach(
            module.get_submodule(task.root), methods_of(row, task),
            quantization=lp.Quantization("nf4") if row.nf4 else None,
            modules_to_save=list(task.embeddings) if row.embeddings else (),
        )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)
    return _stepper(module.train(), optimizer, task, next(iter(task.loader())))


def main() -> None:
    """Run the requested stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", help="names of rows; all by default")
    parser.add_argument("--stage", choices=("scores", "trials", "steps"), default="scores")
    parser.add_argument("--hours", type=float, default=12.0, help="CPU hours after which to stop")
    parser.add_argument("--seeds", type=int, help="at most this many seeds")
    parser.add_argument("--repeats", type=int, default=21, help="timed steps")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "lightning_peft_compare",
        help="folder of the models that are pretrained here",
    )  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.rows or ()) - {r.name for r in ROWS}
    if unknown:
        parser.error(f"--rows: expected names of {[r.name for r in ROWS]}, got {sorted(unknown)}")
    rows = [r for r in ROWS if options.rows is None or r.name in options.rows]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    until = time.process_time() + 3600 * options.hours
    tasks = {name: TASKS[name](options.work) for name in options.tasks}
    if options.stage == "steps":
        steps(rows, tasks, options.results / "compare_steps.csv", options.repeats)
        return
    trial_file = options.results / "compare_trials.csv"
    if not complete(trials(rows, options.tasks), trial_file, tasks, until):
        print("time used up; run the command again to continue")
        return
    if options.stage == "scores":
        found = lines(trial_file)
        jobs = runs(rows, options.tasks, found, options.seeds)
        if not complete(jobs, options.results / "compare_runs.csv", tasks, until):
            print("time used up; run the command again to continue")


if __name__ == "__main__":
    with lp.task_ids([0]):  # for methods that mix by task: all samples are of one
        main()
