"""LoRA's initialisations as a method runs them: what each needs, and what it leaves of the base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import InitData
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.lora_data_start import start_from_covariance, start_from_gradient
from lightning_peft.methods.lora_options import complete_options
from lightning_peft.methods.lora_start import (
    loftq_start,
    minor_directions,
    qr_factors,
    singular_factors,
)

__all__ = ["LoRAInit"]


class LoRAInit(BiasOption):
    """Base of LoRA, whose dataclass declares the fields.

    Attributes:
        init: Name of the initialisation.
        init_options: Its options.
        loftq_iter: Alternations of quantising and factorising for ``"loftq"``.
    """

    init: str
    init_options: dict[str, Any]
    loftq_iter: int

    @abstractmethod
    def scaling(self, site: Site, r: int) -> float:
        """Return s at this site for a rank."""

    @property
    def needs_data(self) -> InitData:
        """EVA needs the layers' inputs, LoRA-GA gradients of the weight, CorDA second moments."""
        by_name = {
            "eva": InitData.INPUTS,
            "lora_ga": InitData.GRADIENTS,
            "corda": InitData.COVARIANCE,
        }
        return by_name.get(self.init, InitData.NONE)

    @property
    def data_options(self) -> Mapping[str, Any]:
        """`init_options`, complete."""
        return complete_options(self.init, self.init_options)

    @property
    def svd_iterations(self) -> int | None:
        """N of ``init="pissa_niter_N"``; None for another start."""
        head, _, n = self.init.rpartition("_")
        return int(n) if head == "pissa_niter" and n.isdecimal() else None

    @property
    def rewrites_base(self) -> bool:
        """PiSSA, OLoRA and LoftQ start from the weight and change it."""
        return self.init in ("olora", "loftq") or self.init.startswith("pissa")

    @property
    def starts_from_weight(self) -> bool:
        """Return True for starts that rewrite the base, and for MiCA, which only reads it."""
        return self.rewrites_base or self.init == "mica"

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """A and B from W [*batch, out, in] fp32; returns the residual that the base keeps."""
        r = p["A"].shape[-2]
        if self.init == "mica":
            p["A"], p["B"] = torch.zeros_like(p["A"]), minor_directions(W, r)
            return None
        s = self.scaling(site, r)
        if self.init == "loftq":
            A, B, base = loftq_start(site, W, r, s, self.loftq_iter)
        else:
            if self.init == "olora":
                A, B = qr_factors(W, r)
            else:
                A, B = singular_factors(W, r, s, self.svd_iterations)
            base = W - s * (B @ A)
        for name, value in (("A", A), ("B", B), ("A0", A), ("B0", B)):
            if name in p:
                p[name] = value.clone(memory_format=torch.contiguous_format)
        return base

    def from_data(
        self, p: dict[str, Tensor], site: Site, found: Tensor, singular_values: Tensor | None
    ) -> None:
        """EVA: A is the inputs' principal directions, B zero. LoRA-GA: A and B are singular vectors
        of the gradient, of different triplets. CorDA: of the weight, weighed by its inputs.
        """
        if self.needs_data.moves_base:
            start = start_from_gradient if self.init == "lora_ga" else start_from_covariance
            r = self.rank(site)
            A, B = start(site, found, r, self.scaling(site, r), self.data_options)
            p["A"], p["B"] = p["A0"], p["B0"] = A, B
            return
        if self.data_options["whiten"] and singular_values is not None:
            found = found / singular_values.sqrt().unsqueeze(-1)
        p["A"] = found
        p["B"] = found.new_zeros(site.out_features, found.shape[0])

    def residual(self, p: Mapping[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """W − s B₀A₀ for LoRA-GA and CorDA."""
        if not self.needs_data.moves_base:
            return None
        A, B = p["A0"].to(W), p["B0"].to(W)
        return W - self.scaling(site, A.shape[-2]) * (B @ A)
