"""Names that look like one that was not found, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["nearest_names"]


def nearest_names(wanted: str, names: Sequence[str], n: int = 5) -> list[str]:
    """Names that look most like `wanted`, by their whole and by their last part."""
    leaves = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(wanted, list(names), n, 0.4)
    close += [leaves[m] for m in difflib.get_close_matches(wanted, list(leaves), n, 0.4)]
    return list(dict.fromkeys(close))[:n] or list(names)[:n]
