"""LoRA+: LoRA whose zero factor learns faster. Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_peft.core.site import Site
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.limits import above
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["LoRAPlus"]


@register
@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA with the learning rate of B (of A on an embedding, where A is the one that starts at
    zero) times `ratio`.

    The callback splits the groups of the user's optimizers; schedulers follow.

    Attributes:
        r, alpha, dropout, …: As for LoRA.
        ratio: Learning rate of the zero factor over that of the other.

    Raises:
        ValueError: as LoRA; ratio ≤ 0.
    """

    ratio: float = 16.0

    #: Written as LoRA; never chosen when a file is read.
    limits = {"ratio": above(0)}
    hf = dataclasses.replace(
        lora_format.FORMAT, when={**lora_format.FORMAT.when, "is_lora_plus": True}
    )

    def lr_multipliers(self, site: Site) -> Mapping[str, float]:
        """The factor that starts at zero."""
        return {"A" if site.is_embedding else "B": self.ratio, "bias_B": self.ratio}
