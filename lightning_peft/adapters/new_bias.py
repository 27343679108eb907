"""Refuses changes of a bias that a layer of the library does not have."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.adapters.merge_plan import ModuleMerge

__all__ = ["check_no_new_bias"]


def check_no_new_bias(plan: Sequence[ModuleMerge], what: str) -> None:
    """Raise if a merge would give a layer a bias that its library leaves out.

    Args:
        plan: The plan of the merge.
        what: Name of the function that merges, for the message.

    Raises:
        RuntimeError: with the layer and the method.
    """
    for part in plan:
        for adapter in part.edits():
            ops, site = adapter.site.ops, adapter.site
            if adapter.edit().bias is None or ops.bias(part.module, site.parameter) is not None:
                continue
            raise RuntimeError(
                f"{what} {part.label!r}: expected a change of the weight alone, got one "
                f"of the bias by {adapter.method.label} on a layer without a bias, which "
                "the library's config cannot describe; train without it (lora_bias=False), or "
                "keep the model in memory with merge(model)"
            )
