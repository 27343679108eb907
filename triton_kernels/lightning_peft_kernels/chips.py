"""What a GPU can run: facts that a kernel's selection and configuration depend on.

Limits are read from the device. Capabilities are rows by family, with the reason where a row
forbids something.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = [
    "CHIPS",
    "WIDE",
    "Chip",
    "amd_chip",
    "chip_of",
    "nvidia_chip",
    "pipeline_stages",
    "tile_rows",
    "why_no_tile",
]

#: Why a kernel with matrix products refuses fp32: its tiles would spill, and need more shared
#: memory than an A100 has.
WIDE = "tiles of two bytes per element"
_MOST_DECISIONS = 4096


@dataclass(frozen=True)
class Chip:
    """Facts about one GPU.

    Attributes:
        name: Architecture, ``"sm_86"`` or ``"gfx942"``.
        shared: Bytes of shared memory that one program may use.
        no_matrix: Why kernels with matrix products do not run here; "" if they do.
        no_e4m3: Why kernels do not convert to e4m3 here; "" if they do.
        no_row_scales: Why `torch._scaled_mm` takes no scale per row here; "" if it does.
        one_pass_rank: Largest rank whose two gradients one pass computes without spilling.
        decisions: What was selected on this chip, by question; see `remember`.
    """

    name: str
    shared: int
    no_matrix: str
    no_e4m3: str
    no_row_scales: str
    one_pass_rank: int
    decisions: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_nvidia(self) -> bool:
        """Whether this is an NVIDIA chip."""
        return self.name.startswith("sm_")

    def remember(self, question: Hashable, decision: Any) -> None:
        """Keep a decision, so that the next layer of this shape looks it up and asks nothing."""
        if len(self.decisions) >= _MOST_DECISIONS:  # token counts may vary without end
            self.decisions.clear()
        self.decisions[question] = decision


class _Family(NamedTuple):
    """Facts that all chips of a family share; see `Chip`."""

    no_matrix: str
    no_e4m3: str
    no_row_scales: str
    one_pass_rank: int


_NO_FP8 = "e4m3 begins at sm_89"
# Least compute capability → family; the first row that a chip reaches applies.
_NVIDIA: tuple[tuple[tuple[int, int], _Family], ...] = (
    # CUBLAS_STATUS_NOT_SUPPORTED, pytorch#192707 (torch 2.10, CUDA 13); scales per tensor work.
    ((12, 0), _Family("", "", "cuBLAS has no scale per row on this chip", 32)),
    ((8, 9), _Family("", "", "", 32)),
    ((8, 0), _Family("", _NO_FP8, _NO_FP8, 32)),
    # Triton 3.7 emits no matrix instruction below sm_80: a tile needs up to 98,304 bytes of shared
    # memory and most tiles spill, so two library products are faster.
    ((0, 0), _Family("Triton has no matrix instruction below sm_80", _NO_FP8, _NO_FP8, 0)),
)
_OTHER_FP8 = "this chip uses another e4m3 format"
_UNCHECKED_FP8 = "e4m3 kernels were not compiled for this chip"
# Prefix of the architecture → family; the first row that matches applies.
_AMD: tuple[tuple[str, _Family], ...] = (
    ("gfx942", _Family("", _OTHER_FP8, _OTHER_FP8, 16)),
    ("gfx95", _Family("", _UNCHECKED_FP8, _UNCHECKED_FP8, 16)),
    ("gfx9", _Family("", "this chip has no fp8", "this chip has no fp8", 16)),
    # Compiled for gfx1100, ten of seventeen configurations spill 28 to 4,312 bytes per lane.
    ("", _Family("matrix kernels spill registers on RDNA", _UNCHECKED_FP8, _UNCHECKED_FP8, 0)),
)

# Rows of a tile → pipeline stages → bytes of shared memory of the products that decode packed
# weights (Triton 3.7.1): with three stages the most of all NVIDIA targets in
# benchmarks/results/aot.csv, with two that of sm_86 to sm_120 in fake_gpu.csv beside it.
_PIPELINES: dict[int, dict[int, int]] = {
    16: {3: 94_208},
    32: {3: 98_304},
    64: {3: 114_792, 2: 69_632},
}

#: The chips read so far. A test that compiles for another chip adds it for the CPU.
CHIPS: dict[torch.device, Chip] = {}


def chip_of(device: torch.device) -> Chip | None:
    """Return the chip of a CUDA or ROCm device; None for other devices."""
    chip = CHIPS.get(device)
    if chip is None and device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        chip = CHIPS.get(device) or _read(device)
        CHIPS[device] = chip
    return chip


# A traced graph reads it as a constant, as `dispatch.current_backend`.
vars(chip_of)["_dynamo_marked_constant"] = True


def _read(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    shared = int(shared or properties.shared_memory_per_block)
    if torch.version.hip is not None:
        return amd_chip(properties.gcnArchName, shared)
    return nvidia_chip(properties.major, properties.minor, shared)


def nvidia_chip(major: int, minor: int, shared: int) -> Chip:
    """Return the facts about an NVIDIA chip of this compute capability."""
    family = next(family for least, family in _NVIDIA if (major, minor) >= least)
    return Chip(f"sm_{major}{minor}", shared, *family)


def amd_chip(architecture: str, shared: int) -> Chip:
    """Return the facts about an AMD chip; `architecture` may carry features after a colon."""
    name = architecture.partition(":")[0]
    family = next(family for prefix, family in _AMD if name.startswith(prefix))
    return Chip(name, shared, *family)


def pipeline_stages(chip: Chip | None, rows: int) -> int:
    """Return the most pipeline stages that fit the chip for a tile of `rows`; 0 if none fits.

    Without a chip (the interpreter), all stages fit. On AMD every tile takes at most 24,576 bytes.
    """
    by_stages = _PIPELINES[rows]
    if chip is None or not chip.is_nvidia:
        return max(by_stages)
    return max((stages for stages, size in by_stages.items() if size <= chip.shared), default=0)


def tile_rows(rows: int) -> int:
    """Return the rows of a tile that holds `rows` rows: 16, 32 or 64."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def why_no_tile(device: torch.device, rows: int) -> str:
    """Return why no tile of `rows` that decodes a packed weight runs on the chip; "" if it does."""
    chip = chip_of(device)
    if chip is None or (not chip.no_matrix and pipeline_stages(chip, rows)):
        return ""
    why = chip.no_matrix or f"{chip.shared:,} bytes of shared memory hold no tile of {rows} rows"
    return f"{chip.name}: {why}"
