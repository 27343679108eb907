"""A run that is killed again and again: forked from one process, so that each start is cheap.

Prints one line a kill (how many epochs the newest checkpoint holds) and "equal" at the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import Quantization
from tests.callback.nets import Plain, adapters_of, assert_same, base_of, peft, trainer

EPOCHS = 12


def fit(folder: Path) -> Plain:
    """To the end, from the newest checkpoint if there is one; saves after every step and epoch."""
    newest = folder / "last.ckpt"
    saver = ModelCheckpoint(
        folder, save_last=True, save_top_k=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    module = Plain()
    pl.seed_everything(1 if not newest.exists() else 99, verbose=False)
    run = trainer(peft(quantization=Quantization("nf4")), saver, max_epochs=EPOCHS)
    run.fit(module, ckpt_path=newest if newest.exists() else None)
    return module


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    start = time.monotonic()
    pid = os.fork()  # the length of a whole run, in a child as the others
    if not pid:
        fit(folder / "timed")
        os._exit(0)
    os.waitpid(pid, 0)
    whole = time.monotonic() - start
    killed = 0
    while killed < kills:
        pid = os.fork()
        if not pid:
            fit(folder / "killed")
            os._exit(0)
        time.sleep(draw.uniform(0.0, 0.5 * whole))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:  # it ended before the blow
            for file in (folder / "killed").iterdir():
                file.unlink()
        newest = folder / "killed" / "last.ckpt"
        epoch = torch.load(newest, weights_only=True)["epoch"] if newest.exists() else None
        print("killed, newest checkpoint of epoch", epoch, flush=True)
    ended, uninterrupted = fit(folder / "killed"), fit(folder / "whole")
    assert_same(adapters_of(ended), adapters_of(uninterrupted))
    assert_same(base_of(ended), base_of(uninterrupted))
    left = [p.name for p in (folder / "killed").iterdir() if ".tmp-" in p.name]
    assert not left, left
    print("equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
