"""The subparsers of the program `lightning-peft`, to which each room adds its commands."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["Commands"]

#: What `ArgumentParser.add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
