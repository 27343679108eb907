"""LoRA: W' = W + s · B A, with s = α/r, or α/√r (rsLoRA). Hu et al. 2021, arXiv:2106.09685;
Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import FrozenDown, LowRank
from lightning_peft.methods.base import (
    HFFormat,
    StepContext,
    overrides_step_hooks,
)
from lightning_peft.methods.checks import match_site
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.lora_checks import check_site, check_values
from lightning_peft.methods.lora_gradients import precondition, project_frozen_down
from lightning_peft.methods.lora_init import LoRAInit
from lightning_peft.methods.lora_start import random_start
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site
from lightning_peft.methods.token_indices import TokenIndices

__all__ = ["LoRA"]


@register
@dataclass(frozen=True)
class LoRA(LoRAInit):
    """Low-rank change of a weight: A [r, in] starts random, B [out, r] at zero.

    Attributes:
        r: Rank, 1 ≤ r ≤ min(in, out).
        alpha: Scale numerator.
        dropout: Probability of dropping an input element of the low-rank branch, in training.
        init: ``"default"`` (A Kaiming-uniform), ``"gaussian"`` (A normal, σ = 1/r),
            ``"orthogonal"``,
            ``"pissa"`` (arXiv:2404.02948; ``"pissa_niter_N"`` by randomised SVD), ``"olora"``
            (arXiv:2406.01775), ``"loftq"`` (arXiv:2310.08659; needs a quantised base). The last
            three take their part out of the base, so that the output is unchanged at the start;
            detaching puts the base's bits back. ``"eva"`` (arXiv:2410.07170) and ``"lora_ga"``
            (arXiv:2407.05000) start from the first batches: the callback does it, or
            `start_from_data`; until then the start is the default one. So does ``"corda"``
            (arXiv:2406.05223), by the singular vectors of W C, C the second moments of the layer's
            input; like LoRA-GA it takes its part out of the base. ``"mica"``
            (arXiv:2604.01694): B is the r *minor* left singular vectors of the weight, frozen, and
            A starts at zero; the base stays.
        init_options: Settings of ``"eva"`` (rho, tau, whiten, adjust_scaling_factors,
            use_label_mask, label_mask_value), ``"lora_ga"`` (direction, scale, stable_gamma) and
            ``"corda"`` (corda_method: ``"ipm"`` trains the r largest triplets, ``"kpm"`` the
            smallest), named as in peft, and for each ``batches``: how many the callback takes.
        use_rslora: s = α/√r, stable for large ranks.
        lora_bias: A bias on B, trained: b' = b + s · bias_B.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"lora_only"``.
        rank_pattern: Layer name pattern → rank; a suffix or a regular expression anchored at the
            end, first match.
        alpha_pattern: The same for alpha.
        loftq_iter: Alternations of quantising and factorising for ``"loftq"``.
        experts: On fused experts: ``"each"`` expert gets A and B of its own, all of a layer have
            them ``"shared"``, or None leaves experts alone. peft knows the first; the second is
            written there as copies.
        freeze_A: LoRA-FA (arXiv:2308.03303): A keeps its start and B alone is trained. The input
            is not kept for the backward; the callback projects the gradient of B, so that the step
            of ΔW is nearest to that of full fine-tuning.
        ensure_weight_tying: Where an embedding is adapted, adapt the modules tied to it with the
            same A and B, transposed.
        trainable_token_indices: Rows of the input embedding that are trained too, as by
            `TrainableTokens`: token ids, or layer name → token ids.
        precondition: Riemannian preconditioning (arXiv:2402.02347): the callback multiplies the
            gradient of each factor by the other's inverse Gram matrix before the step.

    Raises:
        ValueError: r < 1, alpha ≤ 0, dropout outside [0, 1), an unknown init, an init whose A or B
            is trained by definition with `freeze_A`.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    init: str = "default"
    use_rslora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loftq_iter: int = 1
    init_options: dict[str, Any] = field(default_factory=dict)
    experts: Literal["each", "shared"] | None = "each"
    freeze_A: bool = False
    precondition: bool = False
    ensure_weight_tying: bool = False
    trainable_token_indices: TokenIndices | None = None

    #: Whether a rank above min(out, in) would be a waste.
    limits_rank: ClassVar[bool] = True

    limits = {"dropout": FRACTION, "loftq_iter": at_least(1)}
    hf: ClassVar[HFFormat | None] = lora_format.FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_values(self)

    def rank(self, site: Site) -> int:
        """Rank at this site."""
        r: int = match_site(self.rank_pattern, site, self.r)
        return r

    def scaling(self, site: Site, r: int) -> float:
        """Return s at this site. A layer whose rank was changed keeps its α/r."""
        alpha = match_site(self.alpha_pattern, site, self.alpha)
        if self.init == "eva" and self.data_options["adjust_scaling_factors"]:
            alpha = alpha * r / self.rank(site)
        return float(alpha / math.sqrt(max(r, 1)) if self.use_rslora else alpha / max(r, 1))

    def check(self, site: Site) -> None:
        """Rank against the layer's size; odd ranks cannot be split in two for ``"orthogonal"``."""
        super().check(site)
        check_site(self, site, is_plain=type(self) is LoRA)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A and B (and bias_B) at their start, without the one that is frozen."""
        if site.tied_to is not None:
            return {}
        p = self._factors(site)
        return {k: t for k, t in p.items() if k != self._frozen}

    @property
    def adapts_tied(self) -> bool:
        """Return `ensure_weight_tying`."""
        return self.ensure_weight_tying

    def of_tied(self, p: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        """ΔWᵀ = Aᵀ Bᵀ for a head, whose weight is the transpose of the embedding's."""
        if site.tied_to is None or site.tied_to.is_embedding == site.is_embedding:
            return p
        return {"A": p["B"].mT, "B": p["A"].mT}

    @property
    def _frozen(self) -> str:
        return "A" if self.freeze_A else "B" if self.init == "mica" else ""

    def _factors(self, site: Site) -> dict[str, Tensor]:
        r = self.rank(site)
        A, B = self._empty(site, r, site.in_features), self._empty(site, site.out_features, r)
        if site.is_embedding:  # ids pick columns of A, so A is the one that starts at zero
            nn.init.zeros_(A)
            nn.init.normal_(B)
        else:
            random_start(self.init, A, B, r)
        p = {"A": A, "B": B}
        if self.lora_bias:
            p["bias_B"] = nn.init.zeros_(self._empty(site, site.out_features))
        return p

    def _empty(self, site: Site, *shape: int) -> Tensor:
        """[*batch, *shape]; without the experts' axis where they share it."""
        t = empty_like_site(site, *shape)
        return t.new_empty(shape) if self.experts == "shared" else t

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Return the frozen factor, and the initial A₀ and B₀ if the base was rewritten.

        The plain form for exchange needs them: its change is B A − B₀ A₀.
        """
        name = self._frozen
        frozen = {name: self._factors(site)[name]} if name else {}
        if not self.rewrites_base and not self.needs_data.moves_base:
            return frozen
        r = self.rank(site)
        return {
            **frozen,
            "A0": nn.init.zeros_(empty_like_site(site, r, site.in_features)),
            "B0": nn.init.zeros_(empty_like_site(site, site.out_features, r)),
        }

    @property
    def edit_refers_to_tensors(self) -> bool:
        """True for LoRA's own `edit`; a method that derives from it may compute its edit."""
        return type(self).edit is LoRA.edit and not self.lora_bias

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """W + s B A, b + s bias_B; a packed base cannot take B₀A₀ out of itself, so that the change
        is B A − B₀A₀ there.
        """
        A = p["A"]
        s = self.scaling(site, A.shape[-2])
        bias = s * p["bias_B"] if self.lora_bias else None
        if self.freeze_A:
            down = FrozenDown(LowRank(A, p["B"], s))
            return Edit(terms=(down,), bias=bias, dropout=self.dropout)
        terms: tuple[LowRank, ...] = (LowRank(A, p["B"], s),)
        if self.needs_data.moves_base and not site.storage.lossless_write:
            terms += (LowRank(p["A0"], p["B0"], -s),)
        return Edit(terms=terms, bias=bias, dropout=self.dropout)

    @property
    def has_step_hooks(self) -> bool:
        """Gradients are changed before the step only by options that need it."""
        asked = self.freeze_A or self.precondition
        return asked or overrides_step_hooks(type(self), LoRA)

    def after_backward(self, ctx: StepContext) -> None:
        """Project or precondition the gradients; both are linear in them."""
        for site, p in ctx.entries:
            if self.freeze_A:
                project_frozen_down(p, self.scaling(site, p["A"].shape[-2]))
            elif self.precondition:
                precondition(p)

    def trained_tokens(self) -> TokenIndices | None:
        """Return `trainable_token_indices`."""
        return self.trainable_token_indices
