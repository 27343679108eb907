"""What a checkpoint holds of an adapted model, and how it is read back: strictly, by structure.

Written: adapters, trained copies, trained buffers, whatever is trained outside the adapted root;
    beside them, under
`KEY`, plain data that says what they are and which base they belong to. The base itself is never
written; on reading,
it is completed from the live model, so that every strict load downstream passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.state_dict import check_state, trained_tensors
from lightning_peft.core.modules import persistent_buffers
from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import AdapterEntry, AdapterRegistry, registries_in
from lightning_peft.initialization.restore import initialized_shapes, restore_initialized
from lightning_peft.methods.registry import from_dict, to_dict
from lightning_peft.models.fingerprint import buffer_hashes, fingerprint_differences
from lightning_peft.storage import config_to_dict
from lightning_peft.storage.dtensor import fill_rows

__all__ = [
    "FORMAT",
    "KEY",
    "complete_checkpoint",
    "complete_state",
    "describe",
    "filter_checkpoint",
    "filter_state",
    "is_attached",
    "kept_by_live_key",
    "kept_tensors",
    "leaks",
    "load_kept",
    "verify",
]

#: Top-level key of a checkpoint under which everything of ours stands.
KEY = "lightning_peft"
#: Version of that entry; a file with a larger one was written by newer code.
FORMAT = 1

_PACKAGES = (
    "lightning_peft",
    "lightning",
    "pytorch-lightning",
    "torch",
    "transformers",
    "bitsandbytes",
)
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform")  # judged by the sites found


def is_attached(model: nn.Module) -> bool:
    """Whether any adapter is attached below `model`."""
    return any(record.adapters for _, _, record in registries_in(model))


# ---- which tensors


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live tensors that a checkpoint holds, by canonical key, each tensor once.

    Adapter tensors and running statistics; parameters that are trained and buffers outside every
    adapted root; buffers
    inside that were changed since adapters were attached (a codebook, a counter).
    """
    kept = trained_tensors(model)
    kept |= {k: t for k, t in _outside(model).items() if k not in kept}
    kept |= {k: t for k, t in _moved_buffers(model).items() if k not in kept}
    return kept


