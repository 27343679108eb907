"""Layers of bitsandbytes, as found in a model that was loaded quantised: Linear4bit and
Linear8bitLt.

bitsandbytes itself is imported when such a layer is written, or made by `Quantization("int8")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning_peft_kernels.experts.grouped_linear import Groups, grouped_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.modules import parameter_at
from lightning_peft.core.protocols import Reason, StoredTensor, WeightLayout
from lightning_peft.storage.base import BaseStorage
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.linear_forward import recomputed
from lightning_peft.storage.registry import register_storage

__all__ = ["Bnb4bitStorage", "Bnb8bitStorage", "to_int8"]

_FOUR_BIT = ("Linear4bit", "LinearNF4", "LinearFP4")
_EIGHT_BIT = ("Linear8bitLt",)


_CLASS_NAMES: dict[type[nn.Module], str] = {}


def _class_name(cls: type[nn.Module]) -> str:
    """Name of the class of bitsandbytes that `cls` is or derives from; "" if there is none."""
    if cls not in _CLASS_NAMES:
        _CLASS_NAMES[cls] = _found_class_name(cls)
    return _CLASS_NAMES[cls]


def _found_class_name(cls: type[nn.Module]) -> str:
    for base in cls.__mro__:
        if base.__module__.startswith("bitsandbytes."):
            if base.__name__ not in (*_FOUR_BIT, *_EIGHT_BIT):
                raise ValueError(
                    f"bitsandbytes.{base.__name__}: expected one of "
                    f"{sorted((*_FOUR_BIT, *_EIGHT_BIT))}; exclude the layer with exclude_modules"
                )
            return base.__name__
    return ""


class _BnbStorage(BaseStorage):
    """What layers of bitsandbytes have in common: one weight, and scales outside the module."""

    is_quantized = True
    lossless_write = False
    classes: tuple[str, ...] = ()

    def weights(self, m: nn.Module) -> Sequence[str]:
        """``weight`` of this storage's classes."""
        return ("weight",) if _class_name(type(m)) in self.classes else ()

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """[out, in]."""
        raise NotImplementedError

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical elements."""
        return self.shape(m, name).numel()

    def read(
        self,
        m: Any,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised."""
        raise NotImplementedError

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the dequantised weight, which backward dequantises again."""
        return recomputed(lambda x: F.linear(x, self.read(m, name, x.dtype), bias), x)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Layers of bitsandbytes hold one matrix, never experts."""
        return grouped_linear(X, self.read(m, name, X.dtype), groups)

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        """No: the scales are outside the module's parameters."""
        return Reason(
            "bitsandbytes holds scales that FSDP2 cannot see; load the base dense, or use "
            "strategy='peft_ddp'"
        )


