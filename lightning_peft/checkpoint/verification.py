"""Checks that a checkpoint belongs to a model. They run before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.state_dict import check_state, trained_tensors
from lightning_peft.checkpoint.description import FORMAT, KEY, describe
from lightning_peft.core.marker import unmarked
from lightning_peft.core.names import strip_compile
from lightning_peft.initialization.restore import initialized_shapes
from lightning_peft.methods.registry import from_dict, to_dict
from lightning_peft.models.fingerprint import fingerprint_differences
from lightning_peft.models.history import base_tensors, outside_tensors

__all__ = ["verify"]

# Judged by the sites found.
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


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
    held = _list_of_names(stored.get("kept"))
    _same_base(stored["roots"], live["roots"], held, source, resuming)
    state = unmarked(checkpoint["state_dict"])
    check_state(_expected(model, stored, state), state, strict=True, source=source)


def _expected(
    model: nn.Module, stored: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the live tensors that the file must hold, by canonical key.

    The file's own list decides which tensors of the base it holds. Files of format 1 have no list:
    they may hold any, and must hold what outside of the root is trained in the live model.
    """
    known = base_tensors(model)
    if stored["format"] >= 2:
        listed = _list_of_names(stored.get("kept"))
        base = {name: known[name] for name in listed if name in known}
    else:
        outside = outside_tensors(model)
        base = {name: t for name, t in known.items() if name in state}
        base |= {name: t for name, t in outside.items() if t.requires_grad}
    return {**base, **trained_tensors(model), **initialized_shapes(model, state)}


def _list_of_names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _same_adapters(stored: object, live: dict[str, Any], source: str) -> None:
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
    # Files of earlier versions name the wrappers of torch.compile.
    want_saved, have_saved = (
        sorted(map(strip_compile, side["modules_to_save"])) for side in (stored, live)
    )
    if want_saved != have_saved:
        lines.append(f"modules_to_save: {want_saved} in the file, {have_saved} attached")
    separate = [bool(side.get("separate_copies")) for side in (stored, live)]
    if separate[0] != separate[1]:
        lines.append(f"separate_copies: {separate[0]} in the file, {separate[1]} attached")
    want_sites = {(strip_compile(label), tuple(shape)) for label, shape, _ in stored["sites"]}
    have_sites = {(strip_compile(label), tuple(shape)) for label, shape, _ in live["sites"]}
    lines += [
        f"{label} {list(shape)}: in the file only"
        for label, shape in sorted(want_sites - have_sites)
    ]
    lines += [
        f"{label} {list(shape)}: attached only" for label, shape in sorted(have_sites - want_sites)
    ]
    return lines


def _without(found: dict[str, Any] | None, names: set[str]) -> dict[str, Any] | None:
    """Return a fingerprint without the content of these tensors; shapes and dtypes stay."""
    if not found:
        return None
    tensors = {
        name: [*entry[:2], "" if name in names else entry[2]]
        for name, entry in found["tensors"].items()
    }
    return {"tensors": tensors}


def _same_base(
    stored: dict[str, Any], live: dict[str, Any], held: list[str], source: str, resuming: bool
) -> None:
    """Compare fingerprints, but for the tensors that the file holds: loading overwrites those."""
    for prefix, root in live.items():
        inside = {name.removeprefix(f"{prefix}.") for name in held}
        want = _without(stored[prefix].get("fingerprint"), inside)
        have = _without(root["fingerprint"], inside)
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
