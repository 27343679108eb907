"""Recipes next to adapters: distillation, extraction, pruning, factorisation.

Distillation from the base that is there already, pruning, factorisation. Each is a function on any
`nn.Module`; none needs Lightning.
"""

from lightning_peft.recipes.distillation import distillation_loss, teaching
from lightning_peft.recipes.factorise import FactoriseReport, LowRankLinear, factorise
from lightning_peft.recipes.prune_magnitude import SparsityReport, prune_magnitude, sparsity
from lightning_peft.recipes.prune_neurons import NeuronReport, remove_neurons

__all__ = [
    "FactoriseReport",
    "LowRankLinear",
    "NeuronReport",
    "SparsityReport",
    "distillation_loss",
    "factorise",
    "prune_magnitude",
    "remove_neurons",
    "sparsity",
    "teaching",
]
