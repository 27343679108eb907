"""Counts Python calls, as budgets of host time that do not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["own_calls"]

_PACKAGES = ("/lightning_peft/", "/lightning_peft_kernels/")


def own_calls(run: Callable[[], object]) -> list[str]:
    """Names of the functions of our packages that one run calls, in order."""
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and any(part in code.co_filename for part in _PACKAGES):
            found.append(code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found
