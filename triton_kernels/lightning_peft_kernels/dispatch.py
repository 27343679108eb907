"""The dispatch rule: which implementation runs an op, and why.

One function decides for every op from what it is given (device, dtype, tokens, shape) and the
preference in force. The decision carries its reason, which the preflight report prints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

__all__ = [
    "CROSSINGS",
    "EXPERT_ROWS",
    "FLOAT32_TOKENS",
    "Decision",
    "Preference",
    "architecture",
    "choose",
    "choose_experts",
    "choose_group",
    "choose_one_pass",
    "choose_product",
    "crossing",
    "prefer",
    "prefer_groups",
    "preference",
    "triton_available",
]

Preference = Literal["auto", "triton", "torch"]

_preference: list[Preference] = ["auto"]
_groups: list[bool | None] = [None]

# Architecture → (least N, most tokens), first that fits: up to how many tokens the product that
# decodes the weight inside beats dequantise + library product. Not measured with these kernels:
# the starting point is the table that bitsandbytes 0.50.2 calibrated on these chips, cut at the 64
# rows these kernels take. Where K ≥ N the tokens of the last row hold below N = 8448.
CROSSINGS: dict[str, tuple[tuple[int, int], ...]] = {
    "sm_80": ((8448, 64), (4224, 16), (0, 4)),
    "sm_90": ((25344, 64), (16896, 48), (8448, 32), (4224, 16), (0, 4)),
    "sm_100": ((8448, 32), (0, 4)),
    "gfx942": ((0, 4),),
}
# q, k, v and gate, up of a Llama block of width 1024, 16 to 1,024 tokens, forward and backward: as
# one product 0.94 to 1.16 of the time (benchmarks/cpu/projections.py, 2026-11-21).
GROUPED_ON_CPU = "no faster as one product"
# Rows an expert, on average, up to which packed experts are decoded in their grouped product. Not
# measured; arithmetic for an H200 (4.3 TB/s, 790 TFLOP/s): dequantise, write and read 4.5 bytes a
# weight, 1.05 ps; decoding takes 9 instructions a weight and tile of 64 rows, 0.27 ps, and half the
# library's rate in the product: even near 128 rows, half of that for what the sum leaves out.
EXPERT_ROWS = 64
# Products in fp32 spill in these kernels, and their tiles are larger than an A100's shared memory;
# up to four tokens there is no matrix instruction.
FLOAT32_TOKENS = 4
_WIDE = "tiles of two bytes an element"
_EVIDENCE = "as calibrated by bitsandbytes, not measured with these kernels"


@dataclass(frozen=True)
class Decision:
    """What runs, and why.

    Attributes:
        backend: ``"triton"`` or ``"torch"``; for products with a packed base, ``"fused"``,
            ``"dequantize"``, ``"scaled_mm"`` or ``"emulated"``; for layers over one input
            ``"grouped"`` or ``"apart"``.
        reason: One clause for the report.
    """

    backend: Literal[
        "triton", "torch", "fused", "dequantize", "scaled_mm", "emulated", "grouped", "apart"
    ]
    reason: str


def prefer(preference: Preference) -> None:
    """Set the preference: ``"auto"``, or one backend where it can run.

    Raises:
        ValueError: an unknown preference.
    """
    if preference not in ("auto", "triton", "torch"):
        raise ValueError(
            f"kernels: expected 'auto', 'triton' or 'torch', got {preference!r}; use 'auto' unless "
            "comparing"
        )
    _preference[0] = preference


def preference() -> Preference:
    """The preference in force."""
    return _preference[0]


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Whether triton is installed; it is looked up, not imported."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Decision:
    """Pick the implementation of `op` for tensors on `device` in `dtype`.

    Raises:
        RuntimeError: ``"triton"`` was asked for where it cannot run.
    """
    blocked = _why_not_triton(device, dtype)
    if _preference[0] == "torch":
        return Decision("torch", "asked for")
    if blocked is None:
        return Decision(
            "triton", "asked for" if _preference[0] == "triton" else f"{op} on {device.type}"
        )
    if _preference[0] == "triton":
        raise RuntimeError(f"{op}: expected a device for Triton, got {blocked}; use kernels='auto'")
    return Decision("torch", blocked)


def architecture(device: torch.device) -> str:
    """Row of `CROSSINGS` for a CUDA or ROCm device; the nearest older one where there is none."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def crossing(architecture: str, shape: Sequence[int]) -> int:
    """Most tokens for which the weight [N, K] is decoded inside the product."""
    N, K = shape
    table = CROSSINGS[architecture]
    if K >= N and N < 8448:
        return table[-1][1]
    return next(tokens for least, tokens in table if least <= N)


