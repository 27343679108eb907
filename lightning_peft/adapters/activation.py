"""Which adapters act: switching, switching off for a while, rows of one batch under different
adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lightning_peft.core.registry import AdapterRegistry, registries_in
from lightning_peft.layers.adapted import adapted_modules, adapters_of, refresh
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.mixed_batch import mixed_batch

__all__ = ["activate", "adapter_names", "disable_adapters", "set_adapter"]


def set_adapter(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Make these adapters act, in this order, and be trained; None switches all off.

    Raises:
        KeyError: a name that is not attached.
        ValueError: two of them replace the same base weight or parameter.
    """
    wanted = [] if names is None else [names] if isinstance(names, str) else list(names)
    records = list(registries_in(model))
    known = {n for _, _, r in records for n in r.adapters}
    for name in wanted:
        if name not in known:
            raise KeyError(
                f"set_adapter: expected one of {sorted(known)}, got {name!r}; attach it first"
            )
    for _, root, record in records:
        activate(root, record, [n for n in wanted if n in record.adapters])


def activate(root: nn.Module, record: AdapterRegistry, names: list[str]) -> None:
    """`set_adapter` for one root."""
    for label, module in adapted_modules(root):
        _refuse_conflict(label, [a for n in names for a in adapters_of(module, n)])
    record.active = names
    for _, module in adapted_modules(root):
        state = module._peft
        state.names = [n for n in names if n in module.peft]
        for adapter in adapters_of(module):
            acts = adapter.adapter_name in state.names
            adapter.requires_grad_(acts)
            _put_rewrite(adapter, acts)
        refresh(module)


def _refuse_conflict(label: str, adapters: list[Adapter]) -> None:
    rewriting = {a.adapter_name for a in adapters if a.rewrite is not None}
    if rewriting and len({a.adapter_name for a in adapters if a.kind == "weight"}) > 1:
        raise ValueError(
            f"{label!r}: expected one adapter at a time where an initialisation changed the base, "
            f"got {sorted({a.adapter_name for a in adapters})}; activate one, or export it in "
            "plain form"
        )


def _put_rewrite(adapter: Adapter, acts: bool) -> None:
    """Have in the module the base that belongs to the adapter's state, bit for bit."""
    rewrite, site = adapter.rewrite, adapter.site
    if rewrite is None or rewrite.active == acts:
        return
    if acts:
        site.storage.restore(site.module, site.parameter, rewrite.written)
        rewrite.written = None
    else:
        rewrite.written = site.storage.snapshot(site.module, site.parameter)
        site.storage.restore(site.module, site.parameter, rewrite.original)
    rewrite.active = acts


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, bit for bit, inside the block."""
    modules = [m for _, m in adapted_modules(model)]
    merged = next((m for m in modules if m._peft.merged), None)
    if merged is not None:
        raise RuntimeError(
            "disable_adapters: expected unmerged adapters, found merged ones; call unmerge(model) "
            "first"
        )
    try:
        for module in modules:
            module._peft.disabled = True
            for adapter in adapters_of(module):
                _put_rewrite(adapter, False)
            refresh(module)
        yield
    finally:
        for module in modules:
            module._peft.disabled = False
            for adapter in adapters_of(module):
                _put_rewrite(adapter, adapter.adapter_name in module._peft.names)
            refresh(module)


def adapter_names(batch_names: Sequence[str]) -> AbstractContextManager[None]:
    """Each row of the batch under the adapter named for it; ``"__base__"`` for none.

    The adapters named must be active (`set_adapter(model, [...])`): one that is not, in any layer
    that ran, raises ValueError at the end of the block. In training keep the backward pass inside
    the block too: activation checkpointing runs forward again there.
    """
    if isinstance(batch_names, str) or not batch_names:
        raise ValueError(
            f"adapter_names: expected one name per row of the batch, got {batch_names!r}"
        )
    return mixed_batch(batch_names)
