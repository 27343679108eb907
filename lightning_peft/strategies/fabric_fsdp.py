"""FSDP2 over adapters for Fabric: the packed base sharded by rows, one unit per block."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.strategies.ddp import may_skip
from lightning_peft.strategies.fault_guards import FabricGuards
from lightning_peft.strategies.fsdp_checks import check_adapted, check_precision
from lightning_peft.strategies.meshes import check_replicas, data_mesh
from lightning_peft.strategies.rank_consistency import check_same_model
from lightning_peft.strategies.shard_units import Classes
from lightning_peft.strategies.sharding import Options, is_sharded, shard_model
from lightning_peft.strategies.unused_experts import UsageTracker

if TYPE_CHECKING:
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
else:
    ModelParallelStrategy = object

__all__ = ["FabricFSDP"]


class FabricFSDP(FabricGuards, ModelParallelStrategy):
    """FSDP2 under Fabric: each rank holds a shard of the packed base, adapters and their state.

    Call `attach` before `fabric.setup_module`, and create the optimizer after it. Checkpoints are
    written by `save_checkpoint` and read by `load_checkpoint` of this package.

    Args:
        process_group_backend: As in Fabric.
        timeout: As in Fabric.
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
    """

    strategy_name = "peft_fsdp"

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            self._shard,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.options = Options(
            shard_classes,
            reshard_after_forward,
            cpu_offload,
            base_from,
            split_root=split_root,
            packed_cache=packed_cache,
            replicas=replicas,
        )
        self.units: list[str] = []
        self._usage: UsageTracker | None = None

    @override
    def setup_environment(self) -> None:
        """Create the device mesh; all ranks are data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        check_replicas(self.options.replicas, self._data_parallel_size)
        super().setup_environment()

    def _shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        check_adapted(module, "call attach(model, method) before fabric.setup_module")
        check_precision(self.precision.precision)
        check_same_model(module)
        if not is_sharded(module):
            options = replace(self.options, precision=self.precision.precision)
            whole = data_mesh(mesh["data_parallel"], options.replicas)
            self.units = shard_model(module, whole, self.root_device, options)
            self._usage = UsageTracker(module) if may_skip(module) == "experts" else None
        for module_with_buffers in module.modules():
            for name, buffer in module_with_buffers._buffers.items():
                if buffer is not None:
                    module_with_buffers._buffers[name] = buffer.to(self.root_device)
        return module

    @override
    def drop_nonfinite(self, optimizer: Optimizer, device: torch.device) -> None:
        """Drop non-finite gradients, and those of experts that no rank used."""
        super().drop_nonfinite(optimizer, device)
        if self._usage is not None:
            self._usage.leave_out(optimizer, device)

    @override
    def save_checkpoint(self, path: str | Path, state: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse `fabric.save`, which would write the base in shards of this run.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "peft_fsdp: expected lightning_peft.save_checkpoint(module, path, ...), got "
            "fabric.save; call save_checkpoint on every rank: it writes adapters only, and every "
            "strategy reads the file"
        )

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse `fabric.load`.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "peft_fsdp: expected lightning_peft.load_checkpoint(module, path, ...), got "
            "fabric.load; call load_checkpoint on every rank"
        )
