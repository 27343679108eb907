"""Tensor subclasses laid out as torchao's, for tests that run without torchao.

The parts, attributes and class names are those of torchao 0.18. `tests/storage/test_torchao.py`
runs the same checks with the real package where it is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["float8_weight", "int4_weight", "int8_weight"]


class _Wrapper(torch.Tensor):
    """A weight that every op finds dequantised."""

    @staticmethod
    def __new__(cls: Any, parts: dict[str, Tensor], attributes: dict[str, Any]) -> Any:
        qdata = parts["qdata"]
        return torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=attributes["dtype"], device=qdata.device
        )

    def __init__(self, parts: dict[str, Tensor], attributes: dict[str, Any]) -> None:
        self.parts, self.attributes = parts, attributes
        for name, t in parts.items():
            setattr(self, name, t)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.parts), self.attributes

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, attributes: Any, size: Any, stride: Any) -> Any:
        return cls(parts, attributes)

    def dequantize(self) -> Tensor:
        """Return (qdata - zero_point) · scale."""
        scale = self.parts["scale"]
        per = self.parts["qdata"].shape[-1] // scale.shape[-1]
        zero = self.parts.get("zero_point", torch.zeros_like(scale)).float()
        rows = self.parts["qdata"].float() - zero.repeat_interleave(per, -1)
        W: Tensor = rows * scale.repeat_interleave(per, -1)
        return W.to(self.attributes["dtype"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].parts, args[0].attributes)
        plain = [a.dequantize() if isinstance(a, _Wrapper) else a for a in args]
        return func(*plain, **(kwargs or {}))


def _made(name: str) -> Any:
    return type(name, (_Wrapper,), {"__module__": "torchao.quantization"})


_INT8, _FLOAT8, _INT4 = (_made(n) for n in ("Int8Tensor", "Float8Tensor", "Int4Tensor"))


def _parameter(cls: Any, parts: dict[str, Tensor], dtype: torch.dtype, per: int) -> nn.Parameter:
    attributes = {"block_size": [1, per], "dtype": dtype}
    return nn.Parameter(cls(parts, attributes), requires_grad=False)


def int8_weight(W: Tensor, per: int | None = None, zero: int = 0, **parts: Tensor) -> nn.Parameter:
    """One scale per row, or per `per` columns; all zero points are `zero`."""
    groups = W.detach().float().unflatten(-1, (-1, per or W.shape[-1]))
    scale = groups.abs().amax(-1) / (127 - abs(zero))
    qdata = ((groups / scale[..., None]).round() + zero).to(torch.int8).flatten(-2)
    points = torch.full_like(scale, zero, dtype=torch.int8)
    held = {"qdata": qdata, "scale": scale, "zero_point": points, **parts}
    return _parameter(_INT8, held, W.dtype, per or W.shape[-1])


def float8_weight(W: Tensor) -> nn.Parameter:
    """One scale per row."""
    scale = W.detach().float().abs().amax(-1, keepdim=True) / 448
    qdata = (W.detach() / scale).to(torch.float8_e4m3fn)
    return _parameter(_FLOAT8, {"qdata": qdata, "scale": scale}, W.dtype, W.shape[-1])


def int4_weight(W: Tensor) -> nn.Parameter:
    """A tensor class that no storage knows."""
    scale = W.detach().abs().amax(-1, keepdim=True) / 7
    qdata = (W.detach() / scale).round().to(torch.int8)
    return _parameter(_INT4, {"qdata": qdata, "scale": scale}, W.dtype, W.shape[-1])
