"""`Adapted`: the one mixin of every adapted module, and `Adapter`: one method at one site.

Adapters live in a child named ``peft``, an `nn.ModuleDict` by adapter name; the module's own keys
never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.class_swap import Swapped, swap_in, swap_out
from lightning_peft.core.protocols import LayerOps
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.block import apply_block
from lightning_peft.layers.mixed_batch import MixedBatch, current_mixed_batch, without_mixed_batch
from lightning_peft.layers.prompt.forward import forward_with_prompt

__all__ = [
    "Adapted",
    "AdaptedState",
    "adapt",
    "adapted_modules",
    "adapters_of",
    "refresh",
    "release",
]


@dataclass
class AdaptedState:
    """What an adapted module knows besides its tensors; plain data and references, deep-copied with
    the module.

    Attributes:
        ops: How an Edit acts on this kind of layer.
        names: Active adapters, in the order in which they were named.
        merged: Adapters whose edits are in the weight at this moment.
        disabled: Whether all adapters are switched off for a while.
        edits: Adapters of active, unmerged names that change weights; made by `refresh`.
        blocks: The same, added modules.
        sequences: The same, further positions.
        copies: The same, trained copies of the module's parameters.
        unmerged_bits: Stored bits by parameter from before a merge.
        ran: Whether forward was ever called (a bypassed module never runs).
        prompt_lengths: (positions of prompts, length of the text) of the last forward.
        shared: The group of layers over one input that this one belongs to (`ProjectionGroup`).
        tokens: Of experts: tokens that each was given in training so far, int32 [E].
        counts_tokens: Whether `tokens` still grows: until the report on them was made.
    """

    ops: LayerOps
    names: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    disabled: bool = False
    edits: list[Adapter] = field(default_factory=list)
    blocks: list[Adapter] = field(default_factory=list)
    sequences: list[Adapter] = field(default_factory=list)
    copies: list[Adapter] = field(default_factory=list)
    unmerged_bits: dict[str, Any] = field(default_factory=dict)
    ran: bool = False
    prompt_lengths: tuple[int, int] = (0, 0)
    shared: Any = None
    fast_path_guard: Any = None
    tokens: Tensor | None = None
    counts_tokens: bool = True


class Adapted(Swapped):
    """Mixin: forward with the active adapters around the forward of the class underneath."""

    _swap_prefix = "Adapted"
    _peft: AdaptedState
    peft: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Base forward with every active edit applied, in the order in which adapters were
        named.
        """
        state = self._peft
        state.ran = True
        mix = current_mixed_batch()
        if mix is not None:
            mix.through(state.names)
        run = super().forward  # type: ignore[misc]
        if state.sequences:
            run = partial(_positioned, self, state, run)
        if state.copies:
            return _forward_with_copies(self, state, run, args, kwargs)
        if not state.edits and not state.blocks:
            return run(*args, **kwargs)
        return _forward(self, state, run, state.edits, state.blocks, args, kwargs)


def _forward(
    module: Any,
    state: AdaptedState,
    run: Callable[..., Any],
    edits: Sequence[Adapter],
    blocks: Sequence[Adapter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    x = args[0] if args else next(iter(kwargs.values()))
    y = state.ops.forward(module, run, edits, args, kwargs) if edits else run(*args, **kwargs)
    for adapter in blocks:
        x, y = apply_block(adapter, x, y, partial(_again, module, state, run, edits))
    return y


def _positioned(module: Any, state: AdaptedState, run: Any, *args: Any, **kwargs: Any) -> Any:
    return forward_with_prompt(module, state.sequences, run, args, kwargs)


def _again(
    module: Any,
    state: AdaptedState,
    run: Callable[..., Any],
    edits: Sequence[Adapter],
    x: Tensor,
) -> Any:
    return state.ops.forward(module, run, edits, (x,), {}) if edits else run(x)


def _forward_with_copies(
    module: Any,
    state: AdaptedState,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Forward in which the module reads trained copies in place of its own parameters."""
    mix = current_mixed_batch()
    if mix is not None:
        return _forward_copies_by_row(module, state, run, mix, args, kwargs)
    with state.ops.substituted(module, {k: v for a in state.copies for k, v in a.copies().items()}):
        return _forward(module, state, run, state.edits, state.blocks, args, kwargs)


def _forward_copies_by_row(
    module: Any,
    state: AdaptedState,
    run: Callable[..., Any],
    mix: MixedBatch,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """One run a name over its own rows: copies cannot share a base call."""
    x = args[0]
    y: Tensor | None = None
    for name in dict.fromkeys(mix.names):
        rows = mix.index(name, x.shape[0], x.device)
        copies = {
            k: v for a in state.copies if a.adapter_name == name for k, v in a.copies().items()
        }
        edits = [a for a in state.edits if a.adapter_name == name]
        blocks = [a for a in state.blocks if a.adapter_name == name]
        with state.ops.substituted(module, copies), without_mixed_batch():
            part = _forward(module, state, run, edits, blocks, (x[rows], *args[1:]), kwargs)
        y = part.new_zeros((x.shape[0], *part.shape[1:])) if y is None else y
        y = y.index_copy(0, rows, part.to(y.dtype))
    if y is None:
        raise ValueError("adapter_names: expected at least one name, got an empty list")
    return y


def adapt(module: nn.Module, ops: LayerOps) -> Adapted:
    """Swap `Adapted` in, with an empty container; a module that has it keeps what it has."""
    if not isinstance(module, Adapted):
        swap_in(module, Adapted)
        module._peft = AdaptedState(ops)  # type: ignore[assignment]
        module.peft = nn.ModuleDict()
        module.peft.train(module.training)
    adapted: Any = module
    return adapted  # type: ignore[no-any-return]


def release(module: Any) -> None:
    """Undo `adapt`: class, attributes and children as before."""
    swap_out(module, Adapted)
    if module._peft.fast_path_guard is not None:
        module._peft.fast_path_guard.remove()
    del module.peft
    del module._peft


def adapters_of(module: Any, name: str | None = None) -> list[Adapter]:
    """Adapters of one adapted module, in order of attaching; of one name if given."""
    entries = [e for key, e in module.peft.items() if name is None or key == name]
    return [child for entry in entries for child in entry.modules() if isinstance(child, Adapter)]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(fully qualified name, module) of every adapted module."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def refresh(module: Any) -> None:
    """Recompute which adapters act, after names, merged or disabled changed."""
    state: AdaptedState = module._peft
    names = [] if state.disabled else [n for n in state.names if n not in state.merged]
    acting = [a for n in names for a in adapters_of(module, n)]
    state.edits = [a for a in acting if a.kind == "weight"]
    state.blocks = [a for a in acting if a.kind == "block"]
    state.sequences = [a for a in acting if a.kind == "sequence"]
    state.copies = [a for a in acting if a.kind == "select"]
