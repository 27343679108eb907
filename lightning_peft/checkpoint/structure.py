"""The structure of a checkpoint that was read: the right kinds of values, before any is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from lightning_peft.checkpoint.description import KEY
from lightning_peft.checkpoint.rng_state import malformed_generators

__all__ = ["check_like", "check_structure"]

_Rule = tuple[Callable[[object], bool], str]
_LARGEST = 1 << 62


def check_structure(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise unless the fields have the form in which a Trainer and this package write them.

    Raises:
        ValueError: with every field that is malformed.
    """
    problems = [*_fields(checkpoint, _TOP, "")]
    for name in ("loops", "lr_schedulers"):
        problems += _numbers(checkpoint.get(name), name)
    entry = checkpoint.get(KEY)
    if isinstance(entry, Mapping):
        problems += _fields(entry, _ENTRY, f"{KEY}.")
        problems += _roots(entry.get("roots"))
        states = entry.get("rng")
        for i, state in enumerate(states if _is_dicts(states) else ()):
            bad = malformed_generators(state)
            problems += [f"{KEY}.rng[{i}].{name}: expected a random state" for name in bad]
    if problems:
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{source}: expected a checkpoint as a Trainer writes it, got {len(problems)} "
            "malformed fields; nothing was loaded. Resume from another checkpoint:\n  "
            + "\n  ".join(problems[:8])
            + more
        )


def check_like(found: object, live: object, source: str, what: str, *, complete: bool) -> None:
    """Raise unless a stored state has the form of the live one: the same counts, rates and dicts.

    Args:
        found: The state in the file.
        live: The state of the live object.
        source: The checkpoint, for messages.
        what: The name of the state, for messages.
        complete: Whether every live key must be there; false for files of other versions.

    Raises:
        ValueError: with the first fields that are malformed.
    """
    problems = list(_unlike(found, live, what, complete))
    if problems:
        raise ValueError(
            f"{source}: expected {what} as in the live run, got {len(problems)} malformed fields. "
            "Resume from another checkpoint:\n  " + "\n  ".join(problems[:8])
        )


