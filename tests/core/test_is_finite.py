"""`is_finite` finds NaN and infinity wherever they are, and allows sums that overflow."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_peft.core.finite import is_finite

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(dtype: torch.dtype, bad: float) -> None:
    t = torch.randn(50, 70).to(dtype)
    assert is_finite(t)
    t[17, 3] = bad
    assert not is_finite(t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_that_cancel_are_found(dtype: torch.dtype) -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_a_sum_that_overflows_is_no_bad_value(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))


def test_other_kinds_of_tensors() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.ones(3, dtype=torch.int64))
    assert is_finite(torch.empty(3, device="meta"))
    assert is_finite(torch.ones(3).to(torch.float8_e5m2))
    assert not is_finite(torch.tensor([1.0, math.nan]).to(torch.float8_e5m2))
    assert is_finite(torch.ones([1] * 70))
    assert is_finite(torch.ones(3, requires_grad=True))
