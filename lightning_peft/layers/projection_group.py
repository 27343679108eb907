"""Projection groups: adapted layers that read one tensor and run as one product.

The architecture table declares the groups (`models.shared_inputs`). When the first layer of a group
runs, the storage computes all members: one dequantisation, one product, and one product for the
gradient of the input. Every other member takes its part when it is called with the very same
tensor. Called with another tensor, or in another state, it runs alone. The calls of one forward
decide, so that activation checkpointing repeats the decision.

Layers run one by one while compiling, in mixed batches, for inference tensors (which carry no
version), and where the dispatch rule expects no gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import low_rank_terms
from lightning_peft.core.modules import base_modules
from lightning_peft.core.protocols import Reason, Storage
from lightning_peft.core.terms import LowRank, concat_ranks
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.adapted import Adapted, first_weight_adapter
from lightning_peft.layers.group_outputs import HAND_OFF
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["PendingOutputs", "ProjectionGroup", "SupportsFusedGroup", "share_inputs"]


@runtime_checkable
class SupportsFusedGroup(Protocol):
    """A storage that can compute several layers over one input as one product."""

    def fused_group(
        self,
        modules: Sequence[Adapted],
        x: Tensor | None,
        factors: Sequence[tuple[LowRank, float]] | None,
    ) -> list[Tensor] | Reason:
        """Return the output of every layer on x, or the reason why they run one by one.

        Args:
            modules: The layers.
            x: Their common input, or None before the first call.
            factors: Low-rank term and dropout probability per layer; None to ask for the decision
                alone.
        """
        ...


@dataclass
class PendingOutputs:
    """Outputs that wait for their layers.

    Attributes:
        group: The group that computed them.
        x: Its input.
        version: Version of the input at that time.
        mode: Gradient mode and autocast dtype at that time.
        outputs: Output by id of the layer.
        edits: List of active edits by id of the layer; `refresh` replaces the list.
    """

    group: ProjectionGroup
    x: Tensor
    version: int
    mode: tuple[bool, torch.dtype | None]
    outputs: dict[int, Tensor]
    edits: dict[int, list[WeightAdapter]]

    def fits(self, m: Adapted, x: Tensor) -> bool:
        """Return whether the layer would compute the same output now."""
        return (
            self.x is x
            and x._version == self.version
            and self.mode == _mode(x)
            and self.edits[id(m)] is acting_adapters(m).edits
            and _has_only_edits(m)
        )


def _mode(x: Tensor) -> tuple[bool, torch.dtype | None]:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), dtype


def _has_only_edits(m: Adapted) -> bool:
    active = acting_adapters(m)
    return bool(active.edits) and not (active.blocks or active.prompts or active.trained_copies)


class ProjectionGroup:
    """Layers that read one tensor. Copies of a module do not carry it; their layers run alone.

    Attributes:
        members: The layers, the one that is called first in front.
    """

    def __init__(self, members: Sequence[Adapted] = ()) -> None:
        self.members = tuple(members)

    def __deepcopy__(self, memo: dict[int, object]) -> ProjectionGroup:
        return ProjectionGroup()

    def __reduce__(self) -> tuple[type[ProjectionGroup], tuple[()]]:
        return ProjectionGroup, ()

    def run(self, m: Adapted, x: Tensor) -> Tensor | None:
        """Return the output of one member on x; None if it runs alone."""
        pending, HAND_OFF.pending = HAND_OFF.pending, None
        if pending is not None and pending.group is self:
            y = pending.outputs.pop(id(m), None)
            if y is None or not pending.fits(m, x):
                return None
            if pending.outputs:
                HAND_OFF.pending = pending
            return y
        if not self.members or m is not self.members[0] or not _can_share(x):
            return None
        return self._run_all(x)

    def reason_apart(self) -> str:
        """Return why the members run one by one, as far as it is known before a call; or ""."""
        if not self.members:
            return "a copy of the module"
        decision = self._outputs(None, None)
        return str(decision) if isinstance(decision, Reason) else ""

    def _outputs(
        self, x: Tensor | None, factors: Sequence[tuple[LowRank, float]] | None
    ) -> list[Tensor] | Reason:
        """Ask the storage; since they were bound, a merge may have given some members another."""
        storages = [_storage_of(m) for m in self.members]
        fused = getattr(storages[0], "fused_group", None)  # isinstance of a protocol takes 5 µs
        if fused is None or any(s.label != storages[0].label for s in storages):
            return Reason("stored in different ways")
        outputs: list[Tensor] | Reason = fused(self.members, x, factors)
        return outputs

    def _run_all(self, x: Tensor) -> Tensor | None:
        """Compute all members: return the first one's output, keep the others'."""
        if isinstance(self._outputs(x, None), Reason):  # before the factors are built
            return None
        first, *others = self.members
        factors = [_factors(member, first.training) for member in self.members]
        known = [f for f in factors if f is not None]
        if len(known) < len(factors):
            return None
        outputs = self._outputs(x, known)
        if isinstance(outputs, Reason):
            return None
        HAND_OFF.pending = PendingOutputs(
            self,
            x,
            x._version,
            _mode(x),
            outputs={id(m): y for m, y in zip(others, outputs[1:], strict=True)},
            edits={id(m): acting_adapters(m).edits for m in others},
        )
        return outputs[0]


def _storage_of(m: Adapted) -> Storage:
    edits = m._peft.active.edits
    first = edits[0] if edits else first_weight_adapter(m)
    assert first is not None  # a member has one
    return first.site.storage


def _can_share(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and not x.is_inference()
        and x.is_floating_point()
        and current_mixed_batch() is None
    )


def _factors(m: Adapted, training: bool) -> tuple[LowRank, float] | None:
    """Return (all low-rank terms as one, dropout); None if the layer has another form or mode."""
    if not _has_only_edits(m) or m.training != training:
        return None
    edits = [a.edit() for a in acting_adapters(m).edits]
    if not all(e.only_low_rank for e in edits) or len({e.dropout for e in edits}) > 1:
        return None
    return concat_ranks(low_rank_terms(edits)), edits[0].dropout if training else 0.0


# ---- binding


def share_inputs(model: nn.Module, declared: Iterable[tuple[nn.Module, Sequence[str]]]) -> None:
    """Bind adapted layers to their groups; former bindings are dropped.

    Args:
        model: The root.
        declared: (module, names of its children that read one tensor).
    """
    for module in base_modules(model).values():
        if isinstance(module, Adapted):
            module._peft.projection_group = None
    for parent, names in declared:
        _bind_groups([parent.get_submodule(name) for name in names])


def _bind_groups(layers: Sequence[nn.Module]) -> None:
    """Group layers of one input width whose weights are in one kind of storage."""
    alike: dict[tuple[int, str], list[Adapted]] = {}
    storages: dict[tuple[int, str], Storage] = {}
    for m in layers:
        if not isinstance(m, Adapted):
            continue
        first = first_weight_adapter(m)
        if first is None or "forward" in vars(m) or len(m._peft.ops.parameters(m)) > 1:
            continue
        key = first.site.in_features, first.site.storage.label
        storages[key] = first.site.storage
        alike.setdefault(key, []).append(m)
    for key, members in alike.items():
        if len(members) == 1 or not isinstance(storages[key], SupportsFusedGroup):
            continue
        group = ProjectionGroup(members)
        for member in members:
            member._peft.projection_group = group
