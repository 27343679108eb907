"""Names of modules as Hugging Face peft reads and writes them in a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.core.modules import (
    base_modules,
    is_conv1d,
    require_module,
    tied_modules,
)
from lightning_peft.core.name_patterns import ends_with_pattern, fullmatch
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.layers import ops_for
from lightning_peft.methods.base import HFFormat
from lightning_peft.models.modules import input_embeddings, output_embeddings
from lightning_peft.models.saving import is_transformers_model

__all__ = [
    "compact",
    "compact_names",
    "declared_ties",
    "exact_targets",
    "misread_names",
    "model_root",
    "targeted",
    "targeted_weights",
    "tied_with",
    "ties_embeddings",
    "ties_rows",
]


def model_root(model: nn.Module, root: str | None = None) -> tuple[str, nn.Module]:
    """The module whose names the file uses, and its name inside `model`.

    `root` if given; else the one Hugging Face model inside `model` (itself, or a child of a
    LightningModule); else `model`.

    Raises:
        ValueError: `root` is no module of `model`.
    """
    require_module(model)
    if root is not None:
        try:
            return root, model.get_submodule(root)
        except AttributeError:
            children = [n for n, _ in model.named_children()]
            raise ValueError(
                f"root: expected a module of {type(model).__name__}, got {root!r}; its children "
                f"are {children}"
            ) from None
    found: list[tuple[str, nn.Module]] = []
    for name, module in base_modules(model).items():
        inside = any(name.startswith(f"{n}.") or not n for n, _ in found)
        if not inside and is_transformers_model(module):
            found.append((name, module))
    if len(found) == 1:
        return found[0]
    compiled = model._modules.get("_orig_mod")  # peft's names have no part for torch.compile
    return ("", model) if compiled is None else ("_orig_mod", compiled)


def targeted(config: Mapping[str, Any], root: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Return the rule by which peft adapts a module of this name under this config."""
    target = config.get("target_modules")
    if target == "all-linear":
        head = output_embeddings(root)
        return lambda name, module: (
            (isinstance(module, nn.Linear) or is_conv1d(module))
            and module is not head
            and not _excluded(config, name)
        )
    return lambda name, module: not _excluded(config, name) and _matches(config, name)


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    exclude = config.get("exclude_modules")
    if isinstance(exclude, str) and exclude:
        if fullmatch(exclude, name):
            return True
    elif exclude and matches_suffix(name, exclude):
        return True
    return any(
        re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name)
        for m in config.get("modules_to_save") or ()
    )


def _matches(config: Mapping[str, Any], name: str) -> bool:
    target = config.get("target_modules")
    if target is None:
        return False
    if isinstance(target, str):
        return fullmatch(target, name)
    if name in target:
        return True
    return matches_suffix(name, target) and _in_layers(config, name)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        index = _block_index(pattern, name)
        if index is not None:
            return index in (layers if isinstance(layers, list) else [layers])
    return False


def _block_index(pattern: str, name: str) -> int | None:
    """Return the number behind the first part of a name that the pattern matches."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        if parts[i].isdecimal() and ends_with_pattern(pattern, ".".join(parts[:i])):
            return int(parts[i])
    return None


def compact(root: nn.Module, adapted: Collection[str]) -> list[str] | str:
    """Return the shortest `target_modules` that selects exactly these modules.

    The result is suffixes, full names, or a regular expression. A weight of a module with several
    weights can be a target too, so no suffix may match one.
    """
    modules = {n: m for n, m in base_modules(root).items() if n}
    names = list(modules)
    for name, module in modules.items():
        ops = ops_for(module)
        weights = () if ops is None else ops.parameters(module)
        names += [f"{name}.{w}" for w in weights if len(weights) > 1]
    return compact_names(names, adapted)


def misread_names(root: nn.Module, fmt: HFFormat) -> Collection[str]:
    """Names by which peft knows the experts of the architecture from before transformers 5.

    A layer that bears one (a shared expert's, say) must be named by its weight: as a module peft
    takes it for the experts', and leaves it out.
    """
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    if fmt.peft_type != "LORA" or model_type is None:
        return ()
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    return _OLD_EXPERTS.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ())


#: Pattern of transformers' renaming → names that peft takes for experts and their router.
_OLD_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def targeted_weights(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether peft would adapt this weight under this config's ``target_parameters``."""
    targets = config.get("target_parameters") or ()
    return lambda name: matches_suffix(name, targets)


def tied_with(root: nn.Module, names: Collection[str]) -> set[str]:
    """Return the modules that share their weight with one of these modules."""
    groups = [set(group) for group in tied_modules(root)]
    return {name for group in groups if group & set(names) for name in group}


def ties_embeddings(root: nn.Module) -> bool:
    """Whether peft takes the model's embeddings for tied: it goes by the config."""
    return bool(getattr(getattr(root, "config", None), "tie_word_embeddings", False))


def ties_rows(root: nn.Module, embedding: nn.Module) -> bool:
    """Whether peft has the layers tied to this embedding read its trained rows."""
    return (
        ties_embeddings(root)
        and bool(getattr(root, "_tied_weights_keys", None))
        and input_embeddings(root) is embedding
    )


def declared_ties(root: nn.Module, name: str) -> set[str]:
    """Return the modules that the model's class ties to this one, whatever their tensors are."""
    keys = getattr(root, "_tied_weights_keys", None)
    if not isinstance(keys, dict):
        return set()
    modules = base_modules(root)
    tied = {k.rpartition(".")[0] for k, source in keys.items() if source == f"{name}.weight"}
    return tied & modules.keys()


def exact_targets(model: nn.Module, sites: Sequence[Site]) -> list[str] | str:
    """Return the `target_modules` that selects exactly these weights.

    A module of which only some weights are adapted is named by these weights.
    """
    modules: dict[str, list[Site]] = {}
    for site in sites:
        modules.setdefault(site.name, []).append(site)
    whole = {
        name
        for name, found in modules.items()
        if len(found) == len(found[0].ops.parameters(found[0].module))
        and ops_for(found[0].module) is not None
    }
    if len(whole) == len(modules):
        return compact(model, whole)
    single = [f"{n}.{s.parameter}" for n, found in modules.items() if n not in whole for s in found]
    return [*sorted(whole), *single]


def compact_names(names: Collection[str], adapted: Collection[str]) -> list[str] | str:
    """`compact` for layers known by name only."""
    wanted = set(adapted)
    by_leaf: dict[str, set[str]] = {}
    for name in names:
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(name)
    items: list[str] = []
    for leaf in sorted({n.rpartition(".")[2] for n in wanted}):
        mine = by_leaf.get(leaf, set()) & wanted
        items += [leaf] if by_leaf.get(leaf) == mine else sorted(mine)
    if {n for n in names if matches_suffix(n, items)} == wanted:
        return items
    return "|".join(re.escape(n) for n in sorted(wanted))
