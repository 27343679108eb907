"""Combines several attached adapters into one new LoRA adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.combined_copies import combined_copies
from lightning_peft.adapters.rehome import rehome
from lightning_peft.core.registry import AdapterRegistry, registries_in
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, as_low_rank
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.lora import LoRA
from lightning_peft.report.summary import Report

__all__ = ["How", "combine", "exactly", "low_rank_of", "root_of"]

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


_Key = tuple[int, str]  # (id of the module, path of the weight)


@dataclass(frozen=True)
class _Part:
    """A [*, r, in], B [*, out, r] of one adapter at one layer, and weight · scaling."""

    A: Tensor
    B: Tensor
    weight: float


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    into: str,
    how: How = "linear",
    *,
    density: float | None = None,
    rank: int | None = None,
) -> Report:
    """Attach a new adapter that combines others. Which adapters are active does not change.

    Args:
        model: A model with the adapters attached.
        names: Adapters whose edits are low rank (LoRA, VeRA, AdaLoRA, LoHa where it runs as one).
        weights: One weight per adapter; negative weights subtract.
        into: Name of the new adapter.
        how: ``"cat"``: ΔW = Σ wᵢ ΔWᵢ exactly; ranks add up. ``"svd"``: Σ wᵢ ΔWᵢ cut to `rank`.
            ``"linear"``: A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ, as in Hugging Face peft, which is
            not Σ wᵢ ΔWᵢ. ``"ties"`` (arXiv:2306.01708), ``"dare_linear"``, ``"dare_ties"``
            (arXiv:2311.03099), ``"magnitude_prune"``: applied to A and to B. Changes of trained
            biases are always summed by the weights; a trained module of one adapter is taken over.
        density: Share of values kept by ties, dare and magnitude_prune, in (0, 1].
        rank: Rank for ``"svd"``; None means the largest rank among the adapters.

    Returns:
        The report of the new adapter.

    Raises:
        KeyError: an adapter that is not attached.
        ValueError: a number of weights other than that of adapters, unequal ranks where A and B
            are summed, an adapter that is not low rank, a missing density or one out of range.
    """
    _check(names, weights, how, density)
    parts, sites = _collect(model, names, weights, how)
    factors = {key: _combined(p, how, density, rank) for key, p in parts.items()}
    ranks = {sites[key].name: A.shape[-2] for key, (A, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    odd = {name: r for name, r in ranks.items() if r != usual}
    root, record = root_of(model, names)
    copies = combined_copies(root, record, names, weights)
    method = LoRA(
        r=usual,
        alpha=float(usual),
        bias=copies.bias,
        rank_pattern={exactly(n): r for n, r in odd.items()},
        alpha_pattern={exactly(n): float(r) for n, r in odd.items()},
        target_modules=sorted({site.name for site in sites.values()}),
    )
    active = list(record.active)
    report = attach(root, method, adapter_name=into, modules_to_save=copies.heads)
    copies.copy_into(root, into)
    with torch.no_grad():
        for _, module in adapted_modules(root):
            for adapter in weight_adapters_of(module, into):
                A, B = factors[(id(module), adapter.site.parameter)]
                adapter.tensors()["A"].copy_(A)
                adapter.tensors()["B"].copy_(B)
    activate(root, record, active)
    return report


def root_of(
    model: nn.Module, names: Sequence[str], what: str = "combine"
) -> tuple[nn.Module, AdapterRegistry]:
    """Return the root, in `model` or `model` itself, whose adapters have these names."""
    rehome(model)
    found = list(registries_in(model))
    known = sorted({name for _, _, record in found for name in record.adapters})
    for name in names:
        if name not in known:
            raise KeyError(f"{what}: expected adapters among {known}, got {name!r}")
    for _, root, record in found:
        if set(names) <= set(record.adapters):
            return root, record
    raise ValueError(
        f"{what}: expected adapters of one root, got {list(names)}, which were attached to several"
    )


def exactly(name: str) -> str:
    """Return a pattern that matches this name as a suffix, and no other character for its dots."""
    return name.replace(".", r"\.")


def _check(names: Sequence[str], weights: Sequence[float], how: str, density: float | None) -> None:
    if how not in get_args(How):
        raise ValueError(f"combine: how: expected one of {get_args(How)}, got {shown(how)}")
    if not names or len(names) != len(weights):
        raise ValueError(
            f"combine: expected one weight for each of at least one adapter, got {len(names)} "
            f"names and {len(weights)} weights"
        )
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"combine: weights: expected finite numbers, got {list(weights)}")
    sparse = how not in ("linear", "cat", "svd")
    if sparse != (density is not None):
        raise ValueError(
            f"combine: density: expected {'a share' if sparse else 'none'} for how={how!r}, got "
            f"{density}"
        )
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"combine: density: expected 0 < density <= 1, got {density}")


def _collect(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], how: str
) -> tuple[dict[_Key, list[_Part]], dict[_Key, Site]]:
    root, _ = root_of(model, names)
    parts: dict[_Key, list[_Part]] = {}
    sites: dict[_Key, Site] = {}
    with torch.no_grad():
        for _, module in adapted_modules(root):
            for name, weight in zip(names, weights, strict=True):
                for adapter in adapters_of(module, name):
                    if isinstance(adapter, CopyAdapter):
                        continue  # `combined_copies` has them
                    term = low_rank_of(adapter)
                    key = (id(module), adapter.site.parameter)
                    sites[key] = adapter.site
                    parts.setdefault(key, []).append(
                        _Part(term.A, term.B, weight * float(term.scaling))
                    )
    return parts, sites


def low_rank_of(adapter: Adapter, what: str = "combine") -> LowRank:
    """The one low-rank term of an adapter.

    Raises:
        ValueError: the adapter is no low-rank change, or it rewrote the base.
    """
    if isinstance(adapter, WeightAdapter):
        edit = adapter.edit()
        if edit.only_low_rank and len(edit.terms) == 1 and adapter.rewrite is None:
            term = as_low_rank(edit.terms[0])
            assert term is not None
            return term
    raise ValueError(
        f"{what}: {adapter.adapter_name!r} at {adapter.site.quoted}: expected a low-rank change "
        f"of the weight that leaves the base alone, got {adapter.method.label}; merge it, or "
        "leave it out"
    )


def _combined(
    parts: Sequence[_Part], how: How, density: float | None, rank: int | None
) -> tuple[Tensor, Tensor]:
    if how == "cat":
        A = torch.cat([p.A for p in parts], dim=-2)
        B = torch.cat([p.weight * p.B for p in parts], dim=-1)
        most = min(A.shape[-1], B.shape[-2])
        return (A, B) if A.shape[-2] <= most else _truncated(B @ A, most)
    if how == "svd":
        delta = torch.stack([p.weight * (p.B @ p.A) for p in parts]).sum(0)
        return _truncated(delta, rank or max(p.A.shape[-2] for p in parts))
    ranks = {p.A.shape[-2] for p in parts}
    if len(ranks) > 1:
        raise ValueError(
            f"combine: how={how!r}: expected adapters of one rank, got {sorted(ranks)}; use 'cat' "
            "or 'svd'"
        )
    root = [math.sqrt(abs(p.weight)) for p in parts]
    signed = [math.copysign(r, p.weight) for r, p in zip(root, parts, strict=True)]
    return (
        mixed([p.A for p in parts], signed, how, density),
        mixed([p.B for p in parts], root, how, density),
    )


def _truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    return Vh[..., :rank, :], U[..., :rank] * S[..., None, :rank]


def mixed(
    tensors: Sequence[Tensor], weights: Sequence[float], how: str, density: float | None
) -> Tensor:
    """Σ wᵢ tᵢ after sparsifying. TIES averages the values that have the majority's sign."""
    if density is not None and density < 1:
        tensors = [
            _random(t, density) if how.startswith("dare") else _largest(t, density) for t in tensors
        ]
    stack = torch.stack(list(tensors))
    w = torch.tensor(weights, dtype=stack.dtype, device=stack.device)
    weighted = stack * w.view(-1, *(1,) * (stack.ndim - 1))
    if not how.endswith("ties"):
        return weighted.sum(0)
    majority = torch.where(stack.sum(0) >= 0, 1, -1)
    agrees = stack.sign() == majority
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(t: Tensor, density: float) -> Tensor:
    flat = t.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(t)


def _random(t: Tensor, density: float) -> Tensor:
    return t * torch.bernoulli(torch.full_like(t, density)) / density
