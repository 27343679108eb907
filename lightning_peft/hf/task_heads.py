"""An adapter trained under a task head, for the bare base or for another head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.hf.keys import PREFIX
from lightning_peft.methods.base import HFFormat
from lightning_peft.models.modules import head_names

__all__ = ["Heads", "without_heads"]

#: ``"load"``: trained heads are loaded; ``"skip"``: they are left out.
Heads = Literal["load", "skip"]


def without_heads(
    top: nn.Module, fmt: HFFormat, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return (config, tensors, note) without trained heads, in the names of `top`.

    A trained module counts as a head if `top` has none of its name, or has it as its output head.
    If `top` is the base inside of the model that was trained, the names lose the base's prefix.
    """
    modules = dict(top.named_modules())
    inner = _inner(top, modules, tensors)
    heads = {name.rpartition(".")[2] for name in head_names(top)}
    saved = tuple(config.get("modules_to_save") or ())
    kept: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for key, tensor in tensors.items():
        root = PREFIX if key.startswith(PREFIX) else fmt.saved_prefix
        path = key.removeprefix(root).removeprefix(inner)
        owner = _saved_module(path, saved)
        if owner and (owner not in modules or owner.rpartition(".")[2] in heads):
            dropped.add(owner)
        else:
            kept[f"{root}{path}" if key.startswith(root) else key] = tensor
    renamed = _renamed(config, inner) if inner else dict(config)
    names = [s for s in saved if any(n.endswith(s) for n in modules if n and n not in dropped)]
    names = [s for s in names if s.rpartition(".")[2] not in heads]
    renamed["modules_to_save"] = names or None
    note = f"left out the trained heads {sorted(dropped)}" if dropped else ""
    return renamed, kept, note


def _inner(top: nn.Module, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix, with its dot, that the file's names have before those of `top`; or ""."""
    name = getattr(top, "base_model_prefix", "")
    used = [k for k in tensors if k.startswith(f"{PREFIX}{name}.")]
    return f"{name}." if name and used and name not in modules else ""


def _saved_module(path: str, saved: tuple[str, ...]) -> str:
    """Return the trained module that a tensor's path lies in; "" for none."""
    parts = path.split(".")
    parents = (join(*parts[:i]) for i in range(1, len(parts)))
    return next((p for p in parents if saved and p.endswith(saved)), "")


def _renamed(config: Mapping[str, Any], inner: str) -> dict[str, Any]:
    """Return the config with names that begin in `top`."""
    found = dict(config)
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        value = found.get(key)
        if isinstance(value, list):
            found[key] = [v.removeprefix(inner) for v in value]
        elif isinstance(value, str) and value != "all-linear" and key == "target_modules":
            found[key] = None  # a pattern of full names: the tensors say which
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(found.get(key), dict):
            found[key] = {
                k.removeprefix(inner).removeprefix(re.escape(inner)): v
                for k, v in found[key].items()
            }
    return found
