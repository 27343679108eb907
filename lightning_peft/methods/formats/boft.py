"""BOFT in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import require_shape
from lightning_peft.methods.exchange import config_keys, refuse_uneven_conv2d

if TYPE_CHECKING:
    from lightning_peft.methods.boft import BOFT

__all__ = ["FORMAT"]


def _pack(method: BOFT, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"R": p["R"], "s": p["s"].reshape(_scale_shape(site))}


def _unpack(
    method: BOFT, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    if "s" in p:
        require_shape("boft_s", p["s"], _scale_shape(site))
    return {k: t.reshape(-1) if k == "s" else t for k, t in p.items()}


def _scale_shape(site: Site) -> tuple[int, int]:
    """[out, 1], and [1, out] on a convolution."""
    return (1, site.out_features) if site.kernel_size else (site.out_features, 1)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """The number of stages is that of the tensors: without its CUDA extension peft trains one
    whatever the config says.
    """
    stages = {e.tensors["R"].shape[0] for e in entries if "R" in e.tensors and e.tensors["R"].ndim}
    return {"n_butterfly": stages.pop()} if len(stages) == 1 else {}


#: BOFT in a peft directory.
FORMAT = HFFormat(
    peft_type="BOFT",
    tensors={"R": "boft_R", "s": "boft_s"},
    config=config_keys(
        "bias",
        block_size="boft_block_size",
        block_num="boft_block_num",
        n_butterfly="boft_n_butterfly_factor",
        dropout="boft_dropout",
    ),
    own_defaults=True,
    inert={"fan_in_fan_out": False},
    ignored=("init_weights",),
    pack=_pack,
    unpack=_unpack,
    from_config=_from_config,
    kinds=("Linear", "Conv2d"),
    refuse=refuse_uneven_conv2d,
)
