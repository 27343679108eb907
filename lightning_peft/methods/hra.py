"""HRA: the input reflected at trained hyperplanes, W' = W H₁ … H_r. Yuan et al. 2024,
arXiv:2405.17484.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import Rotation
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_uneven_conv2d
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["HRA", "Reflections"]


@dataclass(frozen=True)
class Reflections(Rotation):
    """R = (I − U T Uᵀ)ᵀ, the compact WY form of a product of reflections.

    Attributes:
        U: Unit columns [in, r].
        T: Upper triangular [r, r].
    """

    U: Tensor
    T: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x − ((x U) Tᵀ) Uᵀ: two thin products."""
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.U.dtype)
        y: Tensor = x - ((x @ self.U) @ self.T.mT) @ self.U.mT
        return y

    def matrix(self, W: Tensor) -> Tensor:
        """W H₁ … H_r."""
        U, T = self.U.to(W.dtype), self.T.to(W.dtype)
        return W - ((W @ U) @ T) @ U.mT


@register
@dataclass(frozen=True)
class HRA(BiasOption):
    """W' = W H₁ … H_r with H_i = I − 2 u_i u_iᵀ, u_i the columns of u [in, r] at unit length.

    u starts as pairs of equal columns, whose reflections cancel: the output is unchanged. With an
    odd r or `apply_gs` it is not.

    Attributes:
        r: Number of reflections; with `apply_gs` at most in_features.
        apply_gs: Orthogonalise the columns first: W' = W (I − 2 Q Qᵀ).
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"hra_only"``.

    Raises:
        ValueError: r < 1.
    """

    r: int = 8
    apply_gs: bool = False
    bias: Literal["none", "all", "hra_only"] = "none"

    limits = {"r": at_least(1)}
    site_rules = (features_in, one_matrix)
    hf = HFFormat(
        peft_type="HRA",
        tensors={"u": "hra_u"},
        config=config_keys("bias", "r", apply_gs="apply_GS"),
        own_defaults=True,
        inert={"init_weights": True},
        kinds=("Linear", "Conv2d"),
        refuse=refuse_uneven_conv2d,
    )

    def check(self, site: Site) -> None:
        """A map of features: not of ids, not of a stack of matrices."""
        super().check(site)
        require(
            not self.apply_gs or self.r <= site.in_features,
            f"{self.label} on {site.quoted}: expected r <= in_features = {site.in_features} with "
            f"apply_gs, got r = {self.r}; lower r or exclude the layer",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """u [in, r]: pairs of equal random columns."""
        u = empty_like_site(site, site.in_features, self.r)
        if self.r % 2:
            return {"u": kaiming(u)}
        half = kaiming(empty_like_site(site, site.in_features, self.r // 2))
        return {"u": half.repeat_interleave(2, dim=1)}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """H₁ … H_r = I − U T Uᵀ with T = (½ I + the strict upper triangle of UᵀU)⁻¹."""
        u = p["u"].float() if p["u"].dtype.itemsize < 4 else p["u"]
        eye = torch.eye(self.r, dtype=u.dtype, device=u.device)
        if self.apply_gs:
            U, T = torch.linalg.qr(u)[0], 2 * eye
        else:
            U = u / u.norm(dim=0)
            upper = 0.5 * eye + torch.triu(U.mT @ U, 1)
            T = torch.linalg.solve_triangular(upper, eye, upper=True)
        return Edit(rotation=Reflections(U.to(p["u"].dtype), T.to(p["u"].dtype)))
