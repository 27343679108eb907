"""LoRA files from before transformers 5, where every expert was layers of its own.

``…experts.3.w1.lora_A`` and its like become tensors of the fused weights. Gate and up are one
weight now but have an A each: stacked A [2r, in] and block-diagonal B [2·inner, 2r] are exactly
their two changes, so the rank doubles and the scale of the adapter stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join, matches_suffix
from lightning_peft.hf.config import CONFIG
from lightning_peft.hf.keys import PREFIX
from lightning_peft.hf.layouts import layout_for
from lightning_peft.layers import ops_for
from lightning_peft.layers.experts.ops import is_experts
from lightning_peft.layers.experts.structure import expert_count, first_weight
from lightning_peft.methods.checks import match_pattern

__all__ = ["fused_experts"]

#: Old name of an expert's layer → its part of the fused weights.
_PARTS = {
    **dict.fromkeys(("w1", "gate_proj"), "gate"),
    **dict.fromkeys(("w3", "up_proj"), "up"),
    **dict.fromkeys(("w2", "down_proj"), "down"),
}
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<parent>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)\."
    r"(?P<tensor>lora_[AB])\.weight"
)

#: (expert, part, "A" or "B") → tensor, of one layer.
_Layer = dict[tuple[int, str, str], Tensor]

#: (A [E, r, in], B [E, out, r]).
_Factors = tuple[Tensor, Tensor]


def fused_experts(
    top: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the adapter with the experts' tensors fused, and a note.

    The adapter is returned as it is if no key is an expert's, or if the model's experts are
    separate layers.

    Raises:
        ValueError: tensors that do not complete a fused weight, with the first of them; ranks that
            differ between experts; DoRA.
    """
    modules = base_modules(top)
    layers, leaves, rest = _by_layer(tensors, modules)
    if not layers:
        return config, tensors, ""
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise ValueError(
            f"{CONFIG}: expected LoRA on experts that were layers of their own, got "
            f"{'DoRA' if config.get('use_dora') else config['peft_type']}; merge it with the "
            "versions it was trained with"
        )
    config = dict(config)
    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    parents: dict[str, str] = {}
    targets: set[str] = set()
    for parent, layer in layers.items():
        path = _fused_path(modules, parent)
        parents[parent] = path.rpartition(".")[0]
        old = {
            part: f"{parent}.experts.0.{leaf}" for (p, part), leaf in leaves.items() if p == parent
        }
        weights = _weights(modules[path], path, layer)
        for weight, (A, _) in weights.items():
            target = f"{path}.{weight}"
            ranks[target], alphas[target] = _rank_and_alpha(config, target, A.shape[-2], old)
            targets.add(target)
        rest |= _fused_tensors(modules[path], path, weights)
    rest = {_moved(key, parents, modules): t for key, t in rest.items()}
    config.update(rank_pattern=ranks, alpha_pattern=alphas)
    _name(config, rest, modules, targets)
    note = f"experts of {len(layers)} layers were layers of their own: fused, rank by weight"
    return config, rest, note


def _rank_and_alpha(
    config: Mapping[str, Any], target: str, r: int, old: Mapping[str, str]
) -> tuple[int, float]:
    """Return the patterns' values for a fused weight of rank `r`, so that its scale stays.

    Args:
        config: The file's config.
        target: Name of the fused weight.
        r: Rank of its factors: twice the file's if gate and up were stacked.
        old: Part → old name of the first expert's layer.

    Raises:
        ValueError: the file's factors have another rank than its config states.
    """
    part = "down" if target.endswith(".down_proj") else "gate" if "gate" in old else "up"
    stated, alpha = _scale(config, old[part])
    if r not in (stated, 2 * stated):
        raise ValueError(
            f"{target}: expected experts of rank {stated} by {CONFIG}, got "
            f"{r // (2 if 'up' in old and 'gate' in old else 1)}"
        )
    factor = r // stated
    return r, alpha * (math.sqrt(factor) if config.get("use_rslora") else factor)


def _fused_tensors(
    module: nn.Module, path: str, weights: Mapping[str, _Factors]
) -> dict[str, Tensor]:
    """Return the factors of a module's fused weights as peft stores them."""
    ops = ops_for(module)
    assert ops is not None  # experts have ops
    layout = layout_for(ops, module)
    places = layout.nested_paths(list(weights))
    tensors = {}
    for weight, (A, B) in weights.items():
        head = PREFIX + join(path, places[weight])
        tensors[f"{head}.lora_A.weight"] = layout.to_peft(weight, "down", A)
        tensors[f"{head}.lora_B.weight"] = layout.to_peft(weight, "up", B)
    return tensors


def _by_layer(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, _Layer], dict[tuple[str, str], str], dict[str, Tensor]]:
    """Return the experts' tensors by old parent, their old names, and all other tensors."""
    layers: dict[str, _Layer] = {}
    leaves: dict[tuple[str, str], str] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        hit = _KEY.fullmatch(key)
        name = hit and f"{hit['parent']}.experts.{hit['expert']}.{hit['leaf']}"
        if hit is None or hit["leaf"] not in _PARTS or name in modules:
            rest[key] = tensor
            continue
        part = _PARTS[hit["leaf"]]
        leaves[hit["parent"], part] = hit["leaf"]
        at = (int(hit["expert"]), part, hit["tensor"][-1])
        layers.setdefault(hit["parent"], {})[at] = tensor
    return layers, leaves, rest


