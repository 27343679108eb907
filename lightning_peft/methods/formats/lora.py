"""LoRA in Hugging Face's format beyond the table: ranks and scales per layer, padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.core.name_patterns import ends_with_pattern
from lightning_peft.core.site import Site
from lightning_peft.methods.base import InitData, WeightMethod
from lightning_peft.methods.checks import match_site
from lightning_peft.methods.exchange import FromConfig, HFEntry, HFFormat, ToConfig

__all__ = ["FORMAT", "from_config", "nested_config", "pack", "to_config", "uniform", "unpack"]

V = TypeVar("V")

# Starts that leave the base alone: for a trained adapter they are history.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_BASE_STARTS = ("pissa", "olora")


def pack(method: object, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return A and B in plain form, of rank 1 at least.

    If the initialisation took B₀A₀ out of the base, BA − B₀A₀ = [B, −B₀] [A; A₀] has rank 2r.
    """
    packed = {k: t for k, t in p.items() if k not in ("A0", "B0")}
    if "A0" in p:
        packed["A"] = torch.cat([p["A"], p["A0"]], dim=-2)
        packed["B"] = torch.cat([p["B"], -p["B0"]], dim=-1)
    if not packed["A"].shape[-2]:  # EVA left this layer out
        A, B = packed["A"], packed["B"]
        packed["A"] = A.new_zeros(*A.shape[:-2], 1, A.shape[-1])
        packed["B"] = B.new_zeros(*B.shape[:-1], 1)
    return packed


