"""Base of the storages of released formats: codes of 8 or 4 bits with a scale per block.

A format is one file. It says which layers of other libraries it takes over (`matches`, `adopt`) and
which tensors of a checkpoint hold a weight (`declare`). Products and encoding follow from the
`BlockLayout` of each weight.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning_peft_kernels.block_scaled.decode import decode_blocks
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.block_scaled.linear import block_linear
from lightning_peft_kernels.dispatch import select
from lightning_peft_kernels.experts.grouped_linear import Groups, block_grouped_linear
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.protocols import Reason
from lightning_peft.storage.block_checks import check_codes, check_outer, check_scales
from lightning_peft.storage.packed import (
    QuantizedWeightSpec,
    packed_tensors,
    specs_of,
    to_bytes,
)
from lightning_peft.storage.quantized import QuantizedStorage
from lightning_peft.storage.released_format import ReleasedFormat

__all__ = ["BlockScaledStorage", "BlockSpec", "mro_names"]

_ROLES = ("codes", "scales", "outer", "zeros")
_WHOLE = BlockLayout("e4m3", 0, 0)


@dataclass
class BlockSpec(QuantizedWeightSpec):
    """Meaning of the bytes of one block-scaled weight.

    Attributes:
        layout: Which code, and which block each scale covers.
        metadata: What files say of the weight beside its tensors.
    """

    layout: BlockLayout = field(default=_WHOLE)
    metadata: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of one matrix."""
        return self.shape[-2], self.shape[-1]


