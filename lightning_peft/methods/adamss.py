"""AdaMSS: rows of the weight in clusters, a low-rank change for each. peft 0.21, tuners/adamss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import FromWeight
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.adamss import FORMAT, MOST_CLUSTERS
from lightning_peft.methods.limits import at_least, between
from lightning_peft.methods.registry import register
from lightning_peft.methods.row_clusters import row_clusters
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["AdaMSS"]


@register
@dataclass(frozen=True)
class AdaMSS(FromWeight):
    """Row i of ΔW is B[i] A[k] N, k the row's cluster; the last column of N acts on the bias.

    N holds the r leading right singular vectors of [W | b], frozen. B starts at zeros. Clusters
    are found by scikit-learn's k-means over the left ones, and again when a file of peft is read.
    With r = out_features all rows are equally far apart, and rounding decides on the clusters.

    Attributes:
        r: Directions of N; at most as many as the weight has, where it stops.
        clusters: Number of clusters; at most out_features, where it stops.
        rank_per_cluster: Rank of a cluster's change; at most the number of directions.
        seed: Seed of the randomised decomposition.

    Raises:
        ValueError: a number below 1, clusters above 64.
    """

    r: int = 100
    clusters: int = 5
    rank_per_cluster: int = 1
    seed: int = 0

    limits = {
        "r": at_least(1),
        "clusters": between(1, MOST_CLUSTERS),
        "rank_per_cluster": at_least(1),
    }
    site_rules = (one_matrix,)
    hf = FORMAT

    def check(self, site: Site) -> None:
        """A cluster has no more ranks than N has directions."""
        super().check(site)
        most = self._sizes(site)[1]
        require(
            self.rank_per_cluster <= most,
            f"{self.label} on {site.quoted}: expected rank_per_cluster <= {most}, the number of "
            f"directions here, got {self.rank_per_cluster}; lower it or exclude the layer",
        )

    def _sizes(self, site: Site) -> tuple[int, int, int]:
        width = site.in_features + site.has_bias
        clusters = min(self.clusters, site.out_features)
        return clusters, min(self.r, site.out_features, width), width

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [clusters, rank, r], filled from the weight; B [out, rank] zeros."""
        clusters, r, _ = self._sizes(site)
        return {
            "A": empty_like_site(site, clusters, self.rank_per_cluster, r).zero_(),
            "B": empty_like_site(site, site.out_features, self.rank_per_cluster).zero_(),
        }

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """N [r, in (+ 1)] and cluster [out], filled from the weight."""
        _, r, width = self._sizes(site)
        cluster = empty_like_site(site, site.out_features).zero_().long()
        return {"N": empty_like_site(site, r, width).zero_(), "cluster": cluster}

    def directions(self, site: Site, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left singular vectors [out, r], right ones [r, in (+ 1)], cluster [out]."""
        clusters, r, _ = self._sizes(site)
        b = site.bias(W.dtype)
        M = W if b is None else torch.cat([W, b.to(W.device).unsqueeze(1)], dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            U, _, V = torch.svd_lowrank(M.cpu(), q=r, niter=2)
        return U, V.mT, row_clusters(U, clusters)

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """A[k]: orthonormal rows in the space of the cluster's left vectors."""
        U, N, cluster = self.directions(site, W)
        p["N"], p["cluster"], p["A"] = N.contiguous(), cluster, torch.zeros_like(p["A"])
        for k in range(len(p["A"])):
            leading = torch.linalg.svd(U[cluster == k], full_matrices=False)[2]
            rank = min(len(leading), self.rank_per_cluster)
            p["A"][k, :rank] = leading[:rank].to(p["A"])
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Low rank: the factors of all clusters, one below another."""
        A = p["A"].flatten(0, 1) @ p["N"].to(p["A"].dtype)
        clusters = torch.arange(len(p["A"]), device=p["cluster"].device)
        here = (p["cluster"].unsqueeze(1) == clusters).to(p["B"].dtype)
        used = torch.arange(self.rank_per_cluster, device=here.device) < here.sum(0).unsqueeze(1)
        B = (here.unsqueeze(2) * p["B"].unsqueeze(1) * used).flatten(1)
        change = LowRank(A[:, : site.in_features], B)
        return Edit(terms=(change,), bias=B @ A[:, -1] if site.has_bias else None)
