"""The sizes of a model's packed layers: what its kernels are checked and raced on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_peft.adapters.attach import attach
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.methods.lora import LoRA
from lightning_peft.storage import Quantization

__all__ = ["LLAMA_8B", "ModelShapes", "shapes_of"]


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of packed weights, each once, the most frequent first.

    Attributes:
        linear: (N, K) of linear layers.
        groups: (N_1, …, N_n, K) of layers that read one input.
        experts: (experts, N, K) of stacks of experts.
    """

    linear: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    experts: tuple[tuple[int, int, int], ...] = ()

    def for_checks(self, tokens: int) -> list[tuple[int, int, int]]:
        """(N, K, tokens) of every matrix, experts included.

        Sizes are rounded up to whole tiles of e4m3 and whole blocks of 64: a layer that has none
        takes another way than the kernels that are checked.
        """
        matrices = [*self.linear, *((N, K) for _, N, K in self.experts)]
        whole = dict.fromkeys((-(-N // 16) * 16, -(-K // 64) * 64) for N, K in matrices)
        return [(N, K, tokens) for N, K in whole]


#: Linear layers of Llama-3-8B and Mistral-7B.
LLAMA_8B = ModelShapes(
    linear=((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    groups=((4096, 1024, 1024, 4096), (14336, 14336, 4096)),
)


def shapes_of(model: nn.Module) -> ModelShapes:
    """Return the sizes of a model on the meta device; LoRA over NF4 is attached to it.

    Raises:
        ValueError: The model has no linear layers.
    """
    every = LoRA(r=1, target_modules="all-linear")
    attach(model, every, quantization=Quantization())
    linear: Counter[tuple[int, int]] = Counter()
    groups: Counter[tuple[int, ...]] = Counter()
    experts: Counter[tuple[int, int, int]] = Counter()
    for _, module in adapted_modules(model):
        for adapter in weight_adapters_of(module):
            if not adapter.site.storage.is_quantized:
                continue
            *lead, N, K = adapter.site.shape
            if lead:
                experts[lead[0], N, K] += 1
            else:
                linear[N, K] += 1
        group = module._peft.projection_group
        if group is not None and group.members[0] is module:
            sites = [weight_adapters_of(m)[0].site for m in group.members]
            groups[(*(s.out_features for s in sites), sites[0].in_features)] += 1
    return ModelShapes(
        tuple(shape for shape, _ in linear.most_common()),
        tuple(shape for shape, _ in groups.most_common()),
        tuple(shape for shape, _ in experts.most_common()),
    )
