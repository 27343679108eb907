"""FSDP2 over adapters for a Trainer: the packed base sharded by rows, one unit per block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.description import KEY, describe, is_attached
from lightning_peft.checkpoint.kept import kept_by_live_key
from lightning_peft.checkpoint.shard_folder import check_shared, write_address, write_folder
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
from lightning_peft.strategies.ddp import may_skip
from lightning_peft.strategies.fault_guards import TrainerGuards
from lightning_peft.strategies.shard_units import Classes
from lightning_peft.strategies.sharding import (
    Options,
    check_context,
    check_replicas,
    data_mesh,
    is_sharded,
    shard_model,
    split_sequences,
)
from lightning_peft.strategies.unused_experts import UsageTracker
from lightning_peft.trainers.packages import callbacks_of, is_fitting, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
else:
    ModelParallelStrategy = object

__all__ = ["TrainerFSDP"]


class TrainerFSDP(TrainerGuards, ModelParallelStrategy):
    """FSDP2: each rank holds a shard of the packed base, the adapters and the optimizer state.

    The LightningModule needs no code for it. Checkpoints hold adapters and state only. Every
    strategy reads them, on any number of ranks.

    Args:
        data_parallel_size: ``"auto"`` or the number of processes.
        tensor_parallel_size: Must be 1: a packed layer cannot be split along its inputs.
        save_distributed_checkpoint: If True, each rank writes its shard into a folder; otherwise
            rank 0 writes one file.
        process_group_backend: As in Lightning.
        timeout: As in Lightning.
        shard_classes: Classes (or their names) that become one unit each. The default is the
            model's no-split list, or its largest list of equal blocks.
        reshard_after_forward: If False, blocks stay gathered between forward and backward: more
            memory, one all-gather less.
        cpu_offload: If True, shards are kept in host memory.
        base_from: Folder of safetensors with the weights of a base built on the meta device. They
            are read and quantised row by row.
        split_root: If True, embeddings and heads of Hugging Face models are units of their own,
            gathered only while they run. Set it to False for code that reads their weights
            without calling them.
        packed_cache: Directory for packed weights of `base_from`: quantised and written on the
            first start, read on later ones.
        replicas: Number of complete copies of the shards. With the number of machines, a model is
            sharded within each machine, and only gradients cross machines.
        context_parallel: Number of ranks that share one batch, each with its part of every
            sequence. For causal language models of Hugging Face that get ``labels``.

    Raises:
        ValueError: the options ask for tensor parallelism.
    """

    strategy_name = "peft_fsdp"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        *,
        shard_classes: Classes = (),
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        base_from: str | Path | None = None,
        split_root: bool = True,
        packed_cache: str | Path | None = None,
        replicas: int = 1,
        context_parallel: int = 1,
    ) -> None:
        if tensor_parallel_size not in ("auto", 1):
            raise ValueError(
                f"peft_fsdp: expected tensor_parallel_size=1, got {tensor_parallel_size}: 4-bit "
                "blocks run along a row, so a layer is cut by rows alone; use all processes for "
                "data"
            )
        super().__init__(
            data_parallel_size, 1, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.options = Options(
            shard_classes,
            reshard_after_forward,
            cpu_offload,
            base_from,
            split_root=split_root,
            packed_cache=packed_cache,
            replicas=replicas,
            context_parallel=context_parallel,
        )
        self.units: list[str] = []
        self._reached: UsageTracker | None = None

    # ---- setting up

    def read_base_from(self, folder: str | Path, packed_cache: str | Path | None) -> None:
        """Called by the callback: takes the base's folder for the time of sharding."""
        self.options = replace(self.options, base_from=folder, packed_cache=packed_cache)

    @override
    def setup_environment(self) -> None:
        """Create the device mesh; all ranks are data-parallel."""
        world = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", world):
            raise ValueError(
                f"peft_fsdp: expected data_parallel_size='auto' or {world} = nodes x devices, got "
                f"{self._data_parallel_size}"
            )
        check_replicas(self.options.replicas, world)
        check_context(self.options.context_parallel, world)
        self._data_parallel_size = world
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the adapted module, then let Lightning create optimizers over the shards."""
        module = self.lightning_module
        assert module is not None
        _check_run(trainer, self)
        if self._save_distributed_checkpoint and self.world_size > 1 and is_fitting(trainer):
            _check_folders(trainer)
        if not is_sharded(module):
            # FSDP2 notes dtypes when it first gathers: Lightning's own cast would come too late.
            self.precision_plugin.convert_module(module)
            # liger-kernel's fused loss reads the head's weight itself.
            apart = not any(getattr(c, "liger", False) for c in callbacks_of(trainer))
            options = replace(
                self.options,
                precision=self.precision_plugin.precision,
                split_root=self.options.split_root and apart,
            )
            mesh = data_mesh(self.device_mesh["data_parallel"], self.options.replicas)
            self.units = shard_model(module, mesh, self.root_device, options)
            self._reached = UsageTracker(module) if may_skip(module) == "experts" else None
            split_sequences(module, self.device_mesh["data_parallel"], options.context_parallel)
        # FSDP2 cannot go on training parameters that an inference-mode forward gathered.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        own = "configure_model" in vars(module)
        if not own:  # Lightning insists on the hook; ours was taken off once adapters were there
            object.__setattr__(module, "configure_model", lambda: None)
        try:
            super().setup(trainer)
        finally:
            if not own:
                vars(module).pop("configure_model", None)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share sequences get the same batches."""
        shared = self.options.context_parallel
        return {"num_replicas": self.world_size // shared, "rank": self.global_rank // shared}

    @override
    def model_to_device(self) -> None:
        """Move the model; offloaded shards stay in host memory."""
        if not self.options.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    @override
    def drop_nonfinite(self, optimizer: Optimizer, device: torch.device) -> None:
        """Drop non-finite gradients, and those of experts that no rank used."""
        super().drop_nonfinite(optimizer, device)
        if self._reached is not None:
            self._reached.leave_out(optimizer, device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Reduce no gradients inside the block: micro-batches before the last one of a window."""
        module: Any = self.lightning_module
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    # ---- checkpoints

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
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None
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
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write adapters only; Lightning's ModelParallelStrategy would write the base too."""
        TrainerGuards.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint on every rank, of sharded weights only the rank's rows."""
        return TrainerGuards.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def read_checkpoint(self, checkpoint_path: Any, weights_only: bool | None) -> dict[str, Any]:
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

    @override
    def teardown(self) -> None:
        """Called when a stage ends: tears down the strategy and the writer."""
        super().teardown()
        self.checkpoint_io.teardown()


def _starts_from_data(module: nn.Module) -> bool:
    """Whether reading a checkpoint forms the base from complete adapter tensors."""
    adapters = (a for _, adapted in adapted_modules(module) for a in weight_adapters_of(adapted))
    return any(adapter.method.needs_data for adapter in adapters)


def _check_folders(trainer: pl.Trainer) -> None:
    """Raise on every rank unless all ranks see the folders of ModelCheckpoint callbacks."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    for folder in trainer.strategy.broadcast(folders):
        if folder is not None and atomic_file.is_local(folder):
            check_shared(Path(folder))


def _check_run(trainer: pl.Trainer, strategy: TrainerFSDP) -> None:
    module = strategy.lightning_module
    assert module is not None
    if not is_attached(module):
        raise RuntimeError(
            "peft_fsdp: expected adapters, found none; add PEFT(...) to the Trainer's callbacks"
        )
    if getattr(strategy.precision_plugin, "scaler", None) is not None or (
        strategy.precision_plugin.precision == "16-mixed"
    ):
        raise ValueError(
            "peft_fsdp: expected 32-true, bf16-mixed, bf16-true or 16-true, got precision "
            "'16-mixed'; use 'bf16-mixed'"
        )
    for callback in callbacks_of(trainer):
        if any(
            is_instance_of(callback, name)
            for name in ("WeightAveraging", "StochasticWeightAveraging")
        ):
            raise ValueError(
                f"peft_fsdp: expected no {type(callback).__name__}: it averages a copy that was "
                "made before sharding; use strategy='peft_ddp'"
            )
