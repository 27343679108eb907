"""Magnitude pruning of a frozen base, and the sparsity of a model.

Zeros of a frozen weight stay where they are through training. A merge fills them unless the
adapter's own change is masked: train with `SparseLoRA`. torch.nn.utils.prune and Lightning's
`ModelPruning` work on the same layers, before or during training: their masks are read with the
weight. Masks belong to the base, which checkpoints do not hold: a run that must resume is pruned
where the module is built (`prune_magnitude`, or torch's pruning and its `remove`), a run under
`ModelPruning` starts again. Han et al. 2015, arXiv:1506.02626.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.core.pruning_masks import held, mask_of, show_masked
from lightning_peft.layers import adaptable, ops_for
from lightning_peft.models.target_modules import select
from lightning_peft.storage import storage_of

__all__ = ["SparsityReport", "prune_magnitude", "sparsity"]


@dataclass
class SparsityReport:
    """Number of zeros per weight.

    Attributes:
        layers: Name of the weight → (zeros, elements).
    """

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Return the share of zeros among all elements."""
        zeros = sum(z for z, _ in self.layers.values())
        return zeros / max(1, sum(n for _, n in self.layers.values()))

    def __str__(self) -> str:
        """Return one line per layer."""
        lines = [f"{name:<56} {z / n:7.2%} of {n:,}" for name, (z, n) in self.layers.items()]
        return "\n".join([*lines, f"{self.share:.2%} zeros in {len(lines)} layers"])


def sparsity(
    model: nn.Module, target_modules: str | list[str] | None = "all-linear"
) -> SparsityReport:
    """Count zeros of the effective base weights: masked, and dequantised if packed."""
    report = SparsityReport()
    for label, module, name in _weights(model, target_modules):
        W = storage_of(module, name).read(module, name)
        report.layers[label] = (int((W == 0).sum()), W.numel())
    return report


def prune_magnitude(
    model: nn.Module,
    amount: float,
    *,
    target_modules: str | list[str] | None = "all-linear",
    scope: Literal["global", "layer"] = "global",
) -> SparsityReport:
    """Set the smallest base weights to zero, in place. Call it before quantising.

    Args:
        model: With or without adapters; what is pruned is the base.
        amount: Share of the weights that are zero afterwards, in [0, 1).
        target_modules: As in LoRA.
        scope: ``"global"``: the smallest of all layers together; ``"layer"``: of each.

    Returns:
        How sparse each layer is.

    Raises:
        ValueError: amount or scope out of range, or a packed weight; nothing is changed.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"prune_magnitude: amount: expected 0 <= amount < 1, got {amount}")
    if scope not in ("global", "layer"):
        raise ValueError(f"prune_magnitude: scope: expected 'global' or 'layer', got {scope!r}")
    found = list(_weights(model, target_modules))
    for label, module, name in found:
        if storage_of(module, name).is_quantized:
            raise ValueError(
                f"prune_magnitude: {label!r}: expected a dense weight, got a packed one; prune "
                "before quantising"
            )
    with torch.no_grad():
        weights = [storage_of(m, n).read(m, n) for _, m, n in found]
        # On the CPU, a layer's magnitudes at a time, in fp32.
        limit = _limit([W.abs().float().cpu() for W in weights], amount)
        for (_, module, name), W in zip(found, weights, strict=True):
            size = W.abs().float()
            least = _limit([size], amount) if scope == "layer" else limit
            gone = size <= least
            held(module, name).masked_fill_(gone, 0.0)
            mask = mask_of(module, name)
            if mask is not None:
                mask.masked_fill_(gone, 0.0)
                show_masked(module, name)
    return sparsity(model, target_modules)


def _limit(sizes: list[Tensor], amount: float) -> float:
    """Return the largest magnitude that is pruned."""
    flat = torch.cat([s.flatten() for s in sizes])
    k = int(amount * flat.numel())
    return float(flat.kthvalue(k).values) if k else -1.0


def _weights(
    model: nn.Module, target_modules: str | list[str] | None
) -> Iterator[tuple[str, nn.Module, str]]:
    chosen = select(model, target_modules, adaptable=adaptable)
    for label in chosen.names:
        module = model.get_submodule(label)
        ops = ops_for(module)
        assert ops is not None  # `adaptable` said so
        for name in ops.parameters(module):
            yield join(label, name), module, name
