"""Inside `unchanged_modules` a tree is walked once; afterwards, a change is seen."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_peft.core import modules
from lightning_peft.core.modules import base_modules, unchanged_modules


def test_a_tree_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[nn.Module] = []
    collect = modules._collect

    def counting(parent: nn.Module, *args: object, **options: bool) -> None:
        walks.append(parent)
        collect(parent, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(modules, "_collect", counting)
    tree = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with unchanged_modules():
        first = base_modules(tree)
        first.pop("1")
        with unchanged_modules():
            assert list(base_modules(tree)) == ["", "0", "1"]
        assert list(base_modules(tree)) == ["", "0", "1"]
        assert walks == [tree]
    tree.append(nn.Linear(2, 2))
    assert list(base_modules(tree)) == ["", "0", "1", "2"]


@unchanged_modules()
def walk_and_fail(tree: nn.Module) -> None:
    base_modules(tree)
    raise KeyError


def test_an_error_ends_it() -> None:
    tree = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError):
        walk_and_fail(tree)
    tree.append(nn.Linear(2, 2))
    assert list(base_modules(tree)) == ["", "0", "1"]