class BlockScaledStorage(QuantizedStorage[BlockSpec], ReleasedFormat, ABC):
    """A weight in blocks, read and multiplied by the kernels of `block_scaled`."""

    exports = True
    #: Whether a scale may be zero: in e4m3, that of a block of small weights is.
    allows_zero_scales: bool = False

    # ---- codes and values

    def block_tensors(self, m: nn.Module, name: str) -> BlockTensors:
        """The held bytes in the form that kernels take."""
        return self._form(packed_tensors(m, name), specs_of(m)[name])

    def _form(self, held: Mapping[str, Tensor], spec: BlockSpec) -> BlockTensors:
        """Bytes by role → tensors by their meaning."""
        codes, outer, zeros = held["codes"], held.get("outer"), held.get("zeros")
        return BlockTensors(
            codes.reshape(*codes.shape[: len(spec.shape) - 2], spec.shape[-2], -1),
            held["scales"],
            None if outer is None else outer.view(spec.formats["outer"].dtype),
            None if zeros is None else zeros.view(torch.int8),
        )

    def encode(self, M: Tensor, spec: BlockSpec) -> dict[str, Tensor]:
        """Codes and scales in the dtypes and shapes of the format; other tensors stay."""
        return self._typed(self._encode(M, spec, None), spec)

    def _encode(self, M: Tensor, spec: BlockSpec, outer: Tensor | None) -> BlockTensors:
        return encode_blocks(M, spec.layout, outer)

    def _typed(self, q: BlockTensors, spec: BlockSpec) -> dict[str, Tensor]:
        found = {}
        for role, t in zip(_ROLES, q, strict=True):
            form = spec.formats.get(role)
            if t is not None and form is not None:
                found[role] = t.view(form.dtype).reshape(form.shape)
        return found

    def decode(self, tensors: Mapping[str, Tensor], spec: BlockSpec, dtype: torch.dtype) -> Tensor:
        """The canonical weight."""
        held = {role: to_bytes(t) for role, t in tensors.items()}
        return decode_blocks(self._form(held, spec), spec.matrix, spec.layout, dtype)

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Encode and copy in what the encoding determines."""
        spec: BlockSpec = specs_of(m)[name]
        held = packed_tensors(m, name)
        fresh = self._encoded(spec.canonical(W), spec, self.block_tensors(m, name))
        with torch.no_grad():
            for role, t in fresh.items():
                held[role].copy_(to_bytes(t))

    def _encoded(self, M: Tensor, spec: BlockSpec, kept: BlockTensors) -> dict[str, Tensor]:
        q = self._encode(M, spec, kept.outer)
        return {r: t for r, t in self._typed(q, spec).items() if r != "outer"}

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Decode(encode(W))."""
        spec: BlockSpec = specs_of(m)[name]
        kept = {role: t.detach() for role, t in packed_tensors(m, name).items()}
        fresh = self._encoded(spec.canonical(W), spec, self.block_tensors(m, name))
        held = kept | {role: to_bytes(t) for role, t in fresh.items()}
        return spec.natural(
            decode_blocks(self._form(held, spec), spec.matrix, spec.layout, W.dtype)
        )

    # ---- products

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """Decode, multiply and drop the weight; backward does so again."""
        spec: BlockSpec = specs_of(m)[name]
        return block_linear(x, self.block_tensors(m, name), spec.matrix, spec.layout, bias)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Decode a few experts at a time; backward does so again."""
        spec: BlockSpec = specs_of(m)[name]
        q = self.block_tensors(m, name)
        return block_grouped_linear(X, q, spec.matrix, spec.layout, groups)

    def product_kernel(self, m: nn.Module, name: str) -> str:
        """The dispatch decision with its reason."""
        weight, spec = m._parameters[name], specs_of(m)[name]
        assert weight is not None  # the specification names it
        decision = select("decode_blocks", weight.device, spec.dtype)
        return f"{decision.backend}: {decision.reason}"

    def fused(
        self, form: frozenset[str], m: nn.Module, name: str
    ) -> Callable[..., Tensor] | Reason:
        """No fused kernel: the base product, then the edit."""
        return Reason(f"{self.label}: base product, then the edit")

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        """No: codes and scales are not cut together."""
        return Reason(
            f"codes and scales of {self.label} are not cut together; use strategy='peft_ddp', "
            "or transcode the base with Quantization('nf4')"
        )

    # ---- taking over

    def set_compute_dtype(self, m: nn.Module, dtype: torch.dtype) -> None:
        """Let `read` return the dtype that the model computes in."""
        for spec in specs_of(m).values():
            spec.dtype = dtype

    def spec(
        self,
        m: nn.Module,
        name: str,
        shape: torch.Size,
        layout: BlockLayout,
        keys: Mapping[str, str],
        *,
        transposed: bool = False,
        adopted: bool = True,
    ) -> BlockSpec:
        """Specification of one weight whose tensors are in the module under `keys`.

        Raises:
            ValueError: a tensor is missing, has another shape or dtype, or values that no encoder
                writes.
        """
        found = {**m._parameters, **m._buffers}
        tensors: dict[str, Tensor] = {}
        for role, key in keys.items():
            t = found.get(key)
            if t is None:
                raise ValueError(
                    f"{self.label}: expected a tensor {key!r} beside {name!r}, found none; load "
                    "the checkpoint again, all of its shards"
                )
            tensors[role] = t
        label = f"{self.label} {base_class(m).__name__}.{name}"
        codes = self._code_rows(tensors["codes"], shape)
        check_codes(f"{label} codes", codes, self.codes_shape(shape, layout), layout)
        check_scales(
            f"{label} scales", tensors["scales"], self.scales_shape(shape, layout), layout,
            allow_zero=self.allows_zero_scales,
        )  # fmt: skip
        if "outer" in tensors:
            check_outer(f"{label} global scale", tensors["outer"])
        return BlockSpec(
            self.label, shape, transposed, _dense_dtype(m), dict(keys), adopted=adopted,
            layout=layout,
        )  # fmt: skip

    def codes_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Shape of the codes of a canonical weight."""
        *lead, N, K = shape
        return (*lead, N, K // layout.codes_per_byte)

    def scales_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Shape of the scales of a canonical weight."""
        *lead, N, K = shape
        return (*lead, *layout.grid(N, K))

    def _code_rows(self, codes: Tensor, shape: torch.Size) -> Tensor:
        """Codes as they arrived, in the axes of `codes_shape`."""
        return codes


def _dense_dtype(m: nn.Module) -> torch.dtype:
    """Dtype of a floating bias, else torch's default; `set_compute_dtype` knows better."""
    biases = (p for n, p in m._parameters.items() if p is not None and n.endswith("bias"))
    bias = next(biases, None)
    return torch.get_default_dtype() if bias is None or bias.element_size() < 2 else bias.dtype


def mro_names(m: nn.Module) -> set[str]:
    """Qualified names of the classes that a module's class derives from."""
    return {f"{c.__module__}.{c.__qualname__}" for c in type(m).__mro__}
