"""Placements of added modules: branches of every transformer block, or named modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from lightning_peft.adapters.placement.inside import inside_targets
from lightning_peft.adapters.placement.placement import AttentionPlacement, BlockPlacement
from lightning_peft.core.class_swap import base_class
from lightning_peft.core.names import in_adapter, join, matches_suffix, quoted
from lightning_peft.core.site import BlockSite
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.layers.attention_prompt import why_no_attention_prompt
from lightning_peft.methods.base import BlockMethod
from lightning_peft.models.block_table import BLOCKS, Block
from lightning_peft.models.modules import hf_models
from lightning_peft.models.target_modules import Selection, select
from lightning_peft.models.target_rules import name_rule
from lightning_peft.storage import storage_of

__all__ = ["block_width", "find_block_placements"]

_Role = Literal["output", "norm", "parallel"]

#: (name of the module whose output changes, role, name of the module whose input is read or "").
_Place = tuple[str, _Role, str]


def find_block_placements(
    method: BlockMethod, model: nn.Module
) -> tuple[list[BlockPlacement], Selection | None]:
    """A placement per added module, in the order of `model.named_modules()`.

    Raises:
        ValueError: an architecture outside the table, or a layer of unknown width.
    """
    if method.where == "attention":
        return _attention_placements(method, model), None
    if method.target_modules is None:
        inside = inside_targets(method, model)
        return [p for p in _usual_placements(method, model) if inside(p.name)], None
    selection = select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        layers_pattern=method.layers_pattern,
        adaptable=lambda module: bool(block_width(module)),
        kind_hint=method.default_targets,
    )
    role: _Role = "parallel" if method.where == "parallel" else "output"
    sites = [_block_site(n, model.get_submodule(n), role) for n in selection.names]
    return [BlockPlacement(site) for site in sites], selection


def _usual_placements(method: BlockMethod, model: nn.Module) -> list[BlockPlacement]:
    """The places that the table of architectures has for the method.

    Raises:
        ValueError: an architecture outside the table.
    """
    excluded = name_rule(method.exclude_modules)
    found: list[BlockPlacement] = []
    types: list[str] = []
    for prefix, hf in hf_models(model):
        types.append(hf.config.model_type)
        block = BLOCKS.get(hf.config.model_type)
        if block is None:
            continue
        for name, role, tap in _places(hf, block, method.where):
            full = join(prefix, name)
            if not excluded(full):
                site = _block_site(full, hf.get_submodule(name), role, _width(hf, name))
                if tap:
                    site.width_in = site.width_out
                found.append(BlockPlacement(site, tap=hf.get_submodule(tap) if tap else None))
    if not found:
        raise ValueError(
            f"{method.label}: expected a Hugging Face transformer of the table to choose places "
            f"by, got {types or type(model).__name__}; name the modules that get a "
            "bottleneck after them (style='parallel': next to them) in target_modules; known: "
            f"{sorted(BLOCKS)}"
        )
    return found


def _attention_placements(method: BlockMethod, model: nn.Module) -> list[BlockPlacement]:
    """The self-attention of the last blocks of the Hugging Face models inside.

    Raises:
        ValueError: an architecture whose queries are not known, or targets of the user's.
    """
    if method.target_modules is not None:
        raise ValueError(
            f"{method.label}: expected target_modules=None, which means self-attention, got "
            f"{method.target_modules!r}"
        )
    inside, excluded = inside_targets(method, model), name_rule(method.exclude_modules)
    found: list[BlockPlacement] = []
    for prefix, hf in hf_models(model):
        block = BLOCKS.get(hf.config.model_type)
        for name, _, _ in _places(hf, block, "branches") if block is not None else ():
            owner = name.rpartition(".")[0]
            if not matches_suffix(name, block.attention if block is not None else ()):
                continue
            full, attention = join(prefix, owner), hf.get_submodule(owner)
            why = why_no_attention_prompt(attention, hf.config.model_type)
            if why:
                raise ValueError(
                    f"{method.label} on {full!r}: {why}; use PrefixTuning, whose positions share "
                    "the softmax of the text"
                )
            if inside(full) and not excluded(full):
                site = _block_site(full, attention, "parallel", _width(hf, owner))
                found.append(AttentionPlacement(site))
    if not found:
        raise ValueError(
            f"{method.label}: expected a Hugging Face decoder, got {type(model).__name__}; use "
            "PrefixTuning"
        )
    return found if method.top_layers is None else found[-method.top_layers :]


def _places(hf: nn.Module, block: Block, where: str) -> Iterator[_Place]:
    """In the order of `named_modules`."""
    modules = {n: m for n, m in hf.named_modules() if not in_adapter(n)}
    for name in modules:
        attention = matches_suffix(name, block.attention)
        feedforward = not attention and matches_suffix(name, block.feedforward)
        if where == "branches" and (attention or feedforward):
            yield name, "output", ""
        elif where == "residual" and feedforward:
            norm = _upwards(modules, name, block.norm) if block.norm else ""
            yield (norm, "norm", "") if norm else (_item(modules, name), "output", "")
        elif where == "parallel" and feedforward:
            yield name, "parallel", _stream(modules, name, block)


def _stream(modules: dict[str, nn.Module], name: str, block: Block) -> str:
    for wanted in block.stream.split():
        found = _upwards(modules, name, wanted)
        if found:
            return found
    raise ValueError(
        f"{quoted(name)}: expected a module named {block.stream!r} in its block, whose input is "
        "the stream that enters the feed-forward branch, found none; name feed-forward modules in "
        "target_modules"
    )


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
    """Features of the residual stream that a module inside a block writes to."""
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
    """Features of the module's output; 0 if its class does not tell."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    if module._parameters.get("weight") is None:
        return 0
    ops = ops_for(module)
    natural = storage_of(module, "weight").shape(module, "weight")
    if ops is None:
        return natural[0] if len(natural) == 1 else 0  # a normalisation
    return ops.shape(module, "weight", natural)[-2] if ops.features_last else 0


def _block_site(name: str, module: nn.Module, role: _Role, width: int = 0) -> BlockSite:
    """The site of an added module; `width` 0 takes the width of the module's output.

    Raises:
        ValueError: the width of the module's output is unknown, or its features are not last.
    """
    width = width or block_width(module)
    if not width:
        raise ValueError(
            f"{quoted(name)}: expected a layer whose output ends in features (Linear, Conv1D, "
            "Embedding, "
            f"MultiheadAttention, a normalisation), got {base_class(module).__name__}; name such a "
            "layer inside it"
        )
    parameter = next((n for n, _ in module.named_parameters()), "weight")
    owner = module.get_submodule(parameter.rpartition(".")[0])
    storage = storage_of(owner, parameter.rpartition(".")[2])
    ops = ops_for(module) or PLAIN
    width_in = width
    if ops.is_linear and role == "parallel":
        width_in = ops.shape(module, "weight", storage.shape(module, "weight"))[-1]
    return BlockSite(module, parameter, name, ops, storage, width_in, width, role)
