"""Code outside of an adapted layer reads W' and b' under its ``weight`` and ``bias``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import apply_edits
from lightning_peft.core.outside_reads import OutsideTensor, in_own_forward, outside_reader
from lightning_peft.core.site import Site
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.adapted_state import AdaptedState
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.storage.outside_reads import stand_in

if TYPE_CHECKING:
    from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["read_effective"]


def read_effective(m: nn.Module, state: AdaptedState, name: str, held: nn.Parameter) -> Tensor:
    """Return a parameter as the adapted layer computes with it.

    The parameter itself if no acting adapter changes it; a trained copy if there is one; else a
    tensor that is formed when it is used. Its gradient reaches the adapters. Dropout of an adapter
    does not act on it.

    Raises:
        RuntimeError: when the tensor is used, if the change has no matrix, or if rows of the batch
            are under different adapters.
    """
    if in_own_forward(m):
        return held
    active = acting_adapters(m)
    copies = [a.copies()[name] for a in active.trained_copies if name in a.copies()]
    start = copies[-1] if copies else held  # the last one named acts
    edits = [a for a in active.edits if _changes(m, a, name)]
    if not edits:
        return start
    state.telemetry.forward_ran = True  # its adapters are used, if not by its own forward
    state.telemetry.ran_in_graph |= torch.is_grad_enabled()

    def form() -> Tensor:
        return _effective(m, edits, name, start if copies else None)

    if torch.compiler.is_compiling():
        return form()
    is_packed = name == edits[0].site.parameter and edits[0].site.storage.is_quantized
    label = edits[0].site.label if name == "weight" else f"{edits[0].site.name}.{name}"
    facts = (lambda: stand_in(m, name, held.device)) if is_packed else None
    return OutsideTensor.of(held, form, label, facts)


def _changes(m: nn.Module, adapter: WeightAdapter, name: str) -> bool:
    site = adapter.site
    if name == site.parameter:
        return True
    return name == site.ops.bias(m, site.parameter) and adapter.edit().changes_bias


def _effective(
    m: nn.Module, adapters: Sequence[WeightAdapter], name: str, start: Tensor | None
) -> Tensor:
    site: Site = adapters[0].site
    _check_readable(m, adapters, name)
    edits = [a.edit() for a in adapters]
    if name == site.parameter:
        base = None if start is None else site.ops.to_canonical(m, name, start)
        W = apply_edits(site, edits, base)
        return site.ops.from_canonical(m, name, W).to(site.dtype)
    edited = start if start is not None else m._parameters[name]
    for edit in edits:
        edited = edit.edited_bias(edited)
    assert edited is not None
    return edited.to(site.dtype)


def _check_readable(m: nn.Module, adapters: Sequence[WeightAdapter], name: str) -> None:
    where = f"{adapters[0].site.name}.{name}"
    if current_mixed_batch() is not None:
        raise RuntimeError(
            f"{where}: expected rows under one adapter where another module reads the weight, got "
            f"a mixed batch and a read by {outside_reader(m)}; run the adapters one after the other"
        )
    for adapter in adapters:
        reason = adapter.why_not_mergeable()
        if reason:
            raise RuntimeError(
                f"{where}: expected an adapter whose change is a matrix, since "
                f"{outside_reader(m)} reads the weight, got {adapter.method.label}: {reason}; "
                "exclude this layer"
            )
