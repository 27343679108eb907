"""First values of LoRA's A and B from data: gradients of the weight, or inputs of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.checks import require

__all__ = ["start_from_covariance", "start_from_gradient"]


def start_from_gradient(
    site: Site, G: Tensor, r: int, s: float, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return LoRA-GA's A and B: singular vectors of the gradient, of different triplets.

    Args:
        site: The weight.
        G: Mean gradient of the weight.
        r: Rank.
        s: Scale of the branch.
        o: Options of the initialisation, complete.
    """
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    for_a, for_b = {
        "ArB2r": (torch.arange(r), torch.arange(r, 2 * r)),
        "A2rBr": (torch.arange(r, 2 * r), torch.arange(r)),
        "ArBr": (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
        "random": (torch.randperm(2 * r)[:r],) * 2,
    }[o["direction"]]
    A, B = V.mT[for_a], U[:, for_b] * S[for_b]
    if o["scale"] == "stable":
        B = B * (site.out_features**0.25 / o["stable_gamma"] ** 0.5)
    elif o["scale"] == "weight_svd":
        W = site.weight(torch.float32).to(B.device)
        top = torch.svd_lowrank(W, q=r, niter=4)[1][0]
        B = B * torch.where(S[for_b[0]] > 0, top / S[for_b[0]], 1.0)
    elif o["scale"] == "gd_scale":
        A, B = A / s, B / s
    return A.contiguous(), B.contiguous()


def start_from_covariance(
    site: Site, C: Tensor, r: int, s: float, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return CorDA's A and B: r singular triplets of W C, the right vectors times C⁻¹.

    Args:
        site: The weight.
        C: Second moments of the inputs [in, in].
        r: Rank.
        s: Scale of the branch.
        o: Options of the initialisation, complete.

    Raises:
        ValueError: the layer's inputs were zero.
    """
    mean = C.diagonal().mean()
    require(
        bool(mean > 0),
        f"{site.quoted}: expected inputs that are not all zero with init='corda', got zeros; give "
        "other batches or exclude the layer",
    )
    eye, damping = torch.eye(len(C), dtype=C.dtype, device=C.device), 0.01
    while True:  # the diagonal grows until fp32 inverts the matrix
        damped = C + damping * mean * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damping *= 2
    W = site.weight(torch.float32).to(C.device)
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    chosen = slice(r) if o["corda_method"] == "ipm" else slice(len(S) - r, None)
    root = (S[chosen] / s).sqrt()
    return root.unsqueeze(-1) * (Vh[chosen] @ inverse), U[:, chosen] * root