@register_storage()
class Bnb4bitStorage(_BnbStorage):
    """`bitsandbytes.nn.Linear4bit` (and LinearNF4, LinearFP4)."""

    label = "bitsandbytes 4-bit"
    classes = _FOUR_BIT

    def iter_tensors(self, m: Any, name: str) -> Iterator[StoredTensor]:
        """The packed parameter, and the scales in its quantisation state."""
        yield StoredTensor(name, "codes", m.weight)
        state = getattr(m.weight, "quant_state", None)
        if state is None:
            return
        yield StoredTensor(None, "absmax", state.absmax)
        if state.nested:
            yield StoredTensor(None, "absmax2", state.state2.absmax)
            yield StoredTensor(None, "offset", state.offset)

    def shape(self, m: Any, name: str) -> torch.Size:
        """[out, in]."""
        return torch.Size((m.out_features, m.in_features))

    def nbytes(self, m: Any, name: str) -> int:
        """Packed bytes and scales."""
        state = m.weight.quant_state
        total = m.weight.numel() * m.weight.element_size()
        if state is None:
            return int(total)
        scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
        return int(total + sum(t.numel() * t.element_size() for t in scales))

    def dtype(self, m: Any, name: str) -> torch.dtype:
        """Dtype the weight had before it was quantised."""
        state = m.weight.quant_state
        dtype: torch.dtype = m.weight.dtype if state is None else state.dtype
        return dtype

    def read(
        self,
        m: Any,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised by our kernel, which reads bitsandbytes' bytes."""
        state = _state(m)
        if state is None:  # not on a device yet, so not quantised yet
            W: Tensor = m.weight.detach()
            W = W if dtype is None else W.to(dtype)
            return W if part is None else W[part]
        q = Packed4bit(
            m.weight.data.view(torch.uint8).reshape(-1),
            state.absmax,
            state.state2.absmax if state.nested else None,
            state.offset if state.nested else None,
        )
        W = dequantize_4bit(
            q,
            self.shape(m, name),
            dtype or state.dtype,
            kind=state.quant_type,
            block_size=state.blocksize,
        )
        return W if part is None else W[part]

    def write(self, m: Any, name: str, W: Tensor) -> None:
        """Requantise with the layer's own settings."""
        data, state = _requantized(m, W)
        with torch.no_grad():
            m.weight.data = data.view(m.weight.dtype).reshape(m.weight.shape)
        m.weight.quant_state = state
        m.quant_state = state

    def quantization_roundtrip(self, m: Any, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        data, state = _requantized(m, W)
        q = Packed4bit(
            data.view(torch.uint8).reshape(-1), state.absmax,
            state.state2.absmax if state.nested else None, state.offset if state.nested else None,
        )  # fmt: skip
        return dequantize_4bit(
            q, W.shape, W.dtype, kind=state.quant_type, block_size=state.blocksize
        )

    def snapshot(self, m: Any, name: str) -> Any:
        """Bytes and quantisation state on the CPU."""
        import copy

        _state(m)
        return (m.weight.data.detach().to("cpu", copy=True), copy.deepcopy(m.weight.quant_state))

    def restore(self, m: Any, name: str, bits: Any) -> None:
        """Bytes and state as they were."""
        import copy

        device = m.weight.device
        m.weight.data = bits[0].to(device, copy=True)
        state = copy.deepcopy(bits[1])
        if state is not None:
            state.to(device)
        m.weight.quant_state = state
        m.quant_state = state

    def to_dense(self, m: Any, name: str, W: Tensor) -> Callable[[], None]:
        """A plain `nn.Linear` in place; the packed parameter is kept for undoing it."""
        return _plain_linear(m, W.to(self.dtype(m, name)))

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """None: bitsandbytes' forward, then the edit."""
        return Reason(
            "bitsandbytes layer: its own forward, then the edit; load dense and use "
            "Quantization() to fuse"
        )


def _state(m: Any) -> Any:
    """The quantisation state, after undoing the layout that an AVX-512 CPU repacks to at its first
    eval forward.
    """
    state = getattr(m.weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        m.weight.data, m.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            m.weight.data, state
        )
        state = m.quant_state = m.weight.quant_state
    return state


def _requantized(m: Any, W: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    state = _state(m)
    data, fresh = quantize_4bit(
        W.to(state.dtype).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=m.weight.dtype,
    )
    return data, fresh


def _plain_linear(m: Any, W: Tensor) -> Callable[[], None]:
    cls, packed = type(m), m._parameters["weight"]
    m.__class__ = nn.Linear
    m._parameters["weight"] = nn.Parameter(W.contiguous(), requires_grad=False)

    def undo() -> None:
        m.__class__ = cls
        m._parameters["weight"] = packed

    return undo


@register_storage(Quantization)
class Bnb8bitStorage(_BnbStorage):
    """`bitsandbytes.nn.Linear8bitLt`: int8 rows with one scale each, W = CB · SCB / 127."""

    label = "int8"
    classes = _EIGHT_BIT
    quantizes_meta = False  # bitsandbytes quantises values

    def iter_tensors(self, m: Any, name: str) -> Iterator[StoredTensor]:
        """The int8 parameter and its row scales."""
        yield StoredTensor(name, "codes", m.weight)
        if m.weight.dtype == torch.int8:
            yield StoredTensor(None, "scales", _scale(m))

    def accepts(self, config: Any) -> bool:
        """`Quantization("int8")`."""
        kind: str = config.kind
        return kind == "int8"

    def require_available(self) -> None:
        """Raise without bitsandbytes."""
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                "quantization='int8': expected bitsandbytes, found none; pip install bitsandbytes, "
                "or use 'nf4', which needs nothing"
            )

    def bits_per_weight(self, shape: torch.Size, config: Any) -> float:
        """8 bits, and an fp32 scale per row."""
        return 8.0 + 32.0 / shape[-1]

    def dense_reason(self, m: nn.Module, layout: WeightLayout, config: Any) -> str:
        """Linear8bitLt stands for `nn.Linear` alone."""
        if parameter_at(m, layout.names[0]).ndim > 2:
            raise ValueError(
                "expected linear layers for kind='int8', got fused experts, which hold most of the "
                "weights; use kind='nf4', or name them in exclude_modules to leave them dense"
            )
        return "bitsandbytes' int8 needs an nn.Linear; use nf4" if layout.transposed else ""

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Any) -> None:
        """Turn the layer into Linear8bitLt."""
        to_int8(m)

    def shape(self, m: Any, name: str) -> torch.Size:
        """[out, in]."""
        shape: torch.Size = m.weight.shape
        return shape

    def nbytes(self, m: Any, name: str) -> int:
        """Bytes and scales."""
        return int(m.weight.numel() * m.weight.element_size() + 4 * m.weight.shape[0])

    def dtype(self, m: Any, name: str) -> torch.dtype:
        """The layer does not remember it: the bias's, or fp16, which bitsandbytes quantises
        from.
        """
        if m.weight.dtype != torch.int8:
            dtype: torch.dtype = m.weight.dtype
            return dtype
        bias: Tensor | None = m.bias
        return torch.float16 if bias is None else bias.dtype

    def read(
        self,
        m: Any,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised in fp32, rounded once."""
        if m.weight.dtype != torch.int8:
            W: Tensor = m.weight.detach()
            W = W if dtype is None else W.to(dtype)
        else:
            rows = m.weight.data.float() * (_scale(m).float()[:, None] / 127.0)
            W = rows.to(dtype or torch.float32)
        return W if part is None else W[part]

    def write(self, m: Any, name: str, W: Tensor) -> None:
        """Requantise by rows."""
        CB, SCB = _rowwise(W)
        m.weight.data.copy_(CB)
        _scale(m).copy_(SCB)

    def quantization_roundtrip(self, m: Any, name: str, W: Tensor) -> Tensor:
        """Dequantise(quantise(W))."""
        CB, SCB = _rowwise(W)
        return (CB.float() * (SCB.float()[:, None] / 127.0)).to(W.dtype)

    def snapshot(self, m: Any, name: str) -> Any:
        """Rows and scales on the CPU."""
        return m.weight.data.to("cpu", copy=True), _scale(m).to("cpu", copy=True)

    def restore(self, m: Any, name: str, bits: Any) -> None:
        """Rows and scales as they were."""
        m.weight.data.copy_(bits[0])
        _scale(m).copy_(bits[1])

    def to_dense(self, m: Any, name: str, W: Tensor) -> Callable[[], None]:
        """A plain `nn.Linear` in place; the packed parameter is kept for undoing it."""
        return _plain_linear(m, W.to(self.dtype(m, name)))

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """None: bitsandbytes' forward, then the edit."""
        return Reason("int8: bitsandbytes' own forward, then the edit")


def _scale(m: Any) -> Tensor:
    """Row scales: on the parameter before the first forward, in `state` after it."""
    scale: Tensor = m.state.SCB if m.state.SCB is not None else m.weight.SCB
    return scale


def _rowwise(W: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    CB, SCB, _ = int8_vectorwise_quant(W.to(torch.float16).contiguous())
    return CB, SCB


def to_int8(m: nn.Module) -> None:
    """Turn a plain Linear into bitsandbytes' Linear8bitLt in place: same object, same keys, same
    hooks.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    linear: Any = m
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
