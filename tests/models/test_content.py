"""Which tensors were written to: content at one moment, compared with a later one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_peft.models.content import changed_tensors, content_hash, take_content

SHAPES = [(), (1,), (7,), (3, 5), (64, 128), (300, 257), (2, 64, 96)]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool):
            drawn = torch.randint(0, 100, shape, generator=generator)
            found.append((drawn > 50) if dtype is torch.bool else drawn.to(dtype))
    return found


@pytest.mark.parametrize("t", tensors(), ids=lambda t: f"{t.dtype} {list(t.shape)}")
def test_any_single_element_changes_the_hash(t: Tensor) -> None:
    before = content_hash(t)
    assert content_hash(t.clone()) == before
    flat = t.clone().reshape(-1)
    for i in {0, flat.numel() // 2, flat.numel() - 1}:
        changed = flat.clone()
        changed[i] = ~changed[i] if t.dtype is torch.bool else changed[i] + 1
        assert content_hash(changed.reshape(t.shape)) != before


def test_exchanged_rows_change_the_hash() -> None:
    t = torch.randn(512, 512)
    for i, j in ((0, 1), (3, 200), (0, 256)):
        changed = t.clone()
        changed[[i, j]] = changed[[j, i]]
        assert content_hash(changed) != content_hash(t)


def test_shape_dtype_and_layout() -> None:
    t = torch.randn(40, 60)
    assert content_hash(t) == content_hash(t.T.contiguous().T)
    assert content_hash(t) != content_hash(t.reshape(60, 40))
    assert content_hash(torch.zeros(4)) != content_hash(torch.zeros(4, dtype=torch.int32))
    assert content_hash(torch.zeros(2)) != content_hash(-torch.zeros(2))  # the sign of zero


def changed(before: Tensor, after: Tensor) -> bool:
    return list(changed_tensors(take_content({"t": before}), {"t": after})) == ["t"]


def test_a_move_or_a_conversion_is_no_change() -> None:
    t = torch.randn(70, 70)
    t[0, 0] = math.nan
    assert not changed(t, t.clone())
    entries = take_content({"t": t})
    assert not list(changed_tensors(entries, {"t": t.to(torch.bfloat16)}))
    written = t.to(torch.bfloat16)
    written[3, 3] = 5
    assert list(changed_tensors(entries, {"t": written})) == ["t"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_conversion_of_a_small_tensor_is_no_change(dtype: torch.dtype) -> None:
    """Its one sample is a view with a large stride until it is copied."""
    t = torch.randn(8, 8)
    assert not changed(t, t.to(dtype))
    assert content_hash(t.reshape(-1)[::64]) == content_hash(t.reshape(-1)[:1].clone())


LARGE = (2100, 2100)  # 17.6 MB


def test_a_large_tensor_is_hashed_again_only_if_something_hints_at_a_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = torch.zeros(LARGE)
    entries = take_content({"t": t})
    hashed: list[int] = []
    monkeypatch.setattr(
        "lightning_peft.models.content.content_hash", lambda x: hashed.append(1) or content_hash(x)
    )
    assert not list(changed_tensors(entries, {"t": t}))
    assert not hashed
    t += 0  # raises the version, changes nothing
    assert not list(changed_tensors(entries, {"t": t}))
    assert hashed == [1]
    t[5, 7] += 1
    assert list(changed_tensors(entries, {"t": t})) == ["t"]


def test_a_write_past_the_version_counter_is_found_in_every_row() -> None:
    t = torch.zeros(LARGE)
    entries = take_content({"t": t})
    t.data[1234] = 1  # `.data` has a version counter of its own
    assert list(changed_tensors(entries, {"t": t})) == ["t"]


def test_what_is_missed() -> None:
    """One element of a large tensor, past the version counter, where no sample lies."""
    t = torch.zeros(LARGE)
    entries = take_content({"t": t})
    t.data[0, 1] = 1
    assert not list(changed_tensors(entries, {"t": t}))
