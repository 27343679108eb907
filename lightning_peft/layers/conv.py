"""Convolutions: weight [out, in/groups, *kernel], canonical [out, in/groups · Π kernel]."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lightning_peft.core.pruning_masks import held
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.example_inputs import is_comparable, random_inputs

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

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """One sample, as large as the kernel's reach and two more."""
        conv = _conv(m)
        if not is_comparable(m):
            return None
        reach = [d * (k - 1) + 3 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return random_inputs(m, held(m, "weight").dtype, (1, conv.in_channels, *reach))

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Input channels, over all groups."""
        return _conv(m).in_channels

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Flatten the columns."""
        return W.flatten(1)

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Columns back to [in/groups, *kernel]."""
        return M.reshape(M.shape[0], -1, *_conv(m).kernel_size)

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's own convolution with another weight."""
        return _conv(m)._conv_forward(x, W, b)

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """A as a convolution of the layer's own geometry to r channels a group, B as a 1×1
        convolution.
        """
        conv = _conv(m)
        r, groups, ones = A.shape[0], conv.groups, (1,) * len(conv.kernel_size)
        down = A.reshape(r, -1, *conv.kernel_size).repeat(groups, 1, *ones)
        h = conv._conv_forward(x, down, None) * scaling
        up = B.reshape(*B.shape, *ones)
        y: Tensor = _CONV[len(ones)](h, up, None, groups=groups)
        return y

    def scale_in(self, m: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        """Each input channel times its scale."""
        return x * self.per_output(m, scale)

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """The columns of a channel, in the rows of its group, times its scale."""
        groups, out = _conv(m).groups, M.shape[0]
        per_group = scale.view(groups, 1, -1, 1)
        return (M.reshape(groups, out // groups, per_group.shape[2], -1) * per_group).reshape(
            out, -1
        )

    def per_output(self, m: nn.Module, v: Tensor) -> Tensor:
        """[channels] → [channels, 1, …], which broadcasts with and without a batch axis."""
        return v.view(-1, *(1,) * len(_conv(m).kernel_size))


def _conv(m: nn.Module) -> _ConvNd:
    """The module as the convolution it is: ops are found by class."""
    return cast(_ConvNd, m)
