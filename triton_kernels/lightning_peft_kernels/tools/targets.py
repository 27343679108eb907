"""The chips that kernels are compiled for ahead of time, and what each of them leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_peft_kernels.chips import Chip, amd_chip, nvidia_chip, pipeline_stages

__all__ = ["TARGETS", "Target", "stages_for", "why_left_out"]


@dataclass(frozen=True)
class Target:
    """A chip as Triton's compiler names it.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        architecture: 75, or ``"gfx942"``.
        lanes: Threads per warp.
        shared: Bytes of shared memory per block.
    """

    backend: str
    architecture: int | str
    lanes: int
    shared: int

    @property
    def chip(self) -> Chip:
        """The facts by which kernels are selected."""
        if isinstance(self.architecture, int):
            return nvidia_chip(*divmod(self.architecture, 10), self.shared)
        return amd_chip(self.architecture, self.shared)


#: T4, A100, A10, 4090, H100, B200, 5090, MI300, RX 7900.
TARGETS: dict[str, Target] = {
    "sm_75": Target("cuda", 75, 32, 65_536),
    "sm_80": Target("cuda", 80, 32, 166_912),
    "sm_86": Target("cuda", 86, 32, 101_376),
    "sm_89": Target("cuda", 89, 32, 101_376),
    "sm_90": Target("cuda", 90, 32, 232_448),
    "sm_100": Target("cuda", 100, 32, 232_448),
    "sm_120": Target("cuda", 120, 32, 101_376),
    "gfx942": Target("hip", "gfx942", 64, 65_536),
    "gfx1100": Target("hip", "gfx1100", 32, 65_536),
}


def why_left_out(spec: Mapping[str, Any], chip: Chip) -> str:
    """Return why the dispatch never selects this configuration on a chip; "" if it may."""
    if spec.get("only", "cuda") != "cuda" and chip.is_nvidia:
        return "for AMD only"
    if spec.get("only", "hip") != "hip" and not chip.is_nvidia:
        return "for NVIDIA only"
    if "*fp8e4nv" in spec["signature"].values() and chip.no_e4m3:
        return chip.no_e4m3
    rank, rows = spec.get("rank", 0), spec.get("rows", 0)
    if (rank or rows or spec.get("matrix")) and chip.no_matrix:
        return chip.no_matrix
    if rank > chip.one_pass_rank:
        return f"one pass up to rank {chip.one_pass_rank}"
    if rows and not pipeline_stages(chip, rows):
        return f"no tile of {rows} rows fits"
    return ""


def stages_for(spec: Mapping[str, Any], chip: Chip) -> int:
    """Return the pipeline stages with which a configuration is launched on a chip."""
    rows = spec.get("rows", 0)
    return pipeline_stages(chip, rows) if rows else int(spec["num_stages"])
