"""Low-rank factorisation of base layers: W ≈ U V with fewer parameters, then adapted.

W [out, in] = U Σ Vᵀ cut to k triplets becomes two layers, in → k → out, of k (in + out) parameters.
A layer is replaced only where that is fewer than in · out. Denton et al. 2014, arXiv:1404.0736.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.layers import adaptable
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.models.outputs import output_of, relative_change
from lightning_peft.models.target_modules import select
from lightning_peft.recipes.svd import balanced, rank_for

__all__ = ["FactoriseReport", "FactorisedLayer", "LowRankLinear", "factorise"]


class LowRankLinear(nn.Module):
    """A linear layer in two factors: y = (x Vᵀ) Uᵀ + b.

    `down` [k, in] and `up` [out, k] are linear layers of their own: ``target_modules=["up"]`` and
    the like adapt them, and both may be quantised.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        """Store the factors without copying them."""
        super().__init__()
        k, in_features = down.shape
        out_features = up.shape[0]
        self.in_features, self.out_features = in_features, out_features
        with torch.device("meta"):
            self.down = nn.Linear(in_features, k, bias=False)
            self.up = nn.Linear(k, out_features, bias=bias is not None)
        self.down.weight = nn.Parameter(down)
        self.up.weight = nn.Parameter(up)
        if bias is not None:
            self.up.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y: Tensor = self.up(self.down(x))
        return y


@dataclass(frozen=True)
class FactorisedLayer:
    """Result for one layer.

    Attributes:
        name: Name of the layer.
        rank: k; 0 where the layer was left as it was, because factors would be larger.
        energy: Share of Σσ² that is kept.
        parameters: Number of parameters of the weight, before and after.
    """

    name: str
    rank: int
    energy: float
    parameters: tuple[int, int]


@dataclass
class FactoriseReport:
    """Savings and error of a factorisation.

    Attributes:
        layers: One entry a layer that was looked at.
        parameters: Number of parameters of the model, before and after.
        output_error: ‖after − before‖ / ‖before‖ of the output on the batch given; None without
            one.
    """

    layers: list[FactorisedLayer] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    output_error: float | None = None

    def __str__(self) -> str:
        """Return layers, parameters and the error of the output as text."""
        done = [e for e in self.layers if e.rank]
        before, after = self.parameters
        text = (
            f"{len(done)} of {len(self.layers)} layers factorised, {before:,} → {after:,} "
            f"parameters ({1 - after / before:.1%} fewer)"
        )
        if self.output_error is not None:
            text += f"; output on the batch differs by {self.output_error:.2e} (relative)"
        return text


def factorise(
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | None = None,
    target_modules: str | list[str] | None = "all-linear",
    exclude_modules: str | list[str] | None = None,
    batch: object = None,
) -> FactoriseReport:
    """Replace linear layers by two thin ones, in place. Call it before attaching and quantising.

    Args:
        model: A dense model without adapters.
        energy: Share of Σσ² that every layer keeps, in (0, 1].
        rank: The largest rank of a layer; with `energy`, both hold.
        target_modules: As in LoRA.
        exclude_modules: As in LoRA.
        batch: An example input on which the error of the output is measured.

    Returns:
        Rank and energy by layer, parameters, error.

    Raises:
        ValueError: neither `energy` nor `rank`, or out of range.
        RuntimeError: adapters are attached.
    """
    if energy is None and rank is None:
        raise ValueError("factorise: expected energy= or rank=, got neither")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"factorise: energy: expected 0 < energy <= 1, got {energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"factorise: rank: expected rank >= 1, got {rank}")
    if any(True for _ in adapted_modules(model)):
        raise RuntimeError(
            "factorise: expected a model without adapters, found some; factorise first, then attach"
        )
    before = None if batch is None else output_of(model, batch)
    names = select(
        model, target_modules, exclude_modules=exclude_modules, adaptable=_replaceable
    ).names
    read_elsewhere = _children_of_fused_layers(model)
    report = FactoriseReport()
    size = _size(model)
    for name in names:
        if name not in read_elsewhere:
            _replace(model, name, energy, rank, report)
    report.parameters = (size, _size(model))
    if before is not None:
        report.output_error = relative_change(output_of(model, batch), before)
    return report


def _replaceable(module: nn.Module) -> bool:
    """Return the plain linear layers. A subclass may have its own forward, or other readers."""
    return type(module) is nn.Linear and adaptable(module)


def _children_of_fused_layers(model: nn.Module) -> set[str]:
    """Return layers whose weights `nn.TransformerEncoderLayer` reads directly in eval mode."""
    return {
        join(name, child)
        for name, m in model.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer)
        for child, _ in m.named_modules()
    }


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _replace(
    model: nn.Module, name: str, energy: float | None, rank: int | None, report: FactoriseReport
) -> None:
    path, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(name)
    W = layer.weight.detach()
    out, inner = W.shape
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    k = len(S) if energy is None else rank_for(S, energy)
    k = k if rank is None else min(k, rank)
    after = k * (out + inner)
    if after >= W.numel():
        report.layers.append(FactorisedLayer(name, 0, 1.0, (W.numel(), W.numel())))
        return
    down, up = (t.to(W.dtype) for t in balanced(U, S, Vh, k))
    thin = LowRankLinear(down, up, None if layer.bias is None else layer.bias.detach())
    thin.train(layer.training)
    thin.requires_grad_(layer.weight.requires_grad)
    setattr(model.get_submodule(path) if path else model, leaf, thin)
    kept = float(S[:k].square().sum() / S.square().sum().clamp_min(1e-30))
    report.layers.append(FactorisedLayer(name, k, kept, (W.numel(), after)))