def unpack(
    method: WeightMethod, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return A and B, with a rank above min(out, in), which peft allows, reduced to it."""
    tensors = dict(p)
    if not {"A", "B"} <= set(p) or p["A"].shape[-2] <= method.rank(site):
        return tensors
    delta = p["B"].double() @ p["A"].double()
    out, inner = delta.shape[-2:]
    eye = torch.eye(min(out, inner)).expand(*delta.shape[:-2], -1, -1)
    A, B = (delta, eye) if out <= inner else (eye, delta)
    return {**tensors, "A": A.float().contiguous(), "B": B.float().contiguous()}


def _alpha(s: float, r: int, rslora: bool) -> float:
    return s * math.sqrt(r) if rslora else s * r


def _scale(e: HFEntry) -> float:
    """Return the scale used in training.

    EVA moves ranks between layers, and the plain form doubles them.
    """
    moved = e.method.needs_data == InitData.INPUTS
    r = e.tensors["A"].shape[-2] if moved else e.method.rank(e.site)
    s: float = e.method.scaling(e.site, r)
    return s


def to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Set r, lora_alpha and their patterns from the tensors.

    The user's own patterns stay if they describe the same ranks.
    """
    rslora = bool(config["use_rslora"])
    wanted: dict[str, tuple[int, float]] = {}
    for e in entries:
        r = e.config_rank(e.tensors["A"].shape[-2])
        s = _scale(e)
        found = (r, _number(_alpha(s, r, rslora)))
        if wanted.setdefault(e.target, found) != found:
            raise ValueError(
                f"save_adapter: {e.path!r}: expected one rank for all weights of a module, got "
                f"{wanted[e.target]} and {found}; peft's patterns know modules only"
            )
    config["lora_alpha"] = _number(config["lora_alpha"])
    if config.get("ensure_weight_tying"):  # peft ties more than the adapters: trained copies too
        config["ensure_weight_tying"] = any(e.site.tied_to is not None for e in entries)
    if all(_by_patterns(config, path) == want for path, want in wanted.items()):
        return
    config["r"], config["lora_alpha"] = Counter(wanted.values()).most_common(1)[0][0]
    # Longest names first: a pattern also matches names that end in it.
    odd = sorted(wanted.items(), key=lambda item: (-len(item[0]), item[0]))
    r, alpha = config["r"], config["lora_alpha"]
    config["rank_pattern"] = {k: v[0] for k, v in odd if v != (r, alpha)}
    config["alpha_pattern"] = {k: v[1] for k, v in odd if v != (r, alpha)}
    for path, want in odd:
        if _by_patterns(config, path) != want:  # another layer's name ends like this one's
            config["rank_pattern"] = _first(path, want[0], config["rank_pattern"])
            config["alpha_pattern"] = _first(path, want[1], config["alpha_pattern"])


def _first(key: str, value: object, patterns: Mapping[str, Any]) -> dict[str, Any]:
    """The first match counts, so put this one in front."""
    return {key: value, **{k: v for k, v in patterns.items() if k != key}}


def _number(x: float) -> float:
    """Round to 12 digits, against the error of √ and back; integral values become int."""
    x = float(f"{x:.12g}")
    return int(x) if x == int(x) else x


def _match(patterns: Mapping[str, V], name: str, default: V) -> V:
    for pattern, value in patterns.items():
        if ends_with_pattern(pattern, name):
            return value
    return default


def _by_patterns(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    r = _match(config["rank_pattern"], name, config["r"])
    return r, _match(config["alpha_pattern"], name, config["lora_alpha"])


def uniform(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Give all layers one rank and scale 1.

    A and B are padded with zeros. Each layer's scale moves into its B (and bias).

    Raises:
        ValueError: a grouped convolution, whose rank in peft is a multiple.
    """
    most = max(e.tensors["A"].shape[-2] for e in entries)
    for e in entries:
        if e.config_rank(most) != most:
            raise ValueError(
                f"save_adapter(uniform=True): {e.path!r}: expected layers of one rank in peft, got "
                "a grouped convolution, whose rank there is a multiple; export without uniform"
            )
        s = _scale(e)
        A, B = e.tensors["A"], e.tensors["B"]
        missing = most - A.shape[-2]
        e.tensors["A"] = torch.cat([A, A.new_zeros(*A.shape[:-2], missing, A.shape[-1])], dim=-2)
        e.tensors["B"] = torch.cat(
            [s * B, B.new_zeros(*B.shape[:-1], missing)],
            dim=-1,
        )
        if "bias_B" in e.tensors:
            e.tensors["bias_B"] = s * e.tensors["bias_B"]
    config.update(r=most, lora_alpha=most, rank_pattern={}, alpha_pattern={}, use_rslora=False)


def from_config(
    config: Mapping[str, Any], entries: Sequence[HFEntry], *, reduces: bool = True
) -> dict[str, Any]:
    """Return the patterns, checked against the tensors and extended where our rank differs.

    Args:
        config: As in the file.
        entries: The adapted weights.
        reduces: Whether `unpack` reduces a rank above min(out, in).
    """
    start = config.get("init_lora_weights", True)
    if start not in (*_PLAIN_STARTS, *_BASE_STARTS):
        raise ValueError(
            "adapter_config.json: init_lora_weights: expected a start that can be repeated, got "
            f"{start!r}: these tensors belong to a base that it changed at random; save them in "
            "plain form (peft: path_initial_model_for_weight_conversion)"
        )
    settings = {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "rank_pattern": _pattern(config, "rank_pattern", int),
        "alpha_pattern": _pattern(config, "alpha_pattern", float),
    }
    rslora = config.get("use_rslora", False)
    ranks, alphas = dict(settings["rank_pattern"]), dict(settings["alpha_pattern"])
    for e in entries:
        if "A" not in e.tensors:
            continue  # reported as missing
        site = e.site
        r, alpha = _by_patterns(settings, e.target)
        found = e.tensors["A"].shape[-2]
        # These starts take r singular vectors or columns of W, as far as it has so many.
        most = min(site.out_features, site.in_features) if start in _BASE_STARTS else r
        if e.config_rank(found) != min(r, most):
            raise ValueError(
                f"{e.path!r}: expected rank {r} by adapter_config.json, got {e.names_and_shapes()}"
            )
        s = alpha / math.sqrt(r) if rslora else alpha / r
        ours = min(found, site.out_features, site.in_features) if reduces else found
        want = (ours, alpha if ours == r else _alpha(s, ours, rslora))
        have = {**settings, "rank_pattern": ranks, "alpha_pattern": alphas}
        if (
            match_site(have["rank_pattern"], site, have["r"]),
            match_site(have["alpha_pattern"], site, have["lora_alpha"]),
        ) != want:
            key = f"{site.name}.{site.parameter}" if e.by_weight else site.name
            ranks, alphas = _first(key, want[0], ranks), _first(key, want[1], alphas)
    fields: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    if config.get("ensure_weight_tying"):
        fields["ensure_weight_tying"] = _are_tied(entries)
    if start in _BASE_STARTS:
        fields["init"] = start
    return fields


def _are_tied(entries: Sequence[HFEntry]) -> bool:
    """Whether layers that share a weight have the factors of the embedding among them.

    On encoder-decoder models peft ties the head alone, and trains the other embeddings apart.
    """
    complete = [e for e in entries if {"A", "B"} <= set(e.tensors)]
    for leader in (e for e in complete if e.site.is_embedding):
        for e in complete:
            if not e.site.shares_weight_with(leader.site):
                continue
            A, B = leader.tensors["A"], leader.tensors["B"]
            if not e.site.is_embedding:
                A, B = B.mT, A.mT
            if not (torch.equal(A, e.tensors["A"]) and torch.equal(B, e.tensors["B"])):
                return False
    return True


def _pattern(config: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    value = config.get(key) or {}
    number = (int,) if kind is int else (int, float)
    if not isinstance(value, dict) or not all(
        isinstance(k, str)
        and isinstance(v, number)
        and not isinstance(v, bool)
        and 0 < v < math.inf
        for k, v in value.items()
    ):
        raise ValueError(
            f"adapter_config.json: {key}: expected names with positive {kind.__name__} values, got "
            f"{value!r}"
        )
    return value


def nested_config(
    key: str, names: Mapping[str, str], ignored: Sequence[str] = ()
) -> tuple[ToConfig, FromConfig]:
    """Config functions of a variant whose settings are a mapping under one key.

    Args:
        key: Key of the mapping in adapter_config.json.
        names: Our field → its name in the mapping; names that a file may leave out.
        ignored: Names in a file that say nothing about the result.
    """

    def into(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
        to_config(entries, config)
        config[key] = {theirs: getattr(entries[0].method, ours) for ours, theirs in names.items()}

    def back(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
        given = config[key]
        if not isinstance(given, dict) or set(given) - {*names.values(), *ignored}:
            raise ValueError(
                f"adapter_config.json: {key}: expected {sorted(names.values())}, got {given!r}"
            )
        fields = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
        return {**from_config(config, entries), **fields}

    return into, back


#: LoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="LORA",
    tensors={"A": "lora_A.weight", "B": "lora_B.weight", "bias_B": "lora_B.bias"},
    lookup={"A": "lora_embedding_A", "B": "lora_embedding_B"},
    axes={"A": "down", "B": "up", "bias_B": "bias"},
    config={
        "r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "lora_bias": "lora_bias",
        "bias": "bias",
        "ensure_weight_tying": "ensure_weight_tying",
        "trainable_token_indices": "trainable_token_indices",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    },
    fixed={"use_dora": False, "init_lora_weights": True, "fan_in_fan_out": False},
    when={
        "use_dora": False,
        "alora_invocation_tokens": False,
        "kasa_config": False,
        "use_bdlora": False,
        "velora_config": False,
        "monteclora_config": False,
    },
    ignored=(
        *("init_lora_weights", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "megatron_core", "qalora_group_size", "arrow_config"),
    ),
    dropped=("lora_velora_embed", "lora_monteclora_sampler"),
    pack=pack,
    unpack=unpack,
    to_config=to_config,
    from_config=from_config,
    uniform=uniform,
    defaults={
        "lora_dropout": 0.0,
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
        "ensure_weight_tying": False,
        "trainable_token_indices": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    },
)
