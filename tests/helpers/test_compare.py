"""The helpers fail when they should: a comparison that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.compare import assert_close, assert_same_bits, relative_error

ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (torch.ones(3) * 1.001, "relative error 1.0"),
        (torch.ones(2), r"shape \(2,\), want \(3,\)"),
        (torch.tensor([1.0, float("nan"), 1.0]), "1 of 3 values are not finite"),
        (torch.zeros(3), r"relative error 1\.000e\+00"),
    ],
)
def test_close_refuses(got: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^delta: {message}"):
        assert_close("delta", got, ONES)


def test_close_scales_with_what_torch_loses() -> None:
    theirs = ONES.float() * 1.01
    assert_close("delta", ONES.float() * 1.015, ONES, same_dtype=theirs)
    with pytest.raises(AssertionError, match=r"2 x 1\.00e-02 \(torch in torch\.float32\)"):
        assert_close("delta", ONES.float() * 1.025, ONES, same_dtype=theirs)


def test_error_of_a_zero_oracle_is_absolute() -> None:
    assert relative_error(torch.full((2,), 0.25), torch.zeros(2)) == 0.25


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])),
        (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0 + 2**-23])),
    ],
)
def test_bits_refuse(got: torch.Tensor, want: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="base: 1 of 2 values differ"):
        assert_same_bits("base", got, want)


def test_bits_accept_the_same_nan() -> None:
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16)
    assert_same_bits("base", nan, nan.clone())
