"""FSDP2 over adapters: the packed base sharded by rows, one unit a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import KEY, describe, is_attached, kept_tensors
from lightning_peft.storage.dtensor import fill_rows
from lightning_peft.strategies.collectives import raise_on_all_ranks
from lightning_peft.strategies.ddp import may_skip
from lightning_peft.strategies.fault_guards import Guards
from lightning_peft.strategies.shard_units import Classes
from lightning_peft.strategies.sharded_checkpoint import (
    gather_optimizers,
    gather_tensors,
    optimizer_shard,
    prune,
    shard_optimizer_state,
    tensor_shards,
)
from lightning_peft.strategies.sharding import Options, is_sharded, shard_model
from lightning_peft.strategies.unused_experts import UsageTracker

__all__ = ["PEFTFSDPStrategy"]


class PEFTFSDPStrategy(Guards, ModelParallelStrategy):
    """Each process keeps a part of the packed base, of the adapters and of the optimizer's state.

    The LightningModule needs no code for it. Checkpoints hold adapters and state only, and are read
    by every strategy on any number of processes.

    Args:
        data_parallel_size: ``"auto"`` or the number of processes.
        tensor_parallel_size: 1: a packed layer cannot be split along its inputs.
        save_distributed_checkpoint: Whether each process writes its piece into a folder, instead of
            one file by rank 0.
        process_group_backend: As in Lightning.
        timeout: As in Lightning.
        shard_classes: Classes (or their names) that become one unit each; default the model's own
            no-split list, or its largest list of equal blocks.
        reshard_after_forward: Whether blocks are given up between forward and backward; False
            saves the second all-gather for memory.
        cpu_offload: Whether shards rest in host memory.
        base_from: Folder of safetensors from which a base built on the meta device is read, row by
            row, and quantised on the way.

    Raises:
        ValueError: tensor parallelism is asked for.
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
        self.options = Options(shard_classes, reshard_after_forward, cpu_offload, base_from)
        self.units: list[str] = []
        self._reached: UsageTracker | None = None

    # ---- setting up

    def setup_environment(self) -> None:
        """All processes are data-parallel."""
        world = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", world):
            raise ValueError(
                f"peft_fsdp: expected data_parallel_size='auto' or {world} = nodes x devices, got "
                f"{self._data_parallel_size}"
            )
        self._data_parallel_size = world
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard what was attached, then let Lightning make optimizers over the shards."""
        module = self.lightning_module
        assert module is not None
        _refuse(trainer, self)
        if not is_sharded(module):
            # FSDP2 notes dtypes when it first gathers: Lightning's own cast would come too late.
            self.precision_plugin.convert_module(module)
            options = replace(self.options, precision=self.precision_plugin.precision)
            mesh = self.device_mesh["data_parallel"]
            self.units = shard_model(module, mesh, self.root_device, options)
            self._reached = UsageTracker(module) if may_skip(module) == "experts" else None
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

    def model_to_device(self) -> None:
        """Offloaded shards stay in host memory; buffers move."""
        if not self.options.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    def _drop_nonfinite(self, optimizer: Optimizer) -> None:
        """The same, and experts that no process reached."""
        super()._drop_nonfinite(optimizer)
        if self._reached is not None:
            self._reached.leave_out(optimizer, self.root_device)

    # ---- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, under its key in the module: whole on rank 0, or this process's rows."""
        if self.interrupted:
            return {}
        module = self.lightning_module
        assert module is not None
        own = tensor_shards(_kept_by_live_key(module))
        if self._save_distributed_checkpoint:
            return own
        shards = self._gather(own)
        return gather_tensors(shards) if shards else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer's state."""
        if self.interrupted:
            return {}
        plain: Any = getattr(optimizer, "_optimizer", optimizer)
        own = optimizer_shard(plain)
        if self._save_distributed_checkpoint:
            return own
        shards = self._gather(own)
        return gather_optimizers(shards) if shards else {}

    def _gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's piece, on rank 0; nothing elsewhere."""
        if self.world_size == 1:
            return [own]
        shards: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(own, shards)
        return shards or []

    def write_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None
    ) -> None:
        """One file by rank 0, or a folder of shards."""
        if self.interrupted:
            # Shards of the others are out of reach while they may be anywhere.
            pl.utilities.rank_zero_warn(f"{filepath}: not written: an exception is being handled")
            return
        if not self._save_distributed_checkpoint:
            super().write_checkpoint(checkpoint, filepath, storage_options)
            return
        self._write_folder(checkpoint, Path(self.broadcast(filepath)))

    def _write_folder(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Pieces into a temporary folder; renamed when every process has written its own."""
        module = self.lightning_module
        assert module is not None
        temporary = target.with_name(f".{target.name}.tmp")
        whole = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        piece = {k: v for k, v in checkpoint.items() if k in ("state_dict", "optimizer_states")}
        error: Exception | None = None
        try:
            atomic_file.write(piece, temporary / f"piece-{self.global_rank}.pt")
        except Exception as caught:
            error = caught
        raise_on_all_ranks(error, f"saving {target}")
        if self.is_global_zero:
            whole[KEY] = {**describe(module), **(checkpoint.get(KEY) or {})}
            whole["shards"] = self.world_size
            atomic_file.write(whole, temporary / "meta.pt")
            prune(temporary, self.world_size)
            atomic_file.publish(temporary, target)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """As the guards have it; Lightning's own form would hold the base."""
        Guards.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The whole checkpoint; every process reads it and keeps its rows."""
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(
            checkpoint_path, weights_only=weights_only
        )
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy in this process's rows; the checkpoint was checked as a whole when it was read."""
        module = self.lightning_module
        assert module is not None
        for key, t in _kept_by_live_key(module).items():
            if key in checkpoint["state_dict"]:
                fill_rows(t, checkpoint["state_dict"][key])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The same of the optimizers' states."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(optimizer, whole))

    def teardown(self) -> None:
        """Lightning's, and the writer's."""
        super().teardown()
        self.checkpoint_io.teardown()


def _kept_by_live_key(module: nn.Module) -> dict[str, Tensor]:
    kept = {id(t) for t in kept_tensors(module).values()}
    live: dict[str, Tensor] = nn.Module.state_dict(module, keep_vars=True)
    found: dict[str, Tensor] = {}
    for key, t in live.items():
        if id(t) in kept:
            kept.remove(id(t))
            found[key] = t
    return found


def _refuse(trainer: pl.Trainer, strategy: PEFTFSDPStrategy) -> None:
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
    averaging = ("WeightAveraging", "StochasticWeightAveraging")
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if any(c.__name__ in averaging for c in type(callback).__mro__):
            raise ValueError(
                f"peft_fsdp: expected no {type(callback).__name__}: it averages a copy that was "
                "made before sharding; use strategy='peft_ddp'"
            )
