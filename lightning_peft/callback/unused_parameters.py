"""Adds the likely cause to DDP's error about parameters that got no gradient."""

from __future__ import annotations

__all__ = ["explain_unused_parameters"]

_MARKS = ("find_unused_parameters", "Expected to have finished reduction")
_HINT = (
    "\nPEFT: an adapter, or a trained part outside of the adapted root, did not take part in the "
    "loss on this process. Keep parts that do not reach the loss out of the adapters with "
    "PEFT(root=…) or exclude_modules, freeze trained parts that are not used, or give "
    "DDPStrategy(find_unused_parameters=True)."
)


def explain_unused_parameters(error: BaseException) -> None:
    """Extend the message of DDP's error, in place."""
    text = error.args[0] if isinstance(error, RuntimeError) and error.args else ""
    if isinstance(text, str) and any(m in text for m in _MARKS) and _HINT not in text:
        error.args = (text + _HINT, *error.args[1:])
