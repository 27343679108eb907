"""Adapters that no process reached between two steps: they are left out of the step, as one process
would leave them out.

FSDP2 reduces a zero gradient for what was not used. An optimizer takes zero for a gradient: it
would decay the weight and the moments of an expert that saw no token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_peft.layers.adapted import adapted_modules

__all__ = ["UsageTracker"]


class UsageTracker:
    """Notes which adapted layers ran since the last step of their optimizer.

    Attributes:
        layers: The adapted layers.
        ran: Whether each ran here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [m for _, m in adapted_modules(module)]
        self.ran = [False] * len(self.layers)
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda *_, i=i: self._note(i))

    def _note(self, i: int) -> None:
        self.ran[i] = self.ran[i] or torch.is_grad_enabled()

    def leave_out(self, optimizer: Optimizer, device: torch.device) -> None:
        """Set the gradients of layers that ran on no rank to None, and reset the record of this
        optimizer."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [
            (i, [p for p in layer.peft.parameters() if id(p) in owned])
            for i, layer in enumerate(self.layers)
        ]
        mine = [(i, parameters) for i, parameters in mine if parameters]
        flags = torch.tensor([float(self.ran[i]) for i, _ in mine], device=device)
        if dist.is_initialized() and len(flags):
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        for (i, parameters), ran in zip(mine, flags.tolist(), strict=True):
            self.ran[i] = False
            if not ran:
                for p in parameters:
                    p.grad = None
