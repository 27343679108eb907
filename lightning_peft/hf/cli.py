"""The command `lightning-peft merge`."""

from __future__ import annotations

import argparse

from lightning_peft.core.commands import Commands
from lightning_peft.hf.export import export_merged

__all__ = ["add_merge"]


def add_merge(commands: Commands) -> None:
    """Add the command to the program's subparsers."""
    merge = commands.add_parser(
        "merge", help="merge an adapter directory into a model directory, weight by weight"
    )
    merge.set_defaults(run=_run)
    merge.add_argument("--base", required=True, help="directory or hub id of the model")
    merge.add_argument("--adapter", required=True, help="directory or hub id of the adapter")
    merge.add_argument("--out", required=True, help="directory to write, absent or empty")
    merge.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32 or base")
    merge.add_argument("--shard-size", default="5GB", help="most bytes per file")
    merge.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="weights that the adapter was trained on (quantised), or those of the base",
    )
    merge.add_argument("--quantization", help="nf4, fp4 or int8, if the adapter does not say so")


def _run(given: argparse.Namespace) -> None:
    report = export_merged(
        given.adapter,
        given.base,
        given.out,
        None if given.dtype == "base" else given.dtype,
        given.shard_size,
        onto=given.onto,
        quantization=given.quantization,
    )
    print(report)
