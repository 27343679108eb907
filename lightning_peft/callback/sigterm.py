"""Saves a checkpoint and stops all ranks after an optimizer step if one of them got SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_peft.callback.superseded import FILE, link_as_last
from lightning_peft.trainers.packages import is_instance_of, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FILE", "SigtermHandler"]

_log = logging.getLogger(__name__)


Handler = Callable[[int, FrameType | None], object] | int | None


class SigtermHandler:
    """A signal handler that only sets a flag.

    Lightning's own handler starts a collective, which hangs when it interrupts another one. This
    handler is not used on several processes under a strategy without adapter support, nor under
    SLURM, whose requeueing Lightning handles.
    """

    def __init__(self) -> None:
        self.received = False
        self._former: Handler = None
        self._installed = False

    def __deepcopy__(self, memo: dict[int, object]) -> SigtermHandler:
        return SigtermHandler()

    def __reduce__(self) -> tuple[type[SigtermHandler], tuple[()]]:
        return SigtermHandler, ()

    def install(self, trainer: pl.Trainer) -> None:
        """Take over the signal; in the main thread only."""
        supported = trainer.world_size == 1 or getattr(trainer.strategy, "knows_peft", False)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not supported or is_instance_of(environment, "SLURMEnvironment") or self._installed:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, self._installed = False, True
        self._former = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Restore the former handler."""
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGTERM, self._former or signal.SIG_DFL)

    def stop_if_requested(self, trainer: pl.Trainer) -> None:
        """Save a checkpoint and stop if any rank received SIGTERM.

        Inside an accumulation window nothing happens: the window is finished first, so that the
        file needs no gradients and fits any number of processes.

        Raises:
            SIGTERMException: on every rank, with exit status 143.
        """
        if not self._installed or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        requested = self.received
        if trainer.world_size > 1:
            flag = torch.tensor(float(requested), device=trainer.strategy.root_device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            requested = bool(flag)
        if not requested:
            return
        callback = trainer.checkpoint_callback
        folder = getattr(callback, "dirpath", None) or trainer.default_root_dir
        path = Path(trainer.strategy.broadcast(str(Path(folder) / FILE)))
        trainer.save_checkpoint(path)
        if trainer.is_global_zero and path.exists():
            link_as_last(path, trainer)
        trainer.strategy.barrier("sigterm")
        _log.info("SIGTERM: saved %s after step %d; ending", path, trainer.global_step)
        package = package_of(trainer)
        assert package is not None  # `PEFT.setup` checked the Trainer
        exceptions = package.submodule("utilities.exceptions")
        raise exceptions.SIGTERMException(128 + signal.SIGTERM)
