"""The command `lightning-peft check`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from lightning_peft_kernels.dispatch import triton_available, triton_problem
from lightning_peft_kernels.races import Race
from lightning_peft_kernels.verdicts import Verdict, device_key, file_of
from torch import nn

from lightning_peft.core.commands import Commands
from lightning_peft.diagnostics.check_runner import OPS, check_device, plain_device
from lightning_peft.diagnostics.model_shapes import LLAMA_8B, ModelShapes, shapes_of
from lightning_peft.diagnostics.race_runner import tune_device

__all__ = ["add_check", "device_named"]

_TOKENS = 100  # of a check: several tiles and a remainder


def add_check(commands: Commands, build: Callable[[str], nn.Module]) -> None:
    """Add the command to the program's subparsers.

    Args:
        commands: The subparsers.
        build: Returns the model of a configuration on the meta device.
    """
    check = commands.add_parser(
        "check", help="every kernel against a reference, on this machine's GPU"
    )
    check.set_defaults(run=partial(_run, build=build))
    check.add_argument("--device", help="cuda:0 …; default: the current one, else the interpreter")
    check.add_argument("--short", action="store_true", help="one configuration per op")
    check.add_argument(
        "--ops", nargs="+", choices=OPS, default=OPS, metavar="OP",
        help=f"some of {', '.join(OPS)} (default: all)",
    )  # fmt: skip
    check.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="ops checked at a time (default: 1); most of a check is compiling",
    )  # fmt: skip
    check.add_argument(
        "--shape", nargs=3, type=int, metavar=("N", "K", "TOKENS"),
        help="sizes of the products: weight N x K, TOKENS rows of x; default: small ones",
    )  # fmt: skip
    check.add_argument(
        "--model", help="config.json, its directory, or a hub id in the cache: check its shapes"
    )
    check.add_argument(
        "--tune", action="store_true",
        help="then race the ways to compute each product, and use the fastest from now on",
    )  # fmt: skip


def _run(given: argparse.Namespace, build: Callable[[str], nn.Module]) -> None:
    if given.jobs < 1:
        raise ValueError(f"check: expected --jobs of at least 1, got {given.jobs}")
    if given.shape is not None and (min(given.shape) < 1 or given.shape[1] % 64):
        raise ValueError(
            f"check: expected --shape N K TOKENS of at least 1 with K a multiple of 64, got "
            f"{' '.join(map(str, given.shape))}"
        )
    device = device_named(given.device, "check")
    shapes = LLAMA_8B if given.model is None else shapes_of(build(given.model))
    if triton_available():
        _check(given, device, shapes)
    elif "cannot be imported" in triton_problem():
        raise RuntimeError(f"check: {triton_problem()}; nothing was checked. Reinstall triton")
    elif not given.tune:
        raise RuntimeError(
            "check: expected triton, which runs the kernels, got none; every op runs as torch "
            "code. Install triton"
        )
    else:
        print("kernels not checked: no triton")
    if given.tune:
        _tune(device, shapes if given.shape is None else ModelShapes((tuple(given.shape[:2]),)))


def _check(given: argparse.Namespace, device: torch.device, model: ModelShapes) -> None:
    if device.type == "cpu":
        print("no CUDA device: Triton's interpreter runs the kernels in fp32 and fp16 on the CPU")
        if given.model is not None:
            print("shapes of --model are not checked: the interpreter is too slow for them")
    key = device_key(device)
    print(", ".join(f"{name} {value}" for name, value in key.items() if value))
    shapes = [] if given.shape is None else [tuple(given.shape)]
    if given.model is not None and device.type == "cuda":
        shapes += model.for_checks(_TOKENS)
    try:
        found, why = check_device(
            device, short=given.short, ops=given.ops, shapes=shapes, told=_tell_verdict,
            jobs=given.jobs,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"the verdicts above are kept in {file_of(key)}"
        raise KeyboardInterrupt(kept) from None
    untried = [verdict for verdict in found.values() if verdict.outcome == "unchecked"]
    bad = [verdict for verdict in found.values() if verdict.outcome not in ("ok", "unchecked")]
    print(
        f"{len(found) - len(untried)} kernels checked, {len(bad)} will not be used; "
        f"{why or file_of(key)}"
    )
    if bad:
        raise RuntimeError(
            f"check: expected every kernel to be right on {key['device']}, got "
            f"{', '.join(f'{v.op} ({v.configuration})' for v in bad)}; torch computes them"
        )
    if untried:
        raise RuntimeError(
            f"check: expected memory and a compiler for every kernel, got {len(untried)} unchecked "
            f"({untried[0].op}: {untried[0].detail}); nothing is stored for them. Try again"
        )


def _tune(device: torch.device, shapes: ModelShapes) -> None:
    if device.type == "cpu":
        print("no CUDA device: races on the CPU are those of few tokens without gradients, in bf16")
    tokens, repeats = (256, 15) if device.type == "cuda" else (64, 5)
    found, why = tune_device(device, shapes, tokens=tokens, repeats=repeats, told=_tell_race)
    if not found:
        print("nothing to race: this device has one way for each product")
        return
    stored = why or file_of(device_key(device), "races")
    print(f"{len(found)} races; selections follow them from now on; {stored}")


def device_named(name: str | None, command: str) -> torch.device:
    """Return the device of a name: by default the current one, without CUDA the CPU.

    Args:
        name: Value of ``--device``.
        command: Name of the command, for errors.

    Raises:
        ValueError: The name is neither ``cpu`` nor a CUDA device.
        RuntimeError: The device is not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device(f"cuda:{torch.cuda.current_device()}" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # its message lists every backend of torch
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"{command}: expected --device cuda, cuda:0 … or cpu, got {name}; kernels run on CUDA "
            "devices"
        )
    if device.type == "cuda" and (device.index or 0) >= there:
        found = f"{there} CUDA devices" if there else "no CUDA device"
        raise RuntimeError(
            f"{command}: expected a device of this machine, got {name}: {found}; leave --device out"
        )
    return plain_device(device)


def _tell_verdict(verdict: Verdict) -> None:
    time = f"{verdict.microseconds:9,.0f} us" if verdict.microseconds else ""
    name = f"{verdict.op} ({verdict.configuration})"
    print(f"{name:<56} {verdict.outcome:<8}{time} {verdict.detail}", flush=True)


def _tell_race(race: Race) -> None:
    shape = " x ".join(f"{size:,}" for size in race.shape)
    times = ", ".join(f"{way} {time:,.0f} us" for way, time in race.microseconds.items())
    until = f"up to {race.tokens} tokens" if race.tokens < 1 << 20 else "beyond"
    print(f"{race.question:<14} {shape:<28} {until:<18} {race.winner:<12} {times}", flush=True)
