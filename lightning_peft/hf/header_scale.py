"""Scales in the header of a safetensors file, for layers without an alpha of their own.

SimpleTuner and others write ``lora_alpha`` and ``r`` (or ``transformer.lora_alpha``), Kohya's
scripts ``ss_network_alpha`` and ``ss_network_dim``, diffusers a whole configuration as JSON under
``lora_adapter_metadata``.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_peft.core.name_patterns import ends_with_pattern

__all__ = ["HeaderScale", "header_scales"]

_JSON = "lora_adapter_metadata"
_ALPHAS = {"lora_alpha": "r", "ss_network_alpha": "ss_network_dim"}
#: Options under which the tensors are not plain LoRA.
_CHANGES = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class HeaderScale:
    """The scale that a header states for one part of a model.

    Attributes:
        part: Name that the layers' labels begin with; "" for all layers.
        alpha: lora_alpha.
        rank: Rank of the layers that it holds for; None for every rank.
        rslora: Whether the scale is alpha / √r.
        patterns: Layer name pattern → alpha.
    """

    part: str
    alpha: float
    rank: int | None
    rslora: bool
    patterns: Mapping[str, float]

    def of(self, label: str, rank: int) -> float | None:
        """Return alpha, in terms of alpha / r, of a layer of this rank; None if it is not said."""
        if self.part and not label.startswith(f"{self.part}."):
            return None
        patterns = (a for p, a in self.patterns.items() if ends_with_pattern(p, label))
        alpha = next(patterns, None)
        if alpha is None:
            if self.rank not in (None, rank):
                return None
            alpha = self.alpha
        return alpha * math.sqrt(rank) if self.rslora else alpha


def header_scales(metadata: Mapping[str, str], source: str) -> list[HeaderScale]:
    """Return the scales that a header states; the longest parts first.

    Raises:
        ValueError: a value that is no positive number, or an option that changes the layers.
    """
    found: list[HeaderScale] = []
    if _JSON in metadata:
        found += _from_json(metadata[_JSON], source)
    for key, value in metadata.items():
        part, _, leaf = key.rpartition(".")
        if leaf in _ALPHAS and value not in ("", "None"):
            rank = metadata.get(f"{part}.{_ALPHAS[leaf]}" if part else _ALPHAS[leaf])
            n = None if rank in (None, "", "None") else _number(rank, f"{key}'s rank", source)
            alpha = _number(value, key, source)
            found.append(HeaderScale(part, alpha, None if n is None else round(n), False, {}))
    return sorted(found, key=lambda scale: -len(scale.part))


def _from_json(text: str, source: str) -> list[HeaderScale]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source}: {_JSON}: expected JSON, got something else ({error})"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{source}: {_JSON}: expected an object, got {type(config).__name__}")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        part, _, leaf = key.rpartition(".")
        parts.setdefault(part, {})[leaf] = value
    return [_scale(part, fields, source) for part, fields in parts.items() if "r" in fields]


def _scale(part: str, fields: Mapping[str, Any], source: str) -> HeaderScale:
    where = f"{_JSON} {part}".strip()
    on = [name for name in _CHANGES if fields.get(name)]
    if on:
        raise ValueError(
            f"{source}: {where}: expected plain LoRA, got {on[0]} = {fields[on[0]]!r}; save the "
            "adapter with peft's save_pretrained and load that directory"
        )
    patterns = fields.get("alpha_pattern") or {}
    ranks = fields.get("rank_pattern") or {}
    if not isinstance(patterns, dict) or not isinstance(ranks, dict):
        raise ValueError(f"{source}: {where}: expected patterns by layer name, got others")
    alpha = _number(fields.get("lora_alpha", 8), f"{where}.lora_alpha", source)
    rank = None if ranks else round(_number(fields["r"], f"{where}.r", source))
    own = {p: _number(a, f"{where}.alpha_pattern", source) for p, a in patterns.items()}
    return HeaderScale(part, alpha, rank, bool(fields.get("use_rslora")), own)


def _number(value: object, key: str, source: str) -> float:
    number = math.nan
    if isinstance(value, str | int | float):
        with contextlib.suppress(ValueError):
            number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{source}: {key}: expected a positive number, got {value!r}")
    return number
