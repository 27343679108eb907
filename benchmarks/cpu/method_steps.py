"""A training step of each method that Hugging Face peft has too, against peft's, with a control.

    python -m benchmarks.cpu.method_steps --repeats 40
    python -m benchmarks.cpu.method_steps --methods HRA PEANuT     # other rows of the file stay

The control is a second copy of peft's model that takes its turns with the two: its ratio says what
a difference means on this machine. Rows are written method by method.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lightning_peft as lp
from benchmarks.cpu.lora_step import base
from benchmarks.cpu.method_pairs import INVOCATION, PAIRS, Pair
from benchmarks.lib.side_by_side import RESULTS, interleaved, rows, write

NAME = "method_steps"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def our_step(pair: Pair, model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    step = training_step(pair, model, ids)
    if not pair.projects:

        def call() -> None:
            with pair.context():
                step()

        return call
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks, optimizer = lp.MethodHooks(model), torch.optim.SGD(trained, lr=0.0)
    return training_step(pair, model, ids, before_step=lambda: hooks.before_step(optimizer))


def training_step(
    pair: Pair,
    model: nn.Module,
    ids: torch.Tensor,
    before_step: Callable[[], None] = lambda: None,
    **more: Any,
) -> Callable[[], None]:
    """A call of forward and backward; a forward alone if nothing is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def call() -> None:
        with torch.set_grad_enabled(pair.trains):
            loss = model(input_ids=ids, labels=ids, **more).loss
        if not pair.trains:
            return
        loss.backward()
        before_step()
        for p in trained:
            p.grad = None

    return call


def their_step(pair: Pair, model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    theirs = pair.theirs(copy.deepcopy(model)).train()
    if pair.tasks:
        return training_step(pair, theirs, ids, task_ids=torch.tensor([1]))
    return training_step(pair, theirs, ids)


def timed(
    name: str, model: nn.Module, ids: torch.Tensor, repeats: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Rows of one method: peft, peft again, ours."""
    pair = PAIRS[name]
    candidates = {
        "peft": their_step(pair, model, ids),
        "peft again": their_step(pair, model, ids),
        "lightning_peft": our_step(pair, pair.ours(copy.deepcopy(model)).train(), ids),
    }
    seconds = interleaved(candidates, repeats, clock=clock)
    hidden: Any = model.config.hidden_size  # type: ignore[union-attr]
    return rows(seconds, "peft", method=name, hidden=hidden, tokens=ids.shape[1])


def kept(methods: set[str]) -> list[dict[str, Any]]:
    """Rows of the file of other methods than these."""
    path = RESULTS / f"{NAME}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["method"] not in methods]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: where others use the cores too"
    )
    parser.add_argument("--remark", default="", help="what else ran on the machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = base(options.hidden, options.layers)
    ids = torch.randint(0, 1000, (1, options.tokens))
    ids[0, 1:][ids[0, 1:] == INVOCATION] += 1
    ids[0, 0] = INVOCATION  # aLoRA acts on all tokens; without one peft leaves its adapter out
    for name in options.methods:
        write(
            NAME,
            timed(name, model, ids, options.repeats, CLOCKS[options.clock]),
            remark=options.remark,
            before=kept({name}),
        )


if __name__ == "__main__":
    main()
