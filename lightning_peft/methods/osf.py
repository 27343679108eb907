"""OSF: the small singular triplets of a weight trained, its large ones kept. Nayak et al. 2025,
arXiv:2504.07097.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.projection import keep_space, remove_space
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.base import FromWeight, HFFormat, StepContext
from lightning_peft.methods.checks import match_site, require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import above
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["OSF"]


@register
@dataclass(frozen=True)
class OSF(FromWeight):
    """ΔW = U diag(S) V − U₀ diag(S₀) V₀ over all but the `kept` largest singular triplets.

    The callback takes the part of a gradient that lies in the kept triplets' space out of it,
    before the optimizer's step. More numbers are trained than half of the layer has.

    Attributes:
        kept: Triplets that stay: a number, or a share in (0, 1]; None for half.
        rank_pattern: Layer name pattern → `kept` there.

    Raises:
        ValueError: kept not above 0, or a share above 1.
    """

    kept: float | None = None
    rank_pattern: dict[str, float] = field(default_factory=dict)

    site_rules = (one_matrix,)
    limits = {"kept": above(0), "rank_pattern": above(0)}
    hf = HFFormat(
        peft_type="OSF",
        tensors={k: f"osf_svd_params.{k}_low" for k in "USV"},
        unwritten=("U0", "S0", "V0", "H"),
        config=config_keys("rank_pattern", kept="effective_rank"),
        own_defaults=True,
        inert={"init_weights": True},
        ignored=("target_svd_config",),
        refuse=refuse_all_but_linear,
    )

    def _kept(self, site: Site) -> int:
        """Return how many directions are kept, counted as in peft: a float in (0, 1] is a share."""
        most = min(site.out_features, site.in_features)
        kept = match_site(self.rank_pattern, site, self.kept)
        kept = 0.5 if kept is None else kept
        return min(most, int(most * kept if isinstance(kept, float) and kept <= 1 else kept))

    def check(self, site: Site) -> None:
        """One matrix, with a triplet on each side."""
        super().check(site)
        kept, most = self._kept(site), min(site.out_features, site.in_features)
        require(
            1 <= kept < most,
            f"{self.label} on {site.quoted}: expected a number of kept triplets from 1 to "
            f"{most - 1}, got {kept}; change kept or exclude the layer",
        )

    def _empty(self, site: Site, *names: str) -> dict[str, Tensor]:
        k = min(site.out_features, site.in_features) - self._kept(site)
        shapes = ((site.out_features, k), (k,), (k, site.in_features))
        return {n: empty_like_site(site, *s).zero_() for n, s in zip(names, shapes, strict=True)}

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """U [out, k], S [k], V [k, in], filled from the weight."""
        return self._empty(site, "U", "S", "V")

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """The start of U, S and V; of the kept triplets the longer vectors alone: H."""
        buffers = self._empty(site, "U0", "S0", "V0")
        if site.out_features != site.in_features:
            buffers["H"] = empty_like_site(site, max(site.shape), self._kept(site)).zero_()
        return buffers

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The smallest singular triplets."""
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        k = self._kept(site)
        for name, t in (("U", U[:, k:]), ("S", S[k:]), ("V", V[k:])):
            p[name], p[f"{name}0"] = t.contiguous(), t.clone(memory_format=torch.contiguous_format)
        if "H" in p:
            p["H"] = (U[:, :k] if len(W) > W.shape[1] else V[:k].mT).contiguous()
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The difference, formed: both parts together have up to the layer's full rank."""
        start = (p["U0"] * p["S0"]) @ p["V0"]
        return Edit(terms=(Dense(torch.addmm(-start, p["U"] * p["S"], p["V"])),))

    def after_backward(self, ctx: StepContext) -> None:
        """Gradients of U and V lose their part in the kept space."""
        for site, p in ctx.entries:
            out, inner = site.out_features, site.in_features
            for name, longer in (("U", out > inner), ("V", inner > out)):
                if (grad := p[name].grad) is None:
                    continue
                G, start = (grad, p["U0"]) if name == "U" else (grad.mT, p["V0"].mT)
                if longer:
                    remove_space(G, p["H"])
                else:  # a square factor: the rest of the space is what the start spans
                    keep_space(G, start)
