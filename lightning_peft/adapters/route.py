"""Routes every token to the attached adapters that its input fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.combine import exactly, low_rank_of, root_of
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.methods.arrow import Arrow, stacked_experts
from lightning_peft.report.summary import Report

__all__ = ["route"]

_Key = tuple[int, str]  # (id of the module, path of the weight)


def route(
    model: nn.Module,
    names: Sequence[str],
    into: str,
    *,
    top_k: int = 3,
    temperature: float = 1.0,
    general: Sequence[str] = (),
) -> Report:
    """Attach a new adapter that mixes others for each token (Arrow, arXiv:2405.11157).

    In every layer, a token's input is compared with the direction that each adapter amplifies most;
    the `top_k` adapters that fit best act on it. Nothing is trained. The new adapter holds copies
    of the others' factors, which stay as they are. Which adapters are active does not change.

    Args:
        model: A model with the adapters attached.
        names: Adapters whose edits are low rank.
        into: Name of the new adapter.
        top_k: Adapters per token.
        temperature: Divides the fit before the softmax; small values choose one adapter.
        general: Adapters of general knowledge: the mean of their factors is taken out of those of
            the others first (GenKnowSub, ACL 2025, short paper 54). All have one rank then.

    Returns:
        The report of the new adapter.

    Raises:
        KeyError: an adapter that is not attached.
        ValueError: no names, an adapter that is not low rank, or unequal ranks with `general`.
    """
    if not names or set(names) & set(general):
        raise ValueError(
            f"route: expected at least one adapter, none of them general, got {list(names)} and "
            f"general={list(general)}"
        )
    root, record = root_of(model, [*names, *general], "route")
    terms: dict[_Key, list[LowRank]] = {}
    sites: dict[_Key, Site] = {}
    with torch.no_grad():
        for _, module in adapted_modules(root):
            found = {n: _terms(module, n, sites) for n in (*names, *general)}
            for key in dict.fromkeys(k for n in names for k in found[n]):
                mean = _mean_of(key, [found[n] for n in general], general)
                own = [found[n][key] for n in names if key in found[n]]
                terms[key] = own if mean is None else [_without(t, mean, sites[key]) for t in own]
        stacked = {key: stacked_experts(own) for key, own in terms.items()}
    method = Arrow(
        experts=list(names),
        ranks={exactly(sites[k].name): [len(t.A) for t in own] for k, own in terms.items()},
        top_k=top_k,
        temperature=temperature,
        target_modules=sorted({sites[key].name for key in terms}),
    )
    active = list(record.active)
    report = attach(root, method, adapter_name=into)
    with torch.no_grad():
        for _, module in adapted_modules(root):
            for adapter in adapters_of(module, into):
                live = adapter.tensors()
                for name, value in stacked[(id(module), adapter.site.parameter)].items():
                    live[name].copy_(value)
    activate(root, record, active)
    return report


def _terms(module: Adapted, name: str, sites: dict[_Key, Site]) -> dict[_Key, LowRank]:
    found: dict[_Key, LowRank] = {}
    for adapter in adapters_of(module, name):
        key = (id(module), adapter.site.parameter)
        sites[key] = adapter.site
        found[key] = low_rank_of(adapter, "route")
    return found


def _mean_of(
    key: _Key, found: Sequence[Mapping[_Key, LowRank]], general: Sequence[str]
) -> LowRank | None:
    """Return the mean factors of the general adapters at a layer."""
    if not found:
        return None
    here = [terms[key] for terms in found if key in terms]
    if len(here) < len(found) or len({len(t.A) for t in here}) > 1:
        raise ValueError(
            f"route: expected general adapters of one rank on every layer, got {list(general)}"
        )
    A, B = torch.stack([t.A for t in here]).mean(0), torch.stack([t.B for t in here]).mean(0)
    return LowRank(A, B)


def _without(term: LowRank, mean: LowRank, site: Site) -> LowRank:
    if len(term.A) != len(mean.A):
        raise ValueError(
            f"route: {site.quoted}: expected the rank of the general adapters, {len(mean.A)}, got "
            f"{len(term.A)}"
        )
    return dataclasses.replace(term, A=term.A - mean.A, B=term.B - mean.B)