def _unlike(found: object, live: object, path: str, complete: bool) -> Iterator[str]:
    """Yield where counts and dicts are of another kind than in the live state."""
    if isinstance(live, Mapping):
        if not isinstance(found, Mapping):
            yield f"{path}: expected a dict, got {_short(found)}"
            return
        for key, child in live.items():
            if key in found:
                yield from _unlike(found[key], child, f"{path}.{key}", complete)
            elif complete:
                yield f"{path}.{key}: missing"
    elif type(live) is int and (not _is_number(found) or found < min(live, 0)):
        yield f"{path}: expected a count, got {_short(found)}"
    elif type(live) is list and live and all(_is_number(each) for each in live):
        if not isinstance(found, list | tuple) or len(found) != len(live):
            yield f"{path}: expected {len(live)} numbers, got {_short(found)}"
        elif not all(map(_is_number, found)):
            yield f"{path}: expected numbers, got {_short(found)}"
    elif type(live) is list and live and all(_is_dict(each) for each in live):
        if not _is_dicts(found) or len(found) != len(live):
            yield f"{path}: expected {len(live)} states, got {_short(found)}"
            return
        for i, (one, other) in enumerate(zip(found, live, strict=True)):
            yield from _unlike(one, other, f"{path}[{i}]", complete)
    elif type(live) is float and not _is_number(found):
        yield f"{path}: expected a number, got {_short(found)}"
    elif type(live) is bool and type(found) is not bool:
        yield f"{path}: expected true or false, got {_short(found)}"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: object) -> TypeGuard[float]:
    if type(value) is int or type(value) is float:
        return abs(value) < _LARGEST or value in (math.inf, -math.inf)
    return False


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_named(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_dicts(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(child) for pair in value.items() for child in pair)
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _is_optimizers(value: object) -> bool:
    return _is_dicts(value) and all(
        _is_dict(each.get("state")) and _is_dicts(each.get("param_groups")) for each in value
    )


def _is_sites(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(site, list | tuple)
        and len(site) == 3
        and isinstance(site[0], str)
        and isinstance(site[1], list | tuple)
        and all(map(_is_count, site[1]))
        and isinstance(site[2], str)
        for site in value
    )


def _is_fingerprint(value: object) -> bool:
    if value is None:
        return True
    tensors = value.get("tensors") if isinstance(value, Mapping) else None
    return isinstance(tensors, Mapping) and all(
        isinstance(entry, list | tuple)
        and len(entry) == 3
        and isinstance(entry[0], list | tuple)
        and all(map(_is_count, entry[0]))
        and all(isinstance(part, str) for part in entry[1:])
        for entry in tensors.values()
    )


def _is_gradients(value: object) -> bool:
    return _is_dicts(value) and all(
        isinstance(name, str) and isinstance(g, Tensor) and g.is_floating_point()
        for each in value
        for name, g in each.items()
    )


_DICT: _Rule = (_is_dict, "a dict")
_NAMES: _Rule = (_is_names, "a list of names")
_DICTS: _Rule = (_is_dicts, "a list of dicts")
_COUNT: _Rule = (_is_count, "a count")
_OPTIONAL: _Rule = (lambda value: value is None or _is_dict(value), "a dict or None")

_TOP: Mapping[str, _Rule] = {
    "state_dict": (_is_named, "a dict by name"),
    "current_model_state": (_is_named, "a dict by name"),
    "optimizer_states": (_is_optimizers, "a list of dicts of 'state' and 'param_groups'"),
    "lr_schedulers": _DICTS,
    "epoch": _COUNT,
    "global_step": _COUNT,
    "callbacks": _DICT,
    "loops": _OPTIONAL,
}
_ENTRY: Mapping[str, _Rule] = {
    "kept": _NAMES,
    "tensors": _NAMES,
    "trained": _NAMES,
    "rng": (lambda value: value is None or _is_dicts(value), "a list of states"),
    "gradients": (_is_gradients, "a list of gradients by name"),
    "stepped": (
        lambda value: isinstance(value, list) and all(map(_is_names, value)),
        "names by optimizer",
    ),
    "optimizers": (
        lambda value: (
            isinstance(value, list)
            and all(isinstance(each, list) and all(map(_is_names, each)) for each in value)
        ),
        "names by optimizer and group",
    ),
}
_ROOT: Mapping[str, _Rule] = {
    "adapters": (_is_named, "a dict by name"),
    "active": _NAMES,
    "quantization": _OPTIONAL,
    "fingerprint": (_is_fingerprint, "shape, dtype and hash by name"),
}
#: Fields of an adapter that a file may leave out.
_OPTIONAL_FIELDS = ("separate_copies",)
_ADAPTER: Mapping[str, _Rule] = {
    "methods": (
        lambda value: _is_dicts(value) and not any(map(_holds_tensors, value)),
        "a list of dicts of plain data",
    ),
    "modules_to_save": _NAMES,
    "separate_copies": (lambda value: isinstance(value, bool), "true or false"),
    "sites": (_is_sites, "name, shape and method per layer"),
}


def _fields(found: Mapping[str, Any], rules: Mapping[str, _Rule], path: str) -> Iterator[str]:
    for name, (holds, rule) in rules.items():
        if name in found and not holds(found[name]):
            yield f"{path}{name}: expected {rule}, got {_short(found[name])}"


def _roots(roots: object) -> Iterator[str]:
    if not isinstance(roots, Mapping):
        return  # `verify` says so
    for prefix, root in roots.items():
        where = f"{KEY}.roots[{prefix!r}]"
        if not isinstance(prefix, str) or not isinstance(root, Mapping):
            yield f"{where}: expected a dict, got {_short(root)}"
            continue
        missing = [name for name in _ROOT if name not in root]
        yield from (f"{where}.{name}: missing" for name in missing)
        yield from _fields(root, _ROOT, f"{where}.")
        adapters = root.get("adapters")
        for name, adapter in adapters.items() if isinstance(adapters, Mapping) else ():
            if not isinstance(adapter, Mapping):
                yield f"{where}.{name}: expected a dict, got {_short(adapter)}"
                continue
            absent = [field for field in _ADAPTER if field not in (*adapter, *_OPTIONAL_FIELDS)]
            yield from (f"{where}.{name}.{field}: missing" for field in absent)
            yield from _fields(adapter, _ADAPTER, f"{where}.{name}.")


def _numbers(value: object, path: str) -> Iterator[str]:
    """Yield the numbers that no counter or rate can have."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _numbers(child, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from _numbers(child, f"{path}[{i}]")
    elif isinstance(value, float) and math.isnan(value):
        yield f"{path}: expected a number, got NaN"
    elif isinstance(value, int) and abs(value) > _LARGEST:
        yield f"{path}: expected a number below 2**62, got {_short(value)}"


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.numel()} values of {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 60 else f"{text[:57]}…"
