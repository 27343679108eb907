"""A storage from outside the package for layers that arrive quantised, as another library loads
them: a Linear and a stack of experts with floating scales beside integer codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.protocols import Reason
from lightning_peft.storage import QuantizedStorage, register_storage
from lightning_peft.storage.packed import QuantizedWeightSpec
from tests.helpers.routed_experts import SHAPES, RoutedExperts

__all__ = ["ForeignExperts", "ForeignLinear", "ForeignStorage"]


class ForeignLinear(nn.Linear):
    """W = weight / weight_scale_inv of the row. Its own forward gives x no gradient."""

    def __init__(self, width: int, out: int, bias: bool = True) -> None:
        super().__init__(width, out, bias)
        codes, scales = packed(self.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales)  # floating, and with a flag, as FP8Linear's

    def forward(self, x: Tensor) -> Tensor:
        W = unpacked(self.weight, self.weight_scale_inv.detach())
        y: Tensor = F.linear(x.detach(), W.to(x.dtype), self.bias)
        return y


class ForeignExperts(RoutedExperts):
    """Codes and scales per row of each expert. Its own forward gives x no gradient."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            codes, scales = packed(torch.randn(shape) * 0.3)
            setattr(self, name, nn.Parameter(codes, requires_grad=False))
            setattr(self, f"{name}_scale_inv", nn.Parameter(scales))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up, down = (
            unpacked(self.get_parameter(n), self.get_parameter(f"{n}_scale_inv").detach())
            for n in SHAPES
        )
        return self.reference(up, down, x.detach(), index, weights)


def packed(W: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the inverse of the scale of each row."""
    inverse = 127 / W.float().abs().amax(-1).clamp(min=1e-30)
    return (W.float() * inverse.unsqueeze(-1)).round().to(torch.int8), inverse


def unpacked(codes: Tensor, inverse: Tensor) -> Tensor:
    return codes.float() / inverse.unsqueeze(-1)


@register_storage()
class ForeignStorage(QuantizedStorage):
    """Takes both classes over, and reads and writes their own format."""

    label = "toy foreign"

    def matches(self, m: nn.Module) -> bool:
        return isinstance(m, ForeignLinear | ForeignExperts)

    def adopt(self, m: nn.Module) -> None:
        names = ["weight"] if isinstance(m, ForeignLinear) else list(SHAPES)
        for name in names:
            codes, inverse = m.get_parameter(name), m.get_parameter(f"{name}_scale_inv")
            if codes.dtype != torch.int8 or inverse.shape != codes.shape[:-1]:
                raise ValueError(
                    f"{type(m).__name__}.{name}: expected int8 codes with a scale per row, got "
                    f"{codes.dtype} {list(codes.shape)} with scales {list(inverse.shape)}"
                )
        for name in names:
            shape = m.get_parameter(name).shape
            keys = {"codes": name, "scales": f"{name}_scale_inv"}
            spec = QuantizedWeightSpec(
                self.label, shape, False, torch.float32, keys=keys, adopted=True
            )
            self.hold(m, name, spec)

    def encode(self, M: Tensor, spec: QuantizedWeightSpec) -> dict[str, Tensor]:
        codes, inverse = packed(M)
        return {"codes": codes, "scales": inverse}

    def decode(
        self, tensors: Mapping[str, Tensor], spec: QuantizedWeightSpec, dtype: torch.dtype
    ) -> Tensor:
        return unpacked(tensors["codes"], tensors["scales"]).to(dtype)

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        return Reason("its kernel reads whole rows; use strategy='peft_ddp'")
