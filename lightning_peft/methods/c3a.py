"""C3A: a block-circulant change of the weight. Chen et al. 2024, arXiv:2407.19342."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, Term
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import empty_like_site, match_site, require, require_matrix
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.registry import register

__all__ = ["C3A", "Circulant"]

_INITS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


@dataclass(frozen=True)
class Circulant(Term):
    """ΔW[m b + o, n b + i] = scaling · c[m, n, (i − o) mod b] with c [m, n, b]: a correlation."""

    c: Tensor
    scaling: float

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        m, n, b = self.c.shape
        i = torch.arange(b, device=self.c.device)
        blocks = self.c[..., (i - i.unsqueeze(1)) % b]  # [m, n, o, i]
        return self.scaling * blocks.permute(0, 2, 1, 3).reshape(m * b, n * b)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Y_m = Σ_n X_n conj(C_mn) at each of b/2 + 1 frequencies, in fp32 at least."""
        if not ops.features_last or not x.numel():  # MKL transforms no empty batch
            return Dense(self.matrix()).apply(ops, site, x)
        m, n, b = self.c.shape
        c, x = (t.float() if t.dtype.itemsize < 4 else t for t in (self.c, x))
        with torch.autocast(x.device.type, enabled=False):
            X = torch.fft.rfft(x.reshape(-1, n, b)).permute(2, 0, 1)  # [frequencies, M, n]
            C = torch.fft.rfft(c).permute(2, 1, 0).conj()  # [frequencies, n, m]
            Y = torch.fft.irfft((X @ C).permute(1, 2, 0), n=b)
        y: Tensor = self.scaling * Y.reshape(*x.shape[:-1], m * b)
        return y


@register
@dataclass(frozen=True)
class C3A(BiasOption):
    """Blocks of circulant matrices, divided by in_features: one number per row of a block.

    Gradients are those of this formula. peft 0.21 has the same forward, but a wrong gradient of the
    layer's input.

    Attributes:
        block_size: b; divides in_features and out_features.
        block_size_pattern: Layer name pattern → block_size.
        init: ``"xavier_uniform"``, ``"kaiming_uniform"``, ``"gaussian"``, or ``"zeros"``, which
            alone leaves the output unchanged at the start.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"c3a_only"``.

    Raises:
        ValueError: block_size < 1, an unknown init.
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"

    bias: str = "none"

    bias_word = "c3a_only"
    hf = HFFormat(
        peft_type="C3A",
        tensors={"c": "c3a_kernel"},
        config=config_keys("bias", "block_size", "block_size_pattern"),
        own_defaults=True,
        inert={"init_weights": "xavier_uniform"},
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for where, b in {"block_size": self.block_size, **self.block_size_pattern}.items():
            require(b >= 1, f"{self.label}: expected block_size >= 1, got {where} = {b}")
        require(self.init in _INITS, f"{self.label}: expected init in {_INITS}, got {self.init!r}")

    def check(self, site: Site) -> None:
        """Blocks tile the weight."""
        require_matrix(self.label, site)
        b = match_site(self.block_size_pattern, site, self.block_size)
        require(
            site.in_features % b == 0 and site.out_features % b == 0,
            f"{self.label} on {site.quoted}: expected block_size that divides in_features = "
            f"{site.in_features} and out_features = {site.out_features}, got {b}; choose another "
            "or exclude the layer",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """c [out/b, in/b, b]."""
        b = match_site(self.block_size_pattern, site, self.block_size)
        c = empty_like_site(site, site.out_features // b, site.in_features // b, b)
        if self.init == "gaussian":
            return {"c": nn.init.normal_(c)}
        bound = {
            "xavier_uniform": math.sqrt(6.0 / (site.in_features + site.out_features)),
            "kaiming_uniform": math.sqrt(1.0 / site.in_features),
            "zeros": 0.0,
        }[self.init]
        return {"c": nn.init.uniform_(c, -bound, bound) if bound else c.zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A circulant change."""
        return Edit(terms=(Circulant(p["c"], 1 / site.in_features),))
