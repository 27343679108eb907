"""LoRA: W' = W + s · B A, with s = α/r, or α/√r (rsLoRA). Hu et al. 2021, arXiv:2106.09685;
Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import FrozenDown, LowRank
from lightning_peft.methods import lora_exchange
from lightning_peft.methods.base import (
    HFFormat,
    InitData,
    StepContext,
    WeightMethod,
    overrides_step_hooks,
)
from lightning_peft.methods.checks import empty_like_site, match_site, require, require_ranks
from lightning_peft.methods.lora_gradients import precondition, project_frozen_down
from lightning_peft.methods.registry import register

__all__ = ["LoRA"]

_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga", "mica")
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
}
_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@register
@dataclass(frozen=True)
class LoRA(WeightMethod):
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
            `start_from_data`; until then the start is the default one. ``"mica"``
            (arXiv:2604.01694): B is the r *minor* left singular vectors of the weight, frozen, and
            A starts at zero; the base stays.
        init_options: Settings of ``"eva"`` (rho, tau, whiten, adjust_scaling_factors,
            use_label_mask, label_mask_value) and ``"lora_ga"`` (direction, scale, stable_gamma),
            named as in peft, and for both ``batches``: how many of them the callback takes.
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

    hf: ClassVar[HFFormat] = HFFormat(
        peft_type="LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "bias_B": "lora_B.bias"},
        lookup={"A": "lora_embedding_A", "B": "lora_embedding_B"},
        axes={"A": "down", "B": "up"},
        config={
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "use_rslora": "use_rslora",
            "lora_bias": "lora_bias",
            "bias": "bias",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
        },
        fixed={"use_dora": False, "init_lora_weights": True, "fan_in_fan_out": False},
        when={
            "use_dora": False,
            "alora_invocation_tokens": False,
            "kasa_config": False,
            "use_bdlora": False,
        },
        ignored=(
            *("init_lora_weights", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config"),
            *(
                "velora_config",
                "monteclora_config",
                "lora_ga_config",
                "megatron_core",
                "ensure_weight_tying",
                "qalora_group_size",
            ),
        ),
        dropped=("lora_velora_embed", "lora_monteclora_sampler"),
        pack=lora_exchange.pack,
        unpack=lora_exchange.unpack,
        to_config=lora_exchange.to_config,
        from_config=lora_exchange.from_config,
        uniform=lora_exchange.uniform,
        defaults={
            "lora_dropout": 0.0,
            "use_rslora": False,
            "lora_bias": False,
            "bias": "none",
            "rank_pattern": {},
            "alpha_pattern": {},
        },
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_ranks(self.label, self.r, self.rank_pattern, self.alpha, self.alpha_pattern)
        require(
            0.0 <= self.dropout < 1.0,
            f"{self.label}: expected 0 <= dropout < 1, got dropout = {self.dropout}",
        )
        require(
            self.init in _INITS or self._niter is not None,
            f"{self.label}: expected init in {(*_INITS, 'pissa_niter_N')}, got {self.init!r}",
        )
        require(
            self.bias in ("none", "all", "lora_only"),
            f"{self.label}: expected bias in ('none', 'all', 'lora_only'), got {self.bias!r}",
        )

        require(
            self.experts in ("each", "shared", None),
            f"{self.label}: expected experts in ('each', 'shared', None), got {self.experts!r}",
        )
        self._check_options()
        require(
            not self.freeze_A or not (self.needs_data or self.init == "mica" or self.precondition),
            f"{self.label}: expected freeze_A without precondition and with a start that trains B "
            f"alone, got init={self.init!r}, precondition={self.precondition}",
        )
        require(
            not self.precondition or self.init != "mica",
            f"{self.label}: expected precondition with two trained factors, got init='mica'",
        )

    def _check_options(self) -> None:
        known = _OPTIONS.get(self.init, {})
        unknown = sorted(set(self.init_options) - set(known))
        require(
            not unknown,
            f"{self.label}: expected init_options for init={self.init!r} in {sorted(known)}, got "
            f"{unknown}",
        )
        o = self.data_options
        for key, fits, text in (
            ("rho", lambda v: v >= 1, ">= 1"),
            ("tau", lambda v: 0 <= v <= 1, "in [0, 1]"),
            ("batches", lambda v: v >= 1, ">= 1"),
            ("stable_gamma", lambda v: v > 0, "> 0"),
            ("direction", lambda v: v in _DIRECTIONS, f"in {_DIRECTIONS}"),
            ("scale", lambda v: v in _SCALES, f"in {_SCALES}"),
        ):
            require(
                key not in o or fits(o[key]),
                f"{self.label}: expected init_options {key} {text}, got {o.get(key)!r}",
            )

    @property
    def needs_data(self) -> InitData:
        """EVA needs the layers' inputs, LoRA-GA gradients of the weight."""
        by_name = {"eva": InitData.INPUTS, "lora_ga": InitData.GRADIENTS}
        return by_name.get(self.init, InitData.NONE)

    @property
    def data_options(self) -> Mapping[str, Any]:
        """`init_options`, complete."""
        return {**_OPTIONS.get(self.init, {}), **self.init_options}

    @property
    def _niter(self) -> int | None:
        head, _, n = self.init.rpartition("_")
        return int(n) if head == "pissa_niter" and n.isdecimal() else None

    def rank(self, site: Site) -> int:
        """Rank at this site."""
        r: int = match_site(self.rank_pattern, site, self.r)
        return r

    def scaling(self, site: Site, r: int) -> float:
        """S at this site; where ranks are moved between layers each keeps its α/r."""
        alpha = match_site(self.alpha_pattern, site, self.alpha)
        if self.init == "eva" and self.data_options["adjust_scaling_factors"]:
            alpha = alpha * r / self.rank(site)
        return float(alpha / math.sqrt(max(r, 1)) if self.use_rslora else alpha / max(r, 1))

    def check(self, site: Site) -> None:
        """Rank against the layer's size; odd ranks cannot be split in two for ``"orthogonal"``."""
        r, most = self.rank(site), min(site.out_features, site.in_features)
        require(
            r <= most,
            f"{self.label} on {site.label!r}: expected 1 <= r <= min(in_features, out_features) = "
            f"{most}, got r = {r}; lower r, or set it for this layer with rank_pattern, or exclude "
            "it",
        )
        require(
            self.init != "orthogonal" or r % 2 == 0,
            f"{self.label} on {site.label!r}: expected an even rank for init='orthogonal', got r = "
            f"{r}",
        )
        require(
            not (site.is_embedding and self.rewrites_base),
            f"{self.label} on {site.label!r}: expected a layer with features for input with "
            f"init={self.init!r}, got an embedding; exclude it or use init='default'",
        )
        require(
            self.needs_data != InitData.GRADIENTS or 2 * r <= most,
            f"{self.label} on {site.label!r}: expected r <= min(in_features, out_features) / 2 = "
            f"{most // 2} with init='lora_ga', which takes 2 r singular vectors, got r = {r}; "
            "lower r, or set it for this layer with rank_pattern, or exclude it",
        )
        require(
            not self.needs_data or (site.ops.features_last and not site.batch_shape),
            f"{self.label} on {site.label!r}: expected a linear layer with init={self.init!r}, got "
            f"{type(site.module).__name__}; exclude it or use init='default'",
        )
        require(
            not (site.batch_shape and self.experts == "shared" and self.rewrites_base),
            f"{self.label} on {site.label!r}: expected experts='each' with init={self.init!r}, "
            "which takes its start from each expert's weight, got experts='shared'; use "
            "init='default'",
        )
        require(
            not (site.is_embedding and (self.freeze_A or self.init == "mica")),
            f"{self.label} on {site.label!r}: expected a layer with features for input with "
            "freeze_A or init='mica', got an embedding, whose A starts at zero and is what is "
            "trained; exclude it",
        )
        require(
            not (site.is_embedding and self.lora_bias),
            f"{self.label} on {site.label!r}: expected no lora_bias on an embedding, got "
            "lora_bias=True",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A and B (and bias_B) at their start, without the one that is frozen."""
        p = self._factors(site)
        return {k: t for k, t in p.items() if k != self._frozen}

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
            self._start(A, B, r)
        p = {"A": A, "B": B}
        if self.lora_bias:
            p["bias_B"] = nn.init.zeros_(self._empty(site, site.out_features))
        return p

    def _empty(self, site: Site, *shape: int) -> Tensor:
        """[*batch, *shape]; without the experts' axis where they share it."""
        t = empty_like_site(site, *shape)
        return t.new_empty(shape) if self.experts == "shared" else t

    def _start(self, A: Tensor, B: Tensor, r: int) -> None:
        nn.init.zeros_(B)
        if self.init == "gaussian":
            nn.init.normal_(A, std=1.0 / r)
        elif self.init == "orthogonal" and A.device.type != "meta":
            # Two halves of one orthogonal basis: B A = 0 although neither is zero.
            Q = torch.linalg.qr(torch.randn(*A.shape[:-2], r, r))[0]
            A.copy_((torch.randn(*A.shape[:-2], A.shape[-1], r // 2) @ Q[..., 1::2, :]).mT / 10)
            B.copy_(torch.randn(*B.shape[:-2], B.shape[-2], r // 2) @ Q[..., 0::2, :] / 10)
        else:  # Kaiming-uniform with a = √5 over rows of length in: U(−1/√in, 1/√in)
            nn.init.uniform_(A, -1 / math.sqrt(A.shape[-1]), 1 / math.sqrt(A.shape[-1]))

    @property
    def rewrites_base(self) -> bool:
        """PiSSA, OLoRA and LoftQ start from the weight and change it."""
        return self.init in ("olora", "loftq") or self.init.startswith("pissa")

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """The frozen factor; A and B as they started, which the plain form for exchange needs:
        B A − B₀ A₀ is the change.
        """
        name = self._frozen
        frozen = {name: self._factors(site)[name]} if name else {}
        if not self.rewrites_base and self.needs_data != InitData.GRADIENTS:
            return frozen
        r = self.rank(site)
        return {
            **frozen,
            "A0": nn.init.zeros_(empty_like_site(site, r, site.in_features)),
            "B0": nn.init.zeros_(empty_like_site(site, site.out_features, r)),
        }

    @property
    def starts_from_weight(self) -> bool:
        """Those, and MiCA, which leaves the base alone."""
        return self.rewrites_base or self.init == "mica"

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """A and B from W [*batch, out, in] fp32; returns the residual that the base keeps."""
        r = p["A"].shape[-2]
        if self.init == "mica":
            p["A"] = torch.zeros_like(p["A"])
            p["B"] = torch.linalg.svd(W, full_matrices=False)[0][..., -r:].contiguous()
            return None
        s = self.scaling(site, r)
        if self.init == "loftq":
            A, B, base = self._loftq(site, W, r, s)
        else:
            if self.init == "olora":
                Q, R = torch.linalg.qr(W)
                A, B = R[..., :r, :], Q[..., :, :r]
            else:
                A, B = _factor(W, r, s, self._niter)
            base = W - s * (B @ A)
        for name, value in (("A", A), ("B", B), ("A0", A), ("B0", B)):
            if name in p:
                p[name] = value.clone(memory_format=torch.contiguous_format)
        return base

    def _loftq(self, site: Site, W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor]:
        """Alternate: the base takes what the factors leave, the factors take what quantising
        loses.
        """
        base = W
        A, B = _factor(W - site.quantization_roundtrip(base), r, s, None)
        for _ in range(self.loftq_iter - 1):
            base = W - s * (B @ A)
            A, B = _factor(W - site.quantization_roundtrip(base), r, s, None)
        return A, B, base

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
        if self.needs_data == InitData.GRADIENTS and not site.storage.lossless_write:
            terms += (LowRank(p["A0"], p["B0"], -s),)
        return Edit(terms=terms, bias=bias, dropout=self.dropout)

    def from_data(
        self, p: dict[str, Tensor], site: Site, found: Tensor, singular_values: Tensor | None
    ) -> None:
        """EVA: A is the inputs' principal directions, B zero. LoRA-GA: A and B are singular vectors
        of the gradient, of different triplets.
        """
        if self.needs_data == InitData.GRADIENTS:
            p["A"], p["B"] = p["A0"], p["B0"] = self._from_gradient(site, found)
            return
        if self.data_options["whiten"] and singular_values is not None:
            found = found / singular_values.sqrt().unsqueeze(-1)
        p["A"] = found
        p["B"] = found.new_zeros(site.out_features, found.shape[0])

    def _from_gradient(self, site: Site, G: Tensor) -> tuple[Tensor, Tensor]:
        r, o = self.rank(site), self.data_options
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
            s = self.scaling(site, r)
            A, B = A / s, B / s
        return A.contiguous(), B.contiguous()

    def residual(self, p: Mapping[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """W − s B₀A₀ for LoRA-GA."""
        if self.needs_data != InitData.GRADIENTS:
            return None
        A, B = p["A0"].to(W), p["B0"].to(W)
        return W - self.scaling(site, A.shape[-2]) * (B @ A)

    @property
    def has_step_hooks(self) -> bool:
        """Gradients are changed before the step only where that was asked for."""
        asked = self.freeze_A or self.precondition
        return asked or overrides_step_hooks(type(self), LoRA)

    def after_backward(self, ctx: StepContext) -> None:
        """Project or precondition the gradients; both are linear in them."""
        for site, p in ctx.entries:
            if self.freeze_A:
                project_frozen_down(p, self.scaling(site, p["A"].shape[-2]))
            elif self.precondition:
                precondition(p)

    def trained_biases(self) -> str:
        """Biases of the base trained beside the edit."""
        return {"none": "none", "all": "all", "lora_only": "adapted"}[self.bias]


def _factor(W: Tensor, r: int, s: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """A = √(S/s) Vᵀ, B = U √(S/s) of the r leading singular triplets."""
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.mT
    root = (S / s).sqrt()
    return root.unsqueeze(-1) * Vh, U * root.unsqueeze(-2)
