"""A GPU that is not there: Triton compiles for a named chip and checks its limits on a CPU.

Triton's own specialisation, compilation and check of resources run unchanged. Launches are recorded
and dropped. Triton caches the limits of the active chip, so a process uses one chip only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.tools.targets import TARGETS as GPUS
from lightning_peft_kernels.tools.targets import Target

__all__ = ["GPUS", "FakeDriver", "Launched", "use_fake_gpu"]


@dataclass(frozen=True)
class Launched:
    """One launch that would have run.

    Attributes:
        kernel: Name of the kernel.
        shared: Bytes of shared memory per block.
        stages: Stages of its software pipeline.
        arguments: The arguments that the device would have received.
    """

    kernel: str
    shared: int
    stages: int
    arguments: tuple[Any, ...] = field(repr=False)


class _Utilities:
    """Properties and loading of binaries."""

    def __init__(self, gpu: Target) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limits of the chip."""
        return {
            "max_shared_mem": self.gpu.shared,
            "multiprocessor_count": 100,
            "warpSize": self.gpu.lanes,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, int, int, int, int]:
        """Return (module, function, registers, spills, most threads)."""
        return object(), 1, 0, 0, 1024


class FakeDriver:
    """The driver that Triton talks to."""

    def __init__(self, gpu: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.gpu, self.launched = gpu, list[Launched]()
        self.utils = _Utilities(gpu)
        self.target = GPUTarget(gpu.backend, gpu.architecture, gpu.lanes)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return what records the launches of one compiled kernel."""
        name, shared, stages = source.fn.__name__, metadata.shared, metadata.num_stages

        def launch(*arguments: Any) -> None:
            self.launched.append(Launched(name, shared, stages, arguments[9:]))

        return launch

    def get_current_target(self) -> Any:
        """Return the target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")


def use_fake_gpu(name: str) -> FakeDriver:
    """Give this process a chip, on which CPU tensors live.

    The ops select for it, and Triton compiles for it; `launched` of the driver grows with every
    launch. Results are undefined: nothing runs.
    """
    from triton.runtime import driver

    made = FakeDriver(GPUS[name])
    CHIPS[torch.device("cpu")] = made.gpu.chip
    driver.set_active(made)
    return made
