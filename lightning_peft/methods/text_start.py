"""What prompts share that start from a text."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["TextStart"]

M = TypeVar("M", bound="TextStart")


class TextStart:
    """Mixin of methods with the start ``"text"`` and token ids for it."""

    @classmethod
    def from_text(cls: type[M], text: str, tokenizer: Any, **fields: Any) -> M:
        """The method started from a text; n is the number of its tokens unless given."""
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
        chosen: dict[str, Any] = {"init": "text", "init_ids": ids, "n": len(ids), **fields}
        return cls(**chosen)
