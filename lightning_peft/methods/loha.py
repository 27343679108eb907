"""LoHa: ΔW = s · (B₁ A₁) ∘ (B₂ A₂). Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, LowRank, Term
from lightning_peft.methods.formats.loha import FORMAT
from lightning_peft.methods.lycoris import LycorisMethod, product_over_kernel, random_tensors
from lightning_peft.methods.registry import register

__all__ = ["LoHa"]


def _kernel(site: Site) -> tuple[int, ...]:
    """Kernel axes as the tensors t₁, t₂ have them: two at least."""
    kernel = site.kernel_size
    return kernel if len(kernel) != 1 else (*kernel, 1)


@register
@dataclass(frozen=True)
class LoHa(LycorisMethod):
    """A Hadamard product of two low-rank matrices: rank up to r² from 2r(in + out) numbers.

    It is exactly low rank with r² columns (row-wise Kronecker products of the factors), and runs so
    where that is cheaper than the product of the layer; elsewhere ΔW is formed once a forward.

    Attributes:
        r: Rank of each factor.
        alpha: s = α/r.
        rank_dropout: Probability of dropping a row of ΔW, in training.
        module_dropout: Probability of dropping ΔW, in training.
        use_effective_conv2d: Factors for the kernel's axes of their own, in convolutions.
        rank_pattern: Layer name pattern → rank.
        alpha_pattern: The same for alpha.

    Raises:
        ValueError: r < 1, alpha ≤ 0, a probability outside [0, 1).
    """

    r: int = 8
    alpha: float = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    hf = FORMAT

    def _effective(self, site: Site) -> bool:
        return self.use_effective_conv2d and any(k != 1 for k in site.kernel_size)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """w1_a, w2_a [out, r], w1_b, w2_b [r, in]; or t1, t2 [r, r, *kernel] with w [r, ·]."""
        r = self.rank(site)
        if self._effective(site):
            kernel = _kernel(site)
            channels = site.in_features // math.prod(kernel)
            shapes: dict[str, tuple[int, ...]] = {
                "t1": (r, r, *kernel),
                "w1_a": (r, site.out_features),
                "w1_b": (r, channels),
                "t2": (r, r, *kernel),
                "w2_a": (r, site.out_features),
                "w2_b": (r, channels),
            }
        else:
            shapes = {
                "w1_a": (site.out_features, r),
                "w1_b": (r, site.in_features),
                "w2_a": (site.out_features, r),
                "w2_b": (r, site.in_features),
            }
        return random_tensors(site, shapes, zero=("w2_b",))  # ΔW is zero at the start

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Low rank r² where that costs less, ΔW formed elsewhere."""
        if self.drops_change(site):
            return Edit()
        rows = self.kept_rows(site, p["w1_a"], scaled=True)
        return Edit(terms=(self._term(p, site, rows),))

    def _term(self, p: Mapping[str, Tensor], site: Site, rows: Tensor | None) -> Term:
        s, r = self.scaling(site), self.rank(site)
        if "t1" in p:
            one = product_over_kernel(p["t1"], p["w1_a"], p["w1_b"])
            delta = one * product_over_kernel(p["t2"], p["w2_a"], p["w2_b"]) * s
            return Dense(delta if rows is None else rows.unsqueeze(-1) * delta)
        if r * r * (site.in_features + site.out_features) < site.in_features * site.out_features:
            B = (p["w1_a"].unsqueeze(-1) * p["w2_a"].unsqueeze(-2)).flatten(-2)
            A = (p["w1_b"].unsqueeze(-2) * p["w2_b"].unsqueeze(-3)).flatten(-3, -2)
            return LowRank(A, B if rows is None else rows.unsqueeze(-1) * B, s)
        delta = (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]) * s
        return Dense(delta if rows is None else rows.unsqueeze(-1) * delta)
