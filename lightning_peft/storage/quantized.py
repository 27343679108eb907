"""A quantised format from two functions: `encode` a weight, `decode` its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from lightning_peft_kernels.experts.grouped_linear import Groups, grouped_linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.class_swap import PackedForward, swap_in, swap_out
from lightning_peft.core.modules import parameter_at
from lightning_peft.core.protocols import Reason, StoredTensor, WeightLayout
from lightning_peft.storage.base import BaseStorage
from lightning_peft.storage.dtensor import fill_rows, local
from lightning_peft.storage.linear_forward import recomputed
from lightning_peft.storage.packed import (
    QuantizedWeightSpec,
    TensorFormat,
    as_bytes,
    from_bytes,
    packed_tensors,
    specs_of,
    to_bytes,
)

__all__ = ["QuantizedStorage"]


@dataclass
class _PackAgain:
    """Undoes `to_dense`; a deep copy of the module takes its own copy along.

    Attributes:
        module: The module that holds the weight.
        name: Name of the weight.
        spec: Its specification.
        mixin: The mixin that was taken off; None if it stayed.
        kept: The packed tensors by key.
        buffers: Those keys that are buffers.
    """

    module: nn.Module
    name: str
    spec: QuantizedWeightSpec
    mixin: type[PackedForward] | None
    kept: dict[str, Any]
    buffers: list[str]

    def __call__(self) -> None:
        """Put the packed tensors back."""
        m = self.module
        if self.mixin is not None:
            swap_in(m, self.mixin)
            vars(m)["_packed"] = {}
        specs_of(m)[self.name] = self.spec
        for key, t in self.kept.items():
            registry = m._buffers if key in self.buffers else m._parameters
            registry[key] = t


#: Facts of a weight that its format needs.
Spec = TypeVar("Spec", bound=QuantizedWeightSpec)


class QuantizedStorage(BaseStorage, Generic[Spec], ABC):
    """Base of storages that hold a weight as codes and companion tensors.

    A format that `quantize` makes also defines `accepts` and `bits_per_weight`; a format that
    arrives defines `matches` and `adopt`, which calls `hold` for each weight.
    """

    is_quantized = True
    lossless_write = False

    @abstractmethod
    def encode(self, M: Tensor, spec: Spec) -> dict[str, Tensor]:
        """Role → tensor of a canonical weight; ``"codes"`` first, each with the rows of M."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype) -> Tensor:
        """The canonical weight; of a stack, as many experts as the tensors hold."""

    # ---- which weights

    def weights(self, m: nn.Module) -> Sequence[str]:
        """Weights whose specification has this storage's label."""
        specs = specs_of(m)
        return [name for name, s in specs.items() if s.kind == self.label] if specs else ()

    def owns(self, m: nn.Module, name: str) -> bool:
        """Whether the specification of the weight has this storage's label."""
        spec = specs_of(m).get(name)
        return spec is not None and spec.kind == self.label

    def iter_tensors(self, m: nn.Module, name: str) -> Iterator[StoredTensor]:
        """Parameters and buffers, as the specification names them."""
        for role, key in specs_of(m)[name].keys.items():
            held = {**m._parameters, **m._buffers}[key]
            assert held is not None  # the specification lists what is there
            yield StoredTensor(key, role, held)

    def _decoded(
        self, m: nn.Module, name: str, dtype: torch.dtype, part: slice | None = None
    ) -> Tensor:
        spec: Spec = specs_of(m)[name]
        tensors = {
            role: from_bytes(t.detach() if part is None else t.detach()[part], spec.formats[role])
            for role, t in packed_tensors(m, name).items()
        }
        return self.decode(tensors, spec, dtype)

    # ---- making and taking over

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Any) -> None:
        """Encode every weight, then hold the tensors and swap the forward."""
        done = []
        for name in layout.names:
            W = parameter_at(m, name).detach()
            M = W.mT if layout.transposed else W
            plain = QuantizedWeightSpec(self.label, M.shape, layout.transposed, W.dtype)
            spec = cast("Spec", plain)  # a format with more facts has a `quantize` of its own
            done.append((name, spec, self.encode(M, spec)))
        swap_in(m, layout.forward)
        for name, spec, tensors in done:
            for role, t in tensors.items():
                key = name if role == "codes" else f"{name}_{role}"
                m._parameters[key] = nn.Parameter(t, requires_grad=False)
                spec.keys[role] = key
            self.hold(m, name, spec)

    def hold(self, m: nn.Module, name: str, spec: Spec) -> None:
        """Hold the tensors that `spec.keys` names as bytes, and take charge of the weight."""
        vars(m).setdefault("_packed", {})[name] = spec
        for t in self.iter_tensors(m, name):
            spec.formats[t.role] = TensorFormat(
                t.tensor.dtype, t.tensor.shape, t.tensor.requires_grad
            )
            t.tensor.requires_grad_(False)
            t.tensor.data = to_bytes(t.tensor)

    def release(self, m: nn.Module) -> None:
        """Give adopted tensors their own dtype, shape and flag again."""
        for name in self.weights(m):
            spec: Spec = specs_of(m)[name]
            for t in self.iter_tensors(m, name):
                form = spec.formats[t.role]
                t.tensor.data = from_bytes(as_bytes(t.tensor), form)
                t.tensor.requires_grad_(form.requires_grad)
        vars(m).pop("_packed", None)

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Tensors of the module under its own names, in the dtypes of the format."""
        found = super().export(m)
        for name in self.weights(m):
            spec: Spec = specs_of(m)[name]
            for t in self.iter_tensors(m, name):
                form = spec.formats.get(t.role)
                if t.key is not None and form is not None:
                    found[t.key] = from_bytes(as_bytes(t.tensor.detach()), form)
        return found

    # ---- one weight

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """Natural shape."""
        shape: torch.Size = specs_of(m)[name].natural_shape
        return shape

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical elements."""
        return self.shape(m, name).numel()

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes of codes and companions."""
        held = (t.tensor for t in self.iter_tensors(m, name))
        return sum(t.numel() * t.element_size() for t in held)

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """Dtype of the specification."""
        dtype: torch.dtype = specs_of(m)[name].dtype
        return dtype

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """The decoded weight; of a stack, only the experts of `part` are decoded."""
        spec: Spec = specs_of(m)[name]
        experts = part if len(spec.shape) > 2 else None
        W = spec.natural(self._decoded(m, name, dtype or spec.dtype, experts))
        return W if part is None or experts is not None else W[part]

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Encode and copy in; of a sharded weight, this process's rows."""
        spec: Spec = specs_of(m)[name]
        tensors = self.encode(spec.canonical(W), spec)
        with torch.no_grad():
            for role, held in packed_tensors(m, name).items():
                fill_rows(held, to_bytes(tensors[role]))

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Decode(encode(W))."""
        spec: Spec = specs_of(m)[name]
        tensors = self.encode(spec.canonical(W), spec)
        return spec.natural(self.decode(tensors, spec, W.dtype))

    def snapshot(self, m: nn.Module, name: str) -> Any:
        """Bytes on the CPU; of a sharded weight, this process's rows."""
        held = packed_tensors(m, name)
        return {role: local(t).detach().to("cpu", copy=True) for role, t in held.items()}

    def restore(self, m: nn.Module, name: str, bits: Any) -> None:
        """Copy the bytes back."""
        with torch.no_grad():
            for role, t in packed_tensors(m, name).items():
                fill_rows(t, bits[role])

    def to_dense(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """Hold the natural weight densely.

        The class goes back once nothing is quantised. A foreign layer keeps our forward, because
        its own cannot read a dense weight.
        """
        specs = specs_of(m)
        spec: Spec = specs[name]
        keys = list(spec.keys.values())
        buffers = [key for key in keys if key in m._buffers]
        kept: dict[str, Any] = {k: (m._buffers if k in buffers else m._parameters)[k] for k in keys}
        cls: Any = type(m)
        mixin: type[PackedForward] = cls._swap_mixin
        emptied = len(specs) == 1 and not spec.adopted
        if emptied:
            swap_out(m, mixin)
            del vars(m)["_packed"]
        else:
            del specs[name]
        for key in keys:
            if key != name:
                del (m._buffers if key in buffers else m._parameters)[key]
        dense = nn.Parameter(W.to(spec.dtype).contiguous(), requires_grad=False)
        m._parameters[name] = dense
        return _PackAgain(m, name, spec, mixin if emptied else None, kept, buffers)

    # ---- products

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """Decode, multiply and drop the weight; backward does so again."""

        def product(x: Tensor) -> Tensor:
            W = self._decoded(m, name, x.dtype)
            return F.linear(x, W, None if bias is None else bias.to(x.dtype))

        return recomputed(product, x)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Decode all experts, multiply and drop them; backward does so again."""

        def product(X: Tensor) -> Tensor:
            return grouped_linear(X, self._decoded(m, name, X.dtype), groups)

        return recomputed(product, X)

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """No fused kernel: the base product, then the edit."""
        return Reason(f"{self.label}: base product, then the edit")
