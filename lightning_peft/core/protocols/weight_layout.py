"""What a kind of layer says of the weights that a storage may quantise."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.core.class_swap import PackedForward

__all__ = ["WeightLayout"]


@dataclass(frozen=True)
class WeightLayout:
    """The weights of a layer that a storage may quantise, described by its kind of layer.

    Attributes:
        names: Names of the weights, each [out, in] or a stack of experts [E, out, in].
        transposed: Whether the weights are [*batch, in, out].
        forward: Mixin that computes the layer from weights that a storage holds.
        foreign_forward: Mixin for a layer of another library, whose own forward is replaced.
    """

    names: tuple[str, ...]
    transposed: bool
    forward: type[PackedForward]
    foreign_forward: type[PackedForward]
