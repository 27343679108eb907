"""MonteCLoRA in peft's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.formats.lora import nested_config

if TYPE_CHECKING:
    from lightning_peft.methods.monteclora import MonteCLoRA

__all__ = ["FORMAT"]

_CONFIG = nested_config(
    "monteclora_config",
    {
        "samples": "num_samples",
        "entropy": "use_entropy",
        "dirichlet_prior": "dirichlet_prior",
        "noise": "sample_scaler",
        "kl_weight": "kl_loss_weight",
    },
    ignored=("buffer_size",),
)


def _pack(method: MonteCLoRA, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what peft's sampler drew last; it draws again before it reads them."""
    r, n = len(p["log_std"]), len(p["log_concentration"])
    last = {"variance": torch.eye(r), "weights": torch.full((n,), 1 / n)}
    return {**lora_format.pack(method, site, p), **last}


def _unpack(
    method: MonteCLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    kept = {k: t for k, t in p.items() if k not in ("variance", "weights")}
    return lora_format.unpack(method, site, kept, config)


#: MonteCLoRA in a peft directory.
FORMAT = dataclasses.replace(
    lora_format.FORMAT,
    tensors={
        **lora_format.FORMAT.tensors,
        "log_std": "lora_monteclora_sampler.std_prior",
        "log_concentration": "lora_monteclora_sampler.expert_weights_prior",
        "variance": "lora_monteclora_sampler.gaussian_var_prior",
        "weights": "lora_monteclora_sampler.expert_weights",
    },
    optional=("log_std", "log_concentration", "variance", "weights"),
    pack=_pack,
    unpack=_unpack,
    when={**lora_format.FORMAT.when, "monteclora_config": True},
    to_config=_CONFIG[0],
    from_config=_CONFIG[1],
    refuse=refuse_all_but_linear,
)
