"""DoRA: W' = m ⊙ (W + s B A) / ‖W + s B A‖ by rows. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.limits import only
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["DoRA"]


@register
@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each row of the weight, and its length `magnitude` [out] trained.

    The norm is taken without forming B A (‖w + s·bA‖² expands into products with r columns) and is
    a constant for the backward, as in the paper. On a quantised base it is that of the dequantised
    weight.

    Dropout drops inputs of the low-rank branch only, as LoRA's does. Hugging Face peft (and the
    paper's own code) in training takes m/‖·‖ − 1 of the base's product from the dropped input too:
    (m/n − 1) drop(x) Wᵀ + (m/n) s drop(x) Aᵀ Bᵀ. Its mean is ours, in eval both are equal; it
    costs a second product with the base in every forward.

    Attributes:
        r, alpha, dropout, …: As for LoRA.

    Raises:
        ValueError: as LoRA; lora_bias, which would be scaled by an undefined norm.
    """

    limits = {"lora_bias": only(False)}
    hf = dataclasses.replace(
        lora_format.FORMAT,
        tensors={**lora_format.FORMAT.tensors, "magnitude": "lora_magnitude_vector"},
        axes={**lora_format.FORMAT.axes, "magnitude": "out"},
        fixed={**lora_format.FORMAT.fixed, "use_dora": True},
        when={"use_dora": True},
        kinds=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "experts"),
        uniform=None,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not self.needs_data.moves_base,
            f"{self.label}: expected an init other than {self.init!r}, whose scale is defined for "
            "the change that LoRA makes; use LoRA, or init='pissa'",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A, B as LoRA; magnitude is set from the weight."""
        return {**super().parameters(site), "magnitude": empty_like_site(site, site.out_features)}

    @property
    def starts_from_weight(self) -> bool:
        """The rows' norms."""
        return True

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """LoRA's start, then magnitude = ‖W + s B A‖ of what the layer reads."""
        base = super().initialise(p, site, W) if super().starts_from_weight else None
        read = (
            site.iter_expert_chunks(torch.float32)
            if base is None
            else [(slice(None), site.quantization_roundtrip(base))]
        )
        p["magnitude"] = self._norm(p, self.scaling(site, p["A"].shape[-2]), read)
        return base

    def _norm(
        self, p: Mapping[str, Tensor], s: float, weights: Iterable[tuple[slice, Tensor]]
    ) -> Tensor:
        """‖W + s B A‖ by rows, fp32 [*batch, out]; of experts a few at a time."""
        A, B = p["A"].detach().float(), p["B"].detach().float()
        norms = []
        for part, W in weights:
            a, b = (A[part], B[part]) if A.ndim == 3 else (A, B)
            a, b = a.to(W.device), b.to(W.device)
            cross = (W @ a.mT * b).sum(-1)
            own = (b @ (a @ a.mT) * b).sum(-1)
            square = torch.linalg.vector_norm(W, dim=-1).square() + 2 * s * cross + s * s * own
            norms.append(square.clamp_min(0.0).sqrt())
        return norms[0] if len(norms) == 1 else torch.cat(norms)

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Rows of W + s B A scaled by magnitude / norm; the bias is not."""
        A = p["A"]
        s = self.scaling(site, A.shape[-2])
        with torch.no_grad():
            norm = self._norm(p, s, site.iter_expert_chunks(torch.float32))
        scale = p["magnitude"] / norm.clamp_min(torch.finfo(torch.float32).tiny).to(
            p["magnitude"].dtype
        )
        term = LowRank(A, p["B"], s)
        return Edit(terms=(term,), out_scale=scale, dropout=self.dropout)
