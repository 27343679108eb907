"""Conversions by which transformers merges the packed tensors of experts, and splits them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import Concatenate, WeightConverter

from lightning_peft.storage.block_scaled import BlockScaledStorage

__all__ = ["by_outputs_last", "written_conversions"]


def by_outputs_last(conversion: Any) -> Any:
    """Join gate and up along the last axis, where AWQ and GPTQ have the outputs."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    return conversion.copy(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        operations=[
            Concatenate(-1, op.num_shards_attribute) if isinstance(op, Concatenate) else op
            for op in conversion.operations
        ],
    )


def written_conversions(
    read: Sequence[Any], formats: Sequence[BlockScaledStorage], dense: Sequence[Any]
) -> list[Any]:
    """Conversions with which `save_pretrained` writes what `export` and a dense model hold.

    Args:
        read: Conversions with which the model was loaded, without the renamings.
        formats: Storages of its weights.
        dense: The model's own conversions of its experts.
    """
    leaves = {leaf: name for s in formats for leaf, name in s.outputs_last.items()}
    if leaves:
        joined = [c for c in read if isinstance(c, WeightConverter)]
        others = [c for c in read if not isinstance(c, WeightConverter)]
        return [*others, *dense, *(_renamed(c, leaves) for c in joined)]
    suffixes = {storage.codes_suffix for storage in formats} - {""}
    return [*read, *(_with_suffix(c, suffix) for suffix in suffixes for c in read if _is_codes(c))]


def _is_codes(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and all(
        name.endswith(".weight") for name in conversion._original_source_patterns
    )


def _with_suffix(conversion: Any, suffix: str) -> Any:
    return conversion.copy(
        [f"{name}{suffix}" for name in conversion._original_source_patterns],
        [f"{name}{suffix}" for name in conversion._original_target_patterns],
        operations=list(conversion.operations),
    )


def _renamed(conversion: Any, leaves: dict[str, str]) -> Any:
    """Sources under their names in files; targets under the names that `export` gives."""
    sources = [name.rpartition(".") for name in conversion._original_source_patterns]
    leaf = sources[0][2]
    if leaf not in leaves:
        return conversion
    suffix = leaf.removeprefix("weight")
    return conversion.copy(
        [f"{layer}.{leaves[leaf]}" for layer, _, _ in sources],
        [
            f"{name.removesuffix(suffix)}_{leaves[leaf]}"
            for name in conversion._original_target_patterns
        ],
        operations=list(conversion.operations),
    )
