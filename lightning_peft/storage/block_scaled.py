"""Base of the storages of released formats: codes of 8 or 4 bits with a scale per block.

A format is one file. It says which layers of other libraries it takes over (`matches`, `arriving`)
and which tensors of a checkpoint hold a weight (`declared`). Products and encoding follow from the
`BlockLayout` of each weight.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

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
from lightning_peft.storage.packed import (
    QuantizedWeightSpec,
    packed_tensors,
    specs_of,
    to_bytes,
)
from lightning_peft.storage.quantized import QuantizedStorage

__all__ = ["BlockScaledStorage", "BlockSpec", "DeclaredWeight", "mro_names"]

_ROLES = ("codes", "scales", "outer", "zeros")


_WHOLE = BlockLayout("e4m3", 0, 0)


@dataclass(frozen=True)
class DeclaredWeight:
    """The tensors of a checkpoint that hold one weight.

    Attributes:
        layout: Meaning of the codes.
        tensors: Role → (name in the module, shape, dtype).
    """

    layout: BlockLayout
    tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]]


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


class BlockScaledStorage(QuantizedStorage[BlockSpec], ABC):
    """A weight in blocks, read and multiplied by the kernels of `block_scaled`."""

    exports = True
    #: ``quant_method`` of the configurations whose checkpoints `load_packed` reads.
    quant_methods: tuple[str, ...] = ()
    #: Weight of a layer → names of the tensors that hold it in a file.
    file_names: Mapping[str, Sequence[str]] = MappingProxyType({})
    #: (pattern, replacement) of further names in files.
    renamings: Sequence[tuple[str, str]] = ()
    #: What files add to the name of a weight for its codes.
    codes_suffix: str = ""
    #: Whether a scale may be zero: in e4m3, that of a block of small weights is.
    allows_zero_scales: bool = False

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether `declare` knows this ``quantization_config``."""
        return config.get("quant_method") in self.quant_methods

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """Patterns of layers that the checkpoint holds densely; None if it does not list them."""
        skip: Sequence[str] | None = config.get("modules_to_not_convert")
        return skip

    def declare(
        self,
        label: str,
        weight: str,
        shape: torch.Size,
        config: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight | None:
        """The tensors of one weight in a checkpoint; None if it is dense there.

        Args:
            label: Name of the layer in the model.
            weight: Name of the weight in the layer.
            shape: Canonical shape, [out, in] or [experts, out, in].
            config: The checkpoint's ``quantization_config``.
            dtypes: Dtype of the tensors in the files by the last part of their name; empty where
                there are no files.

        Raises:
            ValueError: a setting of the configuration that is not known.
        """
        return None

    def repack(self, m: nn.Module, name: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Bring tensors as they were read into the form that `spec` describes; in place.

        Args:
            m: The layer.
            name: The weight.
            keys: Role → name of each declared tensor.

        Returns:
            Role → name of each tensor that is held.

        Raises:
            ValueError: values that the form cannot hold.
        """
        return dict(keys)

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
        """No: a block has more rows than the part of a process may have."""
        return Reason(
            f"a scale of {self.label} covers rows of several processes; use strategy='peft_ddp', "
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
        check = partial(self._check, m, name)
        check("codes", tensors["codes"], self.codes_shape(shape, layout), layout)
        check("scales", tensors["scales"], self.scales_shape(shape, layout), layout)
        if "outer" in tensors:
            self._check_outer(m, name, tensors["outer"])
        spec = BlockSpec(
            self.label, shape, transposed, _dense_dtype(m), dict(keys), adopted=adopted,
            layout=layout,
        )  # fmt: skip
        return spec

    def codes_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Shape of the codes of a canonical weight."""
        *lead, N, K = shape
        return (*lead, N, K // layout.codes_per_byte)

    def scales_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Shape of the scales of a canonical weight."""
        *lead, N, K = shape
        return (*lead, *layout.grid(N, K))

    def _check(
        self,
        m: nn.Module,
        name: str,
        role: str,
        t: Tensor,
        shape: tuple[int, ...],
        layout: BlockLayout,
    ) -> None:
        label = f"{self.label} {base_class(m).__name__}.{name} {role}"
        if hasattr(t, "to_local"):
            raise ValueError(
                f"{label}: expected a tensor of this process alone, got a DTensor; attach before "
                "the model is sharded, and load it without tp_plan"
            )
        wanted = self._wanted_dtypes(role, layout)
        if t.dtype not in wanted:
            names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
            raise ValueError(
                f"{label}: expected {names}, got {str(t.dtype).removeprefix('torch.')}; load the "
                "checkpoint again and do not cast the model"
            )
        size, one = torch.Size(shape), role == "scales" and not layout.rows and not layout.columns
        if t.shape != size and not (one and t.numel() == size.numel()):
            raise ValueError(
                f"{label}: expected shape {list(shape)}, got {list(t.shape)}; the file does not "
                "belong to this model or was converted with another block size"
            )
        if t.device.type != "meta":
            self._check_values(label, role, t.detach(), layout)

    def _check_outer(self, m: nn.Module, name: str, t: Tensor) -> None:
        values = t.detach().float()
        if t.device.type != "meta" and not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(
                f"{self.label} {base_class(m).__name__}.{name} global scale: expected a finite "
                f"positive number, got {values.reshape(-1)[:4].tolist()}; the file is damaged: "
                "download it again"
            )

    def _wanted_dtypes(self, role: str, layout: BlockLayout) -> tuple[torch.dtype, ...]:
        if role == "codes":
            return _CODES[layout.element]
        return (layout.scale_dtype, *((torch.uint8,) if layout.scale == "e8m0" else ()))

    def _check_values(self, label: str, role: str, t: Tensor, layout: BlockLayout) -> None:
        if role == "scales":
            _check_scales(label, t, layout, self.allows_zero_scales)
        elif layout.element == "e4m3":
            bad = _count_nan_codes(t)
            if bad:
                raise ValueError(
                    f"{label}: expected codes of numbers, got {bad} NaN of {t.numel()}; the file "
                    "is damaged: download it again"
                )


_CODES: dict[str, tuple[torch.dtype, ...]] = {
    "e4m3": (torch.float8_e4m3fn,),
    "int8": (torch.int8,),
    "e2m1": (torch.uint8, torch.int8),
    "int4": (torch.uint8, torch.int32),
    "uint4": (torch.uint8, torch.int32),
}


def _check_scales(label: str, t: Tensor, layout: BlockLayout, zero: bool) -> None:
    remedy = "the file is damaged: download it again"
    if layout.scale == "e8m0":
        bad = int((t.view(torch.uint8) == 255).sum()) if t.ndim else int(t.float().isnan())
        if bad:
            raise ValueError(f"{label}: expected powers of two, got {bad} NaN; {remedy}")
        return
    values = t.float()
    for what, wrong in (
        ("finite", ~values.isfinite()),
        ("positive", values < 0 if zero else values <= 0),
    ):
        bad = int(wrong.sum())
        if bad:
            worst = values[wrong].reshape(-1)[0].item()
            raise ValueError(
                f"{label}: expected {what} scales, got {bad} of {t.numel()} that are not, the "
                f"first {worst}; {remedy}"
            )


def _count_nan_codes(t: Tensor) -> int:
    """Number of NaN codes of e4m3, some million codes at a time."""
    flat = t.reshape(-1).view(torch.uint8)
    found = 0
    for part in flat.split(1 << 22):
        if int((part & 127).max()) == 127:
            found += int(((part & 127) == 127).sum())
    return found


def _dense_dtype(m: nn.Module) -> torch.dtype:
    """Dtype of a floating bias, else torch's default; `set_compute_dtype` knows better."""
    biases = (p for n, p in m._parameters.items() if p is not None and n.endswith("bias"))
    bias = next(biases, None)
    return torch.get_default_dtype() if bias is None or bias.element_size() < 2 else bias.dtype


def mro_names(m: nn.Module) -> set[str]:
    """Qualified names of the classes that a module's class derives from."""
    return {f"{c.__module__}.{c.__qualname__}" for c in type(m).__mro__}
