"""VBLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features

if TYPE_CHECKING:
    from lightning_peft.methods.vblora import VBLoRA

__all__ = ["FORMAT"]


def _unpack(
    method: VBLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Logits; where a file holds the chosen vectors and their weights alone, log w there and −∞
    elsewhere: the same output, but training cannot choose others.
    """
    found = {k: t for k, t in p.items() if k in ("A", "B")}
    for name in ("A", "B"):
        if f"{name}_at" not in p:
            continue
        at, w = p[f"{name}_at"].long(), p[f"{name}_w"]
        require(
            at.shape[-1] == method.topk and w.shape == (*at.shape[:-1], method.topk - 1),
            f"expected {method.topk} indices and {method.topk - 1} weights per vector, got "
            f"{list(at.shape)} and {list(w.shape)}",
        )
        require(
            int(at.min()) >= 0 and int(at.max()) < method.num_vectors,
            f"expected indices from 0 to {method.num_vectors - 1}, got {int(at.min())} to "
            f"{int(at.max())}",
        )
        w = torch.cat((w, 1 - w.sum(-1, keepdim=True)), dim=-1)
        nothing = w.new_full((*at.shape[:-1], method.num_vectors), -torch.inf)
        found[name] = nothing.scatter(-1, at, w.log())
    return found


#: VBLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="VBLORA",
    tensors={
        "A": "vblora_logits_A",
        "B": "vblora_logits_B",
        "A_at": "vblora_logits_A_topk_indices",
        "A_w": "vblora_logits_A_topk_weights",
        "B_at": "vblora_logits_B_topk_indices",
        "B_w": "vblora_logits_B_topk_weights",
    },
    integers=("A_at", "B_at"),
    prefix={"bank": "base_model.vblora_vector_bank"},
    config=config_keys(
        "bias",
        "r",
        "num_vectors",
        "vector_length",
        "topk",
        dropout="vblora_dropout",
        bank_bound="init_vector_bank_bound",
        logits_std="init_logits_std",
    ),
    own_defaults=True,
    inert={"fan_in_fan_out": False, "save_only_topk_weights": False},
    unpack=_unpack,
    refuse=refuse_all_but_features,
)
