"""LoHa and LoKr files of LyCORIS, converted to peft's terms.

    lora_unet_<name with _ for .>.hada_w1_a [out, r], .hada_w1_b [r, in], .alpha …
    lycoris_<name>.lokr_w1 [a, c], .lokr_w2 [b, d, *kernel], or factors of either

The factors are peft's; a file says the sizes that peft's config has only by its shapes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.hf.import_names import COMPONENTS, FLAT, Layer
from lightning_peft.hf.keys import PREFIX
from lightning_peft.methods.lycoris import factorization

__all__ = ["LycorisLayer", "in_peft", "is_lycoris", "read_layers"]

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass
class LycorisLayer(Layer):
    """The tensors of one layer by their own names."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by."""
        for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.parts:
                return int(self.parts[name].shape[0])
        return int(max(*self.parts["lokr_w1"].shape, *self.parts["lokr_w2"].shape[:2]))

    @property
    def is_full(self) -> bool:
        """Whether both matrices of LoKr have no factors: LyCORIS takes scale 1 then."""
        return {"lokr_w1", "lokr_w2"} <= set(self.parts)


def is_lycoris(keys: Sequence[str]) -> bool:
    """Whether some tensors are LoHa's or LoKr's."""
    return any(key.rpartition(".")[2] in (*_LOHA, *_LOKR) for key in keys)


def read_layers(tensors: Mapping[str, Tensor], source: str) -> list[LycorisLayer]:
    """Return the layers of a file.

    Raises:
        ValueError: tensors of other methods, both methods in one file, or a layer that lacks some.
    """
    layers: dict[str, LycorisLayer] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part not in (*_LOHA, *_LOKR, "alpha") or not name:
            raise ValueError(
                f"{source}: {key}: expected tensors of LoHa or LoKr and alpha, got {part!r}: "
                f"{_OTHERS.get(part, 'its place in such a file is not certain')}; nothing was "
                "loaded"
            )
        layer = layers.setdefault(name, LycorisLayer(*_named(name)))
        if part == "alpha":
            layer.alpha = float(tensor)
        else:
            layer.parts[part] = tensor
    for layer in layers.values():
        _check(layer, source)
    kinds = {next(iter(layer.parts)).partition("_")[0] for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"{source}: expected one method per file, got layers of LoHa and of LoKr; nothing was "
            "loaded"
        )
    for layer in layers.values():
        if layer.is_full:
            layer.alpha = float(layer.rank)
    return list(layers.values())


#: Tensors of LyCORIS's other methods and options.
_OTHERS = {
    "dora_scale": "LoHa and LoKr have no magnitudes here",
    "weight": "plain LoRA in the same file",
    "bias": "a trained bias",
    "diff": "a full change of the weight",
}


def _named(name: str) -> tuple[str, str]:
    flat = FLAT.match(name)
    if flat is not None:
        return flat[1], name[flat.end() :]
    head, _, rest = name.partition(".")
    return (head, rest) if head in COMPONENTS and rest else ("", name)


def _check(layer: LycorisLayer, source: str) -> None:
    have = set(layer.parts)
    loha, loha_tucker = set(_LOHA[:4]), set(_LOHA)
    first = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}]
    second = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}]
    if have not in (loha, loha_tucker, *(a | b for a in first for b in second)):
        raise ValueError(
            f"{source}: {layer.label}: expected all factors of LoHa or LoKr, got {sorted(have)}; "
            "nothing was loaded"
        )


def in_peft(
    model: nn.Module, layers: Sequence[LycorisLayer], places: Mapping[int, str], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, tensors) as in a directory of peft.

    Raises:
        ValueError: sizes that no config of peft describes.
    """
    names = {id(e): places[id(e)] for e in layers}
    found = {names[id(e)]: (e.rank, e.alpha or 0.0) for e in layers}
    (r, alpha), _ = Counter(found.values()).most_common(1)[0]
    odd = sorted((n for n, v in found.items() if v != (r, alpha)), key=lambda n: (-len(n), n))
    loha = any(name.startswith("hada") for e in layers for name in e.parts)
    config: dict[str, Any] = {
        "peft_type": "LOHA" if loha else "LOKR",
        "r": r,
        "alpha": alpha,
        "rank_pattern": {re.escape(n): found[n][0] for n in odd},
        "alpha_pattern": {re.escape(n): found[n][1] for n in odd},
        "target_modules": "|".join(re.escape(n) for n in sorted(found)),
        "use_effective_conv2d": any({"hada_t1", "lokr_t2"} & set(e.parts) for e in layers),
    }
    if not loha:
        modules = [model.get_submodule(names[id(e)]) for e in layers]
        config["decompose_both"] = any("lokr_w1_a" in e.parts for e in layers)
        config["decompose_factor"] = _factor(layers, modules, source)
    tensors: dict[str, Tensor] = {}
    for e in layers:
        tensors |= {PREFIX + join(names[id(e)], part): t for part, t in e.parts.items()}
    return config, tensors


def _factor(layers: Sequence[LycorisLayer], modules: Sequence[nn.Module], source: str) -> int:
    """Return the bound under which all layers are split as they are.

    Raises:
        ValueError: there is none, or a Conv1d, whose product peft forms otherwise.
    """
    for e, module in zip(layers, modules, strict=True):
        if isinstance(module, nn.Conv1d):
            raise ValueError(
                f"{source}: {e.label}: expected linear layers and Conv2d, got a Conv1d, whose "
                "product peft's format has in another order; merge it with LyCORIS; nothing was "
                "loaded"
            )
    sizes = [_sizes(e, module) for e, module in zip(layers, modules, strict=True)]
    for factor in _candidates(sizes):
        if all(_fits(factor, size) for size in sizes):
            return factor
    raise ValueError(
        f"{source}: expected products whose sizes follow from one bound on them, got {sizes[:3]}; "
        "merge it with LyCORIS; nothing was loaded"
    )


def _sizes(e: LycorisLayer, module: nn.Module) -> tuple[int, int, int, int]:
    """(a, b, c, d): w1 is [a, c], w2 [b, d] per place of the kernel."""
    p = e.parts
    a, c = p["lokr_w1"].shape if "lokr_w1" in p else (len(p["lokr_w1_a"]), p["lokr_w1_b"].shape[1])
    if "lokr_w2" in p:
        return a, p["lokr_w2"].shape[0], c, p["lokr_w2"].shape[1]
    b, d = p["lokr_w2_a"].shape["lokr_t2" in p], p["lokr_w2_b"].shape[1]
    if isinstance(module, nn.Conv2d) and "lokr_t2" not in p:
        d //= math.prod(module.kernel_size)
    return a, b, c, d


def _candidates(sizes: Sequence[tuple[int, int, int, int]]) -> Iterator[int]:
    yield -1
    yield from sorted({n for a, _, c, _ in sizes for n in (a, c)}, reverse=True)


def _fits(factor: int, size: tuple[int, int, int, int]) -> bool:
    a, b, c, d = size
    return factorization(a * b, factor) == (a, b) and factorization(c * d, factor) == (c, d)
