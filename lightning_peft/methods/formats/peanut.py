"""PEANuT in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear

if TYPE_CHECKING:
    from lightning_peft.methods.peanut import PEANuT

__all__ = ["FORMAT", "MOST_LAYERS"]

MOST_LAYERS = 32  # layers of each half that a file may have


def _pack(method: PEANuT, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One entry per layer of the network."""
    layers = {f"{k}{i}": p[k][i] for k in ("E", "D") if k in p for i in range(method.depth)}
    return {"A": p["A"], "B": p["B"], **layers}


def _unpack(
    method: PEANuT, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Layers stacked."""
    found = {k: t for k, t in p.items() if k in ("A", "B")}
    for half in ("E", "D") if method.depth else ():
        found[half] = torch.stack([p[f"{half}{i}"] for i in range(method.depth)])
    left = sorted(set(p) - set(_pack(method, site, found)))
    require(not left, f"expected {method.depth} layers of each half by the config, got {left} too")
    return found


#: PEANuT in a peft directory.
FORMAT = HFFormat(
    peft_type="PEANUT",
    tensors={
        "A": "peanut_A.weight",
        "B": "peanut_B.weight",
        **{f"E{i}": f"peanut_encoders.{i}.weight" for i in range(MOST_LAYERS)},
        **{f"D{i}": f"peanut_decoders.{i}.weight" for i in range(MOST_LAYERS)},
    },
    config=config_keys("r", "depth", "act_fn", "scaling"),
    own_defaults=True,
    inert={"init_weights": True},
    pack=_pack,
    unpack=_unpack,
    refuse=refuse_all_but_linear,
)
