"""Renames the layers in an adapter's config and tensors.

Patterns are not rewritten as text. They are evaluated on the old names, and the layers they match
are listed under the new names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.name_patterns import ends_with_pattern, fullmatch
from lightning_peft.core.names import matches_suffix
from lightning_peft.hf.keys import PREFIX
from lightning_peft.hf.targets import compact_names, targeted
from lightning_peft.layers import adaptable
from lightning_peft.methods.base import HFFormat

__all__ = ["Renaming", "module_path", "renamed"]

#: Layouts whose first axis is the layer's output: split with it.
_BY_OUTPUT = ("up", "out")


@dataclass(frozen=True)
class Renaming:
    """A map from one set of layer names to another.

    Attributes:
        to: Name → names; several where one layer became several, the output split evenly, in order.
        modules: Name → its module in the model (the first of several).
        names: All layer names after renaming.
    """

    to: Mapping[str, Sequence[str]]
    modules: Mapping[str, nn.Module]
    names: Sequence[str]

    def one(self, name: str) -> str:
        """The only new name.

        Raises:
            ValueError: the layer became several.
        """
        if len(self.to[name]) != 1:
            raise ValueError(
                f"adapter file: {name!r}: expected a layer that is one layer here, got one that "
                f"became {list(self.to[name])}; only LoRA and DoRA are split; merge the adapter "
                "with the library it was made with"
            )
        return self.to[name][0]


def module_path(fmt: HFFormat, key: str) -> tuple[str, str, str]:
    """Split a tensor's key into the prefix, the module's path and the rest.

    The path is empty for a tensor that occurs once per model.
    """
    if key in fmt.prefix.values():
        return key, "", ""
    head = PREFIX if key.startswith(PREFIX) else fmt.saved_prefix
    if not key.startswith(head):
        return key, "", ""
    rest = key.removeprefix(head)
    suffixes = sorted({*fmt.tensors.values(), *fmt.lookup.values()}, key=len, reverse=True)
    suffix = next((s for s in suffixes if rest.endswith(f".{s}")), rest.rpartition(".")[2])
    path = rest[: -len(suffix)].removesuffix(".").partition(".base_layer")[0]
    return head, path, rest[len(path) :]


def renamed(
    fmt: HFFormat, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Renaming
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter under the new names.

    Raises:
        ValueError: a layer that became several, under a method that cannot be split.
    """
    adapted: set[str] = set()
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        head, path, tail = module_path(fmt, key)
        if not path or path not in names.to:
            out[key] = tensor
            continue
        if any(tail == f".{s}" for s in (*fmt.tensors.values(), *fmt.lookup.values())):
            adapted.add(path)
        for name, part in zip(names.to[path], _parts(fmt, tail, tensor, path, names), strict=True):
            out[f"{head}{name}{tail}"] = part
    return _config(fmt, config, names, sorted(adapted)), out


def _parts(
    fmt: HFFormat, tail: str, tensor: Tensor, path: str, names: Renaming
) -> Sequence[Tensor]:
    n = len(names.to[path])
    if n == 1:
        return [tensor]
    if fmt.peft_type != "LORA":
        names.one(path)
    layout = {f".{theirs}": fmt.axes.get(ours, "") for ours, theirs in fmt.tensors.items()}
    if layout.get(tail, "out") in (*_BY_OUTPUT, "vector") or tail == ".lora_B.bias":
        if tensor.shape[0] % n:
            raise ValueError(
                f"adapter file: {path}{tail}: expected {n} equal parts, got {list(tensor.shape)}"
            )
        return [t.contiguous() for t in tensor.chunk(n, dim=0)]
    return [tensor] * n


def _config(
    fmt: HFFormat, config: Mapping[str, Any], names: Renaming, adapted: Sequence[str]
) -> dict[str, Any]:
    new = dict(config)
    target = config.get("target_modules")
    if target is not None and target != "all-linear":
        # The head is found by the model itself, so the root is needed for "all-linear" alone.
        wants = targeted(config, nn.Module())
        chosen = [n for n, m in names.modules.items() if adaptable(m) and wants(n, m)]
        new["target_modules"] = compact_names(names.names, _flat(names, chosen))
        new.update(exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key)
        if isinstance(pattern, dict) and pattern:
            new[key] = _pattern(fmt, pattern, names, adapted)
    if config.get("modules_to_save"):
        new["modules_to_save"] = _saved(config["modules_to_save"], names)
    if config.get("feedforward_modules"):
        means = _feedforward(config["feedforward_modules"])
        new["feedforward_modules"] = "|".join(
            re.escape(n) for n in sorted(_flat(names, [a for a in adapted if means(a)]))
        )
    return new


def _flat(names: Renaming, chosen: Sequence[str]) -> set[str]:
    return {to for n in chosen for to in names.to[n]}


def _feedforward(rule: str | Sequence[str]) -> Callable[[str], bool]:
    if isinstance(rule, str):
        return lambda name: fullmatch(rule, name)
    return lambda name: name.endswith(tuple(rule))


def _pattern(
    fmt: HFFormat, pattern: Mapping[str, Any], names: Renaming, adapted: Sequence[str]
) -> dict[str, Any]:
    """Full names, longest first: a pattern also matches names that end in it."""
    if fmt.peft_type == "ADALORA":  # keyed by the tensor
        found = {
            f"{names.one(_ending(names, key.removesuffix('.lora_E')))}.lora_E": v
            for key, v in pattern.items()
        }
        return found
    values: dict[str, Any] = {}
    for name in adapted:
        for key, value in pattern.items():
            if isinstance(key, str) and ends_with_pattern(key, name):
                values.update(dict.fromkeys(names.to[name], value))
                break
    return dict(sorted(values.items(), key=lambda item: (-len(item[0]), item[0])))


def _ending(names: Renaming, name: str) -> str:
    found = [n for n in names.to if matches_suffix(n, [name])]
    return found[0] if found else name


def _saved(items: Sequence[str], names: Renaming) -> list[str]:
    """Items whose modules keep their names stay as they are."""
    new: list[str] = []
    for item in items:
        matched = [n for n in names.to if n.endswith(item)]
        same = all(list(names.to[n]) == [n] for n in matched)
        new += [item] if same else sorted(_flat(names, matched))
    return list(dict.fromkeys(new))
