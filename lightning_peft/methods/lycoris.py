"""What the methods of LyCORIS share: ranks and scales by layer, dropout of ΔW, first values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.core.site import Site
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.checks import match_site, require_ranks
from lightning_peft.methods.limits import FRACTION
from lightning_peft.methods.tensors import empty_like_site

__all__ = [
    "LycorisMethod",
    "factorization",
    "kronecker_sizes",
    "product_over_kernel",
    "random_tensors",
]


class LycorisMethod(WeightMethod):
    """Base of LoHa and LoKr; the dataclass of a method declares the fields.

    Attributes:
        r, alpha: Rank, and the numerator of s = α/r.
        rank_dropout: Probability of dropping a row of ΔW, in training.
        module_dropout: Probability of dropping ΔW, in training.
        rank_pattern: Layer name pattern → rank.
        alpha_pattern: Layer name pattern → alpha.
    """

    r: int
    alpha: float
    rank_dropout: float
    module_dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    limits = {"rank_dropout": FRACTION, "module_dropout": FRACTION}

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require_ranks(self.label, self.r, self.rank_pattern, self.alpha, self.alpha_pattern)

    def rank(self, site: Site) -> int:
        """Rank at this site."""
        return match_site(self.rank_pattern, site, self.r)

    def scaling(self, site: Site) -> float:
        """α/r at this site."""
        return float(match_site(self.alpha_pattern, site, self.alpha) / self.rank(site))

    def drops_change(self, site: Site) -> bool:
        """Draw whether this forward leaves ΔW out."""
        drops = site.module.training and self.module_dropout
        return bool(drops and torch.rand(()) < self.module_dropout)

    def kept_rows(self, site: Site, like: Tensor, *, scaled: bool) -> Tensor | None:
        """Draw the rows of ΔW that stay [out]; None in eval and without `rank_dropout`.

        Args:
            site: The weight.
            like: A tensor of the adapter, for dtype and device.
            scaled: Whether rows that stay are divided by their share.
        """
        if not (site.module.training and self.rank_dropout):
            return None
        rows = torch.rand(site.out_features, device=like.device) > self.rank_dropout
        kept = rows.to(like.dtype)
        return kept / kept.mean().clamp_min(torch.finfo(kept.dtype).eps) if scaled else kept


def kronecker_sizes(site: Site, factor: int) -> tuple[int, int, int, int]:
    """Return (a, b, c, d): w1 [a, c] ⊗ w2 [b, d · Π kernel] is the weight.

    Args:
        site: The weight.
        factor: Bound of a and c; -1 for none.
    """
    a, b = factorization(site.out_features, factor)
    c, d = factorization(site.in_features // math.prod(site.kernel_size), factor)
    return a, b, c, d


def random_tensors(
    site: Site, shapes: Mapping[str, tuple[int, ...]], zero: Collection[str]
) -> dict[str, Tensor]:
    """Return Kaiming-uniform tensors, zeros under the names in `zero`."""
    p = {name: empty_like_site(site, *shape) for name, shape in shapes.items()}
    for name, t in p.items():
        if name in zero:
            nn.init.zeros_(t)
        else:
            bound = 1 / math.sqrt(math.prod(t.shape[1 + len(site.batch_shape) :]))
            nn.init.uniform_(t, -bound, bound)
    return p


def product_over_kernel(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix [out, channels · Π kernel] of factors t [r, r, *kernel], a [r, out] and
    b [r, channels].
    """
    return torch.einsum("ijk,jr,ip->prk", t.flatten(2), b, a).flatten(1)


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """n = a · b: a closest to √n and at most `factor` (-1: no bound); `factor` itself, first, where
    it divides n.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    bound = n if factor == -1 else factor
    a = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (d <= bound or d == 1))
    return a, n // a
