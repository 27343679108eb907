"""Base of all methods: a name, an exchange table, and the modules that they target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_peft.methods.exchange import HFFormat
from lightning_peft.methods.limits import Limit, check_limits

__all__ = ["Method", "Targeted"]


class Method:
    """Common to all methods. No dataclass itself: command-line parsers take subclasses of ordinary
    classes only.
    """

    hf: ClassVar[HFFormat | None] = None
    mergeable: ClassVar[bool] = True

    #: Row of the architectures' table that `target_modules=None` means.
    default_targets: ClassVar[str] = "lora"

    #: Argument → the rule for its value, beside those of the classes it derives from.
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        """Check the values."""
        check_limits(self)

    @property
    def label(self) -> str:
        """The name that reports and errors use."""
        return type(self).__name__


@dataclass(frozen=True)
class Targeted(Method):
    """Which modules.

    Attributes:
        target_modules: ``"all-linear"`` (without the output head), suffixes, a part of a
            vision-language model (``"language"``, ``"vision"``, ``"language+vision"``), or a
            regular expression of full names; None means the architecture's usual choice.
        exclude_modules: Suffixes, a part, or a regular expression.
        layers_to_transform: Numbers of the blocks; None means all.
        layers_pattern: Names of the lists of blocks that the numbers count in, as ``"layers"``;
            None means the outermost lists.
    """

    target_modules: str | list[str] | None = field(default=None, kw_only=True)
    exclude_modules: str | list[str] | None = field(default=None, kw_only=True)
    layers_to_transform: int | list[int] | None = field(default=None, kw_only=True)
    layers_pattern: str | list[str] | None = field(default=None, kw_only=True)
