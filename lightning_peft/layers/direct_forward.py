"""The short way through an adapted layer: one low-rank adapter, one fused kernel, one input.

The general way builds the Edit of every adapter in each forward and asks what fits it. With one
adapter whose Edit only refers to its trained tensors, the answer is the same until the adapter, its
tensors, the storage or the layer's class is replaced. The short way checks these by identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core.protocols import LayerOps, Reason
from lightning_peft.core.terms import LowRank
from lightning_peft.layers.adapted_state import ActiveAdapters, AdaptedState
from lightning_peft.layers.group_outputs import HAND_OFF
from lightning_peft.layers.weight_adapter import WeightAdapter

if TYPE_CHECKING:
    from lightning_peft.layers.adapted import Adapted

__all__ = ["DirectForward", "bind_direct"]


class DirectForward:
    """Base and low rank in one call. Copies and pickles of a layer bind again.

    Args:
        module: The layer.
        adapter: Its only acting adapter.
        term: The adapter's change; A and B are parameters of the adapter.
        dropout: Probability of dropping an input element of the branch, in training.
        kernel: The storage's fused kernel.
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: WeightAdapter,
        term: LowRank,
        dropout: float,
        kernel: Callable[..., Tensor],
    ) -> None:
        self._kind, self._adapter, self._kernel = type(module), adapter, kernel
        self._method, self._site = adapter.method, adapter.site
        self._name, self._storage = adapter.site.name, adapter.site.storage
        self._A, self._B, self._scaling, self._dropout = term.A, term.B, term.scaling, dropout

    def run(self, module: Adapted, state: AdaptedState, x: Tensor) -> Tensor | None:
        """Return the layer's output on x; None if something was replaced since it was bound."""
        adapter, site = self._adapter, self._site
        held = adapter._parameters
        if not (
            held.get("A") is self._A
            and held.get("B") is self._B
            and type(module) is self._kind
            and adapter.method is self._method
            and adapter.site is site
            and site.storage is self._storage
            and site.name == self._name
            and adapter.observer is None
        ):
            return None
        if state.projection_group is None:
            HAND_OFF.pending = None  # as `output_of_group`
        else:
            y = state.projection_group.run(module, x)
            if y is not None:
                return y
        dropout = self._dropout if module.training else 0.0
        return self._kernel(module, x, self._A, self._B, self._scaling, dropout)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def bind_direct(module: nn.Module, ops: LayerOps, active: ActiveAdapters) -> DirectForward | None:
    """Return the short way through a layer; None if it has none."""
    others = active.blocks or active.prompts or active.trained_copies or active.routers
    if len(active.edits) != 1 or others or not ops.is_one_product:
        return None
    (adapter,) = active.edits
    if not adapter.method.edit_refers_to_tensors or adapter.observer is not None:
        return None
    edit = adapter.edit()
    if not edit.only_low_rank or len(edit.terms) != 1:
        return None
    term, held, site = edit.terms[0], adapter._parameters, adapter.site
    # A tied adapter reads another's tensors; a tensor scale is computed.
    if type(term) is not LowRank or isinstance(term.scaling, Tensor) or site.batch_shape:
        return None
    if term.A is not held.get("A") or term.B is not held.get("B"):
        return None
    kernel = site.storage.fused(edit.form(), module, site.parameter)
    if isinstance(kernel, Reason):
        return None
    return DirectForward(module, adapter, term, edit.dropout, kernel)
