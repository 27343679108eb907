"""AdaptionPrompt (LLaMA-Adapter): positions in the attention of the last blocks, whose effect grows
from zero. Zhang et al. 2023, arXiv:2303.16199.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import BlockSite
from lightning_peft.methods.base import BlockMethod, HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys
from lightning_peft.methods.limits import COUNT, at_least
from lightning_peft.methods.registry import register

__all__ = ["AdaptionPrompt"]


class _Positions(nn.Module):
    """P [1, n, width], g [1]."""

    P: nn.Parameter
    g: nn.Parameter


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    config["adapter_layers"] = len(entries)


def _refuse(method: AdaptionPrompt, site: BlockSite) -> str:
    model_type = site.module.config.model_type  # type: ignore[union-attr]
    known = ("gpt2", "llama", "mistral")
    return "" if model_type in known else f"peft knows {', '.join(known)} only, not {model_type}"


@register
@dataclass(frozen=True)
class AdaptionPrompt(BlockMethod):
    """out + W_o (g · softmax(q K_Pᵀ / √d) V_P) in self-attention; g starts at zero.

    For GPT-2, Llama, Mistral and Qwen 2. The output starts as it is. Queries carry their rotary
    position, the keys of P none. In GPT-2 there is no W_o. Both are as in peft.

    Attributes:
        n: Number of positions.
        layers: Number of blocks, from the last one back; None for all.

    Raises:
        ValueError: n or layers below 1.
    """

    n: int = 10
    layers: int | None = None

    limits = {"n": COUNT, "layers": at_least(1)}
    hf: ClassVar[HFFormat | None] = HFFormat(
        peft_type="ADAPTION_PROMPT",
        tensors={},
        config=config_keys(n="adapter_len", layers="adapter_layers"),
        saves_modules=False,
        to_config=_to_config,
        refuse=_refuse,
    )

    @property
    def where(self) -> Literal["attention"]:
        """Return "attention": the prompt enters self-attention."""
        return "attention"

    @property
    def top_layers(self) -> int | None:
        """Return `layers`."""
        return self.layers

    def module(self, site: BlockSite) -> nn.Module:
        """P normal, g zero."""
        made = _Positions()
        made.P = nn.Parameter(torch.randn(1, self.n, site.width_out))
        made.g = nn.Parameter(torch.zeros(1))
        return made

    def attention_prompt(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """P and g."""
        made = cast(_Positions, module)
        return made.P, made.g
