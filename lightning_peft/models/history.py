"""History of a model's own tensors since adapters were attached.

A checkpoint holds what the module's own code does not rebuild. That is decided by history and
content, never by `requires_grad` at one moment: whatever was trained, owned by an optimizer outside
of the adapted root, read from a checkpoint, or written to, is in every later file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.finite import is_finite
from lightning_peft.core.modules import base_modules, base_parameters, persistent_buffers
from lightning_peft.core.names import in_adapter, join, strip_compile
from lightning_peft.core.registry import registries_in, registry_of
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.models.content import Contents, changed_tensors, take_content
from lightning_peft.models.relocation import relocation, stray_registries
from lightning_peft.storage import held_tensors
from lightning_peft.storage.dtensor import is_sharded, local

__all__ = [
    "ModelHistory",
    "base_tensors",
    "changed_base",
    "histories_in",
    "move_history",
    "not_finite_at_start",
    "note_loaded",
    "note_moved",
    "note_optimizers",
    "note_read",
    "note_trained",
    "outside_tensors",
    "start_history",
    "tensors_to_keep",
]

_ATTRIBUTE = "_peft_history"


@dataclass
class ModelHistory:
    """History of the tensors of one module, without those of adapters.

    Attributes:
        content: Content of each tensor at the start, by canonical name.
        kept: Names of the tensors that files hold from now on.
        not_finite: Names of the buffers that held NaN or infinity at the start, such as masks.
    """

    content: Contents = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    not_finite: set[str] = field(default_factory=set)


def start_history(model: nn.Module, again: Iterable[str] = ()) -> ModelHistory:
    """Remember the content of the model's own tensors; tensors known already keep their entry.

    Args:
        model: The module to watch.
        again: Names of modules whose tensors were rewritten by us, such as packed layers.
    """
    found = _history_of(model)
    rewritten = tuple(f"{strip_compile(name)}." for name in again)
    wanted = {
        name: t
        for name, t in base_tensors(model).items()
        if name not in found.content or name.startswith(rewritten)
    }
    tensors = _watched(model, wanted) if wanted else wanted
    found.content |= take_content(tensors)
    buffers = {strip_compile(name) for name in persistent_buffers(model)}
    found.not_finite |= {n for n in buffers & tensors.keys() if not is_finite(local(tensors[n]))}
    return found


def note_read(model: nn.Module) -> None:
    """Remember the content of tensors that had no values before, because the base was not read."""
    for _, module, history in histories_in(model):
        own = base_tensors(module)
        fresh = {n: t for n, t in own.items() if history.content.get(n, t) is None}
        history.content |= take_content(_watched(module, fresh))


def _history_of(model: nn.Module) -> ModelHistory:
    """Return the history of exactly this module: an adapted root has it in its registry.

    A part of an adapted root begins with what is known of it there.
    """
    registry = registry_of(model)
    if registry is None:
        found: ModelHistory | None = vars(model).get(_ATTRIBUTE)
        if found is None:
            found = _history_from_root(model)
            vars(model)[_ATTRIBUTE] = found
        return found
    if registry.history is None:
        registry.history = vars(model).pop(_ATTRIBUTE, None) or ModelHistory()
    return registry.history


def _history_from_root(model: nn.Module) -> ModelHistory:
    found = ModelHistory()
    for registry in stray_registries(model):
        if registry.history is not None:
            moved = move_history(registry.history, relocation(model)[0])
            found = ModelHistory(
                found.content | moved.content,
                found.kept | moved.kept,
                found.not_finite | moved.not_finite,
            )
    return found


def move_history(history: ModelHistory, rename: Callable[[str], str | None]) -> ModelHistory:
    """Return the history under other names; a name that becomes None is left out."""
    content = {rename(name): entry for name, entry in history.content.items()}
    kept, not_finite = (
        {new for name in names if (new := rename(name)) is not None}
        for names in (history.kept, history.not_finite)
    )
    known = {name: entry for name, entry in content.items() if name is not None}
    return ModelHistory(known, kept, not_finite)


def histories_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModelHistory]]:
    """Yield (prefix, module, history) of every history in the tree below `model`."""
    for name, module in base_modules(model).items():
        registry = registry_of(module)
        found = vars(module).get(_ATTRIBUTE) if registry is None else registry.history
        if found is not None:
            yield name, module, found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers that belong to no adapter, by canonical name."""
    found: dict[str, Tensor] = {**base_parameters(model), **persistent_buffers(model)}
    return {strip_compile(n): t for n, t in found.items() if not in_adapter(n)}


def outside_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `base_tensors` that lie in no adapted root."""
    roots = [strip_compile(p) for p, _, registry in registries_in(model) if registry.adapters]
    if not roots or "" in roots:
        return {}
    inside = tuple(f"{root}." for root in roots)
    return {n: t for n, t in base_tensors(model).items() if not n.startswith(inside)}


def _watched(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module that no inner history watches and that we do not rewrite."""
    inner = tuple(f"{strip_compile(p)}." for p, _, _ in histories_in(model) if p)
    ours = _rewritten_by_adapters(model)
    return {
        name: t for name, t in tensors.items() if not name.startswith(inner) and name not in ours
    }


