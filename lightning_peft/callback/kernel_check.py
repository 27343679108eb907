"""The short check of kernels when fit starts on a GPU."""

from __future__ import annotations

import os
import warnings

import torch
from lightning_peft_kernels.dispatch import Backend, triton_available

__all__ = ["check_kernels"]

_SWITCH = "LIGHTNING_PEFT_CHECK"


def check_kernels(device: torch.device, backend: Backend) -> list[str]:
    """Check one configuration per op, once per GPU model and software; return lines to print.

    A kernel that is wrong is not used, and the run goes on. Processes of a machine wait for the one
    that checks. Nothing is checked on a CPU, without Triton, with ``kernels="torch"`` or with
    ``LIGHTNING_PEFT_CHECK=0``.

    Args:
        device: Device of this process.
        backend: Requested backend.
    """
    if device.type != "cuda" or backend == "torch" or os.environ.get(_SWITCH) == "0":
        return []
    if not triton_available():
        return []
    # Only a GPU needs the checks; importing them takes 2 % of this package's import time.
    from lightning_peft.diagnostics.check_runner import ensure_checked

    try:
        found, why = ensure_checked(device)
    except Exception as error:  # whatever the check met, it must not end the run
        warnings.warn(f"kernels are unchecked: {error}", stacklevel=3)
        return []
    bad = [v for v in found.values() if v.outcome not in ("ok", "unchecked")]
    lines = [
        f"kernels: {v.op} ({v.configuration}) is {v.outcome} on {device} and not used: {v.detail}"
        for v in bad
    ]
    untried = [v for v in found.values() if v.outcome == "unchecked"]
    if untried:
        ops = ", ".join(verdict.op for verdict in untried)
        lines.append(
            f"kernels: {ops}: unchecked on {device} and checked again in the next run: "
            f"{untried[0].detail}"
        )
    return [*lines, f"kernels are checked again in the next run: {why}"] if why else lines
