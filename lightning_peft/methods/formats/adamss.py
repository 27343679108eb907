"""AdaMSS in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import refuse_all_but_linear

if TYPE_CHECKING:
    from lightning_peft.methods.adamss import AdaMSS

__all__ = ["FORMAT", "MOST_CLUSTERS"]

MOST_CLUSTERS = 64  # clusters that a file may have


def _pack(method: AdaMSS, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors per cluster, of no more ranks than it has rows."""
    found = {"N": p["N"], "cluster": p["cluster"]}
    for k, A in enumerate(p["A"]):
        B = p["B"][p["cluster"] == k]
        rank = max(1, min(len(B), method.rank_per_cluster))
        found[f"A{k}"], found[f"B{k}"] = A[:rank].contiguous(), B[:, :rank].contiguous()
    return found


def _unpack(
    method: AdaMSS, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A file of peft does not say which rows are whose: the base is clustered again."""
    if "cluster" in p:
        cluster = p["cluster"].long()
    else:
        cluster = method.directions(site, site.weight(torch.float32).cpu())[2]
    found = {name: torch.zeros_like(t) for name, t in method.parameters(site).items()}
    for k in range(len(found["A"])):
        rows, A, B = cluster == k, p[f"A{k}"], p[f"B{k}"]
        require(
            len(B) == int(rows.sum()) and B.shape[1] == len(A) <= method.rank_per_cluster,
            f"expected {int(rows.sum())} rows in cluster {k}, as this base has them, got {len(B)}; "
            "load it on the base of its training",
        )
        found["A"][k, : len(A)] = A
        found["B"][rows] = torch.nn.functional.pad(B, (0, method.rank_per_cluster - len(A)))
    return {**found, "N": p["N"], "cluster": cluster}


#: AdaMSS in a peft directory.
FORMAT = HFFormat(
    peft_type="ADAMSS",
    tensors={
        "N": "adamss_newB",
        "cluster": "adamss_cluster",
        **{f"{k}{i}": f"adamss_{k}.{i}" for k in "AB" for i in range(MOST_CLUSTERS)},
    },
    optional=("cluster",),  # peft neither writes nor reads it
    integers=("cluster",),
    config={
        "r": "r",
        "clusters": "num_subspaces",
        "rank_per_cluster": "subspace_rank",
        "seed": "random_seed",
    },
    fixed={"init_weights": "orthogonal", "use_asa": False, "use_dynamic_rank": False},
    defaults={"r": 100, "num_subspaces": 5, "subspace_rank": 1, "random_seed": 0},
    ignored=(
        # Both act in training, or at the start, alone: the tensors say what became of it.
        *("use_asa", "use_dynamic_rank"),
        *("init_weights", "asa_target_subspaces", "init_warmup", "final_warmup"),
        *("mask_interval", "asa_importance_beta", "asa_uncertainty_beta"),
        *("asa_schedule_exponent", "svd_threshold"),
    ),
    pack=_pack,
    unpack=_unpack,
    refuse=refuse_all_but_linear,
)
