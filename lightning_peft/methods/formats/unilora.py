"""UniLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features

if TYPE_CHECKING:
    from lightning_peft.methods.unilora import UniLoRA

__all__ = ["FORMAT"]


def _unpack(
    method: UniLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Indices where the file has them; scales follow from their counts."""
    found = {k: p[k] for k in ("at_A", "at_B") if k in p}
    for name, at in found.items():
        require(
            int(at.min()) >= 0 and int(at.max()) < method.length,
            f"{name}: expected indices from 0 to {method.length - 1}, got {int(at.min())} to "
            f"{int(at.max())}",
        )
    return found


#: UniLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="UNILORA",
    tensors={
        "at_A": "unilora_indices_A",
        "at_B": "unilora_indices_B",
        "scale_A": "unilora_scales_A",
        "scale_B": "unilora_scales_B",
    },
    integers=("at_A", "at_B"),
    optional=("at_A", "at_B", "scale_A", "scale_B"),
    unwritten=("at_A", "at_B", "scale"),
    prefix={"theta": "base_model.unilora_theta_d"},
    config=config_keys(
        "bias",
        "r",
        length="theta_d_length",
        seed="proj_seed",
        dropout="unilora_dropout",
        bound="init_theta_d_bound",
    ),
    own_defaults=True,
    inert={"fan_in_fan_out": False, "init_weights": True, "save_indices": False},
    unpack=_unpack,
    refuse=refuse_all_but_features,
)
