"""Defines the ops of the ``lightning_peft`` namespace in `torch.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define_backward", "define_op"]

_LIBRARY = torch.library.Library("lightning_peft", "FRAGMENT")


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    default: Callable[..., Any],
) -> None:
    """Define one op: its schema, its shape rule and its implementation.

    An op whose implementation differs by backend takes ``str backend="auto"`` as its last argument;
    torch leaves it out of the call if it has this value, so the implementation repeats the default.
    Callers pass the requested backend, so that a backward in another thread or in a compiled graph
    uses it too.

    Args:
        schema: Name, arguments and results in torch's schema language.
        fake: Computes shapes and dtypes of the results, for meta and fake tensors.
        default: Implementation for every device. It selects between Triton, torch and the CPU's.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    # As `register_fake`, without its reading of source files, which is most of an import's time.
    _LIBRARY.impl(name, fake, "Meta")


def define_backward(
    name: str,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register the backward of a defined op.

    Args:
        name: Name of the op.
        setup_context: Saves what `backward` needs: ``(ctx, inputs, output)``.
        backward: Computes the gradients: ``(ctx, dY)``.
    """
    torch.library.register_autograd(
        f"lightning_peft::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
