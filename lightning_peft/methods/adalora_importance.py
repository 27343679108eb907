"""Importance of AdaLoRA's triplets: running averages, and masks by a budget over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["accumulate", "empty_triplets", "prune"]

_TRIPLET = ("A", "B", "E")


def empty_triplets(site: Site, r: int) -> dict[str, Tensor]:
    """Return A [r, in], B [out, r] and E [r]."""
    return {
        "A": empty_like_site(site, r, site.in_features),
        "B": empty_like_site(site, site.out_features, r),
        "E": empty_like_site(site, r),
    }


def accumulate(p: Mapping[str, Tensor], beta1: float, beta2: float) -> None:
    """Move the averages of importance and uncertainty towards those of this step."""
    gradients = {k: g for k in _TRIPLET if (g := p[k].grad) is not None}
    if not gradients:
        return
    present = list(gradients)
    now = torch._foreach_mul([p[k].detach() for k in present], list(gradients.values()))
    torch._foreach_abs_(now)
    importance = [p[f"importance_{k}"] for k in present]
    uncertainty = [p[f"uncertainty_{k}"] for k in present]
    torch._foreach_lerp_(
        importance,
        [t.to(i.dtype) for t, i in zip(now, importance, strict=True)],
        1 - beta1,
    )
    gap = torch._foreach_sub(list(now), importance)
    torch._foreach_abs_(gap)
    torch._foreach_lerp_(
        uncertainty,
        [t.to(u.dtype) for t, u in zip(gap, uncertainty, strict=True)],
        1 - beta2,
    )


def prune(entries: Sequence[Mapping[str, Tensor]], budget: int) -> None:
    """Mask all triplets of all layers but the `budget` most important ones."""
    scores = [_score(p) for p in entries]
    out = sum(len(s) for s in scores) - budget
    threshold = None
    if out > 0:
        threshold = torch.cat([s.to(scores[0].device) for s in scores]).kthvalue(out).values
    for p, score in zip(entries, scores, strict=True):
        if threshold is None:
            p["mask"].fill_(1.0)
        else:
            p["mask"].copy_(score > threshold.to(score.device))
        p["E"].mul_(p["mask"].to(p["E"].dtype))


def _score(p: Mapping[str, Tensor]) -> Tensor:
    """[r]: E's importance · uncertainty, with the means over A's row and B's column."""
    a, b, e = (p[f"importance_{k}"] * p[f"uncertainty_{k}"] for k in _TRIPLET)
    return e + a.mean(1) + b.mean(0)
