"""Prints the report on rank 0 and logs the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_peft_kernels.dispatch import triton_problem
from rich.console import Console
from torch import nn

from lightning_peft.core.registry import registries_in
from lightning_peft.methods.registry import to_dict
from lightning_peft.report.summary import Report
from lightning_peft.report.text import report_lines, wrapped
from lightning_peft.report.tokens import token_lines
from lightning_peft.storage import config_to_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["log_configuration", "print_report", "print_tokens", "print_unused_layers"]


def print_report(report: Report, title: str) -> None:
    """Print the report in the width of the terminal."""
    console = Console()
    # The layers that share an input are in str(report): nothing that a user can act on.
    kernels = [line for line in report.kernels if line.startswith("kernels: ")]
    lines = [title, *report_lines(report, console.width), *wrapped(kernels, console.width)]
    if report.storages:
        lines.append("Lightning's own table counts packed bytes as parameters")
    if torch.cuda.is_available() and triton_problem():
        lines.append(f"{triton_problem()}; every op runs as torch code: pip install triton")
    console.print("\n".join(lines), markup=False, highlight=False)


def print_tokens(model: nn.Module) -> None:
    """Print tokens per expert after the first step of a model with experts."""
    lines = token_lines(model)
    if lines:
        Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)


def print_unused_layers(names: Sequence[str]) -> None:
    """Print the adapted layers that were not used in the first epoch."""
    if names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        text = f"PEFT: {len(names)} adapted layers were not used in the first epoch: {shown}"
        Console(soft_wrap=True).print(text, markup=False, highlight=False)


def log_configuration(
    trainer: pl.Trainer, root: nn.Module, names: Sequence[str], report: Report
) -> None:
    """Log adapters, quantisation and parameter counts as one hyper-parameter of plain data."""
    registries = [registry for _, _, registry in registries_in(root)]
    held = {name: (entry, r) for r in registries for name, entry in r.adapters.items()}
    entries = {name: held[name][0] for name in names}
    registry = held[names[0]][1]
    saved = [module for entry in entries.values() for module in entry.modules_to_save]
    configuration: dict[str, Any] = {
        "adapters": {name: [to_dict(m) for m in entry.methods] for name, entry in entries.items()},
        "quantization": config_to_dict(registry.quantization),
        "modules_to_save": list(dict.fromkeys(saved)),
        "trainable": report.trainable,
        "total": report.total,
    }
    for logger in trainer.loggers:
        logger.log_hyperparams({f"peft/{'+'.join(names)}": configuration})
