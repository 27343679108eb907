"""Which adapters act: `set_adapter`, `disable_adapters`, and `adapter_names` for mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.core.registry import AdapterRegistry, is_part, registries_in, registry_of
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules, adapters_of, refresh, unsettled
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.mixed_batch import batch_facts, chosen_adapters, mixed_batch
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = [
    "activate",
    "adapter_names",
    "disable_adapters",
    "set_adapter",
    "task_ids",
    "use_adapters",
]


def set_adapter(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Activate these adapters, in this order, for forward and training; None activates none.

    If several of them train a copy of one parameter, the copy of the last one named acts.

    Raises:
        KeyError: a name that is not attached.
        ValueError: a name twice, or two adapters that replace the same base weight.
    """
    registries = list(registries_in(model))
    wanted = _known_names("set_adapter", names, [r for _, _, r in registries])
    for _, root, registry in registries:
        activate(root, registry, [n for n in wanted if n in registry.adapters])


def activate(root: nn.Module, registry: AdapterRegistry, names: list[str]) -> None:
    """`set_adapter` for one root.

    Raises:
        ValueError: two of the adapters replace the same base weight.
    """
    modules = list(adapted_modules(root))
    for label, module in modules:
        _check_one_base(label, [a for n in names for a in adapters_of(module, n)])
    if not is_part(root, registry):
        registry.active = names
    for _, module in modules:
        active = module._peft.active
        visited = unsettled(module, names)
        active.names = [n for n in names if n in module.peft]
        for adapter in visited:
            acts = adapter.adapter_name in active.names
            adapter.requires_grad_(acts and not adapter.follows)
            adapter.switch_base(acts)
        refresh(module)


def _check_one_base(label: str, adapters: Sequence[Adapter]) -> None:
    """Raise ValueError if an adapter that rewrote the base acts with another on one weight."""
    edits = [a for a in adapters if isinstance(a, WeightAdapter)]
    if not any(a.rewrite is not None for a in edits):
        return
    if len({a.adapter_name for a in edits}) > 1:
        raise ValueError(
            f"{label!r}: expected one adapter at a time where an initialisation changed the base, "
            f"got {sorted({a.adapter_name for a in adapters})}; activate one, or export it in "
            "plain form"
        )


def use_adapters(
    model: nn.Module, names: str | Sequence[str] | None
) -> AbstractContextManager[None]:
    """Let these adapters act inside the block, for this thread or asyncio task only.

    `set_adapter` stays the default for all other threads. The backward pass of what ran inside may
    follow the block, with activation checkpointing too. Inside, `adapter_names` mixes the chosen
    adapters. Which adapters require gradients does not change: training needs them active by
    `set_adapter`. `torch.compile(fullgraph=True)` is not possible inside the block.

        with use_adapters(model, "customer_7"):
            model.generate(**request)

    Args:
        model: The model that adapters were attached to, or a module around it.
        names: Adapters in order; None lets none act.

    Raises:
        KeyError: a name that is not attached.
        ValueError: a name twice.
        RuntimeError: in a forward, if an initialisation changed the base that threads share, or
            other adapters are merged.
    """
    own = registry_of(model)
    registries = [r for _, _, r in registries_in(model)] if own is None else [own]
    wanted = _known_names("use_adapters", names, registries)
    choices = [(r, tuple(n for n in wanted if n in r.adapters)) for r in registries]
    return chosen_adapters(tuple(choices))


def _known_names(
    what: str, names: str | Sequence[str] | None, registries: Sequence[AdapterRegistry]
) -> list[str]:
    wanted = [] if names is None else [names] if isinstance(names, str) else list(names)
    known = {n for r in registries for n in r.adapters}
    for name in wanted:
        if name not in known:
            raise KeyError(
                f"{what}: expected one of {sorted(known)}, got {shown(name)}; attach it first"
            )
        if wanted.count(name) > 1:
            raise ValueError(f"{what}: expected each adapter once, got {wanted}; name it once")
    return wanted


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model, bit for bit, inside the block.

    Raises:
        RuntimeError: adapters are merged.
    """
    modules = [m for _, m in adapted_modules(model)]
    merged = next((m for m in modules if m._peft.active.merged), None)
    if merged is not None:
        raise RuntimeError(
            "disable_adapters: expected unmerged adapters, found merged ones; call unmerge(model) "
            "first"
        )
    try:
        for module in modules:
            module._peft.active.disabled = True
            for adapter in adapters_of(module):
                adapter.switch_base(False)
            refresh(module)
        yield
    finally:
        for module in modules:
            active = module._peft.active
            active.disabled = False
            for adapter in adapters_of(module):
                adapter.switch_base(adapter.adapter_name in active.names)
            refresh(module)


def task_ids(ids: Sequence[int] | Tensor) -> AbstractContextManager[None]:
    """Say which task each sample of the batch belongs to, for Poly and multitask prompts.

    Each thread and each asyncio task has its own block. The backward pass may follow the block,
    with activation checkpointing too. `model.generate` runs inside as well; beams keep the task of
    their sample. `torch.compile(fullgraph=True)` is not possible inside the block.

        with task_ids(batch["task"]):
            loss = model(**batch["inputs"]).loss

    Args:
        ids: Task numbers from 0 on, one per sample.

    Raises:
        ValueError: no list of numbers from 0 on.
    """
    found = torch.as_tensor(ids).cpu()  # layers then compare without waiting for the device
    if found.ndim != 1 or found.dtype != torch.int64 or not len(found) or int(found.min()) < 0:
        got = list(found.shape), found.dtype
        raise ValueError(
            f"task_ids: expected one number per sample, 0 or larger, got a tensor {got}"
        )
    return batch_facts({"tasks": found})


def adapter_names(batch_names: Sequence[str]) -> AbstractContextManager[None]:
    """Run each row of the batch under its own adapter; ``"__base__"`` means no adapter.

    The named adapters must be active (`set_adapter(model, [...])`). If one of them was active in no
    layer that ran, the block raises ValueError at its end. Each thread and each asyncio task has
    its own block. The backward pass may follow the block, with activation checkpointing too; only a
    reentrant checkpoint inside another one needs it inside. `torch.compile(fullgraph=True)` is not
    possible inside the block.
    """
    if isinstance(batch_names, str) or not batch_names:
        raise ValueError(
            f"adapter_names: expected one name per row of the batch, got {batch_names!r}"
        )
    return mixed_batch(batch_names)
