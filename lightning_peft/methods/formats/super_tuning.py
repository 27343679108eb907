"""SuperTuning in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require_places
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear

if TYPE_CHECKING:
    from lightning_peft.methods.super_tuning import SuperTuning

__all__ = ["FORMAT"]


def _unpack(
    method: SuperTuning, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors unchanged, after a check that places lie in the weight."""
    if "places" in p:
        require_places(p["places"].long().reshape(-1), site.shape.numel())
    return dict(p)


#: SuperTuning in a peft directory.
FORMAT = HFFormat(
    peft_type="SUPERTUNING",
    tensors={
        "values": "supertuning_values",
        "places": "supertuning_indices",
        "A": "supertuning_lora_A.weight",
        "B": "supertuning_lora_B.weight",
    },
    integers=("places",),
    config=config_keys("sparsity", "select_top", "r", alpha="lora_alpha"),
    own_defaults=True,
    inert={"lora_dropout": 0.0, "init_weights": True, "save_precomputed_indices": True},
    unpack=_unpack,
    refuse=refuse_all_but_linear,
)
