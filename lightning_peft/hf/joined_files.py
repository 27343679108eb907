"""A model directory in which the weights of single experts are read as the fused weights they form.

transformers 5 holds the experts of a layer as one tensor; most files hold a tensor per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.hf.model_files import ModelFiles, StoredShape
from lightning_peft.models.saving import is_transformers_model

__all__ = ["ExpertPart", "JoinedFiles"]


@dataclass(frozen=True)
class ExpertPart:
    """A stored tensor that is a part of a fused weight.

    Attributes:
        key: Its key in the files.
        expert: Index of the expert.
        first: First row in the expert's matrix.
        rows: Number of rows.
    """

    key: str
    expert: int
    first: int
    rows: int

    def cut(self, fused: Tensor) -> Tensor:
        """Return this part of a fused weight."""
        return fused[self.expert, self.first : self.first + self.rows]


class JoinedFiles:
    """`ModelFiles` with the fused weights of a model as further tensors.

    Args:
        files: The files.
        model: The model; one of another library has no fused weights in parts.

    Attributes:
        directory: The directory.
        stored: Shape and place of the tensors in the files.
        tensors: The same, and the fused weights by parameter name.
        names: Key in the files by parameter name, for tensors that are only renamed.
        parts: Parts by parameter name.
        fused: (parameter name, part) by key in the files.
    """

    def __init__(self, files: ModelFiles, model: nn.Module) -> None:
        self._files = files
        self.directory = files.directory
        self.stored = files.tensors
        self.names: dict[str, str] = {}
        self.parts: dict[str, list[ExpertPart]] = {}
        self.tensors = dict(files.tensors)
        if is_transformers_model(model):
            self._match(model)
        self.fused = {p.key: (name, p) for name, parts in self.parts.items() for p in parts}

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; a fused weight is put together from its parts."""
        if name not in self.parts:
            return self._files.read(name)
        joined: Tensor | None = None
        for part in self.parts[name]:
            tensor = self._files.read(part.key)
            if joined is None:
                joined = torch.empty(self.tensors[name].shape, dtype=tensor.dtype)
            part.cut(joined).copy_(tensor)
        assert joined is not None  # no list of parts is empty
        return joined

    def _match(self, model: nn.Module) -> None:
        """Find the parameters behind the stored keys, by transformers' own rules of loading."""
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if not in_adapter(n)}
        renames, joins = _rules(model)
        found: dict[str, dict[int, list[str]]] = {}
        for key in self.stored:
            target, source = _target(key, renames, joins)
            name = next((n for n in _spellings(model, target) if n in shapes), "")
            if not name or name in self.stored:
                continue
            if source is None:
                self.names[name] = key
            else:
                found.setdefault(name, {}).setdefault(source, []).append(key)
        for name, sources in found.items():
            parts = _parts(sources, self.stored)
            if _covers(parts, self.stored, shapes[name]):
                first = self.stored[parts[0].key]
                self.parts[name] = parts
                self.tensors[name] = StoredShape(first.file, first.dtype, shapes[name])


def _rules(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return the rules that rename keys, and those that stack experts by key."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model, add_legacy=False)
    renames = [r for r in rules if not hasattr(r, "operations")]
    return renames, [r for r in rules if hasattr(r, "operations") and _stacks_experts(r)]


def _stacks_experts(rule: Any) -> bool:
    """Whether a rule stacks matrices, of one kind or of several that are joined by rows."""
    done = [(type(o).__name__, getattr(o, "dim", None)) for o in rule.operations]
    return done in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _target(key: str, renames: list[Any], joins: list[Any]) -> tuple[str, int | None]:
    """Return the name that a stored key leads to, and which of the joined kinds it is, if any."""
    for rule in renames:
        key, _ = rule.rename_source_key(key)
    for rule in joins:
        target, pattern = rule.rename_source_key(key)
        if pattern is not None:
            return target, rule.source_patterns.index(pattern)
    return key, None


def _spellings(model: nn.Module, name: str) -> list[str]:
    prefix = getattr(model, "base_model_prefix", "") or ""
    return [name, join(prefix, name), name.removeprefix(f"{prefix}.")]


def _parts(sources: Mapping[int, list[str]], stored: Mapping[str, StoredShape]) -> list[ExpertPart]:
    parts: list[ExpertPart] = []
    first = 0
    for _, keys in sorted(sources.items()):
        rows = stored[keys[0]].shape[0]
        ordered = sorted(keys, key=_natural)
        parts += [ExpertPart(key, e, first, rows) for e, key in enumerate(ordered)]
        first += rows
    return parts


def _natural(key: str) -> list[tuple[int, str]]:
    """Order of names with numbers in them: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _covers(
    parts: list[ExpertPart], stored: Mapping[str, StoredShape], shape: tuple[int, ...]
) -> bool:
    """Whether the parts fill a fused weight, each element once."""
    experts = 1 + max(part.expert for part in parts)
    height = max(part.first + part.rows for part in parts)
    width = stored[parts[0].key].shape[-1]
    even = all(stored[part.key].shape == (part.rows, width) for part in parts)
    filled = sum(part.rows for part in parts) == experts * height
    return even and filled and shape == (experts, height, width)
