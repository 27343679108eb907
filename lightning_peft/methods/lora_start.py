"""LoRA's initialisations: their options, and the first values of A and B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.site import Site
from lightning_peft.methods.checks import require
from lightning_peft.methods.triplets import leading_triplets

__all__ = [
    "INITS",
    "check_options",
    "complete_options",
    "loftq_start",
    "minor_directions",
    "qr_factors",
    "random_start",
    "singular_factors",
    "start_from_covariance",
    "start_from_gradient",
]

INITS = (
    *("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "mica"),
    *("eva", "lora_ga", "corda"),
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "eva": {
        "rho": 2.0,
        "tau": 0.99,
        "whiten": False,
        "adjust_scaling_factors": True,
        "use_label_mask": True,
        "label_mask_value": -100,
        "batches": 16,
    },
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16, "batches": 16},
    "corda": {"corda_method": "ipm", "batches": 16},
}
_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def complete_options(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an initialisation, with defaults."""
    return {**_OPTIONS.get(init, {}), **given}


def check_options(label: str, init: str, given: Mapping[str, Any]) -> None:
    """Check the names and values of an initialisation's options.

    Raises:
        ValueError: an unknown option, or a value out of range.
    """
    known = _OPTIONS.get(init, {})
    unknown = sorted(set(given) - set(known))
    require(
        not unknown,
        f"{label}: expected init_options for init={init!r} in {sorted(known)}, got {unknown}",
    )
    o = complete_options(init, given)
    for key, fits, text in (
        ("rho", lambda v: v >= 1, ">= 1"),
        ("tau", lambda v: 0 <= v <= 1, "in [0, 1]"),
        ("batches", lambda v: v >= 1, ">= 1"),
        ("stable_gamma", lambda v: v > 0, "> 0"),
        ("direction", lambda v: v in _DIRECTIONS, f"in {_DIRECTIONS}"),
        ("scale", lambda v: v in _SCALES, f"in {_SCALES}"),
        ("corda_method", lambda v: v in ("ipm", "kpm"), "in ('ipm', 'kpm')"),
    ):
        require(
            key not in o or fits(o[key]),
            f"{label}: expected init_options {key} {text}, got {o.get(key)!r}",
        )


def random_start(init: str, A: Tensor, B: Tensor, r: int) -> None:
    """Set A and B to the values of an initialisation that needs no weight, in place."""
    nn.init.zeros_(B)
    if init == "gaussian":
        nn.init.normal_(A, std=1.0 / r)
    elif init == "orthogonal" and A.device.type != "meta":
        # Two halves of one orthogonal basis: B A = 0 although neither is zero.
        Q = torch.linalg.qr(torch.randn(*A.shape[:-2], r, r))[0]
        A.copy_((torch.randn(*A.shape[:-2], A.shape[-1], r // 2) @ Q[..., 1::2, :]).mT / 10)
        B.copy_(torch.randn(*B.shape[:-2], B.shape[-2], r // 2) @ Q[..., 0::2, :] / 10)
    else:  # Kaiming-uniform with a = √5 over rows of length in: U(−1/√in, 1/√in)
        nn.init.uniform_(A, -1 / math.sqrt(A.shape[-1]), 1 / math.sqrt(A.shape[-1]))


def singular_factors(W: Tensor, r: int, s: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """Return A = √(S/s) Vᵀ and B = U √(S/s) of the r leading singular triplets."""
    if niter is None:
        U, S, Vh = leading_triplets(W, r)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.mT
    root = (S / s).sqrt()
    return root.unsqueeze(-1) * Vh, U * root.unsqueeze(-2)


def qr_factors(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return OLoRA's A and B: the first r rows of R and columns of Q, W = Q R."""
    Q, R = torch.linalg.qr(W)
    return R[..., :r, :], Q[..., :, :r]


def minor_directions(W: Tensor, r: int) -> Tensor:
    """Return MiCA's B: the left singular vectors of the r smallest singular values."""
    U: Tensor = torch.linalg.svd(W, full_matrices=False)[0]
    return U[..., -r:].contiguous()


def loftq_start(
    site: Site, W: Tensor, r: int, s: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LoftQ's A, B and base.

    Iterations alternate: the base takes what the factors leave, the factors take what quantising
    loses.
    """
    base = W
    A, B = singular_factors(W - site.quantization_roundtrip(base), r, s, None)
    for _ in range(iterations - 1):
        base = W - s * (B @ A)
        A, B = singular_factors(W - site.quantization_roundtrip(base), r, s, None)
    return A, B, base


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
