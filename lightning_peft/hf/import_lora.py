"""LoRA files of Kohya's scripts, diffusers and loralib, converted to peft's terms.

Values that a file does not hold are arguments or are refused by name, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.hf.import_factors import factors_of, magnitude_of
from lightning_peft.hf.import_lycoris import in_peft, is_lycoris, read_layers
from lightning_peft.hf.import_names import PARSERS, Layer, check_complete, kind_of
from lightning_peft.hf.import_places import places_of
from lightning_peft.hf.import_scales import set_loralib_scale, set_scales
from lightning_peft.hf.keys import PREFIX

__all__ = ["Foreign", "foreign_adapter"]


@dataclass
class Foreign:
    """A file in peft's terms, names relative to the caller's model.

    Attributes:
        config: As in adapter_config.json.
        tensors: As in adapter_model.safetensors.
        notes: Values taken from convention because the file does not hold them.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def foreign_adapter(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    root: str | None,
    alpha: float | None,
    enable_lora: Sequence[bool] | None,
    metadata: Mapping[str, str],
) -> Foreign:
    """Convert a file of another program to peft's terms.

    Args:
        model: The module to adapt.
        tensors: The file's tensors.
        source: Name of the file, for messages.
        root: Name of the module whose layer names the file uses.
        alpha: lora_alpha of layers for which neither tensors nor header state it.
        enable_lora: loralib's argument of MergedLinear, which its files do not hold.
        metadata: Metadata of the safetensors file.

    Raises:
        ValueError: an unknown format, a tensor with no certain place, a scale that is not said.
    """
    kind = "LyCORIS" if is_lycoris(list(tensors)) else kind_of(list(tensors))
    if not kind:
        raise ValueError(
            f"{source}: expected a LoRA file of peft, Kohya, diffusers or loralib, got tensors "
            f"named as {sorted(tensors)[:3]}; nothing was loaded"
        )
    if kind != "loralib" and enable_lora is not None:
        raise ValueError(
            f"load_adapter: enable_lora: expected with a loralib file, got a {kind} one, which "
            "says its own"
        )
    notes: list[str] = []
    if kind == "LyCORIS":
        return _lycoris(model, tensors, source, root, alpha, metadata)
    layers, other = PARSERS[kind](tensors, source)
    check_complete(layers, source)
    if kind == "loralib":
        set_loralib_scale(layers, alpha, source)
    elif other:
        raise ValueError(
            f"{source}: expected LoRA tensors only, got also {sorted(other)[:5]}, of "
            f"{len(other)}, whose place in a {kind} file is not certain; nothing was loaded"
        )
    places = places_of(model, root, layers, source)
    if kind != "loralib":
        set_scales(kind, layers, alpha, metadata, source, notes)
    return _in_peft(model, layers, places, other, enable_lora, source, notes)


def _lycoris(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    root: str | None,
    alpha: float | None,
    metadata: Mapping[str, str],
) -> Foreign:
    layers, notes = read_layers(tensors, source), list[str]()
    places = places_of(model, root, layers, source)
    set_scales("LyCORIS", layers, alpha, metadata, source, notes)
    return Foreign(*in_peft(model, layers, places, source), notes)


def _in_peft(
    model: nn.Module,
    layers: Sequence[Layer],
    places: Mapping[int, str],
    other: Mapping[str, Tensor],
    enable_lora: Sequence[bool] | None,
    source: str,
    notes: list[str],
) -> Foreign:
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    found: dict[str, tuple[int, float]] = {}
    problems: list[str] = []
    for e in layers:
        name = places[id(e)]
        try:
            A, B, factor = factors_of(e, modules[name], enable_lora)
        except ValueError as error:
            problems.append(f"{e.label}: {error}")
            continue
        embedding = isinstance(modules[name], nn.Embedding)
        suffix = ("lora_embedding_A", "lora_embedding_B") if embedding else _SUFFIXES
        tensors |= {PREFIX + join(name, suffix[0]): A, PREFIX + join(name, suffix[1]): B}
        if e.magnitude is not None:
            try:
                magnitude = magnitude_of(e.magnitude, modules[name])
            except ValueError as error:
                problems.append(f"{e.label}: {error}")
                continue
            tensors[PREFIX + join(name, "lora_magnitude_vector")] = magnitude
        found[name] = (A.shape[0], (e.alpha or 0.0) * factor)
    if problems:
        raise ValueError(f"{source}: nothing was loaded:\n  " + "\n  ".join(problems[:20]))
    r, alpha = Counter(found.values()).most_common(1)[0][0]
    odd = sorted((n for n, v in found.items() if v != (r, alpha)), key=lambda n: (-len(n), n))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(n): found[n][0] for n in odd},
        "alpha_pattern": {re.escape(n): found[n][1] for n in odd},
        "target_modules": "|".join(re.escape(n) for n in sorted(found)),
    }
    scaled = [e for e in layers if e.magnitude is not None]
    if scaled and len(scaled) != len(layers):
        raise ValueError(
            f"{source}: expected magnitudes (DoRA) for all layers or for none, got them for "
            f"{len(scaled)} of {len(layers)}; nothing was loaded"
        )
    config["use_dora"] = bool(scaled)
    config["bias"] = _biases(model, other, found, tensors, source)
    return Foreign(config, tensors, notes)


_SUFFIXES = ("lora_A.weight", "lora_B.weight")


def _biases(
    model: nn.Module,
    other: Mapping[str, Tensor],
    found: Mapping[str, Any],
    tensors: dict[str, Tensor],
    source: str,
) -> str:
    """Add loralib's other tensors and return peft's bias mode.

    They are trained biases, or copies of the base, which loading compares.
    """
    parameters = dict(model.named_parameters())
    changed = {
        k
        for k, t in other.items()
        if k.rpartition(".")[2] == "bias"
        and k in parameters
        and parameters[k].shape == t.shape
        and not torch.equal(parameters[k].detach().cpu().to(t.dtype), t)
    }
    everywhere = {k for k in parameters if k.rpartition(".")[2] == "bias"}
    adapted = {join(n, "bias") for n in found} & everywhere
    mode = "none" if not changed else "lora_only" if changed <= adapted else "all"
    wanted = {"none": set(), "lora_only": adapted, "all": everywhere}[mode]
    missing = sorted(wanted - set(other))
    if missing:
        raise ValueError(
            f"{source}: expected trained biases of all layers or of all adapted ones, found none "
            f"for {missing[:3]}; nothing was loaded"
        )
    for key, tensor in other.items():
        path, _, leaf = key.rpartition(".")
        inner = "base_layer" if key in wanted and path in found else ""
        tensors[PREFIX + join(path, inner, leaf)] = tensor
    return mode
