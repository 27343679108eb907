"""Prints the report as a table on rank 0 and logs the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft_kernels.dispatch import triton_available
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.methods.base import Method
from lightning_peft.methods.registry import to_dict
from lightning_peft.report.summary import Report
from lightning_peft.report.tokens import token_lines
from lightning_peft.storage import StorageConfig, config_to_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["log_configuration", "print_report", "print_tokens"]


def print_report(report: Report, title: str) -> None:
    """Print adapted layers, their cost, and skipped layers with the reason."""
    table = Table(title=title, title_justify="left")
    for column in ("layers", "count", "method", "shape", "trained", "storage", "kernel"):
        table.add_column(column, justify="right" if column in ("count", "trained") else "left")
    for g in report.groups:
        row = (g.layers, f"{g.count}", g.method, g.shape, f"{g.trainable:,}", g.storage, g.fused)
        table.add_row(*row)
    console = Console()
    console.print(table)
    parts = ", ".join(f"{part} {n / 1e6:,.2f} MB" for part, n in report.nbytes.items())
    share = f"{report.trainable:,} of {report.total:,} = {report.percent:.3f} %"
    lines = [f"trained {share}; {parts}"]
    lines += _grouped("left out", report.skipped) + _grouped("stays dense", report.dense)
    lines += [f"tied: {' = '.join(names)}" for names in report.tied]
    if report.eval_modules:
        lines.append(
            f"{report.eval_modules} modules are in eval mode: no dropout there, and no activation "
            "checkpointing in Hugging Face models; call .train() on them if that is not meant"
        )
    if not triton_available():
        lines.append("triton is not installed: every op runs as torch code")
    console.print("\n".join([*lines, *report.notes]), markup=False, highlight=False)


def print_tokens(model: nn.Module) -> None:
    """Print tokens per expert after the first step of a model with experts."""
    lines = token_lines(model)
    if lines:
        Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)


def _grouped(what: str, reasons: Sequence[tuple[str, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons:
        by_reason.setdefault(why, []).append(name)
    return [
        f"{what}, {why}: {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for why, names in by_reason.items()
    ]


def log_configuration(
    trainer: pl.Trainer,
    adapters: Mapping[str, Sequence[Method]],
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str],
    report: Report,
) -> None:
    """Log adapters, quantisation and parameter counts as one hyper-parameter of plain data."""
    configuration: dict[str, Any] = {
        "adapters": {name: [to_dict(m) for m in methods] for name, methods in adapters.items()},
        "quantization": config_to_dict(quantization),
        "modules_to_save": list(modules_to_save),
        "trainable": report.trainable,
        "total": report.total,
    }
    for logger in trainer.loggers:
        logger.log_hyperparams({f"peft/{'+'.join(adapters)}": configuration})
