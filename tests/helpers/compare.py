"""Comparisons that name the quantity and say by how much it is off."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest error, relative to the largest magnitude, that a few hundred roundings explain.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, in fp64; absolute where `want` is zero throughout."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if want.numel() == 0:
        return 0.0
    largest = want.abs().max().item()
    return (got - want).abs().max().item() / (largest or 1.0)


def assert_close(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    same_dtype: Tensor | None = None,
    floor: float | None = None,
) -> None:
    """`got` is as near to the oracle as its dtype allows.

    With `same_dtype`, what plain torch computes in the dtype of `got`:
    err(got, want) <= 2 err(same_dtype, want) + floor, floor one rounding of the dtype.
    Without it: err(got, want) <= floor, by default `FLOOR[got.dtype]`.

    Args:
        name: the quantity, for the message ("dA", "logits after merge").
        got: ours.
        want: the oracle, in fp64 where there is one.
        same_dtype: the same quantity by plain torch in the dtype under test.
        floor: replaces the default floor.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    bad = int((~torch.isfinite(got)).sum())
    assert bad == 0, f"{name}: {bad} of {got.numel()} values are not finite"
    assert torch.isfinite(want).all(), f"{name}: the oracle itself is not finite"
    error = relative_error(got, want)
    if same_dtype is None:
        bound = FLOOR[got.dtype] if floor is None else floor
        rule = f"{bound:.2e}"
    else:
        theirs = relative_error(same_dtype, want)
        least = torch.finfo(got.dtype).eps if floor is None else floor
        bound = 2 * theirs + least
        rule = f"2 x {theirs:.2e} (torch in {got.dtype}) + {least:.1e}"
    assert error <= bound, f"{name}: relative error {error:.3e}, allowed {rule}"


def assert_same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Same shape, dtype and bits: NaN equals the same NaN, -0.0 differs from 0.0."""
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if got.numel() == 0:
        return
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (got, want))
    width = got.element_size()
    differing = int((a.view(-1, width) != b.view(-1, width)).any(dim=1).sum())
    assert differing == 0, f"{name}: {differing} of {got.numel()} values differ in their bits"