def choose_product(
    device: torch.device, dtype: torch.dtype, tokens: int, shape: Sequence[int]
) -> Decision:
    """How x [tokens, K] is multiplied by a packed W [N, K]: ``"fused"`` or ``"dequantize"``."""
    base = choose("nf4_decode", device, dtype)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if not 1 <= tokens <= 64 or shape[1] % 8:
        return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}")
    if dtype.itemsize > 2 and tokens > FLOAT32_TOKENS:
        return Decision("dequantize", f"{tokens} tokens, {dtype}: {_WIDE}")
    chip = architecture(device)
    most = crossing(chip, shape)
    reason = f"{tokens} tokens, crossing {most} on {chip} ({_EVIDENCE})"
    return Decision("fused" if tokens <= most else "dequantize", reason)


def choose_one_pass(device: torch.device, dtype: torch.dtype, rank: int) -> Decision:
    """Whether the gradients of a low rank are taken from one pass over dY."""
    base = choose("rank_gradients", device, dtype)
    if base.backend == "torch":
        return base
    if dtype.itemsize > 2:
        return Decision("torch", f"{dtype}: {_WIDE}")
    most = 16 if torch.version.hip is not None else 32  # above, registers spill or nothing is won
    if rank > most:
        return Decision("torch", f"rank {rank}, one pass up to {most}")
    return Decision("triton", base.reason)


def choose_experts(
    device: torch.device, dtype: torch.dtype, rows: int, experts: int, shape: Sequence[int]
) -> Decision:
    """How rows sorted by expert are multiplied by packed W [experts, N, K]: ``"fused"`` or
    ``"dequantize"``. From the average rows an expert: how they spread is known on the device alone.
    """
    base = choose("nf4_grouped_linear", device, dtype)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if shape[1] % 2 or dtype.itemsize > 2:
        why = f"K = {shape[1]}" if shape[1] % 2 else f"{dtype}: {_WIDE}"
        return Decision("dequantize", why)
    each = rows / experts
    reason = f"{each:.0f} rows an expert, crossing {EXPERT_ROWS} (by arithmetic, not measured)"
    return Decision("fused" if each <= EXPERT_ROWS else "dequantize", reason)


def prefer_groups(preference: bool | None) -> bool | None:
    """Whether layers over one input are computed as one: always where they can be, never, or (None)
    where it is faster. Returns what was in force before.
    """
    before = _groups[0]
    _groups[0] = preference
    return before


def choose_group(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int | None,
    shapes: Sequence[Sequence[int]],
) -> Decision:
    """Whether packed layers [N_i, K] over one x [tokens, K] are computed as one; tokens None before
    a call.
    """
    if _groups[0] is False:
        return Decision("apart", "asked for")
    if _groups[0]:
        return Decision("grouped", "asked for")
    if device.type != "cuda":
        return Decision("apart", f"{device.type}: {GROUPED_ON_CPU}")
    alone = [choose_product(device, dtype, tokens or 1 << 20, shape) for shape in shapes]
    if any(decision.backend == "fused" for decision in alone):
        return Decision("apart", f"{tokens} tokens: each weight is decoded inside its product")
    return Decision("grouped", f"{len(shapes)} layers over one input, one product")


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"{device.type} tensors"
    if not triton_available():
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype}"
    return None
