"""Peft's layout of a module whose weights it adapts as parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_peft.hf.layouts.base import MatrixLayout

__all__ = ["NestedLayout"]


class NestedLayout(MatrixLayout[nn.Module]):
    """Parameters of a module that is no layer for peft: it nests one wrapper per parameter."""

    def is_target_parameter(self, name: str) -> bool:
        """Always: peft adapts the parameter, not the module."""
        return True

    def nested_paths(self, adapted: Sequence[str]) -> dict[str, str]:
        """The wrapper of the first parameter that the module defines is innermost.

        A path does not say which parameter it is; the order of definition does.
        """
        inside_out = [n for n in self.ops.parameters(self.module) if n in adapted]
        depth = len(inside_out) - 1
        return {n: ".".join(["base_layer"] * (depth - i)) for i, n in enumerate(inside_out)}
