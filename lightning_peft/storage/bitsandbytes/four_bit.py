"""`Linear4bit` of bitsandbytes, read by our kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit
from torch import Tensor, nn

from lightning_peft.core.protocols import Reason, StoredTensor
from lightning_peft.storage.bitsandbytes.base import BnbStorage, hold_dense
from lightning_peft.storage.bitsandbytes.layers import FOUR_BIT, Linear4bit, QuantState, linear4bit
from lightning_peft.storage.registry import register_storage

__all__ = ["Bnb4bitStorage"]


_Bits = tuple[Tensor, QuantState | None]


@register_storage()
class Bnb4bitStorage(BnbStorage):
    """`bitsandbytes.nn.Linear4bit` (and LinearNF4, LinearFP4)."""

    label = "bitsandbytes 4-bit"
    classes = FOUR_BIT

    def iter_tensors(self, m: nn.Module, name: str) -> Iterator[StoredTensor]:
        """The packed parameter, and the scales in its quantisation state."""
        weight = linear4bit(m).weight
        yield StoredTensor(name, "codes", weight)
        state = getattr(weight, "quant_state", None)
        if state is None:
            return
        yield StoredTensor(None, "absmax", state.absmax)
        if state.nested:
            yield StoredTensor(None, "absmax2", state.state2.absmax)
            yield StoredTensor(None, "offset", state.offset)

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """[out, in]."""
        layer = linear4bit(m)
        return torch.Size((layer.out_features, layer.in_features))

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Packed bytes and scales."""
        weight = linear4bit(m).weight
        state = weight.quant_state
        held: list[Tensor] = [weight]
        if state is not None:
            held += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        return sum(t.numel() * t.element_size() for t in held)

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """Dtype the weight had before it was quantised."""
        weight = linear4bit(m).weight
        return weight.dtype if weight.quant_state is None else weight.quant_state.dtype

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised by our kernel, which reads bitsandbytes' bytes."""
        layer = linear4bit(m)
        state = _state(layer)
        if state is None:  # not on a device yet, so not quantised yet
            W = layer.weight.detach()
            W = W if dtype is None else W.to(dtype)
        else:
            W = _dequantized(layer.weight.data, state, self.shape(m, name), dtype or state.dtype)
        return W if part is None else W[part]

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Requantise with the layer's own settings."""
        layer = linear4bit(m)
        weight = layer.weight
        data, state = _requantized(layer, W)
        with torch.no_grad():
            weight.data = data.view(weight.dtype).reshape(weight.shape)
        weight.quant_state = layer.quant_state = state

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        data, state = _requantized(linear4bit(m), W)
        return _dequantized(data, state, W.shape, W.dtype)

    def snapshot(self, m: nn.Module, name: str) -> _Bits:
        """Bytes and quantisation state on the CPU."""
        layer = linear4bit(m)
        state = _state(layer)
        return layer.weight.data.detach().to("cpu", copy=True), copy.deepcopy(state)

    def restore(self, m: nn.Module, name: str, bits: _Bits) -> None:
        """Bytes and state as they were."""
        layer = linear4bit(m)
        device = layer.weight.device
        layer.weight.data = bits[0].to(device, copy=True)
        state = copy.deepcopy(bits[1])
        if state is not None:
            state.to(device)
        layer.weight.quant_state = layer.quant_state = state

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """A plain `nn.Linear` in place; the packed parameter is kept for undoing it."""
        return hold_dense(m, W.to(self.dtype(m, name)))

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """None: bitsandbytes' forward, then the edit."""
        return Reason(
            "bitsandbytes layer: its own forward, then the edit; load dense and use "
            "Quantization() to fuse"
        )


def _state(layer: Linear4bit) -> QuantState | None:
    """The quantisation state, after undoing the layout that an AVX-512 CPU repacks to at its first
    eval forward.
    """
    weight = layer.weight
    state: QuantState | None = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        weight.quant_state = layer.quant_state = state
    return state


def _dequantized(data: Tensor, state: QuantState, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    q = Packed4bit(
        data.view(torch.uint8).reshape(-1),
        state.absmax,
        state.state2.absmax if state.nested else None,
        state.offset if state.nested else None,
    )
    return dequantize_4bit(q, shape, dtype, kind=state.quant_type, block_size=state.blocksize)


def _requantized(layer: Linear4bit, W: Tensor) -> tuple[Tensor, QuantState]:
    from bitsandbytes.functional import quantize_4bit

    state = _state(layer)
    assert state is not None  # a weight is written once it is on a device
    data, fresh = quantize_4bit(
        W.to(state.dtype).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.weight.dtype,
    )
    return data, fresh
