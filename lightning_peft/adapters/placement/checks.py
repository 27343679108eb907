"""Checks that a class swap would take effect; they run before anything is changed."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from lightning_peft.core.names import quoted
from lightning_peft.layers.adapted import is_adapted

__all__ = ["check_swappable"]


def check_swappable(name: str, module: nn.Module) -> None:
    """Raise if a class swap would have no effect on the module, or would do harm.

    Raises:
        ValueError: the module has an attribute ``peft`` of its own, is parametrised, or has an
            instance ``forward``.
    """
    if is_adapted(module):
        return
    if hasattr(module, "peft"):
        raise ValueError(
            f"{quoted(name)}: expected a module without an attribute named 'peft', found "
            f"{type(module.peft).__name__}; rename it, or exclude the module"
        )
    if parametrize.is_parametrized(module):
        parametrized = list(module.get_submodule("parametrizations")._modules)
        raise ValueError(
            f"{quoted(name)}: expected a module that is not parametrised, found {parametrized} "
            "under torch.nn.utils.parametrize; remove the parametrisation first, or exclude the "
            "module"
        )
    forward = vars(module).get("forward")
    if forward is not None and "_old_forward" not in vars(module):
        source = str(getattr(forward, "__module__", type(forward).__module__))
        theirs = source.startswith("compressed_tensors")
        remedy = "undo that patch before attaching"
        if theirs:
            remedy = "load the checkpoint with lightning_peft.load_packed"
        raise ValueError(
            f"{quoted(name)}: expected the class's own forward, found an instance attribute "
            f"'forward' from {source}; it would bypass the adapter: {remedy}"
        )