def _fused_path(modules: Mapping[str, nn.Module], parent: str) -> str:
    """Return the name of the fused experts in the block that `parent` was in."""
    block = parent.rpartition(".")[0]
    found = [n for n, m in modules.items() if n.startswith(f"{block}.") and is_experts(m)]
    if len(found) != 1:
        raise ValueError(
            f"adapter file: {parent}.experts: expected one module of fused experts in {block!r}, "
            f"found {found or 'none'}; is this the right base model?"
        )
    return found[0]


def _weights(m: nn.Module, path: str, layer: _Layer) -> dict[str, _Factors]:
    """Map each fused weight to its factors."""
    E = expert_count(m)
    if not getattr(m, "is_concatenated", True):
        raise ValueError(
            f"adapter file: {path}: expected gate and up one behind the other, got them "
            "interleaved, which no file of single experts was made for"
        )
    parts = {part for _, part, _ in layer}
    wanted = {(e, part, which) for e in range(E) for part in parts for which in "AB"}
    missing, extra = sorted(wanted - layer.keys()), sorted(layer.keys() - wanted)
    if missing or extra:
        raise ValueError(
            f"adapter file: {path}: expected A and B of {sorted(parts)} for each of {E} experts; "
            f"missing {missing[:4] or 'none'}, extra {extra[:4] or 'none'}; nothing was loaded"
        )
    made = {
        part: (_stacked(path, layer, E, part, "A"), _stacked(path, layer, E, part, "B"))
        for part in sorted(parts)
    }
    weights: dict[str, _Factors] = {}
    if "down" in made:
        weights["down_proj"] = made["down"]
    gate, up = made.get("gate"), made.get("up")
    if gate is not None and up is not None:
        weights[first_weight(m)] = _both(gate, up)
    elif gate is not None:
        weights[first_weight(m)] = (gate[0], _with_zeros(gate[1], before=False))
    elif up is not None:
        weights[first_weight(m)] = (up[0], _with_zeros(up[1], before=True))
    return weights


def _stacked(path: str, layer: _Layer, E: int, part: str, which: str) -> Tensor:
    each = [layer[e, part, which] for e in range(E)]
    shapes = sorted({tuple(t.shape) for t in each})
    if len(shapes) > 1:
        raise ValueError(
            f"adapter file: {path}: expected experts of one rank, got {part} {which} of shapes "
            f"{shapes}; a fused weight has one rank for all its experts"
        )
    return torch.stack(each)


def _with_zeros(B: Tensor, *, before: bool) -> Tensor:
    """Extend B by zeros for the half of the weight that was not adapted."""
    none = torch.zeros_like(B)
    return torch.cat([none, B] if before else [B, none], dim=1)


def _both(gate: _Factors, up: _Factors) -> _Factors:
    """Stack both A, and put both B on a block diagonal."""
    (A1, B1), (A2, B2) = gate, up
    B = torch.cat(
        [
            torch.cat([B1, B1.new_zeros(*B1.shape[:2], B2.shape[2])], dim=2),
            torch.cat([B2.new_zeros(*B2.shape[:2], B1.shape[2]), B2], dim=2),
        ],
        dim=1,
    )
    return torch.cat([A1, A2], dim=1), B


def _scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return the rank and alpha that the file states for an old layer."""
    r = match_pattern(config.get("rank_pattern") or {}, name, config["r"])
    return r, match_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])


def _moved(key: str, parents: Mapping[str, str], modules: Mapping[str, nn.Module]) -> str:
    """Return the key of a router under the present name of its parent."""
    for old, now in parents.items():
        if old not in modules and key.startswith(f"{PREFIX}{old}."):
            return f"{PREFIX}{now}.{key[len(PREFIX) + len(old) + 1 :]}"
    return key


def _name(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    fused: set[str],
) -> None:
    """Set `target_modules` and `target_parameters` to the present layers and weights."""
    paths = {key[len(PREFIX) :].partition(".lora_")[0] for key in tensors if key.startswith(PREFIX)}
    paths = {p for p in paths if p in modules}
    layers, weights = set(), set(fused)
    for path in paths:
        ops = ops_for(modules[path])
        if is_experts(modules[path]):
            continue
        if ops is not None and layout_for(ops, modules[path]).is_target_parameter("weight"):
            weights.add(f"{path}.weight")
        else:
            layers.add(path)
    named = config.get("target_modules")
    if isinstance(named, list):
        # What is named and has no tensor is still missed: only the experts' names go.
        kept = [t for t in named if t not in _PARTS and t != "gate"]
        layers -= {p for p in layers if matches_suffix(p, kept)}
        config["target_modules"] = [*kept, *sorted(layers)] or None
    else:
        config["target_modules"] = sorted(layers) or None
    config["target_parameters"] = sorted({*(config.get("target_parameters") or ()), *weights})
