"""Two checkpoint plugins.

The outermost filters the checkpoint that is written and completes the one that is read. The
innermost writes atomically.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_peft.callback.superseded import SupersededFiles
from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import (
    complete_checkpoint,
    filter_checkpoint,
    is_attached,
    leaks,
    nonfinite_message,
)
from lightning_peft.checkpoint.damage import DamagedCheckpointError
from lightning_peft.checkpoint.description import KEY
from lightning_peft.checkpoint.forms import CheckpointForm, refuse_merged
from lightning_peft.checkpoint.plain_data import fields_not_plain
from lightning_peft.checkpoint.shard_folder import is_folder, read_file, read_folder
from lightning_peft.checkpoint.sharded import OwnRows
from lightning_peft.checkpoint.structure import check_like
from lightning_peft.initialization.data_driven import waiting_adapters
from lightning_peft.trainers.packages import is_instance_of, is_interrupted, package_of

if TYPE_CHECKING:
    from lightning.fabric.plugins.io import CheckpointIO
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
else:
    CheckpointIO = object  # `install_checkpoint_io` registers the class of the Trainer's package

_VERSION = "pytorch-lightning_version"

__all__ = ["AtomicCheckpointIO", "PEFTCheckpointIO", "install_checkpoint_io"]


class AtomicCheckpointIO(CheckpointIO):
    """Writes local files atomically and reads plain data only.

    Args:
        remote: Lightning's plain plugin, which handles remote paths and storage options.
        own_rows: Returns the rows of sharded tensors that this rank reads; None for all rows.
    """

    def __init__(self, remote: CheckpointIO, own_rows: Callable[[], OwnRows | None]) -> None:
        super().__init__()
        self.remote = remote
        self.own_rows = own_rows

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write the complete file or leave the former one in place."""
        if storage_options is not None or not atomic_file.is_local(path):
            self.remote.save_checkpoint(checkpoint, path, storage_options)
            return
        if is_folder(path):  # the former checkpoint is in shards
            target = Path(path)
            fresh = target.with_name(f".{target.name}.file")
            atomic_file.write(checkpoint, fresh)
            atomic_file.publish(fresh, target)
            return
        atomic_file.write(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or a folder of shards; plain data only, unless the caller asks for more."""
        if atomic_file.is_local(path):
            atomic_file.recover(path)
        own = self.own_rows()
        if is_folder(path):
            return read_folder(path, own)
        if own is not None and weights_only is not False and atomic_file.is_local(path):
            return read_file(Path(path), own)
        if weights_only is False and atomic_file.is_local(path) and map_location is None:
            return atomic_file.read(path, weights_only=False)
        if weights_only is False or not atomic_file.is_local(path):
            place = (lambda storage, _: storage) if map_location is None else map_location
            return self.remote.load_checkpoint(path, place, weights_only is not False)
        return atomic_file.read(path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint as Lightning does."""
        self.remote.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """Called when the Trainer ends: tears down Lightning's plugin."""
        self.remote.teardown()


class PEFTCheckpointIO(CheckpointIO):
    """The outermost plugin: writes adapters and adds the base when it reads.

    It keeps its own references because Lightning's tuners save and load while callbacks are
    detached.

    Attributes:
        inner: The plugin that writes.
        module: Returns the live LightningModule.
        resuming: Returns whether training continues after loading.
        started: If True, an adapter was attached since the strategy was created. Before that,
            nothing is written.
        form: What is written: adapters, the full state, or merged weights.
        fall_back: Whether a damaged checkpoint is replaced by the newest undamaged one.
        lost: Adapters that start again because their layers were replaced. Loading fills them.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        module: Callable[[], LightningModule | None],
        resuming: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.module = module
        self.resuming = resuming
        self.started = False
        self.form: CheckpointForm = "adapters"
        self.fall_back = False
        self._superseded = SupersededFiles()
        self._written: set[str] = set()
        self.lost: list[str] = []
        self._hparams_checked = False

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write adapters and Trainer state in the form that was chosen."""
        module = self.module()
        attached = module is not None and is_attached(module)
        if not attached and not self.started:
            # An exception before attaching: a file without adapters would replace a good one.
            warnings.warn(f"{path}: not written: no adapter is attached yet", stacklevel=2)
            return
        if module is not None and attached and "state_dict" in checkpoint:
            checkpoint = filter_checkpoint(module, checkpoint, self.form)
            self._warn(module, checkpoint, path)
            if not self._is_finite(module, checkpoint, path):
                return
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        self._written.add(os.fspath(path))
        if self.resuming():
            self._superseded.remove(path, checkpoint.get("global_step"))

    def read_again(self, path: str | Path) -> dict[str, Any]:
        """Return the content of a file as it was written, without the base.

        Objects in a file that this process wrote are unpickled, since they come from here.
        """
        weights_only = False if os.fspath(path) in self._written else None
        return self.inner.load_checkpoint(path, weights_only=weights_only)

    def _is_finite(
        self, module: LightningModule, checkpoint: dict[str, Any], path: str | Path
    ) -> bool:
        """Whether the trained tensors are finite; a run that goes on is ended if they are not.

        Raises:
            RuntimeError: they are not; the former file is untouched.
        """
        text = nonfinite_message(module, checkpoint["state_dict"], path)
        if not text:
            return True
        if self.resuming() and not is_interrupted(module.trainer):
            raise RuntimeError(
                f"{text}. Resume from one of them with a lower learning rate, "
                "or without the batch that had bad values"
            )
        warnings.warn(text, stacklevel=3)
        return False

    def _warn(self, module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
        for where in leaks(module, checkpoint) if self.form == "adapters" else ():
            warnings.warn(f"{path}: {where} holds a tensor of the frozen base", stacklevel=3)
        if not self._hparams_checked:
            self._hparams_checked = True
            for field, why in fields_not_plain(checkpoint.get("hyper_parameters") or {}):
                warnings.warn(
                    f"{path}: hyper-parameter {field!r} is no plain data, so the file cannot be "
                    f"loaded with weights_only=True ({why}); leave it out: "
                    f"save_hyperparameters(ignore=[{field!r}])",
                    stacklevel=3,
                )

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file, check it against the live model, and add the base."""
        given = {} if map_location is None else {"map_location": map_location}
        try:
            checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only, **given)
        except DamagedCheckpointError as error:
            if error.newest is None:
                raise
            if not self.fall_back:
                error.args = (f"{error}, or give PEFT(fall_back=True), which resumes from it",)
                raise
            warnings.warn(f"{error}; resuming from {error.newest}", stacklevel=2)
            path = error.newest
            checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only, **given)
        module = self.module()
        if module is None or not is_attached(module):
            return checkpoint
        package = package_of(module)
        if "state_dict" not in checkpoint:
            raise ValueError(
                f"{os.fspath(path)}: expected a checkpoint with 'state_dict', got keys "
                f"{sorted(map(str, checkpoint))}; resume from another checkpoint"
            )
        if package is not None:  # a file of `save_checkpoint` has none; Lightning requires one
            checkpoint.setdefault(_VERSION, package.version)
        refuse_merged(checkpoint, os.fspath(path))
        if self.resuming():
            same = package is not None and checkpoint.get(_VERSION) == package.version
            _check_training_state(module.trainer, checkpoint, os.fspath(path), complete=same)
        self.lost = []
        waited, resuming = bool(waiting_adapters(module)), self.resuming()
        checkpoint = complete_checkpoint(module, checkpoint, os.fspath(path), resuming=resuming)
        if waited and resuming:
            rebuild_averages(module.trainer, module)  # the file's start may have other ranks
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint with the inner plugin."""
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """Called when the Trainer ends: lets an asynchronous writer finish."""
        self.inner.teardown()


def _check_training_state(
    trainer: Trainer, checkpoint: dict[str, Any], source: str, *, complete: bool
) -> None:
    """Raise ValueError if the Trainer could not go on from the file."""
    if isinstance(checkpoint.get("loops"), dict):
        live = {"fit_loop": trainer.fit_loop.state_dict()}
        check_like(checkpoint["loops"], live, source, "loops", complete=complete)
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{source}: expected optimizer states to resume from, got weights alone, as "
            "ModelCheckpoint(save_weights_only=True) writes them; use load_from_checkpoint and a "
            "new fit"
        )
    if complete:
        absent = [n for n in ("lr_schedulers", "epoch", "global_step") if n not in checkpoint]
        entry = checkpoint.get(KEY)
        if isinstance(entry, dict) and "optimizers" in entry and entry.get("rng") is None:
            absent.append(f"{KEY}.rng")
        if absent:
            raise ValueError(
                f"{source}: expected {', '.join(absent)} beside the optimizer states, found none; "
                "resume from another checkpoint"
            )


def install_checkpoint_io(strategy: Strategy, resuming: Callable[[], bool]) -> PEFTCheckpointIO:
    """Wrap the strategy's plugin in ours, once per strategy."""
    found: Any = strategy.checkpoint_io
    if isinstance(found, PEFTCheckpointIO):
        found.resuming = resuming
        return found
    package = package_of(strategy)
    if package is not None:
        base = package.fabric_submodule("plugins.io").CheckpointIO
        for cls in (AtomicCheckpointIO, PEFTCheckpointIO):
            base.register(cls)
    own_rows: Callable[[], OwnRows | None] = getattr(strategy, "own_rows", lambda: None)
    writer = _atomic(found, own_rows)
    ours = PEFTCheckpointIO(writer, lambda: strategy.lightning_module, resuming)
    strategy.checkpoint_io = ours
    return ours


def _atomic(plugin: CheckpointIO, own_rows: Callable[[], OwnRows | None]) -> CheckpointIO:
    """Replace Lightning's plain writer by the atomic one. A user's own plugin is kept."""
    if type(plugin).__name__ == "TorchCheckpointIO" and is_instance_of(plugin, "TorchCheckpointIO"):
        return AtomicCheckpointIO(plugin, own_rows)
    inner: Any = getattr(plugin, "_checkpoint_io", None)
    if is_instance_of(plugin, "AsyncCheckpointIO") and type(inner).__name__ == "TorchCheckpointIO":
        writer: Any = plugin
        writer._checkpoint_io = AtomicCheckpointIO(
            inner, own_rows
        )  # the setter would keep the former plugin
    return plugin
