"""RandLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features

if TYPE_CHECKING:
    from lightning_peft.methods.randlora import RandLoRA

__all__ = ["FORMAT"]


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """peft writes the shared bases once more per layer: equal copies are left out."""
    for name in ("A_copy", "B_copy"):
        copies = [e.tensors[name] for e in entries if name in e.tensors]
        if any(not torch.equal(copies[0], t) for t in copies[1:]):
            raise ValueError(
                f"adapter file: randlora_{name[0]}: expected the same bases in all layers, got "
                "copies that differ; nothing was loaded"
            )
    return {}


def _unpack(
    method: RandLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    return {k: t for k, t in p.items() if not k.endswith("_copy")}


def _pack_shared(
    entries: Sequence[HFEntry], shared: Mapping[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """The bases once more per layer, as peft 0.21 writes them: its load warns without."""
    places = ["base_model.", *(f"base_model.model.{e.path}." for e in entries)]
    return {f"{place}randlora_{name}": t.detach() for place in places for name, t in shared.items()}


#: RandLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="RANDLORA",
    tensors={
        "lam": "randlora_lambda",
        "gamma": "randlora_gamma",
        "A_copy": "randlora_A",
        "B_copy": "randlora_B",
    },
    prefix={"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
    optional=("A", "B"),
    config=config_keys(
        "bias",
        "r",
        "sparse",
        "very_sparse",
        alpha="randlora_alpha",
        seed="projection_prng_key",
        dropout="randlora_dropout",
    ),
    own_defaults=True,
    inert={"fan_in_fan_out": False, "init_weights": True, "save_projection": True},
    unpack=_unpack,
    pack_shared=_pack_shared,
    from_config=_from_config,
    refuse=refuse_all_but_features,
)