def kept_by_live_key(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `kept_tensors` under their first key in the live state dict."""
    kept = {id(t) for t in kept_tensors(model).values()}
    found: dict[str, Tensor] = {}
    for key, t in _live(model).items():
        if id(t) in kept:
            kept.remove(id(t))
            found[key] = t
    return found


def _outside(model: nn.Module) -> dict[str, Tensor]:
    prefixes = [prefix for prefix, _, record in registries_in(model) if record.adapters]
    if not prefixes or "" in prefixes:
        return {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {**trained, **persistent_buffers(model)}
    inside = tuple(f"{prefix}." for prefix in prefixes)
    return {strip_compile(n): t for n, t in found.items() if not n.startswith(inside)}


def _moved_buffers(model: nn.Module) -> dict[str, Tensor]:
    moved = {}
    for prefix, root, record in registries_in(model):
        now = buffer_hashes(root)
        buffers = {strip_compile(n): b for n, b in persistent_buffers(root).items()}
        for name, digest in record.buffers.items():
            if name in now and now[name] != digest:
                moved[join(strip_compile(prefix), name)] = buffers[name]
    return moved


def _live(model: nn.Module) -> dict[str, Any]:
    """Every key of the model, aliases too; by the base class: a user may override `state_dict`."""
    live: dict[str, Any] = nn.Module.state_dict(model, keep_vars=True)
    return live


def filter_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The kept part of a full state dict of `model` (or of an average of it), by canonical key.

    A key that the state lacks (a user's own `state_dict` dropped it) is taken from the live model.
    """
    kept = kept_tensors(model)
    canonical = {id(t): key for key, t in kept.items()}
    found: dict[str, Any] = {}
    for key, tensor in _live(model).items():
        name = canonical.get(id(tensor))
        if name is not None and name not in found and key in state:
            found[name] = state[key]
    return {name: found.get(name, t).detach() for name, t in kept.items()}


def complete_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A full state dict of `model`: the base as it is, the rest from `state`, under every alias."""
    canonical = {id(t): key for key, t in kept_tensors(model).items()}
    full: dict[str, Any] = {}
    for key, tensor in _live(model).items():
        name = canonical.get(id(tensor), strip_compile(key))
        value = state.get(name, tensor)
        full[key] = value.detach() if isinstance(value, Tensor) else value
    return full


def load_kept(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into the live model; under FSDP2, this rank's rows of them."""
    canonical = {id(t): key for key, t in kept_tensors(model).items()}
    with torch.no_grad():
        for key, tensor in _live(model).items():
            name = canonical.get(id(tensor), strip_compile(key))
            if name in state:
                fill_rows(tensor, state[name])


# ---- the file as a whole


def describe(model: nn.Module) -> dict[str, Any]:
    """Plain data about every adapter in `model`: what `torch.load(weights_only=True)` takes."""
    roots = {strip_compile(p): _describe_root(r) for p, _, r in registries_in(model) if r.adapters}
    return {"format": FORMAT, "versions": _versions(), "roots": roots}


def _describe_root(record: AdapterRegistry) -> dict[str, Any]:
    return {
        "adapters": {name: _describe_adapter(entry) for name, entry in record.adapters.items()},
        "active": list(record.active),
        "quantization": config_to_dict(record.quantization),
        "fingerprint": record.fingerprint,
    }


def _describe_adapter(entry: AdapterEntry) -> dict[str, Any]:
    return {
        "methods": [to_dict(m) for m in entry.methods],
        "modules_to_save": list(entry.modules_to_save),
        "sites": [[label, list(shape), method] for label, shape, method in entry.sites],
    }


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def filter_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without the base, with our entry; without ``state_dict`` unchanged."""
    if "state_dict" not in checkpoint:
        return dict(checkpoint)
    written = _each_state(dict(checkpoint), lambda state: filter_state(model, state))
    written[KEY] = {**describe(model), **(checkpoint.get(KEY) or {})}
    return written


def complete_checkpoint(
    model: nn.Module, checkpoint: dict[str, Any], source: str, *, resuming: bool = True
) -> dict[str, Any]:
    """Check a checkpoint against the model and add the base to every state dict in it.

    Args:
        model: The model with adapters attached.
        checkpoint: As it was read.
        source: Where from, for messages.
        resuming: Whether training goes on; then the base must be stored the same way.

    Raises:
        ValueError: no adapters in the file, another configuration, another base, tensors that do
            not fit.
    """
    if "state_dict" not in checkpoint:
        return checkpoint
    verify(model, checkpoint, source, resuming=resuming)
    # Beside an average the weights themselves stand apart; the average only rounds the start.
    restore_initialized(model, checkpoint.get("current_model_state", checkpoint["state_dict"]))
    return _each_state(dict(checkpoint), lambda state: complete_state(model, state))


def _each_state(checkpoint: dict[str, Any], change: Any) -> dict[str, Any]:
    """Apply `change` to the weights and to the copies that averaging callbacks put beside them."""
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            checkpoint[key] = change(checkpoint[key])
    callbacks = dict(checkpoint.get("callbacks") or {})
    for name, state in callbacks.items():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            callbacks[name] = {**state, "average_model_state": change(state["average_model_state"])}
    if callbacks:
        checkpoint["callbacks"] = callbacks
    return checkpoint


def leaks(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Paths in the checkpoint of tensors that share memory with the frozen base."""
    kept = {id(t) for t in kept_tensors(model).values()}
    frozen = {
        _local(p).untyped_storage().data_ptr()
        for p in model.parameters()
        if id(p) not in kept and not p.requires_grad and p.device.type != "meta"
    } - {0}
    return [
        path
        for path, tensor in _tensors(checkpoint, "")
        if tensor.device.type != "meta" and _local(tensor).untyped_storage().data_ptr() in frozen
    ]


def _local(t: Tensor) -> Tensor:
    """This process's shard of a DTensor, which itself has no memory to point to."""
    own: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return own


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _tensors(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _tensors(child, f"{path}[{index}]")


# ---- the checks before anything is loaded


def verify(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str, *, resuming: bool = True
) -> None:
    """Raise where the checkpoint does not belong to this model; nothing is changed.

    Raises:
        ValueError: with every difference.
    """
    stored = checkpoint.get(KEY)
    if stored is None:
        raise ValueError(
            f"{source}: expected a checkpoint with adapters, got one without (a full model, or "
            "written without PEFT); to start from it, load it into the module yourself and fit "
            "without ckpt_path"
        )
    if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
        raise ValueError(
            f"{source}: expected a dict with 'format' under {KEY!r}, got {str(stored)[:80]!r}"
        )
    if stored["format"] > FORMAT:
        raise ValueError(
            f"{source}: expected format <= {FORMAT}, got {stored['format']}; update lightning_peft "
            f"(written by {stored.get('versions')})"
        )
    live = describe(model)
    _same_adapters(stored.get("roots"), live["roots"], source)
    _same_base(stored["roots"], live["roots"], source, resuming)
    check_state(
        _expected(model, checkpoint["state_dict"]),
        checkpoint["state_dict"],
        strict=True,
        source=source,
    )


def _expected(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the file must hold: buffers that moved before it was written may stand in it, or not."""
    buffers = {strip_compile(n): b for n, b in persistent_buffers(model).items()}
    required = {**trained_tensors(model), **initialized_shapes(model, state), **_outside(model)}
    return {**{n: b for n, b in buffers.items() if n in state}, **required}


def _same_adapters(stored: Any, live: dict[str, Any], source: str) -> None:
    problems: list[str] = []
    want = _by_name(stored, source)
    have = _by_name(live, source)
    for name in sorted(set(want) | set(have)):
        where, label = name[0] or "the whole module", f"adapter {name[1]!r} on {name[0] or 'root'}"
        if name not in have:
            problems.append(f"{label}: in the file, not attached to {where}")
        elif name not in want:
            problems.append(f"{label}: attached to {where}, not in the file")
        else:
            problems += [f"{label}: {line}" for line in _differences(want[name], have[name])]
    if problems:
        raise ValueError(
            f"{source}: expected the adapters it was written with, got {len(problems)} "
            "differences; nothing was "
            "loaded. Give PEFT the configuration that was saved:\n  " + "\n  ".join(problems[:20])
        )


def _by_name(roots: Any, source: str) -> dict[tuple[str, str], dict[str, Any]]:
    try:
        return {(p, n): a for p, root in roots.items() for n, a in root["adapters"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: expected roots with adapters under {KEY!r}, got {str(roots)[:80]!r}"
        ) from error


def _with_defaults(method: dict[str, Any]) -> dict[str, Any]:
    """The stored method with the fields that later versions added, at their defaults."""
    return to_dict(from_dict(method))


def _differences(stored: dict[str, Any], live: dict[str, Any]) -> list[str]:
    lines = []
    methods = [_with_defaults(method) for method in stored["methods"]]
    for want, have in zip(methods, live["methods"], strict=False):
        for key in sorted(set(want) | set(have)):
            if key not in _WHERE and want.get(key) != have.get(key):
                lines.append(
                    f"{want['method']}.{key}: {want.get(key)} in the file, {have.get(key)} attached"
                )
    if len(stored["methods"]) != len(live["methods"]):
        lines.append(
            f"{len(stored['methods'])} methods in the file, {len(live['methods'])} attached"
        )
    if sorted(stored["modules_to_save"]) != sorted(live["modules_to_save"]):
        lines.append(
            f"modules_to_save: {stored['modules_to_save']} in the file, {live['modules_to_save']} "
            "attached"
        )
    want_sites = {(label, tuple(shape)) for label, shape, _ in stored["sites"]}
    have_sites = {(label, tuple(shape)) for label, shape, _ in live["sites"]}
    lines += [
        f"{label} {list(shape)}: in the file only"
        for label, shape in sorted(want_sites - have_sites)
    ]
    lines += [
        f"{label} {list(shape)}: attached only" for label, shape in sorted(have_sites - want_sites)
    ]
    return lines


def _same_base(stored: dict[str, Any], live: dict[str, Any], source: str, resuming: bool) -> None:
    for prefix, root in live.items():
        want, have = stored[prefix].get("fingerprint"), root["fingerprint"]
        lines = fingerprint_differences(want, have) if want and have else []
        if lines:
            more = f"\n  … and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise ValueError(
                f"{source}: expected the base it was trained on, got another one ({len(lines)} "
                "tensors differ); nothing "
                "was loaded. Build the module from the same pretrained weights; a fresh layer "
                "belongs in "
                "modules_to_save, or needs the same seed:\n  " + "\n  ".join(lines[:12]) + more
            )
        want_q, have_q = stored[prefix].get("quantization"), root["quantization"]
        if want_q != have_q:
            text = f"{source}: written with quantization {want_q}, this model has {have_q}"
            if resuming:
                raise ValueError(f"{text}; the run would not go on from where it stopped")
            warnings.warn(f"{text}; outputs differ by the rounding of the base", stacklevel=4)
