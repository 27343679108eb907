"""Prints the report on rank 0 and logs the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_peft_kernels.dispatch import triton_available
from rich.console import Console
from torch import nn

from lightning_peft.core.registry import registry_of
from lightning_peft.methods.registry import to_dict
from lightning_peft.report.summary import Report
from lightning_peft.report.text import report_lines
from lightning_peft.report.tokens import token_lines
from lightning_peft.storage import config_to_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["log_configuration", "print_report", "print_tokens"]


def print_report(report: Report, title: str) -> None:
    """Print the report in the width of the terminal."""
    console = Console()
    lines = [title, *report_lines(report, console.width), *report.kernels[:1]]
    if report.storages:
        lines.append("Lightning's own table counts packed bytes as parameters")
    if torch.cuda.is_available() and not triton_available():
        lines.append("triton is not installed: every op runs as torch code; pip install triton")
    console.print("\n".join(lines), markup=False, highlight=False)


def print_tokens(model: nn.Module) -> None:
    """Print tokens per expert after the first step of a model with experts."""
    lines = token_lines(model)
    if lines:
        Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)


def log_configuration(
    trainer: pl.Trainer, root: nn.Module, names: Sequence[str], report: Report
) -> None:
    """Log adapters, quantisation and parameter counts as one hyper-parameter of plain data."""
    registry = registry_of(root)
    assert registry is not None  # the adapters are attached
    entries = {name: registry.adapters[name] for name in names}
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
