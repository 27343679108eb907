"""HardPrompt: a prompt of real tokens, trained through its continuous shadow.

P' = E[argmax_v cos(P_i, E_v)] in forward, and the gradient of P' is applied to P.

Source: Wen et al. 2023, "Hard Prompts Made Easy" (PEZ), algorithm 1; nearest by cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.limits import only
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.registry import register

__all__ = ["HardPrompt"]

_CHUNK = 8192  # rows of the vocabulary compared at a time: 8192 × 4096 fp32 are 128 MiB


@register
@dataclass(frozen=True)
class HardPrompt(PromptTuning):
    """Prompt tuning projected to tokens in every forward. Saved to Hugging Face peft as the
    embeddings of its tokens; `lightning_peft.hard_prompt_ids` reads the tokens.
    """

    limits = {"mode": only("prepend")}

    def token_ids(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """The nearest tokens [n] int64."""
        P = super().prompt_embeddings(module, site)
        with torch.no_grad():
            wanted = F.normalize(P.detach().float(), dim=-1)
            best = torch.full((self.n,), -2.0, device=P.device)
            ids = torch.zeros(self.n, dtype=torch.int64, device=P.device)
            for start in range(0, site.vocabulary, _CHUNK):
                end = min(start + _CHUNK, site.vocabulary)
                rows = site.embed(torch.arange(start, end)).to(P.device)
                value, index = (wanted @ F.normalize(rows, dim=-1).T).max(dim=-1)
                better = value > best
                best = torch.where(better, value, best)
                ids = torch.where(better, index + start, ids)
        return ids

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """Embeddings of the nearest tokens; the gradient goes to P."""
        P = super().prompt_embeddings(module, site)
        rows = site.embed(self.token_ids(module, site)).to(P)
        out: Tensor = P + (rows - P).detach()
        return out
