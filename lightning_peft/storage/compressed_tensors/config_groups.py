"""``config_groups`` of a compressed-tensors configuration: settings by the layers they hold for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.storage.layer_patterns import is_listed
from lightning_peft.storage.released_format import ReleasedWeight

__all__ = ["block_of", "check_group", "groups_of", "has_target"]

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_FORMATS = (*_PACKED, "int-quantized", "naive-quantized", "float-quantized")
_STRATEGIES = ("group", "channel", "tensor", "block", "tensor_group")


def groups_of(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each group that quantises weights, with its settings for them."""
    for group in (config.get("config_groups") or {}).values():
        weights = group.get("weights")
        if weights:
            yield group, weights


def has_target(group: Mapping[str, Any], weight: ReleasedWeight) -> bool:
    """Whether the layer of a weight is among the targets of a group."""
    targets = group.get("targets") or ()
    return "Linear" in targets or is_listed(weight, targets)


def check_group(
    config: Mapping[str, Any], group: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Check that the tensors that the settings of a group lead to are known.

    Raises:
        ValueError: with the setting.
    """
    sparsity = config.get("sparsity_config") or {}
    for what, found, known in (
        ("format", group.get("format") or config.get("format"), _FORMATS),
        ("sparsity_config format", sparsity.get("format", "dense"), ("dense",)),
        ("actorder", weights.get("actorder"), (None, "static", "weight")),
        ("strategy", weights.get("strategy"), _STRATEGIES),
    ):
        if found not in known:
            raise ValueError(
                f"compressed-tensors {what}: expected one of {list(known)}, got {found!r}; load "
                "the model dequantised (CompressedTensorsConfig(dequantize=True))"
            )


def block_of(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 means all."""
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return 0, 0
    if strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        return int(rows), int(columns)
    return 1, int(weights.get("group_size") or 0) if strategy == "group" else 0
