"""OFT in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys

if TYPE_CHECKING:
    from lightning_peft.methods.oft import OFT

__all__ = ["FORMAT"]


def _refuse(method: OFT, site: Site) -> str:
    if site.is_embedding:
        return ""
    if any(k != 1 for k in site.kernel_size):
        return "peft folds overlapping patches into sums there: its output differs at the start"
    return ""


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Exactly one of both is set."""
    config["r" if config["oft_block_size"] else "oft_block_size"] = 0


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    version = str(config.get("peft_version") or "9.9").split(".")[:2]
    if [int(x) for x in version if x.isdigit()] < [0, 16]:
        raise ValueError(
            "adapter_config.json: OFT: expected a file of peft 0.16 or newer, got one of "
            f"{config['peft_version']}, whose rotations act on the other side; convert it with peft"
        )
    return {}


#: OFT in a peft directory.
FORMAT = HFFormat(
    peft_type="OFT",
    tensors={"triangle": "oft_R.weight"},
    lookup={"triangle": "oft_embedding_R.weight"},
    config=config_keys(
        "bias",
        "r",
        "block_share",
        "coft",
        "eps",
        block_size="oft_block_size",
        cayley_neumann="use_cayley_neumann",
        terms="num_cayley_neumann_terms",
    ),
    own_defaults=True,
    inert={"module_dropout": 0.0, "fan_in_fan_out": False},
    defaults={"use_cayley_neumann": True},
    ignored=("init_weights",),
    to_config=_to_config,
    from_config=_from_config,
    kinds=("Linear", "Conv2d", "Embedding"),
    refuse=_refuse,
)
