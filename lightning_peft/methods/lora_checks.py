"""Checks of LoRA's arguments, by themselves and at a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_peft.core.site import Site
from lightning_peft.methods.base import InitData
from lightning_peft.methods.checks import require, require_ranks
from lightning_peft.methods.lora_options import INITS, check_options
from lightning_peft.methods.token_indices import check_token_indices

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA

__all__ = ["check_site", "check_values"]


def check_values(lora: LoRA) -> None:
    """Check the arguments by themselves.

    Raises:
        ValueError: a value out of range, or options that exclude each other.
    """
    label = lora.label
    require_ranks(label, lora.r, lora.rank_pattern, lora.alpha, lora.alpha_pattern)
    require(
        lora.init in INITS or lora.svd_iterations is not None,
        f"{label}: expected init in {(*INITS, 'pissa_niter_N')}, got {lora.init!r}",
    )
    check_options(label, lora.init, lora.init_options)
    if lora.trainable_token_indices is not None:
        check_token_indices(f"{label} trainable_token_indices", lora.trainable_token_indices)
    require(
        not lora.freeze_A or not (lora.needs_data or lora.init == "mica" or lora.precondition),
        f"{label}: expected freeze_A without precondition and with a start that trains B "
        f"alone, got init={lora.init!r}, precondition={lora.precondition}",
    )
    require(
        not lora.precondition or lora.init != "mica",
        f"{label}: expected precondition with two trained factors, got init='mica'",
    )


def check_site(lora: LoRA, site: Site, *, is_plain: bool) -> None:
    """Check the rank against the layer's size, and options that a layer does not allow.

    Args:
        lora: The method.
        site: The weight.
        is_plain: Whether the method is LoRA itself, none that derives from it.

    Raises:
        ValueError: with the layer.
    """
    where = f"{lora.label} on {site.quoted}"
    r, most = lora.rank(site), min(site.out_features, site.in_features)
    require(
        r <= most or not lora.limits_rank,
        f"{where}: expected 1 <= r <= min(in_features, out_features) = {most}, got r = {r}; lower "
        "r, or set it for this layer with rank_pattern, or exclude it",
    )
    require(
        lora.init != "orthogonal" or r % 2 == 0,
        f"{where}: expected an even rank for init='orthogonal', got r = {r}",
    )
    require(
        not (site.is_embedding and lora.rewrites_base),
        f"{where}: expected a layer with features for input with init={lora.init!r}, got an "
        "embedding; exclude it or use init='default'",
    )
    require(
        lora.needs_data != InitData.GRADIENTS or 2 * r <= most,
        f"{where}: expected r <= min(in_features, out_features) / 2 = {most // 2} with "
        f"init='lora_ga', which takes 2 r singular vectors, got r = {r}; lower r, or set it for "
        "this layer with rank_pattern, or exclude it",
    )
    require(
        not lora.needs_data or (site.ops.features_last and not site.batch_shape),
        f"{where}: expected a linear layer with init={lora.init!r}, got "
        f"{type(site.module).__name__}; exclude it or use init='default'",
    )
    require(
        not (site.batch_shape and lora.experts == "shared" and lora.rewrites_base),
        f"{where}: expected experts='each' with init={lora.init!r}, which takes its start from "
        "each expert's weight, got experts='shared'; use init='default'",
    )
    require(
        not (site.is_embedding and (lora.freeze_A or lora.init == "mica")),
        f"{where}: expected a layer with features for input with freeze_A or init='mica', got an "
        "embedding, whose A starts at zero and is what is trained; exclude it",
    )
    require(
        site.tied_to is None or (is_plain and not lora.lora_bias and not lora.precondition),
        f"{where}: expected plain LoRA without lora_bias and precondition on weights that are "
        f"tied, got ensure_weight_tying=True with {lora.label}; leave ensure_weight_tying out",
    )
    require(
        not (site.is_embedding and lora.lora_bias),
        f"{where}: expected no lora_bias on an embedding, got lora_bias=True",
    )
