"""The program `lightning-peft`, or `python -m lightning_peft`, and its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_peft.diagnostics.bench_cli import add_bench
from lightning_peft.diagnostics.cli import add_check
from lightning_peft.hf.cli import add_merge
from lightning_peft.planner.cli import add_plan
from lightning_peft.planner.meta_model import meta_model

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    made = argparse.ArgumentParser(prog="lightning-peft")
    commands = made.add_subparsers(required=True, dest="command")
    add_plan(commands)
    add_merge(commands)
    add_check(commands, meta_model)
    add_bench(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 with one line on what is wrong, or 130 if interrupted."""
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:
        print(": ".join(filter(None, ("interrupted", str(interrupted)))), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
