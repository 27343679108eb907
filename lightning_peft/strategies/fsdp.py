"""FSDP2 over adapters for a Trainer: the packed base sharded by rows, one unit per block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.strategies.ddp import may_skip
from lightning_peft.strategies.fsdp_checks import (
    check_adapted,
    check_folders,
    check_no_averages,
    check_precision,
)
from lightning_peft.strategies.meshes import (
    check_context,
    check_replicas,
    data_mesh,
    split_sequences,
)
from lightning_peft.strategies.shard_units import Classes
from lightning_peft.strategies.sharded_checkpoints import ShardedCheckpoints
from lightning_peft.strategies.sharding import Options, is_sharded, shard_model
from lightning_peft.strategies.unused_experts import UsageTracker
from lightning_peft.trainers.packages import callbacks_of, is_fitting

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["TrainerFSDP"]


class TrainerFSDP(ShardedCheckpoints):
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
        self._own_base = (base_from, packed_cache)
        self.units: list[str] = []
        self._reached: UsageTracker | None = None

    # ---- setting up

    def read_base_from(self, folder: str | Path, packed_cache: str | Path | None) -> None:
        """Called by the callback: takes the base's folder for the time of sharding.

        Raises:
            ValueError: the strategy was given another folder or cache.
        """
        for name, own, given in zip(
            ("base_from", "packed_cache"), self._own_base, (folder, packed_cache), strict=True
        ):
            if own is not None and str(own) != str(given):
                raise ValueError(
                    f"{name}: expected one value, got {own} from the strategy and {given} from "
                    "PEFT; give it to PEFT alone"
                )
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
        self._check(trainer, module)
        if not is_sharded(module):
            self._shard(trainer, module)
        # FSDP2 cannot go on training parameters that an inference-mode forward gathered.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        with _configure_model_hook(module):
            super().setup(trainer)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        check_adapted(module, "add PEFT(...) to the Trainer's callbacks")
        plugin = self.precision_plugin
        scales = getattr(plugin, "scaler", None) is not None
        check_precision("16-mixed" if scales else plugin.precision)
        check_no_averages(trainer)
        if self._save_distributed_checkpoint and self.world_size > 1 and is_fitting(trainer):
            check_folders(trainer)

    def _shard(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # FSDP2 notes dtypes when it first gathers: Lightning's own cast would come too late.
        self.precision_plugin.convert_module(module)
        # liger-kernel's fused loss reads the head's weight itself.
        apart = not any(getattr(c, "liger", False) for c in callbacks_of(trainer))
        options = replace(
            self.options,
            precision=self.precision_plugin.precision,
            split_root=self.options.split_root and apart,
        )
        whole = self.device_mesh["data_parallel"]
        mesh = data_mesh(whole, self.options.replicas)
        self.units = shard_model(module, mesh, self.root_device, options)
        self._reached = UsageTracker(module) if may_skip(module) == "experts" else None
        split_sequences(module, whole, options.context_parallel)

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

    @override
    def teardown(self) -> None:
        """Called when a stage ends: tears down the strategy and the writer."""
        super().teardown()
        self.checkpoint_io.teardown()


@contextmanager
def _configure_model_hook(module: pl.LightningModule) -> Iterator[None]:
    """Give the module the hook that Lightning insists on: ours was taken off after attaching."""
    if "configure_model" in vars(module):
        yield
        return
    object.__setattr__(module, "configure_model", lambda: None)
    try:
        yield
    finally:
        vars(module).pop("configure_model", None)
