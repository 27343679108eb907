"""PrefixTuning in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.prompt_parts import model_config, sequence_site, submodule_count

if TYPE_CHECKING:
    from lightning_peft.methods.prefix_tuning import PrefixTuning

__all__ = ["FORMAT"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site = sequence_site(entries)
    heads, features = site.layers[0]
    config.update(model_config(site, heads * features), num_attention_heads=heads)
    config.update(num_transformer_submodules=submodule_count(site))
    config.update(prefix_projection=False, encoder_hidden_size=heads * features)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """The network is not in the file: what it made is trained on."""
    return {"projection": False}


def _unpack(
    method: PrefixTuning,
    site: SequenceSite,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    P = tensors["P"]
    expected = (method.n, method.columns(site))
    require(
        tuple(P.shape) == expected,
        f"prompt_embeddings: expected shape {list(expected)}, got {list(P.shape)}",
    )
    submodules = int(config.get("num_transformer_submodules") or submodule_count(site))
    if submodules == 2:
        parts = P.view(method.n, 2 * len(site.layers), -1)
        P = parts[:, _peft_rows(len(site.layers))].reshape(expected)
    return {"P": P}


def _pack(
    method: PrefixTuning, site: SequenceSite, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    P = tensors["P"]
    if submodule_count(site) == 1:
        return {"P": P}
    parts = P.view(P.shape[0], 2 * len(site.layers), -1)
    rows = _peft_rows(len(site.layers))
    theirs = torch.zeros_like(parts)
    theirs[:, rows] = parts
    require(
        torch.equal(theirs[:, rows], parts),
        f"save_adapter: {method.label} on {site.quoted} has no equal in peft: its layout for "
        f"encoder-decoders gives {len(site.layers)} decoder layers (an even number) one prefix for "
        "two layers; keep the adapter with adapter_state_dict()",
    )
    return {"P": theirs.reshape(P.shape)}


def _peft_rows(layers: int) -> list[int]:
    """Return the rows at which peft reads the keys and values of a decoder's layers.

    Peft writes the table twice in a row, and gives layer l the pair (4l, 4l + 1).
    """
    pairs = 2 * layers
    return [(4 * (i // 2) + i % 2) % pairs for i in range(pairs)]


def _refuse(method: PrefixTuning, site: SequenceSite) -> str:
    if method.gating:
        return "peft's prefixes have no gates"
    if not site.embedding:
        return "a transformer of your own has no equal there"
    return "" if len(set(site.layers)) == 1 else "its layers have different heads"


#: PrefixTuning in a peft directory.
FORMAT = HFFormat(
    peft_type="PREFIX_TUNING",
    tensors={},
    prefix={"P": "prompt_embeddings"},
    config={"n": "num_virtual_tokens"},
    ignored=(
        *("prefix_projection", "encoder_hidden_size", "init_weights", "token_dim"),
        *("num_layers", "num_attention_heads", "num_transformer_submodules"),
    ),
    saved_prefix="base_model.",
    pack=_pack,
    unpack=_unpack,
    to_config=_to_config,
    from_config=_from_config,
    refuse=_refuse,
)
