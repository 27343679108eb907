"""The command `lightning-peft plan`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Literal, get_args

from lightning_peft.activations.config import ActivationKind
from lightning_peft.core.commands import Commands
from lightning_peft.methods.base import Method
from lightning_peft.methods.registry import METHODS
from lightning_peft.planner.byte_sizes import size
from lightning_peft.planner.estimate import estimate_memory
from lightning_peft.storage import Quantization

__all__ = ["add_plan"]


def add_plan(commands: Commands) -> None:
    """Add the command to the program's subparsers."""
    plan = commands.add_parser(
        "plan", help="memory of a fine-tuning run, before anything is loaded"
    )
    plan.set_defaults(run=_run)
    plan.add_argument("model", help="config.json, the directory of a model, or a cached hub id")
    plan.add_argument("--method", default="lora", help="full, lora, dora, ia3 …")
    plan.add_argument("--r", type=int, help="rank, where the method has one")
    plan.add_argument("--target-modules", nargs="+", help="names, or all-linear")
    plan.add_argument("--quantization", choices=("nf4", "fp4", "int8"))
    plan.add_argument("--no-double-quant", action="store_true")
    plan.add_argument("--optimizer")
    plan.add_argument("--precision", default="bf16")
    plan.add_argument("--batch-size", type=int, default=1)
    plan.add_argument(
        "--sequence-length", type=int, help="default: 512, or the most the model takes"
    )
    plan.add_argument("--checkpointing", action="store_true")
    plan.add_argument("--activations", choices=get_args(ActivationKind))
    plan.add_argument("--loss", choices=("chunked",))
    plan.add_argument("--strategy", help="ddp or fsdp")
    plan.add_argument("--world-size", type=int, default=1)
    plan.add_argument(
        "--no-reshard-after-forward", action="store_true", help="fsdp keeps blocks gathered"
    )
    plan.add_argument("--cpu-offload", action="store_true", help="fsdp keeps shards on the host")
    plan.add_argument("--replicas", type=int, default=1, help="groups that each hold all shards")
    plan.add_argument("--context-parallel", type=int, default=1, help="ranks that share a sample")
    plan.add_argument(
        "--allowances", action="store_true", help="count CUDA's context and NCCL's buffers"
    )
    plan.add_argument("--liger", action="store_true")
    plan.add_argument("--memory", help="what a rank has, for instance 24GB or 22.5GiB")


def _run(given: argparse.Namespace) -> None:
    quantization = None
    if given.quantization is not None:
        quantization = Quantization(given.quantization, double_quant=not given.no_double_quant)
    plan = estimate_memory(
        given.model,
        _method(given),
        quantization=quantization,
        optimizer=given.optimizer,
        precision=given.precision,
        batch_size=given.batch_size,
        sequence_length=given.sequence_length,
        checkpointing=given.checkpointing,
        activations=given.activations,
        loss=given.loss,
        reshard_after_forward=not given.no_reshard_after_forward,
        cpu_offload=given.cpu_offload,
        replicas=given.replicas,
        context_parallel=given.context_parallel,
        allowances=given.allowances,
        strategy=given.strategy,
        world_size=given.world_size,
        liger=given.liger,
        memory=given.memory,
    )
    print(plan)
    if plan.budget is not None:
        batch = plan.largest_batch(plan.budget)
        print(f"largest batch in {size(plan.budget)}: {batch}")


def _method(given: argparse.Namespace) -> Method | Literal["full"]:
    name = given.method.lower()
    if name == "full":
        return "full"
    if name == "qlora":
        given.quantization, name = given.quantization or "nf4", "lora"
    known: dict[str, Any] = {cls.__name__.lower(): cls for cls in METHODS.values()}
    if name not in known:
        raise ValueError(f"--method: expected full or one of {sorted(known)}, got {given.method!r}")
    fields = {f.name for f in dataclasses.fields(known[name])}
    options: dict[str, Any] = {}
    if given.r is not None:
        if "r" not in fields:
            raise ValueError(f"--r: expected a method with a rank, got {given.method!r}; leave it")
        options["r"] = given.r
    if given.target_modules is not None:
        names = given.target_modules
        options["target_modules"] = names[0] if names == ["all-linear"] else names
    method: Method = known[name](**options)
    return method
