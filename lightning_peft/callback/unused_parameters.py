"""Adds the likely cause to DDP's error about parameters that got no gradient."""

from __future__ import annotations

__all__ = ["explain_unused_parameters"]

_MARKS = ("find_unused_parameters", "Expected to have finished reduction")
#: Lightning's strategy replaces a text with these words, and what was added with it.
_REPLACED = "Expected to have finished reduction in the prior iteration"
_HINT = (
    "\nPEFT: an adapter, or a trained part outside of the adapted root, did not take part in the "
    "loss on this process. Keep parts that do not reach the loss out of the adapters with "
    "PEFT(root=…) or exclude_modules, freeze trained parts that are not used, or give "
    "strategy=PEFTDDPStrategy(find_unused_parameters=True) or 'ddp_find_unused_parameters_true', "
    "for instance where several optimizers take turns."
)


def explain_unused_parameters(error: BaseException) -> None:
    """Extend the message of DDP's error, in place."""
    text = error.args[0] if isinstance(error, RuntimeError) and error.args else ""
    if isinstance(text, str) and any(m in text for m in _MARKS) and _HINT not in text:
        kept = text.replace(_REPLACED, "Expected to have finished the reduction of the last step")
        error.args = (kept + _HINT, *error.args[1:])
