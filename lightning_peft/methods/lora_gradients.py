"""Gradients of LoRA's factors, changed before the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["precondition", "project_frozen_down"]

_DAMPING = 1e-6


def project_frozen_down(p: Mapping[str, Tensor], s: float) -> None:
    """dB ← dB (A Aᵀ)⁻¹ / s²: with A frozen, the step of B whose ΔW is nearest to the full
    gradient. LoRA-FA, Zhang et al. 2023, arXiv:2308.03303.
    """
    dB = p["B"].grad
    if dB is not None:
        dB.copy_(_divided(dB, p["A"]) / s**2)


def precondition(p: Mapping[str, Tensor]) -> None:
    """dA ← (BᵀB + δ)⁻¹ dA, dB ← dB (A Aᵀ + δ)⁻¹: a step that does not depend on how ΔW is split
    into factors. Zhang & Pilanci 2024, arXiv:2402.02347.
    """
    dA, dB = p["A"].grad, p["B"].grad
    if dB is not None:
        dB.copy_(_divided(dB, p["A"]))
    if dA is not None:
        dA.copy_(_divided(dA.mT, p["B"].mT).mT)


def _divided(G: Tensor, A: Tensor) -> Tensor:
    """G (A Aᵀ + δ I)⁻¹ with G [*, n, r], A [*, r, in], in fp32."""
    A = A.detach().float()
    gram = A @ A.mT + _DAMPING * torch.eye(A.shape[-2], device=A.device)
    solved: Tensor = torch.linalg.solve(gram, G.float(), left=False)
    return solved.to(G.dtype)
