"""Factors and magnitudes of LoRA files of other programs, in peft's shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_peft.hf.import_names import Layer

__all__ = ["factors_of", "magnitude_of"]


def magnitude_of(t: Tensor, module: nn.Module) -> Tensor:
    """Return DoRA's magnitudes in peft's shape: [out], a convolution's [1, out, 1 …].

    Raises:
        ValueError: norms of another axis than the outputs.
    """
    kernel = getattr(module, "kernel_size", ())
    rows = getattr(module, "out_channels", None) if kernel else _rows(module)
    if t.numel() != rows or t.shape[0] != rows:
        raise ValueError(
            f"expected magnitudes of {rows} outputs, got shape {list(t.shape)}: norms of the "
            "inputs (LyCORIS: wd_on_output=False) have no equal here"
        )
    return t.reshape(1, -1, *(1,) * len(kernel)) if kernel else t.reshape(-1)


def factors_of(
    e: Layer, module: nn.Module, enable_lora: Sequence[bool] | None
) -> tuple[Tensor, Tensor, float]:
    """Return (A, B, factor of alpha) in peft's shapes for this layer."""
    A, B = e.factors()
    kernel: tuple[int, ...] | None = (
        getattr(module, "kernel_size", None)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        else None
    )
    if kernel is not None and A.ndim == 2:
        if max(kernel) > 1:
            raise ValueError(
                "expected a linear layer or an embedding, got a convolution: loralib's factors of "
                "its kernel have no low-rank form here; merge it with loralib"
            )
        A, B = (t.reshape(*t.shape, *kernel) for t in (A, B))
    if kernel is None and A.ndim > 2:  # from a model whose projections are 1×1 convolutions
        if A.shape[2:].numel() != 1 or B.shape[2:].numel() != 1:
            raise ValueError(f"expected factors of a linear layer, got {list(A.shape)}")
        A, B = A.flatten(1), B.flatten(1)
    if A.shape[0] == B.shape[1]:
        rows = _rows(module)
        if rows is None or B.shape[0] == rows:
            return A.contiguous(), B.contiguous(), 1.0
    return _merged(A, B, module, enable_lora)


def _rows(module: nn.Module) -> int | None:
    for name in ("out_features", "nf"):  # a linear layer, transformers' Conv1D
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _merged(
    A: Tensor, B: Tensor, module: nn.Module, enable_lora: Sequence[bool] | None
) -> tuple[Tensor, Tensor, float]:
    """Merge the factors of loralib's MergedLinear, where k of n output parts have their own."""
    rows, r = _rows(module), B.shape[1]
    k = A.shape[0] // max(r, 1)
    if rows is None or A.ndim != 2 or A.shape[0] != k * r or k < 1 or B.shape[0] % k:
        raise ValueError(
            f"expected factors [r, in] and [out, r] with out = {rows}, got {list(A.shape)} and "
            f"{list(B.shape)}"
        )
    size = B.shape[0] // k
    if rows % size:
        raise ValueError(f"expected parts that divide the {rows} outputs, got parts of {size}")
    n = rows // size
    enabled = [True] * n if k == n else list(enable_lora or ())
    if len(enabled) != n or sum(enabled) != k:
        raise ValueError(
            f"expected enable_lora= with {k} of {n} parts on (loralib's argument of MergedLinear, "
            f"which its files do not hold), got {enable_lora}"
        )
    whole = B.new_zeros(rows, k * r)
    for part, place in enumerate(i for i, on in enumerate(enabled) if on):
        rows_of = slice(place * size, (place + 1) * size)
        whole[rows_of, part * r : (part + 1) * r] = B[part * size : (part + 1) * size]
    return A.contiguous(), whole, float(k)
