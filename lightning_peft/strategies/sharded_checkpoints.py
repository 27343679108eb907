"""Checkpoints of an FSDP2 run: trained tensors alone, in one file or in a folder of shards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.description import KEY, describe
from lightning_peft.checkpoint.kept import kept_by_live_key
from lightning_peft.checkpoint.shard_folder import write_address, write_folder
from lightning_peft.checkpoint.sharded import (
    OwnRows,
    gather_optimizers,
    gather_shards,
    gather_tensors,
    optimizer_shard,
    shard_optimizer_state,
    tensor_shards,
)
from lightning_peft.core.names import strip_compile
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.models.history import note_moved
from lightning_peft.optim.wrappers import unwrap_optimizer
from lightning_peft.storage.dtensor import fill_rows, shard_group
from lightning_peft.strategies.fault_guards import TrainerGuards

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ModelParallelStrategy
else:
    ModelParallelStrategy = object

__all__ = ["ShardedCheckpoints"]


class ShardedCheckpoints(TrainerGuards, ModelParallelStrategy):
    """Saves and loads the shards of all ranks. It comes before Lightning's class in the bases."""

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return trained tensors by module key: full on rank 0, or this rank's shards."""
        if self.interrupted:
            return {}
        module = self.lightning_module
        assert module is not None
        note_moved(module)
        own = tensor_shards(kept_by_live_key(module))
        if self._save_distributed_checkpoint:
            return own
        shards = gather_shards(own)
        return gather_tensors(shards) if shards else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state: full on rank 0, or this rank's shards."""
        if self.interrupted:
            return {}
        own = optimizer_shard(unwrap_optimizer(optimizer))
        if self._save_distributed_checkpoint:
            return own
        shards = gather_shards(own)
        return gather_optimizers(shards) if shards else {}

    @override
    def write_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object
    ) -> None:
        """Write one file on rank 0, or a folder of shards."""
        if self.interrupted:
            # Other ranks may be anywhere, so their shards are out of reach.
            if self.is_global_zero:
                warnings.warn(
                    f"{filepath}: not written: an exception is being handled", stacklevel=2
                )
            return
        if not self._save_distributed_checkpoint:
            super().write_checkpoint(checkpoint, filepath, storage_options)
            return
        module = self.lightning_module
        assert module is not None
        entry = {**describe(module), **(checkpoint.get(KEY) or {})}
        whole = {**checkpoint, KEY: entry}
        if not atomic_file.is_local(address := str(self.broadcast(filepath))):
            write_address(whole, address)
            return
        target = Path(address)
        temporary = Path(self.broadcast(str(atomic_file.temporary_path(target))))
        write_folder(whole, temporary, target)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Write adapters only; Lightning's ModelParallelStrategy would write the base too."""
        TrainerGuards.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint on every rank, of sharded weights only the rank's rows."""
        return TrainerGuards.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def read_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None
    ) -> dict[str, Any]:
        """Read with the plugin; Lightning's ModelParallelStrategy would read the base too."""
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(
            checkpoint_path, weights_only=weights_only
        )
        return found

    def own_rows(self) -> OwnRows | None:
        """Return the rows that this rank holds of every sharded tensor; None if it holds all."""
        module = self.lightning_module
        if module is None or self.interrupted or _starts_from_data(module):
            return None
        kept = kept_by_live_key(module)
        groups = {key: found for key, t in kept.items() if (found := shard_group(t)) is not None}
        if not groups:
            return None
        names = frozenset([*groups, *map(strip_compile, groups)])
        first = next(iter(groups.values()))
        return OwnRows(first.position, first.size, names)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's rows; the checkpoint was checked when it was read."""
        module = self.lightning_module
        assert module is not None
        for key, t in kept_by_live_key(module).items():
            if key in checkpoint["state_dict"]:
                fill_rows(t, checkpoint["state_dict"][key])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy this rank's part of the optimizer states."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(optimizer, whole))


def _starts_from_data(module: nn.Module) -> bool:
    """Whether reading a checkpoint forms the base from complete adapter tensors."""
    adapters = (a for _, adapted in adapted_modules(module) for a in weight_adapters_of(adapted))
    return any(adapter.method.needs_data for adapter in adapters)
