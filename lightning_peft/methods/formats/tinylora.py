"""TinyLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.exchange import (
    config_keys,
    refuse_all_but_features,
    refuse_scaled_embedding,
)

if TYPE_CHECKING:
    from lightning_peft.methods.tinylora import TinyLoRA

__all__ = ["FORMAT"]


def _turned(site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B change places, transposed, where peft factors the table of an embedding."""
    turned = dict(p)
    if site.is_embedding and {"A", "B"} <= set(p):
        turned["A"], turned["B"] = p["B"].mT, p["A"].mT
    return turned


def _refuse(method: TinyLoRA, site: Site) -> str:
    if site.is_embedding:
        return refuse_scaled_embedding(method, site)
    return refuse_all_but_features(method, site)


#: TinyLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="TINYLORA",
    tensors={"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"},
    optional=("P",),
    unwritten=("group",),
    prefix={"v": "base_model.tinylora_v.{i}"},
    config=config_keys(
        "bias",
        "r",
        "u",
        "weight_tying",
        seed="projection_seed",
        bound="init_v_bound",
        dropout="tinylora_dropout",
    ),
    own_defaults=True,
    inert={"fan_in_fan_out": False, "init_weights": True, "save_projection": True},
    pack=lambda method, site, p: _turned(site, p),
    unpack=lambda method, site, p, config: _turned(site, p),
    refuse=_refuse,
)
