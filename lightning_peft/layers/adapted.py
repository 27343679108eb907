"""`Adapted`: the one mixin of every adapted module, and `Adapter`: one method at one site.

Adapters live in a child named ``peft``, an `nn.ModuleDict` by adapter name; the module's own keys
never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.edit import Edit
from lightning_peft.layers.rows import RowMix, current_rows, no_rows
from lightning_peft.layers.sequence import run_with_positions
from lightning_peft.site import LayerOps, Site
from lightning_peft.swap import Swapped, swap_in, swap_out

__all__ = [
    "Adapted",
    "AdaptedState",
    "Adapter",
    "Rewrite",
    "Tap",
    "adapt",
    "adapted_modules",
    "adapters_of",
    "refresh",
    "release",
]


@dataclass
class Rewrite:
    """A base weight that an adapter's initialisation replaced (PiSSA's residual …).

    Attributes:
        original: Stored bits from before, on the CPU.
        written: Stored bits after, on the CPU while the adapter is switched off.
        active: Whether the replaced weight is in the module.
    """

    original: Any
    written: Any = None
    active: bool = True


class Adapter(nn.Module):
    """One method at one site: its tensors, and the way to its Edit.

    Attributes:
        method: The frozen dataclass.
        site: Where it acts; not a submodule.
        adapter_name: The name it was attached under.
        shared: Tensors held by the root for all sites; not owned.
        rewrite: What its initialisation did to the base weight, if anything.
        paths: For trained copies: our parameter name → path of the parameter in the module.
        tap: A hook on another module (`Tap`, `Widen`), None without one.
        waiting: Whether it is to start from data and has not yet.
    """

    method: Any
    site: Site
    adapter_name: str
    shared: Mapping[str, Tensor]
    rewrite: Rewrite | None

    def __init__(self, method: Any, site: Site, adapter_name: str) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.adapter_name = adapter_name
        self.shared = {}
        self.rewrite = None
        self.paths: dict[str, str] = {}
        self.tap: Any = None
        self.waiting = bool(getattr(method, "needs_data", ""))

    @property
    def kind(self) -> str:
        """``"weight"``, ``"block"``, ``"sequence"`` or ``"select"`` (a trained copy of
        parameters).
        """
        kind: str = self.method.kind
        return kind

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the method's own names."""
        return {**self.shared, **self._parameters, **self._buffers}  # type: ignore[dict-item]

    def copies(self) -> dict[str, Tensor]:
        """Trained copies by the path of what they stand for."""
        return {path: self._parameters[name] for name, path in self.paths.items()}  # type: ignore[misc]

    def edit(self) -> Edit:
        """The change of the site's weight at this moment."""
        edit: Edit = self.method.edit(self.tensors(), self.site)
        return edit

    def extra_repr(self) -> str:
        """Method and tensor shapes, for print(model)."""
        shapes = ", ".join(
            f"{n} {list(t.shape)}" for n, t in self.tensors().items() if t is not None
        )
        return f"{self.method.label}: {shapes}"


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
        put_before: (positions of prompts, length of the text) of the last forward.
        shared: The group of layers over one input that this one belongs to (`SharedInput`).
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
    put_before: tuple[int, int] = (0, 0)
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
        mix = current_rows()
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
    return run_with_positions(module, state.sequences, run, args, kwargs)


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
    mix = current_rows()
    if mix is not None:
        return _forward_copies_by_row(module, state, run, mix, args, kwargs)
    with state.ops.shadowed(module, {k: v for a in state.copies for k, v in a.copies().items()}):
        return _forward(module, state, run, state.edits, state.blocks, args, kwargs)


def _forward_copies_by_row(
    module: Any,
    state: AdaptedState,
    run: Callable[..., Any],
    mix: RowMix,
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
        with state.ops.shadowed(module, copies), no_rows():
            part = _forward(module, state, run, edits, blocks, (x[rows], *args[1:]), kwargs)
        y = part.new_zeros((x.shape[0], *part.shape[1:])) if y is None else y
        y = y.index_copy(0, rows, part.to(y.dtype))
    if y is None:
        raise ValueError("adapter_names: expected at least one name, got an empty list")
    return y


def apply_block(
    adapter: Adapter, x: Any, y: Any, again: Callable[[Tensor], Any]
) -> tuple[Any, Any]:
    """Input and output of a layer with the added module's effect, on the rows that are under it.

    A tuple output carries the hidden states first. `again` runs the layer on another input.
    """
    role = adapter.site.role  # type: ignore[attr-defined]
    hidden = y[0] if isinstance(y, tuple) else y
    if role == "beside":
        read = x if adapter.tap is None else adapter.tap.take()
        if read.shape[:-1] != hidden.shape[:-1]:  # a mixture of experts puts tokens in one row
            read = read.reshape(*hidden.shape[:-1], read.shape[-1])
    else:
        read = hidden
    mix = current_rows()
    if mix is None:
        change = adapter.method.change(adapter.block, read, adapter.site).to(hidden.dtype)
    else:
        rows = mix.index(adapter.adapter_name, hidden.shape[0], hidden.device)
        part = adapter.method.change(adapter.block, read[rows], adapter.site)
        change = torch.zeros_like(hidden).index_copy(0, rows, part.to(hidden.dtype))
    if role == "norm":
        x = x + change
        return x, again(x)
    out = hidden + change
    return x, (out, *y[1:]) if isinstance(y, tuple) else out


class Tap:
    """Keeps the input of one module for an adapter on another, within one forward of a block.

    Both run inside the same block, so that activation checkpointing repeats both.
    """

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        self.adapter = adapter
        self.seen: Tensor | None = None
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: keep the input while the adapter acts."""
        state: Any = self.adapter.site.module._peft
        if self.adapter in state.blocks:
            self.seen = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Tensor:
        """The input that was kept, once.

        Raises:
            RuntimeError: the tapped module did not run before the adapter's.
        """
        x, self.seen = self.seen, None
        if x is None:
            raise RuntimeError(
                f"{self.adapter.site.label}: expected the module that leads into the feed-forward "
                "branch to run before it, found that it did not; name the modules in "
                "target_modules"
            )
        return x


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
