"""Names that a model's parameters have in its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.hf.joined_files import JoinedFiles
from lightning_peft.hf.legacy_names import namings

__all__ = ["stored_names"]


def stored_names(model: nn.Module, files: JoinedFiles) -> dict[str, str]:
    """Map each parameter to its name in the files, tied parameters under each of their names.

    The files may have the names of transformers 4, and more or less of the base model's prefix.
    The spelling with the most names that are stored counts.
    """
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if not in_adapter(n)]
    spellings = _spellings(model, names)
    stored = files.stored
    best = max(spellings, key=lambda spelling: sum(key in stored for key in spelling.values()))
    renamed = {name: key for name, key in files.names.items() if best.get(name) not in stored}
    return best | renamed | {name: name for name in files.parts}


def _spellings(model: nn.Module, names: list[str]) -> Iterator[dict[str, str]]:
    prefix = getattr(model, "base_model_prefix", "") or ""
    for naming in ({}, *namings(model)):
        renamed = {name: _renamed(name, naming) for name in names}
        yield renamed
        if prefix:
            yield {name: key.removeprefix(f"{prefix}.") for name, key in renamed.items()}
            yield {name: join(prefix, key) for name, key in renamed.items()}


def _renamed(name: str, naming: Mapping[str, str]) -> str:
    owner, _, leaf = name.rpartition(".")
    return join(naming.get(owner, owner), leaf)
