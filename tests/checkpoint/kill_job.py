"""A run that is killed again and again: forked from one process, so that each start is cheap.

The blow falls at a random event: around a batch, or between the steps of a save. Prints one line a
kill (the event, and the epoch of the newest checkpoint) and "equal" at the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_peft import Quantization
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import Plain, adapters_of, assert_same, base_of, peft, trainer

EPOCHS = 8


class Blow(InPackage):
    """kill -9 to the own process at the n-th event."""

    lightning_base = "Callback"

    def __init__(self, n: int) -> None:
        self.left = n
        for name in ("fsync", "replace"):
            setattr(os, name, self.around(name, getattr(os, name)))
        torch.save = self.around("torch.save", torch.save)

    def event(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            print("killed at", name, end=" ", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.event(f"before-{name}")
            out = call(*args, **kwargs)
            self.event(f"after-{name}")
            return out

        return counted

    def on_train_batch_start(self, *args: Any) -> None:
        self.event("batch-start")

    def on_train_batch_end(self, *args: Any) -> None:
        self.event("batch-end")


def fit(folder: Path, *callbacks: Any) -> Plain:
    """To the end, from the newest checkpoint if there is one."""
    newest = folder / "last.ckpt"
    saver = pl.callbacks.ModelCheckpoint(
        folder, save_last=True, save_top_k=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    module = Plain()
    pl.seed_everything(1 if not newest.exists() else 99, verbose=False)
    run = trainer(peft(quantization=Quantization("nf4")), saver, *callbacks, max_epochs=EPOCHS)
    run.fit(module, ckpt_path=newest if newest.exists() else None)
    return module


def main(place: str, kills: int, seed: int) -> None:
    folder = Path(place)
    torch.set_num_threads(1)
    draw = random.Random(seed)
    killed = 0
    while killed < kills:
        event = draw.randrange(1, 40)
        pid = os.fork()
        if not pid:
            fit(folder / "killed", Blow(event))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        newest = folder / "killed" / "last.ckpt"
        if os.WIFSIGNALED(status):
            killed += 1
            epoch = torch.load(newest, weights_only=True)["epoch"] if newest.exists() else None
            print("newest checkpoint of epoch", epoch, flush=True)
        else:  # it ended before the blow
            for file in (folder / "killed").iterdir():
                file.unlink()
    ended, uninterrupted = fit(folder / "killed"), fit(folder / "whole")
    assert_same(adapters_of(ended), adapters_of(uninterrupted))
    assert_same(base_of(ended), base_of(uninterrupted))
    left = [p.name for p in (folder / "killed").iterdir() if ".tmp-" in p.name]
    assert not left, left
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
