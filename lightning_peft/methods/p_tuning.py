"""PTuning: a prompt made by a small network, P = head(E) with trained E.

Source: Liu et al. 2021, "GPT Understands, Too", section 3.2; networks as in Hugging Face peft 0.21:
mlp: d → h → h → d with ReLU; lstm: bidirectional, then 2h → 2h → d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFFormat, SequenceMethod
from lightning_peft.methods.checks import require_no_network
from lightning_peft.methods.formats.p_tuning import FORMAT
from lightning_peft.methods.limits import COUNT, FRACTION
from lightning_peft.methods.registry import register

__all__ = ["PTuning"]


class _Encoder(nn.Module):
    """The trained embeddings and their network; the method's options say which parts exist."""

    E: nn.Parameter
    lstm: nn.LSTM
    head: nn.Sequential


@register
@dataclass(frozen=True)
class PTuning(SequenceMethod):
    """Prompt through a network. Saving to Hugging Face peft keeps only the prompt; our checkpoints
    keep the network too, so that training resumes.

    Attributes:
        n: Number of virtual tokens.
        encoder: ``"mlp"``, ``"lstm"``, or None: the prompt itself is trained (a prompt that was
            loaded from a file).
        hidden: Width of the network; None: the embeddings' width.
        layers: Layers of the LSTM.
        dropout: Between the layers of the LSTM.
    """

    n: int = 20
    encoder: Literal["mlp", "lstm"] | None = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0

    limits = {"n": COUNT, "hidden": COUNT, "layers": COUNT, "dropout": FRACTION}
    hf: ClassVar[HFFormat | None] = FORMAT

    def module(self, site: SequenceSite) -> nn.Module:
        """E [n, width] and the network."""
        d = site.width
        h = self.hidden or d
        made = _Encoder()
        made.E = nn.Parameter(torch.randn(self.n, d))
        if self.encoder == "lstm":
            made.lstm = nn.LSTM(
                d,
                h,
                self.layers,
                dropout=self.dropout if self.layers > 1 else 0.0,
                bidirectional=True,
                batch_first=True,
            )
            made.head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        elif self.encoder == "mlp":
            made.head = nn.Sequential(
                *(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))
            )
        return made

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """head(lstm(E)), head(E) or E."""
        made = cast(_Encoder, module)
        P: Tensor = made.E
        if self.encoder == "lstm":
            P = made.lstm(P.unsqueeze(0))[0][0]
        return P if self.encoder is None else made.head(P)

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Copy into E.

        Raises:
            ValueError: a network makes the prompt.
        """
        require_no_network(self, "encoder", None)
        made = cast(_Encoder, module)
        made.E.data.copy_(table)
