"""CPT: a prompt of worked examples, moved within a ball around their embeddings. Blau et al. 2024,
arXiv:2410.17222.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.balls import project_into_balls, radii_by_kind
from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFFormat, StepContext
from lightning_peft.methods.checks import require
from lightning_peft.methods.cpt_loss import cpt_loss
from lightning_peft.methods.formats.cpt import FORMAT
from lightning_peft.methods.limits import SHARE, above, only
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.registry import register
from lightning_peft.methods.text_start import take_length_from_ids

__all__ = ["CPT", "cpt_loss"]


class _Table(nn.Module):
    """E [n, width], the embeddings of the examples; P [n, width], what is added."""

    E: Tensor
    P: nn.Parameter


@register
@dataclass(frozen=True)
class CPT(PromptTuning):
    """Embeddings of worked examples before the text, each moved by ‖δ‖ ≤ ε at most.

    The callback, or `MethodHooks`, projects δ back after each step. Embeddings of labels stay.

    Attributes:
        n: Number of positions, which is that of the ids; 0 takes it from them.
        init_ids: Token ids of the examples.
        types: Kind of each token, 4 · example + 1: template of the input, 2: input, 3: template of
            the label, 4: label. 0: other, not moved.
        epsilon: ε of inputs is epsilon · √(width / 2048).
        format_epsilon: The same for templates.
        context_loss: Whether the output holds the positions of the prompt too, as `cpt_loss` needs,
            which also asks for the labels of the examples. Labels given to the model itself do not
            fit then.
        decay: Factor per example on its labels in `cpt_loss`, from the last one back.

    Raises:
        ValueError: no ids, an n other than their number, a number of types other than that of ids,
            an ε ≤ 0, decay outside (0, 1], mode="add".
    """

    n: int = 0
    init: Literal["vocab", "random", "text"] = "text"
    types: tuple[int, ...] | list[int] = ()
    epsilon: float = 0.1
    format_epsilon: float = 0.1
    context_loss: bool = False
    decay: float = 1.0

    limits = {
        "init": only("text"),
        "mode": only("prepend"),
        "epsilon": above(0),
        "format_epsilon": above(0),
        "decay": SHARE,
    }
    hf: ClassVar[HFFormat | None] = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        take_length_from_ids(self)
        super().__post_init__()
        require(
            len(self.types) == self.n and all(type(t) is int and t >= 0 for t in self.types),
            f"{self.label}: expected one type >= 0 per id, got {len(self.types)} for {self.n} ids",
        )

    @property
    def keeps_positions(self) -> bool:
        """Return `context_loss`."""
        return self.context_loss

    def _radii(self, width: int) -> Tensor:
        """ε of each position [n, 1]; 0 where it stays."""
        return radii_by_kind(self.types, self.epsilon, self.format_epsilon, width)

    def module(self, site: SequenceSite) -> nn.Module:
        """E, kept and saved, and P zero."""
        made = _Table()
        made.register_buffer("E", self._start(site))
        made.P = nn.Parameter(torch.zeros(self.n, site.width))
        return made

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """E + δ; no gradient reaches positions that stay."""
        made = cast(_Table, module)
        moves = (self._radii(site.width) > 0).to(made.P)
        return made.E.to(made.P.dtype) + moves * made.P

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Set δ to what `table` adds to E; positions that stay take the table's embedding."""
        made = cast(_Table, module)
        moves = (self._radii(site.width) > 0).to(made.P.device)
        with torch.no_grad():
            table = table.to(made.P)
            made.P.copy_(torch.where(moves, table - made.E, 0.0))
            made.E.copy_(torch.where(moves, made.E, table.to(made.E.dtype)))

    def after_step(self, ctx: StepContext) -> None:
        """Project δ into its ball."""
        for _, p in ctx.entries:
            project_into_balls(p["P"], self._radii(p["P"].shape[1]))
