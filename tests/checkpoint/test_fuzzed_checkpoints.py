"""Checkpoints with random damage: refused cleanly, or without effect on the resumed run."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.description import KEY
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, adapters_of, assert_same, trainer

pytestmark = pytest.mark.usefixtures("lightning_package")

SEED = int(os.environ.get("FUZZ_SEED", "20261130"))
VALUES: tuple[Any, ...] = (
    *(None, -1, 10**400, float("nan"), "x", [], {}, [1], {"x": 1}, 1e300, torch.zeros(3)),
    *(
        torch.full((2,), torch.nan),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.zeros([1] * 70),
    ),
)


class Scheduled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def peft(**options: Any) -> PEFT:
    method = LoRA(r=2, target_modules=["0", "3"])
    return PEFT(method, optimizer="adamw_8bit", modules_to_save=["5"], report=False, **options)


def resumed(path: Path) -> dict[str, Tensor]:
    model = Scheduled()
    pl.seed_everything(1, verbose=False)
    trainer(peft(), max_epochs=2).fit(model, ckpt_path=path, weights_only=True)
    return adapters_of(model)


@pytest.fixture(scope="module")
def written(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "a.ckpt"
    pl.seed_everything(1, verbose=False)
    run = trainer(peft(), max_epochs=1)
    run.fit(Scheduled())
    run.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def expected(written: Path) -> dict[str, Tensor]:
    return resumed(written)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place below a value, inner ones too."""
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and len(value) < 10:
        children = enumerate(value)
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def damage(content: dict[str, Any], rng: random.Random) -> tuple[tuple[Any, ...], bool]:
    """Replace or remove one value, somewhere.

    Returns:
        The changed place, and whether a run could have written the changed file.
    """
    groups: dict[Any, list[tuple[Any, ...]]] = {}
    for place in places(content):
        groups.setdefault(place[0], []).append(place)
    relevant = ("state_dict", "optimizer_states", "lr_schedulers", "loops", KEY, "global_step")
    place = rng.choice(groups[rng.choice(relevant)])
    parent: Any = content
    for key in place[:-1]:
        parent = parent[key]
    former, valid = parent[place[-1]], False
    if rng.random() < 0.15 and isinstance(parent, dict):
        del parent[place[-1]]
    elif isinstance(parent[place[-1]], Tensor) and rng.random() < 0.5:
        parent[place[-1]] = bad_tensor(parent[place[-1]], rng)
    else:
        parent[place[-1]] = value = rng.choice(VALUES)
        if isinstance(former, Tensor) and isinstance(value, Tensor):
            fits = former.shape == value.shape and former.dtype == value.dtype
            valid = fits and bool(value.isfinite().all())
    return place, valid


def bad_tensor(t: Tensor, rng: random.Random) -> Tensor:
    wrong = [lambda: t.flatten()[1:].clone(), lambda: torch.zeros(0), lambda: t.to(torch.complex64)]
    if t.is_floating_point():
        wrong += [lambda: t * torch.nan, lambda: t.to(torch.int32), lambda: t.double() + 1e300]
    return rng.choice(wrong)()


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 11))]
)
def test_a_damaged_checkpoint_is_refused_or_without_effect(
    written: Path, expected: dict[str, Tensor], tmp_path: Path, block: int
) -> None:
    whole = torch.load(written, weights_only=True)
    rng = random.Random(f"{SEED} {block}")
    for case in range(20):
        path = tmp_path / f"{case}.ckpt"
        place: Any
        valid = False
        if rng.random() < 0.2:
            content = bytearray(written.read_bytes())
            place = rng.randrange(len(content))
            content[place] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        else:
            changed = copy.deepcopy(whole)
            place, valid = damage(changed, rng)
            torch.save(changed, path)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = resumed(path)
        except (ValueError, pickle.UnpicklingError):
            found = expected
        if not valid:
            assert_same(found, expected)
        assert time.perf_counter() - start < 10, place


def test_every_flipped_bit_is_found(written: Path, tmp_path: Path) -> None:
    """Bits of the content; those of names and dates in the archive's directory may not matter."""
    want = dict(load_from_checkpoint(Plain, written).state_dict())
    content, rng = written.read_bytes(), random.Random(SEED)
    for _ in range(40):
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.ckpt").write_bytes(flipped)
        try:
            read = load_from_checkpoint(Plain, tmp_path / "a.ckpt")
        except (ValueError, pickle.UnpicklingError):
            continue
        assert_same(dict(read.state_dict()), want)


@pytest.mark.slow
def test_no_bit_of_a_small_file_changes_what_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.randn(4, 8), "b": torch.arange(5), "c": [1, 2.5, "x"]}
    atomic_file.write(content, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for place in range(8 * len(whole)):
        assert_refused_or_same(flip(whole, place), content, tmp_path)


def test_attributes_in_the_archives_directory_change_nothing(tmp_path: Path) -> None:
    """No checksum covers them; one marks a tensor as a folder, which torch reads as empty."""
    content: dict[str, Any] = {"a": torch.randn(4, 8), "b": torch.arange(5), "c": [1, 2.5, "x"]}
    atomic_file.write(content, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", whole)]
    assert len(entries) > 4
    for start in entries:
        for place in range(8 * (start + 36), 8 * (start + 42)):
            assert_refused_or_same(flip(whole, place), content, tmp_path)


def flip(content: bytes, place: int) -> bytes:
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    return bytes(flipped)


def assert_refused_or_same(flipped: bytes, want: dict[str, Any], folder: Path) -> None:
    (folder / "b.ckpt").write_bytes(flipped)
    try:
        got = atomic_file.read(folder / "b.ckpt")
    except (ValueError, pickle.UnpicklingError):
        return
    assert list(got) == list(want)
    assert torch.equal(got["a"], want["a"])
    assert torch.equal(got["b"], want["b"])
    assert got["c"] == want["c"]


def test_the_newest_undamaged_file_is_named_and_taken(tmp_path: Path) -> None:
    run = trainer(peft(), max_epochs=2, folder=tmp_path)
    run.fit(Scheduled())
    last = tmp_path / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[content.index(b"state_dict")] ^= 4  # in a record; between records lies padding
    last.write_bytes(content)
    (tmp_path / "epoch=1.ckpt").write_bytes(content)
    named = r"last\.ckpt.*newest undamaged.*epoch=0\.ckpt; take that one"
    with pytest.raises(ValueError, match=named + r", or give PEFT\(fall_back=True\)"):
        trainer(peft(), max_epochs=3).fit(Scheduled(), ckpt_path=last)
    with pytest.raises(ValueError, match=named + "$"):  # no callback, so no argument of it
        load_from_checkpoint(Scheduled, last)
    again = trainer(peft(fall_back=True), max_epochs=3)
    with pytest.warns(UserWarning, match=r"resuming from .*epoch=0\.ckpt"):
        again.fit(Scheduled(), ckpt_path=last)
    assert again.global_step == 12
