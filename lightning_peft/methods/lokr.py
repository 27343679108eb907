"""LoKr: ΔW = s · w₁ ⊗ w₂, w₂ (and w₁) low rank. Yeh et al. 2023 (LyCORIS), arXiv:2309.14859."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, Kronecker
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.lokr import FORMAT
from lightning_peft.methods.limits import Limit
from lightning_peft.methods.lycoris import (
    LycorisMethod,
    kronecker_sizes,
    product_over_kernel,
    random_tensors,
)
from lightning_peft.methods.registry import register

__all__ = ["LoKr"]


@register
@dataclass(frozen=True)
class LoKr(LycorisMethod):
    """A Kronecker product w1 [a, c] ⊗ w2 [b, d] with a·b = out, c·d = in.

    Runs as two small products (vec identity); ΔW is not formed on a linear layer.

    Attributes:
        r: Rank of w2 (w2 is kept full where r ≥ max(b, d)/2).
        alpha: s = α/r, also where w2 is full.
        rank_dropout: Probability of dropping a row of ΔW, in training.
        module_dropout: Probability of dropping ΔW, in training.
        rank_dropout_scale: Whether kept rows are scaled up.
        decompose_both: Whether w1 is low rank too, where r < max(a, c)/2.
        decompose_factor: Bound of a and c; -1 for the closest to a square.
        use_effective_conv2d: Low rank over the kernel's axes too, in convolutions.
        rank_pattern: Layer name pattern → rank.
        alpha_pattern: The same for alpha.
        conv1d: ``"exact"``: ΔW = w1 ⊗ w2 on `nn.Conv1d` too; ``"reshaped"``: peft's product of w1
            with a full w2 there, whose entries are in another order.

    Raises:
        ValueError: r < 1, alpha ≤ 0, a probability outside [0, 1), decompose_factor 0 or below -1.
    """

    r: int = 8
    alpha: float = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_dropout_scale: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    conv1d: Literal["exact", "reshaped"] = "exact"

    limits = {"decompose_factor": Limit("{} -1 or >= 1", lambda v: v == -1 or v >= 1)}
    hf = FORMAT

    def check(self, site: Site) -> None:
        """Rows of ΔW are dropped by forming it, which experts are too many for."""
        require(
            not (site.batch_shape and self.rank_dropout),
            f"{self.label} on {site.quoted}: expected rank_dropout=0 on a stack of experts, got "
            f"{self.rank_dropout}; use module_dropout, or exclude it",
        )

    def has_full_w2(self, site: Site) -> bool:
        """Whether w2 has no factors at this site."""
        _, b, _, d = kronecker_sizes(site, self.decompose_factor)
        return self.rank(site) >= max(b, d) / 2

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """w1 zero (or its first factor), the others uniform."""
        r, kernel = self.rank(site), site.kernel_size
        width = math.prod(kernel)
        a, b, c, d = kronecker_sizes(site, self.decompose_factor)
        thin = self.decompose_both and r < max(a, c) / 2
        shapes: dict[str, tuple[int, ...]]
        shapes = {"w1_a": (a, r), "w1_b": (r, c)} if thin else {"w1": (a, c)}
        if self.has_full_w2(site):
            shapes["w2"] = (b, d * width)
        elif self.use_effective_conv2d and any(k != 1 for k in kernel):
            shapes |= {"t2": (r, r, *kernel), "w2_a": (r, b), "w2_b": (r, d)}
        else:
            shapes |= {"w2_a": (b, r), "w2_b": (r, d * width)}
        return random_tensors(site, shapes, zero=("w1", "w1_a"))

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A Kronecker term."""
        if self.drops_change(site):
            return Edit()
        w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        if "w2" in p:
            w2 = p["w2"]
        elif "t2" in p:
            w2 = product_over_kernel(p["t2"], p["w2_a"], p["w2_b"])
        else:
            w2 = p["w2_a"] @ p["w2_b"]
        term: Kronecker | Dense = Kronecker(w1, w2, self.scaling(site))
        kernel = site.kernel_size
        if self.conv1d == "reshaped" and len(kernel) == 1 and "w2" in p:
            product = torch.kron(w1.contiguous(), w2.contiguous().unflatten(1, (-1, *kernel)))
            term = Dense(self.scaling(site) * product.reshape(site.shape))
        kept = self.kept_rows(site, w1, scaled=self.rank_dropout_scale)
        if kept is None:
            return Edit(terms=(term,))
        return Edit(terms=(Dense(kept.unsqueeze(-1) * term.matrix()),))
