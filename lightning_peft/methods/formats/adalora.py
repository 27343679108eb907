"""AdaLoRA in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.names import matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import require_shape

if TYPE_CHECKING:
    from lightning_peft.methods.adalora import AdaLoRA

__all__ = ["FORMAT"]


def _pack(method: AdaLoRA, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the triplets that are left, as peft saves them."""
    kept = p["mask"].bool()
    return {"A": p["A"][kept], "B": p["B"][:, kept], "E": p["E"][kept].unsqueeze(1)}


def _unpack(
    method: AdaLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Back into `init_r` places; E is zero in those that were pruned."""
    kept = _pattern(config, site)
    if kept is None:
        kept = torch.ones(method.init_r, dtype=torch.bool)
    n = int(kept.sum())
    if not {"A", "B", "E"} <= set(p):
        return dict(p)
    if p["A"].shape[0] != n or p["B"].shape[1] != n:
        raise ValueError(f"expected {n} triplets by rank_pattern")
    require_shape("lora_E", p["E"], (n, 1))
    A = torch.zeros(len(kept), p["A"].shape[1], dtype=p["A"].dtype)
    B = torch.zeros(p["B"].shape[0], len(kept), dtype=p["B"].dtype)
    E = torch.zeros(len(kept), dtype=p["E"].dtype)
    A[kept], B[:, kept], E[kept] = p["A"], p["B"], p["E"].reshape(-1)
    return {"A": A, "B": B, "E": E, "mask": kept.float()}


def _pattern(config: Mapping[str, Any], site: Site) -> Tensor | None:
    for key, kept in (config.get("rank_pattern") or {}).items():
        name = key.removesuffix(".lora_E")
        if matches_suffix(site.name, [name]):
            return torch.tensor(kept, dtype=torch.bool)
    return None


def _refuse(method: AdaLoRA, site: Site) -> str:
    grouped = getattr(site.module, "groups", 1) != 1
    return "peft's AdaLoRA knows no grouped convolution" if grouped else ""


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    masks = {e.path: e.own["mask"].bool().tolist() for e in entries}
    pruned = any(not all(mask) for mask in masks.values())
    config["rank_pattern"] = {f"{n}.lora_E": m for n, m in masks.items()} if pruned else None
    # peft asks for the number of steps of a run that is over.
    config["total_step"] = config["total_step"] or config["tinit"] + config["tfinal"] + 1


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(
        isinstance(v, list) and v and all(isinstance(x, bool) for x in v) for v in pattern.values()
    ):
        raise ValueError(
            "adapter_config.json: rank_pattern: expected layer names with lists of true and false"
        )
    lengths = {len(v) for v in pattern.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"adapter_config.json: rank_pattern: expected one length, got {sorted(lengths)}"
        )
    return {"init_r": lengths.pop()} if lengths else {}


#: AdaLoRA in a peft directory.
FORMAT = HFFormat(
    peft_type="ADALORA",
    tensors={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    config={
        "bias": "bias",
        "init_r": "init_r",
        "target_r": "target_r",
        "alpha": "lora_alpha",
        "tinit": "tinit",
        "tfinal": "tfinal",
        "deltaT": "deltaT",
        "beta1": "beta1",
        "beta2": "beta2",
        "orth_reg_weight": "orth_reg_weight",
        "total_step": "total_step",
        "dropout": "lora_dropout",
    },
    fixed={"r": 8, "fan_in_fan_out": False, "init_lora_weights": True},
    defaults={
        "bias": "none",
        "target_r": 8,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": None,
        "lora_dropout": 0.0,
        "rank_pattern": None,
    },
    ignored=(
        *("init_lora_weights", "fan_in_fan_out", "r", "loftq_config", "lora_bias"),
        *("megatron_core", "eva_config", "corda_config", "lora_ga_config"),
        *("ensure_weight_tying", "qalora_group_size", "alpha_pattern"),
    ),
    pack=_pack,
    unpack=_unpack,
    to_config=_to_config,
    from_config=_from_config,
    kinds=("Linear", "Conv1D", "Conv2d"),
    follows=("dilation",),
    refuse=_refuse,
)
