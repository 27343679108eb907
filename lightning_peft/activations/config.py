"""The choice of what a step keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

__all__ = ["ActivationKind", "Activations", "as_activations"]

ActivationKind = Literal["checkpoint", "offload", "checkpoint+offload"]
_KINDS = get_args(ActivationKind)


@dataclass(frozen=True)
class Activations:
    """How a training step stores the activations of a model's blocks until backward.

    Attributes:
        kind: ``"checkpoint"`` keeps the input of each block and runs the block again in backward
            (Chen et al. 2016, arXiv 1604.06174). ``"offload"`` moves what a block saves to host
            memory. ``"checkpoint+offload"`` moves the inputs of the blocks to host memory.
        blocks: Class names, module names or their suffixes. By default, the layers that the Hugging
            Face model checkpoints, its no-split list, or the lists of equal blocks.
        min_bytes: Size of the smallest tensor that is moved, in bytes.

    Raises:
        TypeError: `blocks` is a string, or not a list of strings.
        ValueError: an unknown kind, no blocks, or a negative size.
    """

    kind: ActivationKind = "checkpoint"
    blocks: Sequence[str] | None = None
    min_bytes: int = 2**16

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in _KINDS:
            raise ValueError(f"Activations.kind: expected one of {_KINDS}, got {self.kind!r}")
        if self.blocks is not None:
            named = isinstance(self.blocks, Sequence) and not isinstance(self.blocks, str)
            if not named or not all(isinstance(block, str) for block in self.blocks):
                raise TypeError(
                    "Activations.blocks: expected a list of class names or module names, got "
                    f"{self.blocks!r}; write ['LlamaDecoderLayer'] or leave it out"
                )
            if not self.blocks:
                raise ValueError(
                    "Activations.blocks: expected names, got an empty list; leave it out, or give "
                    "activations=None"
                )
        if not isinstance(self.min_bytes, int) or self.min_bytes < 0:
            raise ValueError(
                f"Activations.min_bytes: expected a whole number >= 0, got {self.min_bytes!r}"
            )

    @property
    def recomputes(self) -> bool:
        """Whether blocks run again in backward."""
        return "checkpoint" in self.kind

    @property
    def offloads(self) -> bool:
        """Whether tensors are moved to host memory."""
        return "offload" in self.kind


def as_activations(given: Activations | str | None) -> Activations | None:
    """Return the configuration of a kind; a configuration and None as they are.

    Raises:
        TypeError: neither a kind nor a configuration.
        ValueError: an unknown kind.
    """
    if given is None or isinstance(given, Activations):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"activations: expected one of {_KINDS}, Activations(...) or None, got {given!r}"
        )
    if given not in _KINDS:
        raise ValueError(f"activations: expected one of {_KINDS} or None, got {given!r}")
    return Activations(cast("ActivationKind", given))
