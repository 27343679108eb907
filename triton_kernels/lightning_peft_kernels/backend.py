"""The dispatch rule: which implementation runs an op, and why.

One function decides for every op from what it is given (device, dtype, tokens, shape) and the
preference in force. The decision carries its reason, which the preflight report prints.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

__all__ = ["Decision", "Preference", "choose", "prefer", "preference", "triton_available"]

Preference = Literal["auto", "triton", "torch"]

_preference: list[Preference] = ["auto"]


@dataclass(frozen=True)
class Decision:
    """What runs, and why.

    Attributes:
        backend: ``"triton"`` or ``"torch"``.
        reason: One clause for the report.
    """

    backend: Literal["triton", "torch"]
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


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"{device.type} tensors"
    if not triton_available():
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype}"
    return None
