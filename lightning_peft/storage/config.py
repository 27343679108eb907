"""Configurations of the frozen base's storage, and their form as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_peft.core.value_types import require_fit

__all__ = ["Quantization", "StorageConfig"]


class StorageConfig:
    """Base of all storage configurations; a subclass is a frozen dataclass of plain values.

    Attributes:
        exclude_modules: Suffixes of layers that stay dense, in addition to the output head.
    """

    exclude_modules: list[str] | None = None


@dataclass(frozen=True)
class Quantization(StorageConfig):
    """How the frozen base is stored, in one of the formats that come with the package.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"`` (4 bit, byte-compatible with bitsandbytes), or ``"int8"``
            (Linear8bitLt of bitsandbytes).
        block_size: Elements that share one scale; a power of two from 32 to 4096. 4 bit only.
        double_quant: Whether the scales are quantised too: 0.516 instead of 0.5625 bytes per
            weight at 64. 4 bit only.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: dtype that weights are
            dequantised to; None means the dtype they had.
        compute: ``"auto"``; ``"fp8"`` for e4m3 products with the frozen base on chips that have
            them; ``"bf16"`` for bf16 products with it wherever no gradient is needed (generation in
            an fp32 model). 4 bit only.
        exclude_modules: Suffixes of layers that stay dense, in addition to the output head.

    Raises:
        ValueError: an unknown kind, block size or dtype.
        TypeError: `double_quant` or `exclude_modules` of another type.
    """

    kind: Literal["nf4", "fp4", "int8"] = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compute: Literal["auto", "fp8", "bf16"] = "auto"
    exclude_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _one_of("kind", self.kind, ("nf4", "fp4", "int8"))
        _one_of("block_size", self.block_size, tuple(2**i for i in range(5, 13)))
        _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16", "float16", None))
        _one_of("compute", self.compute, ("auto", "fp8", "bf16"))
        require_fit("Quantization", "double_quant", self.double_quant, bool, "double_quant=True")
        names = self.exclude_modules
        form = f"[{names!r}]" if isinstance(names, str) else "a list"
        require_fit("Quantization", "exclude_modules", names, list[str] | None, form)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Quantization.{name}: expected one of {allowed}, got {value!r}")
