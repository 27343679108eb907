"""BEFT: y = x Wᵀ + b + d, only the shift d of some layers is trained. peft 0.21, ``BeftConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require_shape
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.limits import only
from lightning_peft.methods.registry import register

__all__ = ["BEFT"]


def _pack(method: BEFT, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"shift": p["shift"].unsqueeze(0)}


def _unpack(
    method: BEFT, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    for t in p.values():
        require_shape("beft_bias", t, (1, site.out_features))
    return {k: t.reshape(-1) for k, t in p.items()}


@register
@dataclass(frozen=True)
class BEFT(IA3):
    """`IA3(mode="add")` under peft's name, with its files.

    Attributes:
        mode: ``"add"``, nothing else.

    Raises:
        ValueError: another mode.
    """

    mode: Literal["multiply", "add"] = "add"

    limits = {"mode": only("add")}
    hf = HFFormat(
        peft_type="BEFT",
        tensors={"shift": "beft_bias"},
        config={},
        inert={"init_weights": True},
        kinds=("Linear",),
        pack=_pack,
        unpack=_unpack,
    )
