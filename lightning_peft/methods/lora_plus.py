"""LoRA+: LoRA whose zero factor learns faster. Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_peft.core.site import Site
from lightning_peft.methods import lora_exchange
from lightning_peft.methods.checks import require
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
    hf = dataclasses.replace(
        lora_exchange.FORMAT, when={**lora_exchange.FORMAT.when, "is_lora_plus": True}
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self.ratio > 0, f"{self.label}: expected ratio > 0, got {self.ratio}")

    def lr_multipliers(self, site: Site) -> Mapping[str, float]:
        """The factor that starts at zero."""
        return {"A" if site.is_embedding else "B": self.ratio, "bias_B": self.ratio}
