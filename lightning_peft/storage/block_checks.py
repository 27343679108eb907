"""Checks of block-scaled tensors as they arrive: dtypes, shapes, and values no encoder writes."""

from __future__ import annotations

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout
from torch import Tensor

__all__ = ["check_codes", "check_outer", "check_scales"]

_CODES: dict[str, tuple[torch.dtype, ...]] = {
    "e4m3": (torch.float8_e4m3fn,),
    "int8": (torch.int8,),
    "e2m1": (torch.uint8, torch.int8),
    "int4": (torch.uint8, torch.int32),
    "uint4": (torch.uint8, torch.int32),
}
_DAMAGED = "the file is damaged: download it again"


def check_codes(label: str, codes: Tensor, shape: tuple[int, ...], layout: BlockLayout) -> None:
    """Check the codes of one weight.

    Raises:
        ValueError: another dtype or shape, or codes that are no numbers.
    """
    _check_local(label, codes)
    _check_dtype(label, codes, _CODES[layout.element])
    if codes.shape != torch.Size(shape):
        raise _wrong_shape(label, codes, shape)
    if codes.device.type != "meta" and layout.element == "e4m3":
        bad = _count_nan_codes(codes.detach())
        if bad:
            raise ValueError(
                f"{label}: expected codes of numbers, got {bad} NaN of {codes.numel()}; {_DAMAGED}"
            )


def check_scales(
    label: str, scales: Tensor, shape: tuple[int, ...], layout: BlockLayout, *, allow_zero: bool
) -> None:
    """Check the scales of one weight.

    Raises:
        ValueError: another dtype or shape, or scales that are not finite and positive.
    """
    _check_local(label, scales)
    power = layout.scale == "e8m0"
    _check_dtype(label, scales, (layout.scale_dtype, *((torch.uint8,) if power else ())))
    size = torch.Size(shape)
    per_tensor = not layout.rows and not layout.columns
    if scales.shape != size and not (per_tensor and scales.numel() == size.numel()):
        raise _wrong_shape(label, scales, shape)
    if scales.device.type == "meta":
        return
    if power:
        _check_powers(label, scales.detach())
    else:
        _check_positive(label, scales.detach(), allow_zero)


def check_outer(label: str, outer: Tensor) -> None:
    """Check the scale of a whole weight, by which its scales are multiplied.

    Raises:
        ValueError: it is not finite and positive.
    """
    values = outer.detach().float()
    if outer.device.type != "meta" and not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError(
            f"{label}: expected a finite positive number, got {values.reshape(-1)[:4].tolist()}; "
            f"{_DAMAGED}"
        )


def _check_local(label: str, t: Tensor) -> None:
    if hasattr(t, "to_local"):
        raise ValueError(
            f"{label}: expected a tensor of this process alone, got a DTensor; attach before "
            "the model is sharded, and load it without tp_plan"
        )


def _check_dtype(label: str, t: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in wanted:
        names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
        raise ValueError(
            f"{label}: expected {names}, got {str(t.dtype).removeprefix('torch.')}; load the "
            "checkpoint again and do not cast the model"
        )


def _wrong_shape(label: str, t: Tensor, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{label}: expected shape {list(shape)}, got {list(t.shape)}; the file does not "
        "belong to this model or was converted with another block size"
    )


def _check_powers(label: str, t: Tensor) -> None:
    bad = int((t.view(torch.uint8) == 255).sum()) if t.ndim else int(t.float().isnan())
    if bad:
        raise ValueError(f"{label}: expected powers of two, got {bad} NaN; {_DAMAGED}")


def _check_positive(label: str, t: Tensor, allow_zero: bool) -> None:
    values = t.float()
    for what, wrong in (
        ("finite", ~values.isfinite()),
        ("positive", values < 0 if allow_zero else values <= 0),
    ):
        bad = int(wrong.sum())
        if bad:
            worst = values[wrong].reshape(-1)[0].item()
            raise ValueError(
                f"{label}: expected {what} scales, got {bad} of {t.numel()} that are not, the "
                f"first {worst}; {_DAMAGED}"
            )


def _count_nan_codes(t: Tensor) -> int:
    """Number of NaN codes of e4m3, some million codes at a time."""
    flat = t.reshape(-1).view(torch.uint8)
    found = 0
    for part in flat.split(1 << 22):
        if int((part & 127).max()) == 127:
            found += int(((part & 127) == 127).sum())
    return found
