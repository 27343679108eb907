"""`Linear8bitLt` of bitsandbytes, found in a model or made by `Quantization("int8")`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import parameter_at
from lightning_peft.core.protocols import Reason, StoredTensor, WeightLayout
from lightning_peft.storage.bitsandbytes.base import BnbStorage, hold_dense
from lightning_peft.storage.bitsandbytes.layers import EIGHT_BIT, linear8bit
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.registry import register_storage

__all__ = ["Bnb8bitStorage", "to_int8"]


@register_storage(Quantization)
class Bnb8bitStorage(BnbStorage):
    """`bitsandbytes.nn.Linear8bitLt`: int8 rows with one scale each, W = CB · SCB / 127."""

    label = "int8"
    classes = EIGHT_BIT
    quantizes_meta = False  # bitsandbytes quantises values

    def iter_tensors(self, m: nn.Module, name: str) -> Iterator[StoredTensor]:
        """The int8 parameter and its row scales."""
        weight = linear8bit(m).weight
        yield StoredTensor(name, "codes", weight)
        if weight.dtype == torch.int8:
            yield StoredTensor(None, "scales", _scale(m))

    def accepts(self, config: Quantization) -> bool:
        """`Quantization("int8")`."""
        return config.kind == "int8"

    def require_available(self) -> None:
        """Raise without bitsandbytes."""
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                "quantization='int8': expected bitsandbytes, found none; pip install bitsandbytes, "
                "or use 'nf4', which needs nothing"
            )

    def bits_per_weight(self, shape: torch.Size, config: Quantization) -> float:
        """8 bits, and an fp32 scale per row."""
        return 8.0 + 32.0 / shape[-1]

    def dense_reason(self, m: nn.Module, layout: WeightLayout, config: Quantization) -> str:
        """Linear8bitLt stands for `nn.Linear` alone."""
        if parameter_at(m, layout.names[0]).ndim > 2:
            raise ValueError(
                "expected linear layers for kind='int8', got fused experts, which hold most of the "
                "weights; use kind='nf4', or name them in exclude_modules to leave them dense"
            )
        return "bitsandbytes' int8 needs an nn.Linear; use nf4" if layout.transposed else ""

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Quantization) -> None:
        """Turn the layer into Linear8bitLt."""
        to_int8(m)

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """[out, in]."""
        return linear8bit(m).weight.shape

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes and scales."""
        weight = linear8bit(m).weight
        return weight.numel() * weight.element_size() + 4 * weight.shape[0]

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """The layer does not remember it: the bias's, or fp16, which bitsandbytes quantises
        from.
        """
        layer = linear8bit(m)
        if layer.weight.dtype != torch.int8:
            return layer.weight.dtype
        bias: Tensor | None = layer.bias
        return torch.float16 if bias is None else bias.dtype

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised in fp32, rounded once."""
        weight = linear8bit(m).weight
        if weight.dtype != torch.int8:
            W = weight.detach()
            W = W if dtype is None else W.to(dtype)
        else:
            rows = weight.data.float() * (_scale(m).float()[:, None] / 127.0)
            W = rows.to(dtype or torch.float32)
        return W if part is None else W[part]

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Requantise by rows."""
        CB, SCB = _rowwise(W)
        linear8bit(m).weight.data.copy_(CB)
        _scale(m).copy_(SCB)

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        CB, SCB = _rowwise(W)
        return (CB.float() * (SCB.float()[:, None] / 127.0)).to(W.dtype)

    def snapshot(self, m: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        """Rows and scales on the CPU."""
        weight = linear8bit(m).weight
        return weight.data.to("cpu", copy=True), _scale(m).to("cpu", copy=True)

    def restore(self, m: nn.Module, name: str, bits: tuple[Tensor, Tensor]) -> None:
        """Rows and scales as they were."""
        linear8bit(m).weight.data.copy_(bits[0])
        _scale(m).copy_(bits[1])

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """A plain `nn.Linear` in place; the packed parameter is kept for undoing it."""
        return hold_dense(m, W.to(self.dtype(m, name)))

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """None: bitsandbytes' forward, then the edit."""
        return Reason("int8: bitsandbytes' own forward, then the edit")


def _scale(m: nn.Module) -> Tensor:
    """Row scales: on the parameter before the first forward, in `state` after it."""
    layer = linear8bit(m)
    return layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB


def _rowwise(W: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    CB, SCB, _ = int8_vectorwise_quant(W.to(torch.float16).contiguous())
    return CB, SCB


def _hush_casts() -> None:
    """Drop bitsandbytes' line on the cast of inputs, which it logs per layer and forward.

    The user asked for int8, whose product casts. A filter on the logger holds for layers of other
    origin too; adding it twice has no effect.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_HUSH)


class _WithoutCasts(logging.Filter):
    """Passes every record but those on casts."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


_HUSH = _WithoutCasts()


def to_int8(m: nn.Module) -> None:
    """Turn a plain Linear into bitsandbytes' Linear8bitLt in place: same object, same keys, same
    hooks.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    _hush_casts()
    linear = cast(nn.Linear, m)
    W, bias, training = linear.weight.detach(), linear.bias, linear.training
    hooks = {k: v for k, v in vars(m).items() if k.startswith(("_forward", "_backward"))}
    extra = {k: v for k, v in vars(m).items() if k not in vars(nn.Linear(1, 1))}
    m.__class__ = Linear8bitLt
    Linear8bitLt.__init__(
        linear, W.shape[1], W.shape[0], bias=bias is not None, has_fp16_weights=False, device="meta"
    )
    vars(m).update(hooks | extra)
    linear.weight = Int8Params(W.cpu(), requires_grad=False, has_fp16_weights=False).to(W.device)
    if bias is not None:
        linear.bias = bias
    linear.train(training)
