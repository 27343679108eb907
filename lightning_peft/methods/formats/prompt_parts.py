"""Config entries about the model that peft writes for prompts and prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import HFEntry

__all__ = ["model_config", "sequence_site", "submodule_count", "unpack_prompt"]


def sequence_site(entries: Sequence[HFEntry]) -> SequenceSite:
    """Return the place of a prompt: the one entry of its method."""
    site = entries[0].site
    assert isinstance(site, SequenceSite)
    return site


def submodule_count(site: SequenceSite) -> int:
    """Number of stacks that peft assumes if a file does not say."""
    return 2 if site.task == "SEQ_2_SEQ_LM" else 1


def model_config(site: SequenceSite, token_dim: int) -> dict[str, Any]:
    """Return peft's config entries that describe the model."""
    return {
        "task_type": site.task,
        "auto_mapping": None,
        "token_dim": token_dim,
        "num_layers": len(site.layers) or 1,
        "num_attention_heads": 1,
        "num_transformer_submodules": 1,
    }


class _Prompt(Protocol):
    """A method with n positions."""

    @property
    def n(self) -> int:
        """Number of positions."""


def unpack_prompt(
    method: _Prompt, site: SequenceSite, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a prompt's embeddings; peft holds 2n rows for encoder-decoders and uses the first n.

    Raises:
        ValueError: another shape.
    """
    rows = method.n * int(config.get("num_transformer_submodules") or submodule_count(site))
    P = tensors["P"]
    require(
        tuple(P.shape) in {(rows, site.width), (method.n, site.width)},
        f"prompt_embeddings: expected shape {[rows, site.width]}, got {list(P.shape)}",
    )
    return {"P": P[: method.n]}
