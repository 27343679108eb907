"""What transformers' MXFP4 kernels leave on a GPU, on a CPU: tensors in a layout of their own.

The layout pads and permutes, as that of Hopper does, so that bytes must really be moved back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HUB"]


class _Strided:
    def __init__(self, shape: Any = None, **options: Any) -> None:
        pass

    def swizzle_data(self, data: Tensor) -> Tensor:
        return data

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data


class _Shuffled(_Strided):
    def __init__(self, shape: Any, mx_axis: int = 1) -> None:
        self.K, self.N = shape[-2:]

    def swizzle_data(self, data: Tensor) -> Tensor:
        padded = F.pad(data, (0, -data.shape[-1] % 64, 0, -data.shape[-2] % 64))
        return padded.flip(-2).roll(3, -1).contiguous()

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data.roll(-3, -1).flip(-2)[..., : self.K, : self.N]


class _Held:
    """A tensor of the kernels; its shape is set by transformers."""

    def __init__(self, data: Tensor, layout: _Strided) -> None:
        self.storage = SimpleNamespace(data=data, layout=layout)
        self.shape = data.shape


def _convert(held: _Held, layout: type[_Strided], **options: Any) -> _Held:
    made = layout(held.storage.data.shape, **options)
    return _Held(made.swizzle_data(held.storage.data), made)


def _precision(weight_scale: Any, flex_ctx: Any) -> Any:
    return SimpleNamespace(weight_scale=weight_scale, flex_ctx=flex_ctx)


_layout = SimpleNamespace(
    StridedLayout=_Strided,
    make_default_matmul_mxfp4_w_layout=lambda mx_axis: (_Shuffled, {"mx_axis": mx_axis}),
)
HUB = SimpleNamespace(
    tensor=SimpleNamespace(
        FP4=torch.uint8,
        convert_layout=_convert,
        wrap_torch_tensor=lambda data, dtype=None: _Held(data, _Strided()),
    ),
    tensor_details=SimpleNamespace(layout=_layout),
    matmul_ogs=SimpleNamespace(
        PrecisionConfig=_precision, FlexCtx=lambda rhs_data: None, InFlexData=lambda: None
    ),
)
