"""Places of added modules: the branches of every transformer block, or modules that are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.site import BlockSite
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.models.block_table import BLOCKS, Block
from lightning_peft.models.target_modules import hf_models, name_rule
from lightning_peft.storage import storage_of

__all__ = ["block_site", "block_width", "find_block_placements"]

#: (name of the module whose output changes, role, name of the module whose input is read or "").
_Place = tuple[str, str, str]


def find_block_placements(
    model: nn.Module, method: Any
) -> list[tuple[BlockSite, nn.Module | None]]:
    """(site, module whose input is read instead of the site's own) of the usual places.

    Raises:
        ValueError: an architecture that the table does not have.
    """
    excluded = name_rule(method.exclude_modules)
    found: list[tuple[BlockSite, nn.Module | None]] = []
    types: list[str] = []
    for prefix, hf in hf_models(model):
        types.append(hf.config.model_type)
        block = BLOCKS.get(hf.config.model_type)
        if block is None:
            continue
        for name, role, tap in _places(hf, block, method.where):
            full = f"{prefix}.{name}" if prefix else name
            if not excluded(full):
                site = block_site(full, hf.get_submodule(name), role, _width(hf, name))
                if tap:
                    site.width_in = site.width_out
                found.append((site, hf.get_submodule(tap) if tap else None))
    if not found:
        raise ValueError(
            f"{method.label}: expected a Hugging Face transformer of the table to choose places "
            f"by, got {types or type(model).__name__}; name the modules behind (or, for "
            f"style='parallel', beside) which to act in target_modules; known: {sorted(BLOCKS)}"
        )
    return found


def _places(hf: nn.Module, block: Block, where: str) -> Iterator[_Place]:
    """In the order of `named_modules`."""
    modules = {n: m for n, m in hf.named_modules() if "peft" not in n.split(".")}
    for name in modules:
        attention = _ends(name, block.attention)
        feedforward = not attention and _ends(name, block.feedforward)
        if where == "branches" and (attention or feedforward):
            yield name, "output", ""
        elif where == "residual" and feedforward:
            norm = _upwards(modules, name, block.norm) if block.norm else ""
            yield (norm, "norm", "") if norm else (_item(modules, name), "output", "")
        elif where == "beside" and feedforward:
            yield name, "beside", _stream(modules, name, block)


def _stream(modules: dict[str, nn.Module], name: str, block: Block) -> str:
    for wanted in block.stream.split():
        found = _upwards(modules, name, wanted)
        if found:
            return found
    raise ValueError(
        f"{name!r}: expected a module named {block.stream!r} in its block, whose input is the "
        "stream that enters the feed-forward branch, found none; name feed-forward modules in "
        "target_modules"
    )


def _ends(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(name == s or name.endswith(f".{s}") for s in suffixes)


def _upwards(modules: dict[str, nn.Module], name: str, wanted: str) -> str:
    """The nearest module of that name in or above `name`."""
    while name:
        if f"{name}.{wanted}" in modules:
            return f"{name}.{wanted}"
        name = name.rpartition(".")[0]
    return ""


def _item(modules: dict[str, nn.Module], name: str) -> str:
    """The nearest enclosing entry of an `nn.ModuleList`."""
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(modules.get(parent), nn.ModuleList):
            return name
        name = parent
    return name


def _width(hf: Any, name: str) -> int:
    """Features of the stream that a module inside a block writes to."""
    own = block_width(hf.get_submodule(name))
    if own:
        return own
    config = hf.config
    for part in ("vision", "text"):  # two towers of different width
        if f"{part}_model" in name.split("."):
            config = getattr(config, f"{part}_config", config)
    config = config.get_text_config() if config is hf.config else config
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    return 0


def block_width(module: nn.Module) -> int:
    """Features of the module's output; 0 where its class does not say."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    ops, weight = ops_for(module), module._parameters.get("weight")
    if weight is None:
        return 0
    natural = storage_of(module, "weight").shape(module, "weight")
    if ops is None:
        return natural[0] if len(natural) == 1 else 0  # a normalisation
    return ops.shape(module, "weight", natural)[-2] if ops.features_last else 0


def block_site(name: str, module: nn.Module, role: str, width: int = 0) -> BlockSite:
    """A site of an added module.

    Raises:
        ValueError: the width of the module's output is not known, or its features are not last.
    """
    width = width or block_width(module)
    if not width:
        raise ValueError(
            f"{name!r}: expected a layer whose output ends in features (Linear, Conv1D, Embedding, "
            f"MultiheadAttention, a normalisation), got {base_class(module).__name__}; name such a "
            "layer inside it"
        )
    parameter = next((n for n, _ in module.named_parameters()), "weight")
    owner = module.get_submodule(parameter.rpartition(".")[0])
    storage = storage_of(owner, parameter.rpartition(".")[2])
    linear = isinstance(module, nn.Linear) or base_class(module).__name__ == "Conv1D"
    width_in = width
    if linear and role == "beside":
        ops = ops_for(module) or PLAIN
        width_in = ops.shape(module, "weight", storage.shape(module, "weight"))[-1]
    return BlockSite(
        module, parameter, name, ops_for(module) or PLAIN, storage, width_in, width, role
    )
