"""Stored verdicts and races: whatever a file holds, reading it gives entries or one warning."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_peft_kernels import verdicts
from lightning_peft_kernels.races import Race, measured, read_races, use_races
from lightning_peft_kernels.verdicts import (
    Key,
    Kind,
    Verdict,
    device_key,
    file_of,
    read_verdicts,
    store_verdicts,
)

CPU = torch.device("cpu")
VERDICT = asdict(Verdict("scale", "float16", "ok", "", 12.5))
RACE = asdict(Race("product", "bfloat16", (64, 32), 4, "bf16", {"bf16": 1.0, "dequantize": 2.0}))
KINDS: tuple[tuple[Kind, str, dict[str, Any]], ...] = (
    ("kernels", "verdicts", VERDICT),
    ("races", "races", RACE),
)
#: One value of every type of JSON, odd ones among them.
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "4", "", [], ["a"], [[1]], [1.5],
    [0, 0], {}, {"a": "b"}, {"bf16": None},
)  # fmt: skip
READERS: dict[Kind, Callable[[Key], Any]] = {"kernels": read_verdicts, "races": read_races}
# What is odd elsewhere is right in these fields.
FINE: dict[tuple[Kind, str], tuple[Any, ...]] = {
    ("kernels", "op"): ("4", ""),
    ("kernels", "configuration"): ("4", ""),
    ("kernels", "detail"): ("4", ""),
    ("kernels", "microseconds"): (0, 1.5),
    ("races", "tokens"): (10**400,),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the user's cache, and what this process knows, out of the tests."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(folder))
    monkeypatch.setattr(verdicts, "_hash_of_sources", lambda: "sources")
    yield folder
    use_races(CPU, [])


def read(kind: Kind, text: str) -> tuple[list[Any], list[str]]:
    """Return what a file gives, and the warnings of two readings."""
    key = device_key(CPU)
    file_of(key, kind).write_text(text)
    verdicts._WARNED.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = READERS[kind](key)
        assert READERS[kind](key) == found
    return list(found), [str(warning.message) for warning in told]


def is_refused(kind: Kind, name: str, entries: Any) -> str:
    """Assert that entries give one warning and nothing else; return the warning."""
    found, told = read(kind, json.dumps({"key": device_key(CPU), name: entries}))
    assert found == []
    (warning,) = told
    assert f"expected {name} on kernels for" in warning
    assert "count as unchecked" in warning
    return warning


@pytest.mark.parametrize(("kind", "name", "entry"), KINDS)
def test_every_field_with_every_other_type(kind: Kind, name: str, entry: dict[str, Any]) -> None:
    tried = 0
    for field in entry:
        for value in ODD:
            fine = FINE.get((kind, field), ())
            if any(type(value) is type(v) and value == v for v in fine):
                continue
            warning = is_refused(kind, name, [entry, {**entry, field: value}])
            assert f"({field}: expected " in warning, (field, value)
            if value == ["a"] and field != "shape":  # what is in the file, as it is there
                assert ", got ['a'])" in warning
            tried += 1
    assert tried > 80


@pytest.mark.parametrize(("kind", "name", "entry"), KINDS)
def test_entries_and_files_of_another_form(kind: Kind, name: str, entry: dict[str, Any]) -> None:
    for entries in (*ODD[:11], {}, {"a": 1}):
        if not isinstance(entries, list):
            assert f"({name}: expected a list, got" in is_refused(kind, name, entries)
    for one in ODD:
        told = is_refused(kind, name, [one])
        assert ("expected entries with" if isinstance(one, dict) else "expected an object") in told
    assert "expected entries with" in is_refused(kind, name, [{**entry, "more": 1}])
    first = next(iter(entry))
    assert "expected entries with" in is_refused(
        kind, name, [{k: v for k, v in entry.items() if k != first}]
    )
    for text in ("", "null", "[]", '"x"', "{}", "5", "NaN", "{", "[" * 100_000):
        found, told_of = read(kind, text)
        assert (found, len(told_of)) == ([], 1), text[:20]
    assert f"expected an object with key and {name}, got {{}}" in read(kind, "{}")[1][0]
    assert read(kind, json.dumps({"key": device_key(CPU), name: [entry]}))[1] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"winner": "grouped"}, "winner: expected one of"),
        ({"question": "colour"}, "question: expected one of"),
        ({"dtype": "nn"}, "dtype: expected the name of a dtype"),
        ({"shape": [64]}, "shape: expected 2 positive integers for product"),
        ({"microseconds": {"dequantize": 1.0}}, "microseconds: expected finite times"),
        ({"microseconds": {"bf16": 1.0, "triton": 1.0}}, "microseconds: expected finite times"),
    ],
)
def test_races_that_fit_no_question(change: dict[str, Any], told: str) -> None:
    assert told in is_refused("races", "races", [{**RACE, **change}])


def test_a_damaged_file_leaves_the_rule() -> None:
    file_of(device_key(CPU), "races").write_text(
        json.dumps({"key": device_key(CPU), "races": [{**RACE, "shape": 5}]})
    )
    from lightning_peft_kernels import races

    races._READ.discard(CPU)
    with pytest.warns(UserWarning, match="shape: expected 2 positive integers for product, got 5"):
        assert measured("product", CPU, torch.bfloat16, (64, 32)) == ()


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    key = device_key(CPU)
    monkeypatch.delenv("LIGHTNING_PEFT_CACHE")
    usual = file_of(key)
    assert usual.parent == tmp_path / ".cache" / "lightning_peft"
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", "")
    assert file_of(key) == usual
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", "~/mine")
    assert file_of(key).parent == tmp_path / "mine"


def test_no_part_of_a_file_is_left(cache: Path) -> None:
    key = device_key(CPU)
    file_of(key).mkdir()
    assert "not written" in store_verdicts(key, {})
    assert os.listdir(cache) == [file_of(key).name]
    file_of(key).rmdir()
    assert store_verdicts(key, {}) == ""
    assert os.listdir(cache) == [file_of(key).name]
