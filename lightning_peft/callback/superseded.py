"""The checkpoint that SIGTERM saved: found by ``ckpt_path="last"``, removed once superseded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_peft.checkpoint import atomic_file

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FILE", "SupersededFiles", "link_as_last", "link_checkpoint"]

#: Name of the checkpoint. It is saved in the folder of the trainer's ModelCheckpoint.
FILE = "sigterm.ckpt"


def link_as_last(path: Path, trainer: pl.Trainer) -> Path:
    """Give the file a second name by which Lightning finds it as the last checkpoint.

    Lightning takes the newest file whose name starts as that of ModelCheckpoint's last file.
    """
    last = getattr(trainer.checkpoint_callback, "CHECKPOINT_NAME_LAST", "last")
    return link_checkpoint(path, path.with_name(f"{last}-{path.name}"))


def link_checkpoint(path: Path, link: Path) -> Path:
    """Give a checkpoint another name, which replaces what has that name; return the new name."""
    _remove(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.is_dir():
            near = path.name if path.parent == link.parent else path.absolute()
            link.symlink_to(near, target_is_directory=True)
        else:
            os.link(path, link)
    except OSError:  # a file system without links
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, link)
    return link


class SupersededFiles:
    """Removes the checkpoint of SIGTERM once a checkpoint of a later step is in its folder."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, float], int] = {}

    def remove(self, written: str | Path, step: object) -> None:
        """Called when a checkpoint was written: removes the one of SIGTERM if it is older."""
        if not isinstance(step, int) or not atomic_file.is_local(written):
            return
        target = Path(written).parent / FILE
        if Path(written).name.endswith(FILE) or not target.exists():
            return
        if self._step_of(target) >= step:
            return
        for file in [*target.parent.glob(f"*-{FILE}"), target]:
            _remove(file)

    def _step_of(self, path: Path) -> int:
        key = str(path), path.stat().st_mtime
        if key not in self._steps:
            file = path / "meta.pt" if path.is_dir() else path
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self._steps[key] = int(loaded["global_step"])
            except Exception:  # damaged: any later checkpoint is better
                self._steps[key] = -1
        return self._steps[key]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
