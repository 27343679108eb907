"""Which tensors were written to: content at one moment, compared with a later one."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_peft.models import content
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


WIDE = [(512, 512), (2048, 1024), (1000, 777)]
NUMBERS = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_changed_signs_change_the_hash(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A sign is the top bit of a word, which a product modulo a power of two never spreads."""
    t = torch.randn(shape, dtype=dtype)
    before = content_hash(t)
    assert content_hash(-t) != before
    for chosen in ([3], [3, 67], [0, 128], list(range(0, 500, 2))):
        for i in (chosen, (slice(None), chosen)):
            changed = t.clone()
            changed[i] *= -1
            assert content_hash(changed) != before
    if dtype.is_complex:
        assert content_hash(t.conj().resolve_conj()) != before


def test_rows_of_signs_alone_are_told_apart() -> None:
    t = torch.randint(0, 2, (1024, 1024)).mul_(2).sub_(1).float()
    for i, j in ((0, 1), (3, 200), (0, 512)):
        changed = t.clone()
        changed[[i, j]] = changed[[j, i]]
        assert content_hash(changed) != content_hash(t)
        assert content_hash(changed.T.contiguous()) != content_hash(t.T.contiguous())


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_blocks_of_rows_give_the_sum_that_one_product_gives(rows: int) -> None:
    """A GPU computes by blocks, and the hash of a tensor that is moved there stays what it is."""
    words = torch.randint(-(2**63), 2**63 - 1, (rows, 2039))
    weights = content._weights(rows)
    assert bool((weights % 2 == 1).all())
    assert len(set(weights.tolist())) == rows
    columns = zip(*words[:, :20].tolist(), strict=True)  # Python's integers have no limit
    exact = [sum(map(operator.mul, column, weights.tolist())) % 2**64 for column in columns]
    total = content._weighted_sum(words)
    assert [n % 2**64 for n in total[:20].tolist()] == exact
    assert torch.equal(content._weighted_sum_by_blocks(words, weights), total)


def test_exchanged_words_of_one_column_change_the_hash() -> None:
    """1 and 0.5 differ in nine high bits; weights that differ in low bits keep these."""
    t = torch.ones(2_000_000)
    t[::2] = 0.5
    for distance in (1, 7, 63, 65):  # rows
        changed = t.clone()
        i, j = 100, 101 + 2 * 2039 * distance  # in one column of 64-bit words, unlike places
        changed[[i, j]] = changed[[j, i]]
        assert changed[i] != t[i]
        assert content_hash(changed) != content_hash(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_even_numbers_of_signs(dtype: torch.dtype) -> None:
    """All signs of a whole number of rows; the signs of two values in one column of words."""
    t = torch.randn(2039 * 8 * 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert content_hash(-t) != content_hash(t)
    per_word = 8 // dtype.itemsize
    for rows in (1, 2, 4):
        changed = t.clone()
        changed[[100 * per_word, (100 + 2039 * rows) * per_word]] *= -1
        assert content_hash(changed) != content_hash(t)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_hash_what_one_thread_hashes() -> None:
    held = {f"{i}": torch.randn(300 + 100 * i, 512) for i in range(8)}
    held["turned"] = torch.randn(700, 900).T
    assert len(content._shares(held)) == 2
    entries = take_content(held)
    assert {n: entry.digest for n, entry in entries.items() if entry is not None} == {
        n: content_hash(t) for n, t in held.items()
    }
    for name in ("2", "turned", "7"):
        held[name].data[1, 1] += 1
    held["new"] = torch.zeros(3)
    assert changed_tensors(entries, held) == ["2", "7", "turned", "new"]


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
