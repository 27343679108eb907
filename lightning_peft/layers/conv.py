"""Convolutions: weight [out, in/groups, *kernel], canonical [out, in/groups · Π kernel]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.layers.base import MatrixOps

__all__ = ["ConvOps"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvOps(MatrixOps):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with stride, dilation, groups and every padding
    mode.
    """

    # A rotation would act on unfolded columns, so it takes the weight path.
    on_activations = frozenset({"in_scale", "out_scale"})

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical [out, in/groups · Π kernel]."""
        return torch.Size((natural[0], natural[1:].numel()))

    def channels(self, m: Any, name: str, natural: torch.Size) -> int:
        """Input channels, over all groups."""
        channels: int = m.in_channels
        return channels

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Flatten the columns."""
        return W.flatten(1)

    def from_canonical(self, m: Any, name: str, M: Tensor) -> Tensor:
        """Columns back to [in/groups, *kernel]."""
        return M.reshape(M.shape[0], -1, *m.kernel_size)

    def functional(self, m: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's own convolution with another weight."""
        y: Tensor = m._conv_forward(x, W, b)
        return y

    def low_rank(self, m: Any, x: Tensor, A: Tensor, B: Tensor, scaling: Any) -> Tensor:
        """A as a convolution of the layer's own geometry to r channels a group, B as a 1×1
        convolution.
        """
        r, groups, ones = A.shape[0], m.groups, (1,) * len(m.kernel_size)
        down = A.reshape(r, -1, *m.kernel_size).repeat(groups, 1, *ones)
        h = m._conv_forward(x, down, None) * scaling
        up = B.reshape(*B.shape, *ones)
        y: Tensor = _CONV[len(ones)](h, up, None, groups=groups)
        return y

    def scale_in(self, m: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        """Each input channel times its scale."""
        return x * self.per_output(m, scale)

    def scale_in_matrix(self, m: Any, M: Tensor, scale: Tensor) -> Tensor:
        """The columns of a channel, in the rows of its group, times its scale."""
        groups, out = m.groups, M.shape[0]
        per_group = scale.view(groups, 1, -1, 1)
        return (M.reshape(groups, out // groups, per_group.shape[2], -1) * per_group).reshape(
            out, -1
        )

    def per_output(self, m: Any, v: Tensor) -> Tensor:
        """[channels] → [channels, 1, …], which broadcasts with and without a batch axis."""
        return v.view(-1, *(1,) * len(m.kernel_size))

    # ---- exchange: peft's A [R, in, *kernel] reads all channels, B [out, R/groups, 1 …] is grouped
    def hf_refusal(self, m: Any, name: str) -> str:
        """Geometries that peft's A does not share with the base."""
        if m.padding_mode != "zeros":
            return f"peft pads the adapter's input with zeros, the base with {m.padding_mode!r}"
        if any(d != 1 for d in m.dilation):
            return f"peft's A has no dilation, the base has {tuple(m.dilation)}"
        return ""

    def hf_rank(self, m: Any, name: str, r: int) -> int:
        """A block of r rows in each group."""
        rank: int = m.groups * r
        return rank

    def hf_pack(self, m: Any, name: str, layout: str, t: Tensor) -> Tensor:
        """Natural axes; a rank that all groups share becomes a block of its own in each of them."""
        ones = (1,) * len(m.kernel_size)
        if layout == "up":
            return t.reshape(*t.shape, *ones)
        if layout in ("out", "in", "vector"):
            return t.reshape(1, -1, *ones)
        if layout != "down":
            return t
        r, per_group = t.shape[0], m.in_channels // m.groups
        block = t.reshape(r, per_group, *m.kernel_size)
        A = block.new_zeros(m.groups, r, m.groups, per_group, *m.kernel_size)
        for g in range(m.groups):
            A[g, :, g] = block
        return A.reshape(m.groups * r, m.in_channels, *m.kernel_size)

    def hf_unpack(self, m: Any, name: str, layout: str, t: Tensor) -> Tensor:
        """Canonical axes; across groups only where the file's A keeps to its group."""
        k = tuple(m.kernel_size)
        if layout in ("out", "in", "vector", "up"):
            vector = layout != "up"
            if t.ndim != 2 + len(k) or t.shape[2:].numel() != 1 or (vector and t.shape[0] != 1):
                raise ValueError(
                    f"expected {2 + len(k)} axes, the last of length 1, got {list(t.shape)}"
                )
            return t.reshape(-1) if vector else t.flatten(1)
        if layout != "down":
            return t
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
                f"expected an A that keeps to each of the {m.groups} groups alike, got one that "
                "mixes channels: no weight of this grouped convolution equals it; exclude the "
                "layer"
            )
        return own[0].flatten(1)
