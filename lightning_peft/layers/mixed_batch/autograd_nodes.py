"""The current position of autograd: nodes of the graph, and the backward pass that runs."""

from __future__ import annotations

import torch

__all__ = ["current_backward", "current_node", "next_node"]


def next_node() -> int:
    """Return the number of the next node of the graph, in the order of the forward."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def current_backward() -> int:
    """Return the id of the backward pass that runs in this thread; -1 outside."""
    return torch._C._current_graph_task_id()


def current_node() -> int:
    """Return the number of the node that the backward pass is at; -1 outside."""
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()
