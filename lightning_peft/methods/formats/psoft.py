"""PSOFT in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear

__all__ = ["FORMAT"]

_TENSORS = {"q": "psoft_R.weight", "a": "psoft_R.vector_a", "b": "psoft_R.vector_b"}


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    if config["psoft_svd"] != "full":
        raise ValueError(
            "adapter_config.json: psoft_svd: expected 'full', whose factors of the weight are the "
            f"same in every process, got {config['psoft_svd']!r}: they are approximated from "
            "random vectors and not in the file; merge the adapter with peft (merge_and_unload) in "
            "the process that trained it"
        )
    return {}


#: PSOFT in a peft directory.
FORMAT = HFFormat(
    peft_type="PSOFT",
    tensors=_TENSORS,
    unwritten=("A", "B"),
    config=config_keys(
        "r",
        alpha="psoft_alpha",
        orthogonal="psoft_orth",
        mag_a="psoft_mag_a",
        mag_b="psoft_mag_b",
        split="ab_svd_init",
        dropout="psoft_dropout",
        cayley_neumann="use_cayley_neumann",
        terms="num_cayley_neumann_terms",
        eps="cayley_neumann_eps",
    ),
    own_defaults=True,
    fixed={"psoft_svd": "full"},
    inert={"fan_in_fan_out": False, "init_weights": True},
    defaults={"psoft_svd": "full"},
    ignored=("psoft_svd_lowrank_niter", "random_seed"),
    from_config=_from_config,
    refuse=refuse_all_but_linear,
)
