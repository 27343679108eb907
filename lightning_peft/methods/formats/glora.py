"""GLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear

if TYPE_CHECKING:
    from lightning_peft.methods.glora import GLoRA

__all__ = ["FORMAT", "path_shapes"]

_PATHS = "ABCDE"


def path_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """The shape of each path's value."""
    out, inner = site.out_features, site.in_features
    return {"A": (out, inner), "B": (out, inner), "C": (inner, 1), "D": (out,), "E": (out,)}


def _pack(method: GLoRA, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With zeros for the paths that a site has not, as peft writes them."""
    present = {name[0] for name in p}
    some = next(iter(p.values()))
    shapes = path_shapes(site).items()
    return {**p, **{f"{k}0": some.new_zeros(s) for k, s in shapes if k not in present}}


def _unpack(
    method: GLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Without those zeros."""
    return {name: t for name, t in p.items() if not name.endswith("0")}


#: GLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="GLORA",
    tensors={
        **{f"{k}{d}": f"glora_{k}.X{d}" for k in "ABC" for d in "du"},
        **{k: f"glora_{k}.X" for k in _PATHS},
        **{f"{k}0": f"glora_{k}.zeros" for k in _PATHS},
    },
    config=config_keys(
        "r", weight_form="config_A_B", weight_to_bias="config_C", bias_form="config_D_E"
    ),
    own_defaults=True,
    fixed={"bias": "none"},
    inert={"init_weights": True},
    pack=_pack,
    unpack=_unpack,
    refuse=refuse_all_but_linear,
)
