"""Key-value caches among the arguments of a block that runs twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["without_caches"]


def without_caches(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments without caches that are still empty.

    A block writes its keys and values into a cache: a second run would write them again, and the
    cache would keep them on the device. A cache that is only read, such as that of a prefix, stays.

    Raises:
        ValueError: a cache that holds positions and grows.
    """
    flags = {"use_cache": False} if kwargs.get("use_cache") else {}
    return (
        tuple(None if _is_dropped(value) else value for value in args),
        {**{k: None if _is_dropped(v) else v for k, v in kwargs.items()}, **flags},
    )


def _is_dropped(value: object) -> bool:
    length = getattr(value, "get_seq_length", None)
    if length is None:
        return False
    own = getattr(value, "self_attention_cache", value)  # of an encoder-decoder
    if getattr(own, "is_read_only", False):
        return False
    held = int(length())
    if held:
        raise ValueError(
            f"activations: expected a block without a growing cache, got {type(value).__name__} "
            f"with {held} positions, to which the second run of a block would add its own again; "
            "put the model into train mode (a trained prefix is then read only), give "
            "use_cache=False, or leave activations out"
        )
    return True
