"""State of an adapted module, by job: what acts, what undoes a merge, what was observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.core.per_thread import PerThread
from lightning_peft.core.protocols import LayerOps

if TYPE_CHECKING:
    from lightning_peft.layers.adapter import Adapter
    from lightning_peft.layers.block import BlockAdapter
    from lightning_peft.layers.copy_adapter import CopyAdapter
    from lightning_peft.layers.direct_forward import DirectForward
    from lightning_peft.layers.projection_group import ProjectionGroup
    from lightning_peft.layers.prompt.adapter import PromptAdapter
    from lightning_peft.layers.router_adapter import RouterAdapter
    from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["ActiveAdapters", "AdaptedState", "MergeUndo", "Telemetry", "UndoStep", "state_of"]


@dataclass
class ActiveAdapters:
    """The adapters that act in the next forward of one module.

    Attributes:
        names: Chosen adapters, in the order in which the user named them.
        merged: Adapters whose edits are in the weight already.
        disabled: Whether `disable_adapters` switched all adapters off.
        edits: Acting adapters that change weights.
        blocks: Acting adapters that add a module.
        prompts: Acting adapters that add positions to the sequence.
        routers: Acting adapters that decide how much others act.
        trained_copies: Acting adapters whose copies replace the module's parameters.
    """

    names: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    disabled: bool = False
    edits: list[WeightAdapter] = field(default_factory=list)
    blocks: list[BlockAdapter] = field(default_factory=list)
    prompts: list[PromptAdapter] = field(default_factory=list)
    routers: list[RouterAdapter] = field(default_factory=list)
    trained_copies: list[CopyAdapter] = field(default_factory=list)

    def acting_names(self) -> list[str]:
        """Names that act: chosen, not merged, not disabled."""
        return [] if self.disabled else [n for n in self.names if n not in self.merged]

    def replace(self, acting: Iterable[Adapter]) -> None:
        """Let exactly these adapters act. Each kind gets a new list."""
        self.edits, self.blocks, self.prompts, self.trained_copies = [], [], [], []
        self.routers = []
        for adapter in acting:
            adapter.activate(self)


class UndoStep(Protocol):
    """One change that a merge made to a module."""

    def undo(self) -> None:
        """Take the change back, bit for bit."""
        ...


@dataclass
class MergeUndo:
    """The changes that a merge made to one module.

    Attributes:
        steps: The changes, first to last; empty if the base was not kept.
        base_kept: False after ``merge(keep_base=False)``, which cannot be undone.
    """

    steps: list[UndoStep] = field(default_factory=list)
    base_kept: bool = True

    def undo(self) -> None:
        """Take every change back, last to first."""
        while self.steps:
            self.steps.pop().undo()


@dataclass
class Telemetry:
    """Observations of the running module; read by reports and gradient checks.

    Attributes:
        forward_ran: Whether forward was ever called. A bypassed module never runs.
        ran_in_graph: Whether forward was ever called with gradients enabled.
        expert_tokens: Tokens routed to each expert in training so far, int32 [E].
        counts_tokens: Whether `expert_tokens` still grows; False after the report on tokens.
    """

    forward_ran: bool = False
    ran_in_graph: bool = False
    expert_tokens: Tensor | None = None
    counts_tokens: bool = True


@dataclass
class AdaptedState:
    """State of an adapted module besides its tensors; deep-copied with the module.

    Attributes:
        ops: How an Edit acts on this kind of layer.
        active: The adapters that act.
        merge_undo: The changes made by a merge; None while nothing is merged.
        telemetry: Observations for reports and checks.
        choices: Acting adapters by the names that a thread chose; see `acting`.
        rewriting: Adapters whose initialisation rewrote the base, by the last of `choices`.
        known: Entries of `peft` that `is_exclusive` was found for.
        settled: Entries of `peft` whose gradients and base bits follow `active`. Activating others
            visits the entries that change, not all.
        is_exclusive: Whether one thread at a time runs the forward, which puts tensors on the
            module for a moment.
        prompt_lengths: (prompt positions, text positions) of this thread's last forward, handed to
            the hook that removes the prompt from the output of a custom model.
        projection_group: The layers that read one input with this layer; None if there are none.
        direct: The short way through the layer; None if it has none or is not bound yet.
        has_no_direct: Whether binding it found that there is none. `refresh` asks again.
        fast_path_guard: An empty hook that keeps `nn.TransformerEncoderLayer` off its fused eval
            path, which would bypass the adapter. `release` removes it.
    """

    ops: LayerOps
    active: ActiveAdapters = field(default_factory=ActiveAdapters)
    merge_undo: MergeUndo | None = None
    telemetry: Telemetry = field(default_factory=Telemetry)
    choices: dict[tuple[str, ...], ActiveAdapters] = field(default_factory=dict)
    rewriting: list[WeightAdapter] = field(default_factory=list)
    known: dict[str, nn.Module | None] = field(default_factory=dict)
    settled: dict[str, nn.Module | None] = field(default_factory=dict)
    is_exclusive: bool = False
    prompt_lengths: PerThread[tuple[int, int]] = field(
        default_factory=lambda: PerThread(_no_lengths)
    )
    projection_group: ProjectionGroup | None = None
    direct: DirectForward | None = None
    has_no_direct: bool = False
    fast_path_guard: RemovableHandle | None = None


def _no_lengths() -> tuple[int, int]:
    return 0, 0


def state_of(module: nn.Module) -> AdaptedState:
    """State of a module that has adapters."""
    state: AdaptedState = vars(module)["_peft"]
    return state
