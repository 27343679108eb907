"""The check of a method, or a list of them, where a call takes one."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.core.value_types import shown
from lightning_peft.methods.base import Method

__all__ = ["require_methods"]


def require_methods(given: object, call: str) -> None:
    """Raise TypeError unless `given` is a method or a sequence of methods.

    Args:
        given: The argument.
        call: The call that takes it, with braces in its place: ``"PEFT({})"``.
    """
    what = call.partition("(")[0]
    each = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for method in each:
        if isinstance(method, Method):
            continue
        if isinstance(method, type) and issubclass(method, Method):
            got, form = f"the class {method.__name__}", call.format(f"{method.__name__}()")
        else:
            got, form = shown(method), call.format("LoRA(r=8)")
        raise TypeError(f"{what}: expected a method such as LoRA(r=8), got {got}; write {form}")
