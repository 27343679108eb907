"""SIGTERM: all processes agree at the end of a batch, save, and end."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["FILE", "SigtermHandler"]

#: Name of the checkpoint, beside those of the trainer's ModelCheckpoint.
FILE = "sigterm.ckpt"

_log = logging.getLogger(__name__)


class SigtermHandler:
    """A handler that sets a flag and nothing else: Lightning's own starts a collective inside the
    handler, which hangs when it meets another.

    Not used under strategies that do not know adapters on several processes, nor under SLURM's
    requeueing, which Lightning sees to.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None
        self._listening = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SigtermHandler:
        return SigtermHandler()

    def __reduce__(self) -> Any:
        return SigtermHandler, ()

    def listen(self, trainer: pl.Trainer) -> None:
        """Take the signal over, in the main thread only."""
        alone = trainer.world_size == 1 or getattr(trainer.strategy, "knows_peft", False)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not alone or isinstance(environment, SLURMEnvironment) or self._listening:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, self._listening = False, True
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def release(self) -> None:
        """Put back the handler that was there."""
        if self._listening:
            self._listening = False
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def obey(self, trainer: pl.Trainer) -> None:
        """Save and end if any process was told to.

        Raises:
            SIGTERMException: on every process, with exit status 143.
        """
        if not self._listening:
            return
        asked = self.received
        if trainer.world_size > 1:
            flag = torch.tensor(float(asked), device=trainer.strategy.root_device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            asked = bool(flag)
        if not asked:
            return
        callback = trainer.checkpoint_callback
        folder = getattr(callback, "dirpath", None) or trainer.default_root_dir
        path = Path(trainer.strategy.broadcast(str(Path(folder) / FILE)))
        trainer.save_checkpoint(path)
        _log.info("SIGTERM: saved %s after step %d; ending", path, trainer.global_step)
        raise SIGTERMException(128 + signal.SIGTERM)