def _rewritten_by_adapters(model: nn.Module) -> set[str]:
    """Return names of tensors that hold merged weights, or the base of an initialisation."""
    found: set[str] = set()
    for name, module in adapted_modules(model):
        if module._peft.active.merged or module._peft.merge_undo is not None:
            found |= {join(name, key) for key, _ in module.named_parameters()}
            continue
        for adapter in weight_adapters_of(module):
            if adapter.rewrite is not None and not adapter.follows:
                weight = adapter.site.parameter
                held = [k for k, t in held_tensors(module).items() if t.weight == weight]
                found |= {join(name, key) for key in held or [weight]}
    return {strip_compile(name) for name in found}


# ---- what files hold from now on


def note_trained(model: nn.Module) -> None:
    """Keep the parameters, other than those of adapters, that require a gradient at this moment."""
    found = list(histories_in(model))
    for prefix, module, history in found:
        trained = {n for n, p in base_parameters(module).items() if p.requires_grad}
        names = {strip_compile(n) for n in trained if not in_adapter(n)}
        history.kept |= _own([p for p, _, _ in found], prefix, names)


def note_optimizers(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Keep the parameters outside of adapted roots that an optimizer holds, frozen ones too."""
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    _keep(model, {name for name, t in outside_tensors(model).items() if id(t) in held})


def note_loaded(model: nn.Module, names: Iterable[str]) -> None:
    """Keep the tensors of the base that a checkpoint held, by canonical name."""
    known = base_tensors(model)
    _keep(model, {name for name in names if name in known})


def note_moved(model: nn.Module) -> None:
    """Keep the tensors whose content moved since the start.

    Under FSDP2 every rank must call it: a tensor that moved on one rank is kept on all.
    """
    sharded = False
    for _, module, history in histories_in(model):
        tensors = _not_kept(module, history)
        sharded = sharded or any(is_sharded(t) for t in tensors.values())
        history.kept |= set(changed_tensors(history.content, tensors))
    if sharded and dist.is_available() and dist.is_initialized():
        for _, _, history in histories_in(model):
            found: list[set[str]] = [set()] * dist.get_world_size()
            dist.all_gather_object(found, history.kept)
            history.kept = set().union(*found)


def _not_kept(module: nn.Module, history: ModelHistory) -> dict[str, Tensor]:
    """Return the watched tensors of a module that files do not hold yet."""
    own = base_tensors(module)
    return _watched(module, {n: t for n, t in own.items() if n not in history.kept})


def changed_base(model: nn.Module) -> list[str]:
    """Return the canonical names of base tensors that the module's code does not rebuild.

    They were trained, owned by an optimizer, read from a file, or moved.

    Nothing is noted. Tensors under FSDP2 are compared by the rows of this process.
    """
    found = set(tensors_to_keep(model))
    for prefix, module, history in histories_in(model):
        changed = changed_tensors(history.content, _not_kept(module, history))
        found |= {join(strip_compile(prefix), name) for name in changed}
    return [name for name in base_tensors(model) if name in found]


def tensors_to_keep(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that the histories keep, by canonical name."""
    kept = [
        join(strip_compile(prefix), name)
        for prefix, _, history in histories_in(model)
        for name in sorted(history.kept)
    ]
    known = base_tensors(model) if kept else {}
    return {name: known[name] for name in kept if name in known}


def not_finite_at_start(model: nn.Module) -> set[str]:
    """Return the canonical names of buffers that held NaN or infinity from the start."""
    return {
        join(strip_compile(prefix), name)
        for prefix, _, history in histories_in(model)
        for name in history.not_finite
    }


def _keep(model: nn.Module, names: set[str]) -> None:
    if not names:
        return
    found = list(histories_in(model))
    for prefix, _, history in found:
        own = _relative(names, strip_compile(prefix))
        history.kept |= _own([p for p, _, _ in found], prefix, own)


def _relative(names: set[str], prefix: str) -> set[str]:
    if not prefix:
        return set(names)
    return {n.removeprefix(f"{prefix}.") for n in names if n.startswith(f"{prefix}.")}


def _own(prefixes: Iterable[str], prefix: str, names: set[str]) -> set[str]:
    """Return the names, relative to `prefix`, that no history further inside watches.

    Args:
        prefixes: Where all histories lie.
        prefix: Where the history of the names lies.
        names: Names relative to it.
    """
    start = f"{prefix}." if prefix else ""
    inner = tuple(
        f"{strip_compile(p.removeprefix(start))}."
        for p in prefixes
        if p != prefix and p.startswith(start)
    )
    return {n for n in names if not n.startswith(inner)}
