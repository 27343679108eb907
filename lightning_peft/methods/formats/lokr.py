"""LoKr in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys

if TYPE_CHECKING:
    from lightning_peft.methods.lokr import LoKr

__all__ = ["FORMAT"]


def _pack(method: LoKr, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full w2 has the kernel's axes in the file; t2 has two of them on Conv1d as well."""
    packed = dict(p)
    if "w2" in p and site.kernel_size:
        packed["w2"] = p["w2"].reshape(p["w2"].shape[0], -1, *site.kernel_size)
    if "t2" in p and len(site.kernel_size) == 1:
        packed["t2"] = p["t2"].unsqueeze(-1)
    return packed


def _unpack(
    method: LoKr, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    tensors = {k: t.flatten(1) if k == "w2" else t for k, t in p.items()}
    if "t2" in p and len(site.kernel_size) == 1:
        tensors["t2"] = p["t2"].squeeze(-1)
    return tensors


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    reshaped = any(len(e.site.kernel_size) == 1 and "w2" in e.tensors for e in entries)
    return {"conv1d": "reshaped"} if reshaped else {}


def _refuse(method: LoKr, site: Site) -> str:
    if site.batch_shape:
        return "there experts take LoRA alone"
    kernel = site.kernel_size
    if len(kernel) == 1 and method.conv1d == "exact" and method.has_full_w2(site):
        return (
            "peft multiplies w1 with other axes of a full w2 there: attach LoKr(conv1d='reshaped') "
            "to train what peft computes"
        )
    flat = len(kernel) == 1 or (1 in kernel and any(k != 1 for k in kernel))
    thin = method.use_effective_conv2d and method.rank(site) == 1
    if thin and flat and not method.has_full_w2(site):
        return "peft 0.21 fails in the forward of rank 1 over a kernel with an axis of length 1"
    return ""


#: LoKr in a peft directory.
FORMAT = HFFormat(
    peft_type="LOKR",
    tensors={
        "w1": "lokr_w1",
        "w1_a": "lokr_w1_a",
        "w1_b": "lokr_w1_b",
        "w2": "lokr_w2",
        "w2_a": "lokr_w2_a",
        "w2_b": "lokr_w2_b",
        "t2": "lokr_t2",
    },
    config=config_keys(
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "rank_dropout_scale",
        "decompose_both",
        "decompose_factor",
        "use_effective_conv2d",
        "rank_pattern",
        "alpha_pattern",
    ),
    own_defaults=True,
    ignored=("init_weights",),
    kinds=("Linear", "Conv1d", "Conv2d"),
    follows=("dilation",),
    refuse=_refuse,
    from_config=_from_config,
    pack=_pack,
    unpack=_unpack,
)
