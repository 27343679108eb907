"""Layers that are called with the same tensor, computed as one when the first of them is called.

`share_inputs` finds them (`same_input`); no module's code is changed. When the first layer of a
group runs, the storage computes all of them (one dequantisation, one product, one product for the
gradient of the input), and each of the others is handed its part when it is called with the very
same tensor. Called with another, or with another state, it runs as it would alone: what is decided
depends on nothing but the calls of one forward, so that activation checkpointing repeats it.

Off while compiling, under a mix of adapters by row, for inference tensors (which carry no version),
and wherever the dispatch rule says that nothing is gained.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import LowRank, concat_ranks, low_rank_terms
from lightning_peft.core.protocols import Reason
from lightning_peft.layers.adapted import Adapted, adapters_of
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.projection_groups.analysis import children_sharing_input

__all__ = ["ProjectionGroup", "output_of_group", "share_inputs"]


@runtime_checkable
class SupportsFusedGroup(Protocol):
    """A storage that may compute layers over one input as one."""

    def together(
        self, modules: Sequence[Any], x: Tensor | None, factors: Sequence[Any]
    ) -> list[Tensor] | Reason:
        """Outputs of several layers on one x, each with its (LowRank, dropout), or why they run
        apart; x None asks for the decision alone.
        """
        ...


@dataclass
class _Parts:
    """Outputs that wait for their layers: at most one group's at a time."""

    owner: ProjectionGroup
    x: Tensor
    version: int
    mode: tuple[Any, ...]
    outputs: dict[int, Tensor]
    edits: dict[int, Any]

    def fit(self, m: Any, x: Tensor) -> bool:
        """Whether nothing that matters changed since they were made."""
        return (
            self.x is x
            and x._version == self.version
            and self.mode == _mode(x)
            and self.edits[id(m)] is m._peft.edits
            and _acts_alone(m)
        )


_waiting = threading.local()


def _mode(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device) if on else None


def _acts_alone(m: Any) -> bool:
    """Whether the layer's adapters are edits of its weight and nothing else."""
    state = m._peft
    return bool(state.edits) and not (state.blocks or state.sequences or state.copies)


def output_of_group(m: Any, x: Tensor) -> Tensor | None:
    """The output of an adapted layer where its group is computed as one; None where it runs alone.

    A layer that stands in no group drops what a forward left that did not come to its end.
    """
    shared: ProjectionGroup | None = m._peft.shared
    if shared is None:
        _waiting.parts = None
        return None
    return shared.run(m, x)


class ProjectionGroup:
    """One group. Copies of a module do not carry it: theirs run one by one.

    Attributes:
        members: The layers, in order of calling.
    """

    def __init__(self, members: Sequence[nn.Module] = ()) -> None:
        self.members: tuple[Any, ...] = tuple(members)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectionGroup:
        return ProjectionGroup()

    def __reduce__(self) -> Any:
        return ProjectionGroup, ()

    def run(self, m: Any, x: Tensor) -> Tensor | None:
        """The output of `m`, one of the members, on x; None where it is to run alone."""
        parts: _Parts | None = getattr(_waiting, "parts", None)
        _waiting.parts = None
        if parts is not None and parts.owner is self:
            y = parts.outputs.pop(id(m), None)
            if y is None or not parts.fit(m, x):
                return None
            if parts.outputs:
                _waiting.parts = parts
            return y
        if not self.members or m is not self.members[0] or not _may_share(x):
            return None
        return self._together(m, x)

    def _together(self, m: Any, x: Tensor) -> Tensor | None:
        if self.why_apart():  # before the factors are made
            return None
        factors = []
        for member in self.members:
            found = _factors(member, m)
            if found is None:
                return None
            factors.append(found)
        ys = _storage(m).together(self.members, x, factors)
        if isinstance(ys, Reason):
            return None
        first, *others = ys
        waiting = dict(zip((id(member) for member in self.members[1:]), others, strict=True))
        edits = {id(member): member._peft.edits for member in self.members}
        _waiting.parts = _Parts(self, x, x._version, _mode(x), waiting, edits)
        y: Tensor = first
        return y

    def why_apart(self) -> str:
        """ "" where the members are computed as one, as far as it is known before a call."""
        if not self.members:
            return "a copy of the module"
        decision = _storage(self.members[0]).together(self.members, None, [])
        return str(decision) if isinstance(decision, Reason) else ""


def _storage(m: Any) -> SupportsFusedGroup:
    storage: Any = (m._peft.edits or adapters_of(m))[0].site.storage
    return storage  # type: ignore[no-any-return]  # `_share` looked


def _may_share(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and not x.is_inference()
        and x.is_floating_point()
        and current_mixed_batch() is None
    )


def _factors(m: Any, first: Any) -> tuple[LowRank, float] | None:
    """(all low-rank terms as one, dropout) of a member; None where it cannot be part of a group."""
    if not _acts_alone(m) or m.training != first.training:
        return None
    edits = [a.edit() for a in m._peft.edits]
    if not all(e.only_low_rank for e in edits) or len({e.dropout for e in edits}) > 1:
        return None
    return concat_ranks(low_rank_terms(edits)), edits[0].dropout if m.training else 0.0


def share_inputs(model: nn.Module) -> None:
    """Find the groups among adapted layers, anew."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module._peft.shared = None
    for parent in model.modules():
        if sum(isinstance(child, Adapted) for child in parent.children()) < 2:
            continue
        for names in children_sharing_input(parent):
            _share(parent, names)


def _share(parent: nn.Module, names: Sequence[str]) -> None:
    """Members must be children of their own, of one width, with weights in one kind of storage."""
    alike: dict[Any, list[Any]] = {}
    for name in names:
        m: Any = parent._modules.get(name)
        adapted = isinstance(m, Adapted)
        if not adapted or len(m._peft.ops.parameters(m)) > 1:
            continue
        found = [a for a in adapters_of(m) if a.kind == "weight"]
        if found and "forward" not in vars(m):
            site = found[0].site
            if isinstance(site.storage, SupportsFusedGroup):
                alike.setdefault((site.in_features, site.storage.label), []).append(m)
    for group in alike.values():
        if len(group) > 1:
            shared = ProjectionGroup(group)
            for m in group:
                m._peft.shared = shared
