"""IA3 in peft's files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.name_patterns import fullmatch
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import require_shape

if TYPE_CHECKING:
    from lightning_peft.methods.ia3 import IA3

__all__ = ["FORMAT"]

_ADDS = "peft's IA3 multiplies only; its BEFT adds: attach BEFT()"


def _pack(method: IA3, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[1, in] where the input is scaled, [out, 1] where the output is."""
    return {"scale": p["scale"].unsqueeze(0 if method.scales_input(site) else 1)}


def _unpack(
    method: IA3, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    scale = p.get("scale")
    if scale is not None and scale.ndim == 2:  # a convolution's is flat already
        inside = method.scales_input(site)
        size = site.in_features if inside else site.out_features
        require_shape("ia3_l", scale, (1, size) if inside else (size, 1))
    return {k: t.reshape(-1) for k, t in p.items()}


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Feed-forward layers as a pattern of full names: peft asks lists of them to be a subset of
    `target_modules`.
    """
    names = [re.escape(e.path) for e in entries if e.method.scales_input(e.site)]
    config["feedforward_modules"] = "|".join(names) if names else []


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """Full names of the layers that the config's rule (plain endings, or a pattern) means."""
    rule = config.get("feedforward_modules") or []
    if isinstance(rule, str):
        names = [e.site.name for e in entries if fullmatch(rule, e.path)]
    else:
        names = [e.site.name for e in entries if e.path.endswith(tuple(rule))]
    return {"feedforward_modules": names}


#: IA3 in a peft directory.
FORMAT = HFFormat(
    peft_type="IA3",
    tensors={"scale": "ia3_l"},
    axes={"scale": "vector"},
    config={},
    defaults={"feedforward_modules": None},
    inert={"fan_in_fan_out": False, "init_ia3_weights": True},
    pack=_pack,
    unpack=_unpack,
    to_config=_to_config,
    from_config=_from_config,
    kinds=("Linear", "Conv1D", "Conv2d", "Conv3d"),
    follows=("dilation", "padding_mode"),
    refuse=lambda method, site: _ADDS if method.mode == "add" else "",
)
