"""The settings of a plan: method, storage, optimizer, batch and strategy."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.activations.config import Activations
from lightning_peft.methods.base import Method
from lightning_peft.storage import StorageConfig, storage_for

__all__ = ["ALLOWANCES", "NCCL", "OPTIMIZER_BYTES", "Choice"]

#: Name → (full-size states in the parameter's own dtype, further bytes per element).
OPTIMIZER_BYTES: dict[str, tuple[int, float]] = {
    "adamw": (2, 0.0),
    "adam": (2, 0.0),
    "lion": (1, 0.0),
    "sgd": (0, 0.0),
    "sgd_momentum": (1, 0.0),
    "adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "paged_adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "paged_adamw_32bit": (0, 8.0),
    "lion_8bit": (0, 1 + 4 / 256),
}

NCCL = "NCCL buffers"
#: Bytes that a rank needs besides tensors: torch's kernels with the context of a current GPU, and
#: the channels of a few communicators. These are round figures, not measurements.
ALLOWANCES: dict[str, int] = {"CUDA context": 600 * 10**6, NCCL: 500 * 10**6}


@dataclass(frozen=True)
class Choice:
    """The choices that a plan is made for; see `estimate_memory`."""

    method: tuple[Method, ...] | None  # None is plain full fine-tuning
    quantization: StorageConfig | None
    optimizer: str
    precision: str
    batch_size: int
    sequence_length: int
    activations: Activations | None
    loss: str | None
    strategy: str | None
    world_size: int
    liger: bool
    modules_to_save: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    replicas: int = 1
    context_parallel: int = 1
    allowances: tuple[tuple[str, int], ...] = ()

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of weights and state."""
        return self.world_size // self.replicas if self.strategy == "fsdp" else 1

    @property
    def label(self) -> str:
        """Method and storage in a few words."""
        if self.method is None:
            return "full fine-tuning"
        names = " + ".join(m.label for m in self.method)
        return (
            names
            if self.quantization is None
            else f"{names} on {storage_for(self.quantization).label}"
        )
