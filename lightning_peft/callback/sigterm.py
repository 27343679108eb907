"""Saves a checkpoint and stops all ranks after an optimizer step if one of them got SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_peft.callback.superseded import FILE, link_as_last, link_checkpoint
from lightning_peft.checkpoint.atomic_file import is_local
from lightning_peft.trainers.packages import is_instance_of, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FILE", "SigtermHandler"]

_log = logging.getLogger(__name__)


Handler = Callable[[int, FrameType | None], object] | int | None


class SigtermHandler:
    """Signal handlers that only set a flag.

    Lightning's own handlers start collectives, which hang when they interrupt another one. These
    handlers are not used on several processes under a strategy without adapter support.

    Under SLURM the signal of a requeue is deferred to the same moment. There Lightning's handler
    saves and requeues the job, on every rank. SIGTERM saves, but never requeues: SLURM itself
    requeues a job that it preempts.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._former: dict[int, Handler] = {}
        self._requeue: int | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> SigtermHandler:
        return SigtermHandler()

    def __reduce__(self) -> tuple[type[SigtermHandler], tuple[()]]:
        return SigtermHandler, ()

    def install(self, trainer: pl.Trainer) -> None:
        """Take over the signals; in the main thread only."""
        supported = trainer.world_size == 1 or getattr(trainer.strategy, "knows_peft", False)
        if not supported or self._former:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, self._requeue = set(), requeue_signal(trainer)
        for number in {int(signal.SIGTERM), self._requeue}:
            if number is not None:
                self._former[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)

    def restore(self) -> None:
        """Restore the former handlers."""
        for number, former in self._former.items():
            signal.signal(number, former or signal.SIG_DFL)
        self._former = {}

    def stop_if_requested(self, trainer: pl.Trainer) -> None:
        """Requeue the job, or save a checkpoint and stop, if any rank received the signal.

        Inside an accumulation window nothing happens: the window is finished first, so that the
        file needs no gradients and fits any number of processes.

        Raises:
            SIGTERMException: on every rank, with exit status 143.
        """
        if not self._former or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        stop, requeue = self._agreed(trainer)
        if requeue and self._requeue is not None:
            self.received.discard(self._requeue)
            former = self._former[self._requeue]
            if callable(former):
                former(self._requeue, None)
        if not stop:
            return
        if self._requeue != signal.SIGTERM:  # else Lightning's handler has just saved
            _save(trainer)
        package = package_of(trainer)
        assert package is not None  # `PEFT.setup` checked the Trainer
        exceptions = package.submodule("utilities.exceptions")
        raise exceptions.SIGTERMException(128 + signal.SIGTERM)

    def _agreed(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Return whether any rank received SIGTERM, and the signal of a requeue."""
        own = [signal.SIGTERM in self.received, self._requeue in self.received]
        if trainer.world_size == 1:
            return own[0], own[1]
        flags = torch.tensor(list(map(float, own)), device=trainer.strategy.root_device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, requeue = flags.tolist()
        return bool(stop), bool(requeue)


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """Return the signal on which Lightning requeues the SLURM job; None if it does not."""
    environment = _requeueing(trainer)
    if environment is None:
        return None
    number = environment.requeue_signal
    # Another program's handler (submitit) stays as it is.
    ours = number is not None and is_instance_of(signal.getsignal(number), "_HandlersCompose")
    return int(number) if ours else None


def _requeueing(trainer: pl.Trainer) -> Any:
    """Return the SLURM environment if Lightning requeues the job, else None."""
    environment: Any = getattr(trainer._accelerator_connector, "cluster_environment", None)
    slurm = is_instance_of(environment, "SLURMEnvironment")
    return environment if slurm and environment.auto_requeue else None


def _save(trainer: pl.Trainer) -> None:
    """Save where the next start looks: for `ckpt_path="last"`, and for a requeued SLURM job.

    A job that SLURM starts again has the same arguments. Without a `ckpt_path`, Lightning takes the
    newest ``hpc_ckpt_<n>.ckpt`` in `default_root_dir`.
    """
    callback = trainer.checkpoint_callback
    folder = getattr(callback, "dirpath", None) or trainer.default_root_dir
    named = target = Path(folder) / FILE
    if _requeueing(trainer) is not None and is_local(trainer.default_root_dir):
        connector = trainer._checkpoint_connector
        target = Path(connector.hpc_save_path(trainer.default_root_dir))
    path = Path(trainer.strategy.broadcast(str(target)))
    trainer.save_checkpoint(path)
    if trainer.is_global_zero and path.exists():
        if named != path:
            link_checkpoint(path, named)
        link_as_last(named, trainer)
    trainer.strategy.barrier("sigterm")
    _log.info("SIGTERM: saved %s after step %d; ending", path, trainer.global_step)
