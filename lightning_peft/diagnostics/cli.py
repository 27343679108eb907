"""The command `lightning-peft check`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning_peft_kernels.dispatch import triton_available
from lightning_peft_kernels.verdicts import Verdict, device_key, file_of

from lightning_peft.diagnostics.check_runner import OPS, check_device

__all__ = ["add_check"]


def add_check(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    check = commands.add_parser(
        "check", help="every kernel against a reference, on this machine's GPU"
    )
    check.set_defaults(run=_run)
    check.add_argument("--device", help="cuda:0 …; default: the current one, else the interpreter")
    check.add_argument("--short", action="store_true", help="one configuration per op")
    check.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help="some ops")
    check.add_argument("--shape", nargs=3, type=int, metavar=("N", "K", "TOKENS"))


def _run(given: argparse.Namespace) -> None:
    if not triton_available():
        raise RuntimeError(
            "check: expected triton, which runs the kernels, got none; every op runs as torch "
            "code. Install triton"
        )
    device = _device(given.device)
    if device.type == "cpu":
        print("no CUDA device: Triton's interpreter runs the kernels in fp32 and fp16 on the CPU")
    key = device_key(device)
    print(", ".join(f"{name} {value}" for name, value in key.items() if value))
    found, why = check_device(
        device,
        short=given.short,
        ops=given.ops,
        shape=None if given.shape is None else tuple(given.shape),
        told=_tell,
    )
    bad = [verdict for verdict in found.values() if verdict.outcome != "ok"]
    print(f"{len(found)} kernels checked, {len(bad)} will not be used; {why or file_of(key)}")
    if bad:
        raise RuntimeError(
            f"check: expected every kernel to be right on {key['device']}, got "
            f"{', '.join(f'{v.op} ({v.configuration})' for v in bad)}; torch computes them"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"check: expected a device of this machine, got {name}: no CUDA device")
    return device


def _tell(verdict: Verdict) -> None:
    time = f"{verdict.microseconds:9,.0f} us" if verdict.microseconds else ""
    name = f"{verdict.op} ({verdict.configuration})"
    print(f"{name:<56} {verdict.outcome:<8}{time} {verdict.detail}", flush=True)
