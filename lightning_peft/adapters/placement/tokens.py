"""Placements of trained token rows: the input embedding, named layers, and what is tied to them."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.placement.placement import WeightPlacement
from lightning_peft.adapters.placement.tied import with_tied
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, matches_suffix, nearest_names, quoted
from lightning_peft.core.site import Site
from lightning_peft.layers import editable_ops
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.models.modules import hf_models, input_embeddings
from lightning_peft.models.target_modules import Selection
from lightning_peft.models.target_rules import name_rule
from lightning_peft.storage import storage_of
from lightning_peft.storage.unknown import refuse_unknown_format

__all__ = ["find_token_placements"]


def find_token_placements(
    method: TrainableTokens, model: nn.Module
) -> tuple[list[WeightPlacement], Selection]:
    """A placement per embedding or head.

    Raises:
        ValueError: no embedding, a name that matches nothing, or a layer that cannot be adapted.
    """
    names = _names(method, model)
    placements = []
    for name in names:
        module = model.get_submodule(name)
        ops = editable_ops(module)
        if ops is None:
            raise ValueError(
                f"{method.label}: expected an embedding or a linear head, got {quoted(name)} of "
                f"type {type(module).__name__}; name the embedding itself"
            )
        refuse_unknown_format(module, "weight", name)
        placements.append(
            WeightPlacement(Site(module, "weight", name, ops, storage_of(module, "weight")))
        )
    if method.tied:
        ids = {p.name: method.ids(p.site) for p in placements}
        placements = with_tied(
            placements, model, editable_ops, keep=lambda name, leader: ids[name] != ids[leader]
        )
    return placements, Selection(tuple(p.name for p in placements))


def _names(method: TrainableTokens, model: nn.Module) -> list[str]:
    modules = {n: m for n, m in base_modules(model).items() if not in_adapter(n)}
    layers = method.named_layers()
    if layers:
        return [name for layer in layers for name in _one(method, layer, modules)]
    if method.target_modules is not None:
        matches = name_rule(method.target_modules)
        found = [n for n in modules if n and matches(n)]
        if not found:
            raise ValueError(
                f"{method.label} target_modules: expected to match an embedding, got "
                f"{method.target_modules!r}, which matches none"
            )
        return found
    return _input_embeddings(method, model, modules)


def _one(method: TrainableTokens, layer: str, modules: dict[str, nn.Module]) -> list[str]:
    found = [n for n in modules if n and matches_suffix(n, [layer])]
    if not found:
        raise ValueError(
            f"{method.label} token_indices: expected the name of an embedding or a head, got "
            f"{layer!r}; nearest names: {nearest_names(layer, list(modules))}"
        )
    return found


def _input_embeddings(
    method: TrainableTokens, model: nn.Module, modules: dict[str, nn.Module]
) -> list[str]:
    """Names of the input embeddings of every Hugging Face model, or of the only embedding."""
    by_id = {id(m): n for n, m in modules.items()}
    found = []
    for _, hf_model in hf_models(model):
        embedding = input_embeddings(hf_model)
        if isinstance(embedding, nn.Embedding) and id(embedding) in by_id:
            found.append(by_id[id(embedding)])
    if not found:
        found = [n for n, m in modules.items() if isinstance(m, nn.Embedding)]
        if len(found) != 1:
            raise ValueError(
                f"{method.label}: expected a model with one input embedding, got "
                f"{found or 'none'}; name it in target_modules"
            )
    return found
