"""Peft's layout of convolutions.

A [R, in, *kernel] reads all channels; B is [out, R/groups, 1 …].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from lightning_peft.hf.layouts.base import MatrixLayout

__all__ = ["ConvLayout"]

#: Axes of tensors that have one value per channel.
_PER_CHANNEL = ("out", "in", "vector")


class ConvLayout(MatrixLayout[_ConvNd]):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: factors have the axes of the kernel."""

    @property
    def kind(self) -> str:
        """``"Conv1d"``, ``"Conv2d"`` or ``"Conv3d"``."""
        return f"Conv{len(self.module.kernel_size)}d"

    @property
    def geometry(self) -> Mapping[str, str]:
        """``"padding_mode"`` and ``"dilation"``, if they are not the usual ones."""
        m, found = self.module, {}
        if m.padding_mode != "zeros":
            mode = m.padding_mode
            found["padding_mode"] = (
                f"peft pads the adapter's input with zeros, the base with {mode!r}"
            )
        if any(d != 1 for d in m.dilation):
            found["dilation"] = (
                f"peft convolves there without dilation, the base has {tuple(m.dilation)}"
            )
        return found

    def config_rank(self, name: str, r: int) -> int:
        """A block of r rows in each group."""
        return self.module.groups * r

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Add the kernel's axes; a rank that all groups share becomes one block per group."""
        m = self.module
        ones = (1,) * len(m.kernel_size)
        if axes == "up":
            return t.reshape(*t.shape, *ones)
        if axes in _PER_CHANNEL:
            return t.reshape(1, -1, *ones)
        if axes != "down":
            return t
        r, per_group = t.shape[0], m.in_channels // m.groups
        block = t.reshape(r, per_group, *m.kernel_size)
        A = block.new_zeros(m.groups, r, m.groups, per_group, *m.kernel_size)
        for g in range(m.groups):
            A[g, :, g] = block
        return A.reshape(m.groups * r, m.in_channels, *m.kernel_size)

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Flatten the kernel's axes; a grouped A must keep to its group."""
        if axes == "down":
            return self._down_from_peft(t)
        if axes == "up" or axes in _PER_CHANNEL:
            return self._channels_from_peft(t, is_vector=axes != "up")
        return t

    def _channels_from_peft(self, t: Tensor, *, is_vector: bool) -> Tensor:
        """Drop kernel axes of length 1."""
        ndim = 2 + len(self.module.kernel_size)
        if t.ndim != ndim or t.shape[2:].numel() != 1 or (is_vector and t.shape[0] != 1):
            raise ValueError(f"expected {ndim} axes, the last of length 1, got {list(t.shape)}")
        return t.reshape(-1) if is_vector else t.flatten(1)

    def _down_from_peft(self, t: Tensor) -> Tensor:
        """[groups · r, in, *kernel] → [r, in/groups · Π kernel]."""
        m = self.module
        k = tuple(m.kernel_size)
        if tuple(t.shape[1:]) != (m.in_channels, *k):
            raise ValueError(
                f"expected shape [r, {m.in_channels}, {', '.join(map(str, k))}], got "
                f"{list(t.shape)}"
            )
        if m.groups == 1:
            return t.flatten(1)
        blocks = t.reshape(m.groups, -1, m.groups, m.in_channels // m.groups, *k)
        own = torch.stack([blocks[g, :, g] for g in range(m.groups)])
        if own.count_nonzero() != t.count_nonzero() or not torch.equal(own, own[:1].expand_as(own)):
            raise ValueError(
                f"expected an A of {m.groups} equal diagonal blocks, one per group, got another "
                "one: no weight of this grouped convolution equals it; exclude the layer"
            )
        return own[0].flatten(1)
