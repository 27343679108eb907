"""PTuning in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.formats.prompt_parts import (
    model_config,
    sequence_site,
    unpack_prompt,
)

if TYPE_CHECKING:
    from lightning_peft.methods.p_tuning import PTuning

__all__ = ["FORMAT"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site = sequence_site(entries)
    method = entries[0].method
    config.update(model_config(site, site.width))
    config.update(
        encoder_reparameterization_type=(method.encoder or "mlp").upper(),
        encoder_hidden_size=method.hidden or site.width,
        encoder_num_layers=method.layers,
        encoder_dropout=method.dropout,
    )


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """The network is not in the file: what it made is trained on."""
    return {"encoder": None}


def _refuse(method: PTuning, site: SequenceSite) -> str:
    return "" if site.embedding else "a transformer of your own has no equal there"


#: PTuning in a peft directory.
FORMAT = HFFormat(
    peft_type="P_TUNING",
    tensors={},
    prefix={"P": "prompt_embeddings"},
    config={"n": "num_virtual_tokens"},
    refuse=_refuse,
    ignored=(
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"),
        *("encoder_dropout", "token_dim", "num_layers", "num_attention_heads"),
        "num_transformer_submodules",
    ),
    saved_prefix="base_model.",
    unpack=unpack_prompt,
    to_config=_to_config,
    from_config=_from_config,
)
